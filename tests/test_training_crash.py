"""Killed at any moment, and on two processes: the same weights in the end."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from limner.config import RunConfig
from limner.errors import LimnerError
from limner.training import checkpoint
from limner.training.task import Losses, Task
from tiny_training import exit_code, in_a_child, recipe, run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes to kill them")


def final(run_directory: Path, images: int) -> dict[str, dict[str, torch.Tensor]]:
    newest = run_directory / "checkpoints" / f"images-{images:09d}"
    return {name: load_file(newest / f"{name}.safetensors") for name in ("model", "ema", "optimizer")}


@pytest.mark.parametrize(("optimizer", "most"), [("adamw", 20), ("muon", 4)])
def test_killed_again_and_again_ends_as_if_undisturbed(tmp_path: Path, optimizer: str, most: int) -> None:
    """SIGKILL at random moments, checkpoint writing included (a checkpoint every other step), one in five of them
    before the first step. Nothing partial or damaged is ever read. A sitting is killed within its first steps, counted
    by the marks that it leaves, so that a busy machine changes nothing."""
    config = recipe(optimizer=optimizer, images=64 * most, checkpoint_every=16)
    whole = in_a_child(lambda: run(tmp_path / "whole", config, change=marked(tmp_path / "whole-")))
    startup = waited_for(tmp_path / "whole-0")
    assert exit_code(whole, 600) == 0
    chance = random.Random(f"{optimizer} 5")  # with kills in the fifth step or later, when one checkpoint is there
    newest, advances = "", 0
    for kill in range(most):
        mark = tmp_path / f"sitting-{kill}-"
        child = in_a_child(lambda mark=mark: sitting_that_reads_whole_files(tmp_path / "killed", config, marked(mark)))
        if chance.random() < 0.2:
            time.sleep(chance.uniform(0, startup))
        else:
            waited_for(Path(f"{mark}{chance.randrange(8)}"))
            time.sleep(chance.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert exit_code(child) == -signal.SIGKILL, "a sitting ended by itself"
        reached = max((path.name for path in (tmp_path / "killed" / "checkpoints").glob("images-*")), default="")
        advances += reached > newest
        newest = max(newest, reached)
    assert advances > 1, "it was always killed before it had done anything"
    last = in_a_child(lambda: sitting_that_reads_whole_files(tmp_path / "killed", config))
    assert exit_code(last, 600) == 0
    same_weights(tmp_path, config.training.images)
    told = [[json.loads(line)["images"] for line in (tmp_path / name / "metrics.jsonl").open()]
            for name in ("whole", "killed")]  # fmt: skip
    assert told[0] == told[1]
    assert not list((tmp_path / "killed").rglob(".partial-*"))


def marked(mark: Path) -> Callable[[Task], None]:
    """Makes a task leave a file when each of its steps begins: `mark` with the step's number."""

    def change(task: Task) -> None:
        original, numbers = task.losses, itertools.count()

        def losses(*arguments: Any) -> Losses:
            Path(f"{mark}{next(numbers)}").touch()
            return original(*arguments)

        task.losses = losses

    return change


def waited_for(mark: Path) -> float:
    """Wait until a file is there: how long, in seconds."""
    began = time.monotonic()
    while not mark.exists():
        assert time.monotonic() < began + 120
        time.sleep(0.001)
    return time.monotonic() - began


def sitting_that_reads_whole_files(out: Path, config: RunConfig, change: Callable[[Task], None] | None = None) -> None:
    """Train on, and fail where a file is read that isn't of a whole checkpoint."""
    original = checkpoint.load_file

    def load(file: Path) -> dict[str, torch.Tensor]:
        assert not file.parent.name.startswith("."), f"{file} is partial"
        assert checkpoint._damage(file.parent) is None, f"{file} is of a damaged checkpoint"
        return original(file)

    checkpoint.load_file = load
    run(out, config, resume=True, change=change)


def same_weights(directory: Path, images: int) -> None:
    """Bit by bit, in training, averaged, and the optimizer's moments."""
    whole, killed = final(directory / "whole", images), final(directory / "killed", images)
    for file, content in whole.items():
        assert content.keys() == killed[file].keys()
        for name, tensor in content.items():
            assert torch.equal(tensor, killed[file][name]), f"{file}: {name}"


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
    same_weights(tmp_path, 48)


def test_a_flipped_byte_costs_one_checkpoint_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The one before is used, and the run ends as if nothing had been."""
    config = recipe(images=96, checkpoint_every=16, decay="constant")
    run(tmp_path / "whole", config)
    run(tmp_path / "killed", recipe(images=64, checkpoint_every=16, decay="constant"))
    file = tmp_path / "killed" / "checkpoints" / "images-000000064" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    said = io.StringIO()
    run(tmp_path / "killed", config, resume=True, console=Console(file=said, width=200))
    assert "images-000000064: damaged (optimizer.safetensors is not what was written)" in caplog.text
    assert "restored model, average and optimizer at 48 images" in said.getvalue()
    same_weights(tmp_path, 96)


def test_a_directory_that_becomes_read_only_leaves_the_run_resumable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(images=48, checkpoint_every=16)
    run(tmp_path / "whole", config)
    original = Path.mkdir

    def mkdir(path: Path, *arguments: Any, **settings: Any) -> None:
        if path.name.endswith("images-000000032"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        original(path, *arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", mkdir)
        with pytest.raises(LimnerError, match=r"images-000000032: cannot be written .*images-000000016 is whole$"):
            run(tmp_path / "killed", config)
    run(tmp_path / "killed", config, resume=True)
    same_weights(tmp_path, 48)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def without_dropout(**settings: Any) -> RunConfig:
    """Its masks depend on how a batch is split."""
    config = recipe(decay="constant", **settings)
    return config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.0})})


def two_processes(act: Callable[[int], Any]) -> list[int]:
    """Fork two processes that know of each other as torchrun's do; act(rank) in each."""
    port = free_port()
    children = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}  # fmt: skip
        children.append(in_a_child(lambda rank=rank: act(rank), place))
    return children


def on_two_processes(out: Path, **settings: Any) -> None:
    config = without_dropout(**settings)
    assert [exit_code(child) for child in two_processes(lambda rank: run(out, config, resume=True))] == [0, 0]


@pytest.mark.parametrize(("optimizer", "closeness"), [("adamw", 1e-5), ("muon", 5e-5)])
def test_two_processes_equal_one_and_resume_in_either_number(tmp_path: Path, optimizer: str, closeness: float) -> None:
    """After 50 steps: two from the beginning, and one, then two, then one again. The batch is that of all processes;
    gradients differ in the order of their sums, which Muon's orthogonalisation makes more of."""
    settings = {"optimizer": optimizer, "images": 400}
    run(tmp_path / "one", without_dropout(**settings))
    on_two_processes(tmp_path / "two", **settings)
    run(tmp_path / "mixed", without_dropout(**settings | {"images": 128}))
    on_two_processes(tmp_path / "mixed", **settings | {"images": 256})
    run(tmp_path / "mixed", without_dropout(**settings), resume=True)
    told = {name: (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two", "mixed")}
    wanted, weights = json.loads(told["one"][-2]), final(tmp_path / "one", 400)
    for name in ("two", "mixed"):
        line = json.loads(told[name][-2])
        assert line["images"] == wanted["images"] == 384
        for figure in ("loss", "loss_t0.25_0.50", "grad_norm"):
            assert line[figure] == pytest.approx(wanted[figure], rel=100 * closeness)
        for file in ("model", "ema"):
            for key, tensor in final(tmp_path / name, 400)[file].items():
                torch.testing.assert_close(tensor, weights[file][key], rtol=0, atol=closeness)


def test_a_process_that_never_comes_is_told_by_the_others(tmp_path: Path) -> None:
    """After training.timeout_s."""

    def act() -> None:
        try:
            run(tmp_path / "run", without_dropout(images=80, timeout_s=2.0))
        except LimnerError as error:
            (tmp_path / "said").write_text(str(error))
            raise

    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    assert exit_code(in_a_child(act, place), 60) == 1
    said = (tmp_path / "said").read_text()
    assert said.startswith("process 0 of 2: the others weren't there within training.timeout_s, 2 s; see what they say")
    assert "\n" not in said


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_lost_process_ends_the_others_and_they_say_why(tmp_path: Path, how: str) -> None:
    """At once where it dies, after training.timeout_s where it hangs; the run is there to be resumed."""
    config = without_dropout(images=8000, checkpoint_every=16, timeout_s=2.0)

    def lose(task: Task) -> None:
        original, calls = task.losses, iter(range(1000))

        def losses(*arguments: Any) -> Losses:
            if next(calls) == 5:
                os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
            return original(*arguments)

        task.losses = losses

    def act(rank: int) -> None:
        try:
            run(tmp_path / "run", config, change=lose if rank == 1 else None)
        except LimnerError as error:
            (tmp_path / "said").write_text(str(error))
            raise

    main, lost = two_processes(act)
    assert exit_code(main, 30) == 1
    os.kill(lost, signal.SIGKILL)
    exit_code(lost)
    said = (tmp_path / "said").read_text()
    assert said.startswith("process 0 of 2: another one has died, or hasn't answered for training.timeout_s; go on")
    assert "\n" not in said
    assert run(tmp_path / "run", config.model_copy(update={"training": config.training.model_copy(
        update={"images": 64})}), resume=True).images == 64  # fmt: skip
