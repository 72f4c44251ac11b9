"""`limner convert`."""

from __future__ import annotations

from typing import Annotated

import typer

from limner.cli.console import emit, progress


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A run; guided-diffusion's .pt; CompVis' .ckpt; a folder of diffusers, or safetensors in one.",
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="DST", help="What to make: a new or empty directory.")],
    to: Annotated[
        str, typer.Option(metavar="FORMAT", help="limner makes a run; diffusers a folder that diffusers loads.")
    ] = "limner",
    flags: Annotated[
        str | None,
        typer.Option(metavar="FILE|FLAGS", help="guided-diffusion: the flags that it was trained with, or their JSON."),
    ] = None,
    config: Annotated[str | None, typer.Option(metavar="FILE", help="latent-diffusion: the YAML of a .ckpt.")] = None,
    licence: Annotated[
        str | None, typer.Option("--license", metavar="NAME", help="diffusers: the licence that the model card states.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make a run of another project's checkpoint, or a diffusers folder of a run. No code in it is ever run.

    \b
    Examples:
      limner convert 256x256_diffusion.pt runs/adm256
      limner convert model.pt runs/mine --flags "--image_size 64 --learn_sigma True"
      limner convert model.ckpt runs/ldm --config config.yaml
      limner convert stable-diffusion-v1-5 runs/sd
      limner convert runs/photos photos-diffusers --to diffusers --license cc-by-4.0
    """
    from limner import api

    with progress("converting") as tell:
        made = api.convert(source, out, to=to, flags=flags, config=config, licence=licence, progress=tell)  # type: ignore[arg-type]
    facts = {"out": out, "format": to, "task": made.config.task, "parameters": made.parameters, "notes": made.notes}
    if to == "limner":
        facts["run"] = out
    emit(facts, [*made.notes, f"{out}: {made.config.task}, {made.parameters:,} parameters"], json)
