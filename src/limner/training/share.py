"""Work that all processes do together, such as held-out figures and previews, to the result of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Share:
    """This process's part. add_up: the sum of every process's tensor, for each of them.

    A network that is cut over the processes can be called by all of them alone, so each is given as much to do; what
    it does in excess doesn't count.
    """

    process: int = 0
    processes: int = 1
    add_up: Callable[[Tensor], Tensor] = lambda own: own

    def turns(self, count: int) -> Iterator[tuple[int, bool]]:
        """This process's numbers below `count`, and whether each counts: where the last round has none left for it,
        it does the first one again for nothing."""
        for start in range(0, count, self.processes):
            number = start + self.process
            yield (number, True) if number < count else (0, False)

    def together(self, count: int, make: Callable[[range], Tensor]) -> Tensor:
        """`make(range(count))`, (count, ...), of which each process has made its rows."""
        size = -(-count // self.processes)
        first, own = min(self.process * size, count - size), self.process * size
        made = make(range(first, first + size))
        whole = made.new_zeros((count, *made.shape[1:]))
        whole[own : own + size] = made[own - first :]
        return self.add_up(whole)


ALONE = Share()
