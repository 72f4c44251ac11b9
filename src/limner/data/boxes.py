"""Layout boxes: the class and the place of each thing in a picture.

A box is (class, x, y, w, h): x, y its left upper corner, in 0..1 of the picture as it is seen. A data set has them as
Hugging Face does, `objects: {bbox: [[x, y, w, h], ...], categories: [...]}`, in pixels of the picture as it is in the
file, or all of them in 0..1; or they are made of semantic maps: a box around each connected region of a class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from limner.config import BoxesCondition
from limner.data.overlays import SemanticMaps, class_names
from limner.data.pixels import Pixels, View, fetch, in_parallel
from limner.data.sources import Encoded, Problem, Source, Tell, refuse
from limner.data.transforms import PictureError, opened, oriented_size
from limner.errors import LimnerError, suggest

Array = npt.NDArray[np.float32]

SEEN = 0.25
"""The share of a box that a crop must show, or it isn't in the picture any more."""
_CATEGORIES = ("categories", "category", "class", "classes", "labels", "label", "category_id")


@dataclass(frozen=True)
class Boxes:
    """boxes: for each row (n, 5), class, x, y, w, h in pixels of the picture as it is kept."""

    boxes: list[Array] | Late
    names: tuple[str, ...]
    pictures: Pixels
    most: int
    notes: tuple[str, ...] = field(default=())

    def take(self, rows: npt.NDArray[np.int64], view: View) -> torch.Tensor:
        """float32 (B, M, 5), the largest first; rows with fewer than M boxes are filled with class -1."""
        corners = self.pictures.corners(rows, view)
        mirror = np.zeros(len(rows), bool) if view.mirror is None else view.mirror
        seen = [
            seen_boxes(self.boxes[row], corner, self.pictures.size, bool(flip))[: self.most]
            for row, corner, flip in zip(rows.tolist(), corners, mirror, strict=True)
        ]
        return filled(seen)

    def mirrorable(self, rows: npt.NDArray[np.int64]) -> None:
        return None

    def fingerprint(self) -> str:
        known = self.boxes.digest if isinstance(self.boxes, Late) else [boxes.tolist() for boxes in self.boxes]
        return f"{self.names} {known}"


@dataclass(frozen=True)
class Late:
    """The boxes of rows whose pictures aren't kept, worked out when they are asked for. digest: names what they are
    made of."""

    of: Callable[[int], Array]
    digest: str

    def __getitem__(self, row: int) -> Array:
        return self.of(row)


def filled(rows: Sequence[Array]) -> torch.Tensor:
    """Boxes (n, 5) of each row as one tensor (B, M, 5), M at least 1, filled up with class -1."""
    table = np.zeros((len(rows), max([1, *map(len, rows)]), 5), np.float32)
    table[..., 0] = -1
    for row, boxes in zip(table, rows, strict=True):
        row[: len(boxes)] = boxes
    return torch.from_numpy(table)


def seen_boxes(boxes: Array, corner: npt.NDArray[np.int64], size: tuple[int, int], mirror: bool) -> Array:
    """Boxes in pixels as they stand in the part of a picture at `corner` of `size`, in 0..1, the largest first."""
    if not len(boxes):
        return boxes
    cut = boxes.copy()
    cut[:, 1:3] -= np.asarray(corner)[::-1]
    cut = clipped(cut / np.array([1, size[1], size[0], size[1], size[0]], np.float32))
    whole = boxes[:, 3] * boxes[:, 4] / (size[0] * size[1])
    area = cut[:, 3] * cut[:, 4]
    kept = area > SEEN * whole
    cut, area = cut[kept], area[kept]
    if mirror:
        cut[:, 1] = 1 - cut[:, 1] - cut[:, 3]
    return cut[np.argsort(-area, kind="stable")]


def clipped(boxes: Array) -> Array:
    """Boxes in 0..1 without what lies outside of the picture; one that lies outside altogether has no area."""
    low = boxes[:, 1:3].clip(0, 1)
    high = (boxes[:, 1:3] + boxes[:, 3:5]).clip(0, 1)
    return np.concatenate([boxes[:, :1], low, high - low], axis=1)


@dataclass(frozen=True)
class Layouts:
    """boxes: for each row (n, 5), in 0..1 of its picture, clipped to it. sizes: of the pictures as they are. outside:
    rows with boxes that left their picture."""

    boxes: list[Array]
    sizes: list[tuple[int, int]]
    names: tuple[str, ...]
    outside: list[int]


def read_layouts(source: Source, columns: tuple[str, str], classes: Sequence[str] | None = None,
                 tell: Tell = refuse) -> Layouts:  # fmt: skip
    """The boxes of a data set; `columns` are theirs and the pictures'. Rows with boxes that can't be used go to
    `tell`, without them."""
    told = _told(source, columns[0], classes, tell)
    sizes = [_size(source, row, picture) for row, picture in enumerate(source.pictures(columns[1]))]
    tables = [told.shares(row, size) for row, size in enumerate(sizes)]
    found = [_inside(table) for table in tables]
    outside = [row for row, table in enumerate(tables) if (np.abs(clipped(table) - table) > 1e-3).any()]
    return Layouts(found, sizes, told.names, outside)


@dataclass(frozen=True)
class _Told:
    """boxes: for each row (n, 5), as they are written. relative: in 0..1 of their picture, else in its pixels."""

    boxes: list[Array]
    names: tuple[str, ...]
    relative: bool

    def shares(self, row: int, size: tuple[int, int]) -> Array:
        """A row's boxes in 0..1 of its picture of `size`."""
        height, width = (1, 1) if self.relative else size
        return self.boxes[row] / np.array([1, width, height, width, height], np.float32)


def _told(source: Source, column: str, classes: Sequence[str] | None, tell: Tell) -> _Told:
    parsed = [_parsed(source, row, value, column, tell) for row, value in enumerate(source.values(column))]
    names = tuple(classes or _names(source, [category for _, categories in parsed for category in categories]))
    relative = all(max(box) <= 1 for boxes, _ in parsed for box in boxes)
    tables = []
    for row, (boxes, categories) in enumerate(parsed):
        numbers = [_number(source, row, category, names, tell) for category in categories]
        table = [[n, *b] for n, b in zip(numbers, boxes, strict=True) if n is not None]
        tables.append(np.array(table, np.float32).reshape(-1, 5))
    return _Told(tables, names, relative)


def _inside(boxes: Array) -> Array:
    """Boxes in 0..1 clipped to the picture, without those that lie outside of it."""
    inside = clipped(boxes)
    return inside[inside[:, 3] * inside[:, 4] > 0]


def leaving(source: Source, outside: Sequence[int]) -> tuple[str, ...]:
    """A note on pictures with boxes that leave them, where there are any."""
    if not outside:
        return ()
    return (f"{len(outside)} pictures have boxes that leave them, which are clipped; the first is "
            f"{source.place(outside[0])}",)  # fmt: skip


def read_boxes(source: Source, columns: tuple[str, str], pictures: Pixels, section: BoxesCondition) -> Boxes:
    """The same for pictures as they are kept. Raises LimnerError for a row with boxes that can't be used."""
    found = read_layouts(source, columns, section.classes)
    rows = zip(found.boxes, found.sizes, pictures.shapes, strict=True)
    kept = [_placed(boxes, size, shape) for boxes, size, shape in rows]
    return Boxes(kept, found.names, pictures, section.most, leaving(source, found.outside))


def late_boxes(source: Source, column: str, pictures: Pixels, section: BoxesCondition, tell: Tell,
               size: Callable[[int], tuple[int, int]]) -> Boxes:  # fmt: skip
    """The same where pictures are decoded when they are asked for: `size(row)` is then that of one as it is. Rows with
    boxes that can't be used go to `tell`."""
    told = _told(source, column, section.classes, tell)

    def of(row: int) -> Array:
        as_it_is, as_kept = size(row), np.asarray(pictures.whole(row).shape[1:])
        return _placed(_inside(told.shares(row, as_it_is)), as_it_is, as_kept)

    written = b"".join(table.tobytes() for table in told.boxes)
    digest = hashlib.blake2b(written, digest_size=16).hexdigest()
    return Boxes(Late(of, f"{told.relative} {digest}"), told.names, pictures, section.most)


def _placed(boxes: Array, size: tuple[int, int], shape: npt.NDArray[np.int64]) -> Array:
    """Boxes in 0..1 of a picture of `size`, in pixels of the same as it is kept: enlarged to cover, then cut."""
    scale = max(shape[0] / size[0], shape[1] / size[1])
    shift = [(size[1] * scale - shape[1]) / 2, (size[0] * scale - shape[0]) / 2]
    scales = np.array([1, size[1], size[0], size[1], size[0]]) * np.array([1, *(scale,) * 4])
    return (boxes * scales - np.array([0, *shift, 0, 0])).astype(np.float32)


def _parsed(source: Source, row: int, value: Any, column: str, tell: Tell) -> tuple[list[list[float]], list[Any]]:
    """The boxes and the categories of a cell, in either order of nesting: a mapping of lists, or a list of mappings."""
    try:
        if isinstance(value, Mapping):
            name = next(name for name in _CATEGORIES if name in value)
            boxes, categories = list(value["bbox"]), list(value[name])
        else:
            things: Iterable[Any] = value or ()
            pairs = [(thing["bbox"], next(thing[n] for n in _CATEGORIES if n in thing)) for thing in things]
            boxes, categories = [box for box, _ in pairs], [category for _, category in pairs]
        boxes = [[float(number) for number in box] for box in boxes]
        good = len(boxes) == len(categories) and all(len(b) == 4 and min(b[2:]) > 0 for b in boxes)
        if good and np.isfinite(boxes).all():
            return boxes, categories
    except (KeyError, TypeError, ValueError, StopIteration):
        pass
    tell(Problem(source.place(row), f"column '{column}' should hold {{bbox: [[x, y, w, h], ...], categories: [...]}} "
                 "with as many categories as boxes, each w and h above 0"))  # fmt: skip
    return [], []


def _names(source: Source, categories: Sequence[Any]) -> tuple[str, ...]:
    """The classes: of `classes.txt`, else the words in alphabetical order, else the numbers from 0 on."""
    if all(isinstance(category, str) for category in categories) and categories:
        return class_names(source) or tuple(sorted(set(categories)))
    highest = max((int(category) for category in categories), default=0)
    return class_names(source) or tuple(str(number) for number in range(highest + 1))


def _number(source: Source, row: int, category: Any, names: Sequence[str], tell: Tell) -> int | None:
    if isinstance(category, str) and category in names:
        return names.index(category)
    if not isinstance(category, str) and 0 <= int(category) < len(names):
        return int(category)
    hint = suggest(str(category), names)
    tell(Problem(source.place(row), f"class '{category}' of a box is none of the {len(names)} classes{hint}"))
    return None


def _size(source: Source, row: int, picture: Encoded) -> tuple[int, int]:
    try:
        return oriented_size(opened(fetch(picture)))
    except PictureError as error:
        raise LimnerError(f"{source.picture_place(row)}: {error}") from None


def boxes_of_maps(maps: SemanticMaps, section: BoxesCondition, *, late: bool = False) -> Boxes:
    """A box around each connected region of each class of a semantic map, but void; none smaller than
    `section.smallest` of the picture. late: found when they are asked for."""
    if section.classes is not None and not set(section.classes) <= set(maps.names):
        stranger = next(name for name in section.classes if name not in maps.names)
        raise LimnerError(f"conditions: boxes of class '{stranger}': the semantic maps have none"
                          f"{suggest(stranger, maps.names)}")  # fmt: skip
    names = section.classes or tuple(name for k, name in enumerate(maps.names) if k != maps.void)
    chosen = [maps.names.index(name) for name in names]
    area = section.smallest * maps.pixels.size[0] * maps.pixels.size[1]
    if late:
        found = Late(lambda row: regions(maps.pixels.whole(row)[0], chosen, area), f"{maps.pixels.digest} {area}")
        return Boxes(found, names, maps.pixels, section.most)
    whole = (maps.pixels.whole(row)[0] for row in range(len(maps.pixels)))
    boxes = list(in_parallel(lambda numbers: regions(numbers, chosen, area), whole))
    return Boxes(boxes, names, maps.pixels, section.most)


def regions(numbers: npt.NDArray[np.uint8], classes: Sequence[int], smallest: float) -> Array:
    """Boxes (n, 5) in pixels around the connected regions of `classes` in a map (H, W); classes are renumbered by their
    place in the list. A region counts whose pixels are `smallest` or more."""
    from scipy import ndimage

    found = []
    for place, number in enumerate(classes):
        labelled, count = ndimage.label(numbers == number)  # type: ignore[misc]
        areas = np.bincount(labelled.ravel(), minlength=count + 1)[1:]
        for area, (down, along) in zip(areas, ndimage.find_objects(labelled), strict=True):
            if area >= smallest:
                found.append([place, along.start, down.start, along.stop - along.start, down.stop - down.start])
    return np.array(found, np.float32).reshape(-1, 5)
