"""The power-function average of the weights (Karras et al. 2024, arXiv:2312.02696, section 3.1 and appendix C)."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from limner.training.sharded import local


def gamma_of(relative_std: float) -> float:
    """The exponent of a profile t^gamma on [0, 1] whose standard deviation is `relative_std` (0 to 0.288).

    Inverts eq. 126, relative_std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)); the largest real root is the one that
    is meant.
    """
    inverse = relative_std**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


class EMA:
    """Keeps `module`, a copy whose weights average those of the module in training.

    After images n the average is the integral of t^gamma theta(t) over the training so far, normalised: its length
    is a fixed share of the training, so that the random start is forgotten at the same pace in a short run and in a
    long one. Updated by eq. 127,

        average <- beta average + (1 - beta) theta,   beta = (1 - images_since / images)^(gamma + 1)

    which is exact for weights that stand still between updates; the first update copies. Buffers are copied, and
    parameters that aren't trained are shared with the source.
    """

    def __init__(self, source: nn.Module, relative_std: float = 0.05) -> None:
        self.gamma = gamma_of(relative_std)
        frozen: dict[int, nn.Parameter] = {id(p): p for p in source.parameters() if not p.requires_grad}
        self.module = copy.deepcopy(source, memo=frozen).eval().requires_grad_(False)
        self.pair(source)

    def pair(self, source: nn.Module) -> None:
        """Find the parameters again, after both modules were cut over processes."""
        pairs = zip(self.module.parameters(), source.parameters(), strict=True)
        self._parameters = [(average, current) for average, current in pairs if average is not current]
        self._buffers = list(zip(self.module.buffers(), source.buffers(), strict=True))

    @torch.no_grad()
    def update(self, images: int, images_since: int) -> None:
        """Take in the source's weights at `images` seen, `images_since` of them after the previous update."""
        beta = (1.0 - images_since / images) ** (self.gamma + 1.0) if images > images_since else 0.0
        if self._parameters:
            averages: list[Tensor] = [local(average) for average, _ in self._parameters]
            torch._foreach_lerp_(averages, [local(current).data for _, current in self._parameters], 1.0 - beta)
        for average, current in self._buffers:
            average.copy_(current)
