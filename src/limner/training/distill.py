"""The task of a student: one round of distillation, from one teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from limner import build
from limner.config import RunConfig
from limner.core import guidance
from limner.core.denoiser import per_image
from limner.core.distill import DistillationLoss, Strides
from limner.core.losses import LossTerms
from limner.core.types import Denoise
from limner.nn.conditioners import Embedded
from limner.training.draws import Part, Source
from limner.training.tasks import DiffusionTask, encoded


class DistillTask(DiffusionTask):
    """Learns to do at once what its teacher does by guidance, or in several steps.

    strides: the student's steps among the teacher's; None: guidance is learnt alone, at every time. teacher,
    taught: a trained model and its recipe, whose guidance interval, rescaling and clipping the student takes over.
    """

    def __init__(self, model: build.Model, config: RunConfig, data: Source, teacher: build.Model, taught: RunConfig,
                 strides: Strides | None) -> None:  # fmt: skip
        super().__init__(model, config, data)
        assert config.distillation is not None
        self.teacher, self.taught, self.strides = teacher, taught, strides
        self.range = config.distillation.guidance
        process, self.schedule = config.process, build.schedule(config)
        self.distilled = DistillationLoss(self.schedule, process.prediction, process.time_input,
                                          process.learned_variance)  # fmt: skip

    def _terms(self, model: build.Model, batch: Mapping[str, Any], part: Part, seed: int, t: Tensor,
               drop: Mapping[str, Tensor]) -> LossTerms:  # fmt: skip
        x0 = encoded(batch, self.config)
        eps = part.noise(seed, tuple(x0.shape[1:]), x0.device)
        cond, scale = self.config.conditions_in(batch), self._scales(part, seed, x0.device)
        step = torch.zeros(len(x0), dtype=torch.int64)
        if self.strides is not None:
            step = (self.strides.steps * (1 - t)).long().clamp(max=self.strides.steps - 1)
            t = self.strides.starts(step)
        x = per_image(self.schedule.alpha(t), x0) * x0 + per_image(self.schedule.sigma(t), x0) * eps
        target = self._target(x, t, step, cond, drop, scale)
        return self.distilled(lambda x, time, _: model(x, time, cond, drop, scale), x, t, target)

    def _scales(self, part: Part, seed: int, device: torch.device) -> Tensor | None:
        """The guidance scales (B,) of these rows, one in each stratum of the range."""
        if self.range is None:
            return None
        chance = part.generator(seed, "guidance")
        share = (torch.randperm(part.total, generator=chance) + torch.rand(part.total, generator=chance)) / part.total
        low, high = self.range
        return (low + (high - low) * part.of(share)).to(device)

    @torch.no_grad()
    def _target(self, x: Tensor, t: Tensor, step: Tensor, cond: Mapping[str, Any], drop: Mapping[str, Tensor],
                scale: Tensor | None) -> Tensor:  # fmt: skip
        """The x0 (B, C, H, W) that the student should predict at x and t."""
        if next(self.teacher.parameters()).device != x.device or self.teacher.training:
            build.ready(self.teacher, x.device)
        size = (x.shape[2], x.shape[3])
        tau = self.teacher.embed(cond, len(x), drop, size)
        always = {name: cond[name] for name in self.taught.always if name in cond}
        denoise = self._guided(scale, partial(self.teacher.embed, always, len(x), size=size))
        if self.config.space.kind == "pixels" and self.taught.sampling.clip:
            denoise = guidance.clipped(denoise)
        if self.strides is None:
            return denoise(x, t, tau).x0
        return self.strides.target(denoise, x, step, tau)

    def _guided(self, scale: Tensor | None, null: Any) -> Denoise:
        """The teacher with these guidance scales: it is told them, or guides by two calls."""
        plain = build.denoiser(self.teacher, self.taught)
        if scale is None:
            return plain
        if self.taught.distillation is not None and self.taught.distillation.guidance is not None:
            return guidance.told(plain, scale, embed=told)
        both = guidance.classifier_free(plain, scale, null=null(), join=Embedded.cat)
        sampling = self.taught.sampling
        return guidance.rescaled(guidance.interval(both, plain, *sampling.interval), sampling.rescale)


def told(tau: Embedded, scale: Tensor) -> Embedded:
    """tau with guidance scales (B,)."""
    return replace(tau, guidance=scale)
