"""The notebook runs from its first cell to its last, on few pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts.tour import carried_out

TOUR = Path(__file__).parents[1] / "examples" / "tour.ipynb"


def test_the_tour_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOUR_IMAGES", "64")
    cells = [cell for cell in carried_out(TOUR).cells if cell.cell_type == "code"]
    shown = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(shown) == 6
    assert "FD-efficientnet-lite0" in "".join(output.get("text", "") for output in cells[-1].outputs)
