"""What samplers and guidance see: a denoiser, a condition, a path. x is (B, C, H, W), float, data in [-1, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

Cond = Any
"""tau(y), or a mapping by modality: opaque here. None stands for the null condition."""


@dataclass(frozen=True)
class Denoised:
    """What a denoiser knows of the clean image.

    x0: (B, C, H, W), the expected clean image given x_t.
    variance_fraction: (B, C, H, W) or None: where the step's log variance lies between log beta-tilde (0) and
        log beta (1), Nichol & Dhariwal 2021, eq. 15. A fraction, since beta depends on the path's steps. Networks
        are trained towards [0, 1] and not held to it.
    plain: (B, C, H, W) or None: x0 as it was before guidance; guidance sets it, and what compares with it reads it.
    """

    x0: Tensor
    variance_fraction: Tensor | None = None
    plain: Tensor | None = None


class Denoise(Protocol):
    """x_t (B, C, H, W), t (a scalar, or (B,)) in [0, 1], and the condition."""

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None, /) -> Denoised: ...


class Knot(NamedTuple):
    """One point of a path: x_t = alpha x0 + sigma eps at time t. Python floats, from float64 tables."""

    t: float
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """lambda = 2 log(alpha / sigma); -inf for pure noise, +inf for the clean image."""
        if self.alpha == 0:
            return -math.inf
        return math.inf if self.sigma == 0 else 2 * (math.log(self.alpha) - math.log(self.sigma))


LogProb = Callable[[Tensor, Tensor], Tensor]
"""log p(y | x_t), (x_t (B, C, H, W), t) -> (B,), differentiable in x_t; y is bound in."""

Gradient = Callable[[Tensor, Tensor, Cond], Tensor]
"""s grad log p(y | x_t) by x_t, (x_t (B, C, H, W), t, cond) -> (B, C, H, W)."""

Noise = Callable[[int], Tensor]
"""Noise of sampler step k (0, 1, ...), shaped like x."""


@dataclass(frozen=True)
class Step:
    """What `on_step` is told after each step: 1-based index of N, the state at time t and the predicted clean image."""

    index: int
    total: int
    t: float
    x: Tensor
    x0: Tensor


OnStep = Callable[[Step], None]
