"""What has no counterpart of the same shape elsewhere: the autoencoder, and data read in each form."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from limner import build
from limner import config as configuration
from limner.bench.rounds import Contender
from limner.config import DataConfig
from limner.data.dataset import prepare
from limner.hardware import autocast

PICTURES, SIDE = 256, 64


def autoencoder(device: torch.device, batch: int) -> dict[str, Contender]:
    """Encoding and decoding `batch` pictures of 64x64 by the autoencoder of the preset `emoji-text`."""
    recipe = configuration.parse(build.preset("emoji-text"), "emoji-text")
    assert isinstance(recipe.space, configuration.LatentSpace)
    network: Any = build.autoencoder(recipe.space.autoencoder, 3).to(device).freeze()
    network.to(memory_format=torch.channels_last)
    x = torch.rand(batch, 3, SIDE, SIDE, device=device)
    z = network.encode(x).mean

    def run(work: Any, given: torch.Tensor) -> Contender:
        @torch.no_grad()
        def contender() -> object:
            with autocast("auto", device):
                return work(given)

        return contender

    return {"encode": run(network.encode, x), "decode": run(network.decode, z)}


@contextmanager
def loading(batch: int) -> Iterator[dict[str, Contender]]:
    """A batch of PNG pictures as a tensor: decoded once into a memory map, as Limner keeps them, or each time, as a
    data loader over `datasets` does it."""
    import datasets

    with tempfile.TemporaryDirectory() as folder:
        chance = np.random.default_rng(0)
        for number in range(PICTURES):
            coarse = Image.fromarray(chance.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(Path(folder) / f"{number:03d}.png")
        kept = prepare(DataConfig(source=folder, size=(SIDE, SIDE), flip=True))
        rows: Any = datasets.load_dataset("imagefolder", data_dir=folder, split="train", cache_dir=f"{folder}/cache")

        def decoded() -> object:
            images = [row["image"] for row in rows.select(chance.integers(0, PICTURES, batch))]
            return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1

        yield {
            "limner": lambda: kept.batch(chance.choice(kept.train, batch), chance),
            "datasets, PNG each time": decoded,
        }
