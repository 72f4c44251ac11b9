"""The autoencoder stage: its terms, its adversarial stage, what it measures."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from limner import build
from limner.config import RunConfig
from limner.errors import LimnerError
from limner.training.autoencoder import AutoencoderTask, Warp, autoencoder_of, measure_latents
from limner.training.draws import Part
from tiny_autoencoder import BATCH, SIZE, Shapes, recipe


def task_of(config: RunConfig) -> AutoencoderTask:
    torch.manual_seed(0)
    return AutoencoderTask(build.model(config), config, Shapes())


def step(task: AutoencoderTask, images: int) -> dict[str, float]:
    """One step of plain Adam, each objective reaching its own module."""
    data, part = Shapes(), Part(images, 0, BATCH, BATCH)
    rows = np.random.default_rng(images).integers(0, 64, BATCH)
    losses = task.losses(data.batch(rows) | {"part": part}, torch.Generator().manual_seed(images), 0.0)
    for name, objective in losses.objectives.items():
        optimizer = task.__dict__.setdefault("optimizers", {}).setdefault(
            name, torch.optim.Adam([p for p in task.modules[name].parameters() if p.requires_grad], 3e-3)
        )
        optimizer.zero_grad()
        torch.autograd.backward(objective, inputs=optimizer.param_groups[0]["params"], retain_graph=True)
    for name in losses.objectives:
        task.__dict__["optimizers"][name].step()
    return {name: value.item() for name, value in losses.logs.items()}


@pytest.mark.parametrize("regulariser", [{"kind": "kl"}, {"kind": "vq", "codes": 32, "restart_after": 10}])
def test_it_learns(regulariser: dict[str, Any]) -> None:
    task = task_of(recipe(regulariser))
    before = task.held_out(task.model, Shapes())
    logs = [step(task, i * BATCH) for i in range(80)]
    after = task.held_out(task.model, Shapes())
    assert after["held_out_psnr"] > before["held_out_psnr"] + 5
    assert after["held_out_ssim"] > before["held_out_ssim"]
    assert logs[-1]["pixel"] < 0.5 * logs[0]["pixel"]
    if regulariser["kind"] == "vq":
        assert after["held_out_perplexity"] > 3
        assert {"loss", "pixel", "codebook", "perplexity"} == set(logs[-1])
    else:
        assert {"loss", "pixel", "kl"} == set(logs[-1])


def test_objective_is_the_sum_of_its_terms() -> None:
    """Rombach et al. weigh the KL against the error summed over the picture: ours is the mean, hence 3 x 16 x 16."""
    logs = step(task_of(recipe({"kind": "kl", "weight": 0.5}, perceptual=2.0)), 0)
    assert logs["loss"] == pytest.approx(logs["pixel"] + 2 * logs["perceptual"] + 0.5 * logs["kl"] / 768, rel=1e-5)


def test_a_step_depends_on_the_seed_and_the_images_seen_alone() -> None:
    runs = [[step(task, i * BATCH)["loss"] for i in range(3)] for task in (task_of(recipe()), task_of(recipe()))]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("regulariser", [{"kind": "kl"}, {"kind": "vq", "codes": 32, "restart_after": 10}])
def test_the_adversarial_stage_does_not_worsen_a_good_autoencoder(regulariser: dict[str, Any]) -> None:
    task = task_of(recipe(regulariser, adversarial=0.1, adversarial_from=120 * BATCH, adversarial_warmup=20 * BATCH))
    for i in range(120):
        step(task, i * BATCH)
    good = task.held_out(task.model, Shapes())["held_out_psnr"]
    logs = [step(task, i * BATCH) for i in range(120, 200)]
    after = task.held_out(task.model, Shapes())["held_out_psnr"]
    assert good > 19
    assert after > good - 0.5
    verdicts = [log["discriminator"] for log in logs]
    assert verdicts[0] == pytest.approx(1.0, abs=0.1)
    assert min(verdicts) < 0.9, "the discriminator learns nothing"
    assert all(0 <= log["adaptive_weight"] <= task.loss.adaptive_max for log in logs)


def test_the_adversarial_stage_starts_late_and_rises() -> None:
    task = task_of(recipe(adversarial=1.0, adversarial_from=100, adversarial_warmup=50))
    before, at_once, half = (step(task, images) for images in (99, 100, 125))
    assert "adversarial" not in before
    assert at_once["loss"] == pytest.approx(at_once["pixel"], rel=1e-3)
    share = (half["loss"] - half["pixel"]) / (half["adaptive_weight"] * half["adversarial"])
    assert share == pytest.approx(0.5, abs=0.05)
    assert {"logits_real", "logits_fake", "adaptive_weight", "discriminator"} <= set(half)


def test_nan_in_the_adversarial_stage_is_survived_and_said(caplog: pytest.LogCaptureFixture) -> None:
    task = task_of(recipe(adversarial=1.0, adversarial_from=0))
    assert "adversarial" in step(task, 0)
    with torch.no_grad():
        next(task.modules["discriminator"].parameters()).fill_(float("nan"))
    with caplog.at_level(logging.WARNING):
        logs = step(task, 8)
    assert "adversarial" not in logs
    assert np.isfinite(logs["loss"])
    assert "goes on without it" in caplog.text
    assert all(p.isfinite().all() for p in task.model.parameters())
    again = task_of(recipe(adversarial=1.0, adversarial_from=0))
    again.modules["discriminator"].load_state_dict(task.modules["discriminator"].state_dict())
    assert "adversarial" not in step(again, 16)


def test_r1_and_lecam_join_the_discriminator() -> None:
    plain, regular = (step(task_of(recipe(adversarial=1.0, adversarial_from=0, **extra)), 0)
                      for extra in ({}, {"r1": 1.0, "lecam": 1.0}))  # fmt: skip
    assert plain["discriminator"] == pytest.approx(regular["discriminator"])


def test_warp_treats_latent_and_picture_alike() -> None:
    """On a ramp, shrinking and turning commute with the mean over cells."""
    ramp = torch.linspace(-1, 1, 32).expand(1, 2, 32, 32) * torch.tensor([1.0, 0.3])[:, None, None]
    warp = Warp((6, 6), 4, turns=1)
    picture, latent = warp.picture(ramp), warp(F.avg_pool2d(ramp, 4))
    assert picture.shape == (1, 2, 24, 24)
    torch.testing.assert_close(F.avg_pool2d(picture, 4), latent, atol=0.05, rtol=0)


def test_equivariance_changes_the_target_of_some_steps() -> None:
    always, never = task_of(recipe(equivariance=1.0)), task_of(recipe())
    ours, plain = ([step(task, i * BATCH)["pixel"] for i in range(6)] for task in (always, never))
    assert ours != plain
    assert ours[-1] < ours[0]


def test_measured_latents() -> None:
    task, data = task_of(recipe()), Shapes()
    autoencoder = autoencoder_of(task.model)
    measure_latents(autoencoder, data)
    with torch.no_grad():
        posterior = autoencoder.encode(data.batch(data.train)["image"])
        draws = torch.cat([posterior.sample(torch.Generator().manual_seed(i)) for i in range(30)])
    normal = autoencoder.normalise(draws)
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(4), atol=0.02, rtol=0)
    torch.testing.assert_close(normal.std((0, 2, 3)), torch.ones(4), atol=0.02, rtol=0)


def test_preview_is_side_by_side() -> None:
    task = task_of(recipe())
    images, captions = task.preview(task.model)
    assert images.shape == (3, SIZE, 2 * SIZE, 3)
    assert np.array_equal(images[:, :, :SIZE], Shapes().uint8(Shapes.held_out[:3]))
    assert all(caption.endswith(" dB") for caption in captions)


def test_a_model_on_pixels_has_no_autoencoder() -> None:
    config = RunConfig.model_validate({"data": {"size": 16}, "model": {"kind": "unet", "levels": [{"channels": 32}]}})
    with pytest.raises(LimnerError, match="has no autoencoder"):
        autoencoder_of(build.model(config))
