"""Large pictures in overlapping tiles, blended where they overlap, so that memory doesn't grow with the picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin so that they cover `length` and neighbours share at least `overlap`; one when it all fits."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def ramp(length: int, overlap: int, like: Tensor) -> Tensor:
    """Weights (length,) that rise linearly over `overlap` at both ends."""
    position = torch.arange(1, length + 1, device=like.device, dtype=torch.float32)
    return (torch.minimum(position, length + 1 - position) / (overlap + 1)).clamp(max=1)


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, *, grow: int = 1,
          shrink: int = 1) -> Tensor:  # fmt: skip
    """function(x) computed tile by tile and blended.

    x: (B, C, H, W). function multiplies height and width by `grow` / `shrink`; tile and overlap are in cells of
    `shrink` input pixels, so that every tile begins on a cell. Returns (B, C', H grow / shrink, W grow / shrink).
    """
    height, width = (side // shrink for side in x.shape[2:])
    total: Tensor | None = None
    weights = x.new_zeros(1, 1, height * grow, width * grow, dtype=torch.float32)
    for top in starts(height, tile, overlap):
        for left in starts(width, tile, overlap):
            bottom, right = min(top + tile, height), min(left + tile, width)
            piece = function(x[:, :, top * shrink : bottom * shrink, left * shrink : right * shrink])
            window = ramp(piece.shape[2], overlap * grow, x)[:, None] * ramp(piece.shape[3], overlap * grow, x)
            if total is None:
                total = piece.new_zeros(*piece.shape[:2], *weights.shape[2:], dtype=torch.float32)
            place = (..., slice(top * grow, bottom * grow), slice(left * grow, right * grow))
            total[place] += window * piece
            weights[place] += window
    assert total is not None
    return total / weights
