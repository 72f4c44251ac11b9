"""Steps whose loss is far above what is usual, counted where they are computed."""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 5.0
DECAY = 0.99
WARMUP = 50
"""Steps before which nothing is usual yet."""


class Spikes:
    """Counts steps whose objective, the mean over all processes, exceeds FACTOR times its running average.

    state: (3,) count, the decaying sum of objectives, steps seen; it stays on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.state = torch.zeros(3, device=device)

    def see(self, objective: Tensor) -> None:
        """Take in a step's objective (). One that isn't finite is left out: bad steps are counted elsewhere."""
        count, total, steps = self.state.unbind()
        usual = total / (1 - DECAY**steps).clamp_min(1e-6)
        value = objective.detach().float()
        spike = (steps >= WARMUP) & (usual > 0) & (value > FACTOR * usual)
        value = torch.where(spike, FACTOR * usual, value)  # or one spike would hide the next
        seen = torch.stack([count + spike, DECAY * total + (1 - DECAY) * value, steps + 1])
        self.state = torch.where(torch.isfinite(objective), seen, self.state)

    @property
    def count(self) -> int:
        """So far; makes the host wait for the device."""
        return int(self.state[0])
