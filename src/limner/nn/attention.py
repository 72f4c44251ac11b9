"""Attention over pictures and tokens. `attend` is the only attention call of the library.

Shapes: B batch, C channels, H x W picture, N = H W pixels, L tokens, D token width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.nn.layers import zeroed
from limner.nn.norm import GroupNorm

SHORT = 256
"""Pixels or tokens up to which, in training on a CPU, plain products beat the fused kernel, tenfold."""


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, *,
           causal: bool = False) -> Tensor:  # fmt: skip
    """softmax(Q K^T / sqrt d) V by heads (Vaswani et al. 2017, eq. 1; Rombach et al. 2022, section 3.3).

    q (B, N, C); k, v (B, M, C); mask (B, M) bool, True where a key counts. causal: a query sees no later key (N = M).
    Channels are ordered head by head. Returns (B, N, C).
    """
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    keep = None if mask is None else mask[:, None, None, :]
    if causal:
        past = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        keep = past if keep is None else keep & past
    if q.device.type == "cpu" and max(q.shape[2], k.shape[2]) <= SHORT and q.requires_grad:
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        weights = weights if keep is None else weights.masked_fill(~keep, -torch.inf)
        return (weights.softmax(dim=3) @ v).transpose(1, 2).flatten(2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).flatten(2)


def to_sequence(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C); free of copies in channels_last."""
    return x.flatten(2).transpose(1, 2)


def to_picture(x: Tensor, like: Tensor) -> Tensor:
    """(B, H W, C) -> (B, C, H, W) with the height and width of `like`."""
    return x.transpose(1, 2).unflatten(2, like.shape[2:])


class SelfAttention(nn.Module):
    """Residual self-attention over the pixels (Dhariwal & Nichol 2021, section 3)."""

    def __init__(self, channels: int, heads: int, groups: int = 32, eps: float = 1e-5) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(channels, groups, eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, emb: Tensor | None = None, tokens: Tensor | None = None,
                token_mask: Tensor | None = None) -> Tensor:  # fmt: skip
        q, k, v = self.qkv(to_sequence(self.norm(x))).chunk(3, dim=2)
        return x + to_picture(self.out(attend(q, k, v, self.heads)), x)


class CrossAttention(nn.Module):
    """Q from the sequence, K and V from the tokens, or from the sequence itself where `token_channels` is None."""

    def __init__(self, channels: int, heads: int, token_channels: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels, bias=False)
        self.kv = nn.Linear(token_channels or channels, 2 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        k, v = self.kv(x if tokens is None else tokens).chunk(2, dim=2)
        return self.out(attend(self.q(x), k, v, self.heads, mask))


class GEGLU(nn.Module):
    """Feed-forward with a gated GELU (Shazeer 2020), hidden width `mult` x channels."""

    def __init__(self, channels: int, mult: int = 4) -> None:
        super().__init__()
        self.up = nn.Linear(channels, 2 * mult * channels)
        self.down = nn.Linear(mult * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the tokens, feed-forward; pre-norm (Rombach et al. 2022, appendix E.2.1)."""

    def __init__(self, channels: int, heads: int, token_channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.self_attention = CrossAttention(channels, heads)
        self.cross_attention = CrossAttention(channels, heads, token_channels)
        self.feed_forward = GEGLU(channels)

    def forward(self, x: Tensor, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
        x = x + self.self_attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), tokens, token_mask)
        return x + self.feed_forward(self.norm3(x))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the pixels with cross-attention to tau(y) (Rombach et al. 2022, figure 3)."""

    def __init__(self, channels: int, heads: int, token_channels: int, depth: int = 1, groups: int = 32,
                 eps: float = 1e-6) -> None:  # fmt: skip
        super().__init__()
        self.norm = GroupNorm(channels, groups, eps)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, heads, token_channels) for _ in range(depth))
        self.proj_out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, emb: Tensor | None, tokens: Tensor, token_mask: Tensor | None = None) -> Tensor:
        h = self.proj_in(to_sequence(self.norm(x)))
        for block in self.blocks:
            h = block(h, tokens, token_mask)
        return x + to_picture(self.proj_out(h), x)


class AttentionPool(nn.Module):
    """Pools a picture to a vector: a mean token attends to all pixels (Radford et al. 2021; ADM's classifier head).

    `pixels` = H W of the picture it is built for, since each place has its own learned position.
    """

    def __init__(self, channels: int, pixels: int, heads: int, out: int) -> None:
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(torch.randn(pixels + 1, channels) * channels**-0.5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out)."""
        x = to_sequence(x)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.position.to(x.dtype)
        q, k, v = self.qkv(x).chunk(3, dim=2)
        return self.out(attend(q[:, :1], k, v, self.heads).squeeze(1))
