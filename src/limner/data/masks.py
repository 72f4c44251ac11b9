"""Masks made at random, and pictures with a hole in them: what a model learns to paint in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from limner.data.pixels import Pixels, View
from limner.nn.spatial import with_hole

LEAST, MOST = 0.04, 0.96
"""The shares of a picture that a made mask covers."""

Mask = npt.NDArray[np.bool_]


def made(size: tuple[int, int], shapes: Sequence[str], chance: np.random.Generator) -> Mask:
    """A mask (H, W), True where the picture is to be painted; one of `shapes`: "brush" strokes, a "box", or what lies
    "outside" of a box (outpainting). The strokes are those of free-form masks (Suvorov et al. 2022, 2109.07161)."""
    shape = shapes[int(chance.integers(len(shapes)))]
    mask = _brush(size, chance) if shape == "brush" else _box(size, chance, outside=shape == "outside")
    return mask if LEAST <= mask.mean() <= MOST else _middle(size)


def _box(size: tuple[int, int], chance: np.random.Generator, *, outside: bool) -> Mask:
    """A box of a quarter to three quarters of each side; `outside`: what is kept, and it may touch the border."""
    mask = np.full(size, outside)
    spans = []
    for side in size:
        length = max(1, round(side * chance.uniform(*((0.5, 1.0) if outside else (0.2, 0.7)))))
        start = int(chance.integers(side - length + 1))
        spans.append(slice(start, start + length))
    mask[spans[0], spans[1]] = not outside
    return mask


def _brush(size: tuple[int, int], chance: np.random.Generator) -> Mask:
    """One to four strokes of a few straight pieces."""
    height, width = size
    image = Image.new("1", (width, height))
    draw = ImageDraw.Draw(image)
    for _ in range(int(chance.integers(1, 5))):
        thick = max(1, round(min(size) * chance.uniform(0.06, 0.25)))
        angle = chance.uniform(0, 2 * np.pi)
        points = [(chance.uniform(0, width), chance.uniform(0, height))]
        for _ in range(int(chance.integers(1, 6))):
            angle += chance.uniform(-np.pi / 2, np.pi / 2)
            step = min(size) * chance.uniform(0.1, 0.5)
            points.append((points[-1][0] + step * np.cos(angle), points[-1][1] + step * np.sin(angle)))
        draw.line(points, fill=1, width=thick, joint="curve")
        for x, y in points:
            draw.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=1)
    return np.asarray(image)


def _middle(size: tuple[int, int]) -> Mask:
    """The middle quarter of a picture: what stands in for a mask of next to nothing or nearly all."""
    mask = np.zeros(size, dtype=bool)
    height, width = size
    mask[height // 4 : max(height // 4 + 1, 3 * height // 4), width // 4 : max(width // 4 + 1, 3 * width // 4)] = True
    return mask


@dataclass(frozen=True)
class Masks:
    """Pictures with holes. column: the masks of the data, 0 and 1; None: made at random, of these shapes."""

    pictures: Pixels
    shapes: tuple[str, ...]
    column: Pixels | None = None

    def take(self, rows: npt.NDArray[np.int64], view: View) -> torch.Tensor:
        """float32 (B, C + 1, H, W): the picture, grey in the hole, and the mask, 1 in the hole."""
        image = torch.from_numpy(self.pictures.take(rows, view)).float().div_(127.5).sub_(1.0)
        if self.column is not None:
            mask = self.column.take(rows, view)
        else:
            mask = np.stack([made(self.pictures.size, self.shapes, c) for c in view.generators(rows)])[:, None]
        return with_hole(image, torch.from_numpy(mask).float())

    def mirrorable(self, rows: npt.NDArray[np.int64]) -> None:
        return None

    def fingerprint(self) -> str:
        return f"{self.shapes} {self.column.digest if self.column else ''}"
