"""The diffusion task and the noisy classifier: what their losses are, and that they learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from limner import build
from limner.config import RunConfig
from limner.errors import LimnerError
from limner.training.draws import Batches, Part
from limner.training.loop import train
from limner.training.tasks import ClassifierTask, DiffusionTask, drawn_times, hidden_weights
from tiny_training import Pictures, make_task, recipe, run

RNG = torch.Generator()


def changed(config: RunConfig, **sections: Any) -> RunConfig:
    return RunConfig.model_validate({**config.model_dump(), **sections})


def test_the_loss_is_that_of_its_definition() -> None:
    """v-prediction on the cosine schedule, written out, with the task's own times, noise and dropped labels."""
    config, data = recipe(), Pictures()
    task = make_task(config, data)
    assert isinstance(task, DiffusionTask)
    task.model.eval()
    torch.nn.init.normal_(task.model.network.out.weight, std=0.1)
    batch = Batches(data, 0, 8).load(16)[0]
    part: Part = batch["part"]
    result = task.losses(batch, RNG, 0.0)
    t = drawn_times(part, config).float()
    assert sorted((t * 8).long().tolist()) == list(range(8))
    eps, x0 = part.noise(0, (3, 8, 8), torch.device("cpu")), batch["image"]
    alpha, sigma = torch.cos(torch.pi / 2 * t)[:, None, None, None], torch.sin(torch.pi / 2 * t)[:, None, None, None]
    drop = torch.rand(8, generator=part.generator(0, "drop label")) < 0.2
    label = torch.where(drop, -1, batch["label"])
    raw = task.model.raw(alpha * x0 + sigma * eps, t, task.model.embed({"label": label}, 8))
    expected = (raw - (alpha * eps - sigma * x0)).square().flatten(1).mean(1)
    assert result.objectives["model"].item() == pytest.approx(expected.mean().item(), rel=1e-4)
    assert result.logs["loss"].item() == pytest.approx(expected.mean().item(), rel=1e-4)
    low = expected[t < 0.25]
    assert result.logs["loss_t0.00_0.25"].tolist() == pytest.approx([low.sum().item(), len(low)], rel=1e-4)


def test_each_condition_is_dropped_as_often_as_asked_and_by_itself() -> None:
    config = recipe()
    task = make_task(config, Pictures())
    assert isinstance(task, DiffusionTask)
    dropped = torch.cat([task._dropped(Part(i, 0, 64, 64))["label"] for i in range(0, 6400, 64)])
    assert 0.17 < dropped.float().mean() < 0.23


def test_learned_variance_has_the_hybrid_loss_and_leaves_the_mean_alone() -> None:
    base = recipe()
    process = base.process.model_dump() | {"learned_variance": True, "prediction": "epsilon"}
    process["schedule"] = {"kind": "linear", "steps": 50}
    config, data = changed(base, process=process), Pictures()
    task = make_task(config, data)
    batch = Batches(data, 0, 8).load(0)[0]
    result = task.losses(batch, RNG, 0.0)
    assert set(result.logs) >= {"loss", "vlb"}
    assert torch.isfinite(result.logs["vlb"])
    result.objectives["model"].backward()
    gradient = task.modules["model"].network.out.weight.grad
    assert gradient[3:].abs().sum() > 0
    with_bound = gradient[:3].clone()
    without = changed(config, process=process | {"vlb_weight": 0.0})
    plain = make_task(without, data)
    plain.losses(batch, RNG, 0.0).objectives["model"].backward()
    torch.testing.assert_close(plain.modules["model"].network.out.weight.grad[:3], with_bound)


def test_a_weighting_changes_the_loss() -> None:
    base, data = recipe(), Pictures()
    batch = Batches(data, 0, 8).load(0)[0]
    values = []
    for kind in ("simple", "min_snr", "truncated_snr", "sigmoid"):
        config = changed(base, process=base.process.model_dump() | {"weighting": {"kind": kind}})
        values.append(make_task(config, data).losses(batch, RNG, 0.0).objectives["model"].item())
    assert len(set(values)) == 4


def test_held_out_figures_are_the_same_each_time_and_previews_too() -> None:
    config, data = recipe(), Pictures()
    task = make_task(config, data)
    average = task.modules["model"].eval()
    with torch.no_grad():
        one, two = task.held_out(average, data), task.held_out(average, data)
    assert one == two
    assert {"held_out_loss", "held_out_loss_t0.00_0.25", "held_out_loss_t0.75_1.00"} <= one.keys()
    pictures, captions = task.preview(average)
    assert pictures.dtype == np.uint8
    assert pictures.shape == (2, 8, 8, 3)
    assert captions == ["red", "blue"]
    assert np.array_equal(pictures, task.preview(average)[0])


def test_unconditional_models_train_and_draw(tmp_path: Path) -> None:
    config = changed(recipe(images=32), conditions=[], classes=None)
    result = run(tmp_path, config)
    assert len(result.figures["preview_mean"]) == 3


def test_no_held_out_rows_is_no_hindrance(tmp_path: Path) -> None:
    result = run(tmp_path, recipe(images=16), data=Pictures(held_out=0))
    assert "held_out_loss" not in result.figures
    assert result.images == 16


def test_a_trained_model_draws_the_class_that_it_is_asked_for(tmp_path: Path) -> None:
    """The decisive one: label 0 comes out redder than blue, label 1 bluer than red."""
    config = changed(recipe(images=1280, lr=2e-2, previews=8), sampling={"steps": 8, "guidance": 1.0})
    data = Pictures()
    task = make_task(config, data)
    train(task, data, config, tmp_path)
    pictures, captions = task.preview(task.modules["model"].eval())
    redder = pictures[..., 0].astype(float).mean((1, 2)) - pictures[..., 2].astype(float).mean((1, 2))
    assert all((value > 0) == (caption == "red") for value, caption in zip(redder, captions, strict=True)), redder


def test_log_uniform_times_dwell_on_little_noise() -> None:
    config = recipe(times="log_uniform")
    t = drawn_times(Part(0, 0, 1000, 1000), config)
    assert float(t.min()) >= 1e-3
    assert float(t.max()) <= 1.0
    assert float((t < 10**-1.5).double().mean()) == pytest.approx(0.5, abs=0.01)


def test_muon_is_given_the_body_alone() -> None:
    model = build.model(recipe())
    hidden = set(hidden_weights(model))
    assert hidden
    assert all(name.split(".")[1] in ("down", "middle", "up") for name in hidden)
    assert not any(part in name for name in hidden for part in ("stem", ".out.", "time", "conditioner", ".emb."))
    assert hidden <= {name for name, _ in model.named_parameters()}


def test_the_classifier_learns_and_is_told_by_noise_band(tmp_path: Path) -> None:
    config = changed(recipe("classifier", images=1600, lr=5e-3, batch=16, log_every=400, patience=100))
    result = run(tmp_path, config)
    figures = result.figures
    assert figures["held_out_accuracy_t0.00_0.25"] == 1.0
    assert figures["held_out_accuracy"] > 0.6
    assert {"accuracy", "accuracy_t0.75_1.00", "held_out_loss", "held_out_loss_t0.25_0.50"} <= figures.keys()
    assert "accuracy_top5" not in figures


def test_label_smoothing_is_in_the_loss_and_not_in_the_held_out_one() -> None:
    data = Pictures()
    batch = Batches(data, 0, 8).load(0)[0]
    smooth = make_task(changed(recipe("classifier"), label_smoothing=0.5), data)
    sharp = make_task(recipe("classifier"), data)
    for task in (smooth, sharp):
        assert isinstance(task, ClassifierTask)
        torch.manual_seed(0)
        for parameter in task.model.network.head.parameters():
            torch.nn.init.normal_(parameter)
        task.model.eval()
    with torch.no_grad():
        losses = [float(task.losses(batch, RNG, 0.0).objectives["model"]) for task in (smooth, sharp)]
        assert losses[0] != pytest.approx(losses[1])
        held = [task.held_out(task.modules["model"], data)["held_out_loss"] for task in (smooth, sharp)]
    assert held[0] == held[1]


def test_the_classifiers_loss_is_cross_entropy_of_the_noised_picture() -> None:
    config, data = recipe("classifier"), Pictures()
    task = make_task(config, data)
    assert isinstance(task, ClassifierTask)
    task.model.eval()
    batch = Batches(data, 0, 8).load(8)[0]
    t = drawn_times(batch["part"], config).float()
    alpha, sigma = torch.cos(torch.pi / 2 * t)[:, None, None, None], torch.sin(torch.pi / 2 * t)[:, None, None, None]
    x_t = alpha * batch["image"] + sigma * batch["part"].noise(0, (3, 8, 8), torch.device("cpu"))
    logits = task.model.network(x_t, t)
    result = task.losses(batch, RNG, 0.0)
    assert result.objectives["model"].item() == pytest.approx(F.cross_entropy(logits, batch["label"]).item(), rel=1e-4)
    right = (logits.argmax(1) == batch["label"]).float()
    assert result.logs["accuracy"].tolist() == [float(right.sum()), 8.0]


def test_a_classifier_without_labels_is_refused() -> None:
    config = recipe("classifier")
    model = build.model(config)
    with pytest.raises(LimnerError, match="needs labelled data"):
        ClassifierTask(model, changed(config, classes=None))
