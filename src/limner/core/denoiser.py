"""From a network to a denoiser, the one thing that samplers and guidance see; and the variance of a DDPM step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from limner.core.prediction import PredictionKind, to_x0
from limner.core.schedule import Schedule
from limner.core.types import Cond, Denoise, Denoised, Knot
from limner.errors import LimnerError, suggest

TimeInput = Literal["continuous", "step"]
Variance = Literal["learned", "small", "large"]

Network = Callable[[Tensor, Tensor, Any], Tensor]
"""(x (B, C, H, W), time (B,) float32, cond) -> raw (B, C, H, W), or (B, 2C, H, W) with a learned variance."""


def per_image(value: Tensor, x: Tensor) -> Tensor:
    """A scalar or (B,) tensor, shaped to broadcast with x (B, C, H, W), in its dtype and on its device."""
    return value.to(x.device, x.dtype).reshape(-1, *[1] * (x.dim() - 1))


def network_time(t: Tensor, batch: int, schedule: Schedule, time_input: TimeInput = "continuous") -> Tensor:
    """What a network is told of time, (B,) float32: t itself, or the DDPM step t T - 1 (fractional between steps)."""
    if time_input == "step":
        if schedule.steps is None:
            raise LimnerError("time_input 'step': this schedule is continuous and has no steps; use 'continuous'")
        t = (t.double() * schedule.steps - 1).clamp(min=0)
    return t.to(torch.float32).expand(batch)


def split_variance(raw: Tensor, learned_variance: bool) -> tuple[Tensor, Tensor | None]:
    """The prediction, and the variance fraction (v + 1) / 2 of a network with a learned variance."""
    if not learned_variance:
        return raw, None
    prediction, v = raw.chunk(2, dim=1)
    return prediction, (v + 1) / 2


def network_denoiser(
    network: Network,
    schedule: Schedule,
    prediction: PredictionKind,
    *,
    time_input: TimeInput = "continuous",
    learned_variance: bool = False,
) -> Denoise:
    """Anybody's network as a denoiser.

    network: (x (B, C, H, W), time (B,) float32, cond) -> raw; see `Network`.
    LimnerError when the output's shape does not fit, and for epsilon where alpha(t) = 0.
    """

    def denoise(x: Tensor, t: Tensor, cond: Cond = None, /) -> Denoised:
        raw = network(x, network_time(t, len(x), schedule, time_input).to(x.device), cond)
        channels = x.shape[1] * (2 if learned_variance else 1)
        if raw.shape != (len(x), channels, *x.shape[2:]):
            raise LimnerError(
                f"network output {tuple(raw.shape)} for input {tuple(x.shape)}: should have {channels} channels"
                f"{' (prediction and variance)' if learned_variance else ''} and the same size"
            )
        raw, variance_fraction = split_variance(raw.to(x.dtype), learned_variance)
        alpha, sigma = per_image(schedule.alpha(t), x), per_image(schedule.sigma(t), x)
        return Denoised(to_x0(raw, x, alpha, sigma, prediction), variance_fraction)

    return denoise


class Posterior(NamedTuple):
    """q(x_s | x_t, x0) = N(x_weight x_t + x0_weight x0, variance), and beta = Var(x_t | x_s)."""

    x_weight: float
    x0_weight: float
    variance: float
    beta: float


def posterior(here: Knot, there: Knot) -> Posterior:
    """One DDPM step from t (here) to s (there), between any two knots; Ho et al. 2020, eq. 6-7.

    | here | paper |
    | --- | --- |
    | beta = sigma_t^2 (1 - SNR_t / SNR_s) | beta_t = 1 - alpha-bar_t / alpha-bar_s |
    | variance = beta sigma_s^2 / sigma_t^2 | beta-tilde_t |
    | x0_weight = alpha_s beta / sigma_t^2 | sqrt(alpha-bar_{t-1}) beta_t / (1 - alpha-bar_t) |
    | x_weight = alpha_t sigma_s^2 / (alpha_s sigma_t^2) | sqrt(alpha_t) (1 - alpha-bar_{t-1}) / (1 - alpha-bar_t) |
    """
    lost = -math.expm1(here.log_snr - there.log_snr)  # 1 - SNR_t / SNR_s, without cancellation
    ratio = there.sigma**2 / here.sigma**2
    return Posterior(here.alpha / there.alpha * ratio, there.alpha * lost, lost * there.sigma**2, lost * here.sigma**2)


def step_log_variance(
    here: Knot, there: Knot, variance: Tensor | Literal["small", "large"], *, before: Knot | None = None
) -> Tensor:
    """The log variance of a DDPM step: log beta-tilde ("small"), log beta ("large"), or between them by a fraction
    (Nichol & Dhariwal 2021, eq. 15).

    At the step to the clean image beta-tilde is 0; there, as in guided-diffusion, "small" and "large" are the
    beta-tilde of the step before, from the knot `before` to `here` (beta itself where the path has one step).
    """
    step = posterior(here, there)
    small = step.variance
    if there.sigma == 0:
        small = posterior(before, here).variance if before is not None else step.beta
    low, high = math.log(small), math.log(step.beta)
    if isinstance(variance, Tensor):
        return low + variance * (high - low)
    return torch.tensor(high if variance == "large" and there.sigma > 0 else low, dtype=torch.float64)


def chosen_variance(out: Denoised, variance: Variance | None) -> Tensor | Literal["small", "large"]:
    """The variance asked for, as `step_log_variance` takes it; None is "learned" where the denoiser has it, else
    "small". LimnerError for an unknown one, and for "learned" where there is none."""
    if variance is None:
        return "small" if out.variance_fraction is None else out.variance_fraction
    if variance == "small" or variance == "large":
        return variance
    if variance != "learned":
        raise LimnerError(f"unknown variance '{variance}'{suggest(variance, ['learned', 'small', 'large'])}")
    if out.variance_fraction is None:
        raise LimnerError("variance 'learned': this model has no learned variance; use 'small' or 'large'")
    return out.variance_fraction
