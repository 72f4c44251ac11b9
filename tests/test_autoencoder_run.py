"""An autoencoder through the real loop: a run that loads, and a resume that is bitwise the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from limner import api, build
from limner.config import RunConfig
from limner.generator import Generator
from limner.training.autoencoder import AutoencoderTask
from limner.training.loop import TrainResult, train
from tiny_autoencoder import BATCH, Shapes, recipe

SETTINGS = {
    "batch": BATCH, "warmup_images": 16, "precision": "fp32", "compile": "off", "log_every": 16, "previews": 2,
    "held_out_every": 10_000, "preview_every": 10_000, "checkpoint_every": 10_000, "decay": "constant",
}  # fmt: skip


def run(out: Path, images: int, resume: bool = False, regulariser: dict[str, Any] | None = None,
        **loss: Any) -> TrainResult:  # fmt: skip
    config: RunConfig = recipe(regulariser, training=SETTINGS | {"images": images}, **loss)
    torch.manual_seed(0)
    task = AutoencoderTask(build.model(config), config, Shapes())
    return train(task, Shapes(), config, out, resume=resume, console=Console(quiet=True))


@pytest.mark.parametrize(
    ("regulariser", "loss"),
    [
        ({"kind": "kl"}, {"equivariance": 0.5}),
        ({"kind": "vq", "codes": 16, "restart_after": 3}, {"adversarial": 0.1, "adversarial_from": 24, "lecam": 0.1}),
    ],
)
def test_resumed_is_the_same_bit_by_bit(tmp_path: Path, regulariser: dict[str, Any], loss: dict[str, Any]) -> None:
    run(tmp_path / "whole", 96, regulariser=regulariser, **loss)
    run(tmp_path / "parts", 48, regulariser=regulariser, **loss)
    run(tmp_path / "parts", 96, resume=True, regulariser=regulariser, **loss)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    # the means are measured at the end of each sitting with that sitting's average, and don't act on the training
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_loads_and_reconstructs(tmp_path: Path) -> None:
    result = run(tmp_path / "run", 480)
    generator = api.load(tmp_path / "run")
    assert isinstance(generator, Generator)
    x = Shapes().batch(Shapes.held_out)["image"]
    z = generator.encode(x)
    assert z.shape == (32, 4, 8, 8)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=0.35, rtol=0)
    autoencoder = generator.model.autoencoder
    assert autoencoder is not None
    drawn = autoencoder.normalise(autoencoder.encode(x).sample(torch.Generator().manual_seed(0)))
    torch.testing.assert_close(drawn.std((0, 2, 3)), torch.ones(4), atol=0.25, rtol=0)
    error = (generator.reconstruct(x) - x).square().mean()
    assert error < 0.2 * x.square().mean()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "pixel", "kl", "grad_norm"} <= set(lines[0])
    assert {"held_out_psnr", "held_out_ssim"} <= set(lines[-1])
    assert result.images == 480
    assert list((tmp_path / "run" / "previews").glob("*.png"))
