"""The figures of the experiments: what goes on a matplotlib canvas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from limner.evaluation.plots import Draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

Row = Mapping[str, Any]
_MARKS = "osD^vP*X"
_STYLES = ("-", "--", ":", "-.")


def speed(rows: Sequence[Row], distance: str, score: str | None, caption: str) -> Draw:
    """Distance and score against images a second: a line a run and solver, a point a number of steps."""
    names, solvers = _each(rows, "name"), _each(rows, "sampler")

    def draw(canvas: Canvas) -> None:
        columns = [distance] if score is None else [distance, score]
        axes = canvas.subplots(1, len(columns), squeeze=False)[0]
        for axis, column in zip(axes, columns, strict=True):
            for name, style, mark in zip(names, _cycled(_STYLES, names), _cycled(_MARKS, names), strict=True):
                for k, solver in enumerate(solvers):
                    chosen = [row for row in rows if (row["name"], row["sampler"]) == (name, solver)]
                    chosen.sort(key=lambda row: row["steps"])
                    label = f"{name}, {solver}" if len(names) > 1 else solver
                    _line(axis, chosen, "images_per_s", column, label, f"C{k % 10}", style, mark)
                    for row in chosen if column == distance and solver == solvers[0] else ():
                        axis.annotate(f"{row['steps']}", (row["images_per_s"], row[column]), fontsize=7,
                                      textcoords="offset points", xytext=(4, 4))  # fmt: skip
            axis.set_xscale("log")
            axis.set_xlabel("images a second")
            axis.set_ylabel(column)
        _legend(canvas, axes[0], caption)

    return draw


def compression(rows: Sequence[Row], distance: str, score: str | None, caption: str) -> Draw:
    """Distance and score against training images (left) and against seconds of all stages (right), a line a factor."""
    factors = _each(rows, "f")

    def draw(canvas: Canvas) -> None:
        columns = [distance] if score is None else [distance, score]
        axes = canvas.subplots(len(columns), 2, squeeze=False)
        for line, column in zip(axes, columns, strict=True):
            for axis, (across, words) in zip(line, _ACROSS, strict=True):
                for k, f in enumerate(factors):
                    chosen = [row for row in rows if row["f"] == f]
                    _line(axis, chosen, across, column, f"f = {f}", f"C{k}", "-", _MARKS[k % len(_MARKS)])
                axis.set_xscale("log")
                axis.set_xlabel(words)
                axis.set_ylabel(column)
        _legend(canvas, axes[0, 0], caption)

    return draw


_ACROSS = (("images", "training images (equal steps)"), ("seconds", "seconds of training, all stages"))


def _line(axis: Any, rows: Sequence[Row], across: str, column: str, label: str, colour: str, style: str,
          mark: str) -> None:  # fmt: skip
    shown = [row for row in rows if row.get(column) is not None]
    x, y = [row[across] for row in shown], [row[column] for row in shown]
    axis.plot(x, y, style, marker=mark, color=colour, markersize=4, label=label)
    low, high = f"{column}_low", f"{column}_high"
    if shown and all(row.get(low) is not None for row in shown):
        axis.vlines(x, [row[low] for row in shown], [row[high] for row in shown], color=colour, alpha=0.4)


def _legend(canvas: Canvas, axis: Any, caption: str) -> None:
    handles, labels = axis.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside right upper", fontsize=7)
    canvas.suptitle(caption, fontsize=8)


def _each(rows: Sequence[Row], column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))


def _cycled(kinds: Sequence[str], over: Sequence[Any]) -> list[str]:
    return [kinds[k % len(kinds)] for k in range(len(over))]
