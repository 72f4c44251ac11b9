"""8-bit inference on CPUs: convolutions whose weights and inputs are integers, by oneDNN's kernels (VNNI, AMX).

Weights are quantised once, symmetrically by output channel (Krishnamoorthi 2018, 1806.08342, section 2.1). Inputs are
quantised at each call over their own range, so that nothing has to be calibrated; hence a picture depends a little on
which others are drawn with it. What is computed between the convolutions stays in float, and so does what each gives.
"""

from __future__ import annotations

import copy
import math
import warnings
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from limner.errors import LimnerError
from limner.nn.layers import SpatialNorm

M = TypeVar("M", bound=nn.Module)
LEAST = 32
"""Channels per group, in and out, below which float is as fast."""
LEVELS = 255
"""Steps that an unsigned 8-bit number can go."""
TINY = 1e-30
"""The least step: what is zero throughout has one as well."""


class Int8Conv2d(nn.Module):
    """A convolution for inference alone: no gradients, no parameters, nothing to save.

    x (B, C, H, W) float -> (B, O, H', W') in its dtype. With q the integers of the input, z the one that stands for 0,
    s the step between them and s_o that of output channel o: y = s s_o sum(w (q - z)) + bias. Padding is with zeros.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        weight = conv.weight.detach().float()
        self.steps = weight.abs().amax((1, 2, 3)).clamp_min(TINY) / 127
        self.zeros = torch.zeros(len(weight), dtype=torch.int64)
        self.bias = None if conv.bias is None else conv.bias.detach().float()
        self.place = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
        integers = (weight / self.steps[:, None, None, None]).round().to(torch.int8)
        # The input's step and zero are told at each call; here it only matters that the zero isn't 0.
        self.weight = torch.ops.onednn.qconv_prepack(integers, self.steps, 1.0, 1, *self.place)

    def forward(self, x: Tensor, residual: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
        # Range and integers of rows that lie one after another are had several times as fast.
        q, step, zero = integers_of(x.permute(0, 2, 3, 1).contiguous().float())
        y = torch.ops.onednn.qconv_pointwise(q.permute(0, 3, 1, 2), step, zero, self.weight, self.steps, self.zeros,
                                             self.bias, *self.place, 1.0, 0, torch.float32, "none", [], "")  # fmt: skip
        y = y if offset is None else y.add_(offset[:, :, None, None])
        return y.to(x.dtype) if residual is None else residual + y

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Conv2d:
        """Itself: nothing in it ever changes, and what oneDNN packed can't be copied."""
        return self

    def extra_repr(self) -> str:
        stride, padding, dilation, groups = self.place
        return f"{len(self.steps)}, {stride=}, {padding=}, {dilation=}, {groups=}"


def integers_of(x: Tensor) -> tuple[Tensor, float, int]:
    """q uint8, step and zero, such that x is about step (q - zero), over the whole range of x and 0. What isn't finite
    makes the step NaN."""
    low, high = (float(end) for end in torch.aminmax(x))
    low, high = min(low, 0.0), max(high, 0.0)
    step = max((high - low) / LEVELS, TINY)
    if not math.isfinite(step):
        return torch.zeros_like(x, dtype=torch.uint8), math.nan, 0
    zero = round(-low / step)
    return _rounded(x, step, zero), step, zero


def _rounded(x: Tensor, step: float, zero: int) -> Tensor:
    """round(x / step) + zero as uint8, saturated."""
    if not hasattr(torch, "quantize_per_tensor"):
        return (x / step).round_().add_(zero).clamp_(0, LEVELS).to(torch.uint8)
    q = torch.quantize_per_tensor(x, step, zero, torch.quint8)  # one pass over the picture instead of four
    # The same memory as plain integers; `int_repr` would copy it.
    return torch.empty(0, dtype=torch.uint8).set_(q.untyped_storage(), 0, q.shape, q.stride())


@lru_cache
def available() -> bool:
    """Whether this build of PyTorch can, which it is asked by a small convolution."""
    # Deprecated, and nothing else does it in one pass. Once and for all: a filter for each call isn't safe in threads.
    warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            Int8Conv2d(nn.Conv2d(LEAST, LEAST, 3))(torch.zeros(1, LEAST, 4, 4))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return True


def quantised(network: M) -> M:
    """A copy for inference on a CPU, whose convolutions are 8-bit where that pays; it shares all other weights.

    In float stay the first and the last convolution, which see and make the picture; those of few channels; those that
    read maps; 1x1 convolutions and linear layers, where the passes to and from integers cost what the product saves
    and whose input, often bounded by no norm, suffers most. Raises LimnerError on any other device, and where PyTorch
    was built without the operators.
    """
    device = next((p.device.type for p in network.parameters()), "cpu")
    if device != "cpu":
        raise LimnerError(f"int8: works on CPUs alone, and the model is on '{device}'; leave it out")
    if not available():
        raise LimnerError(
            f"int8: this PyTorch ({torch.__version__}) has no 8-bit convolutions for this CPU; leave it out"
        )
    network = copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    inner = {id(module) for module in convolutions[1:-1]}
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and id(child) in inner and pays(child, parent):
                setattr(parent, name, Int8Conv2d(child))
    return network


def pays(conv: nn.Conv2d, parent: nn.Module) -> bool:
    """Whether a convolution inside a network is of a kind that 8 bits make faster and don't harm."""
    return (
        min(conv.in_channels, conv.out_channels) // conv.groups >= LEAST
        and max(conv.kernel_size) > 1
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and not isinstance(parent, SpatialNorm)
    )
