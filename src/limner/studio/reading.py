"""Pictures that a client sends, decoded with bounds: never a path, never a format beyond the three of the web."""

from __future__ import annotations

import base64
import binascii
import io

from PIL import Image, ImageOps

from limner.errors import LimnerError
from limner.studio.limits import Limits

FORMATS = ("PNG", "JPEG", "WEBP")


def picture(data: str, name: str, limits: Limits) -> Image.Image:
    """RGB picture of base64 text, or of a `data:` URL. Raises LimnerError for anything else, or for one too large."""
    body = data.partition(",")[2] if data.startswith("data:") else data
    try:
        raw = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise LimnerError(f"{name}: is not base64; a PNG, JPEG or WebP in base64 would do") from None
    return decoded(raw, name, limits)


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
