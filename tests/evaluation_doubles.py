"""A feature network small enough for a test, and pictures whose class can be seen."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from limner.evaluation.collect import collect
from limner.evaluation.features import FeatureNetwork

COLOURS = np.array([[220, 40, 40], [40, 200, 60], [50, 60, 230]])
NAMES = ("red", "green", "blue")


class Tiny(FeatureNetwork):
    """pooled: 12 block means of 2x2 places; spatial: a row of pixels; logits: by colour channel."""

    name = "tiny"
    dim = 12

    def side(self, size: tuple[int, ...]) -> int:
        return 8

    def features(self, x: Tensor) -> dict[str, Tensor]:
        pooled = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return {"pooled": pooled, "spatial": x[:, :, 4].flatten(1), "logits": 4 * x.mean(dim=(2, 3))}


def pictures(count: int, seed: int = 0, size: int = 8) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Noisy pictures (count, size, size, 3) of one colour each, and their classes, in rotation."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % len(COLOURS)
    blocks = generator.normal(0, 25, (count, 2, 2, 3)).repeat(size // 2, 1).repeat(size // 2, 2)
    x = COLOURS[labels][:, None, None] + blocks + generator.normal(0, 10, (count, size, size, 3))
    return x.clip(0, 255).astype(np.uint8), labels


def measure_half(rank: int, port: int, count: int, results: str) -> None:
    """One of two processes: measures its part of `pictures(count)` and writes the covariance of all of them."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x, labels = pictures(count)
    part = slice(0, count // 3) if rank == 0 else slice(count // 3, count)
    found = collect([(x[part], {"label": labels[part]})], Tiny())
    np.save(f"{results}/{rank}.npy", found.pooled.gaussian().covariance.numpy())
    torch.distributed.destroy_process_group()


def evaluate_half(rank: int, port: int, arguments: list[str], results: str) -> None:
    """One of two processes as torchrun starts them: `limner evaluate`, with what it prints in `results`."""
    import contextlib
    import os
    from pathlib import Path

    from limner.cli.program import run
    from limner.evaluation import features

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    features.NETWORKS["tiny"] = lambda *_: Tiny()
    with Path(results, f"{rank}.json").open("w") as file, contextlib.redirect_stdout(file):
        code = run(["evaluate", *arguments, "--features", "tiny", "--json"])
    assert code == 0
