"""All chance in training, as a function of (seed, images seen, place in the step) and of nothing else.

A step takes the same rows, flips, times and noise whether it is run in one piece, in micro-batches, or on several
processes, and a run that is resumed takes those that it would have taken anyway. The network's own dropout alone
depends on the process as well.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from limner.core.noise import initial_noise
from limner.errors import LimnerError


@dataclass(frozen=True)
class Part:
    """The rows start to stop of a step of `total` rows, which began when `images` had been seen."""

    images: int
    start: int
    stop: int
    total: int

    @property
    def positions(self) -> range:
        """Each row's number, counted from the start of the training."""
        return range(self.images + self.start, self.images + self.stop)

    def generator(self, seed: int, purpose: str) -> torch.Generator:
        """A generator for the whole step; its draws are to be cut by `of`."""
        return torch.Generator().manual_seed(seed_of(seed, self.images, purpose))

    def of(self, whole: Tensor) -> Tensor:
        """These rows of a tensor drawn for the whole step."""
        return whole[self.start : self.stop]

    def noise(self, seed: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Standard normal noise (B, *shape), each row's by its own position."""
        return initial_noise(seed_of(seed, 0, "noise"), self.positions, shape, device=device)


def seed_of(seed: int, images: int, purpose: str) -> int:
    """A 63-bit seed for one purpose at one moment."""
    digest = hashlib.blake2b(f"{seed}/{images}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class PartGenerator(np.random.Generator):
    """Draws for a whole step and hands out the rows of one part, so that a row's flip doesn't depend on the split."""

    def __init__(self, seed: int, part: Part) -> None:
        super().__init__(np.random.Philox(key=seed_of(seed, part.images, "augmentation")))
        self.part = part

    def random(self, size: Any = None, *args: Any, **settings: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, *rest = (size,) if isinstance(size, int) else tuple(size)
        if rows != self.part.stop - self.part.start:
            raise ValueError(f"a draw for {rows} rows in a part of {self.part.stop - self.part.start}")
        return super().random((self.part.total, *rest), *args, **settings)[self.part.start : self.part.stop]


class Source(Protocol):
    """What the loop asks of a data set; `limner.data.dataset.Dataset` is one."""

    @property
    def train(self) -> npt.NDArray[np.int64]: ...

    @property
    def held_out(self) -> npt.NDArray[np.int64]: ...

    @property
    def digest(self) -> str: ...

    def batch(self, rows: npt.NDArray[np.int64], generator: np.random.Generator | None = None) -> dict[str, Any]: ...

    def uint8(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]: ...


@functools.lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order in which an epoch visits its rows."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def rows_at(positions: range, rows: int, seed: int) -> npt.NDArray[np.int64]:
    """Which of `rows` rows stand at these positions of the endless shuffled stream: each once an epoch."""
    return np.array([epoch_order(rows, seed, p // rows)[p % rows] for p in positions], dtype=np.int64)


def balanced(rows: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], share: float) -> npt.NDArray[np.int64]:
    """The rows of rare classes several times: about (count of the commonest class / count of its own) ** share.

    rows: (N,) row numbers; labels: the class of every row of the data set, -1 without one, which counts as a class;
    share: 0 to 1.
    """
    own = labels[rows] + 1
    counts = np.bincount(own)
    return np.repeat(rows, np.rint((counts.max() / counts[own]) ** share).astype(np.int64))


class Order(Protocol):
    """Which rows the steps take. corrupt: rows found to be of no use so far, None where that would be an error."""

    @property
    def corrupt(self) -> int | None: ...

    def rows(self, part: Part) -> npt.NDArray[np.int64]:
        """The rows of a part; the parts of one process are asked for in their order."""
        ...

    def place(self, images: int, add_up: Callable[[Tensor], Tensor]) -> Any:
        """What `restore` needs to go on after `images`, as JSON; None where the number of images says it all. Every
        process calls it; `add_up` adds a tensor up over them."""
        ...

    def restore(self, images: int, place: Any) -> None:
        """Go on after `images`, from what a checkpoint holds of `place`."""
        ...


@dataclass(frozen=True)
class Shuffled:
    """A new shuffle of the training rows every epoch, a function of the images seen."""

    train: npt.NDArray[np.int64]
    seed: int
    corrupt: None = None

    def rows(self, part: Part) -> npt.NDArray[np.int64]:
        return self.train[rows_at(part.positions, len(self.train), self.seed)]

    def place(self, images: int, add_up: Callable[[Tensor], Tensor]) -> None:
        return None

    def restore(self, images: int, place: Any) -> None:
        pass


@dataclass(frozen=True)
class Batches:
    """The micro-batches of each step that belong to this process.

    batch: rows of a whole step, over all processes and micro-batches. order: which rows; default: `Shuffled`.
    Raises LimnerError where processes and micro-batches don't divide the batch.
    """

    data: Source
    seed: int
    batch: int
    accumulate: int = 1
    process: int = 0
    processes: int = 1
    order: Order = None  # pyright: ignore[reportAssignmentType]

    def __post_init__(self) -> None:
        parts = self.accumulate * self.processes
        if self.batch % parts:
            raise LimnerError(
                f"training.batch: {self.batch} should be a multiple of {parts} "
                f"({self.accumulate} micro-batches on each of {self.processes} processes)"
            )
        if not len(self.data.train):
            raise LimnerError("the data set: has no rows to train on")
        if self.order is None:
            object.__setattr__(self, "order", Shuffled(self.data.train, self.seed))

    def parts(self, images: int) -> list[Part]:
        """This process's share of the step that begins at `images`."""
        size = self.batch // (self.accumulate * self.processes)
        first = self.process * self.accumulate * size
        starts = range(first, first + self.accumulate * size, size)
        return [Part(images, start, start + size, self.batch) for start in starts]

    def load(self, images: int) -> list[dict[str, Any]]:
        """The micro-batches of the step that begins at `images`; `part` in each says which rows they are."""
        loaded = []
        for part in self.parts(images):
            rows = self.order.rows(part)
            loaded.append(self.data.batch(rows, PartGenerator(self.seed, part)) | {"part": part})
        return loaded

    def stream(self, images: int, *, ahead: bool = True) -> Iterator[list[dict[str, Any]]]:
        """Step after step from `images` on, without end.

        ahead: read the next while the present one is in use. Where the network computes on the CPU as well, the
        reader's threads and the network's wait for each other, and a step took a fifth longer.
        """
        while not ahead:
            yield self.load(images)
            images += self.batch
        with ThreadPoolExecutor(1, thread_name_prefix="limner-batches") as reader:
            coming: Future[list[dict[str, Any]]] = reader.submit(self.load, images)
            while True:
                images += self.batch
                loaded, coming = coming.result(), reader.submit(self.load, images)
                yield loaded
