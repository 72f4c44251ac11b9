"""Several processes share an evaluation: started by torchrun or `accelerate launch`, they find one another here."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import distributed

from limner.rendezvous import INIT_METHOD

Item = TypeVar("Item")


@contextlib.contextmanager
def joined() -> Iterator[bool]:
    """The group of processes that the launcher started, for as long as the block lasts; gives whether this process is
    the one that speaks. Where a group is there already, or this process is alone, nothing is set up."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) < 2
    if alone or _in_group():
        yield place()[0] == 0
        return
    distributed.init_process_group("gloo", init_method=INIT_METHOD)  # what is exchanged lies on the CPU
    try:
        yield place()[0] == 0
    finally:
        distributed.destroy_process_group()


def place() -> tuple[int, int]:
    """(number of this process, how many there are)."""
    return (distributed.get_rank(), distributed.get_world_size()) if _in_group() else (0, 1)


def part_of(numbers: range) -> range:
    """This process's share of a range, in one piece."""
    rank, count = place()
    return numbers[len(numbers) * rank // count : len(numbers) * (rank + 1) // count]


def in_turn(items: Iterable[Item]) -> Iterator[Item]:
    """This process's share of a stream: one item, then none while the others have theirs."""
    rank, count = place()
    return itertools.islice(items, rank, None, count)


def gathered(mine: Item) -> list[Item]:
    """What all processes have, in their order: each calls this at the same place."""
    parts: list[Any] = [mine] * place()[1]
    if len(parts) > 1:
        distributed.all_gather_object(parts, mine)
    return parts


def _in_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()
