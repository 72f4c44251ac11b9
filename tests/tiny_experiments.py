"""Experiments small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from limner.errors import LimnerError
from limner.experiments.cells import Cell, Experiment


class Counting(Experiment):
    """Cells that write down who did them; `fail` names one that goes wrong."""

    def __init__(self, count: int = 3, fail: str = "", note: str = "") -> None:
        self.count, self.fail, self.note = count, fail, note

    def plan(self) -> dict[str, Any]:
        return {"count": self.count, "note": self.note}

    def cells(self) -> list[Cell]:
        return [Cell(f"group/{k}", f"cell {k}", 2.0) for k in range(self.count)]

    def work(self, cell: Cell, directory: Path, console: Console) -> dict[str, Any]:
        with (directory.parent / "done.txt").open("a") as file:
            file.write(f"{cell.name}\n")
        if cell.name == self.fail:
            raise LimnerError(f"{cell.name}: went wrong")
        return {"square": int(directory.name) ** 2}


def done(out: Path) -> list[str]:
    """The cells in the order in which they were begun."""
    file = out / "group" / "done.txt"
    return file.read_text().splitlines() if file.is_file() else []


def rewritten(path: Path, **changes: Any) -> None:
    """A JSON file with other values."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
