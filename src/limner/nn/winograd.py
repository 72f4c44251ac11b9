"""3x3 convolutions on a CPU by Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2015, 1509.09308).

The picture is cut into tiles d of 6x6 pixels that overlap by two. With a filter g a tile gives 4x4 pixels

    y = A^T [(G g G^T) . (B^T d B)] A                                                               (equation 8)

by 36 products instead of 144. Over all tiles T, channels in C and out O, they are 36 products of matrices, (T, C) by
(C, O), which are loops in C as the transforms by A, B and G are (`winograd.c`). The gradient by the picture is a
convolution as well; that by the filter is G^T [sum over tiles of (A dy A^T) . (B^T d B)] G. Results differ from those
of the exact convolution by some 1e-6 of their standard deviation (root mean square).

Under bf16 autocast pictures are read and written in bf16, if that is faster than PyTorch's convolution. On a processor
that multiplies in bf16 (AVX-512) the products are in it as well, summed in float32: of random pictures, results are
then off by 1.2% of their standard deviation, where a plain convolution in bf16 is by .2%.
"""

from __future__ import annotations

import ctypes
import math
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from limner import native
from limner.nn import amx

SOURCE = Path(__file__).with_name("winograd.c")
TILE = 4
WIDTH = 16
"""Channels that the loops take at once; others are left to PyTorch."""
LEAST_CHANNELS, LEAST_TILES, LEAST_TILES_OF_ONE = 32, 32, 16
"""Below these the transforms cost what the products save: tiles of a batch in training; of one picture where weights
are frozen, so that no picture's roundings depend on how many are drawn with it."""
FEW_FILTERS = 128 * 128
"""C times O up to which transforming frozen filters costs so little that a picture of one tile gains."""
ROUNDS = 7


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding 1: `nn.Conv2d`, on a CPU by Winograd's filtering where that is faster.
    Differentiable once there."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, input: Tensor, residual: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
        """The convolution of the input, plus the residual (B, O, H, W), plus the offset (B, O) at each pixel."""
        if not pays(input, self.weight, self.bias):
            y = amx.convolution(input, self.weight, self.bias)
            y = y if offset is None else y + offset[:, :, None, None]
            return y if residual is None else residual.to(y.dtype) + y
        bias = self.bias
        if offset is not None:
            assert bias is not None
            bias = bias + offset.float().expand(len(input), -1)
        return _winograd(input, self.weight, bias, residual)


def pays(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether Winograd's filtering can be had here and is the faster way."""
    tiles, filters = -(-x.shape[2] // TILE) * -(-x.shape[3] // TILE), weight.shape[0] * weight.shape[1]
    enough = tiles >= LEAST_TILES_OF_ONE or filters <= FEW_FILTERS
    dtype = native.autocast_dtype()
    return (
        native.takes(x, weight, *([] if bias is None else [bias]))
        and all(n >= LEAST_CHANNELS and n % WIDTH == 0 for n in weight.shape[:2])
        and (len(x) * tiles >= LEAST_TILES if weight.requires_grad else enough)
        and x.dtype in (torch.float32, dtype)
        and dtype in (torch.float32, torch.bfloat16)
        and _loops(dtype) is not None
        and (dtype == torch.float32 or faster_in_bf16())
    )


@lru_cache
def faster_in_bf16() -> bool:
    """Whether the loops beat this processor's bf16 convolutions; measured once on each kind and by each number of
    threads, and kept, so that later runs compute alike."""
    other = "matrices" if amx.available() else "torch"
    question = f"bf16-{torch.get_num_threads()}-threads-{other}-{torch.__version__}"
    return native.remembered(question, SOURCE, measured_faster_in_bf16)


def measured_faster_in_bf16() -> bool:
    """By the quickest of several steps of training a convolution, in turns; leaves PyTorch's state alone, that of a
    gradient checkpoint around it as well."""
    own = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.inference_mode(False), torch.enable_grad(), own:
        weight, x = (
            torch.ones(shape, dtype=dtype, device="cpu").to(memory_format=torch.channels_last).requires_grad_()
            for shape, dtype in (((64, 64, 3, 3), torch.float32), ((16, 64, 16, 16), torch.bfloat16))
        )
        bias = torch.zeros(64, device="cpu", requires_grad=True)
        seconds = {_winograd: math.inf, amx.convolution: math.inf}
        for _ in range(ROUNDS):
            for way in seconds:
                began = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16):
                    y = way(x, weight, bias)
                y.sum().backward()
                seconds[way] = min(seconds[way], time.perf_counter() - began)
    return seconds[_winograd] < seconds[amx.convolution]


def _winograd(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    dtype = native.autocast_dtype()
    return _Winograd.apply(x.to(dtype), weight, bias, None if residual is None else residual.to(dtype))


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        rows = _rows(x)
        ctx.save_for_backward(rows, weight)
        ctx.by_picture = bias is not None and bias.dim() == 2
        filters, residual = _filters(weight, rows.dtype), None if residual is None else _rows(residual)
        return _picture(_convolve(rows, filters, bias, residual))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        rows, weight = ctx.saved_tensors
        grad = _rows(grad_outputs[0])
        of_x, of_weight, of_bias, of_residual = ctx.needs_input_grad
        turned = _filters(weight, rows.dtype, turned=True) if of_x else None
        return (
            None if turned is None else _picture(_convolve(grad, turned)),
            _by_filter(rows, grad) if of_weight else None,
            grad.sum((1, 2) if ctx.by_picture else (0, 1, 2), dtype=torch.float32) if of_bias else None,
            grad_outputs[0] if of_residual else None,
        )


def _convolve(rows: Tensor, filters: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """rows (B, H, W, C) and filters (36, C, O) -> (B, H, W, O), plus bias (O) or (B, O) and residual (B, H, W, O)."""
    y = rows.new_empty(*rows.shape[:3], filters.shape[2])
    step = 0 if bias is None or bias.dim() == 1 else y.shape[3]
    given = (rows, filters, bias, step, residual, y, native.Shape(*rows.shape), y.shape[3])
    native.call(_loops(rows.dtype), "limner_convolve", *given)
    return y


def _by_filter(rows: Tensor, grad: Tensor) -> Tensor:
    """The gradient (O, C, 3, 3) from rows (B, H, W, C) and the gradient (B, H, W, O) by what came out."""
    by = rows.new_empty(grad.shape[3], 3, 3, rows.shape[3], dtype=torch.float32)
    native.call(_loops(rows.dtype), "limner_by_filter", rows, grad, by, native.Shape(*rows.shape), grad.shape[3])
    return by.permute(0, 3, 1, 2)


def _filters(weight: Tensor, dtype: torch.dtype, turned: bool = False) -> Tensor:
    """(O, C, 3, 3) -> G g G^T (36, C, O); turned: of the filters turned by 180 degrees, from O to C: (36, O, C). As
    the loops of this dtype read them: pairs of bf16 fill half of the place."""
    weight = weight.detach()
    (outs, ins), (out, into, y, x) = weight.shape[:2], weight.stride()
    made = weight.new_empty(36, outs, ins) if turned else weight.new_empty(36, ins, outs)
    last = weight.data_ptr() + weight.element_size() * 2 * (y + x)
    given = (last, -y, -x, out, into, outs, ins) if turned else (weight, y, x, into, out, ins, outs)
    native.call(_loops(dtype), "limner_filters", *given, made)
    return made


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), one after another; no copy in channels_last."""
    return x.detach().permute(0, 2, 3, 1).contiguous()


def _picture(rows: Tensor) -> Tensor:
    return rows.permute(0, 3, 1, 2)


@lru_cache
def _loops(dtype: torch.dtype) -> ctypes.CDLL | None:
    place, number = ctypes.c_void_p, ctypes.c_long
    return native.compiled(SOURCE, {
        "limner_filters": [place, *[number] * 6, place],
        "limner_convolve": [*[place] * 3, number, place, place, native.Shape, number],
        "limner_by_filter": [*[place] * 3, native.Shape, number],
    }, dtype)  # fmt: skip
