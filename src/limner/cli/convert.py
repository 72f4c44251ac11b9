"""`limner convert`."""

from __future__ import annotations

from typing import Annotated

import typer

from limner.cli.console import emit


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="guided-diffusion's .pt, or CompVis' .ckpt.")],
    run: Annotated[str, typer.Argument(metavar="DST", help="The run to make: a new or empty directory.")],
    flags: Annotated[
        str | None,
        typer.Option(metavar="FILE|FLAGS", help="guided-diffusion: the flags that it was trained with, or their JSON."),
    ] = None,
    config: Annotated[str | None, typer.Option(metavar="FILE", help="latent-diffusion: the YAML of a .ckpt.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make a run of another project's checkpoint. No code in it is ever run.

    \b
    Examples:
      limner convert 256x256_diffusion.pt runs/adm256
      limner convert model.pt runs/mine --flags "--image_size 64 --learn_sigma True"
      limner convert model.ckpt runs/ldm --config config.yaml
    """
    from limner import api

    made = api.convert(source, run, flags=flags, config=config)
    parameters = sum(weight.numel() for weight in made.state.values())
    facts = {"run": run, "task": made.config.task, "parameters": parameters, "notes": made.notes}
    emit(facts, [*made.notes, f"{run}: {made.config.task}, {parameters:,} parameters"], json)
