"""Killed at any moment, and on two processes: the same weights in the end."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from limner.training import checkpoint
from tiny_training import exit_code, in_a_child, recipe, run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes to kill them")


def final(run_directory: Path, images: int) -> dict[str, dict[str, torch.Tensor]]:
    newest = run_directory / "checkpoints" / f"images-{images:09d}"
    return {name: load_file(newest / f"{name}.safetensors") for name in ("model", "ema", "optimizer")}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_again_and_again_ends_as_if_undisturbed(tmp_path: Path, optimizer: str) -> None:
    """SIGKILL at random moments, checkpoint writing included (a checkpoint every third step)."""
    config = recipe(optimizer=optimizer, images=320, checkpoint_every=24)
    assert exit_code(in_a_child(lambda: run(tmp_path / "whole", config))) == 0
    chance = random.Random(optimizer)
    sittings = kills = 0
    while True:
        sittings += 1
        child = in_a_child(lambda: run(tmp_path / "killed", config, resume=True))
        if kills < 4:
            time.sleep(chance.uniform(0.05, 0.5))
            os.kill(child, signal.SIGKILL)
        code = exit_code(child)
        kills += code == -signal.SIGKILL
        if code == 0:
            break
        assert code == -signal.SIGKILL, "a sitting failed by itself"
        assert sittings < 30
    assert kills >= 2
    whole, killed = final(tmp_path / "whole", 320), final(tmp_path / "killed", 320)
    for file, content in whole.items():
        assert content.keys() == killed[file].keys()
        for name, tensor in content.items():
            assert torch.equal(tensor, killed[file][name]), f"{file}: {name}"
    told = [[line.split('"images": ')[1].split(",")[0] for line in (tmp_path / name / "metrics.jsonl").open()]
            for name in ("whole", "killed")]  # fmt: skip
    assert told[0] == told[1]


@pytest.mark.parametrize("step", ["save_file", "_write_text", "_sync", "_replace"])
def test_killed_in_the_middle_of_a_checkpoint(tmp_path: Path, step: str) -> None:
    """Every call of each writing step is the last one of some process; the next resumes from a whole checkpoint."""
    config = recipe(images=48, checkpoint_every=16)
    original = getattr(checkpoint, step)
    for fatal in range(0, 40, 3 if step == "_sync" else 2):
        calls = iter(range(1000))

        def deadly(*arguments: object, fatal: int = fatal, calls: object = calls, **settings: object) -> object:
            if next(calls) == fatal:  # type: ignore[call-overload]
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **settings)

        def sitting(deadly: object = deadly) -> None:
            setattr(checkpoint, step, deadly)
            run(tmp_path / "killed", config, resume=True)

        if exit_code(in_a_child(sitting)) == 0:
            break
    else:
        pytest.fail("never came to an end")
    assert fatal > 0, "it was never killed"
    assert exit_code(in_a_child(lambda: run(tmp_path / "whole", config))) == 0
    whole, killed = final(tmp_path / "whole", 48), final(tmp_path / "killed", 48)
    assert all(torch.equal(t, killed[f][n]) for f, content in whole.items() for n, t in content.items())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_two_processes(out: Path, **settings: object) -> list[int]:
    config = recipe(**settings)
    no_dropout = config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.0})})
    port = free_port()
    children = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}  # fmt: skip
        children.append(in_a_child(lambda: run(out, no_dropout, resume=True), place))
    return [exit_code(child) for child in children]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_equal_one_and_resume_in_either_number(tmp_path: Path, optimizer: str) -> None:
    one = recipe(optimizer=optimizer, images=160, decay="constant")
    one = one.model_copy(update={"model": one.model.model_copy(update={"dropout": 0.0})})
    run(tmp_path / "one", one)
    assert on_two_processes(tmp_path / "two", optimizer=optimizer, images=80, decay="constant") == [0, 0]
    settings = {"optimizer": optimizer, "images": 160, "decay": "constant"}
    assert on_two_processes(tmp_path / "two", **settings) == [0, 0]
    told = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-2]) for name in ("one", "two")]
    assert told[0]["images"] == told[1]["images"] == 144
    for name in ("loss", "loss_t0.25_0.50", "grad_norm"):
        assert told[0][name] == pytest.approx(told[1][name], rel=1e-3)
    for name, tensor in final(tmp_path / "one", 160)["model"].items():
        torch.testing.assert_close(final(tmp_path / "two", 160)["model"][name], tensor, rtol=1e-3, atol=2e-4)
    longer = one.model_copy(update={"training": one.training.model_copy(update={"images": 176})})
    assert run(tmp_path / "two", longer, resume=True).images == 176
