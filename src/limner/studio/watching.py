"""A training as its run directory tells it, whoever trains there."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limner import config
from limner.errors import LimnerError

POINTS = 400
"""Lines of metrics that are shown at most; more of them are thinned out evenly."""
LATE_S = 120.0
"""A training that hasn't written for as long, and three times its usual pause, is not going on."""


@dataclass(frozen=True)
class Watched:
    """lines: of `metrics.jsonl`, thinned out, each with `images`. previews: (images seen, file), oldest first.
    share: of the budget, 0 to 1; None without one. left_s: seconds to go, None before it can be told or at the end."""

    lines: list[dict[str, Any]]
    previews: list[tuple[int, Path]]
    share: float | None
    left_s: float | None
    going_on: bool

    @property
    def bands(self) -> dict[str, str]:
        """The names of the loss by noise band, and how they are shown."""
        named = [name for name in (self.lines[-1] if self.lines else {}) if name.startswith("loss_t")]
        ends = {name: [f"{float(end):g}" for end in name.removeprefix("loss_t").split("_")] for name in named}
        return {name: "–".join(pair) for name, pair in ends.items()}


def watch(run: Path) -> Watched:
    """What there is to see in a run directory now. Raises LimnerError for a recipe that cannot be read."""
    training = config.load(run / "config.yaml").training
    file = run / "metrics.jsonl"
    lines = _lines(file)
    previews = sorted(
        (int(path.stem.removeprefix("images-")), path) for path in (run / "previews").glob("images-*.png")
    )
    if not lines:
        return Watched([], previews, 0.0, None, False)
    last = lines[-1]
    images, seconds = float(last["images"]), float(last.get("seconds", 0.0))
    share = _share(images, seconds, training.images, training.budget_s)
    pause = seconds / len(lines)
    silent = time.time() - file.stat().st_mtime
    going_on = share is not None and share < 1 and silent < max(LATE_S, 3 * pause)
    left = max(0.0, seconds / share - seconds - silent) if share and going_on else None
    every = -(-len(lines) // POINTS)
    return Watched([*lines[:-1:every], last], previews, share, left, going_on)


def _lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may be growing: a last one cut short is left for the next look."""
    found = []
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise LimnerError(f"{file}: cannot be read ({error})") from None
    for line in text.splitlines():
        try:
            each = json.loads(line)
        except ValueError:
            continue
        if isinstance(each, dict) and isinstance(each.get("images"), int | float):
            found.append(each)
    return found


def _share(images: float, seconds: float, most_images: int | None, budget_s: float | None) -> float | None:
    """How much of the budget is spent: of the images or of the seconds, whichever ends first."""
    shares = [done / most for done, most in ((images, most_images), (seconds, budget_s)) if most]
    return min(1.0, max(shares)) if shares else None
