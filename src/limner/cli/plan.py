"""`limner plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from limner.cli.console import emit


def plan(
    recipe: Annotated[str, typer.Argument(metavar="PRESET_OR_RECIPE", help="A recipe by name, a .yaml file or a run.")],
    devices: Annotated[
        str, typer.Option(metavar="NxNAME", help="H100, H200, A100, RTX4090 or CPU2 (two cores).")
    ] = "8xH100",
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures a step, over all devices.")] = None,
    images: Annotated[str | None, typer.Option(metavar="COUNT", help="Of the whole training: 2M, 500k.")] = None,
    classes: Annotated[int, typer.Option(min=1, help="How many, where the recipe leaves them to the data.")] = 1000,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: data.size=128.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print every figure as JSON.")] = False,
) -> None:
    """Say what a training takes before it is begun: parameters, arithmetic, memory a device, days and what bounds them.

    \b
    Nothing is trained, and nothing of the size of the model is allocated.
    Examples:
      limner plan imagenet256-ldm4 --devices 8xA100
      limner plan text256-ldm8 --devices 64xH100 --batch 2048
      limner plan my.yaml --devices RTX4090 --images 20M --json
    """
    from limner import config
    from limner import recipe as recipes
    from limner.plan import cluster
    from limner.plan import plan as planned

    where = cluster(devices)
    changes = [*(settings or []), *([] if batch is None else [f"training.batch={batch}"])]
    raw = recipes.raw_recipe(_file(recipe), source=None, settings=changes, budget=None, images=images, seed=None)
    made = planned(config.parse(raw, recipe), where, recipe, classes=classes)
    emit(made.facts(), made.lines(), json)


def _file(recipe: str) -> str:
    """The recipe of a run, or what was given."""
    from pathlib import Path

    from limner import zoo
    from limner.build import preset_names

    inside = (Path(recipe) if recipe in preset_names() else zoo.located(recipe)) / "config.yaml"
    return str(inside) if inside.is_file() else recipe
