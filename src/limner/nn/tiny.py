"""Encoder and decoder of the tiny autoencoder (TAESD): convolutions and ReLU, without norms or attention.

It expresses diffusers' AutoencoderTiny exactly, names of weights included. All levels are of one width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

CLAMP = 3.0
"""Latents are bent to between -3 and 3 before they are decoded."""


class TinyBlock(nn.Module):
    """x + three convolutions of x, then ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(width), nn.ReLU(), _conv(width), nn.ReLU(), _conv(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class TinyEncoder(nn.Module):
    """(B, channels, H, W) in [-1, 1] -> (B, out_channels, H/f, W/f), f = 2^(levels - 1). blocks: at each level."""

    def __init__(self, channels: int, out_channels: int, width: int, blocks: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, count in enumerate(blocks):
            layers.append(nn.Conv2d(width, width, 3, 2, 1, bias=False) if i else nn.Conv2d(channels, width, 3, 1, 1))
            layers += [TinyBlock(width) for _ in range(count)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(self, x: Tensor, _rematerialise: bool = False) -> Tensor:
        return self.layers((x + 1) / 2)


class TinyDecoder(nn.Module):
    """(B, in_channels, H/f, W/f) -> (B, channels, H, W), about in [-1, 1]. blocks: at each level, the finest first."""

    def __init__(self, channels: int, in_channels: int, width: int, blocks: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU()]
        for i, count in reversed(list(enumerate(blocks))):
            layers += [TinyBlock(width) for _ in range(count)]
            if i:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))

    @property
    def out(self) -> nn.Module:
        """The last layer, by whose gradients losses are weighed."""
        return self.layers[-1]

    def forward(self, z: Tensor, _rematerialise: bool = False) -> Tensor:
        return self.layers(torch.tanh(z / CLAMP) * CLAMP) * 2 - 1


def _conv(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, padding=1)
