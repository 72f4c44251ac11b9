"""`limner models`."""

from __future__ import annotations

from typing import Annotated

import typer

from limner.cli.console import emit


def models(json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False) -> None:
    """List the models that come with Limner. Their names stand wherever a run is asked for.

    \b
    Examples:
      limner models
      limner sample digits --label 3,7 --out digits.png
      limner train photos/ --init digits --out runs/mine --images 20k
    """
    from limner import zoo

    found = zoo.models()
    emit({"models": [model.facts() for model in found]}, [line for model in found for line in model.lines()], json)
