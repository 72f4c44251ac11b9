"""The conditional U-Net: residual blocks with AdaGN, self- and cross-attention, declared level by level.

It expresses guided-diffusion's UNetModel and latent-diffusion's UNetModel exactly; what their checkpoints force is a
constructor argument or a permutation at import.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from limner.nn.attention import SelfAttention, SpatialTransformer
from limner.nn.layers import Downsample, Modulation, ResBlock, SpatialNorm, TimeEmbedding, Upsample, zeroed
from limner.nn.norm import GroupNorm


@dataclass(frozen=True)
class Level:
    """One resolution. `blocks` residual blocks on the way down and one more on the way up; after each of them
    self-attention, or a spatial transformer of depth `cross_attention`."""

    channels: int
    blocks: int = 1
    attention: bool = False
    cross_attention: int = 0


class Stage(nn.ModuleList):
    """Blocks run one after another; what enters or leaves a skip connection is a stage's output."""

    def forward(self, x: Tensor, emb: Tensor | None, tokens: Tensor | None, token_mask: Tensor | None) -> Tensor:
        for block in self:
            x = block(x, emb, tokens, token_mask)
        return x


@dataclass(frozen=True)
class Blocks:
    """Makes the blocks of one network: what they all share is said once."""

    emb_channels: int
    modulation: Modulation
    resample: Literal["block", "conv", "pool"]
    head_dim: int | None
    heads: int | None
    norm_groups: int
    norm_eps: float
    dropout: float
    token_channels: int | None = None
    transformer_norm_eps: float = 1e-6
    asymmetric: bool = False

    def heads_of(self, channels: int) -> int:
        return self.heads or max(1, channels // (self.head_dim or channels))

    def residual(self, channels: int, out: int, resample: Literal["down", "up"] | None = None) -> ResBlock:
        return ResBlock(channels, out, self.emb_channels, modulation=self.modulation, resample=resample,
                        dropout=self.dropout, groups=self.norm_groups, eps=self.norm_eps)  # fmt: skip

    def down(self, channels: int) -> nn.Module:
        return self.residual(channels, channels, "down") if self.resample == "block" else Downsample(
            channels, convolve=self.resample == "conv", asymmetric=self.asymmetric)  # fmt: skip

    def up(self, channels: int) -> nn.Module:
        return self.residual(channels, channels, "up") if self.resample == "block" else Upsample(
            channels, convolve=self.resample == "conv")  # fmt: skip

    def self_attention(self, channels: int) -> SelfAttention:
        return SelfAttention(channels, self.heads_of(channels), self.norm_groups, self.norm_eps)

    def transformer(self, channels: int, depth: int) -> SpatialTransformer:
        if self.token_channels is None:
            raise ValueError("cross_attention needs a condition that gives tokens")
        return SpatialTransformer(channels, self.heads_of(channels), self.token_channels, depth, self.norm_groups,
                                  self.transformer_norm_eps)  # fmt: skip

    def attention(self, level: Level) -> list[nn.Module]:
        if level.cross_attention:
            return [self.transformer(level.channels, level.cross_attention)]
        return [self.self_attention(level.channels)] if level.attention else []

    def encoder(self, levels: Sequence[Level]) -> tuple[nn.ModuleList, list[int]]:
        """The way down, without the stem, and the channels of every skip connection, the stem's included."""
        stages, skips = nn.ModuleList(), [levels[0].channels]
        for i, level in enumerate(levels):
            for _ in range(level.blocks):
                stages.append(Stage([self.residual(skips[-1], level.channels), *self.attention(level)]))
                skips.append(level.channels)
            if i + 1 < len(levels):
                stages.append(Stage([self.down(level.channels)]))
                skips.append(level.channels)
        return stages, skips

    def middle(
        self, level: Level, kind: Literal["attention", "transformer", "none"], depth: int | None = None
    ) -> Stage:
        channels = level.channels
        between: list[nn.Module] = []
        if kind == "transformer":
            between = [self.transformer(channels, depth or max(1, level.cross_attention))]
        elif kind == "attention":
            between = [self.self_attention(channels)]
        return Stage([self.residual(channels, channels), *between, self.residual(channels, channels)])

    def decoder(self, levels: Sequence[Level], skips: list[int]) -> nn.ModuleList:
        """The way up; consumes the skip connections from the last to the first."""
        stages, channels = nn.ModuleList(), levels[-1].channels
        for i, level in reversed(list(enumerate(levels))):
            for j in range(level.blocks + 1):
                stage = Stage([self.residual(channels + skips.pop(), level.channels), *self.attention(level)])
                channels = level.channels
                if i and j == level.blocks:
                    stage.append(self.up(channels))
                stages.append(stage)
        return stages


def run_stages(stages: Callable[..., Tensor], *inputs: Any, rematerialise: bool) -> Tensor:
    """A stage's output; with `rematerialise` its activations are computed again in the backward pass."""
    if rematerialise:
        output = checkpoint(stages, *inputs, use_reentrant=False)
        assert isinstance(output, Tensor)
        return output
    return stages(*inputs)


class UNet(nn.Module):
    """f(x_t, time, tau(y)) -> raw prediction.

    in_channels: channels of x and of `spatial` together. out_channels: of the prediction (twice the image's with a
    learned variance). token_channels: width D of the tokens, where a level has cross-attention. spatial_channels: of
    `spatial`, where it is also to modulate the way up (`SpatialNorm`). The remaining arguments are those of
    `limner.config.UNetConfig`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        levels: Sequence[Level],
        *,
        token_channels: int | None = None,
        spatial_channels: int | None = None,
        patch: int = 1,
        modulation: Modulation = "scale_shift",
        resample: Literal["block", "conv", "pool"] = "block",
        middle: Literal["attention", "transformer", "none"] = "attention",
        middle_depth: int | None = None,
        head_dim: int | None = 64,
        heads: int | None = None,
        time_channels: int | None = None,
        emb_channels: int | None = None,
        time_order: Literal["cos_sin", "sin_cos"] = "cos_sin",
        time_scale: float = 1000.0,
        time_period: float = 10_000.0,
        asymmetric: bool = False,
        norm_groups: int = 32,
        norm_eps: float = 1e-5,
        transformer_norm_eps: float = 1e-6,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
        guided: bool = False,
    ) -> None:
        super().__init__()
        time_channels = time_channels or levels[0].channels
        self.emb_channels = emb_channels or 4 * time_channels
        self.patch = patch
        self.factor = patch * 2 ** (len(levels) - 1)
        self.gradient_checkpointing = gradient_checkpointing
        blocks = Blocks(self.emb_channels, modulation, resample, head_dim, heads, norm_groups, norm_eps, dropout,
                        token_channels, transformer_norm_eps, asymmetric)  # fmt: skip
        self.time = TimeEmbedding(time_channels, self.emb_channels, time_order, time_scale, time_period, guided)
        self.stem = nn.Conv2d(in_channels * patch**2, levels[0].channels, 3, padding=1)
        self.down, skips = blocks.encoder(levels)
        self.middle = blocks.middle(levels[-1], middle, middle_depth)
        self.up = blocks.decoder(levels, skips)
        widths = [level.channels for level in reversed(levels) for _ in range(level.blocks + 1)]
        self.up_spatial = nn.ModuleList(
            SpatialNorm(width, spatial_channels, groups=norm_groups, eps=norm_eps) for width in widths
        ) if spatial_channels else None  # fmt: skip
        self.norm = GroupNorm(levels[0].channels, norm_groups, norm_eps)
        self.out = zeroed(nn.Conv2d(levels[0].channels, out_channels * patch**2, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, vector: Tensor | None = None, tokens: Tensor | None = None,
                token_mask: Tensor | None = None, spatial: Tensor | None = None,
                guidance: Tensor | None = None) -> Tensor:  # fmt: skip
        """x (B, C, H, W), H and W multiples of `factor`; time (B,); vector (B, emb_channels) is added to the time
        embedding; tokens (B, L, D) with token_mask (B, L) feed cross-attention; spatial (B, Cs, H, W) is
        concatenated; guidance (B,) is what a `guided` network is told. Returns (B, out_channels, H, W)."""
        emb = self.time(time, guidance)
        emb = F.silu(emb if vector is None else emb + vector)
        x = x if spatial is None else torch.cat([x, spatial], dim=1)
        x = self.stem(x if self.patch == 1 else F.pixel_unshuffle(x, self.patch))
        again = self.gradient_checkpointing and self.training
        skips = [x]
        for stage in self.down:
            x = run_stages(stage, x, emb, tokens, token_mask, rematerialise=again)
            skips.append(x)
        x = run_stages(self.middle, x, emb, tokens, token_mask, rematerialise=again)
        for number, stage in enumerate(self.up):
            x = torch.cat([x, skips.pop()], dim=1)
            x = run_stages(stage, x, emb, tokens, token_mask, rematerialise=again)
            if self.up_spatial is not None:
                x = run_stages(self.up_spatial[number], x, spatial, rematerialise=again)
        x = self.out(self.norm(x, silu=True))
        return x if self.patch == 1 else F.pixel_shuffle(x, self.patch)
