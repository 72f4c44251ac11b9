"""Cells: each done once, taken up again after a stop, shared among processes; one directory, one plan."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

from limner.errors import LimnerError
from limner.experiments import cells
from limner.experiments.cells import RESULT, carry_out
from tiny_experiments import Counting, done, rewritten


def quiet() -> Console:
    return Console(quiet=True)


def test_every_cell_is_done_once_in_order(tmp_path: Path) -> None:
    told = io.StringIO()
    results = carry_out(Counting(), tmp_path, console=Console(file=told))
    assert [result["square"] for result in results] == [0, 1, 4]
    assert done(tmp_path) == ["group/0", "group/1", "group/2"]
    lines = told.getvalue().splitlines()
    assert lines[0] == f"{tmp_path}: 3 of 3 cells to do, about 6 s in all"
    assert lines[1].startswith("cell 0: done in 0 s; 2 to do, about")
    assert carry_out(Counting(), tmp_path, console=quiet()) == results
    assert len(done(tmp_path)) == 3


def test_what_was_stopped_goes_on(tmp_path: Path) -> None:
    with pytest.raises(LimnerError, match="went wrong"):
        carry_out(Counting(fail="group/1"), tmp_path, console=quiet())
    results = carry_out(Counting(), tmp_path, console=quiet())
    assert len(results) == 3
    assert done(tmp_path) == ["group/0", "group/1", "group/1", "group/2"]


def test_a_cell_that_another_process_holds_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "group/0").mkdir(parents=True)
    cells.write(tmp_path / cells.PLAN, Counting().plan())
    lock = FileLock(tmp_path / "group/0/.lock")
    lock.acquire()

    def finished_elsewhere(seconds: float) -> None:
        cells.write(tmp_path / "group/0" / RESULT, {"square": 100})
        lock.release()

    monkeypatch.setattr(cells.time, "sleep", finished_elsewhere)
    results = carry_out(Counting(), tmp_path, console=quiet())
    assert [result["square"] for result in results] == [100, 1, 4]
    assert done(tmp_path) == ["group/1", "group/2"]


def test_two_processes_share_the_cells(tmp_path: Path) -> None:
    results = carry_out(Counting(6), tmp_path, processes=2, console=quiet())
    assert [result["square"] for result in results] == [0, 1, 4, 9, 16, 25]
    assert sorted(done(tmp_path)) == [f"group/{k}" for k in range(6)]


def test_what_is_refused(tmp_path: Path) -> None:
    carry_out(Counting(1), tmp_path / "a", console=quiet())
    with pytest.raises(LimnerError, match=r"holds an experiment with note \"\", not \"other\""):
        carry_out(Counting(1, note="other"), tmp_path / "a", console=quiet())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    with pytest.raises(LimnerError, match="holds something else already"):
        carry_out(Counting(1), tmp_path / "b", console=quiet())
    with pytest.raises(LimnerError, match="is a file"):
        carry_out(Counting(1), tmp_path / "b" / "mine.txt", console=quiet())
    assert (tmp_path / "b" / "mine.txt").read_text() == "mine"
    rewritten(tmp_path / "a" / "group/0" / RESULT, square=7)
    assert carry_out(Counting(1), tmp_path / "a", console=quiet())[0]["square"] == 7
    (tmp_path / "a" / "group/0" / RESULT).write_text("{")
    with pytest.raises(LimnerError, match=r"damaged .*remove it to do this cell again"):
        carry_out(Counting(1), tmp_path / "a", console=quiet())
