"""`limner sample`: what is asked for on the command line becomes one call of `Generator.stream` and one writer."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from limner.cli import given
from limner.cli.console import emit, progress
from limner.errors import LimnerError
from limner.outputs import Picture, writer

if TYPE_CHECKING:
    from limner.core.types import Step
    from limner.generator import Drawn, Generator
    from limner.settings import Settings

DEFAULT_NUM = 16


def sample(
    out: Annotated[str, typer.Option(metavar="PATH", help="A .png grid, .npz, .tar (WebDataset) or directory.")],
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A run, or a foreign checkpoint (--flags, --config).")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="PNG", help="Draw again what a picture of Limner's tells.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|NUMBER", help="What to draw; several, or 'a,b,c', in rotation. Default: every one."),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A caption; several in rotation.")] = None,
    text_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Captions, one a line.")] = None,
    num: Annotated[int | None, typer.Option(min=1, help=f"How many. Default: {DEFAULT_NUM}, or one a caption.")] = None,
    negative_text: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="What guidance moves away from, instead of from nothing.")
    ] = None,
    condition: Annotated[
        Path | None, typer.Option(metavar="PNG|DIR", help="A semantic map, or a folder: a picture for each.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE|DIR", help="To enlarge, to vary, to paint in, or to start from.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(metavar="FILE|DIR", help="With --image: white is painted anew, the rest is kept.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(metavar="T", help="With --image: how far to noise it before drawing, 0 to 1.")
    ] = None,
    boxes: Annotated[
        Path | None, typer.Option(metavar="JSON", help="A list of [class, x, y, w, h] in 0..1, or several such.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="The canvas, where it isn't that of training: 192x144.")
    ] = None,
    to_seed: Annotated[int | None, typer.Option(help="Go from --seed to this one, picture by picture.")] = None,
    to_text: Annotated[str | None, typer.Option(metavar="TEXT", help="Go from --text to this caption.")] = None,
    to_label: Annotated[str | None, typer.Option(metavar="NAME", help="Go from --label to this one.")] = None,
    guidance: Annotated[
        str | None,
        typer.Option(metavar="S", help="Classifier-free scale, 1 is off; or one by condition: text=5,boxes=2."),
    ] = None,
    composition: Annotated[
        str | None, typer.Option(help="How scales by condition add up: chain (each given those before) or sum.")
    ] = None,
    guidance_every: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Compute guidance's unconditional half every K steps alone.")
    ] = None,
    consistent: Annotated[
        bool, typer.Option("--consistent", help="Enlarged pictures agree with the small ones, pixel by pixel.")
    ] = False,
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
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Draw one of N equal parts of the pictures, I = 0 .. N-1.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time; changes the speed, not the pictures.")] = 64,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Compute in 8 bits, on a CPU: faster, almost the same; see the docs on speed."),
    ] = False,
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
      limner sample runs/streets --condition maps/ --out streets/
      limner sample runs/emoji --image photo.png --mask hole.png --out painted.png
      limner sample runs/cifar --num 50000 --shard 3/8 --out samples-3.tar
      limner sample --from picture.png --out again.png
      limner sample runs/emoji --text "a heart" --to-text "a star" --num 8 --out way.png
    """
    from limner import api
    from limner.cli.shared import in_batches
    from limner.evaluation import processes

    if source is not None:
        from limner.cli.repeat import repeat

        other = {"label": label, "text": text, "text-file": text_file, "num": num, "guidance": guidance, "steps": steps,
                 "sampler": sampler, "image": image, "condition": condition, "boxes": boxes, "size": size,
                 "shard": shard, "int8": int8 or None}  # fmt: skip
        repeat(source, run, out, classifier=classifier, classifier_flags=classifier_flags, batch=batch, flags=flags,
               config=config, overwrite=overwrite, as_json=json, other=other)  # fmt: skip
        return
    if run is None:
        raise LimnerError("no RUN: name a run to draw with, or a picture of Limner's with --from")
    gen = drawing_generator(api.load(run, flags=flags, config=config, int8=int8), run)
    guide = None if classifier is None else api.load(classifier, flags=classifier_flags)
    for note in (*gen.notes, *(() if guide is None else guide.notes)):
        print(f"limner: {note}", file=sys.stderr)
    captions = _captions(text, text_file)
    canvas = given.size_of(size)
    files = given.conditions_of(
        gen, condition=condition, image=image, mask=mask, boxes=boxes, strength=strength, size=canvas
    )
    chosen = {
        "guidance": given.guidance_of(guidance),
        "composition": composition,
        "guidance_every": guidance_every,
        "consistent": consistent or None,
        "interval": None if interval is None else given.interval_of(interval),
        "rescale": rescale,
        "classifier_scale": 1.0 if guide is not None and classifier_scale is None else classifier_scale,
        "sampler": sampler,
        "steps": steps,
        "spacing": spacing,
        "eta": eta,
    }
    labels = _labels(label, gen.classes or getattr(guide, "classes", ()))
    lists = [values for name, values in files.items() if name != "boxes"]
    count = num or (max(map(len, lists)) if lists else max(DEFAULT_NUM, len(captions or ())))
    part = given.part_of(shard, count)
    settings = gen.settings(**chosen)
    paths = {"semantic_map": condition, "image": image, "mask": mask}
    asked = {"strength": strength, "size": canvas, "files": {k: p.name for k, p in paths.items() if p} or None}
    recipe = _recipe(gen, run, settings, seed, None if guide is None else guide.digest, asked)
    ends = _ends(seed, to_seed, {"text": (captions, to_text), "label": (labels, to_label)})
    began = time.monotonic()
    with (
        processes.joined() as speaks,
        writer(out, num=len(part), recipe=recipe, overwrite=overwrite) if speaks else nullcontext() as sink,
        progress("sampling") if speaks else nullcontext(lambda *_: None) as tell,
    ):
        how = {"batch": batch, "on_step": counter(tell, len(part), batch), "classifier": guide, "size": canvas}
        options = how | chosen
        if ends is not None:
            for name in (*files, *(() if shard is None else ("shard",))):
                raise LimnerError(f"--to-seed, --to-text, --to-label: don't go with --{name}")
            frames = gen.interpolate(num=count, output="array", **ends, **options) if sink is not None else ()
            pieces: Iterable[list[Picture]] = [[Picture(number, pixels) for number, pixels in enumerate(frames)]]
        else:
            wish = {"num": count, "label": labels, "text": captions, "negative_text": negative_text, "seed": seed,
                    "strength": strength, **files, **options}  # fmt: skip
            told = {**files, "negative_text": None if negative_text is None else [negative_text]}
            pieces = in_batches(
                part, batch, lambda own: (_pictures(gen, d, told) for d in gen.stream(part=own, **wish))
            )
        for pictures in pieces:
            if sink is not None:
                sink.add(pictures)
    if sink is None:
        return
    seconds = time.monotonic() - began
    number = len(part)
    facts = {"out": out, "num": number, "seconds": seconds, "images_per_s": number / seconds, **recipe}
    emit(facts, [f"{out}: {number} pictures in {seconds:.1f} s ({number / seconds:.1f} a second)"], json)


def _ends(seed: int, to_seed: int | None,
          pairs: dict[str, tuple[list[str] | None, str | None]]) -> dict[str, Any] | None:  # fmt: skip
    """Keywords of `Generator.interpolate`, or None where no way is asked for."""
    ways: dict[str, Any] = {}
    for name, (start, end) in pairs.items():
        if end is not None:
            if not start or len(start) != 1:
                raise LimnerError(f"--to-{name} {end}: goes with one --{name} to start from")
            ways[name] = (start[0], end)
        elif start and (to_seed is not None or any(other is not None for _, other in pairs.values())):
            ways[name] = (start[0], start[0])
    if to_seed is None and not any(end is not None for _, end in pairs.values()):
        return None
    return {**ways, "seed": (seed, seed if to_seed is None else to_seed)}


def drawing_generator(loaded: Any, run: str) -> Generator:
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


def _recipe(gen: Generator, run: str, settings: Settings, seed: int, guide_digest: str | None,
            asked: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    """What is needed to draw the same again; it goes into every PNG."""
    facts = {"run": run, "digest": gen.digest, "seed": seed, **asdict(settings), "classifier_digest": guide_digest,
             "int8": gen.int8 or None}  # fmt: skip
    facts |= asked
    return {name: value for name, value in facts.items() if value is not None}


def counter(tell: Callable[[int, int], None], num: int, batch: int) -> Callable[[Step], None]:
    """Counts sampler steps over all batches."""
    batches, done = math.ceil(num / batch), itertools.count(1)
    return lambda step: tell(next(done), batches * step.total)


def _pictures(gen: Generator, drawn: Drawn, told: Mapping[str, Any]) -> list[Picture]:
    """What was drawn; told: the conditions that are no words, each a list whose values come in turn."""
    from limner.generator import to_uint8
    from limner.redraw import further_facts

    pixels = to_uint8(gen.finished(drawn))
    return [
        Picture(number, own, facts, further_facts(told, number))
        for number, own, facts in zip(drawn.numbers, pixels, drawn.facts, strict=True)
    ]
