"""In which order a stream visits its rows: a function of the seed, the epoch and the lane, and of nothing else.

A step's rows come from a fixed number of lanes, each of them a stream of its own, and a process has as many lanes as
falls to it. So the order doesn't depend on the number of processes or workers, and a place in it is two numbers a lane:
the epoch, and how many rows of it the lane has passed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BLOCK = 256
"""Rows that lie side by side and are visited close to one another, at most."""
BLOCKS_PER_LANE = 16
MOST_LANES = 64

Rows = npt.NDArray[np.int64]


def lanes_for(batch: int) -> int:
    """As many lanes as divide the batch, and 64, evenly."""
    return math.gcd(batch, MOST_LANES)


def blocks_of(ends: Sequence[int], lanes: int) -> Rows:
    """(N, 2): first row and the one after the last of blocks that don't reach from one run of rows into the next.

    ends: the row numbers at which runs end that are read together: files, or row groups.
    """
    size = max(1, min(BLOCK, ends[-1] // (lanes * BLOCKS_PER_LANE)))
    starts = [0, *ends[:-1]]
    pieces = [np.arange(start, end, size, dtype=np.int64) for start, end in zip(starts, ends, strict=True)]
    stops = [np.minimum(piece + size, end) for piece, end in zip(pieces, ends, strict=True)]
    return np.stack([np.concatenate(pieces), np.concatenate(stops)], axis=1)


@dataclass(frozen=True)
class Plan:
    """blocks: (N, 2) as `blocks_of` gives them. trains: bool (rows,), false for those that are kept out.

    Each epoch deals the blocks to the lanes anew; a lane shuffles its rows among `buffer / lanes` that follow one
    another. Over all lanes an epoch has each row once.
    """

    blocks: Rows
    trains: npt.NDArray[np.bool_]
    seed: int
    lanes: int
    buffer: int

    def lane(self, number: int, epoch: int) -> Rows:
        """The rows that a lane visits in an epoch, in order; there may be none."""
        dealt = np.random.default_rng([self.seed, epoch]).permutation(len(self.blocks))[number :: self.lanes]
        rows = [np.arange(start, stop, dtype=np.int64) for start, stop in self.blocks[dealt].tolist()]
        order = np.concatenate([np.empty(0, np.int64), *rows])
        order = order[self.trains[order]]
        chance = np.random.default_rng([self.seed, epoch, number])
        window = max(1, self.buffer // self.lanes)
        for start in range(0, len(order), window):
            order[start : start + window] = chance.permutation(order[start : start + window])
        return order
