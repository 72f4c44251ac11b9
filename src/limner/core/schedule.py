"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, t from 0 (data) to 1 (noise).

The log-SNR lambda(t) = 2 log(alpha / sigma), falling in t, is the one thing a schedule defines; everything else
follows. All arithmetic is float64 on the CPU; results come back with the dtype and device of the argument.
`alpha` is the square root of the papers' alpha-bar.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from limner.core import path as spacings
from limner.core.path import Path
from limner.core.types import Knot
from limner.errors import LimnerError

__all__ = [
    "CosineSchedule",
    "DiscreteCosineSchedule",
    "DiscreteSchedule",
    "LinearSchedule",
    "Path",
    "RectifiedFlowSchedule",
    "ScaledLinearSchedule",
    "Schedule",
    "TableSchedule",
]

CLEAN = Knot(0.0, 1.0, 0.0)
VIRTUAL_STEPS = 1000
"""T for a continuous schedule where a spacing asks for DDPM steps."""
LOG_SNR_LIMIT = 11.0
"""Where log-SNR spacings place knots: at +11 sigma is 0.004, half an 8-bit level; at -11 alpha is as small."""


def _float64(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).detach().cpu()


def _like(result: Tensor, value: Tensor | float) -> Tensor:
    """In the dtype and on the device of the argument; float64 on the CPU for a Python number."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return result
    return result.to(value.device, value.dtype)


class Schedule(ABC):
    """A variance-preserving schedule, alpha^2 + sigma^2 = 1, unless a subclass says otherwise.

    steps: T of a discrete schedule, whose DDPM step i sits at t = (i + 1) / T; None for a continuous one.
    """

    @property
    def steps(self) -> int | None:
        return None

    @abstractmethod
    def _log_snr(self, t: Tensor) -> Tensor:
        """lambda(t) for float64 t in [0, 1]; may be infinite at the ends."""

    @abstractmethod
    def _t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The inverse, for any float64 lambda: clamped to [0, 1]."""

    def _alpha_of(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(log_snr).sqrt()

    def _sigma_of(self, log_snr: Tensor) -> Tensor:
        return self._alpha_of(-log_snr)  # alpha and sigma change places when the SNR is inverted

    def log_snr(self, t: Tensor | float) -> Tensor:
        """lambda = 2 log(alpha / sigma) at t in [0, 1]; shaped like t. LimnerError outside [0, 1]."""
        t64 = _float64(t)
        if not bool(((t64 >= 0) & (t64 <= 1)).all()):
            raise LimnerError(f"t = {t64.flatten().tolist()[:4]}: should be from 0 (data) to 1 (noise)")
        return _like(self._log_snr(t64), t)

    def alpha(self, t: Tensor | float) -> Tensor:
        """How much of the clean image is in x_t: sqrt(alpha-bar); shaped like t."""
        return _like(self._alpha_of(self.log_snr(_float64(t))), t)

    def sigma(self, t: Tensor | float) -> Tensor:
        """The standard deviation of the noise in x_t: sqrt(1 - alpha-bar); shaped like t."""
        return _like(self._sigma_of(self.log_snr(_float64(t))), t)

    def t_of_log_snr(self, log_snr: Tensor | float) -> Tensor:
        """The inverse of `log_snr`; a log-SNR that the schedule never reaches gives its nearest end."""
        return _like(self._t_of_log_snr(_float64(log_snr)).clamp(0, 1), log_snr)

    def knot(self, t: float) -> Knot:
        """The knot at t. At t = 0 it is the clean image, alpha = 1 and sigma = 0, even where the log-SNR is clipped."""
        if t <= 0:
            return CLEAN
        log_snr = self.log_snr(t)
        return Knot(float(t), float(self._alpha_of(log_snr)), float(self._sigma_of(log_snr)))

    def path(self, steps: int, spacing: str = "log_snr") -> Path:
        """The knots that a sampler of N = `steps` steps visits, ending at the clean image (alpha = 1, sigma = 0).

        spacing: "log_snr" (uniform in log-SNR), "karras" (rho = 7), "trailing", "leading", "linspace", "leading+1"
            (CompVis' DDIM: ends at the alpha-bar of DDPM step 0, and may have more steps than asked), or a respacing
            string of guided-diffusion ("25", "10,15,20", "ddim25"), which sets N itself; see `core/path.py`.
            On a continuous schedule "trailing" and "linspace" are uniform in t; other discrete spacings take T = 1000.
        The first two start at t = 1, and place the rest within +-`LOG_SNR_LIMIT`, where the picture is decided.
        LimnerError for an unknown spacing, steps < 1, and more steps than the schedule has.
        """
        spacings.check(spacing, steps, self.steps)
        if spacing in spacings.LOG_SNR_SPACINGS:
            times = self._log_snr_times(steps, spacing)
        elif self.steps is None and spacing in ("trailing", "linspace"):
            times = [1 - k / steps for k in range(steps)]
        else:
            total = self.steps or VIRTUAL_STEPS
            spacings.check(spacing, steps, total)
            times = [(i + 1) / total for i in reversed(spacings.step_indices(total, steps, spacing))]
            if spacing == "leading+1":
                return Path((*map(self.knot, times), self.knot(1 / total)))
        return Path((*map(self.knot, times), CLEAN))

    def _log_snr_times(self, steps: int, spacing: str) -> list[float]:
        low = max(float(self.log_snr(1.0)), -LOG_SNR_LIMIT)
        high = min(float(self.log_snr(1 / (self.steps or VIRTUAL_STEPS))), LOG_SNR_LIMIT)
        if low >= high:
            raise LimnerError(f"spacing '{spacing}': the schedule has one noise level only; 'trailing' would do")
        grid = torch.tensor(spacings.log_snr_grid(low, high, steps, spacing), dtype=torch.float64)
        return [1.0, *self.t_of_log_snr(grid).tolist()[1:]]


class DiscreteSchedule(Schedule):
    """A table of T steps, as DDPM has it.

    betas, alphas_bar: float64 tensors (T,). Between the knots t = (i + 1) / T the log-SNR is linear in t; where a
    segment ends in an infinite log-SNR (t = 0; t = 1 with zero terminal SNR) sigma^2 is linear in t instead.
    """

    def __init__(self, betas: np.ndarray, *, zero_terminal_snr: bool = False) -> None:
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise LimnerError(f"schedule: betas from {betas.min():g} to {betas.max():g}, should be above 0, at most 1")
        if zero_terminal_snr:
            betas = _zero_terminal_snr(betas)
        self.betas = torch.from_numpy(betas)
        self.alphas_bar = torch.from_numpy(np.cumprod(1 - betas))
        self._signal = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_bar])  # at t = 0, 1/T, ..., 1
        self._noise = 1 - self._signal
        self._table = self._signal.log() - self._noise.log()

    @property
    def steps(self) -> int:
        return len(self.betas)

    def _log_snr(self, t: Tensor) -> Tensor:
        position = t * self.steps
        left = position.floor().long().clamp(0, self.steps - 1)
        linear, signal, noise = (
            torch.lerp(table[left], table[left + 1], position - left)
            for table in (self._table, self._signal, self._noise)
        )
        return torch.where(self._finite(left), linear, signal.log() - noise.log())

    def _t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        left = (torch.searchsorted(-self._table, -log_snr) - 1).clamp(0, self.steps - 1)

        def weight(value: Tensor, table: Tensor) -> Tensor:
            return (value - table[left]) / (table[left + 1] - table[left])

        signal = weight(torch.sigmoid(log_snr), self._signal)
        noise = weight(torch.sigmoid(-log_snr), self._noise)
        by_variance = torch.where(log_snr > 0, noise, signal)  # the smaller of the two, for the digits
        inside = torch.where(self._finite(left), weight(log_snr, self._table), by_variance)
        return (left + inside.clamp(0, 1)) / self.steps

    def _finite(self, left: Tensor) -> Tensor:
        return self._table[left].isfinite() & self._table[left + 1].isfinite()


def _zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """sqrt(alpha-bar) shifted and scaled to end at 0 and start where it did; Lin et al. 2024 (2305.08891), Alg. 1."""
    alpha = np.sqrt(np.cumprod(1 - betas))
    if len(alpha) < 2:
        raise LimnerError("zero terminal SNR: needs a schedule of at least 2 steps")
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alphas_bar = alpha**2
    return 1 - np.concatenate([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])


class LinearSchedule(DiscreteSchedule):
    """DDPM: beta linear in the step, its ends scaled by 1000 / T (Ho et al. 2020; Nichol & Dhariwal 2021)."""

    def __init__(
        self, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, zero_terminal_snr: bool = False
    ) -> None:
        scale = 1000 / _at_least_one(steps)
        if not 0 < beta_end * scale <= 1:
            raise LimnerError(
                f"linear schedule of {steps} steps: beta would end at {beta_end * scale:g}, above 1; "
                f"use at least {math.ceil(1000 * beta_end)} steps, or a cosine schedule"
            )
        betas = np.linspace(beta_start * scale, beta_end * scale, steps)
        super().__init__(betas, zero_terminal_snr=zero_terminal_snr)


class ScaledLinearSchedule(DiscreteSchedule):
    """LDM: sqrt(beta) linear in the step (Rombach et al. 2022, `linear` in its code)."""

    def __init__(
        self, steps: int = 1000, beta_start: float = 0.0015, beta_end: float = 0.0195, zero_terminal_snr: bool = False
    ) -> None:
        betas = np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), _at_least_one(steps)) ** 2
        super().__init__(betas, zero_terminal_snr=zero_terminal_snr)


class DiscreteCosineSchedule(DiscreteSchedule):
    """alpha-bar(u) = cos^2(pi/2 (u + s) / (1 + s)) at u = 0, 1/T, ..., beta capped; Nichol & Dhariwal 2021, eq. 17."""

    def __init__(
        self, steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999, zero_terminal_snr: bool = False
    ) -> None:
        u = np.arange(_at_least_one(steps) + 1) / steps
        alphas_bar = np.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
        betas = np.minimum(1 - alphas_bar[1:] / alphas_bar[:-1], max_beta)
        super().__init__(betas, zero_terminal_snr=zero_terminal_snr)


class TableSchedule(DiscreteSchedule):
    """The betas themselves, one a step."""

    def __init__(self, betas: Sequence[float], zero_terminal_snr: bool = False) -> None:
        super().__init__(np.asarray(betas, dtype=np.float64), zero_terminal_snr=zero_terminal_snr)


def _at_least_one(steps: int) -> int:
    if steps < 1:
        raise LimnerError(f"schedule: steps {steps}, should be at least 1")
    return steps


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """alpha = cos(pi t / 2), so lambda = -2 log tan(pi t / 2); then lambda + 2 log(shift), clipped.

    shift: 64 / resolution in simple diffusion (Hoogeboom et al. 2023, eq. 4); below 1 adds noise.
    log_snr_min, log_snr_max: the clip. It leaves alpha(0) = 1 - 1.5e-7 at the default 15; the last knot of a path is
    the clean image exactly (alpha = 1, sigma = 0) all the same, so what the clip leaves never stays in a picture.
    """

    shift: float = 1.0
    log_snr_max: float = 15.0
    log_snr_min: float = -15.0

    def __post_init__(self) -> None:
        _check_shift(self.shift)
        if not self.log_snr_min < self.log_snr_max:
            raise LimnerError(
                f"cosine schedule: log_snr_min {self.log_snr_min} not below log_snr_max {self.log_snr_max}"
            )

    def _log_snr(self, t: Tensor) -> Tensor:
        cosine = -2 * torch.tan(math.pi / 2 * t).clamp(min=0).log()
        cosine = torch.where(t == 1, -math.inf, cosine)  # tan(pi / 2) is finite in floating point
        return (cosine + 2 * math.log(self.shift)).clamp(self.log_snr_min, self.log_snr_max)

    def _t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        clipped = log_snr.clamp(self.log_snr_min, self.log_snr_max)
        inner = 2 / math.pi * torch.atan(torch.exp(-(clipped - 2 * math.log(self.shift)) / 2))
        return torch.where(log_snr <= self.log_snr_min, 1.0, torch.where(log_snr >= self.log_snr_max, 0.0, inner))


@dataclass(frozen=True)
class RectifiedFlowSchedule(Schedule):
    """alpha = 1 - t, sigma = t (Liu et al. 2023): not variance preserving. lambda is shifted by 2 log(shift), which
    maps t to t / (t + shift (1 - t)); Stable Diffusion 3's shift m is 1 / m here."""

    shift: float = 1.0

    def __post_init__(self) -> None:
        _check_shift(self.shift)

    def _log_snr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log1p(-t) - t.log() + math.log(self.shift))

    def _t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(math.log(self.shift) - log_snr / 2)

    def _alpha_of(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(log_snr / 2)


def _check_shift(shift: float) -> None:
    if not shift > 0:
        raise LimnerError(f"schedule: shift {shift}, should be above 0 (1 is off, below 1 adds noise)")
