"""`limner evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from limner.cli import given
from limner.cli.console import emit
from limner.errors import LimnerError


def evaluate(
    samples: Annotated[
        str, typer.Argument(metavar="RUN_OR_SAMPLES", help="A run, which draws; or an .npz, folder or .tar of samples.")
    ],
    reference: Annotated[
        str | None, typer.Option(metavar="DATA", help="Real pictures. Default for a run: what it was trained on.")
    ] = None,
    num: Annotated[int | None, typer.Option(min=2, help="How many samples. Default: 1,000 of a run, else all.")] = None,
    features: Annotated[
        str, typer.Option(metavar="NAME", help="efficientnet-lite0, inception, dinov2[:FOLDER], clip[:FOLDER].")
    ] = "efficientnet-lite0",
    trained_on: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="What samples with captions learned from, where it isn't the reference."),
    ] = None,
    guidance: Annotated[
        str | None, typer.Option(metavar="S[,S...]", help="Classifier-free scales of a run; several make a table.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="Of a run; default: its own.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of a run; default: its own.")] = None,
    interval: Annotated[
        str | None, typer.Option(metavar="LO,HI", help="Of a run: guidance only at times in this range.")
    ] = None,
    rescale: Annotated[float | None, typer.Option(metavar="PHI", help="Of a run: guided contrast, 0 to 1.")] = None,
    seed: Annotated[int, typer.Option(help="Of a run's samples.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures that a run draws at a time.")] = 64,
    int8: Annotated[
        bool, typer.Option("--int8", help="Of a run: it computes in 8 bits, on a CPU, faster and almost the same.")
    ] = False,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Every figure as CSV.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="A page with figures and pictures.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With several scales: the trade-off, as PNG and SVG.")
    ] = None,
    bits_per_dim: Annotated[
        bool, typer.Option("--bits-per-dim", help="The variational bound on held-out pictures, of a run, instead.")
    ] = False,
    fidelity: Annotated[
        bool,
        typer.Option(
            "--fidelity", help="Instead: whether a run's pictures show their maps, boxes, small pictures, kept pixels."
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print every figure as JSON.")] = False,
) -> None:
    """Compare samples with real pictures: distances, scores, precision and recall, class accuracy, with intervals.

    \b
    Examples:
      limner evaluate runs/photos --num 1000
      limner evaluate runs/photos --guidance 1,1.5,2,3 --plot trade-off.png
      limner evaluate samples.npz --reference photos --html report.html
      limner evaluate runs/photos --bits-per-dim --num 64
      limner evaluate runs/streets --fidelity --reference streets/test.parquet --num 128
    """
    from limner import api, zoo
    from limner.evaluation import page, plots, processes
    from limner.evaluation.report import sweep_csv, sweep_table

    if int8 and (bits_per_dim or fidelity):
        raise LimnerError("--int8: goes with the comparison of samples, not with --bits-per-dim or --fidelity")
    if bits_per_dim:
        facts = api.bits_per_dim(samples, num=num or 64, seed=seed, batch=batch)
        emit(facts, [f"{facts['bits_per_dim']:.3f} bits per dim on {facts['n']} held-out pictures"], json)
        return
    scales = _scales(guidance)
    if fidelity:
        facts = api.condition_fidelity(samples, reference, num=num, seed=seed, **_guided(scales[0]))
        emit(facts, [f"{name}: {value:.4g}" for name, value in facts.items()], json)
        return
    if plot is not None and len(scales) == 1:
        raise LimnerError("--plot: goes with several scales, such as --guidance 1,1.5,2,3")
    within = None if interval is None else given.interval_of(interval)
    drawing: dict[str, Any] = {"sampler": sampler, "steps": steps, "interval": within, "rescale": rescale}
    drawing = {name: value for name, value in drawing.items() if value is not None}
    if (zoo.located(samples) / "config.yaml").is_file():
        drawing |= {"seed": seed, "batch": batch}
    how: dict[str, Any] = {"features": features, "num": num, "trained_on": trained_on, "int8": int8, **drawing}
    with processes.joined() as speaks:
        reports = {scale: api.evaluate(samples, reference, **how, **_guided(scale)) for scale in scales}
    if not speaks:
        return
    only = reports[scales[0]] if len(scales) == 1 else None
    if csv is not None:
        _ = sweep_csv(reports, csv) if only is None else only.to_csv(csv)  # type: ignore[arg-type]
    if html is not None:
        page.write(reports if only is None else only, html)  # type: ignore[arg-type]
    if plot is not None:
        plots.trade_off(reports, plot)  # type: ignore[arg-type]
    if only is not None:
        emit(only.to_dict(), only.lines(), json)
    else:
        head, rows = sweep_table(reports)  # type: ignore[arg-type]
        lines = ["  ".join(f"{cell:>14}" for cell in row) for row in (head, *rows)]
        emit({str(scale): report.to_dict() for scale, report in reports.items()}, lines, json)


def _guided(scale: float | None) -> dict[str, Any]:
    return {} if scale is None else {"guidance": scale}


def _scales(text: str | None) -> list[float | None]:
    """The scales of `--guidance`, or one None for the run's own. Raises LimnerError."""
    if text is None:
        return [None]
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise LimnerError(f"--guidance {text}: should be numbers with commas between, such as 1,1.5,2,3") from None
