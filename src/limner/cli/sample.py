"""`limner sample`: what is asked for on the command line becomes one call of `Generator.stream` and one writer."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from limner.cli.console import emit, progress
from limner.errors import LimnerError
from limner.outputs import Picture, writer

if TYPE_CHECKING:
    from limner.core.types import Step
    from limner.generator import Drawn, Generator
    from limner.settings import Settings

DEFAULT_NUM = 16


def sample(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, or a foreign checkpoint (--flags, --config).")],
    out: Annotated[str, typer.Option(metavar="PATH", help="A .png grid, .npz, .tar (WebDataset) or directory.")],
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|NUMBER", help="What to draw; several, or 'a,b,c', in rotation. Default: every one."),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A caption; several in rotation.")] = None,
    text_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Captions, one a line.")] = None,
    num: Annotated[int | None, typer.Option(min=1, help=f"How many. Default: {DEFAULT_NUM}, or one a caption.")] = None,
    guidance: Annotated[
        float | None, typer.Option(metavar="S", help="Classifier-free scale; 1 is off. Default: the run's own.")
    ] = None,
    interval: Annotated[
        str | None, typer.Option(metavar="LO,HI", help="Guide only at times in this range; 0 is data, 1 noise.")
    ] = None,
    rescale: Annotated[
        float | None, typer.Option(metavar="PHI", help="Rescale guided contrast, 0 to 1, against burnt colours.")
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(metavar="RUN2", help="A noisy classifier that steers towards the labels.")
    ] = None,
    classifier_scale: Annotated[
        float | None, typer.Option(metavar="S", help="How strongly; 0 is off. Default with --classifier: 1.")
    ] = None,
    classifier_flags: Annotated[
        str | None, typer.Option(metavar="FILE|NAME|FLAGS", help="guided-diffusion: the classifier's flags.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="ddpm, ddim, euler, heun, dpmpp_2m, dpmpp_2m_sde or unipc.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Calls of the network, more or less.")] = None,
    spacing: Annotated[
        str | None, typer.Option(help="log_snr, karras, trailing, leading, leading+1, linspace, or '25', 'ddim25'.")
    ] = None,
    eta: Annotated[float | None, typer.Option(min=0.0, help="Noise of ddim and dpmpp_2m_sde; 0: none.")] = None,
    seed: Annotated[int, typer.Option(help="With a picture's number it decides its noise.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time; changes the speed, not the pictures.")] = 64,
    flags: Annotated[
        str | None, typer.Option(metavar="FILE|NAME|FLAGS", help="guided-diffusion: the flags of a .pt file.")
    ] = None,
    config: Annotated[str | None, typer.Option(metavar="FILE", help="latent-diffusion: the YAML of a .ckpt.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace samples that are there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Draw pictures with a trained model.

    \b
    Examples:
      limner sample runs/emoji --out grid.png
      limner sample runs/emoji --label "Food & Drink" --guidance 3 --out food.png
      limner sample runs/cifar --label cat,dog --num 1000 --out samples.npz
      limner sample runs/uncond --classifier runs/guide --out guided.png
    """
    from limner import api

    gen = _generator(api.load(run, flags=flags, config=config), run)
    guide = None if classifier is None else api.load(classifier, flags=classifier_flags)
    for note in (*gen.notes, *(() if guide is None else guide.notes)):
        print(f"limner: {note}", file=sys.stderr)
    captions = _captions(text, text_file)
    given = {
        "guidance": guidance,
        "interval": None if interval is None else _interval(interval),
        "rescale": rescale,
        "classifier_scale": 1.0 if guide is not None and classifier_scale is None else classifier_scale,
        "sampler": sampler,
        "steps": steps,
        "spacing": spacing,
        "eta": eta,
    }
    count = num or max(DEFAULT_NUM, len(captions or ()))
    settings = gen.settings(**given)
    recipe = _recipe(gen, run, settings, seed, None if guide is None else guide.digest)
    began = time.monotonic()
    with (
        writer(out, num=count, recipe=recipe, overwrite=overwrite) as sink,
        progress("sampling") as tell,
    ):
        for drawn in gen.stream(
            num=count,
            label=_labels(label, gen.classes or getattr(guide, "classes", ())),
            text=captions,
            seed=seed,
            batch=batch,
            classifier=guide,
            on_step=_counter(tell, count, batch),
            **given,
        ):
            sink.add(_pictures(gen, drawn))
    seconds = time.monotonic() - began
    facts = {"out": out, "num": count, "seconds": seconds, "images_per_s": count / seconds, **recipe}
    emit(facts, [f"{out}: {count} pictures in {seconds:.1f} s ({count / seconds:.1f} a second)"], json)


def _generator(loaded: Any, run: str) -> Generator:
    """What was loaded, if it draws."""
    if loaded.config.task != "diffusion":
        raise LimnerError(f"{run}: holds {_A[loaded.config.task]}, which draws nothing; name a diffusion run")
    return loaded


_A = {"classifier": "a classifier", "autoencoder": "an autoencoder"}


def _labels(given: Sequence[str] | None, classes: Iterable[str]) -> list[str] | None:
    """Names or numbers, one by one. A comma separates, except inside the name of a class ("tench, Tinca tinca")."""
    if not given:
        return None
    known = set(classes)
    return [
        name.strip() for value in given for name in ([value] if value in known else value.split(",")) if name.strip()
    ]


def _captions(text: Sequence[str] | None, file: Path | None) -> list[str] | None:
    """Captions of the command line and of a file, in that order; None where neither is given."""
    captions: list[str] = list(text or ())
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise LimnerError(f"{file}: is not UTF-8 text; captions are read one a line") from None
        captions += [line for line in lines if line.strip()]
        if not captions:
            raise LimnerError(f"{file}: holds no captions; they are read one a line")
    return captions or None


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise LimnerError(f"--interval {text}: should be two times LO,HI, such as 0.1,0.8") from None
    return low, high


def _recipe(gen: Generator, run: str, settings: Settings, seed: int, guide_digest: str | None) -> dict[str, Any]:
    """What is needed to draw the same again; it goes into every PNG."""
    facts = {"run": run, "digest": gen.digest, "seed": seed, **asdict(settings), "classifier_digest": guide_digest}
    return {name: value for name, value in facts.items() if value is not None}


def _counter(tell: Callable[[int, int], None], num: int, batch: int) -> Callable[[Step], None]:
    """Counts sampler steps over all batches."""
    batches, done = math.ceil(num / batch), itertools.count(1)
    return lambda step: tell(next(done), batches * step.total)


def _pictures(gen: Generator, drawn: Drawn) -> list[Picture]:
    from limner.generator import to_uint8

    pixels = to_uint8(gen.decode(drawn.latent))
    return [Picture(*each) for each in zip(drawn.numbers, pixels, drawn.facts, strict=True)]
