"""Group norm with what follows it, AdaGN's scale and shift and SiLU, in one pass over the picture.

PyTorch's own group norm is slow on a CPU in channels_last, and each following operation reads and writes the whole
picture again. Here the norm and the modulation become one affine map per picture and channel, a x + b; by the loops of
`norm.c` where they can be had. On a GPU small networks wait for the host's calls instead, and PyTorch's kernels are
half as many.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from limner import native

WIDTH = 16
"""Channels that the loops in C take at once; others are left to PyTorch."""


class GroupNorm(nn.GroupNorm):
    """Group norm; where `groups` doesn't divide `channels`, the largest number of groups that divides both."""

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-5) -> None:
        super().__init__(math.gcd(groups, channels), channels, eps=eps)

    def forward(self, input: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, *,
                silu: bool = False) -> Tensor:  # fmt: skip
        """(1 + scale) GroupNorm(x) + shift, then SiLU if asked: x (B, C, H, W); scale, shift (B, C) or None.

        Differentiable once.
        """
        if input.dim() != 4:
            x = super().forward(input)
            return F.silu(x) if silu else x
        if input.is_cuda:
            return self.by_kernels(input, scale, shift, silu=silu)
        # Two zeros: the same tensor handed in twice would break torch.compile's graph here.
        scale = self.weight.new_zeros(()) if scale is None else scale
        shift = self.weight.new_zeros(()) if shift is None else shift
        given = (input, self.weight, self.bias, scale.float(), shift.float(), self.num_groups, self.eps, silu)
        return _Normalise.apply(*given)

    def by_kernels(self, x: Tensor, scale: Tensor | None, shift: Tensor | None, *, silu: bool) -> Tensor:
        """The same by PyTorch's kernels, in the dtype of x; differentiable any number of times."""
        with torch.autocast(x.device.type, enabled=False):
            x = F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        if scale is not None:
            x = x * (1 + scale[:, :, None, None]).to(x.dtype)
        if shift is not None:
            x = x + shift[:, :, None, None].to(x.dtype)
        return F.silu(x) if silu else x


class _Normalise(torch.autograd.Function):
    """x, gamma, beta, scale, shift -> act((1 + scale) (gamma x_hat + beta) + shift), x_hat = (x - mean) rstd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, scale: Tensor, shift: Tensor, groups: int,
                eps: float, silu: bool) -> Tensor:  # fmt: skip
        pixels = _rows(x)
        if native_pays(pixels, gamma, beta):
            y, mean, rstd = _by_loops(pixels, gamma, beta, scale, shift, groups, eps, silu)
            ctx.save_for_backward(pixels, gamma, beta, scale, shift, mean, rstd)
            ctx.groups, ctx.silu = groups, silu
            return _picture(y, x)
        exact = pixels.float() if pixels.dtype != torch.float64 else pixels
        sums = torch.stack([exact.sum(1), exact.square().sum(1)])
        mean, rstd = _moments(sums, pixels.shape[1], groups, eps)
        gain = rstd * gamma * (1 + scale)
        offset = beta * (1 + scale) + shift - mean * gain
        h = _affine(pixels, gain, offset)
        ctx.save_for_backward(pixels, gamma, beta, scale, shift, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return _picture(F.silu(h) if silu else h, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        (grad,) = grad_outputs
        pixels, gamma, beta, scale, shift, mean, rstd = ctx.saved_tensors
        dh = _rows(grad).to(pixels.dtype)
        if native_pays(pixels, gamma, beta):
            given = (pixels, gamma, beta, scale, shift, mean, rstd, ctx.groups, ctx.silu)
            dx, total, with_hat = _back_by_loops(dh, *given)
            return _gradients(_picture(dx, grad), total, with_hat, gamma, beta, scale, shift)
        if ctx.silu:
            gain = rstd * gamma * (1 + scale)
            h = _affine(pixels, gain, beta * (1 + scale) + shift - mean * gain)
            dh = torch.ops.aten.silu_backward(dh, h)
        exact = dh.float() if dh.dtype != torch.float64 else dh
        total, with_x = exact.sum(1), (exact * pixels).sum(1)
        with_hat = (with_x - mean * total) * rstd
        weight = gamma * (1 + scale)
        share_1 = _over_group(total * weight, ctx.groups) / pixels.shape[1]
        share_2 = _over_group(with_hat * weight, ctx.groups) / pixels.shape[1]
        # dx = rstd (weight dh - share_1 - x_hat share_2), gathered by x
        slope = -rstd.square() * share_2
        dx = _affine(dh, rstd * weight, -rstd * share_1 - mean * slope).addcmul_(pixels, slope[:, None].to(dh.dtype))
        return _gradients(_picture(dx, grad), total, with_hat, gamma, beta, scale, shift)


def _gradients(dx: Tensor, total: Tensor, with_hat: Tensor, gamma: Tensor, beta: Tensor, scale: Tensor,
               shift: Tensor) -> tuple[Tensor | None, ...]:  # fmt: skip
    """By every input of `_Normalise`, from the sums (B, C) over the pixels of dh and of dh x_hat."""
    return (
        dx,
        ((1 + scale) * with_hat).sum(0).to(gamma.dtype),
        ((1 + scale) * total).sum(0).to(beta.dtype),
        gamma * with_hat + beta * total if scale.dim() else None,
        total if shift.dim() else None,
        None,
        None,
        None,
    )


def native_pays(pixels: Tensor, gamma: Tensor, beta: Tensor) -> bool:
    """Whether the loops of `norm.c` can be had for pixels (B, N, C)."""
    return native.takes(pixels, gamma, beta) and pixels.shape[2] % WIDTH == 0 and _loops(pixels.dtype) is not None


def _by_loops(pixels: Tensor, gamma: Tensor, beta: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float,
              silu: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (B, N, C), mean and 1 / standard deviation (B, C)."""
    pixels = pixels.contiguous()
    y = torch.empty_like(pixels)
    mean, rstd = (gamma.new_empty(len(pixels), pixels.shape[2]) for _ in range(2))
    native.call(_loops(pixels.dtype), "limner_norm", pixels, gamma, beta, _each(scale), _each(shift), y, mean, rstd,
                _Norm(*pixels.shape, groups), eps, silu)  # fmt: skip
    return y, mean, rstd


def _back_by_loops(dh: Tensor, pixels: Tensor, gamma: Tensor, beta: Tensor, scale: Tensor, shift: Tensor, mean: Tensor,
                   rstd: Tensor, groups: int, silu: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx (B, N, C), and the sums (B, C) over the pixels of dh, past SiLU, and of dh x_hat."""
    dx, (total, with_hat) = dh.new_empty(dh.shape), mean.new_empty(2, *mean.shape)
    native.call(_loops(pixels.dtype), "limner_norm_back", pixels.contiguous(), dh.contiguous(), gamma, beta,
                _each(scale), _each(shift), mean, rstd, dx, total, with_hat, _Norm(*pixels.shape, groups),
                silu)  # fmt: skip
    return dx, total, with_hat


def _each(modulation: Tensor) -> Tensor | None:
    """(B, C) one after another; the zero that stands for none is none."""
    return modulation.contiguous() if modulation.dim() else None


class _Norm(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("batch", "pixels", "channels", "groups")]


@lru_cache
def _loops(dtype: torch.dtype) -> ctypes.CDLL | None:
    place, number = ctypes.c_void_p, ctypes.c_long
    return native.compiled(Path(__file__).with_name("norm.c"), {
        "limner_norm": [*[place] * 8, _Norm, ctypes.c_float, number],
        "limner_norm_back": [*[place] * 11, _Norm, number],
    }, dtype)  # fmt: skip


def _moments(sums: Tensor, count: int, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation (B, C) of each channel's group, from the sums (2, B, C) of its
    `count` pixels and of their squares."""
    mean, square = (_over_group(sums, groups) / count).unbind()
    return mean, torch.rsqrt((square - mean.square()).clamp_min(0) + eps)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C); no copy in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _picture(rows: Tensor, like: Tensor) -> Tensor:
    return rows.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def _affine(rows: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """rows (B, N, C) times gain (B, C) plus offset (B, C), in the dtype of rows."""
    return torch.addcmul(offset[:, None].to(rows.dtype), rows, gain[:, None].to(rows.dtype))


def _over_group(sums: Tensor, groups: int) -> Tensor:
    """Per-channel values (..., C) averaged over their group, spread to its channels again."""
    mean = sums.unflatten(-1, (groups, -1)).mean(-1, keepdim=True)
    return mean.expand(*mean.shape[:-1], sums.shape[-1] // groups).flatten(-2)
