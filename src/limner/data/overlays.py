"""Pictures that lie on the picture, pixel by pixel: semantic maps and masks.

They are cut, mirrored and resized with it, by nearest neighbour: there is nothing between class 3 and class 7.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from limner.config import DataConfig, SemanticMapCondition
from limner.data.pixels import Pixels, Store, View
from limner.data.sources import Source
from limner.data.transforms import PictureError, covering, decoded, fitted, opened, oriented_size
from limner.errors import LimnerError

VOID = 255
"""A class number that says nothing, whatever the classes are."""
CLASSES_FILE = "classes.txt"
_VOID_NAME = re.compile(r"void|unlabel(l)?ed|ignored?|unknown|none", re.IGNORECASE)
_LEVELS = ("1", "L", "P")


@dataclass(frozen=True)
class MapRecipe:
    """How a map becomes an array (1, H, W) of class numbers. size, margins: as in `transforms.Recipe`.

    classes: how many there are; None: as many as it takes. A map as large as its picture is what is asked for.
    """

    size: tuple[int, int] | None
    margins: bool
    classes: int | None = None
    channels: int = 1

    def __call__(self, *data: bytes) -> npt.NDArray[np.uint8]:
        """Of the bytes of a map and of its picture. Raises PictureError, for a class with the pixel."""
        image = class_numbers(data[0])
        _same_size(image, data[1:], "semantic map")
        refuse_classes(np.asarray(image), self.classes)
        return _resized(image, self.size, self.margins)


@dataclass(frozen=True)
class MaskRecipe:
    """How a mask becomes an array (1, H, W) of 0, what is known, and 1, what is to be painted: white."""

    size: tuple[int, int] | None
    margins: bool
    channels: int = 1

    def __call__(self, *data: bytes) -> npt.NDArray[np.uint8]:
        """Of the bytes of a mask and of its picture. Raises PictureError, also for one that masks nothing or all."""
        image = decoded(data[0])
        _same_size(image, data[1:], "mask")
        painted = np.asarray(image.convert("L")) >= 128
        refuse_empty(painted)
        return _resized(Image.fromarray(painted.astype(np.uint8)), self.size, self.margins)


def class_numbers(data: bytes) -> Image.Image:
    """A picture whose pixels are class numbers. Raises PictureError for one that can't be."""
    image = opened(data)
    if image.format == "JPEG":
        raise PictureError("semantic map: is a JPEG, which smears class numbers; it should be a PNG")
    if image.mode not in _LEVELS:
        raise PictureError(f"semantic map: is {image.mode}, should be a single-channel PNG of class numbers")
    image = decoded(data)
    return image if image.mode != "P" else Image.fromarray(np.asarray(image))


def refuse_classes(numbers: npt.NDArray[np.integer], classes: int | None) -> None:
    """Raises PictureError for a class number beyond `classes`, naming the first such pixel of (H, W)."""
    if classes is None:
        return
    wrong = (numbers >= classes) & (numbers != VOID)
    if wrong.any():
        row, column = (int(place) for place in np.argwhere(wrong)[0])
        raise PictureError(
            f"semantic map: class {int(numbers[row, column])} at row {row}, column {column}, should be 0 to "
            f"{classes - 1}, or {VOID} for none"
        )


def refuse_empty(painted: npt.NDArray[np.bool_]) -> None:
    """Raises PictureError for a mask (H, W) of nothing or of everything."""
    if not painted.any():
        raise PictureError("mask: masks nothing; white is what is to be painted")
    if painted.all():
        raise PictureError("mask: masks everything; black is what is to be kept")


def _same_size(image: Image.Image, pictures: Sequence[bytes], what: str) -> None:
    for data in pictures:
        height, width = oriented_size(opened(data))
        if (image.height, image.width) != (height, width):
            raise PictureError(f"{what}: is {image.width}x{image.height}, its picture {width}x{height}; "
                               "both should be of one size")  # fmt: skip


def _resized(image: Image.Image, size: tuple[int, int] | None, margins: bool) -> npt.NDArray[np.uint8]:
    if size is not None:
        image = (covering if margins else fitted)(image, size, Image.Resampling.NEAREST)
    return np.asarray(image, dtype=np.uint8)[None]


# --- class names --------------------------------------------------------------------------------------------------


def class_names(source: Source) -> tuple[str, ...] | None:
    """The names in `classes.txt`, one a line, beside the data or above it; None where there is no such file."""
    place = Path(source.place(0).file) if len(source) else Path(source.name)
    root = Path(source.name)
    for folder in dict.fromkeys((root, root.parent, place.parent)):
        path = folder / CLASSES_FILE
        if path.is_file():
            names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
            if len(set(names)) != len(names) or not names:
                raise LimnerError(f"{path}: should hold a name a line, each once")
            return names
    return None


def void_of(names: Sequence[str]) -> int | None:
    """The class that is called void, unlabelled or the like; None where there is none."""
    return next((number for number, name in enumerate(names) if _VOID_NAME.fullmatch(name)), None)


# --- conditions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SemanticMaps:
    """Class numbers (N, H, W), their names, and which of them says nothing."""

    pixels: Pixels
    names: tuple[str, ...]
    void: int | None

    def take(self, rows: npt.NDArray[np.int64], view: View) -> torch.Tensor:
        """int64 (B, H, W)."""
        return torch.from_numpy(self.pixels.take(rows, view)[:, 0]).long()

    def mirrorable(self, rows: npt.NDArray[np.int64]) -> None:
        return None

    def fingerprint(self) -> str:
        return f"{self.pixels.digest} {self.names} {self.void}"


def read_maps(source: Source, columns: tuple[str, str], config: DataConfig, section: SemanticMapCondition,
              store: Store) -> SemanticMaps:  # fmt: skip
    """The maps of a data set; `columns` are theirs and the pictures'. Raises LimnerError with file and pixel."""
    names = section.classes or class_names(source)
    recipe = MapRecipe(config.size, config.crop == "random", None if names is None else len(names))
    pixels = store(columns, recipe)
    names = names or tuple(str(number) for number in range(pixels.highest(VOID) + 1))
    if section.void is not None and section.void >= len(names):
        raise LimnerError(f"conditions: void class {section.void}: there are {len(names)} classes")
    return SemanticMaps(pixels, names, void_of(names) if section.void is None else section.void)
