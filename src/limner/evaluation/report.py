"""What an evaluation found: figures with their intervals, and everything one must know to compare them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from limner.errors import LimnerError

Better = Literal["lower", "higher", ""]
_ARROWS: dict[Better, str] = {"lower": "↓", "higher": "↑", "": ""}


@dataclass(frozen=True)
class Figure:
    """One number.

    name: unique, and with the feature network in it where it depends on one. low, high: its 95% interval, None where
    there is none. n: samples it rests on. better: which way is better. notes: what else to know, in words.
    title: what is shown, where that says more than the name. details: further numbers.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int = 0
    better: Better = ""
    notes: str = ""
    title: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def interval(self) -> str:
        """Such as `3.1 to 3.6`."""
        return "" if self.low is None or self.high is None else f"{number(self.low)} to {number(self.high)}"

    def row(self) -> tuple[str, str, str, str, str]:
        """Name, value, interval, samples, notes, as text."""
        shown = f"{self.title or self.name} {_ARROWS[self.better]}".strip()
        return shown, number(self.value), self.interval, f"{self.n:,}", self.notes


@dataclass(frozen=True)
class Sheet:
    """Samples to look at: pictures uint8 (N, H, W, 3), what was asked for, and the nearest real picture of each with
    its distance in feature space (None without real pictures at hand)."""

    pictures: npt.NDArray[np.uint8]
    captions: list[str]
    nearest: npt.NDArray[np.uint8] | None = None
    distances: npt.NDArray[np.floating[Any]] | None = None


@dataclass(frozen=True)
class Report:
    """All figures of one set of samples.

    about: samples (where from, how many, size), settings (sampler, steps, guidance, seed), features (network, resizing,
    precision), reference (where from, digest, how many), seed of the evaluation's own draws, version.
    """

    figures: dict[str, Figure]
    about: dict[str, Any]
    warnings: tuple[str, ...] = ()
    sheet: Sheet | None = None

    HEADER = ("figure", "value", "95% interval", "samples", "notes")

    def __getitem__(self, name: str) -> Figure:
        """A figure by name, with or without the network (`report["FD"]`). Raises LimnerError when absent."""
        network = str(self.about["features"]).partition(",")[0]
        for key in (name, f"{name}-{network}"):
            if key in self.figures:
                return self.figures[key]
        raise LimnerError(f"report: there is no figure '{name}'; there are {', '.join(self.figures)}")

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Rows of text, in the columns of `HEADER`."""
        return [figure.row() for figure in self.figures.values()]

    def lines(self) -> list[str]:
        """The whole report as plain lines."""
        rows = [self.HEADER[:4], *(row[:4] for row in self.table())]
        widths = [max(len(row[k]) for row in rows) for k in range(4)]
        notes = ["notes", *(row[4] for row in self.table())]
        body = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + f"  {note}"
            for row, note in zip(rows, notes, strict=True)
        ]
        return [*described(self.about), *(f"warning: {text}" for text in self.warnings), *(b.rstrip() for b in body)]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what is not a number becomes None."""
        figures = {name: asdict(figure) for name, figure in self.figures.items()}
        return jsonable({"figures": figures, "warnings": list(self.warnings), **self.about})

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON, also written to `path`."""
        return written(json.dumps(self.to_dict(), indent=2, ensure_ascii=False), path)

    def to_csv(self, path: str | Path | None = None) -> str:
        """A line a figure, with what it depends on beside it; also written to `path`."""
        return written(csv_of(_csv_rows(self)), path)


def sweep_table(reports: Mapping[float, Report]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows, a row a value of what was swept, of the figures that all reports have."""
    first = next(iter(reports.values()))
    names = [name for name in first.figures if all(name in report.figures for report in reports.values())]
    rows = [
        (f"{value:g}", *(number(report.figures[name].value) for name in names)) for value, report in reports.items()
    ]
    return ("scale", *(f"{n} {_ARROWS[first.figures[n].better]}".strip() for n in names)), rows


def sweep_csv(reports: Mapping[float, Report], path: str | Path | None = None) -> str:
    """All reports of a sweep in one CSV; also written to `path`."""
    return written(csv_of([row for report in reports.values() for row in _csv_rows(report)]), path)


def described(about: Mapping[str, Any]) -> list[str]:
    """What the figures depend on, a line each."""
    return [f"{name}: {_words(value)}" for name, value in about.items() if value not in (None, {}, "")]


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_words(v)}" for k, v in value.items() if v is not None)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else str(value)


def number(value: float | None) -> str:
    """Four significant digits, no exponent where it can be helped."""
    if value is None or not math.isfinite(value):
        return "—"
    return (
        f"{value:.4g}"
        if 1e-4 <= abs(value) < 1e4 or value == 0
        else f"{value:,.0f}"
        if abs(value) >= 1
        else f"{value:.2e}"
    )


def _csv_rows(report: Report) -> list[dict[str, Any]]:
    shared = {}
    for section, values in report.about.items():
        if isinstance(values, Mapping):
            shared |= {f"{section}_{name}": value for name, value in values.items()}
        else:
            shared[section] = values
    keys = ("name", "value", "low", "high", "n", "notes")
    return [{key: getattr(figure, key) for key in keys} | shared for figure in report.figures.values()]


def csv_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """A CSV of rows by column, in which a column may be missing here and there."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def jsonable(value: Any) -> Any:
    """The same of plain types, and what is not a number as None."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def written(text: str, path: str | Path | None) -> str:
    """The text, also written to `path`. Raises LimnerError when that cannot be."""
    if path is not None:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise LimnerError(f"{path}: cannot be written ({error.strerror or error})") from None
    return text
