"""The bricks of every network: group norm, time embedding, resampling, the residual block.

Blocks share one signature, `forward(x, emb, tokens, token_mask)`, so that a network is a plain list of them.
Shapes: x (B, C, H, W); emb (B, E), already through SiLU; tokens (B, L, D); token_mask (B, L) bool.
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.nn.amx import Conv1x1
from limner.nn.norm import GroupNorm
from limner.nn.winograd import Conv3x3

Modulation = Literal["scale_shift", "add"]
Resample = Literal["down", "up"]
M = TypeVar("M", bound=nn.Module)


def zeroed(module: M) -> M:
    """The module with all its parameters at zero: a residual branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def sinusoids(time: Tensor, channels: int, order: Literal["cos_sin", "sin_cos"] = "cos_sin",
              max_period: float = 10_000.0) -> Tensor:  # fmt: skip
    """Sinusoidal embedding (B, channels) of time (B,) (Vaswani et al. 2017, section 3.5; Ho et al. 2020)."""
    half = channels // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=time.device) / half)
    angles = time.float()[:, None] * frequencies
    waves = [angles.cos(), angles.sin()] if order == "cos_sin" else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(waves, dim=1), (0, channels % 2))


class TimeEmbedding(nn.Module):
    """Sinusoids of `scale` x time through a two-layer network: (B,) -> (B, emb_channels), before the last SiLU.

    guided: the sinusoids of a guidance scale are projected and added to those of time (Meng et al. 2023, 2210.03142,
    section 3.1). The projection begins at zero, so that at first the scale changes nothing.
    """

    GUIDANCE_SCALE = 10.0
    """The fastest sinusoid turns once in 0.6 of a guidance scale: what the network is told of it stays smooth."""

    def __init__(self, channels: int, emb_channels: int, order: Literal["cos_sin", "sin_cos"], scale: float,
                 period: float = 10_000.0, guided: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.channels, self.scale, self.period = channels, scale, period
        self.order: Literal["cos_sin", "sin_cos"] = order
        self.linear1 = nn.Linear(channels, emb_channels)
        self.linear2 = nn.Linear(emb_channels, emb_channels)
        self.guidance = zeroed(nn.Linear(channels, channels, bias=False)) if guided else None

    def forward(self, time: Tensor, guidance: Tensor | None = None) -> Tensor:
        """time, guidance: (B,); a guided embedding that isn't told a scale takes 1, no guidance."""
        waves = sinusoids(time.float() * self.scale, self.channels, self.order, self.period)
        if self.guidance is not None:
            above = torch.zeros_like(time) if guidance is None else guidance.to(time.device) - 1
            told = sinusoids(above * self.GUIDANCE_SCALE, self.channels, self.order, self.period)
            waves = waves + self.guidance(told.to(self.guidance.weight.dtype))
        return self.linear2(F.silu(self.linear1(waves.to(self.linear1.weight.dtype))))


class Dropout(nn.Dropout):
    """`nn.Dropout` of pictures (B, C, H, W). In training on a CPU p is rounded to a multiple of 1/256, unless that is 0
    or 1: one number of 64 bits then decides for eight elements, where PyTorch draws one for each, one after the other,
    in a twelfth of the time of a step."""

    def forward(self, input: Tensor) -> Tensor:
        dropped, here = round(self.p * 256), input.device.type == "cpu" and not torch.compiler.is_compiling()
        if not (self.training and here and 0 < dropped < 256):
            return super().forward(input)
        batch, channels, height, width = input.shape
        words = torch.empty(-(-input.numel() // 8), dtype=torch.int64, device=input.device).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: input.numel()].to(input.dtype).ge_(dropped)  # as booleans it would take longer
        scale = kept.mul_(256 / (256 - dropped)).view(batch, height, width, channels)
        return input * scale.permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halves the picture: a strided convolution, or a mean where `convolve` is False.

    `asymmetric` pads right and below only, as CompVis' autoencoders do.
    """

    def __init__(self, channels: int, convolve: bool = True, asymmetric: bool = False) -> None:
        super().__init__()
        self.pad = (0, 1, 0, 1) if asymmetric else None
        self.conv = nn.Conv2d(channels, channels, 3, 2, 0 if asymmetric else 1) if convolve else None

    def forward(self, x: Tensor, emb: Tensor | None = None, tokens: Tensor | None = None,
                token_mask: Tensor | None = None) -> Tensor:  # fmt: skip
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return self.conv(x if self.pad is None else F.pad(x, self.pad))


class Upsample(nn.Module):
    """Doubles the picture by repetition, then a convolution where `convolve` is True."""

    def __init__(self, channels: int, convolve: bool = True) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels) if convolve else None

    def forward(self, x: Tensor, emb: Tensor | None = None, tokens: Tensor | None = None,
                token_mask: Tensor | None = None) -> Tensor:  # fmt: skip
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return x if self.conv is None else self.conv(x)


class ResBlock(nn.Module):
    """Residual block with adaptive group norm (Dhariwal & Nichol 2021, section 3.1):

        AdaGN(h, y) = y_s GroupNorm(h) + y_b,   (y_s - 1, y_b) = Linear(SiLU(emb))

    `modulation="add"` adds the projected embedding before the norm instead (Ho et al. 2020). `emb_channels=None`
    makes a block without an embedding (autoencoders). `resample` halves or doubles the picture inside the block
    (BigGAN; Brock et al. 2019).
    """

    def __init__(self, channels: int, out_channels: int, emb_channels: int | None = None, *,
                 modulation: Modulation = "scale_shift", resample: Resample | None = None, dropout: float = 0.0,
                 groups: int = 32, eps: float = 1e-5) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = GroupNorm(channels, groups, eps)
        self.conv1 = Conv3x3(channels, out_channels)
        self.adaptive = modulation == "scale_shift"
        self.emb = nn.Linear(emb_channels, out_channels * (1 + self.adaptive)) if emb_channels else None
        self.norm2 = GroupNorm(out_channels, groups, eps)
        self.dropout = Dropout(dropout)
        self.conv2 = zeroed(Conv3x3(out_channels, out_channels))
        self.skip = Conv1x1(channels, out_channels) if channels != out_channels else nn.Identity()
        resamplers = {"down": Downsample, "up": Upsample}
        self.resample = resamplers[resample](channels, convolve=False) if resample else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None, tokens: Tensor | None = None,
                token_mask: Tensor | None = None) -> Tensor:  # fmt: skip
        added = self.emb(emb) if self.emb is not None and not self.adaptive else None
        h = self.conv1(self.resample(self.norm1(x, silu=True)), offset=added)
        if self.emb is not None and self.adaptive:
            h = self.norm2(h, *self.emb(emb).chunk(2, dim=1), silu=True)
        else:
            h = self.norm2(h, silu=True)
        return self.conv2(self.dropout(h), self.skip(self.resample(x)))


class SpatialNorm(nn.Module):
    """x + gamma(m) Norm(x) + beta(m) with a gain and an offset for each pixel, from maps m that lie on the picture
    (SPADE; Park et al. 2019, 1903.07291, equation 1, as a residual: it starts as the identity).

    channels: of x. spatial_channels: of m. hidden: of the convolution that both share.
    """

    def __init__(self, channels: int, spatial_channels: int, hidden: int = 64, groups: int = 32,
                 eps: float = 1e-5) -> None:  # fmt: skip
        super().__init__()
        self.norm = GroupNorm(channels, groups, eps)
        self.shared = Conv3x3(spatial_channels, hidden)
        self.out = zeroed(Conv3x3(hidden, 2 * channels))

    def forward(self, x: Tensor, spatial: Tensor) -> Tensor:
        """x (B, C, h, w); spatial (B, Cs, H, W) with H and W multiples of h and w, reduced by its means."""
        seen = F.adaptive_avg_pool2d(spatial, (x.shape[2], x.shape[3]))
        gain, offset = self.out(F.silu(self.shared(seen))).chunk(2, dim=1)
        return x + torch.addcmul(offset, self.norm(x), gain)
