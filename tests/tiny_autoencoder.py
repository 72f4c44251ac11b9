"""An autoencoder training that takes milliseconds a step: rectangles of 16x16 pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from limner.config import RunConfig

SIZE, BATCH = 16, 8


class Shapes:
    """A bright rectangle on a dark ground in each picture; rows 0 to 63 train, 64 to 95 are held out."""

    train, held_out, digest = np.arange(64), np.arange(64, 96), "shapes"

    def uint8(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        made = np.full((len(rows), SIZE, SIZE, 3), 30, dtype=np.uint8)
        for picture, row in zip(made, rows, strict=True):
            draw = np.random.default_rng(int(row))
            top, left = draw.integers(0, 9, 2)
            picture[top : top + 7, left : left + 7] = draw.integers(100, 255, 3)
        return made

    def batch(self, rows: npt.NDArray[np.int64], generator: np.random.Generator | None = None) -> dict[str, Any]:
        return {"image": torch.from_numpy(self.uint8(rows)).permute(0, 3, 1, 2).float() / 127.5 - 1}


def recipe(regulariser: dict[str, Any] | None = None, channels: int = 16,
           training: dict[str, Any] | None = None, **loss: Any) -> RunConfig:  # fmt: skip
    """The tiny recipe, with these settings of `autoencoder_loss`."""
    return RunConfig.model_validate({
        "task": "autoencoder",
        "data": {"size": SIZE, "source": "tiny"},
        "training": {"previews": 3} | (training or {}),
        "model": {
            "kind": "autoencoder", "levels": [{"channels": channels}, {"channels": channels}], "middle": "none",
            "latent_channels": 4, "norm_groups": 4, "regulariser": regulariser or {"kind": "kl"},
        },
        "autoencoder_loss": {"perceptual": 0.0, "discriminator_channels": 8, "discriminator_layers": 2} | loss,
    })  # fmt: skip
