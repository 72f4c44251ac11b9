"""Painting in a picture with a model that never learned to: RePaint."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from limner.core.path import Path
from limner.core.samplers import ddpm
from limner.core.types import Cond, Denoise, Knot, Noise, OnStep, Step
from limner.errors import LimnerError

RESAMPLES = 5


def repaint(
    denoise: Denoise,
    x: Tensor,
    path: Path,
    known: Tensor,
    hole: Tensor,
    *,
    cond: Cond = None,
    noise: Noise,
    on_step: OnStep | None = None,
    resamples: int = RESAMPLES,
) -> Tensor:
    """RePaint, Lugmayr et al. 2022 (2201.09865), Algorithm 1: DDPM steps, after each of which what is known takes the
    place of what was drawn there, at the same noise.

    known: x0 (B, C, H, W), of which all but the hole counts. hole: (B, 1, H, W), 1 where x0 is to be drawn.
    resamples: U, how often each step is taken, each time after noise has led back to where it began: so that the drawn
    part comes to fit the known one. noise(k) is asked for k = 0, 1, ... in the order of use.

    | here | paper |
    | --- | --- |
    | there.alpha known + there.sigma noise | x_{t-1}^known, line 5 |
    | ddpm over one pair of knots | x_{t-1}^unknown, line 7 |
    | hole unknown + (1 - hole) known | x_{t-1}, line 8, where m is 1 - hole |
    | back | x_t ~ N(sqrt(1 - beta) x_{t-1}, beta I), line 10 |
    """
    if resamples < 1:
        raise LimnerError(f"resamples: {resamples}, should be 1 or more")
    draws = iter(range(path.steps * resamples * 3))
    fresh = lambda _=0: noise(next(draws))  # noqa: E731
    for k, (here, there) in enumerate(path.pairs()):
        pair, x0 = Path((here, there)), x
        last = there.sigma == 0
        for repeat in range(1 if last else resamples):
            x = back(x, there, here, fresh()) if repeat else x
            seen: list[Tensor] = []
            x = ddpm(denoise, x, pair, cond=cond, noise=fresh, on_step=lambda step, seen=seen: seen.append(step.x0))
            x0 = seen[-1]
            there_known = there.alpha * known + (0 if last else there.sigma * fresh())
            x = torch.lerp(there_known, x, hole.to(x))
        if on_step is not None:
            on_step(Step(k + 1, path.steps, there.t, x, x0))
    return x


def back(x: Tensor, clean: Knot, noisy: Knot, noise: Tensor) -> Tensor:
    """x at the knot `clean`, noised up to the knot `noisy`."""
    ratio = noisy.alpha / clean.alpha
    return ratio * x + math.sqrt(max(noisy.sigma**2 - (ratio * clean.sigma) ** 2, 0.0)) * noise
