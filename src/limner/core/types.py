"""What samplers and guidance see: a denoiser, a condition, a path. Shapes: x is (B, C, H, W), float, data in [-1, 1]."""

from __future__ import annotations

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
    variance_fraction: (B, C, H, W) in [0, 1] or None: where the step's log variance lies between log beta-tilde (0)
        and log beta (1), Nichol & Dhariwal 2021, eq. 15. A fraction, since beta depends on the path's steps.
    """

    x0: Tensor
    variance_fraction: Tensor | None = None


class Denoise(Protocol):
    """x_t (B, C, H, W), t (a scalar, or (B,)) in [0, 1], and the condition."""

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None, /) -> Denoised: ...


class Knot(NamedTuple):
    """One point of a path: x_t = alpha x0 + sigma eps at time t. Python floats, from float64 tables."""

    t: float
    alpha: float
    sigma: float


LogProb = Callable[[Tensor, Tensor], Tensor]
"""log p(y | x_t), (x_t (B, C, H, W), t) -> (B,), differentiable in x_t; y is bound in."""

Noise = Callable[[int], Tensor]
"""Noise of sampler step k (0, 1, ...), shaped like x."""


@dataclass(frozen=True)
class Step:
    """What `on_step` is told after each step: 1-based index of N, the state and the predicted clean image."""

    index: int
    total: int
    t: float
    x: Tensor
    x0: Tensor
