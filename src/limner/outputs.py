"""Where samples go: a captioned PNG grid, an `.npz`, a directory of PNG files, or a WebDataset `.tar`.

Every writer streams (only the grid keeps its pictures), works beside the destination and renames at the end: an
interrupted run leaves nothing half-written and never touches what was there before. Every PNG carries the recipe
that made it in a text chunk named `limner`.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from limner.errors import LimnerError

CHUNK = "limner"
"""Key of the PNG text chunk that holds the recipe as JSON."""

METADATA = "metadata.jsonl"
MAX_GRID_PIXELS = 100_000_000

_OTHER_FORMATS = frozenset(".bmp .gif .gz .jpeg .jpg .npy .parquet .pt .tgz .tif .tiff .webp .zip".split())


@dataclass(frozen=True)
class Picture:
    """One sample.

    pixels: uint8 (H, W, C), C = 1, 3 or 4.
    index: its number; with the seed it decides the noise.
    facts: what belongs to this picture alone (`label`, `label_name`, `text`), JSON values.
    within: what only its PNG is to carry: the pictures that it was made of, as text.
    """

    index: int
    pixels: np.ndarray
    facts: Mapping[str, Any] = field(default_factory=dict)
    within: Mapping[str, Any] = field(default_factory=dict)

    @property
    def caption(self) -> str:
        """What was asked for, in words."""
        words = self.facts.get("text") or self.facts.get("label_name") or self.facts.get("label")
        return "" if words is None else str(words)


class Writer(ABC):
    """Takes `num` pictures in order, then `finish`es. Writes to `scratch`, which is moved to its place afterwards."""

    def __init__(self, scratch: Path, num: int, recipe: Mapping[str, Any]) -> None:
        self.scratch = scratch
        self.num = num
        self.recipe = dict(recipe)
        self._files = contextlib.ExitStack()

    @abstractmethod
    def add(self, pictures: Sequence[Picture]) -> None:
        """Write these pictures."""

    def finish(self) -> None:
        """Write what must come last, and close the files."""
        self.close()

    def close(self) -> None:
        """Let go of the files; harmless when done twice."""
        self._files.close()


@contextlib.contextmanager
def writer(
    path: str | Path, *, num: int, recipe: Mapping[str, Any] | None = None, overwrite: bool = False
) -> Iterator[Writer]:
    """Open `path` for `num` pictures; what is written appears there only if the block ends well.

    The name decides the format: `.png`, `.npz`, `.tar`, and a directory otherwise. Raises LimnerError for another
    picture or archive format, and for an existing file or non-empty directory unless `overwrite` is set (a
    directory is replaced only if `limner` wrote it).
    """
    kind = _kind(path)
    destination = Path(os.path.abspath(path))
    _refuse_to_destroy(destination, kind, overwrite)
    # Beside the destination, so that a rename is enough; inside a directory that is there already, which may be a
    # mount point or where the user stands.
    home = destination if destination.is_dir() else destination.parent
    scratch = home / f"{_PARTIAL}{destination.name}-{os.getpid()}"
    made: Writer | None = None
    try:
        home.mkdir(parents=True, exist_ok=True)
        made = kind(scratch, num, recipe or {})
        yield made
        made.finish()
        _move(scratch, destination)
    except OSError as error:
        raise LimnerError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            if made is not None:
                made.close()
        with contextlib.suppress(OSError):
            _remove(scratch)


class DirectoryWriter(Writer):
    """`000000.png` ..., and `metadata.jsonl` with a line a picture: what `datasets` reads as an image folder."""

    def __init__(self, scratch: Path, num: int, recipe: Mapping[str, Any]) -> None:
        super().__init__(scratch, num, recipe)
        scratch.mkdir()
        self._lines = self._files.enter_context((scratch / METADATA).open("w", encoding="utf-8"))

    def add(self, pictures: Sequence[Picture]) -> None:
        for picture in pictures:
            name = f"{picture.index:06d}.png"
            facts = _facts(self.recipe, picture)
            (self.scratch / name).write_bytes(png(picture.pixels, {**facts, **picture.within}))
            self._lines.write(json.dumps({"file_name": name, **facts}, ensure_ascii=False) + "\n")


class TarWriter(Writer):
    """WebDataset: `000000.png`, `.json` with all that is known, `.cls` for a label, `.txt` for a caption."""

    def __init__(self, scratch: Path, num: int, recipe: Mapping[str, Any]) -> None:
        super().__init__(scratch, num, recipe)
        self._tar = self._files.enter_context(tarfile.TarFile(scratch, "w", format=tarfile.USTAR_FORMAT))

    def add(self, pictures: Sequence[Picture]) -> None:
        for picture in pictures:
            facts = _facts(self.recipe, picture)
            members = {"png": png(picture.pixels, {**facts, **picture.within}),
                       "json": json.dumps(facts, ensure_ascii=False).encode()}  # fmt: skip
            if "label" in picture.facts:
                members["cls"] = str(picture.facts["label"]).encode()
            if "text" in picture.facts:
                members["txt"] = str(picture.facts["text"]).encode()
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{picture.index:06d}.{suffix}")
                info.size = len(content)
                self._tar.addfile(info, io.BytesIO(content))


class NpzWriter(Writer):
    """`x` uint8 (N, H, W, C), and by modality `y` int64 (N,) for labels and `text` (N,); no pickled objects."""

    def __init__(self, scratch: Path, num: int, recipe: Mapping[str, Any]) -> None:
        super().__init__(scratch, num, recipe)
        self._written = 0
        self._labels: list[int] = []
        self._texts: list[str] = []
        self._zip = self._files.enter_context(zipfile.ZipFile(scratch, "w", zipfile.ZIP_STORED))
        self._x: IO[bytes] | None = None

    def add(self, pictures: Sequence[Picture]) -> None:
        for picture in pictures:
            if self._x is None:
                self._x = self._files.enter_context(self._zip.open(zipfile.ZipInfo("x.npy"), "w", force_zip64=True))
                _npy_header(self._x, (self.num, *picture.pixels.shape))
            self._x.write(np.ascontiguousarray(picture.pixels).tobytes())
            self._written += 1
            if "label" in picture.facts:
                self._labels.append(int(picture.facts["label"]))
            if "text" in picture.facts:
                self._texts.append(str(picture.facts["text"]))

    def finish(self) -> None:
        if self._written != self.num:
            raise ValueError(f"{self.num} pictures were announced, {self._written} came")
        if self._x is not None:
            self._x.close()
        for name, values, dtype in (("y", self._labels, np.int64), ("text", self._texts, np.str_)):
            if len(values) == self.num:
                with self._zip.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                    np.lib.format.write_array(member, np.array(values, dtype=dtype), allow_pickle=False)
        self.close()


class GridWriter(Writer):
    """One PNG with all pictures and their captions."""

    def __init__(self, scratch: Path, num: int, recipe: Mapping[str, Any]) -> None:
        super().__init__(scratch, num, recipe)
        self._pictures: list[Picture] = []
        scratch.touch()

    def add(self, pictures: Sequence[Picture]) -> None:
        self._pictures += pictures
        if self.num * self._pictures[0].pixels[..., 0].size > MAX_GRID_PIXELS:
            raise LimnerError("too many pictures for one .png grid; give a directory, an .npz or a .tar")

    def finish(self) -> None:
        sheet = grid([p.pixels for p in self._pictures], [p.caption for p in self._pictures])
        facts = {**self.recipe, "pictures": [{"index": p.index, **p.facts, **p.within} for p in self._pictures]}
        self.scratch.write_bytes(png(sheet, facts))


def png(pixels: np.ndarray, facts: Mapping[str, Any] | None = None) -> bytes:
    """PNG bytes of uint8 (H, W, C) pixels; `facts` go into the text chunk `limner` as JSON."""
    info = PngImagePlugin.PngInfo()
    if facts is not None:
        info.add_itxt(CHUNK, json.dumps(dict(facts), ensure_ascii=False))
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_recipe(path: str | Path) -> dict[str, Any] | None:
    """The recipe that a PNG carries, or None if Limner did not write it."""
    with Image.open(path) as image:
        chunk = image.info.get(CHUNK)
    return None if chunk is None else json.loads(chunk)


def grid(
    images: Sequence[np.ndarray], captions: Sequence[str] | None = None, *, columns: int | None = None
) -> np.ndarray:
    """A contact sheet: uint8 (H, W, C) pictures of one size, captions below them, as one uint8 (H', W', 3) array.

    Pictures under 64 pixels are enlarged by a whole factor with nearest neighbour. `columns` defaults to the number
    of different captions when the captions repeat in rotation (so that a column is one class), else to a square.
    """
    captions = list(captions) if captions is not None else [""] * len(images)
    columns = columns or _columns(captions)
    scale = max(1, math.ceil(64 / min(images[0].shape[:2])))
    height, width = (side * scale for side in images[0].shape[:2])
    gap, size = 6, max(11, width // 12)
    font = ImageFont.load_default(size)
    wrapped = [_wrap(caption, font, width) for caption in captions]
    line = math.ceil(size * 1.25)
    words = max((len(lines) for lines in wrapped), default=0) * line
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (gap + columns * (width + gap), gap + rows * (height + words + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (pixels, lines) in enumerate(zip(images, wrapped, strict=True)):
        left = gap + (number % columns) * (width + gap)
        top = gap + (number // columns) * (height + words + gap)
        cell = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        sheet.paste(_opaque(cell).resize((width, height), Image.Resampling.NEAREST), (left, top))
        for row, text in enumerate(lines):
            draw.text((left + width / 2, top + height + row * line), text, font=font, fill="black", anchor="ma")
    return np.asarray(sheet)


def _columns(captions: Sequence[str]) -> int:
    distinct = len(set(captions))
    rotates = 1 < distinct < len(captions) and all(captions[i] == captions[i % distinct] for i in range(len(captions)))
    return distinct if rotates and distinct <= 16 else max(1, math.ceil(math.sqrt(len(captions))))


def _wrap(text: str, font: Any, width: int, most: int = 4) -> list[str]:
    """Break at spaces into lines no wider than `width`; what doesn't fit in `most` lines ends in an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + "…"]
    return [_shorten(line, font, width) for line in lines]


def _shorten(line: str, font: Any, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix("…")
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(ground, image).convert("RGB")


def _facts(recipe: Mapping[str, Any], picture: Picture) -> dict[str, Any]:
    return {**recipe, "index": picture.index, **picture.facts}


def _npy_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


# --- the destination --------------------------------------------------------------------------------------------

_PARTIAL = ".partial-"
_KINDS: dict[str, type[Writer]] = {".png": GridWriter, ".npz": NpzWriter, ".tar": TarWriter}


def _kind(path: str | Path) -> type[Writer]:
    """The writer that a name asks for. A trailing slash, or a directory that is there, is a directory."""
    suffix = Path(path).suffix.lower()
    if str(path).endswith(("/", os.sep)) or Path(path).is_dir():
        return DirectoryWriter
    if suffix in _OTHER_FORMATS:
        raise LimnerError(f"{path}: samples go to a .png grid, an .npz, a .tar or a directory, not to {suffix}")
    return _KINDS.get(suffix, DirectoryWriter)


def _refuse_to_destroy(path: Path, kind: type[Writer], overwrite: bool) -> None:
    if kind is DirectoryWriter:
        if path.exists() and not path.is_dir():
            raise LimnerError(f"{path}: is a file; a .png, .npz or .tar name, or another directory, would do")
        if not path.is_dir() or not _entries(path):
            return
        if overwrite and not _holds_samples(path):
            raise LimnerError(f"{path}: holds more than samples and is not replaced; choose another directory")
    if path.exists() and not overwrite:
        raise LimnerError(f"{path}: exists already; choose another name or add --overwrite")


def _entries(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if not entry.name.startswith(_PARTIAL)]


def _holds_samples(path: Path) -> bool:
    """Whether a directory holds nothing but what DirectoryWriter writes: only then may its files be deleted."""
    return (path / METADATA).is_file() and all(
        entry.is_file() and (entry.name == METADATA or (entry.suffix == ".png" and entry.stem.isdigit()))
        for entry in _entries(path)
    )


def _move(scratch: Path, destination: Path) -> None:
    if not destination.is_dir():
        os.replace(scratch, destination)
        return
    for old in _entries(destination):
        old.unlink()
    # The metadata comes last: a directory that has it is complete.
    for entry in sorted(scratch.iterdir(), key=lambda entry: entry.name == METADATA):
        os.replace(entry, destination / entry.name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
