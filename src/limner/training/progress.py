"""What the training tells: a progress bar on a terminal, a line now and then elsewhere, and `metrics.jsonl`."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

LINE_EVERY_S = 20.0
REMEMBERS = 1.1
"""Held-out loss over the least so far from which on the user is told."""


class Display:
    """On a terminal a live bar with the time left; elsewhere a plain line every 20 seconds. Silent on other processes.

    Everything goes to standard error.
    """

    def __init__(self, title: str, console: Console | None = None, *, silent: bool = False) -> None:
        self.console = console or Console(stderr=True, quiet=silent)
        self._title = title
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._last_figures: Mapping[str, float] = {}

    def __enter__(self) -> Display:
        if self.console.is_terminal and not self.console.quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[words]}"),
            )
            self._bar = Progress(*columns, console=self.console)
            self._bar.start()
            self._bar.add_task(self._title, total=1.0, words="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, progress: float, images: int, left_s: float | None,
               figures: Mapping[str, float] | None = None) -> None:  # fmt: skip
        """progress: 0 to 1. left_s: seconds that remain, None before they can be told. figures: loss, images/s; the
        last ones given are shown on."""
        self._last_figures = figures or self._last_figures
        words = [f"{images:,} images", *(f"{name} {value:.4g}" for name, value in self._last_figures.items())]
        if left_s is not None:
            words.append(f"{duration(left_s)} left")
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=progress, words=", ".join(words))
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.say(f"{self._title}: {100 * progress:.0f}%, {', '.join(words)}")


def duration(seconds: float) -> str:
    """`1 h 05 min`, `12 min 30 s`, `8 s`."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def remembers(run: Path, held_out: float | None, best: float | None) -> str | None:
    """What to say of a held-out loss that has risen well above the least so far; else nothing."""
    if held_out is None or best is None or not REMEMBERS * best < held_out < math.inf or best <= 0:
        return None
    return (
        f"{run}: held_out_loss was {best:.3g} and is {held_out:.3g} now: it may be remembering its training pictures; "
        "docs/troubleshooting.md says what helps"
    )


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, each with the images seen."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line; a figure that isn't finite becomes null, since JSON has no word for it."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({key: _finite(value) for key, value in line.items()}) + "\n")

    def rewind(self, images: int) -> None:
        """Take away what lies beyond `images`, and a line that a crash cut short."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _within(line, images)]
        beside = self.path.with_name(f".partial-{self.path.name}")
        beside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(beside, self.path)


def _within(line: str, images: int) -> bool:
    try:
        return json.loads(line)["images"] <= images
    except (ValueError, KeyError, TypeError):
        return False


def _finite(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
