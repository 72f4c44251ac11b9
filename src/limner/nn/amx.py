"""Convolutions in training on a CPU that multiplies matrices of bf16 (AMX).

PyTorch's convolutions are fast there, forward and for the gradient by the picture. For the gradient by the filters they
take two to seven times as long; under bf16 autocast that is the loops' in C (`amx.c`), summed in float32 and left
in it, with the gradient by the bias.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from limner import native

SOURCE = Path(__file__).with_name("amx.c")
WIDTH = 16
"""Channels that the loops take at once; others are left to PyTorch."""
MOST_SUMS = native.LARGEST // 4
"""Numbers in the sums of all threads, each of which has its own; the place of more isn't kept for the next time."""


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution: `nn.Conv2d`, trained as `convolution` does it. Differentiable once there."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        return convolution(input, self.weight, self.bias)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, C, H, W), weight (O, C, k, k) with k 1 or 3, bias (O) -> (B, O, H, W), by the loops where they pay."""
    if pays(x, weight, bias):
        return _Convolution.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)


def pays(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the loops can be had here, and there's a gradient to be worked out."""
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and bias is not None
        and x.dim() == 4
        and native.takes(x, weight, bias)
        and native.autocast_dtype() == torch.bfloat16
        and all(n % WIDTH == 0 for n in weight.shape[:2])
        and weight.numel() * torch.get_num_threads() <= MOST_SUMS
        and available()
    )


@lru_cache
def available() -> bool:
    """Whether this processor has such matrices, and the system and a compiler let them be used."""
    loops = _loops()
    return loops is not None and bool(loops.limner_matrices())


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        filters = weight.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
        ctx.save_for_backward(x, filters)
        return F.conv2d(x, filters, bias.to(torch.bfloat16), padding=weight.shape[2] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, filters = ctx.saved_tensors
        x = x.contiguous(memory_format=torch.channels_last)  # whoever kept it may have laid it out anew
        grad = grad_outputs[0].contiguous(memory_format=torch.channels_last)
        by_x = None
        if ctx.needs_input_grad[0]:
            pad = filters.shape[2] // 2
            given = (grad, x, filters, None, [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, [True, False, False])
            by_x = torch.ops.aten.convolution_backward(*given)[0]
        return by_x, *_by_filters(x, grad, filters.shape[2])


def _by_filters(x: Tensor, grad: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The gradients (O, C, side, side) and (O), float32."""
    (pictures, channels, height, width), outs = x.shape, grad.shape[1]
    by = x.new_empty(outs, side, side, channels, dtype=torch.float32)
    by_bias = by.new_empty(outs)
    shape = native.Shape(pictures, height, width, channels)
    native.call(_loops(), "limner_filter_gradient", x, grad, by, by_bias, shape, outs, side)
    return by.permute(0, 3, 1, 2), by_bias


@lru_cache
def _loops() -> ctypes.CDLL | None:
    place, number = ctypes.c_void_p, ctypes.c_long
    functions = {"limner_matrices": [], "limner_filter_gradient": [*[place] * 4, native.Shape, number, number]}
    return native.compiled(SOURCE, functions, torch.bfloat16)
