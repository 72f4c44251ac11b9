"""How a command ends and what it shows: exit codes, results to stdout, progress to stderr."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

DONE, OUR_FAULT, WRONG_INPUT, STOPPED = 0, 1, 2, 75
"""Exit codes. STOPPED is EX_TEMPFAIL: stopped by a signal, and training can be resumed."""


def emit(facts: Mapping[str, Any], lines: Iterable[str], as_json: bool) -> None:
    """Print a result: as one JSON object, or as lines for people."""
    if as_json:
        print(json.dumps(_plain(facts), ensure_ascii=False, indent=2))
    else:
        for line in lines:
            print(line)


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's, and NaN or infinity as null: strict JSON has neither."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with the time that remains; gives `tell(done, total)`. Silent where stderr is no terminal.

    It comes with the first `tell` and goes away when `done` reaches `total`, so that others may draw bars of their own
    before it and after.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    bar = bars.add_task(title, total=None)

    def tell(done: int, total: int) -> None:
        bars.start()
        bars.update(bar, completed=done, total=total)
        if done >= total:
            bars.stop()

    try:
        yield tell
    finally:
        bars.stop()
