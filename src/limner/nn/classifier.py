"""The classifier of noisy pictures, p(y | x_t, t): the down half of the U-Net and a pooled head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.nn.attention import AttentionPool
from limner.nn.layers import Modulation, TimeEmbedding, zeroed
from limner.nn.norm import GroupNorm
from limner.nn.unet import Blocks, Level, run_stages

Pool = Literal["attention", "adaptive", "spatial", "spatial_v2"]
SPATIAL_HIDDEN = 2048


class NoisyClassifier(nn.Module):
    """f(x_t, time) -> logits (Dhariwal & Nichol 2021, section 4.1 and appendix).

    size: (H, W) of the pictures, which attention pooling is tied to. pool: `attention` (CLIP's), `adaptive` (mean
    of the last features), `spatial` and `spatial_v2` (means of every stage's features through a hidden layer).
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        levels: Sequence[Level],
        size: tuple[int, int],
        *,
        pool: Pool = "attention",
        patch: int = 1,
        modulation: Modulation = "scale_shift",
        resample: Literal["block", "conv", "pool"] = "block",
        middle: Literal["attention", "none"] = "attention",
        head_dim: int | None = 64,
        heads: int | None = None,
        time_channels: int | None = None,
        emb_channels: int | None = None,
        time_order: Literal["cos_sin", "sin_cos"] = "cos_sin",
        time_scale: float = 1000.0,
        norm_groups: int = 32,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        time_channels = time_channels or levels[0].channels
        emb_channels = emb_channels or 4 * time_channels
        self.patch, self.pool, self.gradient_checkpointing = patch, pool, gradient_checkpointing
        self.factor = patch * 2 ** (len(levels) - 1)
        blocks = Blocks(emb_channels, modulation, resample, head_dim, heads, norm_groups, norm_eps, dropout)
        self.time = TimeEmbedding(time_channels, emb_channels, time_order, time_scale)
        self.stem = nn.Conv2d(in_channels * patch**2, levels[0].channels, 3, padding=1)
        self.down, widths = blocks.encoder(levels)
        self.middle = blocks.middle(levels[-1], middle)
        last = levels[-1].channels
        if pool in ("attention", "adaptive"):
            self.norm = GroupNorm(last, norm_groups, norm_eps)
            pixels = (size[0] // self.factor) * (size[1] // self.factor)
            self.head: nn.Module = (
                AttentionPool(last, pixels, blocks.heads_of(last), classes)
                if pool == "attention"
                else zeroed(nn.Linear(last, classes))
            )
        else:
            hidden = nn.Linear(sum(widths) + last, SPATIAL_HIDDEN)
            between = [nn.ReLU()] if pool == "spatial" else [GroupNorm(SPATIAL_HIDDEN), nn.SiLU()]
            self.head = nn.Sequential(hidden, *between, nn.Linear(SPATIAL_HIDDEN, classes))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, C, H, W), time (B,) -> logits (B, classes)."""
        emb = F.silu(self.time(time))
        x = self.stem(x if self.patch == 1 else F.pixel_unshuffle(x, self.patch))
        again = self.gradient_checkpointing and self.training
        features = [x]
        for stage in [*self.down, self.middle]:
            x = run_stages(stage, x, emb, None, None, rematerialise=again)
            features.append(x)
        if self.pool == "attention":
            return self.head(self.norm(x, silu=True))
        if self.pool == "adaptive":
            return self.head(self.norm(x, silu=True).mean(dim=(2, 3)))
        return self.head(torch.cat([h.mean(dim=(2, 3)) for h in features], dim=1))
