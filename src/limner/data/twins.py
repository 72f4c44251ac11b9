"""What a picture itself gives to be asked for: its low-resolution twin, or itself."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFilter

from limner.config import ImageCondition
from limner.data.pixels import Pixels, View
from limner.data.transforms import array
from limner.nn.spatial import with_level

HELD_OUT_NOISE = 0.5
"""Where nothing is left to chance, the share of the most noise."""


@dataclass(frozen=True)
class Twins:
    """Small twins made as they are asked for: blurred, reduced (bicubic with antialiasing), JPEG, noise."""

    pictures: Pixels
    section: ImageCondition

    def take(self, rows: npt.NDArray[np.int64], view: View) -> torch.Tensor:
        """float32 (B, C, h, w) in [-1, 1]; with noise (B, C + 1, h, w), the last channel its level, 0 to 1."""
        large = self.pictures.take(rows, view)
        chances = view.generators(rows)
        small = np.stack([small_twin(p, self.section, chance) for p, chance in zip(large, chances, strict=True)])
        image = torch.from_numpy(small).float().div_(127.5).sub_(1.0)
        if not self.section.noise:
            return image
        most = self.section.noise
        if view.chance is None:
            level = np.full(len(rows), HELD_OUT_NOISE * most)
        else:
            level = np.array([chance.uniform(0, most) for chance in chances])
        noise = np.stack([chance.standard_normal(image.shape[1:], np.float32) for chance in chances])
        return with_level(image, torch.from_numpy(level).float(), torch.from_numpy(noise))

    def mirrorable(self, rows: npt.NDArray[np.int64]) -> None:
        return None

    def fingerprint(self) -> str:
        return self.section.model_dump_json()


def small_twin(picture: npt.NDArray[np.uint8], section: ImageCondition,
               chance: np.random.Generator) -> npt.NDArray[np.uint8]:  # fmt: skip
    """uint8 (C, h, w) of a picture (C, H, W)."""
    image = Image.fromarray(picture[0] if len(picture) == 1 else np.ascontiguousarray(picture.transpose(1, 2, 0)))
    if section.blur:
        image = image.filter(ImageFilter.GaussianBlur(chance.uniform(0, section.blur)))
    height, width = section.size
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    if section.jpeg is not None:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(chance.integers(section.jpeg, 96)))
        image = Image.open(buffer)
    return array(image)


@dataclass(frozen=True)
class Themselves:
    """The pictures as they are, for a model that is told what to vary."""

    pictures: Pixels

    def take(self, rows: npt.NDArray[np.int64], view: View) -> torch.Tensor:
        """float32 (B, C, H, W) in [-1, 1]."""
        return torch.from_numpy(self.pictures.take(rows, view)).float().div_(127.5).sub_(1.0)

    def mirrorable(self, rows: npt.NDArray[np.int64]) -> None:
        return None

    def fingerprint(self) -> str:
        return ""
