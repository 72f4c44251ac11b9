"""One drawing that several processes share, as torchrun or `accelerate launch` starts them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from limner.evaluation import processes
from limner.outputs import Picture


def in_batches(part: range, batch: int, draw: Callable[[range], Iterator[list[Picture]]]) -> Iterator[list[Picture]]:
    """The pictures of `part` in order, on every process. Of several processes each draws every so manieth batch, and
    the batches are those of one process, so the pictures are as well.

    draw(numbers): pictures of these numbers, batch after batch.
    """
    rank, count = processes.place()
    if count == 1:
        yield from draw(part)
        return
    spans = [part[start : start + batch] for start in range(0, len(part), batch)]
    for start in range(0, len(spans), count):
        mine = spans[start + rank] if start + rank < len(spans) else range(0)
        drawn = [picture for pictures in draw(mine) for picture in pictures] if len(mine) else []
        yield from processes.gathered(drawn)
