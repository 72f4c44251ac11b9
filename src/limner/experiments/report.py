"""What an experiment leaves: `results.json`, `results.csv`, figures as `.png` and `.svg`, and a page, `report.html`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from limner.evaluation import page, plots
from limner.evaluation.plots import Draw
from limner.evaluation.report import csv_of, jsonable, number, written

SIZE = (10.5, 4.0)
FIGURES = ("FD", "FID", "IS", "KID", "precision", "recall", "class_accuracy", "retrieval")


@dataclass(frozen=True)
class Table:
    """A heading, and rows by column; `columns`: those that are shown, in order."""

    heading: str
    rows: Sequence[Mapping[str, Any]]
    columns: Sequence[str]


@dataclass(frozen=True)
class Findings:
    """Everything that is written. words: what was seen, a paragraph each. figures: by name of file. pictures: PNG bytes
    with what they show. facts: `results.json`. rows: `results.csv`."""

    title: str
    words: Sequence[str]
    facts: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    tables: Sequence[Table]
    figures: Mapping[str, Draw]
    pictures: Sequence[tuple[str, bytes]] = ()
    size: tuple[float, float] = SIZE


def write(found: Findings, out: Path) -> None:
    """Write all files into `out`. Raises LimnerError when that cannot be done."""
    written(json.dumps(jsonable(found.facts), indent=2, ensure_ascii=False), out / "results.json")
    written(csv_of(found.rows), out / "results.csv")
    body = [f"<h1>{escape(found.title)}</h1>", *(f"<p>{escape(text)}</p>" for text in found.words)]
    for name, draw in found.figures.items():
        image, _ = plots.saved(draw, out / name, found.size)
        body.append(page.image(image.read_bytes(), name, "plot"))
    for shown in found.tables:
        cells = [[_cell(row.get(column)) for column in shown.columns] for row in shown.rows]
        body += [f"<h2>{escape(shown.heading)}</h2>",
                 page.table(shown.columns, cells, numbers=range(1, len(shown.columns)))]  # fmt: skip
    for words, png in found.pictures:
        body += [f"<h3>{escape(words)}</h3>", page.image(png, words, "plot")]
    written(page.document(found.title, body), out / "report.html")


def flat(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures that experiments compare, by name, with their intervals as `NAME_low` and `NAME_high`."""
    found: dict[str, Any] = {}
    for name, figure in figures.items():
        if name.partition("-")[0] in FIGURES and not name.startswith("FD-infinity"):
            found |= {name: figure["value"], f"{name}_low": figure["low"], f"{name}_high": figure["high"]}
    return found


def column(rows: Sequence[Mapping[str, Any]], *kinds: str) -> str | None:
    """The first column of one of these kinds of figure, such as `FD-efficientnet-lite0` for "FD"."""
    names = [name for name in rows[0] if not name.endswith(("_low", "_high"))]
    return next((name for kind in kinds for name in names if name == kind or name.startswith(f"{kind}-")), None)


def _cell(value: Any) -> str:
    return number(value) if isinstance(value, float) else "—" if value is None else str(value)
