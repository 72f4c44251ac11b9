"""Measuring side by side: every contender in every round, so that whatever else the machine does meets all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Contender = Callable[[], object]
"""Some work, the same each time it is called."""


def alternate(contenders: Mapping[str, Contender], rounds: int, seconds: float,
              tell: Callable[[str], None] | None = None) -> dict[str, list[float]]:  # fmt: skip
    """Calls a second of each contender, one figure a round. A contender is called at least once a round, and for about
    `seconds` altogether; before the first round twice, unmeasured, so that caches and compilers are warm."""
    calls = {}
    for name, work in contenders.items():
        if tell is not None:
            tell(name)
        timed(work, 1)
        calls[name] = max(1, int(seconds / timed(work, 1)))
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, work in contenders.items():
            if tell is not None:
                tell(f"{name}, round {number + 1} of {rounds}")
            rates[name].append(calls[name] / timed(work, calls[name]))
    return rates


def timed(work: Contender, calls: int) -> float:
    """Seconds that so many calls take, until the device has finished."""
    _finish()
    began = time.perf_counter()
    for _ in range(calls):
        work()
    _finish()
    return time.perf_counter() - began


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """How many times faster `one` is: the median over the rounds of each round's ratio."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def fastest(rates: Mapping[str, Sequence[float]], prefix: str) -> str:
    """Of the contenders whose name begins so, the one with the best median."""
    return max((name for name in rates if name.startswith(prefix)), key=lambda name: statistics.median(rates[name]))


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
