"""Work that training doesn't wait for: a checkpoint goes to the disk while the next steps are computed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import TracebackType

import torch
from torch import Tensor


class Background:
    """One piece of work at a time, in a thread. What goes wrong there is raised by the next call here.

    Leaving the block waits for the work, except after a second Ctrl-C; what is half written then is cleared away by
    the next sitting, as after a crash.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def run(self, work: Callable[[], object]) -> None:
        """Begin, when what was begun before has ended."""
        self.wait()

        def attempt() -> None:
            try:
                work()
            except Exception as error:
                self._failure = error

        self._thread = threading.Thread(target=attempt, name="limner-writer", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong, if anything has by now."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Return when there is nothing left to do, or raise what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        if self._thread is not None and (kind is None or issubclass(kind, Exception)):
            self._thread.join()


def copied(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The tensors as they are now, in memory of their own on the CPU."""
    return {file: {name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
                   for name, tensor in content.items()} for file, content in tensors.items()}  # fmt: skip
