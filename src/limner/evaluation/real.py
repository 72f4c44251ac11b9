"""The real pictures that samples are compared with, wherever they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from limner.config import DataConfig
from limner.data.dataset import conditions_in, prepare, split_rows
from limner.errors import LimnerError
from limner.evaluation.arrays import npz_batches
from limner.evaluation.collect import Batch


class RealPictures(Protocol):
    """A data set as evaluation needs it; `limner.data.dataset.Dataset` is one."""

    def __len__(self) -> int: ...
    @property
    def digest(self) -> str: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def train(self) -> npt.NDArray[np.int64]: ...
    @property
    def held_out(self) -> npt.NDArray[np.int64]: ...
    @property
    def labels(self) -> npt.NDArray[np.int64] | None: ...
    @property
    def class_names(self) -> tuple[str, ...] | None: ...
    @property
    def texts(self) -> list[str] | None: ...
    def uint8(self, rows: Any) -> npt.NDArray[np.uint8]: ...
    def iterate(self, rows: Any = None, batch: int = 256) -> Iterator[Batch]: ...


class ArrayPictures:
    """Real pictures in memory: uint8 (N, H, W, C), labels (N,) or None, captions or None."""

    def __init__(
        self,
        pictures: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64] | None = None,
        texts: list[str] | None = None,
    ) -> None:
        self.pictures, self.labels, self.texts = pictures, labels, texts
        self.size = (pictures.shape[1], pictures.shape[2])
        self.train, self.held_out = split_rows(len(pictures), DataConfig.model_validate({}).held_out)
        digest = hashlib.blake2b(str(pictures.shape).encode(), digest_size=16)
        for start in range(0, len(pictures), 1024):
            digest.update(np.ascontiguousarray(pictures[start : start + 1024]).data)
        digest.update(b"" if labels is None else labels.tobytes())
        digest.update(b"" if texts is None else "\0".join(texts).encode())
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Digits: nothing else is known of the classes."""
        return None if self.labels is None else tuple(str(k) for k in range(int(self.labels.max()) + 1))

    def uint8(self, rows: Any) -> npt.NDArray[np.uint8]:
        return self.pictures[np.asarray(rows)]

    def iterate(self, rows: Any = None, batch: int = 256) -> Iterator[Batch]:
        chosen = np.arange(len(self)) if rows is None else np.asarray(rows)
        for start in range(0, len(chosen), batch):
            part = chosen[start : start + batch]
            conditions: dict[str, Any] = {} if self.labels is None else {"label": self.labels[part]}
            if self.texts is not None:
                conditions["text"] = [self.texts[row] for row in part]
            yield self.uint8(part), conditions


def open_real(
    reference: Any, size: tuple[int, int], progress: Callable[[int, int], None] | None = None
) -> RealPictures:
    """Real pictures from a data set of `limner.data`, a DataConfig, a path or hub name, an `.npz`, or an array.

    Paths are read at `size` (H, W), that of the samples, without flips. Raises LimnerError: not there, fewer than two
    pictures, pictures of another size than the samples where they cannot be resized.
    """
    if isinstance(reference, str | Path) and str(reference).lower().endswith(".npz"):
        found: RealPictures = _from_npz(Path(reference))
    elif isinstance(reference, str | Path | DataConfig):
        given = (
            reference if isinstance(reference, DataConfig) else DataConfig.model_validate({"source": str(reference)})
        )
        config = given.model_copy(update={"size": size, "flip": False, "channels": 3, "crop": "center"})
        found = prepare(config, conditions_in(config), progress)
    elif isinstance(reference, np.ndarray):
        found = ArrayPictures(reference)
    else:
        found = reference
    if len(found) < 2:
        raise LimnerError(f"reference: {len(found)} picture is too few; a comparison needs at least 2")
    if tuple(found.size) != size:
        there, here = (f"{s[1]}x{s[0]}" for s in (found.size, size))
        raise LimnerError(f"reference: its pictures are {there}, the samples {here}; both should be of one size")
    return found


def _from_npz(path: Path) -> ArrayPictures:
    batches = list(npz_batches(path))
    if not batches:
        raise LimnerError(f"{path}: holds no pictures")
    pictures = np.concatenate([x for x, _ in batches])
    labels = np.concatenate([c["label"] for _, c in batches]) if "label" in batches[0][1] else None
    texts = [str(t) for _, c in batches for t in c["text"]] if "text" in batches[0][1] else None
    return ArrayPictures(pictures, labels, texts)
