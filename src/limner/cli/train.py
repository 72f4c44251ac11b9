"""`limner train`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from limner.cli.console import STOPPED, emit, progress
from limner.errors import LimnerError


class Task(StrEnum):
    """What is trained."""

    diffusion = "diffusion"
    classifier = "classifier"
    autoencoder = "autoencoder"
    distill = "distill"


def train(
    out: Annotated[str, typer.Option(metavar="RUN", help="The directory that the run is written to.")],
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA_OR_PRESET",
            help="A folder, Parquet file, WebDataset tar or hub name; or a preset that brings its data.",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="A recipe by name, or a .yaml file. Default: fits the data.")
    ] = None,
    budget: Annotated[str | None, typer.Option(metavar="TIME", help="Stop after 20m, 1h30m or 90s.")] = None,
    images: Annotated[str | None, typer.Option(metavar="COUNT", help="Stop after 2M, 500k or 200000 images.")] = None,
    task: Annotated[Task | None, typer.Option(help="Default: diffusion, or the preset's own.")] = None,
    for_run: Annotated[
        str | None, typer.Option("--for", metavar="RUN", help="The diffusion run that a classifier is to guide.")
    ] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Train in the latents of this autoencoder: a run, or a foreign checkpoint."),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(metavar="RUN|FILE", help="Train on from this: a run, or a foreign checkpoint, which stays as is."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="RUN|FILE", help="--task distill: the trained model that is to draw in fewer calls."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="--task distill: the student's steps, such as 1, 2 or 4. Default: 4.")
    ] = None,
    flags: Annotated[
        str | None,
        typer.Option(metavar="FILE|FLAGS", help="--init or --teacher of guided-diffusion: its flags, or their JSON."),
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="--init or --teacher of latent-diffusion: its YAML.")
    ] = None,
    lora: Annotated[
        int | None, typer.Option(metavar="RANK", help="Train low-rank adapters of attention alone; goes with --init.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: training.batch=32.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run; starts it if there is none.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of everything random. Default: the recipe's, 0.")] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same bits from run to run on a GPU too.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a model on pictures.

    \b
    Examples:
      limner train photos/ --out runs/photos --budget 1h
      limner train photos/ --out runs/photos --resume
      limner train examples/emoji --preset emoji --out runs/emoji --budget 20m
      limner train photos/ --out runs/wide --images 2M --set training.batch=32
      limner train --task classifier --for runs/uncond --out runs/guide
      limner train photos/ --preset emoji-text --out runs/text --budget 60m
      limner train photos/ --task autoencoder --out runs/ae --budget 20m
      limner train photos/ --autoencoder runs/ae --out runs/latent --budget 40m
      limner train photos/ --init 256x256_diffusion.pt --out runs/mine --images 200k
      limner train photos/ --init stable-diffusion-v1-5 --lora 8 --out runs/style --images 20k
      limner train --task distill --teacher runs/text --out runs/fast --budget 30m
      limner train --task distill --teacher runs/text --steps 1 --out runs/fastest --images 200k
      limner train --task distill --teacher runs/text --set distillation.steps=null --out runs/one-call --budget 10m
    """
    from limner import api

    with progress("reading pictures") as tell, progress("encoding pictures") as tell_encoding:
        result = api.train(
            data,
            out=out,
            preset=preset,
            task=None if task is None else task.value,
            budget=budget,
            images=images,
            for_run=for_run,
            autoencoder=autoencoder,
            init=init,
            teacher=teacher,
            flags=flags,
            config=config,
            settings=[*(settings or []), *_also(lora, steps, task == Task.distill, deterministic or None)],
            seed=seed,
            resume=resume,
            progress=tell,
            encoding=tell_encoding,
        )
    facts = {
        "run": str(result.run),
        "images": result.images,
        "seconds": result.seconds,
        "stopped": result.stopped,
        **result.figures,
    }
    emit(facts, [str(result.run)], json)
    if result.stopped is not None:
        raise typer.Exit(STOPPED)


def _also(lora: int | None, steps: int | None, distilling: bool, deterministic: bool | None) -> list[str]:
    """Settings that have an option of their own. Raises LimnerError for steps without --task distill."""
    if steps is not None and not distilling:
        raise LimnerError("--steps: goes with --task distill; those of sampling are --set sampling.steps")
    named = {"training.lora": lora, "distillation.steps": steps, "training.deterministic": deterministic}
    return [f"{name}={value}" for name, value in named.items() if value is not None]
