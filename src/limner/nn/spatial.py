"""Conditions that lie on the picture: concatenated to x_t, channel by channel.

Each of them has the size of x_t when it is concatenated, whatever that is: `forward` is told it, so that a canvas may
be larger than those in training (Rombach et al. 2022, section 4.3.2).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.errors import LimnerError
from limner.nn.conditioners import Embedded

Size = tuple[int, int]
Cells = Literal["any", "first"]


class ImageConditioner(nn.Module):
    """A small picture, enlarged to the size of x_t (Dhariwal & Nichol 2021, section 5; Saharia et al. 2021).

    channels: of the picture. size: (H, W) of x_t in training. small: (h, w) of the pictures that the model knows; a
    larger one is reduced to it first. null: whether an absent picture is grey; without it every picture must be given.
    levels: whether the model is told how noisy the small picture is (Ho et al. 2021, 2106.15282, section 4.2): one more
    channel, the same everywhere, 0 for a clean one.
    """

    token_channels = None
    grey: Tensor

    def __init__(self, channels: int, size: Size, small: Size, *, null: bool = True, levels: bool = False) -> None:
        super().__init__()
        self.channels, self.levels = channels, levels
        self.spatial_channels = channels + levels
        self.size, self.small, self.null = size, small, null
        self.register_buffer("grey", torch.zeros(1, self.spatial_channels, 1, 1), persistent=False)

    def forward(self, image: Tensor | None, batch: int, drop: Tensor | None = None,
                size: Size | None = None) -> Embedded:  # fmt: skip
        """image (B, C, h, w) in [-1, 1], with the level (B, C + 1, h, w) where the model is told one, or None; drop
        (B,) bool marks rows to treat as absent; size: of x_t."""
        size = size or self.size
        grey = self.grey.expand(batch, -1, *size)
        if image is None:
            if not self.null:
                raise LimnerError(f"image: this model enlarges pictures of {self.small[1]}x{self.small[0]}; give image")
            return Embedded(spatial=grey)
        if image.ndim == 4 and self.levels and image.shape[1] == self.channels:
            image = F.pad(image, (0, 0, 0, 0, 0, 1))
        if image.ndim != 4 or image.shape[1] != self.spatial_channels:
            raise LimnerError(f"image: shape {tuple(image.shape)} should be (B, {self.channels}, h, w)")
        small = tuple(round(k * n / m) for k, n, m in zip(self.small, size, self.size, strict=True))
        if image.shape[2] > small[0] or image.shape[3] > small[1]:
            image = F.interpolate(image, small, mode="area")
        return Embedded(spatial=_dropped(F.interpolate(image.to(self.grey), size, mode="bilinear"), grey, drop))


class SemanticMapConditioner(nn.Module):
    """Class numbers, one-hot, brought to the size of x_t by a learned convolution of stride f (the spatial rescaler of
    Rombach et al. 2022, appendix D; theirs averages classes before it learns). A pixel of the void class is zero, and
    an absent map is one of nothing but void.

    classes: K. width: channels that they become. void: the class that says nothing. size: of x_t in training.
    factor: f, the picture's size over that of x_t.
    """

    token_channels = None

    def __init__(self, classes: int, width: int, size: Size, *, void: int | None = None, factor: int = 1) -> None:
        super().__init__()
        self.classes, self.void, self.size, self.factor = classes, void, size, factor
        self.spatial_channels = width
        self.rescale = nn.Conv2d(classes, width, factor, factor)
        nn.init.normal_(self.rescale.weight, std=1.0 / factor)

    def forward(self, semantic_map: Tensor | None, batch: int, drop: Tensor | None = None,
                size: Size | None = None) -> Embedded:  # fmt: skip
        """semantic_map: class numbers (B, h, w), 255 or void for none; or float (B, K, h, w), one-hot or soft; or None.

        Another size than f times that of x_t is brought to it by nearest neighbour. Raises LimnerError for a class
        beyond K, and for another shape.
        """
        height, width = ((n * self.factor) for n in size or self.size)
        kernel = self.rescale.weight
        if semantic_map is None:
            return Embedded(spatial=self.rescale(kernel.new_zeros(batch, self.classes, height, width)))
        if semantic_map.ndim == 3:
            hot = self._one_hot(semantic_map.to(kernel.device))
        elif semantic_map.ndim == 4 and semantic_map.shape[1] == self.classes:
            hot = semantic_map.to(kernel)
        else:
            raise LimnerError(f"semantic_map: shape {tuple(semantic_map.shape)} should be (B, h, w), or "
                              f"(B, {self.classes}, h, w)")  # fmt: skip
        if hot.shape[2:] != (height, width):
            hot = F.interpolate(hot, (height, width), mode="nearest-exact")
        hot = _dropped(hot, torch.zeros_like(hot), drop)
        return Embedded(spatial=self.rescale(hot))

    def _one_hot(self, numbers: Tensor) -> Tensor:
        """float (B, K, h, w)."""
        nothing = numbers == 255
        if self.void is not None:
            nothing = nothing | (numbers == self.void)
        wrong = ((numbers < 0) | (numbers >= self.classes)) & ~nothing
        if wrong.any():
            row, y, x = (int(place) for place in wrong.nonzero()[0])
            raise LimnerError(f"semantic_map {row}: class {int(numbers[row, y, x])} at row {y}, column {x}, should be "
                              f"0 to {self.classes - 1}, or 255 for none")  # fmt: skip
        hot = F.one_hot(numbers.masked_fill(nothing, 0).long(), self.classes).movedim(3, 1)
        return hot.to(self.rescale.weight).masked_fill(nothing[:, None], 0.0)


class MaskConditioner(nn.Module):
    """A picture with a hole, and where the hole is (Rombach et al. 2022, section 4.5; Saharia et al. 2022, 2111.05826).

    An absent picture is nothing but hole: grey, and masked everywhere. In latent space the picture is its latent, and
    the mask has the latent's size: `build.Model` sees to it, by `coloured` and `mask_of_latents`.
    channels: of x_t. size: of x_t in training. null: whether the picture may be absent. colour: of the picture in the
    hole, 0 is grey, -1 black. signed: whether the network's mask is -1 and 1. cells: see `mask_of_latents`.
    """

    token_channels = None
    hole: Tensor

    def __init__(self, channels: int, size: Size, *, null: bool = True, colour: float = 0.0, signed: bool = False,
                 cells: Cells = "any") -> None:  # fmt: skip
        super().__init__()
        self.size, self.null, self.colour, self.signed, self.cells = size, null, colour, signed, cells
        self.spatial_channels = channels + 1
        self.register_buffer("hole", F.pad(torch.zeros(channels), (0, 1), value=1.0)[None, :, None, None],
                             persistent=False)  # fmt: skip

    def forward(self, mask: Tensor | None, batch: int, drop: Tensor | None = None,
                size: Size | None = None) -> Embedded:  # fmt: skip
        """mask: (B, C + 1, H, W) as `with_hole` makes it, of the size of x_t, or None; drop (B,) bool: absent rows."""
        hole = self.hole.expand(batch, -1, *(size or self.size))
        if mask is None:
            if not self.null:
                raise LimnerError("mask: this model paints in the holes of pictures; give image and mask")
            return Embedded(spatial=hole)
        if mask.shape != hole.shape:
            raise LimnerError(f"mask: shape {tuple(mask.shape)} should be {tuple(hole.shape)}: picture and mask")
        mask = mask.to(hole)
        if self.signed:
            mask = torch.cat([mask[:, :-1], 2 * mask[:, -1:] - 1], dim=1)
        return Embedded(spatial=_dropped(mask, hole, drop))

    def coloured(self, pictures: Tensor) -> Tensor:
        """(B, C + 1, H, W) as `with_hole` makes it, with the hole in the colour that the model knows."""
        mask = pictures[:, -1:]
        return torch.cat([pictures[:, :-1] + self.colour * mask, mask], dim=1) if self.colour else pictures


def _dropped(given: Tensor, absent: Tensor, drop: Tensor | None) -> Tensor:
    return given if drop is None else torch.where(drop.to(given.device)[:, None, None, None], absent, given)


def with_hole(image: Tensor, mask: Tensor) -> Tensor:
    """(B, C + 1, H, W): the picture (B, C, H, W), grey where the mask (B, 1, H, W) is 1, and the mask."""
    return torch.cat([image * (1 - mask), mask.expand(len(image), -1, -1, -1)], dim=1)


def with_level(image: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """(B, C + 1, h, w): the picture (B, C, h, w) with noise of standard deviation `level` (B,), and that level."""
    plane = level[:, None, None, None]
    return torch.cat([image + plane * noise, plane.expand(-1, 1, *image.shape[2:])], dim=1)


def mask_of_latents(mask: Tensor, factor: int, cells: Cells = "any") -> Tensor:
    """A mask (B, 1, H, W) at the size of the latents. A cell belongs to the hole where any of its pixels does, or
    where the first one, its upper left, does: the nearest neighbour of CompVis' `scripts/inpaint.py`."""
    return F.max_pool2d(mask, factor) if cells == "any" else mask[:, :, ::factor, ::factor]
