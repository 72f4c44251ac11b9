"""Pictures that are decoded when they are asked for, and what lies on them: of tars and Parquet files larger than a
cache may be."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from limner.config import BoxesCondition
from limner.data import transforms
from limner.data.boxes import Boxes, boxes_of_maps, late_boxes
from limner.data.overlays import CLASSES_FILE, SemanticMaps
from limner.data.pixels import Decoder, Pixels, View
from limner.data.sources import Absent, FileSpan, Problem, ShardSource, Tell
from limner.data.stream_files import contents_digest
from limner.data.text import reason
from limner.errors import LimnerError

KEPT_BYTES = 1 << 28
"""Decoded pictures that are kept, without their margins: conditions are made of them, and batches are read ahead."""
KEPT_ENCODED = 1 << 26
"""Encoded pictures that are kept: a map is held against its picture, boxes need its size."""
LOOKED_AT = 1024
"""Rows that are decoded before training begins: previews and statistics need some that are whole."""

Found = npt.NDArray[np.uint8] | transforms.PictureError


class Reader:
    """The encoded pictures of a source, of which the last ones are kept."""

    def __init__(self, source: ShardSource) -> None:
        self.source = source
        self._kept: OrderedDict[tuple[int, str], bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __call__(self, row: int, column: str) -> bytes:
        """Raises PictureError where there is none, LimnerError where a file can't be read: no fault of the row's."""
        with self._lock:
            known = self._kept.get((row, column))
        if known is not None:
            return known
        encoded = self.source.picture(column, row)
        if isinstance(encoded, Absent):
            raise transforms.PictureError(encoded.why)
        if not isinstance(encoded, FileSpan):
            return encoded
        try:
            data = encoded.read()
        except (OSError, ValueError) as error:
            place = self.source.picture_place(row, column)
            raise LimnerError(f"{place}: cannot be read ({reason(error)}); go on with --resume") from None
        with self._lock:
            self._bytes += len(data) - len(self._kept.pop((row, column), b""))
            self._kept[row, column] = data
            while self._bytes > KEPT_ENCODED and len(self._kept) > 1:
                self._bytes -= len(self._kept.popitem(last=False)[1])
        return data


class StreamedPixels(Pixels):
    """Pictures that lie encoded in files. `size`, `channels` and `take` are as in `Pixels`.

    columns: theirs, then those that the recipe is given besides. Raises LimnerError as `look`, and where none of the
    first can be read.
    """

    def __init__(self, reader: Reader, columns: Sequence[str], recipe: Decoder, workers: int | None) -> None:
        self.reader, self.source, self.columns, self.recipe = reader, reader.source, tuple(columns), recipe
        self.workers = workers or os.cpu_count() or 1
        self.channels, self.has_margins = recipe.channels, recipe.margins
        made_of = f"{contents_digest(self.source.files)} {' '.join(self.columns)} {recipe}"
        self.digest = hashlib.blake2b(made_of.encode(), digest_size=16).hexdigest()
        self._kept: OrderedDict[int, Found] = OrderedDict()
        self._array = None
        self._lock = threading.Lock()
        self.size = recipe.size or self._first_size()

    def __len__(self) -> int:
        return len(self.source)

    def problem(self, row: int, what: transforms.PictureError) -> Problem:
        """What is wrong with a row, and where."""
        return Problem(self.source.picture_place(row, self.columns[0]), str(what))

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
            raise LimnerError(str(self.problem(row, found)))
        return found

    def original(self, row: int) -> tuple[int, int]:
        """(height, width) of a picture as it is in its file. Raises LimnerError where it is corrupt."""
        try:
            return transforms.oriented_size(transforms.opened(self.reader(row, self.columns[0])))
        except transforms.PictureError as error:
            raise LimnerError(str(self.problem(row, error))) from None

    def take(self, rows: npt.NDArray[np.int64], view: View) -> npt.NDArray[np.uint8]:
        """uint8 (B, C, H, W), a copy. Raises LimnerError for a corrupt row."""
        self.look(rows)  # side by side; what follows finds them decoded
        return super().take(rows, view)

    def highest(self, but: int) -> int:
        """Raises LimnerError: nobody has seen all of them."""
        raise LimnerError(f"{self.source.name}: data.stream: the classes of the maps should be known beforehand; name "
                          f"them in {CLASSES_FILE} beside the files, a line each, or in conditions")  # fmt: skip

    def corners(self, rows: npt.NDArray[np.int64], view: View) -> npt.NDArray[np.int64]:
        """(B, 2): top and left of what a view shows of each picture."""
        if not self.has_margins:
            return np.zeros((len(rows), 2), dtype=np.int64)
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
            picture = self.recipe(*(self.reader(row, column) for column in self.columns))
        except transforms.PictureError as error:
            return error
        if self.recipe.size is None and hasattr(self, "size") and picture.shape[1:] != self.size:
            (height, width), (h, w) = self.size, picture.shape[1:]
            return transforms.PictureError(f"is {w}x{h} and the first is {width}x{height}; set data.size")
        return picture

    def _keep(self, decoded: Mapping[int, Found]) -> None:
        """The newest, as many as KEPT_BYTES hold, and at least those just decoded."""
        with self._lock:
            self._kept |= decoded
            most = max(len(decoded), KEPT_BYTES // (self.channels * math.prod(self.size)))
            while len(self._kept) > most:
                self._kept.popitem(last=False)


@dataclass(frozen=True)
class AsAsked:
    """How what lies on the pictures is read in a stream: when it is asked for. tell: receives rows whose boxes can't be
    used. stores: the maps and masks, as they are made."""

    reader: Reader
    workers: int | None
    tell: Tell
    stores: list[StreamedPixels] = field(default_factory=list)

    def store(self, columns: Sequence[str], recipe: Decoder) -> StreamedPixels:
        self.stores.append(StreamedPixels(self.reader, columns, recipe, self.workers))
        return self.stores[-1]

    def boxes(self, columns: tuple[str, str], pixels: Pixels, section: BoxesCondition) -> Boxes:
        assert isinstance(pixels, StreamedPixels)
        return late_boxes(self.reader.source, columns[0], pixels, section, self.tell, pixels.original)

    def boxes_of(self, maps: SemanticMaps, section: BoxesCondition) -> Boxes:
        return boxes_of_maps(maps, section, late=True)
