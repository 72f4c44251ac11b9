"""The trade-off of a sweep as a picture: fidelity and diversity by guidance scale."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.errors import LimnerError
from limner.evaluation.report import Figure, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

SIZE = (8.4, 3.6)
Draw = Callable[["Canvas"], None]
_DISTANCES, _SCORES = ("FID", "FD"), ("IS",)


def trade_off(reports: Mapping[float, Report], path: str | Path, *, swept: str = "guidance") -> list[Path]:
    """Draw a sweep into `path` with the suffixes `.png` and `.svg`; returns both paths.

    Left: Fréchet distance and score by scale, with their intervals. Right: precision against recall, a point a scale,
    the trade-off of Dhariwal & Nichol 2021, figure 4. Raises LimnerError when it cannot be written.
    """
    return saved(lambda canvas: _draw(canvas, dict(sorted(reports.items())), swept), path)


def rendered(reports: Mapping[float, Report], form: str, *, swept: str = "guidance") -> bytes:
    """The same as bytes of a PNG or SVG."""
    return painted(lambda canvas: _draw(canvas, dict(sorted(reports.items())), swept), form)


def saved(draw: Draw, path: str | Path, size: tuple[float, float] = SIZE) -> list[Path]:
    """What `draw` puts on a canvas, as `.png` and `.svg`. Raises LimnerError when it cannot be written."""
    base = Path(path).with_suffix("")
    targets = [base.with_suffix(suffix) for suffix in (".png", ".svg")]
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        for target in targets:
            target.write_bytes(painted(draw, target.suffix[1:], size))
    except OSError as error:
        raise LimnerError(f"{base}: cannot be written ({error.strerror or error})") from None
    return targets


def painted(draw: Draw, form: str, size: tuple[float, float] = SIZE) -> bytes:
    """What `draw` puts on a canvas of this (width, height) in inches, as bytes of a PNG or SVG, always the same."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "limner", "font.size": 9, "axes.spines.top": False}):
        canvas = Canvas(figsize=size, layout="constrained")
        FigureCanvasAgg(canvas)
        draw(canvas)
        canvas.savefig(buffer, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return buffer.getvalue()


def _draw(canvas: Canvas, reports: Mapping[float, Report], swept: str) -> None:
    left, right = canvas.subplots(1, 2)
    scales = list(reports)
    for axis, names, colour in ((left, _DISTANCES, "tab:blue"), (left.twinx(), _SCORES, "tab:orange")):
        found = [_find(report, names) for report in reports.values()]
        figures = [figure for figure in found if figure is not None]
        if len(figures) == len(scales):
            _with_intervals(axis, scales, figures, colour)
            axis.set_ylabel(figures[0].name, color=colour)
    left.set_xlabel(f"{swept} scale")
    pairs = [(_find(r, ("recall",)), _find(r, ("precision",)), scale) for scale, r in reports.items()]
    points = [(x.value, y.value, scale) for x, y, scale in pairs if x is not None and y is not None]
    right.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", color="tab:green", markersize=4)
    for x, y, scale in points:
        right.annotate(f"{scale:g}", (x, y), textcoords="offset points", xytext=(5, 4))
    right.set_xlabel("recall (diversity)")
    right.set_ylabel("precision (fidelity)")
    first = next(iter(reports.values()))
    canvas.suptitle(f"{first.about['samples']['n']:,} samples a point; {first.about['features']}", fontsize=8)


def _with_intervals(axis: Any, scales: list[float], figures: list[Figure], colour: str) -> None:
    values = [figure.value for figure in figures]
    axis.plot(scales, values, "o-", color=colour, markersize=4)
    if all(figure.low is not None for figure in figures):
        axis.fill_between(scales, [f.low for f in figures], [f.high for f in figures], color=colour, alpha=0.15)


def _find(report: Report, names: tuple[str, ...]) -> Figure | None:
    """The first figure whose name is, or begins with, one of these."""
    for name in names:
        for key, figure in report.figures.items():
            if key == name or (key.startswith(f"{name}-") and not key.startswith("FD-infinity")):
                return figure
    return None
