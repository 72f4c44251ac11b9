"""Distillation: a student that does in one call, or in a few steps, what its teacher does in many.

Guidance distillation (Meng et al. 2023, 2210.03142, section 3.1): the target is the teacher's guided x0 at x_t.
Progressive distillation (Salimans & Ho 2022, 2202.00512, section 3): the target is the x0 with which one DDIM step
lands where the teacher lands after several.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limner.core.denoiser import Network, TimeInput, network_time, per_image, split_variance
from limner.core.losses import LossTerms
from limner.core.path import Path
from limner.core.prediction import PredictionKind, from_x0, weight
from limner.core.schedule import Schedule
from limner.core.types import Cond, Denoise
from limner.errors import LimnerError

SPACING = "trailing"
"""Of a student's steps: those of N steps are among those of k N."""


@dataclass(frozen=True)
class DistillationLoss:
    """max(SNR, 1) |x0 - target|^2 (Salimans & Ho 2022, section 4), as an error of the student's raw output.

    learned_variance: the student has one; it isn't trained.
    """

    schedule: Schedule
    prediction: PredictionKind
    time_input: TimeInput = "continuous"
    learned_variance: bool = False

    def __call__(self, network: Network, x: Tensor, t: Tensor, target: Tensor, cond: Cond = None) -> LossTerms:
        """network: as in `network_denoiser`. x: x_t (B, C, H, W). t: (B,) in (0, 1]. target: (B, C, H, W), x0."""
        alpha, sigma = per_image(self.schedule.alpha(t), x), per_image(self.schedule.sigma(t), x)
        time = network_time(t, len(x), self.schedule, self.time_input).to(x.device)
        raw, _ = split_variance(network(x, time, cond).to(x.dtype), self.learned_variance)
        mse = ((raw - from_x0(target, x, alpha, sigma, self.prediction)) ** 2).flatten(1).mean(dim=1)
        log_snr = self.schedule.log_snr(t)
        return LossTerms(weight(log_snr, "truncated_snr", self.prediction).to(mse) * mse, mse, None, log_snr)


@dataclass(frozen=True)
class Strides:
    """The steps of a student, each of them `substeps` steps of its teacher.

    path: the teacher's. second_order: the teacher's steps within one of the student's are those of DPM-Solver++(2M)
    (Lu et al. 2022, 2211.01095), else of DDIM; a student is itself a DDIM teacher.
    """

    path: Path
    substeps: int
    second_order: bool = False

    @staticmethod
    def of(schedule: Schedule, steps: int, teacher_steps: int, *, second_order: bool = False) -> Strides:
        """A student's `steps` out of its teacher's. LimnerError where they don't divide them."""
        if teacher_steps % steps:
            raise LimnerError(f"distillation: {steps} steps don't divide the teacher's {teacher_steps}")
        return Strides(schedule.path(teacher_steps, SPACING), teacher_steps // steps, second_order)

    @property
    def steps(self) -> int:
        """N of the student."""
        return self.path.steps // self.substeps

    def starts(self, step: Tensor) -> Tensor:
        """The times t (B,) float64 at which the student's steps (B,) int in 0..N-1 begin."""
        return self._column("t")[step * self.substeps]

    def target(self, teacher: Denoise, x: Tensor, step: Tensor, cond: Cond = None) -> Tensor:
        """The x0 (B, C, H, W) for which one DDIM step from x, image by image the student's `step` (B,) int, ends where
        the teacher's steps do; Salimans & Ho 2022, Algorithm 2."""
        first = step.cpu() * self.substeps
        there, x0_before, h_before = x, None, None
        for here in range(self.substeps):
            index = first + here
            x0 = teacher(there, self._column("t")[index], cond).x0
            guess, h = x0, self._h(index)
            if self.second_order and x0_before is not None and h_before is not None:
                slope = torch.where(h.isfinite() & h_before.isfinite(), h / (2 * h_before), 0.0)
                guess = x0 + per_image(slope, x) * (x0 - x0_before)
            there = self._moved(there, guess, index, index + 1)
            x0_before, h_before = x0, h
        kept, gained = self._weights(x, first, first + self.substeps)
        return (there - kept * x) / gained

    def _moved(self, x: Tensor, x0: Tensor, here: Tensor, there: Tensor) -> Tensor:
        kept, gained = self._weights(x, here, there)
        return kept * x + gained * x0

    def _weights(self, x: Tensor, here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Those of x and x0 in a DDIM step between knots: sigma' / sigma, alpha' - alpha sigma' / sigma."""
        alpha, sigma = self._column("alpha"), self._column("sigma")
        ratio = sigma[there] / sigma[here]
        return per_image(ratio, x), per_image(alpha[there] - alpha[here] * ratio, x)

    def _h(self, index: Tensor) -> Tensor:
        """The step in log(alpha / sigma) after each knot; infinite from pure noise and to the clean image."""
        log_snr = self._column("log_snr")
        return (log_snr[index + 1] - log_snr[index]) / 2

    def _column(self, name: str) -> Tensor:
        return torch.tensor([getattr(knot, name) for knot in self.path], dtype=torch.float64)
