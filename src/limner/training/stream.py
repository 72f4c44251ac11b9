"""A stream's place in training: how far each lane is, which rows turned out to be corrupt, and a list of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from limner.config import RunConfig
from limner.data.sources import Problem
from limner.data.stream import StreamDataset, refuse_many
from limner.data.stream_order import Plan, blocks_of, lanes_for
from limner.errors import LimnerError
from limner.training.draws import Order, Part, Shuffled, Source, balanced

CORRUPT = "corrupt.jsonl"
"""In the run's directory: a line for each row that was skipped."""
_REMEMBERED = 4


def order_of(data: Source, config: RunConfig, out: Path, process: int = 0, processes: int = 1,
             say: Callable[[str], None] = print) -> Order:  # fmt: skip
    """How a data set is gone through: shuffled as a whole, or as a stream. `say` is told where classes are to be
    balanced that the data doesn't have. Raises LimnerError as `StreamOrder`, and where they come from a stream."""
    share = config.training.balance
    if not isinstance(data, StreamDataset):
        groups = getattr(data, "groups", None)
        if share and groups is None:
            say(f"training.balance = {share:g}: no label column to balance by; every row comes once an epoch")
        train = balanced(data.train, groups, share) if share and groups is not None else data.train
        return Shuffled(train, config.training.seed)
    if share:
        raise LimnerError("training.balance: a stream has every row once an epoch; leave it 0, or data.stream off")
    return StreamOrder(data, config, CorruptRows(data, out / CORRUPT, writes=process == 0), processes)


class CorruptRows:
    """Rows to skip, shared by all processes through a file of the run: one JSON line each, with file and row.

    writes: whether to list what was known before; what is found later, whoever finds it lists.
    Raises LimnerError where more than one row in a hundred is corrupt.
    """

    def __init__(self, data: StreamDataset, path: Path, *, writes: bool) -> None:
        self.data, self.path = data, path
        self.read()
        if writes:
            self._append(list(data.corrupt))

    def __len__(self) -> int:
        return len(self.data.corrupt)

    def read(self) -> None:
        """Take in what other processes, and earlier sittings, have found."""
        source = self.data.pixels.source
        for row, what in self._listed().items():
            self.data.corrupt.setdefault(row, Problem(source.place(row), what))

    def tell(self, rows: list[int]) -> None:
        """List rows that this process has found."""
        self._append(rows)
        self.read()
        refuse_many(len(self), len(self.data), self.data.corrupt[rows[-1]])

    def _append(self, rows: list[int]) -> None:
        listed, corrupt = self._listed(), self.data.corrupt
        entries = [{"row": row, "place": str(corrupt[row].place), "what": corrupt[row].what}
                   for row in rows if row not in listed]  # fmt: skip
        if not entries:
            return
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:  # one write, which no other process's comes into
                file.write(lines.encode())
        except OSError as error:
            raise LimnerError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _listed(self) -> dict[int, str]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except OSError:
            return {}
        entries = (_entry(line) for line in text.splitlines())
        return {entry["row"]: entry["what"] for entry in entries if entry is not None}


def _entry(line: str) -> dict[str, Any] | None:
    """A line of the list; None for one that a crash cut short."""
    try:
        entry = json.loads(line)
        return {"row": int(entry["row"]), "what": str(entry["what"])}
    except (ValueError, TypeError, KeyError):
        return None


class StreamOrder:
    """Which rows of a stream each step takes: `batch / lanes` of each lane, in the lanes' order.

    Raises LimnerError where lanes don't divide the batch, or processes and micro-batches don't divide the lanes.
    """

    def __init__(self, data: StreamDataset, config: RunConfig, skipped: CorruptRows, processes: int = 1) -> None:
        settings = config.training
        lanes = data.config.lanes or lanes_for(settings.batch)
        parts = processes * settings.accumulate
        if settings.batch % lanes or lanes % parts:
            raise LimnerError(
                f"data.lanes: {lanes} should divide training.batch, {settings.batch}, and be a multiple of {parts} "
                f"({settings.accumulate} micro-batches on each of {processes} processes)"
            )
        trains = np.ones(len(data), dtype=bool)
        trains[data.held_out] = False
        self.data, self.skipped = data, skipped
        self.per_lane = settings.batch // lanes
        self.plan = Plan(blocks_of(data.ends, lanes), trains, settings.seed, lanes, data.config.buffer)
        self.places = np.zeros((lanes, 2), dtype=np.int64)  # epoch, rows of it passed
        self._own: slice | None = None
        self._after: dict[int, npt.NDArray[np.int64]] = {}
        self._lane = functools.lru_cache(maxsize=2 * lanes)(lambda lane, epoch: self.plan.lane(lane, epoch))

    @property
    def corrupt(self) -> int:
        return len(self.skipped)

    def rows(self, part: Part) -> npt.NDArray[np.int64]:
        """The next rows of the part's lanes that are whole; those that aren't are passed over and listed."""
        lanes = range(part.start // self.per_lane, part.stop // self.per_lane)
        taken: dict[int, list[int]] = {lane: [] for lane in lanes}
        while short := [lane for lane in lanes if len(taken[lane]) < self.per_lane]:
            asked = {lane: self._next(lane, self.per_lane - len(taken[lane])) for lane in short}
            rows = np.asarray([row for found in asked.values() for row in found], dtype=np.int64)
            known = len(self.data.corrupt)
            whole = dict(zip(rows.tolist(), self.data.whole(rows).tolist(), strict=True))
            for lane, found in asked.items():
                taken[lane] += [row for row in found if whole[row]]
            if new := list(self.data.corrupt)[known:]:
                self.skipped.tell(new)
        self._remember(part, lanes)
        return np.asarray([row for lane in lanes for row in taken[lane]], dtype=np.int64)

    def _next(self, lane: int, count: int) -> list[int]:
        """The next rows of a lane, over the end of its epoch if need be."""
        rows: list[int] = []
        while len(rows) < count:
            epoch, passed = self.places[lane].tolist()
            found = self._lane(lane, epoch)[passed : passed + count - len(rows)].tolist()
            rows += found
            self.places[lane] = (epoch, passed + len(found)) if found else (epoch + 1, 0)
        return rows

    def _remember(self, part: Part, lanes: range) -> None:
        """The places after this step, which may be asked for when the next steps have been read already."""
        first = lanes.start if self._own is None else min(lanes.start, self._own.start)
        self._own = slice(first, lanes.stop if self._own is None else max(lanes.stop, self._own.stop))
        self._after[part.images + part.total] = self.places.copy()
        for images in sorted(self._after)[:-_REMEMBERED]:
            del self._after[images]

    def place(self, images: int, add_up: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The seed, and by lane the epoch and how many rows of it are passed."""
        known = self._after.get(images, self.places)
        own = np.zeros_like(known)
        if self._own is not None:
            own[self._own] = known[self._own]
        return {"seed": self.plan.seed, "lanes": add_up(torch.from_numpy(own)).tolist()}

    def restore(self, images: int, place: Any) -> None:
        """Raises LimnerError where the lanes were others."""
        lanes = np.asarray(place["lanes"], dtype=np.int64)
        if lanes.shape != self.places.shape:
            raise LimnerError(
                f"data.lanes: the run has {len(lanes)}, and the recipe given {len(self.places)}; resume with "
                f"--set data.lanes={len(lanes)}, or start another run"
            )
        self.plan = replace(self.plan, seed=int(place["seed"]))
        self._lane.cache_clear()
        self.places, self._after = lanes.copy(), {images: lanes.copy()}
