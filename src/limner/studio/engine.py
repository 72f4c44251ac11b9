"""The engine: owns the loaded models, and draws what was asked for, one batch at a time, in the order of asking.

Requests with the same model, settings and shapes are drawn as one batch. One thread draws; all that callers do is
ask (`draw`), look (`Job.events`), wait (`Job.done`) and give up (`Job.cancel`).
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from limner.core.types import OnStep, Step
from limner.errors import LimnerError
from limner.generator import Generator, to_uint8
from limner.redraw import facts_of
from limner.settings import Settings
from limner.studio import drawing
from limner.studio.jobs import Busy, Errand, Fault, Job, Progress, Request, TimedOut
from limner.studio.limits import Limits
from limner.studio.metrics import Metrics
from limner.studio.shelf import Shelf

_log = logging.getLogger(__name__)
LONGEST_RETRY_S = 120
PREVIEW_SHARE = 0.15
"""Of a drawing's time, what showing the forming pictures may take: they are decoded when there is some left."""


class _Abandoned(Exception):
    """Nobody waits for this batch any more."""


class Engine:
    """shelf: its models. limits: what a request may ask for, and how many may wait. Close it when done."""

    def __init__(self, shelf: Shelf, limits: Limits | None = None) -> None:
        self.shelf, self.limits, self.metrics = shelf, limits or Limits(), Metrics()
        self._waiting: deque[Job] = deque()
        self._drawing: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._pace_s = 0.0
        self._thread = threading.Thread(target=self._work, name="limner-engine", daemon=True)
        self._thread.start()

    # --- asking ---------------------------------------------------------------------------------------------------

    def request(self, *, model: str | None = None, num: int = 1, seed: int | None = None, first: int = 0,
                conditions: Mapping[str, Any] | None = None, strength: float | None = None,
                size: tuple[int, int] | None = None, previews: bool = False, **settings: Any) -> Request:  # fmt: skip
        """A request, checked and complete. seed: chosen at random where None. conditions: by option of
        `Generator.stream`. settings: by name, None for the run's own. Raises LimnerError for what doesn't fit."""
        name = self.shelf.named(model)
        generator, guide = self.shelf.generators[name], self.shelf.guides.get(name)
        complete = generator.settings(**settings)
        given = {key: value for key, value in (conditions or {}).items() if value is not None}
        self.limits.check(num, complete.steps, longest_caption(given))
        self.limits.check(
            num, generator.schedule.path(complete.steps, complete.spacing).steps
        )  # "ddim500" names its own
        if "label" in generator.modalities:
            given.setdefault("label", list(range(len(generator.classes))))
        made = Request(
            name,
            num,
            secrets.randbelow(2**31) if seed is None else seed,
            first,
            {key: drawing.expanded(value, num) for key, value in given.items()},
            complete,
            previews,
            classifier=complete.classifier_scale > 0,
            strength=strength,
            size=None if size == generator.config.data.size else size,
        )
        drawing.check(generator, made, guide)
        return made

    def draw(self, timeout_s: float | None = None, **asked: Any) -> Job:
        """Ask for pictures; `asked` as for `request`. LimnerError where it doesn't fit, Busy for a full queue."""
        return self.submit(self.request(**asked), timeout_s)

    def errand(self, model: str | None, work: Callable[[Generator, OnStep], Any],
               timeout_s: float | None = None) -> Job:  # fmt: skip
        """Ask for work on a model that is no plain drawing: `work(generator, on_step)`, run alone. Raises Busy."""
        return self.submit(Errand(self.shelf.named(model), work), timeout_s)

    def submit(self, request: Request | Errand, timeout_s: float | None = None) -> Job:
        """Put it into the queue. Raises Busy when that is full."""
        allowed = min(timeout_s or self.limits.timeout_s, self.limits.timeout_s)
        job = Job(request, time.monotonic() + allowed)
        with self._changed:
            if self._closing:
                raise Busy(0, LONGEST_RETRY_S)
            if len(self._waiting) >= self.limits.queue:
                self.metrics.ended.labels("refused").inc()
                raise Busy(len(self._waiting), self._retry_after())
            self._waiting.append(job)
            self._changed.notify_all()
        job.done.add_done_callback(lambda done: self._ended(job, done))
        self._measure()
        return job

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def facts(self, request: Request) -> dict[str, Any]:
        """What is needed to draw the request again, for its PNGs."""
        guide = self.shelf.guides.get(request.model) if request.classifier else None
        where = self.shelf.paths.get(request.model, request.model)
        return facts_of(self.shelf.generators[request.model], where, request.settings, request.seed,
                        None if guide is None else guide.digest, request.strength, request.size)  # fmt: skip

    def settings(self, model: str) -> Settings:
        """The run's own settings."""
        return self.shelf.generators[model].settings()

    def close(self) -> None:
        """Stop drawing and give up all that waits."""
        with self._changed:
            self._closing = True
            jobs = [*self._waiting, *self._drawing]
            self._changed.notify_all()
        for job in jobs:
            job.cancel("the studio is closing")
        self._thread.join(timeout=60)

    # --- drawing --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (group := self._take()) is not None:
            if not group:
                continue
            began = time.monotonic()
            try:
                self._serve(group)
            except _Abandoned:
                pass
            except LimnerError as error:
                self._fail(group, error)
            except Exception as error:
                _log.exception("drawing failed")
                self._fail(group, Fault(_sentence(error)))
            finally:
                self._drawing = []
                seconds = (time.monotonic() - began) / len(group)
                self._pace_s = seconds if self._pace_s == 0 else 0.8 * self._pace_s + 0.2 * seconds
                self._measure()

    def _take(self) -> list[Job] | None:
        """The oldest job that waits and all that can be drawn with it; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting)
            if self._closing:
                return None
            self._expire()
            group: list[Job] = []
            room = self.limits.batch
            for job in list(self._waiting):
                if _fits(group, job, room):
                    group.append(job)
                    room -= job.request.num if isinstance(job.request, Request) else room
                    self._waiting.remove(job)
            self._drawing = group
        for job in group:
            job.began_at = time.monotonic()
            self.metrics.waited.observe(job.began_at - job.asked_at)
        return group

    def _serve(self, group: list[Job]) -> None:
        request = group[0].request
        generator, tell = self.shelf.generators[request.model], self._teller(group)
        if isinstance(request, Errand):
            group[0].finish(request.work(generator, tell))
            return
        requests = [job.request for job in group if isinstance(job.request, Request)]
        self.metrics.batch.observe(sum(each.num for each in requests))
        with self.metrics.drawing.time():
            found = drawing.draw(generator, requests, self.shelf.guides.get(request.model), tell)
        for job, pictures in zip(group, found, strict=True):
            self.metrics.pictures.labels(request.model).inc(len(pictures))
            job.finish(pictures)

    def _teller(self, group: list[Job]) -> OnStep:
        """Tells each job of its progress after each step, and stops the sampler when nobody waits any more."""
        began, spent_s = time.monotonic(), 0.0

        def tell(step: Step) -> None:
            nonlocal spent_s
            self._expire()
            if self._closing or all(job.done.done() for job in group):
                raise _Abandoned
            now = time.monotonic()
            left_s = (now - began) / step.index * (step.total - step.index)
            shows = step.index < step.total and spent_s <= PREVIEW_SHARE * (now - began)
            start = 0
            for job in group:
                num = job.request.num if isinstance(job.request, Request) else 0
                previews = self._preview(job, step.x0[start : start + num]) if shows else None
                job.tell(Progress(step.index, step.total, left_s, previews))
                start += num
            spent_s += time.monotonic() - now

        return tell

    def _preview(self, job: Job, x0: Tensor) -> npt.NDArray[np.uint8] | None:
        """The forming pictures of a job, for whom wants and still waits for them."""
        if isinstance(job.request, Errand) or not job.request.previews or job.done.done():
            return None
        return to_uint8(self.shelf.generators[job.request.model].decode(x0.float()))

    def _expire(self) -> None:
        """End what has been given its time, and let go of what has ended while it waited."""
        now = time.monotonic()
        with self._changed:
            jobs = [*self._waiting, *self._drawing]
        for job in jobs:
            if now > job.deadline:
                job.fail(TimedOut(f"took longer than the {job.deadline - job.asked_at:.0f} s it was given"))

    @staticmethod
    def _fail(group: list[Job], error: Exception) -> None:
        for job in group:
            job.fail(error)

    def _ended(self, job: Job, done: Any) -> None:
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
        error = done.exception()
        outcome = {"NoneType": "drawn", "Cancelled": "cancelled", "TimedOut": "timed out"}
        self.metrics.ended.labels(outcome.get(type(error).__name__, "failed")).inc()
        self._measure()

    def _measure(self) -> None:
        self.metrics.waiting.set(len(self._waiting))
        self.metrics.busy.set(len(self._drawing))

    def _retry_after(self) -> int:
        """Seconds until there should be room: until the batch that is being drawn has ended, by the pace so far."""
        return max(1, min(LONGEST_RETRY_S, math.ceil(self._pace_s * max(1, len(self._drawing)))))


def longest_caption(conditions: Mapping[str, Any]) -> int:
    """Its characters. Raises LimnerError for captions that are no Unicode text."""
    captions = [conditions.get("text", ()), conditions.get("negative_text", ())]
    texts = [str(text) for part in captions for text in ([part] if isinstance(part, str) else part)]
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise LimnerError(f"text: half a surrogate pair at character {_first_surrogate(text)} is no text") from None
    return max((len(text) for text in texts), default=0)


def _first_surrogate(text: str) -> int:
    return next(k for k, letter in enumerate(text) if 0xD800 <= ord(letter) < 0xE000)


def _fits(group: list[Job], job: Job, room: int) -> bool:
    """Whether a job can be drawn with this group: the first always."""
    if not group:
        return True
    mine, first = job.request, group[0].request
    if isinstance(mine, Errand) or isinstance(first, Errand):
        return False
    return mine.num <= room and mine.key == first.key


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; fewer pictures would do"
    return f"a fault of limner: {type(error).__name__}"
