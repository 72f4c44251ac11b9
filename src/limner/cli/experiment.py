"""`limner experiment compression` and `limner experiment sampling`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from limner.cli.console import emit
from limner.errors import LimnerError

app = typer.Typer(help="Measure how far to compress, and how quality trades against speed.", no_args_is_help=True)

Out = Annotated[Path, typer.Option(metavar="DIR", help="Every cell's run and the report; the same again goes on.")]
Num = Annotated[int | None, typer.Option(min=2, help="Samples a measurement. Default: 1,000.")]
Features = Annotated[str, typer.Option(metavar="NAME", help="Feature network, as in `limner evaluate`.")]
Processes = Annotated[int, typer.Option(min=1, help="Processes that share the cells and the cores.")]
Seed = Annotated[int, typer.Option(help="Of training and samples.")]
Smoke = Annotated[
    bool, typer.Option("--smoke", help="Tiny networks and few samples: two minutes, to see that it runs.")
]
Json = Annotated[bool, typer.Option("--json", help="Print every result as JSON.")]

SMOKE_SAMPLING: dict[str, Any] = {"num": 8, "steps": (2, 4), "samplers": ("ddim", "dpmpp_2m"), "batch": 8}
SMOKE_COMPRESSION: dict[str, Any] = {
    "num": 8,
    "steps": 2,
    "factors": (1, 2, 4),
    "size": 16,
    "budget_s": None,
    "images": 64,
    "autoencoder_images": 32,
    "first": 32,
    "batch": 8,
    "levels": ({"channels": 32}, {"channels": 32}),
    "widths": (32,),
}


@app.command()
def sampling(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Diffusion runs, of pixels or latents.")],
    out: Out,
    reference: Annotated[
        str | None, typer.Option(metavar="DATA", help="Real pictures. Default: what each run was trained on.")
    ] = None,
    num: Num = None,
    samplers: Annotated[str | None, typer.Option(metavar="NAME[,NAME...]", help="Default: every one.")] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="N[,N...]", help="Default: ddim 10,20,50,100,200; the others 10,20,50.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(metavar="S", help="Default: each run's own.")] = None,
    spacing: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which noise levels the steps visit. Default: each run's own.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures at a time. Default: 64.")] = None,
    features: Features = "efficientnet-lite0",
    processes: Processes = 1,
    seed: Seed = 0,
    smoke: Smoke = False,
    json: Json = False,
) -> None:
    """Quality against images a second, for every solver at several numbers of steps.

    \b
    Examples:
      limner experiment sampling runs/pixel runs/latent --reference photos --out sampling
      limner experiment sampling runs/photos --samplers ddim,dpmpp_2m --steps 5,10,20 --out quick
    """
    from limner.experiments import sampling as experiment

    given = {
        "num": num,
        "samplers": None if samplers is None else tuple(samplers.split(",")),
        "steps": None if steps is None else _numbers("--steps", steps),
        "batch": batch,
        "guidance": guidance,
        "spacing": spacing,
    }
    options = {**(SMOKE_SAMPLING if smoke else {}), **_chosen(given), "features": features, "seed": seed}
    facts = experiment.run(runs, reference, out, processes=processes, **options)
    emit(facts, [str(out / "report.html")], json)


@app.command()
def compression(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Pictures: whatever `limner train` takes.")],
    out: Out,
    factors: Annotated[str | None, typer.Option(metavar="F[,F...]", help="Default: 1,2,4,8; also 16, 32.")] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Training of one factor, all stages. Default: 30m.")
    ] = None,
    images: Annotated[str | None, typer.Option(metavar="COUNT", help="Training images of one factor at most.")] = None,
    first: Annotated[
        str | None,
        typer.Option(metavar="COUNT", help="Images at the first measurement, the next at twice as many. Default: 4k."),
    ] = None,
    num: Num = None,
    size: Annotated[int | None, typer.Option(min=8, help="Side of the pictures. Default: fits the data.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the sampler. Default: 20.")] = None,
    guidance: Annotated[float | None, typer.Option(metavar="S", help="Default: 1, none.")] = None,
    features: Features = "efficientnet-lite0",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change every factor's recipe.")
    ] = None,
    processes: Processes = 1,
    seed: Seed = 0,
    smoke: Smoke = False,
    json: Json = False,
) -> None:
    """Diffusion at several factors of compression, at equal training steps and at equal time.

    \b
    Examples:
      limner experiment compression photos --out compression --budget 30m
      limner experiment compression photos --out compression --factors 2,4 --size 128
      limner experiment compression photos --out quick --budget 10m --first 1k --num 200
    """
    from limner import recipe
    from limner.experiments import compression as experiment

    given = {
        "factors": None if factors is None else _numbers("--factors", factors),
        "budget_s": None if budget is None else recipe.seconds(budget),
        "images": None if images is None else recipe.count(images),
        "first": None if first is None else recipe.count(first),
        "num": num,
        "size": size,
        "steps": steps,
        "guidance": guidance,
    }
    options = {**(SMOKE_COMPRESSION if smoke else {}), **_chosen(given), "features": features, "seed": seed}
    facts = experiment.run(data, out, processes=processes, settings=tuple(settings or ()), **options)
    emit(facts, [str(out / "report.html")], json)


def _chosen(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise LimnerError(f"{option} {text}: should be whole numbers with commas between, such as 1,2,4")
    return found
