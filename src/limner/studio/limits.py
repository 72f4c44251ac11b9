"""What one request may ask for, and how many may wait."""

from __future__ import annotations

from dataclasses import dataclass

from limner.errors import LimnerError


@dataclass(frozen=True)
class Limits:
    """queue: requests that may wait. batch: pictures drawn at once. num: pictures a request. timeout_s: of a request,
    its waiting included. upload: bytes of a request's body. side: pixels of an uploaded picture's longer side."""

    queue: int = 64
    batch: int = 16
    num: int = 16
    steps: int = 250
    timeout_s: float = 300.0
    upload: int = 8_000_000
    side: int = 4096
    caption: int = 2000

    def __post_init__(self) -> None:
        for name in ("queue", "batch", "num", "steps", "timeout_s", "upload", "side", "caption"):
            if getattr(self, name) <= 0:
                raise LimnerError(f"{name}: {getattr(self, name)}, should be above 0")

    def check(self, num: int, steps: int, caption: int = 0) -> None:
        """Raises LimnerError for what is beyond them."""
        for name, value, most in (("num", num, self.num), ("steps", steps, self.steps)):
            if not 1 <= value <= most:
                raise LimnerError(f"{name}: {value}, should be from 1 to {most} here")
        if caption > self.caption:
            raise LimnerError(f"text: a caption of {caption} characters; {self.caption} are allowed here")
