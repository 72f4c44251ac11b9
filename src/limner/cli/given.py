"""Conditions that are files: maps, pictures, masks and boxes, read as a model wants them; and options in words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.errors import LimnerError

if TYPE_CHECKING:
    from PIL import Image

    from limner.generator import Generator

Size = tuple[int, int]


def conditions_of(gen: Generator, *, condition: Path | None, image: Path | None, mask: Path | None,
                  boxes: Path | None, strength: float | None, size: Size | None) -> dict[str, Any]:  # fmt: skip
    """Keywords of `Generator.stream` for the files and folders that were named. Raises LimnerError with the file."""
    canvas = size or gen.config.data.size or (0, 0)
    found: dict[str, Any] = {}
    if condition is not None:
        found["semantic_map"] = maps(gen, condition, canvas)
    if image is not None:
        found["image"] = images(gen, image, mask, strength, canvas, size)
    if mask is not None:
        found["mask"] = _matching(image, mask)
    if boxes is not None:
        found["boxes"] = layouts(boxes)
    return found


def part_of(shard: str | None, num: int) -> range:
    """The numbers of one shard I/N of `num` pictures, all of them without. Raises LimnerError."""
    if shard is None:
        return range(num)
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard.strip())
    index, shards = (int(match[1]), int(match[2])) if match else (1, 1)
    if index >= shards or shards > num:
        raise LimnerError(f"--shard {shard}: should be I/N such as 0/8, I below N and N at most {num}, the pictures")
    return range(num)[num * index // shards : num * (index + 1) // shards]


def files_of(path: Path) -> list[Path]:
    """A file, or the pictures of a folder by name. Raises LimnerError where there is none."""
    from limner.data.transforms import EXTENSIONS

    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in EXTENSIONS)
        if not files:
            raise LimnerError(f"{path}: holds no pictures")
        return files
    if not path.is_file():
        raise LimnerError(f"{path}: there is no such file or folder")
    return [path]


def maps(gen: Generator, path: Path, canvas: Size) -> list[Image.Image]:
    """Semantic maps, their centre resized to the canvas by nearest neighbour."""
    import numpy as np
    from PIL import Image

    from limner.data.overlays import class_numbers, refuse_classes
    from limner.data.transforms import fitted

    section = next((s for s in gen.config.conditions if s.kind == "semantic_map"), None)
    classes = None if section is None else len(section.classes or ())

    def read(data: bytes) -> Image.Image:
        image = class_numbers(data)
        refuse_classes(np.asarray(image), classes)
        return fitted(image, canvas, Image.Resampling.NEAREST)

    return _read(files_of(path), read)


def images(gen: Generator, path: Path, mask: Path | None, strength: float | None, canvas: Size,
           size: Size | None) -> list[Image.Image]:  # fmt: skip
    """Pictures in the model's channels: as they are to be painted in, else in the size that they are wanted in."""
    from limner.data.transforms import colour, decoded, fitted, flattened

    section = next((s for s in gen.config.conditions if s.kind == "image"), None)
    wanted: Size | None = None if mask is not None else canvas
    if section is not None and mask is None:
        small, whole = section.size, gen.config.data.size or canvas
        scaled = (round(n * k / m) for n, k, m in zip(small, canvas, whole, strict=True))
        wanted = small if size is None else (next(scaled), next(scaled))
    data = gen.config.data

    def read(raw: bytes) -> Image.Image:
        image = flattened(decoded(raw), data.channels, colour(data.ground))
        return image if wanted is None else fitted(image, wanted)

    return _read(files_of(path), read)


def _matching(image: Path | None, mask: Path) -> list[Image.Image]:
    """One mask for all pictures, or one for each, of the same stem."""
    from limner.data.transforms import decoded

    files = files_of(mask)
    if image is not None and image.is_dir() and len(files) > 1:
        by_stem = {file.stem: file for file in files}
        files = [_found(by_stem, file, mask) for file in files_of(image)]
    return _read(files, lambda data: decoded(data).convert("L"))


def _found(by_stem: dict[str, Path], picture: Path, folder: Path) -> Path:
    if picture.stem not in by_stem:
        raise LimnerError(f"{picture}: has no mask of the same name in {folder}")
    return by_stem[picture.stem]


def _read(files: Sequence[Path], read: Callable[[bytes], Image.Image]) -> list[Image.Image]:
    from limner.data.transforms import PictureError

    found = []
    for file in files:
        try:
            found.append(read(file.read_bytes()))
        except PictureError as error:
            raise LimnerError(f"{file}: {error}") from None
    return found


def layouts(path: Path) -> Any:
    """What a JSON file says: a list of [class, x, y, w, h], or a list of such lists."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LimnerError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise LimnerError(f"{path}: is not JSON ({' '.join(str(error).split())})") from None
    if not isinstance(found, list):
        raise LimnerError(f"{path}: should be a list of [class, x, y, w, h] in 0..1, or a list of such lists")
    return found


def size_of(text: str | None) -> Size | None:
    """(height, width) of WIDTHxHEIGHT. Raises LimnerError."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", text.strip().lower())
    if match is None:
        raise LimnerError(f"--size {text}: should be WIDTHxHEIGHT, such as 192x144")
    return int(match[2]), int(match[1])


def guidance_of(text: str | None) -> float | dict[str, float] | None:
    """A scale, or one by modality: `3`, `text=5,boxes=2`. Raises LimnerError."""
    if text is None:
        return None
    try:
        if "=" not in text:
            return float(text)
        pairs = (part.split("=") for part in text.split(","))
        return {name.strip(): float(scale) for name, scale in pairs}
    except ValueError:
        raise LimnerError(f"--guidance {text}: should be a number, or one by condition: text=5,boxes=2") from None


def interval_of(text: str) -> tuple[float, float]:
    """The two times of `--interval LO,HI`. Raises LimnerError."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise LimnerError(f"--interval {text}: should be two times LO,HI, such as 0.1,0.8") from None
    return low, high
