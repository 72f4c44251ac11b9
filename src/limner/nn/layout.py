"""Conditions that are few things in a picture, as tokens: boxes of a layout, and another picture as features."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.errors import LimnerError
from limner.nn.conditioners import Embedded
from limner.nn.text import TextBlock, TextTransformer, pooled

FREQUENCIES = 8
"""Sines and cosines of each coordinate of a box, at 2^k half turns over the picture."""


class Tokens(nn.Module):
    """What such conditions share: tokens of width D, one learned token for an absent condition, a pooled vector."""

    def __init__(self, width: int, emb_channels: int | None) -> None:
        super().__init__()
        self.token_channels = width
        self.null = nn.Parameter(torch.randn(width))
        self.pool = nn.Linear(width, emb_channels) if emb_channels else None

    def embedded(self, tokens: Tensor, mask: Tensor, absent: Tensor) -> Embedded:
        """tokens (B, L, D) with mask (B, L); rows of `absent` (B,) become the null token."""
        first = torch.arange(tokens.shape[1], device=tokens.device) == 0
        tokens = torch.where(absent[:, None, None], self.null.to(tokens.dtype), tokens)
        mask = torch.where(absent[:, None], first, mask)
        return Embedded(None if self.pool is None else self.pool(pooled(tokens, mask)), tokens, mask)

    def nothing(self, batch: int, drop: Tensor | None, given: bool) -> Tensor:
        """Rows (B,) bool whose condition is absent."""
        device = self.null.device
        if not given:
            return torch.ones(batch, dtype=torch.bool, device=device)
        return torch.zeros(batch, dtype=torch.bool, device=device) if drop is None else drop.to(device)


class BoxesConditioner(Tokens):
    """(class, x, y, w, h) of each thing as a token, through a transformer, so that each knows of the others (Rombach et
    al. 2022, section 4.3.1: layout-to-image; theirs are discrete tokens of the corners, these are Fourier features).

    An empty layout, a picture of nothing, is a token of its own, and isn't the same as an absent one.
    classes: K. most: tokens of a picture. emb_channels: width of the pooled vector; None: tokens only. size: (H, W) of
    x_t in training, where the boxes are also drawn on it, a channel for each class: `drawn`; None: they aren't.
    """

    def __init__(self, classes: int, width: int, depth: int, most: int, *, head_dim: int = 64,
                 emb_channels: int | None = None, size: tuple[int, int] | None = None) -> None:  # fmt: skip
        super().__init__(width, emb_channels)
        self.classes, self.most, self.size = classes, most, size
        self.spatial_channels = classes if size else 0
        self.table = nn.Embedding(classes + 1, width)  # the last: an empty layout
        self.place = nn.Linear(4 * 2 * FREQUENCIES, width)
        heads, head_dim = max(1, width // head_dim), min(head_dim, width)
        self.blocks = nn.ModuleList(
            TextBlock(width, heads, head_dim, 4 * width, "gelu", bias=False, causal=False) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, boxes: Tensor | None, batch: int, drop: Tensor | None = None,
                size: tuple[int, int] | None = None) -> Embedded:  # fmt: skip
        """boxes: float (B, M, 5), class and x, y, w, h in 0..1, filled up with class -1; M above `most` is cut; or
        None. drop (B,) bool marks rows to treat as absent; size: of x_t. Raises LimnerError for another shape or
        class."""
        absent = self.nothing(batch, drop, boxes is not None)
        device = self.null.device
        if boxes is None:
            boxes = torch.full((batch, self.most, 5), -1.0, device=device)
        if boxes.ndim != 3 or boxes.shape[0] != batch or boxes.shape[2] != 5:
            raise LimnerError(f"boxes: shape {tuple(boxes.shape)} should be ({batch}, M, 5)")
        boxes = F.pad(boxes.to(device).float()[:, : self.most], (0, 0, 0, max(0, self.most - boxes.shape[1])), value=-1)
        number = boxes[..., 0].long()
        if int(number.max()) >= self.classes:
            raise LimnerError(f"boxes: class {int(number.max())}, there are {self.classes}, from 0 on")
        there = number >= 0
        empty = ~there.any(1)
        number = torch.where(there, number, self.classes)
        x = self.table(number) + self.place(fourier(boxes[..., 1:])) * there[..., None]
        mask = there | (empty[:, None] & (torch.arange(self.most, device=device) == 0))
        for block in self.blocks:
            x = block(x, mask)
        embedded = self.embedded(self.norm(x), mask, absent)
        if self.size is None:
            return embedded
        seen = there & ~absent[:, None]
        return replace(embedded, spatial=drawn(boxes[..., 1:], number, seen, self.classes, size or self.size))


def drawn(places: Tensor, number: Tensor, seen: Tensor, classes: int, size: tuple[int, int]) -> Tensor:
    """Boxes as maps (B, K, H, W): how much of a cell a box of that class covers, of several the one that covers most.

    places (B, M, 4): x, y, w, h in 0..1; number (B, M): classes; seen (B, M) bool: those that are drawn.
    """

    def along(start: Tensor, length: Tensor, cells: int) -> Tensor:
        edge = torch.arange(cells, device=start.device) / cells
        low, high = start[..., None], (start + length)[..., None]
        return (torch.minimum(high, edge + 1 / cells) - torch.maximum(low, edge)).clamp(min=0) * cells

    x, y, w, h = places.unbind(-1)
    cover = along(y, h, size[0])[..., :, None] * along(x, w, size[1])[..., None, :] * seen[..., None, None]
    own = F.one_hot(torch.where(seen, number, 0), classes).to(cover.dtype)
    return torch.stack([(cover * own[..., k, None, None]).amax(1) for k in range(classes)], dim=1)


class TokenBoxesConditioner(nn.Module):
    """Boxes as CompVis' layout models read them (Rombach et al. 2022, section 4.3.1; the `objects_bbox` of Esser et al.
    2021, 2012.09841): of each box its class, its upper left and its lower right corner on a grid, each a token.

    encoder: a transformer over 3 `most` tokens, and two more with `crop`, the corners of the part of the picture that
    is seen, which is the whole. vocabulary: V; the grid has floor(sqrt V) cells a side, and token V - 1 is no box. An
    absent layout is one of no boxes. emb_channels: width of the pooled vector; None: tokens only.
    """

    def __init__(self, encoder: TextTransformer, vocabulary: int, most: int, *, crop: bool = True,
                 emb_channels: int | None = None) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.most, self.crop = encoder, most, crop
        self.none, self.side = vocabulary - 1, math.isqrt(vocabulary)
        self.token_channels: int = encoder.width
        self.pool = nn.Linear(self.token_channels, emb_channels) if emb_channels else None

    def forward(self, boxes: Tensor | None, batch: int, drop: Tensor | None = None) -> Embedded:
        """boxes: as `tokens` takes them; or those tokens, int (B, L); or None. drop (B,) bool marks rows to treat as
        absent. Raises LimnerError for another shape, class or token."""
        nothing = torch.zeros(batch, 0, 5)
        boxes = nothing if boxes is None else boxes
        ids = self.tokens(boxes) if boxes.ndim == 3 else boxes
        if ids.is_floating_point() or ids.shape != (batch, self.encoder.length):
            raise LimnerError(f"boxes: shape {tuple(boxes.shape)} should be ({batch}, M, 5), or tokens, int "
                              f"({batch}, {self.encoder.length})")  # fmt: skip
        if int(ids.min()) < 0 or int(ids.max()) > self.none:
            raise LimnerError(f"boxes: tokens should be 0 to {self.none}")
        if drop is not None:
            ids = torch.where(drop.to(ids.device)[:, None], self.tokens(nothing).to(ids.device), ids)
        ids = ids.to(self.encoder.position.device)
        tokens, vector = self.encoder(ids, torch.ones_like(ids, dtype=torch.bool))
        return Embedded(None if self.pool is None else self.pool(vector), tokens)

    def tokens(self, boxes: Tensor) -> Tensor:
        """int64 (B, L) of boxes (B, M, 5), class and x, y, w, h in 0..1, filled up with class -1; M above `most` is
        cut. Raises LimnerError for another shape or class."""
        if boxes.ndim != 3 or boxes.shape[2] != 5:
            raise LimnerError(f"boxes: shape {tuple(boxes.shape)} should be (B, M, 5)")
        boxes = boxes[:, : self.most].double()
        number, low = boxes[..., :1].long(), boxes[..., 1:3]
        if (number >= self.none).any():
            raise LimnerError(f"boxes: class {int(number.max())}, there are {self.none}, from 0 on")
        cells = (torch.cat([low, low + boxes[..., 3:]], dim=2).clamp(0, 1) * (self.side - 1)).round().long()
        places = cells[..., 1::2] * self.side + cells[..., ::2]
        triples = torch.where(number < 0, self.none, torch.cat([number, places], dim=2))
        ids = F.pad(triples.flatten(1), (0, 3 * (self.most - boxes.shape[1])), value=self.none)
        whole = ids.new_tensor([0, self.side**2 - 1]).expand(len(ids), -1)
        return torch.cat([ids, whole], dim=1) if self.crop else ids


def fourier(places: Tensor) -> Tensor:
    """(..., n) in 0..1 to sines and cosines (..., 2 n FREQUENCIES) (Mildenhall et al. 2020, eq. 4)."""
    angles = places[..., None] * math.pi * 2.0 ** torch.arange(FREQUENCIES, device=places.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class VariationConditioner(Tokens):
    """Another picture as a frozen feature network sees it: tokens of places, a vector of all of them (as in Ramesh et
    al. 2022, 2204.06125, section 3.1, where CLIP sees it). The network's weights are no part of this module's state.

    features: (B, 3, side, side) in [-1, 1] -> (B, F, h, w). grid: tokens along a side; few of them keep what the
    picture shows and lose where each pixel was.
    """

    def __init__(self, features: Callable[[Tensor], Tensor], channels: int, width: int, side: int, grid: int,
                 emb_channels: int | None) -> None:  # fmt: skip
        super().__init__(width, emb_channels)
        self.features, self.side, self.grid = features, side, grid
        self.project = nn.Linear(channels, width)
        self.position = nn.Parameter(torch.randn(grid * grid, width) * 0.02)
        self.norm = nn.LayerNorm(width)

    def forward(self, variation: Tensor | None, batch: int, drop: Tensor | None = None) -> Embedded:
        """variation: pictures (B, C, H, W) in [-1, 1], or None; drop (B,) bool marks rows to treat as absent."""
        absent = self.nothing(batch, drop, variation is not None)
        if variation is None:
            tokens = self.position.new_zeros(batch, self.grid**2, self.token_channels)
        else:
            tokens = self.norm(self.project(self._seen(variation)) + self.position)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return self.embedded(tokens, mask, absent)

    @torch.no_grad()
    def _seen(self, pictures: Tensor) -> Tensor:
        """Features (B, grid^2, F), standardised over their channels."""
        if pictures.ndim != 4 or pictures.shape[1] not in (1, 3, 4):
            raise LimnerError(f"variation: shape {tuple(pictures.shape)} should be (B, C, H, W)")
        square = F.interpolate(pictures.to(self.null.device).float(), (self.side, self.side), mode="bilinear",
                               antialias=True)  # fmt: skip
        maps = F.adaptive_avg_pool2d(self.features(square).float(), self.grid)
        return F.layer_norm(maps.flatten(2).transpose(1, 2), maps.shape[1:2])
