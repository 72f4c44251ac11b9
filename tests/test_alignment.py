"""Representation alignment: what the middle of the network is told is what a pretrained network sees in its row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from limner import build, config
from limner.data.dataset import prepare
from limner.errors import LimnerError
from limner.nn.lite0 import see_lite0
from limner.training import loop
from limner.training.alignment import Alignment
from limner.training.tasks import DiffusionTask
from tiny_cli import pictures

TINY: dict[str, Any] = {
    "data": {"size": [16, 16], "flip": True},
    "model": {"kind": "unet", "norm_groups": 4, "levels": [{"channels": 8}, {"channels": 16}]},
    "conditions": [{"kind": "label"}],
    "training": {"batch": 4, "images": 32, "warmup_images": 0, "align": 0.5, "log_every": 8, "previews": 2,
                 "held_out_every": 16, "preview_every": 32},
}  # fmt: skip


def made(folder: Path, **training: Any) -> tuple[config.RunConfig, Any]:
    raw = {**TINY, "training": {**TINY["training"], **training}}
    raw["data"] = {**TINY["data"], "source": str(pictures(folder)), "held_out": 0.25}
    recipe = config.parse(raw, "tiny")
    data = prepare(recipe.data, {"label"})
    return recipe.model_copy(update={"classes": data.class_names}), data


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path / "cache"))


def test_targets_are_the_features_of_each_row_mirrored_where_it_is(tmp_path: Path) -> None:
    _, data = made(tmp_path / "data")
    network = torch.nn.Module()
    network.middle = torch.nn.Identity()
    alignment = Alignment(network, 112, data)
    alignment.projector = torch.nn.Identity()  # type: ignore[assignment]
    rows, mirrored = torch.from_numpy(data.train[:4].copy()), torch.tensor([False, True, False, True])

    def features(rows: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(data.uint8(rows)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return see_lite0(F.interpolate(x, (128, 128), mode="bilinear", antialias=True))

    whole = features(data.train)
    exact = (features(rows.numpy()) - whole.mean((0, 2, 3), keepdim=True)) / whole.std((0, 2, 3), keepdim=True)
    exact[mirrored] = exact[mirrored].flip(3)
    network.middle(exact.requires_grad_())
    apart, own = alignment.objectives(rows, mirrored)
    assert float(apart.detach()) < 1e-3, "what the middle says is the very target"
    assert not own.requires_grad, "the projector's own objective doesn't reach the network"
    network.middle(exact.flip(3))
    assert float(alignment.objectives(rows, mirrored)[0].detach()) > 0.05, "the other way round it isn't"


def test_it_trains_the_network_and_the_projector_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    recipe, data = made(tmp_path / "data")
    torch.manual_seed(0)
    task = DiffusionTask(build.model(recipe), recipe, data)
    before = [p.detach().clone() for p in task.modules["aligner"].parameters()]
    loop.train(task, data, recipe, tmp_path / "run")
    assert any(not torch.equal(a, b) for a, b in zip(before, task.modules["aligner"].parameters(), strict=True))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all('"align"' in line for line in lines)
    model = build.model(recipe)
    from safetensors.torch import load_file

    model.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))

    plain = recipe.model_copy(update={"training": recipe.training.model_copy(update={"align": 0.0})})
    torch.manual_seed(0)
    other = DiffusionTask(build.model(plain), plain, data)
    loop.train(other, data, plain, tmp_path / "plain")
    middle = [[p for n, p in task_.modules["model"].named_parameters() if ".middle." in n] for task_ in (task, other)]
    assert any(not torch.equal(a, b) for a, b in zip(*middle, strict=True)), "the network learns from it"


def test_what_is_too_much_to_keep_is_seen_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, data = made(tmp_path / "data")

    def apart(kept: bool) -> float:
        torch.manual_seed(0)
        network = torch.nn.Module()
        network.middle = torch.nn.Identity()
        alignment = Alignment(network, 3, data)
        network.middle(torch.ones(4, 3, 8, 8))
        found = alignment.objectives(torch.from_numpy(data.train[:4].copy()), torch.zeros(4, dtype=torch.bool))
        assert (alignment.kept is not None) is kept
        return float(found[0].detach())

    before = apart(kept=True)
    monkeypatch.setattr("limner.training.alignment.MOST_BYTES", 0)
    assert apart(kept=False) == before


def test_what_it_does_not_go_with_is_said(tmp_path: Path) -> None:
    recipe, _ = made(tmp_path / "data")
    cropped = prepare(recipe.data.model_copy(update={"crop": "random", "size": (8, 16)}), {"label"})
    with pytest.raises(LimnerError, match=r"training\.align: .* leave it out by training\.align=0"):
        DiffusionTask(build.model(recipe), recipe, cropped)
    raw = {"task": "autoencoder", "model": {"kind": "autoencoder", "levels": [{"channels": 8}]},
           "training": {"align": 0.5}}  # fmt: skip
    with pytest.raises(LimnerError, match=r"training\.align: is for diffusion, not for task autoencoder"):
        config.parse(raw, "tiny")
