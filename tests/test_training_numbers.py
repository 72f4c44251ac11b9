"""What is watched over a training: loss spikes and NaN on any process, determinism, the recorded environment."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from limner.cli.train import _also
from limner.training.checkpoint import Checkpoints
from limner.training.environment import FILE
from limner.training.spikes import FACTOR, WARMUP, Spikes
from limner.training.task import Task
from test_training_crash import two_processes, without_dropout
from test_training_loop import at_images, lines, spoil
from tiny_training import exit_code, recipe, run


def counted(objectives: list[float], spikes: Spikes | None = None) -> int:
    spikes = spikes or Spikes(torch.device("cpu"))
    for objective in objectives:
        spikes.see(torch.tensor(objective))
    return spikes.count


def test_spikes_are_steps_far_above_the_running_average() -> None:
    usual = [1.0 + 0.3 * (k % 3) for k in range(WARMUP)]
    assert counted([*usual, *[1.5] * 20]) == 0
    assert counted([*usual[:-1], 100.0, 1.0]) == 0, "nothing is usual yet"
    assert counted([*usual, 1.3 * FACTOR * 1.1, 1.0]) == 1
    assert counted([*usual, 1e6, 1.0, 1e6, float("nan"), float("inf")]) == 2
    assert counted([*usual, *[1e6] * 300]) < 300, "what lasts becomes usual"
    assert counted([-x for x in usual] + [5.0]) == 0


def test_a_spike_is_told_and_its_count_outlives_a_restart(tmp_path: Path) -> None:
    at = 8 * (WARMUP + 2)
    settings: dict[str, Any] = {"log_every": 8, "lr": 1e-9}
    run(tmp_path, recipe(images=at + 24, **settings), change=spoil(lambda images: images == at, 100.0))
    by_images = {line["images"]: line["spikes"] for line in lines(tmp_path)}
    assert [by_images[at], by_images[at + 8], by_images[at + 24]] == [0, 1, 1]
    run(
        tmp_path, recipe(images=at + 64, **settings), resume=True, change=spoil(lambda images: images == at + 40, 100.0)
    )
    assert lines(tmp_path)[-1]["spikes"] == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
@pytest.mark.parametrize("shard", [False, True])
def test_a_spike_and_a_nan_on_one_process_are_those_of_all(tmp_path: Path, shard: bool) -> None:
    """The main process, whose own numbers are sound, skips the bad step, and tells of both."""
    spike, bad = 8 * (WARMUP + 2), 8 * (WARMUP + 4)
    config = without_dropout(images=bad + 32, log_every=8, lr=1e-6, shard=shard)

    def one_bad(task: Task) -> None:
        spoil(lambda images: images == spike, 200.0)(task)
        spoil(lambda images: images == bad)(task)

    children = two_processes(lambda rank: run(tmp_path / "two", config, change=one_bad if rank == 1 else None))
    assert [exit_code(child) for child in children] == [0, 0]
    assert lines(tmp_path / "two")[-1]["spikes"] == 1
    assert lines(tmp_path / "two")[-1]["skipped"] == 1
    found = Checkpoints(tmp_path / "two").latest()
    assert found is not None
    assert all(tensor.isfinite().all() for tensor in found.tensors("model").values())


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_algorithms_are_asked_for(tmp_path: Path, wanted: bool) -> None:
    seen: list[bool] = []
    look: Callable[[], None] = lambda: seen.append(torch.are_deterministic_algorithms_enabled())  # noqa: E731
    try:
        run(tmp_path, recipe(images=16, deterministic=wanted), change=at_images(8, look))
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [wanted]
    assert _also(None, None, False, True) == ["training.deterministic=True"]


def test_each_sitting_records_its_environment(tmp_path: Path) -> None:
    run(tmp_path, recipe(images=16))
    run(tmp_path, recipe(images=32), resume=True)
    first, second = (json.loads(line) for line in (tmp_path / FILE).read_text().splitlines())
    assert (first["images"], second["images"]) == (0, 16)
    assert first["versions"]["torch"] == torch.__version__
    assert first["python"] == platform.python_version()
    assert {"device", "cores", "cpu", "threads"} <= first["hardware"].keys()
    assert first["processes"] == 1
    assert first["commit"] is None or len(first["commit"].split("-")[0]) == 40
