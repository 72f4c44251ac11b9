"""Pictures along the way, and what their colours are beside the data's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from limner.generator import to_uint8
from limner.outputs import grid, png
from limner.training.draws import Source

__all__ = ["channel_statistics", "data_statistics", "save", "to_uint8"]

STATISTICS_ROWS = 1024


def save(path: Path, images: npt.NDArray[np.uint8], captions: list[str]) -> None:
    """A captioned PNG grid."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(grid(list(images), captions)))


def channel_statistics(images: npt.NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation by channel, in units of [-1, 1]: a shift of colour shows here first."""
    scaled = images.reshape(-1, images.shape[-1]) / 127.5 - 1.0
    return [round(float(x), 4) for x in scaled.mean(0)], [round(float(x), 4) for x in scaled.std(0)]


def data_statistics(data: Source) -> dict[str, list[float]]:
    """`data_mean` and `data_std` of up to 1,024 rows, to stand beside the previews' own."""
    mean, std = channel_statistics(data.uint8(data.train[:STATISTICS_ROWS]))
    return {"data_mean": mean, "data_std": std}
