"""A data set whose pictures are decoded when they are asked for: tars and Parquet files larger than a cache may be.

Everything but the pictures is as in `dataset.py`: rows have numbers, labels and captions are read at the beginning.
Rows that can't be used are left out of the training and listed, up to one in a hundred.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from limner.config import DataConfig
from limner.data import transforms
from limner.data.conditions import Condition, Labels, Texts, on_pictures
from limner.data.dataset import HELD_OUT_MOST, Dataset, Rows, digest_of
from limner.data.pixels import Pixels, View
from limner.data.roles import MISSING, find_roles, read_labels, read_texts
from limner.data.sources import Absent, FileSpan, Problem, ShardSource, Source
from limner.data.stream_files import contents_digest
from limner.data.text import reason
from limner.errors import LimnerError

KEPT_BYTES = 1 << 28
"""Decoded pictures that are kept, without their margins: conditions are made of them, and batches are read ahead."""
LOOKED_AT = 1024
"""Rows that are decoded before training begins: previews and statistics need some that are whole."""
HELD_OUT_RUNS = 32
"""Runs of rows (files, row groups) that held-out rows are taken from: more would be read for few rows each."""
MOST_CORRUPT = 0.01

Found = npt.NDArray[np.uint8] | transforms.PictureError


def refuse_many(corrupt: int, rows: int, last: Problem) -> None:
    """Raise LimnerError where more than one row in a hundred is corrupt."""
    if corrupt > MOST_CORRUPT * rows:
        raise LimnerError(f"{last}; {corrupt:,} of {rows:,} rows are corrupt by now, and more than 1% are refused")


class StreamedPixels(Pixels):
    """Pictures that lie encoded in files. `size`, `channels` and `take` are as in `Pixels`."""

    def __init__(self, source: ShardSource, column: str, recipe: transforms.Recipe, workers: int | None) -> None:
        self.source, self.column, self.recipe = source, column, recipe
        self.workers = workers or os.cpu_count() or 1
        self.channels, self.has_margins = recipe.channels, recipe.margins
        digest = hashlib.blake2b(f"{contents_digest(source.files)} {column} {recipe}".encode(), digest_size=16)
        self.digest = digest.hexdigest()
        self._kept: OrderedDict[int, Found] = OrderedDict()
        self._array = None
        self._lock = threading.Lock()
        self.size = recipe.size or self._first_size()

    def __len__(self) -> int:
        return len(self.source)

    def look(self, rows: npt.NDArray[np.int64]) -> list[Found]:
        """Each row's picture (C, H, W), or what is wrong with it; decoded by `workers` threads.

        Raises LimnerError where a file can't be read at all: that is no fault of the row's.
        """
        with self._lock:
            found = {row: self._kept.get(row) for row in rows.tolist()}
        absent = [row for row, known in found.items() if known is None]
        if absent:
            shares = [absent[k :: self.workers] for k in range(min(self.workers, len(absent)))]
            with transforms.quiet(), ThreadPoolExecutor(len(shares)) as pool:
                parts = pool.map(lambda share: {row: self._decode(row) for row in share}, shares)
                decoded = {row: picture for part in parts for row, picture in part.items()}
            self._keep(decoded)
            found |= decoded
        return [picture for picture in (found[row] for row in rows.tolist()) if picture is not None]

    def whole(self, row: int) -> npt.NDArray[np.uint8]:
        """One picture with its margins (C, h, w). Raises LimnerError where it is corrupt."""
        found = self._kept.get(row)
        if found is None:
            (found,) = self.look(np.asarray([row], dtype=np.int64))
        if isinstance(found, transforms.PictureError):
            raise LimnerError(str(Problem(self.source.picture_place(row, self.column), str(found))))
        return found

    def take(self, rows: npt.NDArray[np.int64], view: View) -> npt.NDArray[np.uint8]:
        """uint8 (B, C, H, W), a copy. Raises LimnerError for a corrupt row."""
        self.look(rows)  # side by side; what follows finds them decoded
        return super().take(rows, view)

    def corners(self, rows: npt.NDArray[np.int64], view: View) -> npt.NDArray[np.int64]:
        """(B, 2): top and left of what a view shows of each picture."""
        shapes = [self.whole(row).shape[1:] for row in rows.tolist()]
        slack = np.asarray(shapes, dtype=np.int64).reshape(-1, 2) - np.asarray(self.size)
        return slack // 2 if view.corner is None else np.floor(view.corner * (slack + 1)).astype(np.int64)

    def _first_size(self) -> tuple[int, int]:
        """Of the first picture that is whole; all others must have it."""
        for row in range(min(len(self.source), LOOKED_AT)):
            found = self._decode(row)
            if not isinstance(found, transforms.PictureError):
                return found.shape[1], found.shape[2]
        raise LimnerError(f"{self.source.name}: none of the first {LOOKED_AT} pictures can be read")

    def _decode(self, row: int) -> Found:
        try:
            picture = self.recipe(self._bytes(row))
        except transforms.PictureError as error:
            return error
        if self.recipe.size is None and hasattr(self, "size") and picture.shape[1:] != self.size:
            (height, width), (h, w) = self.size, picture.shape[1:]
            return transforms.PictureError(f"is {w}x{h} and the first is {width}x{height}; set data.size")
        return picture

    def _bytes(self, row: int) -> bytes:
        encoded = self.source.picture(self.column, row)
        if isinstance(encoded, Absent):
            raise transforms.PictureError(encoded.why)
        if not isinstance(encoded, FileSpan):
            return encoded
        try:
            return encoded.read()
        except (OSError, ValueError) as error:
            place = self.source.picture_place(row, self.column)
            raise LimnerError(f"{place}: cannot be read ({reason(error)}); go on with --resume") from None

    def _keep(self, decoded: Mapping[int, Found]) -> None:
        """The newest, as many as KEPT_BYTES hold, and at least those just decoded."""
        with self._lock:
            self._kept |= decoded
            most = max(len(decoded), KEPT_BYTES // (self.channels * math.prod(self.size)))
            while len(self._kept) > most:
                self._kept.popitem(last=False)


@dataclass(frozen=True, kw_only=True)
class StreamDataset(Dataset):
    """A data set of `StreamedPixels`. ends: row numbers at which files, or row groups in them, end. corrupt: rows that
    are known to be of no use; more are found on the way."""

    pixels: StreamedPixels
    config: DataConfig
    ends: Sequence[int]
    corrupt: dict[int, Problem] = field(default_factory=dict)

    def whole(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """(B,): which of these rows can be used. What is found is kept in `corrupt`."""
        chosen = np.asarray(rows, dtype=np.int64)
        sound = np.asarray([row not in self.corrupt for row in chosen.tolist()], dtype=bool)
        for row, found in zip(chosen[sound].tolist(), self.pixels.look(chosen[sound]), strict=True):
            if isinstance(found, transforms.PictureError):
                self.corrupt[row] = Problem(self.pixels.source.picture_place(row, self.pixels.column), str(found))
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

    Raises LimnerError: another form of data; a condition that lies in pictures of its own; a file that can't be read;
    more than one corrupt row in a hundred.
    """
    if not isinstance(source, ShardSource):
        raise LimnerError(f"{source.name}: data.stream needs WebDataset tars or Parquet files; leave it out")
    roles = find_roles(source, config, sections)
    for kind, column in (("semantic_map", True), ("boxes", True), ("mask", roles.mask)):
        if kind in sections and column:
            raise LimnerError(f"data.stream: doesn't go with {kind} of its own column yet; leave it out")
    problems, conditions = list(told), dict[str, Condition]()
    if "label" in sections and roles.label is not None:
        conditions["label"] = Labels(*read_labels(source, roles.label, problems.append, classes=classes))
    if "text" in sections and roles.text is not None:
        conditions["text"] = Texts(read_texts(source, roles.text, problems.append))
    corrupt = _by_row(source, problems)
    labels = conditions.get("label")
    if isinstance(labels, Labels):
        missing = np.flatnonzero(labels.numbers == MISSING).tolist()
        corrupt |= {row: Problem(source.place(row), "has no label") for row in missing if row not in corrupt}
    recipe = transforms.Recipe(config.size, config.channels, transforms.colour(config.ground), config.crop == "random")
    pixels = StreamedPixels(source, roles.image, recipe, config.workers)
    conditions |= on_pictures(source, roles, sections, config, pixels, None)
    ends = source.runs()
    held_out = _held_out(ends, config.held_out)
    train = np.delete(np.arange(len(source)), held_out)
    digest = digest_of(pixels, conditions)
    return _looked_at(StreamDataset(pixels=pixels, conditions=conditions, digest=digest, train=train,
                                    held_out=held_out, flip=config.flip, notes=tuple(source.notes), config=config,
                                    ends=ends, corrupt=corrupt))  # fmt: skip


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
