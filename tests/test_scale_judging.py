"""Previews and held-out figures shared by processes: what one process gives, each doing its part of the work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

import tiny_autoencoder
from limner import build
from limner.training import tasks
from limner.training.autoencoder import BATCH, AutoencoderTask, autoencoder_of
from limner.training.loop import Training
from limner.training.share import Share
from test_training_crash import two_processes, without_dropout
from tiny_training import Pictures, exit_code, recipe, run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes that share a network")


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 4, 5, 11])
def test_all_processes_together_make_the_whole_and_as_much_each(processes: int, count: int) -> None:
    """Simulated one after the other: the parts add up, no number is missing or counted twice."""
    made: list[torch.Tensor] = []
    asked = []
    for process in range(processes):
        share = Share(process, processes, lambda own: made.append(own) or own)
        share.together(count, lambda part: asked.append(len(part)) or torch.tensor([[n, 1] for n in part]))
    assert torch.stack(made).sum(0).tolist() == [[number, 1] for number in range(count)]
    assert len(set(asked)) == 1
    turns = [list(Share(process, processes).turns(count)) for process in range(processes)]
    assert sorted(number for turn in turns for number, counts in turn if counts) == list(range(count))
    assert len({len(turn) for turn in turns}) == 1


def judged(out: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """The held-out and preview figures of each line, and the previews."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figures = [{k: v for k, v in line.items() if k.startswith(("held_out", "preview"))} for line in lines]
    return [line for line in figures if line], {p.name: p.read_bytes() for p in (out / "previews").glob("*.png")}


def counted(name: str, rank: int, change: pytest.MonkeyPatch) -> None:
    """Write down how many pictures of a preview, and how many rows of the held-out ones, this process computes."""
    together, sizes = Share.together, []

    def noted(share: Share, count: int, make: Callable[[range], torch.Tensor]) -> torch.Tensor:
        return together(share, count, lambda part: sizes.append(len(part)) or make(part))

    change.setattr(Share, "together", noted)
    terms, rows, finish = tasks.DiffusionTask._terms, [], Training.finish

    def counted_terms(task: Any, model: Any, batch: Any, *rest: Any) -> Any:
        if not torch.is_grad_enabled():
            rows.append(len(batch["image"]))
        return terms(task, model, batch, *rest)

    def finished(training: Training, *arguments: Any) -> Any:
        result = finish(training, *arguments)
        Path(f"{name}.{rank}").write_text(json.dumps([sizes, rows]))
        return result

    change.setattr(tasks.DiffusionTask, "_terms", counted_terms)
    change.setattr(Training, "finish", finished)


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_judge_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: bool) -> None:
    """Eleven held-out rows in batches of 4, five previews. With no learning rate both have the very same weights, so
    that nothing but the sharing could differ."""
    monkeypatch.setattr(tasks, "HELD_OUT_BATCH", 4)
    settings: dict[str, Any] = {"images": 32, "held_out_every": 16, "preview_every": 16, "previews": 5, "lr": 1e-12}
    data = Pictures(held_out=11)
    run(tmp_path / "one", without_dropout(**settings), data=data)

    def half(rank: int) -> None:
        counted(str(tmp_path / "counts"), rank, monkeypatch)
        run(tmp_path / "two", without_dropout(shard=shard, **settings), data=data)

    assert [exit_code(child) for child in two_processes(half)] == [0, 0]
    (figures, pictures), (wanted, whole) = judged(tmp_path / "two"), judged(tmp_path / "one")
    assert len(figures) == len(wanted) == 2
    for found, expected in zip(figures, wanted, strict=True):
        assert found.keys() == expected.keys()
        assert "held_out_loss" in found
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-5), name
    assert pictures.keys() == whole.keys()
    assert shard or pictures == whole
    for rank, counts in enumerate(((3, [4, 3]), (3, [4, 4]))):
        sizes, rows = json.loads((tmp_path / f"counts.{rank}").read_text())
        assert set(sizes) == {counts[0]}
        assert rows == 2 * counts[1]


@pytest.mark.parametrize("regulariser", [{"kind": "kl"}, {"kind": "vq", "codes": 16}])
def test_an_autoencoder_is_judged_by_both(tmp_path: Path, regulariser: dict[str, Any]) -> None:
    """Its latents' statistics too, which are published: they are measured by all, on all."""
    data = tiny_autoencoder.Shapes()
    data.held_out = data.held_out[: BATCH - 3]  # one batch: the other process has nothing that counts
    config = tiny_autoencoder.recipe(regulariser)
    torch.manual_seed(0)
    task = AutoencoderTask(build.model(config), config, data)

    def figures(share: Share) -> dict[str, Any]:
        found: dict[str, Any] = task.held_out(task.model, data, share)
        buffers = autoencoder_of(task.model)
        return found | {"mean": buffers.latent_mean.tolist(), "std": buffers.latent_std.tolist()}

    def half(rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        added = figures(Share(rank, 2, lambda own: (dist.all_reduce(own), own)[1]))
        (tmp_path / f"{rank}").write_text(json.dumps(added))

    assert [exit_code(child) for child in two_processes(half)] == [0, 0]
    wanted = figures(Share())
    assert {"held_out_psnr", "held_out_ssim"} <= wanted.keys()
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}").read_text())
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=1e-6), name


def test_a_classifier_judged_by_two_stops_when_one_would(tmp_path: Path) -> None:
    """Patience counts rounds, not rounds by process."""
    settings: dict[str, Any] = {"images": 640, "held_out_every": 16, "patience": 3, "lr": 1e-12}
    config = recipe("classifier", **settings)
    assert run(tmp_path / "one", config).images < 100
    assert [exit_code(c) for c in two_processes(lambda rank: run(tmp_path / "two", config))] == [0, 0]
    figures, wanted = (judged(tmp_path / name)[0] for name in ("two", "one"))
    assert len(figures) == len(wanted)
    assert figures[-1] == pytest.approx(wanted[-1], rel=1e-5)
