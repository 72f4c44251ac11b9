"""Pictures that a client sends, decoded with bounds: never a path, never a format beyond the three of the web."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from limner.data.overlays import class_numbers, refuse_classes
from limner.data.transforms import PictureError, colour, fitted, flattened
from limner.errors import LimnerError
from limner.generator import Generator
from limner.studio.limits import Limits

FORMATS = ("PNG", "JPEG", "WEBP")
Size = tuple[int, int]


def size_of(text: str | None, generator: Generator, limits: Limits) -> Size | None:
    """(height, width) of "WIDTHxHEIGHT", checked; None for the model's own, also said as "auto". Raises LimnerError."""
    if text is None or text in ("", "auto"):
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})[x×]([1-9]\d{0,4})", text.strip().lower())
    if match is None:
        raise LimnerError(f"size: '{text:.40}', should be WIDTHxHEIGHT, such as 96x64")
    size, own = (int(match[2]), int(match[1])), generator.config.data.size
    if own is None or size == own:
        return None
    limits.check_size(size, own)
    generator.shape_for(size, None)
    return size


def picture(data: str, name: str, limits: Limits) -> Image.Image:
    """RGB picture of base64 text, or of a `data:` URL. Raises LimnerError for anything else, or for one too large."""
    return decoded(raw_of(data, name), name, limits)


def raw_of(data: str, name: str) -> bytes:
    """The bytes of base64 text, or of a `data:` URL. Raises LimnerError."""
    body = data.partition(",")[2] if data.startswith("data:") else data
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise LimnerError(f"{name}: is not base64; a PNG, JPEG or WebP in base64 would do") from None


def told(generator: Generator, limits: Limits, *, image: Sequence[str], mask: str | None,
         semantic_map: str | None, size: Size | None = None) -> dict[str, Any]:  # fmt: skip
    """Pictures in base64 as options of `Generator.stream`, in the channels that the model has and in the sizes that go
    with a canvas of `size`, the model's own for None. mask: white is painted anew. semantic_map: a picture of class
    numbers. Raises LimnerError."""
    kinds: dict[str, Any] = {section.kind: section for section in generator.config.conditions}
    canvas = size or generator.config.data.size or (0, 0)
    wanted = small_of(generator, canvas) if mask is None else canvas
    found: dict[str, Any] = {}
    if image:
        found["image"] = [as_told(generator, picture(each, "image", limits), wanted) for each in image]
    if mask is not None:
        hole = fitted(picture(mask, "mask", limits).convert("L"), canvas)
        found["mask"] = [Image.fromarray(np.where(np.asarray(hole) >= 128, 255, 0).astype(np.uint8))]
    if semantic_map is not None:
        picture(semantic_map, "semantic_map", limits)  # its bounds
        try:
            numbers = class_numbers(raw_of(semantic_map, "semantic_map"))
            refuse_classes(np.asarray(numbers), len(getattr(kinds.get("semantic_map"), "classes", None) or ()) or None)
        except PictureError as error:
            raise LimnerError(f"semantic_map: {error}") from None
        found["semantic_map"] = [fitted(numbers, canvas, Image.Resampling.NEAREST)]
    return found


def small_of(generator: Generator, canvas: Size) -> Size:
    """(height, width) of the picture that goes with a canvas: smaller than it for a model that enlarges."""
    small = next((section.size for section in generator.config.conditions if section.kind == "image"), None)
    own = generator.config.data.size or canvas
    if small is None:
        return canvas
    return round(small[0] * canvas[0] / own[0]), round(small[1] * canvas[1] / own[1])


def as_told(generator: Generator, image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture of any kind in the model's channels and of this (height, width)."""
    data = generator.config.data
    return fitted(flattened(image, data.channels, colour(data.ground)), size)


def decoded(raw: bytes, name: str, limits: Limits) -> Image.Image:
    """RGB picture of a file's bytes. Raises LimnerError as `picture` does."""
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            if max(image.size) > limits.side:
                raise LimnerError(f"{name}: {image.width}x{image.height} pixels; sides up to {limits.side} are allowed")
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
    except LimnerError:
        raise
    except Exception:  # Pillow's decoders raise whatever comes when a file is damaged
        raise LimnerError(f"{name}: cannot be read as a PNG, JPEG or WebP picture") from None
