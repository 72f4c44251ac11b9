"""A tiny data set, a recipe for it, and the command line called as a user calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from limner.cli.program import run

CLASSES = ("cat", "dog", "fish")

RECIPE = """\
task: diffusion
data: {size: [8, 8], held_out: 0.2}
model: {kind: unet, norm_groups: 4, head_dim: 8, levels: [{channels: 8}, {channels: 8, attention: true}]}
conditions: [{kind: label}]
training: {batch: 8, warmup_images: 8, compile: "off", precision: fp32, previews: 3, log_every: 8}
sampling: {steps: 2}
"""


def pictures(folder: Path, each: int = 8) -> Path:
    """A folder by class: each class has its own colour, each picture its own brightness."""
    rng = np.random.default_rng(0)
    for channel, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = np.full((8, 8, 3), 40, np.uint8)
            pixels[..., channel] = rng.integers(150, 255, (8, 8))
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def recipe(folder: Path) -> Path:
    """The recipe as a file."""
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    return path


class Workshop:
    """A folder with data and a trained run, for the tests of one module; caches stay inside it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LIMNER_CACHE", str(folder / "cache"))
        self.folder = folder
        self.data = pictures(folder / "data")
        self.recipe = recipe(folder)
        self.run = folder / "run"
        assert self.train(self.run) == 0

    def train(self, out: Path, *more: str, data: Path | None = None, images: int = 16) -> int:
        """`limner train` of the tiny recipe; its exit code."""
        asked = ["train", str(data or self.data), "--preset", str(self.recipe), "--out", str(out)]
        return run([*asked, "--images", str(images), *more])

    def sample(self, *more: str) -> int:
        """`limner sample` of the trained run; its exit code."""
        return run(["sample", str(self.run), *more])


def program(*arguments: str, debug: bool = False, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m limner` in a process of its own, or some Python `code`."""
    command = [sys.executable, "-c", code] if code is not None else [sys.executable, "-m", "limner", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LIMNER_DEBUG": "1" if debug else "0"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
