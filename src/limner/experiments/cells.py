"""An experiment is a table of cells. Each cell has a directory and, when it is finished, a `result.json` in it.

A finished cell is never done again; one that was killed goes on from what its directory holds. Processes that work on
the same directory share the cells out among themselves: whoever holds a cell's lock does it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from limner.errors import LimnerError
from limner.training.progress import duration

RESULT, PLAN = "result.json", "plan.json"
MEASURE_S = 10.0
"""About how long the figures of 1,000 samples take, on top of drawing them and of the feature network."""
POLL_S = 2.0
"""Seconds between looks at a cell that another process is doing."""


@dataclass(frozen=True)
class Cell:
    """name: its directory below the experiment's, unique. title: in words. about_s: seconds that it may take."""

    name: str
    title: str
    about_s: float


class Experiment(ABC):
    """What is to be done: picklable, so that every process can have its own."""

    @abstractmethod
    def plan(self) -> dict[str, Any]:
        """Everything that the results depend on, as JSON values: a directory holds one plan."""

    @abstractmethod
    def cells(self) -> list[Cell]:
        """All cells, those that others are compared with first. Raises LimnerError for wrong input."""

    @abstractmethod
    def work(self, cell: Cell, directory: Path, console: Console) -> dict[str, Any]:
        """Do a cell, or go on with it; what is returned is its result. Raises KeyboardInterrupt when stopped."""


def carry_out(experiment: Experiment, out: str | Path, *, processes: int = 1,
              console: Console | None = None) -> list[dict[str, Any]]:  # fmt: skip
    """Do all cells that are not done, and return the results of all, in order.

    processes: how many share the cells; each gets its part of the cores. Says at the start how much there is to do and
    about how long it takes. Raises LimnerError: `out` is a file, or holds another experiment's results.
    """
    out, console = Path(out), console or Console(stderr=True)
    cells = experiment.cells()
    _claim(out, experiment.plan())
    left = [cell for cell in cells if not (out / cell.name / RESULT).is_file()]
    seconds = sum(cell.about_s for cell in left) / min(processes, max(1, len(left)))
    _say(console, f"{out}: {len(left)} of {len(cells)} cells to do, about {duration(seconds)} in all")
    helpers = _helpers(experiment, out, min(processes, len(left)) - 1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(max(1, threads // (1 + len(helpers))))
        _share(experiment, cells, out, console)
    finally:
        torch.set_num_threads(threads)
        for helper in helpers:
            if not _all_done(out, cells):
                helper.terminate()
            helper.join()
    return [read(out / cell.name / RESULT) for cell in cells]


def _share(experiment: Experiment, cells: Sequence[Cell], out: Path, console: Console) -> None:
    """Do the cells that nobody else does, and wait for the rest."""
    spent = expected = 0.0
    while True:
        waiting = [cell for cell in cells if not (out / cell.name / RESULT).is_file()]
        if not waiting:
            return
        mine = next(_free(waiting, out), None)
        if mine is None:
            time.sleep(POLL_S)
            continue
        cell, lock = mine
        try:
            seconds = _do(experiment, cell, out / cell.name, console)
        finally:
            lock.release()
        spent, expected = spent + seconds, expected + cell.about_s
        rest = [other for other in waiting if other != cell]
        left = spent / max(expected, 1e-9) * sum(other.about_s for other in rest)
        _say(console, f"{cell.title}: done in {duration(seconds)}; {len(rest)} to do, about {duration(left)} left")


def _free(cells: Sequence[Cell], out: Path) -> Iterator[tuple[Cell, FileLock]]:
    """The cells that nobody is doing, each with its lock, which is held."""
    for cell in cells:
        (out / cell.name).mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / cell.name / ".lock", timeout=0)
        with contextlib.suppress(Timeout):
            lock.acquire()
            yield cell, lock


def _do(experiment: Experiment, cell: Cell, directory: Path, console: Console) -> float:
    """The seconds that it took."""
    began = time.monotonic()
    if not (directory / RESULT).is_file():
        write(directory / RESULT, {"cell": cell.name, "title": cell.title, **experiment.work(cell, directory, console)})
    return time.monotonic() - began


def _helpers(experiment: Experiment, out: Path, count: int) -> list[Any]:
    """Processes that do cells beside this one, with their part of the cores."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // (1 + max(count, 0)))
    helpers = [context.Process(target=_help, args=(experiment, str(out), threads)) for _ in range(max(count, 0))]
    for helper in helpers:
        helper.start()
    return helpers


def _help(experiment: Experiment, out: str, threads: int) -> None:
    torch.set_num_threads(threads)
    with contextlib.suppress(KeyboardInterrupt, LimnerError):  # the first process meets the same error, and tells it
        _share(experiment, experiment.cells(), Path(out), Console(stderr=True))


def _all_done(out: Path, cells: Sequence[Cell]) -> bool:
    return all((out / cell.name / RESULT).is_file() for cell in cells)


def _claim(out: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or hold it against the one that is there."""
    if out.exists() and not out.is_dir():
        raise LimnerError(f"{out}: is a file; --out should be a directory")
    plan = json.loads(json.dumps(plan))
    if (out / PLAN).is_file():
        stored = read(out / PLAN)
        for key in [*stored, *(k for k in plan if k not in stored)]:
            if stored.get(key) != plan.get(key):
                raise LimnerError(f"{out}: holds an experiment with {key} {_short(stored.get(key))}, not "
                                  f"{_short(plan.get(key))}; ask for the same, or give another --out")  # fmt: skip
        return
    if out.is_dir() and any(out.iterdir()):
        raise LimnerError(f"{out}: holds something else already; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write(out / PLAN, plan)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def read(path: Path) -> dict[str, Any]:
    """A JSON object. Raises LimnerError for a damaged file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LimnerError(f"{path}: damaged ({error}); remove it to do this cell again") from None


def write(path: Path, facts: Mapping[str, Any]) -> None:
    """Beside, then under its name: a file that can be seen is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    beside.write_text(json.dumps(facts, indent=2, ensure_ascii=False), encoding="utf-8")
    beside.replace(path)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
