"""Asked to stop: finish the step, save, leave. Asked again: leave at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """Within the block SIGTERM, Ctrl-C and SIGUSR1 (what batch systems announce the end of a job by, where there is
    such a signal) set `name` instead of ending the process; a second Ctrl-C is immediate.

    In a thread other than the main one, where Python takes no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            announced = [signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []
            for number in (signal.SIGTERM, signal.SIGINT, *announced):
                self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
