"""Pictures along the way: from fixed noise and fixed conditions, so that only the model changes between two of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from limner import build
from limner.config import RunConfig
from limner.core import guidance
from limner.core.noise import initial_noise, step_noise
from limner.core.samplers import SAMPLERS
from limner.core.types import Denoise
from limner.nn.conditioners import Embedded
from limner.outputs import grid, png
from limner.training.draws import Source

PREVIEW_SEED = 0
STATISTICS_ROWS = 1024


def sample(model: build.Model, config: RunConfig, cond: Mapping[str, Any], count: int) -> Tensor:
    """`count` samples (N, C, H, W) in the model's space, by the run's own sampling defaults."""
    device = next(model.parameters()).device
    schedule = build.schedule(config)
    path = schedule.path(config.sampling.steps, config.sampling.spacing)
    shape = build.space_shape(config)
    noise = initial_noise(PREVIEW_SEED, range(count), shape, device=device)
    return SAMPLERS[config.sampling.sampler](
        guided(model, config, model.embed({}, count)),
        noise * path[0].sigma,
        path,
        cond=model.embed(cond, count),
        noise=step_noise(PREVIEW_SEED, range(count), shape, device=device),
    )


def guided(model: build.Model, config: RunConfig, null: Embedded) -> Denoise:
    """The model's denoiser with the guidance that the recipe asks for; `null` is the null condition of the batch."""
    settings = config.sampling
    plain = build.denoiser(model, config)
    denoise = plain
    if config.conditions:
        denoise = guidance.classifier_free(plain, settings.guidance, null=null, join=Embedded.cat)
        denoise = guidance.interval(denoise, plain, *settings.interval)
        denoise = guidance.rescaled(denoise, settings.rescale)
    clip = settings.clip and config.space.kind == "pixels"
    return guidance.clipped(denoise) if clip else denoise


def to_uint8(images: Tensor) -> npt.NDArray[np.uint8]:
    """Images (N, C, H, W) in [-1, 1] as uint8 (N, H, W, C)."""
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def save(path: Path, images: npt.NDArray[np.uint8], captions: list[str]) -> None:
    """A captioned PNG grid."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(grid(list(images), captions)))


def channel_statistics(images: npt.NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation by channel, in units of [-1, 1]: a shift of colour shows here first."""
    scaled = images.reshape(-1, images.shape[-1]) / 127.5 - 1.0
    return [round(float(x), 4) for x in scaled.mean(0)], [round(float(x), 4) for x in scaled.std(0)]


def data_statistics(data: Source) -> dict[str, list[float]]:
    """`data_mean` and `data_std` of up to 1,024 rows, to stand beside the previews' own."""
    mean, std = channel_statistics(data.uint8(data.train[:STATISTICS_ROWS]))
    return {"data_mean": mean, "data_std": std}
