"""Conditions that are pictures: concatenated to x_t, channel by channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.errors import LimnerError
from limner.nn.conditioners import Embedded


class ImageConditioner(nn.Module):
    """A small picture, enlarged to the size of x_t (Dhariwal & Nichol 2021, section 5; Saharia et al. 2021).

    channels: of the picture. size: (H, W) of x_t. small: (h, w) of the pictures that the model knows; a larger one is
    reduced to it first, so that training may give the picture itself. null: whether an absent picture is grey;
    without it every picture must be given.
    """

    token_channels = None
    grey: Tensor

    def __init__(self, channels: int, size: tuple[int, int], small: tuple[int, int], *, null: bool = True) -> None:
        super().__init__()
        self.spatial_channels = channels
        self.size, self.small, self.null = size, small, null
        self.register_buffer("grey", torch.zeros(1, channels, *size), persistent=False)

    def forward(self, image: Tensor | None, batch: int, drop: Tensor | None = None) -> Embedded:
        """image (B, C, h, w) in [-1, 1], or None; drop (B,) bool marks rows to treat as absent."""
        if image is None:
            if not self.null:
                raise LimnerError(f"image: this model enlarges pictures of {self.small[1]}x{self.small[0]}; give image")
            return Embedded(spatial=self.grey.expand(batch, -1, -1, -1))
        if image.ndim != 4 or image.shape[1] != self.spatial_channels:
            raise LimnerError(f"image: shape {tuple(image.shape)} should be (B, {self.spatial_channels}, h, w)")
        if image.shape[2] > self.small[0] or image.shape[3] > self.small[1]:
            image = F.interpolate(image, self.small, mode="area")
        large = F.interpolate(image.to(self.grey), self.size, mode="bilinear")
        if drop is not None:
            large = torch.where(drop.to(large.device)[:, None, None, None], self.grey, large)
        return Embedded(spatial=large)
