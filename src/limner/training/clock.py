"""How far the training is: images seen, seconds spent, the share of the budget, and the learning rate that follows."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from limner.config import TrainingConfig
from limner.errors import LimnerError


@dataclass
class Clock:
    """images: seen so far. spent_s: seconds of the sittings before this one. started_at: `time.monotonic()` when
    this sitting began, reading the data included. A budget in images, in seconds, or both: the first one ends it."""

    images: int
    total_images: int | None
    budget_s: float | None
    spent_s: float
    started_at: float

    def __post_init__(self) -> None:
        if self.total_images is None and self.budget_s is None:
            raise LimnerError("training has no end: give --budget, such as 20m, or --images, such as 2M")

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, over all sittings."""
        return self.spent_s + time.monotonic() - self.started_at

    def progress(self, elapsed_s: float) -> float:
        """The share of the budget that is spent, 0 to 1."""
        by_images = self.images / self.total_images if self.total_images else 0.0
        by_seconds = elapsed_s / self.budget_s if self.budget_s else 0.0
        return min(1.0, max(by_images, by_seconds))

    def passed(self, every: int, batch: int) -> bool:
        """Whether the last step, of `batch` images, reached or passed a multiple of `every` images."""
        return self.images // every > (self.images - batch) // every


def learning_rate(images: int, progress: float, config: TrainingConfig) -> float:
    """The share of the full learning rate, 0 to 1: linear warm-up by images, times the decay to 0 by progress.

    images: seen when the step ends, so that the first step isn't at 0.
    """
    warm = min(1.0, images / config.warmup_images) if config.warmup_images else 1.0
    if config.decay == "constant" or progress <= config.decay_from:
        return warm
    left = (1.0 - progress) / (1.0 - config.decay_from)
    return warm * (left if config.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))
