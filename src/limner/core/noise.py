"""Noise by image number: that of image k depends on (seed, k) and the sampler's step alone, whatever the batch,
the process or the device. Drawn on the CPU by a counter-based generator (Philox: key = seed and k, counter = step)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from limner.core.types import Noise

Device = torch.device | str
_WORD = 2**64


def _normal(seed: int, image: int, draw: int, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.Philox(key=[seed % _WORD, image % _WORD], counter=[0, 0, 0, draw])
    return np.random.Generator(generator).standard_normal(shape, dtype=np.float32)


def _batch(
    seed: int, images: list[int], draw: int, shape: tuple[int, ...], dtype: torch.dtype, device: Device
) -> Tensor:
    noise = np.stack([_normal(seed, image, draw, shape) for image in images]) if images else np.empty((0, *shape))
    return torch.from_numpy(noise).to(device, dtype)


def initial_noise(
    seed: int,
    indices: Iterable[int],
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
) -> Tensor:
    """x_1 of the images with these numbers: (B, *shape), standard normal; shape is one image's (C, H, W)."""
    return _batch(seed, list(indices), 0, tuple(shape), dtype, device)


def step_noise(
    seed: int,
    indices: Iterable[int],
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
) -> Noise:
    """`noise(k) -> (B, *shape)` for the steps k = 0, 1, ... of a stochastic sampler; independent of `initial_noise`."""
    images = list(indices)
    return lambda step: _batch(seed, images, step + 1, tuple(shape), dtype, device)


def slerp(first: Tensor, last: Tensor, share: Tensor) -> Tensor:
    """Noise on the way between two (1, C, H, W), at each share (N,) of it: (N, C, H, W), as likely as either end
    (Shoemake 1985). The same noise twice stays what it is."""
    a, b = (noise.flatten().double() for noise in (first, last))
    angle = torch.acos((torch.dot(a, b) / (a.norm() * b.norm())).clamp(-1, 1))
    if angle < 1e-6:
        return first.expand(len(share), *first.shape[1:]).clone()
    way = share.double()[:, None]
    made = (torch.sin((1 - way) * angle) * a + torch.sin(way * angle) * b) / torch.sin(angle)
    return made.to(first).view(-1, *first.shape[1:])
