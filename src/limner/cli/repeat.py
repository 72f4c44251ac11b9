"""`limner sample --from picture.png`: the same drawing again, from the recipe that a PNG carries."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.cli.console import emit, progress
from limner.errors import LimnerError
from limner.outputs import Picture, writer

if TYPE_CHECKING:
    from limner.redraw import Repeat


def repeat(source: Path, run: str | None, out: str, *, classifier: str | None, classifier_flags: str | None, batch: int,
           flags: str | None, config: str | None, overwrite: bool, as_json: bool,
           other: dict[str, Any]) -> None:  # fmt: skip
    """Draw again what `source` tells, with `run`, else with the run that it names. other: options that say what or how
    to draw; the picture says that already, hence LimnerError for any that is given."""
    from limner import api, zoo
    from limner.cli.sample import counter, drawing_generator
    from limner.generator import to_uint8
    from limner.redraw import Repeat, facts_of, further_facts

    for name, value in other.items():
        if value is not None and value != []:
            raise LimnerError(f"--{name}: doesn't go with --from, whose picture says it already")
    told = Repeat.read(source)
    run = told.run if run is None else run
    if not zoo.located(run).exists():
        raise LimnerError(f"{source}: was drawn by {run}, which is not there; name the RUN")
    gen = drawing_generator(api.load(run, flags=flags, config=config, int8=told.int8), run)
    told.check(gen, run)
    guide = None if classifier is None else api.load(classifier, flags=classifier_flags)
    _check_guide(told, guide, source)
    settings = gen.settings(**told.settings)
    recipe = facts_of(gen, run, settings, told.seed, told.classifier_digest, told.strength, told.size)
    began = time.monotonic()
    with writer(out, num=told.num, recipe=recipe, overwrite=overwrite) as sink, progress("sampling") as tell:
        options = {"batch": batch, "classifier": guide, "on_step": counter(tell, told.num, batch)}
        for drawn in gen.stream(**told.options, **options):
            for number, pixels, facts in zip(drawn.numbers, to_uint8(gen.finished(drawn)), drawn.facts, strict=True):
                further = further_facts(told.conditions, number - told.first)
                sink.add([Picture(number, pixels, facts, further)])
    seconds = time.monotonic() - began
    facts = {"out": out, "num": told.num, "seconds": seconds, "images_per_s": told.num / seconds, **recipe}
    emit(facts, [f"{out}: {told.num} drawn again as {source} tells, in {seconds:.1f} s"], as_json)


def _check_guide(told: Repeat, guide: Any, source: Path) -> None:
    """Raises LimnerError unless the classifier is that of the picture, or neither has one."""
    digest = None if guide is None else guide.digest
    if told.classifier_digest != digest:
        wanted = f"the classifier {told.classifier_digest}" if told.classifier_digest else "no classifier"
        raise LimnerError(f"{source}: was drawn with {wanted}; --classifier should say the same")
