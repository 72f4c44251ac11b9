"""The pictures of a data set as one memory-mapped file of uint8, decoded once, in parallel, into the cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from limner.config import DataConfig
from limner.data import cache, transforms
from limner.data.sources import Absent, Encoded, Problem, Source
from limner.data.text import reason
from limner.errors import LimnerError

Progress = Callable[[int, int], None]

S = TypeVar("S")
T = TypeVar("T")

_VERSION = 1
_CHUNK = 64


@dataclass(frozen=True)
class View:
    """How the rows of a batch are seen; the same for a picture and for everything that lies on it.

    `mirror`: bool (B,), left and right exchanged. `corner`: float (B, 2) in [0, 1), where between top and bottom,
    left and right, the crop is taken. `chance`: float (B,) in [0, 1), what decides all that is made at random for a
    row. None: not mirrored; the centre; nothing by chance but what the row's number decides.
    """

    mirror: npt.NDArray[np.bool_] | None = None
    corner: npt.NDArray[np.float64] | None = None
    chance: npt.NDArray[np.float64] | None = None

    def generators(self, rows: npt.NDArray[np.int64]) -> list[np.random.Generator]:
        """A generator for each row, whatever the batch that it is in."""
        seeds = rows if self.chance is None else (self.chance * 2**53).astype(np.int64)
        return [np.random.Generator(np.random.Philox(int(seed))) for seed in seeds]

    def told(self, rows: npt.NDArray[np.int64]) -> dict[str, Tensor]:
        """Which rows a batch holds, and whether each is mirrored: `row` int64 (B,), `mirror` bool (B,)."""
        mirror = np.zeros(len(rows), dtype=bool) if self.mirror is None else self.mirror
        return {"row": torch.from_numpy(rows), "mirror": torch.from_numpy(mirror)}


class Pixels:
    """N pictures of uint8 in a file, channels first, as networks read them. `take` gathers a batch (B, C, H, W).

    Pictures kept for random crops have margins on their longer side, so they vary in size and are cut one by one;
    otherwise the file is one array (N, C, H, W). shapes: (N, 2), height and width of each as it is kept.
    """

    def __init__(self, directory: Path) -> None:
        about = json.loads((directory / "about.json").read_text(encoding="utf-8"))
        self.size: tuple[int, int] = (about["size"][0], about["size"][1])
        self.channels: int = about["channels"]
        self.digest: str = about["digest"]
        self.shapes: npt.NDArray[np.int64] = np.load(directory / "shapes.npy")
        self.has_margins = bool((self.shapes != self.size).any())
        flat = np.memmap(directory / "pixels.u8", dtype=np.uint8, mode="r")
        self._flat = np.asarray(flat)  # the plain view: indexing a memmap object costs more
        lengths = self.shapes.prod(1) * self.channels
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._array = None if self.has_margins else self._flat.reshape(-1, self.channels, *self.size)

    def __len__(self) -> int:
        return len(self.shapes)

    def take(self, rows: npt.NDArray[np.int64], view: View) -> npt.NDArray[np.uint8]:
        """uint8 (B, C, H, W), a copy."""
        batch = self._array[rows] if self._array is not None else self._cut(rows, view)
        if view.mirror is not None and view.mirror.any():
            batch[view.mirror] = batch[view.mirror][..., ::-1]
        return batch

    def highest(self, but: int) -> int:
        """The highest value of all pixels, `but` left out; 0 where there is no other."""
        return int(np.flatnonzero(np.delete(np.bincount(self._flat, minlength=256), but)).max(initial=0))

    def corners(self, rows: npt.NDArray[np.int64], view: View) -> npt.NDArray[np.int64]:
        """(B, 2): top and left of what a view shows of each picture."""
        slack = self.shapes[rows] - self.size
        return slack // 2 if view.corner is None else np.floor(view.corner * (slack + 1)).astype(np.int64)

    def _cut(self, rows: npt.NDArray[np.int64], view: View) -> npt.NDArray[np.uint8]:
        corners = self.corners(rows, view)
        height, width = self.size
        batch = np.empty((len(rows), self.channels, height, width), dtype=np.uint8)
        for position, (row, (top, left)) in enumerate(zip(rows.tolist(), corners.tolist(), strict=True)):
            batch[position] = self.whole(row)[:, top : top + height, left : left + width]
        return batch

    def whole(self, row: int) -> npt.NDArray[np.uint8]:
        """One picture with its margins (C, h, w), not a copy."""
        return self._flat[self._starts[row] : self._starts[row + 1]].reshape(self.channels, *self.shapes[row])


def decode_all(source: Source, column: str, config: DataConfig, progress: Progress | None = None) -> Pixels:
    """The pictures of a column, from the cache or decoded into it.

    Raises LimnerError: a picture that cannot be read, with its place; pictures of several sizes with no size set.
    """
    recipe = transforms.Recipe(config.size, config.channels, transforms.colour(config.ground), config.crop == "random")
    return stored(source, [column], recipe, progress)


class Decoder(Protocol):
    """Makes an array (C, H, W) of the bytes of a row's pictures, one of each column. Raises PictureError."""

    @property
    def size(self) -> tuple[int, int] | None: ...

    @property
    def channels(self) -> int: ...

    @property
    def margins(self) -> bool: ...

    def __call__(self, *data: bytes) -> transforms.Pixels: ...


Store = Callable[[Sequence[str], Decoder], Pixels]
"""Makes pictures of columns: their own, and those that a decoder is given besides."""


def stored(source: Source, columns: Sequence[str], recipe: Decoder, progress: Progress | None = None) -> Pixels:
    """What a recipe, a dataclass, makes of each row, from the cache or decoded into it. Raises LimnerError."""
    settings = {"version": _VERSION, "source": source.fingerprint(), "column": columns[0],
                "recipe": asdict(recipe)}  # type: ignore[call-overload]  # fmt: skip
    settings |= {"beside": list(columns[1:]), "as": type(recipe).__name__} if len(columns) > 1 else {}
    key = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()
    return Pixels(cache.entry("pixels", key, lambda directory: _build(directory, source, columns, recipe, progress)))


def _build(directory: Path, source: Source, columns: Sequence[str], recipe: Decoder, progress: Progress | None) -> None:
    def decode(row: tuple[Encoded, ...]) -> transforms.Pixels | transforms.PictureError:
        try:
            return recipe(*(fetch(encoded) for encoded in row))
        except transforms.PictureError as error:
            return error

    rows = zip(*(source.pictures(column) for column in columns), strict=True)
    digest = hashlib.blake2b(digest_size=16)
    shapes: list[tuple[int, ...]] = []
    with open(directory / "pixels.u8", "wb") as file, transforms.quiet():
        for pixels in in_parallel(decode, rows):
            if isinstance(pixels, transforms.PictureError):
                raise LimnerError(str(Problem(source.picture_place(len(shapes), columns[0]), str(pixels))))
            shapes.append(pixels.shape[1:])
            if recipe.size is None and shapes[-1] != shapes[0]:
                raise LimnerError(_sizes_differ(source, shapes))
            digest.update(pixels.data)
            file.write(pixels.data)
            if progress is not None and (len(shapes) % _CHUNK == 0 or len(shapes) == len(source)):
                progress(len(shapes), len(source))
    np.save(directory / "shapes.npy", np.asarray(shapes, dtype=np.int64))
    digest.update(np.asarray(shapes, dtype="<i8").tobytes())
    about = {"size": recipe.size or shapes[0], "channels": recipe.channels, "digest": digest.hexdigest()}
    (directory / "about.json").write_text(json.dumps(about), encoding="utf-8")


def fetch(encoded: Encoded) -> bytes:
    """The bytes of an encoded picture. Raises PictureError where there are none."""
    if isinstance(encoded, bytes):
        return encoded
    if isinstance(encoded, Absent):
        raise transforms.PictureError(encoded.why)
    try:
        return encoded.read()
    except (OSError, ValueError) as error:
        raise transforms.PictureError(f"cannot be read ({reason(error)})") from None


def in_parallel(work: Callable[[S], T], pictures: Iterator[S]) -> Iterator[T]:
    """`work` on each picture, in order, on threads: Pillow decodes and resizes without the interpreter's lock."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting: deque[Future[list[T]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            while chunk := list(islice(pictures, _CHUNK)):
                waiting.append(pool.submit(lambda items: [work(item) for item in items], chunk))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _sizes_differ(source: Source, shapes: list[tuple[int, ...]]) -> str:
    (h0, w0), (h1, w1) = shapes[0], shapes[-1]
    return (
        f"{source.name}: pictures differ in size: {w0}x{h0} is {source.picture_place(0)}, {w1}x{h1} is "
        f"{source.picture_place(len(shapes) - 1)}; set data.size, such as data.size={min(h0, w0, h1, w1)}"
    )
