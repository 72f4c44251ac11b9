"""What each open page is waiting for, so that its stop button, or its closing, can give it up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from limner.studio.jobs import Job


class Sessions:
    """Jobs by page; a page that closes gives up all of its own."""

    def __init__(self) -> None:
        self._jobs: dict[str, list[Job]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def holding(self, request: gr.Request, *jobs: Job) -> Iterator[None]:
        """The page waits for these jobs inside the block; leaving it early gives them up."""
        page = request.session_hash or ""
        with self._lock:
            self._jobs.setdefault(page, []).extend(jobs)
        try:
            yield
        finally:
            with self._lock:
                left = [job for job in self._jobs.get(page, ()) if job not in jobs]
                self._jobs[page] = left
                if not left:
                    del self._jobs[page]
            for job in jobs:
                job.cancel()

    def stop(self, request: gr.Request) -> None:
        """Give up all that this page waits for."""
        with self._lock:
            jobs = list(self._jobs.get(request.session_hash or "", ()))
        for job in jobs:
            job.cancel()
