"""What was asked of the studio, and how far it has got."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from limner.core.types import OnStep
from limner.errors import LimnerError
from limner.generator import Generator
from limner.outputs import Picture
from limner.settings import Settings


class Busy(LimnerError):
    """The queue is full. retry_after_s: when there may be room."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Cancelled(LimnerError):
    """The one who asked, or the end of the studio, stopped it."""


class TimedOut(LimnerError):
    """It took longer than it was given."""


class Fault(LimnerError):
    """Not the user's doing: ours, or the machine's."""


@dataclass(frozen=True)
class Request:
    """Pictures to draw, checked and complete.

    conditions: by option of `Generator.stream`, one value for each of the `num` pictures (a list, an array or a
    tensor). strength, size: as for `Generator.stream`, size None for the model's own. previews: whether the
    forming pictures are shown. classifier: whether the model's guide acts.
    """

    model: str
    num: int
    seed: int
    first: int
    conditions: Mapping[str, Any]
    settings: Settings
    previews: bool = False
    classifier: bool = False
    strength: float | None = None
    size: tuple[int, int] | None = None

    @property
    def numbers(self) -> range:
        """Of the pictures: with the seed they decide the noise."""
        return range(self.first, self.first + self.num)

    @property
    def key(self) -> Any:
        """Requests with equal keys can be drawn together."""
        shapes = [(name, _shapes(value)) for name, value in sorted(self.conditions.items())]
        return self.model, self.settings, self.classifier, self.strength, self.size, shapes


def _shapes(values: Any) -> Any:
    """The shape of one picture's value, or the sizes and modes of pictures."""
    if hasattr(values, "shape"):
        return tuple(values.shape)[1:]
    return {(value.size, value.mode) for value in values if hasattr(value, "mode")}


@dataclass(frozen=True)
class Errand:
    """Work on one model that is no plain drawing and shares its batch with nobody."""

    model: str
    work: Callable[[Generator, OnStep], Any]


@dataclass(frozen=True)
class Progress:
    """step of total. left_s: None before it can be told. previews: uint8 (num, H, W, C), the latest there are."""

    step: int
    total: int
    left_s: float | None = None
    previews: npt.NDArray[np.uint8] | None = None


@dataclass(eq=False)
class Job:
    """A request on its way. `done` is a `Future` of pictures (of whatever an errand gives).

    deadline, asked_at, began_at: by `time.monotonic()`. took_s: from the asking to the pictures.
    """

    request: Request | Errand
    deadline: float
    done: Future[Any] = field(default_factory=Future)
    asked_at: float = field(default_factory=time.monotonic)
    began_at: float | None = None
    took_s: float = 0.0
    _progress: Progress | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.done.add_done_callback(lambda _: self._end())

    def cancel(self, why: str = "stopped") -> None:
        """Give it up: what waits is dropped, what is being drawn stops at its next step. Harmless when done."""
        self.fail(Cancelled(why))

    def fail(self, error: Exception) -> None:
        """End it with an error, unless it has ended."""
        with contextlib.suppress(InvalidStateError):
            self.done.set_exception(error)

    def finish(self, value: Any) -> None:
        """End it well, unless it has ended."""
        self.took_s = time.monotonic() - self.asked_at
        with contextlib.suppress(InvalidStateError):
            self.done.set_result(value)

    def tell(self, progress: Progress) -> None:
        """How far it is; pictures told before stay until there are newer ones."""
        with self._changed:
            before = self._progress
            if progress.previews is None and before is not None:
                progress = Progress(progress.step, progress.total, progress.left_s, before.previews)
            self._progress = progress
            self._changed.notify_all()

    def events(self) -> Iterator[Progress | None]:
        """The newest progress as it comes, None while it waits; ends with the job. What is overtaken is left out."""
        seen: Progress | None = None
        yield None
        while not self.done.done():
            news = self._newer_than(seen)
            if news is not seen:
                seen = news
                yield seen

    def pictures(self) -> list[Picture]:
        """Of a request, once they are there. Raises Cancelled, TimedOut, or the LimnerError that drawing them met."""
        return self.done.result()

    def _newer_than(self, seen: Progress | None) -> Progress | None:
        """The progress, once there is another one, the job has ended or a second has passed."""
        with self._changed:
            self._changed.wait_for(lambda: self.done.done() or self._progress is not seen, timeout=1.0)
            return self._progress

    def _end(self) -> None:
        with self._changed:
            self._changed.notify_all()
