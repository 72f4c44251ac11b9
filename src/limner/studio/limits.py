"""What one request may ask for, and how many may wait."""

from __future__ import annotations

from dataclasses import dataclass

from limner.errors import LimnerError


@dataclass(frozen=True)
class Limits:
    """queue: requests that may wait. batch: pictures drawn at once. num: pictures a request. timeout_s: of a request,
    its waiting included. area: of a picture, in times the model's own. upload: bytes of a request's body. side:
    pixels of an uploaded picture's longer side."""

    queue: int = 64
    batch: int = 16
    num: int = 16
    steps: int = 250
    timeout_s: float = 300.0
    area: float = 4.0
    upload: int = 8_000_000
    side: int = 4096
    caption: int = 2000

    def __post_init__(self) -> None:
        for name in ("queue", "batch", "num", "steps", "timeout_s", "area", "upload", "side", "caption"):
            if getattr(self, name) <= 0:
                raise LimnerError(f"{name}: {getattr(self, name)}, should be above 0")

    def check(self, num: int, steps: int, caption: int = 0) -> None:
        """Raises LimnerError for what is beyond them."""
        for name, value, most in (("num", num, self.num), ("steps", steps, self.steps)):
            if not 1 <= value <= most:
                raise LimnerError(f"{name}: {value}, should be from 1 to {most} here")
        if caption > self.caption:
            raise LimnerError(f"text: a caption of {caption} characters; {self.caption} are allowed here")

    def check_size(self, size: tuple[int, int], own: tuple[int, int]) -> None:
        """Raises LimnerError for pictures (height, width) too large beside the model's own."""
        if size[0] * size[1] > self.area * own[0] * own[1]:
            raise LimnerError(f"size {size[1]}x{size[0]}: at most {self.area:g} times as many pixels as the "
                              f"model's own {own[1]}x{own[0]} are allowed here")  # fmt: skip
