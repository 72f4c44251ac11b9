"""Guidance: a denoiser around a denoiser. Wrappers compose with each other and with every sampler.

Scales: s = 1 is off for everything that extrapolates from a weaker prediction, u + s (c - u). The classifier's scale
is its own: 0 is off. Predictions are x0's; since eps and v are affine in x0 at given x_t, extrapolating those with
the same s gives the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from limner.core.types import Cond, Denoise, Denoised

Join = Callable[[Sequence[Cond]], Cond]
"""Conditions of several batches, made one."""


def classifier_free(denoise: Denoise, scale: float, *, null: Cond = None, join: Join | None = None) -> Denoise:
    """Classifier-free guidance, Ho & Salimans 2022 (2207.12598), eq. 6: u + s (c - u). The paper's w is s - 1.

    null: what u is conditioned on: the null condition, or a negative one.
    join: makes one condition of [cond, null], so that c and u are one call of the network; None: two calls.
    s = 1 calls c alone, s = 0 u alone. The variance is that of c.
    """

    def guided(x: Tensor, t: Tensor, cond: Cond = None, /) -> Denoised:
        if scale in (0, 1):
            return denoise(x, t, cond if scale == 1 else null)
        c, u = _pair(denoise, x, t, cond, null, join)
        return replace(c, x0=u + scale * (c.x0 - u), plain=_plain(c))

    return guided


def _pair(denoise: Denoise, x: Tensor, t: Tensor, cond: Cond, null: Cond, join: Join | None) -> tuple[Denoised, Tensor]:
    """The conditional prediction, and the x0 of the null one."""
    if join is None:
        return denoise(x, t, cond), denoise(x, t, null).x0
    both = denoise(torch.cat([x, x]), torch.cat([t, t]) if t.dim() else t, join([cond, null]))
    fraction, plain = both.variance_fraction, both.plain
    c = Denoised(
        both.x0[: len(x)],
        None if fraction is None else fraction[: len(x)],
        None if plain is None else plain[: len(x)],
    )
    return c, both.x0[len(x) :]


def _plain(out: Denoised) -> Tensor:
    return out.x0 if out.plain is None else out.plain
