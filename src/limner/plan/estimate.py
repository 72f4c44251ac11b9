"""From counts to gigabytes and days: memory a device by strategy, seconds a step, and what bounds them.

A step is taken to be the sum of its arithmetic (products and convolutions), its memory traffic (everything else, and
the optimizer) and what goes over the wire, one after the other, as in Limner's loop, which averages the gradients
when all of them are there.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from limner.plan.counting import Counts
from limner.plan.devices import Cluster

DAY_S = 86_400.0
USABLE = 0.92
"""Of a device's memory: the rest goes to its driver, the libraries' workspaces and gaps between blocks."""
_BUCKETS = 3 * 64 * 2**20
"""What averaging gradients holds at a time: a bucket, its sum, its mean."""


@dataclass(frozen=True)
class Strategy:
    """sharded: weights, gradients, moments and average are spread over the devices (FSDP2, `training.shard`). again:
    with gradient checkpointing."""

    name: str
    sharded: bool
    again: bool


STRATEGIES = (
    Strategy("DDP", sharded=False, again=False),
    Strategy("DDP, checkpointing", sharded=False, again=True),
    Strategy("FSDP2", sharded=True, again=False),
    Strategy("FSDP2, checkpointing", sharded=True, again=True),
)


@dataclass(frozen=True)
class Estimate:
    """memory: bytes on one device, by what it holds. micro_batch: the largest share of a device's part of the batch
    that fits at a time; 0: not even one picture fits. seconds: of one step, by what takes them. days: of the whole
    training, None where it doesn't fit; unfused_days: where torch.compile fuses nothing."""

    strategy: Strategy
    micro_batch: int
    accumulate: int
    memory: dict[str, float]
    fits: bool
    seconds: dict[str, float]
    days: float | None
    unfused_days: float | None
    bound: str

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"total_bytes": self.total}


def estimate(counts: Counts, strategy: Strategy, where: Cluster, *, batch: int, images: int, bf16: bool) -> Estimate:
    """Memory and time of a strategy. batch: pictures a step over all devices, which divide it. images: of the whole
    training."""
    share = batch // where.number
    fixed = _fixed(counts, strategy, where, bf16)
    each = counts.image.kept_again if strategy.again else counts.image.kept
    room = USABLE * where.device.memory - sum(fixed.values())
    fitting = min(share, max(0, int(room // each)))
    # Equal micro-batches, as training takes them.
    micro = max((part for part in range(1, fitting + 1) if share % part == 0), default=1)
    accumulate = share // micro
    memory = fixed | {"activations": each * micro}
    best, plain = (_seconds(counts, strategy, where, share, accumulate, bf16, fused) for fused in (True, False))
    seconds = best if where.device.compiles else plain
    days, unfused_days = (images / batch * sum(parts.values()) / DAY_S for parts in (seconds, plain))
    return Estimate(strategy, micro if fitting else 0, accumulate, memory, fitting > 0, seconds,
                    days if fitting else None, unfused_days if fitting else None,
                    max(seconds, key=seconds.__getitem__))  # fmt: skip


def _fixed(counts: Counts, strategy: Strategy, where: Cluster, bf16: bool) -> dict[str, float]:
    """What doesn't grow with the batch. Weights, gradients, moments and average are float32."""
    over = where.number if strategy.sharded else 1
    weights = 4.0 * counts.trained
    if strategy.sharded:
        # Two stages' weights at a time, the one in use and the one to come, and the gradients of one before they
        # are spread.
        working = {"gathered": counts.unit * (2.0 * (2 if bf16 else 4) + 4.0)}
    else:
        working = {"bf16 copies": 2.0 * counts.cast, "buckets": _BUCKETS if where.number > 1 else 0.0}
    return {
        "weights": weights / over + counts.frozen_bytes,
        "gradients": weights / over,
        "moments": counts.moments / over,
        "average": weights / over,
        **working,
    }


def _seconds(counts: Counts, strategy: Strategy, where: Cluster, share: int, accumulate: int,
             bf16: bool, fused: bool) -> dict[str, float]:  # fmt: skip
    """Of one step, by what bounds it."""
    device, image, number = where.device, counts.image, where.number
    forwards = 2 if strategy.again else 1
    flops = forwards * image.forward_flops + image.backward_flops
    # At best all that is kept is written once and read twice, its gradient written and read once.
    moved = (3 + 2 * forwards) * image.kept if fused else forwards * image.forward_moved + image.backward_moved
    weights = 4.0 * counts.trained
    # The optimizer reads weight, gradient and moments and writes all but the gradient; the average reads two, writes
    # one; each micro-batch adds to the gradients.
    updating = (2.0 * counts.moments + 6.0 * weights) / (number if strategy.sharded else 1) + accumulate * 3.0 * weights
    ring = (number - 1) / number
    sent = ring * 2.0 * weights
    if strategy.sharded:  # gathered before forward and backward of each micro-batch; gradients once to their owners
        sent = ring * (accumulate * 2.0 * weights * (0.5 if bf16 else 1.0) + weights)
    return {
        "arithmetic": share * flops / (device.reached * (device.bf16 if bf16 else device.fp32)),
        "memory": (share * moved + updating) / (device.moved * device.bandwidth),
        "interconnect": sent / where.wire if number > 1 else 0.0,
    }
