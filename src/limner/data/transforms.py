"""From the bytes of a picture file to an array of one size: decode, lay on the ground, resize, cut.

All sizes are (height, width). Nothing here knows where a picture came from: callers add file and row to the message.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor, ImageFile, ImageOps

from limner.data.text import reason
from limner.errors import LimnerError

Pixels = npt.NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")
"""What is opened. Formats that call other programs (EPS) or describe drawings (WMF) are left out on purpose."""

EXTENSIONS = frozenset(
    ".png .apng .jpg .jpeg .jfif .webp .gif .bmp .dib .tif .tiff .pgm .ppm .pnm .pbm .jp2 .j2k .avif .tga .ico".split()
)

_DECODER_ERRORS = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError, RuntimeError),
    *(ArithmeticError, MemoryError, SyntaxError, struct.error, zlib.error),
)
"""What Pillow's decoders raise on damaged files, as found by feeding them damaged files."""

_ORIENTATION = 0x0112
_MARGIN = 4


class PictureError(LimnerError):
    """These bytes are no picture that can be used; the message says why, the caller where."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Pillow's warnings off the screen: what matters of them is refused here with an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", module="PIL")
        yield


@dataclass(frozen=True)
class Recipe:
    """How a picture becomes an array.

    size: (height, width), or None to keep the picture's. channels: 1 grey, 3 RGB, 4 RGBA. ground: RGB under
    transparent pixels. margins: resized to cover `size` but not cut, for random crops later.
    """

    size: tuple[int, int] | None = None
    channels: int = 3
    ground: tuple[int, int, int] = (255, 255, 255)
    margins: bool = False

    def __call__(self, *data: bytes) -> Pixels:
        """uint8 (C, H, W) of an encoded picture. Raises PictureError."""
        image = decoded(data[0], self.size)
        try:
            image = flattened(image, self.channels, self.ground)
            if self.size is not None:
                image = covering(image, self.size) if self.margins else fitted(image, self.size)
            return array(image)
        except PictureError:
            raise
        except _DECODER_ERRORS as error:
            raise PictureError(f"cannot be converted ({reason(error)})") from None


def opened(data: bytes) -> Image.Image:
    """A picture with its header read and its pixels not yet. Raises PictureError: not a picture, or too large."""
    if not data:
        raise PictureError("is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise PictureError("is not a picture that can be read") from None
    except Image.DecompressionBombError:
        raise PictureError(f"is larger than {_limit():,} pixels, which is refused") from None
    except _DECODER_ERRORS as error:
        raise PictureError(f"is a damaged picture ({reason(error)})") from None
    if image.width * image.height > _limit():
        raise PictureError(f"has {image.width}x{image.height} pixels; more than {_limit():,} are refused")
    if not image.width or not image.height:
        raise PictureError("has no pixels")
    return image


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) as it is seen, that is, after the rotation that EXIF asks for."""
    turned = _orientation(image) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def mode_name(image: Image.Image) -> str:
    """What its pixels are, for people: `grey`, `RGB`, `palette with transparency`, `RGB 16-bit`..."""
    name = {"1": "black and white", "L": "grey", "LA": "grey with alpha", "P": "palette", "F": "grey float"}.get(
        image.mode, "grey 16-bit" if image.mode.startswith("I") else image.mode
    )
    raw = str(image.tile[0].args) if isinstance(image, ImageFile.ImageFile) and image.tile else ""
    if "16" in raw and "16" not in name:
        name += " 16-bit"
    return f"{name} with transparency" if "transparency" in image.info else name


def decoded(data: bytes, cover: tuple[int, int] | None = None) -> Image.Image:
    """The whole picture (the first frame), turned upright by its EXIF orientation.

    `cover`: a JPEG far larger than this (height, width) is decoded at a fraction of its size (in steps of two, at
    least twice as large as needed). Raises PictureError: not a picture, truncated, too large.
    """
    image = opened(data)
    try:
        if cover is not None:
            side = 2 * max(cover)
            image.draft(None, (side, side))
        image.load()
        return ImageOps.exif_transpose(image) if _orientation(image) != 1 else image
    except _DECODER_ERRORS as error:
        raise PictureError(f"is a damaged picture ({reason(error)})") from None


def colour(name: str) -> tuple[int, int, int]:
    """`white`, `#ff8800`, `rgb(0,0,0)`: any CSS colour, as RGB. Raises LimnerError for anything else."""
    try:
        red, green, blue = ImageColor.getrgb(name)[:3]
    except ValueError:
        raise LimnerError(f"data.ground: '{name}' is not a colour; try white, black or #8090a0") from None
    return red, green, blue


def flattened(image: Image.Image, channels: int, ground: tuple[int, int, int]) -> Image.Image:
    """8 bits a channel in 1 (grey), 3 (RGB) or 4 (RGBA) channels; with 1 or 3, transparency shows the ground.

    16-bit values v become round(v / 257). Raises PictureError for float pictures beyond 0..1.
    """
    image = _eight_bit(image)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    if image.mode == mode and "transparency" not in image.info:
        return image
    if channels != 4 and image.has_transparency_data:
        clear = image.convert("RGBA")
        image = Image.new("RGBA", image.size, (*ground, 255))
        image.alpha_composite(clear)
    if image.mode in ("RGBa", "La", "PA", "LA"):
        image = image.convert("RGBA")
    elif image.mode == "LAB":
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def fitted(image: Image.Image, size: tuple[int, int],
           how: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:  # fmt: skip
    """The centre of the picture in the shape of `size` (height, width), resized to it, antialiased (Lanczos).

    Transparent pictures are resized premultiplied, so that what lies under clear pixels doesn't bleed.
    """
    height, width = size
    if (image.height, image.width) == size:
        return image
    scale = max(height / image.height, width / image.width)
    cut_w, cut_h = min(width / scale, image.width), min(height / scale, image.height)
    left, top = (image.width - cut_w) / 2, (image.height - cut_h) / 2
    box = (left, top, min(left + cut_w, image.width), min(top + cut_h, image.height))
    gap = None if how == Image.Resampling.NEAREST else 3.0
    return image.resize((width, height), how, box=box, reducing_gap=gap)


def covering(image: Image.Image, size: tuple[int, int],
             how: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:  # fmt: skip
    """The picture resized to cover (height, width) just so; a side longer than 4 times `size` is cut to its centre."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    cover_h = min(max(height, round(image.height * scale)), _MARGIN * height)
    cover_w = min(max(width, round(image.width * scale)), _MARGIN * width)
    return fitted(image, (cover_h, cover_w), how)


def array(image: Image.Image) -> Pixels:
    """uint8 (C, H, W) of a flattened picture."""
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _eight_bit(image: Image.Image) -> Image.Image:
    """Wide modes to 8 bits: 16-bit (and 32-bit with 16-bit values) by 257, float in 0..1 by 255."""
    if image.mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise PictureError("holds floating-point values beyond 0..1; save it with 8 or 16 bits")
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise PictureError("holds values beyond 16 bits; save it with 8 or 16 bits")
        levels = values.astype(np.uint16)
        levels //= 257
        levels += values - levels * 257 >= 129
        return Image.fromarray(levels.astype(np.uint8))
    return image


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info and image.format not in ("TIFF", "PNG", "WEBP", "AVIF"):
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _DECODER_ERRORS:
        return 1


def _limit() -> int:
    return Image.MAX_IMAGE_PIXELS or 89_478_485
