"""A data set whose pictures are decoded when they are asked for: tars and Parquet files larger than a cache may be.

Everything but the pictures is as in `dataset.py`: rows have numbers, labels and captions are read at the beginning.
Rows that can't be used are left out of the training and listed, up to one in a hundred.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from limner.config import DataConfig
from limner.data import transforms
from limner.data.conditions import Condition, Labels, Texts, on_pictures
from limner.data.dataset import HELD_OUT_MOST, Dataset, Rows, digest_of
from limner.data.roles import MISSING, find_roles, read_labels, read_texts
from limner.data.sources import Problem, ShardSource, Source
from limner.data.stream_pixels import LOOKED_AT, AsAsked, Reader, StreamedPixels
from limner.errors import LimnerError

HELD_OUT_RUNS = 32
"""Runs of rows (files, row groups) that held-out rows are taken from: more would be read for few rows each."""
MOST_CORRUPT = 0.01


def refuse_many(corrupt: int, rows: int, last: Problem) -> None:
    """Raise LimnerError where more than one row in a hundred is corrupt."""
    if corrupt > MOST_CORRUPT * rows:
        raise LimnerError(f"{last}; {corrupt:,} of {rows:,} rows are corrupt by now, and more than 1% are refused")


@dataclass(frozen=True, kw_only=True)
class StreamDataset(Dataset):
    """A data set of `StreamedPixels`. ends: row numbers at which files, or row groups in them, end. overlays: maps and
    masks. corrupt: rows that are known to be of no use; more are found on the way."""

    pixels: StreamedPixels
    config: DataConfig
    ends: Sequence[int]
    overlays: Sequence[StreamedPixels] = ()
    corrupt: dict[int, Problem] = field(default_factory=dict)

    def looked(self, rows: npt.NDArray[np.int64]) -> dict[int, Problem]:
        """Those of these rows whose picture, or what lies on it, is of no use."""
        found: dict[int, Problem] = {}
        for pixels in (self.pixels, *self.overlays):
            left = np.asarray([row for row in rows.tolist() if row not in found], dtype=np.int64)
            for row, seen in zip(left.tolist(), pixels.look(left), strict=True):
                if isinstance(seen, transforms.PictureError):
                    found[row] = pixels.problem(row, seen)
        return found

    def whole(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """(B,): which of these rows can be used. What is found is kept in `corrupt`."""
        chosen = np.asarray(rows, dtype=np.int64)
        sound = np.asarray([row not in self.corrupt for row in chosen.tolist()], dtype=bool)
        self.corrupt.update(self.looked(chosen[sound]))
        return np.asarray([row not in self.corrupt for row in chosen.tolist()], dtype=bool)

    def iterate(
        self, rows: Rows | None = None, batch: int = 256
    ) -> Iterator[tuple[npt.NDArray[np.uint8], dict[str, Any]]]:
        """As `Dataset.iterate`, without the rows that are corrupt."""
        chosen = np.arange(len(self)) if rows is None else np.asarray(rows, dtype=np.int64)
        for start in range(0, len(chosen), batch):
            part = chosen[start : start + batch]
            yield from super().iterate(part[self.whole(part)], batch)


def streamed(source: Source, config: DataConfig, sections: Mapping[str, Any], told: Sequence[Problem],
             classes: Sequence[str] | None) -> StreamDataset:  # fmt: skip
    """The rows of tars or Parquet files as a data set. told: problems that were met in opening them.

    Raises LimnerError: another form of data; semantic maps whose classes have no names; a file that can't be read; more
    than one corrupt row in a hundred.
    """
    if not isinstance(source, ShardSource):
        raise LimnerError(f"{source.name}: data.stream needs WebDataset tars or Parquet files; leave it out")
    roles = find_roles(source, config, sections)
    problems, conditions = list(told), dict[str, Condition]()
    if "label" in sections and roles.label is not None:
        conditions["label"] = Labels(*read_labels(source, roles.label, problems.append, classes=classes))
    if "text" in sections and roles.text is not None:
        conditions["text"] = Texts(read_texts(source, roles.text, problems.append))
    _by_row(source, problems)  # a file of no use goes before what is made of it
    recipe = transforms.Recipe(config.size, config.channels, transforms.colour(config.ground), config.crop == "random")
    reading = AsAsked(Reader(source), config.workers, problems.append)
    pixels = StreamedPixels(reading.reader, [roles.image], recipe, config.workers)
    conditions |= on_pictures(source, roles, sections, config, pixels, reading)
    corrupt = _by_row(source, problems)
    labels = conditions.get("label")
    if isinstance(labels, Labels):
        missing = np.flatnonzero(labels.numbers == MISSING).tolist()
        corrupt |= {row: Problem(source.place(row), "has no label") for row in missing if row not in corrupt}
    ends = source.runs()
    held_out = _held_out(ends, config.held_out)
    train = np.delete(np.arange(len(source)), held_out)
    digest = digest_of(pixels, conditions)
    return _looked_at(StreamDataset(pixels=pixels, conditions=conditions, digest=digest, train=train,
                                    held_out=held_out, flip=config.flip, notes=tuple(source.notes), config=config,
                                    ends=ends, overlays=tuple(reading.stores), corrupt=corrupt))  # fmt: skip


def _by_row(source: ShardSource, problems: Sequence[Problem]) -> dict[int, Problem]:
    """Problems by the row that they make useless. Raises LimnerError for one of a whole file, such as a tar that is cut
    off: how much is lost with it nobody knows."""
    by_place = {problem.place: problem for problem in problems}
    rows = {source.place(row): row for row in range(len(source) if by_place else 0) if source.place(row) in by_place}
    for place, problem in by_place.items():
        if place not in rows:
            raise LimnerError(str(problem))
    return {row: by_place[place] for place, row in rows.items()}


def _held_out(ends: Sequence[int], share: float) -> npt.NDArray[np.int64]:
    """The first rows of some runs, spread over all: min(share x rows, 2048) at most, and one row always trains."""
    total = ends[-1]
    count = min(math.ceil(share * total - 1e-9), HELD_OUT_MOST, total - 1)
    chosen = np.linspace(0, len(ends) - 1, min(HELD_OUT_RUNS, len(ends))).astype(np.int64)
    each, starts, stops = -(-count // len(chosen)), np.asarray([0, *ends[:-1]])[chosen], np.asarray(ends)[chosen]
    spans = zip(starts.tolist(), np.minimum(starts + each, stops).tolist(), strict=True)
    return np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in spans])[:count]


def _looked_at(data: StreamDataset) -> StreamDataset:
    """The data set with its held-out rows and the first of the others decoded, and the corrupt ones left out."""
    held_out = data.held_out[data.whole(data.held_out)]
    first, rest = data.train[:LOOKED_AT], data.train[LOOKED_AT:]
    train = np.concatenate([first[data.whole(first)], rest])
    for problem in list(data.corrupt.values())[-1:]:
        refuse_many(len(data.corrupt), len(data), problem)
    if not len(train):
        raise LimnerError(f"{data.pixels.source.name}: has no rows to train on")
    return replace(data, train=train, held_out=held_out)
