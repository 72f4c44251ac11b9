"""From picture bytes to arrays: modes, depth, transparency, orientation, size, and what is refused."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from limner.data import transforms
from limner.data.transforms import PictureError, Recipe, colour, decoded, mode_name, opened, oriented_size
from limner.errors import LimnerError
from pictures import encode, pixels

RED = (255, 0, 0)


def png(header: tuple[int, int, int, int], rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand: (width, height, bit depth, colour type), filtered rows, further chunks before them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0))
    middle = b"".join(chunk(*one) for one in chunks)
    return b"\x89PNG\r\n\x1a\n" + start + middle + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_rgb_comes_back_channels_first() -> None:
    array = Recipe()(encode(pixels(0, (5, 7))))
    assert (array.shape, array.dtype, array.flags.c_contiguous) == ((3, 5, 7), np.uint8, True)
    np.testing.assert_array_equal(array.transpose(1, 2, 0), pixels(0, (5, 7)))


def test_grey_fills_three_channels_and_colour_fits_into_one() -> None:
    grey = encode(pixels(0, channels=1))
    np.testing.assert_array_equal(Recipe(channels=3)(grey), np.repeat(Recipe(channels=1)(grey), 3, axis=0))
    luma = Recipe(channels=1)(encode(np.full((2, 2, 3), RED, np.uint8)))
    assert luma.tolist() == [[[76, 76], [76, 76]]]


def test_sixteen_bits_are_scaled_not_cut() -> None:
    values = np.array([[0, 257, 128, 129], [32896, 65535, 65407, 65406]], np.uint16)
    data = encode(Image.fromarray(values))
    assert mode_name(opened(data)) == "grey 16-bit"
    assert Recipe(channels=1)(data)[0].tolist() == [[0, 1, 0, 1], [128, 255, 255, 254]]


def test_sixteen_bit_colour() -> None:
    row = b"\x00" + struct.pack(">6H", 0, 32896, 65535, 65535, 0, 257)
    data = png((2, 1, 16, 2), row)
    assert mode_name(opened(data)) == "RGB 16-bit"
    assert Recipe()(data)[:, 0].T.tolist() == [[0, 128, 255], [255, 0, 1]]


def test_float_tiff_in_zero_to_one_and_beyond() -> None:
    inside = encode(Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)), "TIFF")
    assert Recipe(channels=1)(inside)[0].tolist() == [[0, 128, 255]]
    with pytest.raises(PictureError, match=r"beyond 0\.\.1"):
        Recipe()(encode(Image.fromarray(np.array([[0.0, 300.0]], np.float32)), "TIFF"))


def test_wide_integers_beyond_sixteen_bits_are_refused() -> None:
    with pytest.raises(PictureError, match="beyond 16 bits"):
        Recipe()(encode(Image.fromarray(np.array([[0, 70000]], np.int32)), "TIFF"))


@pytest.mark.parametrize("ground", ["white", "#102030"])
def test_transparency_shows_the_ground(ground: str) -> None:
    values = np.array([[[*RED, 255], [*RED, 0], [*RED, 128]]], np.uint8)
    array = Recipe(ground=colour(ground))(encode(values))
    assert array[:, 0, 0].tolist() == list(RED)
    assert array[:, 0, 1].tolist() == list(colour(ground))
    half = (np.array(RED) * 128 + np.array(colour(ground)) * 127) / 255
    np.testing.assert_allclose(array[:, 0, 2], half, atol=1)


def test_transparency_of_palettes_grey_and_colour_keys() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    data = encode(palette, transparency=1)
    assert Recipe()(data)[:, 0].T.tolist() == [list(RED), [255, 255, 255]]
    assert mode_name(opened(data)) == "palette with transparency"
    keyed = png((2, 1, 8, 2), bytes([0, 1, 2, 3, *RED]), (b"tRNS", struct.pack(">3H", *RED)))
    assert Recipe(ground=(9, 9, 9))(keyed)[:, 0].T.tolist() == [[1, 2, 3], [9, 9, 9]]
    grey_alpha = encode(np.array([[[50, 255], [50, 0]]], np.uint8))
    assert Recipe(channels=1)(grey_alpha)[0].tolist() == [[50, 255]]


def test_four_channels_keep_alpha() -> None:
    values = pixels(0, (3, 3), 4)
    np.testing.assert_array_equal(Recipe(channels=4)(encode(values)).transpose(1, 2, 0), values)
    assert Recipe(channels=4)(encode(pixels(0)))[3].min() == 255


def test_clear_pixels_do_not_bleed_when_resized() -> None:
    values = np.zeros((32, 32, 4), np.uint8)
    values[:, :16] = (*RED, 255)
    values[:, 16:] = (0, 255, 0, 0)
    array = Recipe(size=(8, 8), channels=4)(encode(values))
    assert array[1][array[3] > 0].max() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = pixels(3, (4, 6))
    undone = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(np.ascontiguousarray(undone), exif=exif)
    assert oriented_size(opened(data)) == (4, 6)
    np.testing.assert_array_equal(Recipe()(data).transpose(1, 2, 0), upright)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_mode_becomes_every_number_of_channels(mode: str, channels: int) -> None:
    # Pillow 11.3 to 12.3 can't read back its own YCbCr TIFF.
    data = encode(Image.new(mode, (3, 2)), {"P": "PNG", "YCbCr": "JPEG"}.get(mode, "TIFF"))
    assert Recipe(channels=channels)(data).shape == (channels, 2, 3)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000"])
def test_usual_formats(form: str) -> None:
    assert Recipe()(encode(np.full((16, 16, 3), 200, np.uint8), form))[:, 8, 8] == pytest.approx([200] * 3, abs=3)


def test_the_centre_is_kept() -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    assert Recipe(size=(8, 8))(encode(wide)).min() == 255
    assert Recipe(size=(8, 8))(encode(wide.transpose(1, 0, 2).copy())).min() == 255


def test_the_right_size_is_left_untouched() -> None:
    np.testing.assert_array_equal(Recipe(size=(8, 8))(encode(pixels(1))).transpose(1, 2, 0), pixels(1))


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (64, 3), (100, 100)])
@pytest.mark.parametrize("original", [(1, 1), (7, 31), (90, 20), (1, 300)])
@pytest.mark.parametrize("margins", [False, True])
def test_any_size_to_any_size(size: tuple[int, int], original: tuple[int, int], margins: bool) -> None:
    flat = np.full((*original, 3), 77, np.uint8)
    array = Recipe(size=size, margins=margins)(encode(flat))
    assert np.unique(array).tolist() == [77]
    if margins:
        assert array.shape[1] >= size[0]
        assert array.shape[2] >= size[1]
        assert array.size <= 3 * 4 * size[0] * size[1]
    else:
        assert array.shape == (3, *size)


def test_margins_keep_the_aspect() -> None:
    assert Recipe(size=(10, 10), margins=True)(encode(pixels(0, (40, 80)))).shape == (3, 10, 20)


def test_resizing_is_antialiased() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    array = Recipe(size=(32, 32))(encode(stripes))
    assert array[:, 4:-4, 4:-4].min() > 110
    assert array[:, 4:-4, 4:-4].max() < 145


def test_a_large_jpeg_is_decoded_small_but_no_smaller_than_twice_the_size() -> None:
    large = encode(Image.new("RGB", (640, 480), "#4080c0"), "JPEG")
    assert decoded(large, (32, 32)).size == (160, 120)
    assert decoded(large, (30, 30)).size == (80, 60)
    assert decoded(large).size == (640, 480)
    assert Recipe(size=(32, 32))(large)[:, 16, 16] == pytest.approx([0x40, 0x80, 0xC0], abs=2)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png((60_000, 60_000, 8, 2), b"")
    with pytest.raises(PictureError, match="refused"):
        Recipe()(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with transforms.quiet(), pytest.raises(PictureError, match="12x12 pixels; more than 100 are refused"):
        Recipe()(encode(pixels(0, (12, 12))))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_a_truncated_picture_is_refused(form: str) -> None:
    data = encode(pixels(0, (64, 64)), form)
    with pytest.raises(PictureError):
        Recipe()(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"hello", "is not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture"),
        (b"\x89PNG\r\n\x1a\n", "damaged|not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a picture"),
    ],
)
def test_what_is_no_picture_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(PictureError, match=message):
        Recipe()(data)


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), shade) for shade in ("#ff0000", "#0000ff")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert Recipe()(buffer.getvalue())[:, 0, 0].tolist() == [255, 0, 0]


def test_an_unknown_colour_is_an_error() -> None:
    with pytest.raises(LimnerError, match=r"data\.ground: 'whit' is not a colour"):
        colour("whit")
