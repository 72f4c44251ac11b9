"""FSDP2: a network cut over two processes learns what one process learns, and goes on in any number of them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from limner.config import RunConfig
from limner.errors import LimnerError
from limner.training import sharded
from limner.training.checkpoint import Checkpoint, Checkpoints
from limner.training.loop import Training
from test_training_crash import two_processes, without_dropout
from tiny_training import exit_code, recipe, run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes that share a network")


def in_two(out: Path, config: RunConfig, **options: Any) -> None:
    children = two_processes(lambda rank: run(out, config, resume=True, **options))
    assert [exit_code(child) for child in children] == [0, 0]


def newest(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    found = Checkpoints(out).latest()
    assert found is not None
    return {name: found.tensors(name) for name in ("model", "ema", "optimizer")}


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(one: Path, other: Path, closeness: float) -> None:
    """Weights, average and moments of the newest checkpoints, and the last line of metrics."""
    left, right = newest(one), newest(other)
    for name, tensors in left.items():
        assert tensors.keys() == right[name].keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, right[name][key], rtol=0, atol=closeness, msg=f"{name} {key}")
    for figure in ("loss", "grad_norm", "held_out_loss"):
        assert lines(one)[-1][figure] == pytest.approx(lines(other)[-1][figure], rel=100 * closeness)


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path: Path) -> None:
    """After 50 steps, and with micro-batches; previews, held-out figures and the published model too."""
    settings: dict[str, Any] = {"images": 400, "preview_every": 200}
    run(tmp_path / "one", without_dropout(**settings))
    in_two(tmp_path / "two", without_dropout(shard=True, **settings))
    in_two(tmp_path / "parts", without_dropout(shard=True, accumulate=2, **settings))
    for name in ("two", "parts"):
        same(tmp_path / "one", tmp_path / name, 1e-5)
        one, other = (load_file(tmp_path / which / "model.safetensors") for which in ("one", name))
        assert one.keys() == other.keys()
        assert all(torch.allclose(one[key], other[key], rtol=0, atol=1e-5) for key in one)
        assert (tmp_path / name / "previews" / "images-000000400.png").is_file()
    pieces = list((tmp_path / "two" / "checkpoints" / "images-000000400" / "pieces").iterdir())
    assert len(pieces) == 2
    assert {file.suffix for file in pieces} == {".safetensors"}
    sizes = sorted(file.stat().st_size for file in pieces)
    assert sizes[0] > 0.6 * sizes[1]


def test_a_run_goes_on_in_one_process_and_in_two(tmp_path: Path) -> None:
    """Whole, cut, whole, and copied on every process: the loss goes on as if nothing had been."""
    whole, cut = without_dropout(images=320), without_dropout(images=240, shard=True)
    run(tmp_path / "one", whole)
    run(tmp_path / "mixed", without_dropout(images=80))
    in_two(tmp_path / "mixed", cut.model_copy(update={"training": cut.training.model_copy(update={"images": 160})}))
    in_two(tmp_path / "mixed", cut)  # from pieces into pieces
    run(tmp_path / "mixed", without_dropout(images=280), resume=True)
    in_two(tmp_path / "mixed", whole)
    same(tmp_path / "one", tmp_path / "mixed", 1e-5)
    told = [[line["loss"] for line in lines(tmp_path / name) if line["images"] % 16 == 0 and line["images"] > 288]
            for name in ("one", "mixed")]  # fmt: skip
    assert told[0] == pytest.approx(told[1], rel=1e-3)


def test_mixed_precision_is_that_of_one_process(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"images": 80, "precision": "bf16"}
    run(tmp_path / "one", without_dropout(**settings))
    in_two(tmp_path / "two", without_dropout(shard=True, **settings))
    assert all(tensor.dtype == torch.float32 for tensor in newest(tmp_path / "two")["model"].values())
    same(tmp_path / "one", tmp_path / "two", 3e-3)
    run(tmp_path / "exact", without_dropout(images=80))
    with pytest.raises(AssertionError):
        same(tmp_path / "one", tmp_path / "exact", 1e-6)


def test_a_process_holds_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights, average and moments."""
    original = Training.finish

    def finish(training: Training, *arguments: Any) -> Any:
        held = {name: sum(getattr(t, "_local_tensor", t).numel() for t in content.values())
                for name, content in training.tensors().items()}  # fmt: skip
        (tmp_path / f"held-{training.accelerator.process_index}").write_text(json.dumps(held))
        return original(training, *arguments)

    monkeypatch.setattr(Training, "finish", finish)
    in_two(tmp_path / "run", without_dropout(images=16, shard=True))
    held = [json.loads((tmp_path / f"held-{rank}").read_text()) for rank in range(2)]
    for name, tensors in newest(tmp_path / "run").items():
        total = sum(tensor.numel() for tensor in tensors.values())
        assert max(part[name] for part in held) < 0.6 * total


@pytest.mark.parametrize(("task", "settings", "what"), [
    ("diffusion", {"optimizer": "muon"}, "optimizer muon"), ("diffusion", {"lora": 4}, "LoRA"),
    ("classifier", {}, "task classifier")])  # fmt: skip
def test_what_cant_be_cut_is_refused(tmp_path: Path, task: str, settings: dict[str, Any], what: str) -> None:
    with pytest.raises(LimnerError, match=f"training.shard: doesn't go with .*{what}"):
        run(tmp_path / "run", recipe(task, shard=True, images=16, **settings))


def test_a_flipped_byte_in_a_piece_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    in_two(tmp_path / "run", without_dropout(images=32, checkpoint_every=16, shard=True))
    piece = sorted((tmp_path / "run" / "checkpoints" / "images-000000032" / "pieces").iterdir())[1]
    content = bytearray(piece.read_bytes())
    content[-1] ^= 1
    piece.write_bytes(content)
    console = Console(record=True, width=200)
    run(tmp_path / "run", without_dropout(images=48), resume=True, console=console)
    assert f"damaged (pieces/{piece.name} is not what was written)" in caplog.text
    assert "at 16 images" in console.export_text()


@pytest.mark.parametrize("background", [True, False])
def test_pieces_are_written_while_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   background: bool) -> None:  # fmt: skip
    """The first checkpoint is written only when later steps have been done; it holds what was there when it was due."""
    original, step, done = sharded.write, Training.step, []

    def late(*arguments: Any) -> None:
        for _ in range(300 if background and len(done) < 10 else 0):
            if len(done) >= 6:
                break
            time.sleep(0.1)
        (tmp_path / f"steps-{len(done)}").touch()
        original(*arguments)

    monkeypatch.setattr(sharded, "write", late)
    monkeypatch.setattr(Training, "step", lambda training, batch: (step(training, batch), done.append(1)))
    settings: dict[str, Any] = {"images": 80, "checkpoint_every": 32, "shard": True, "keep_last": 3}
    in_two(tmp_path / "run", without_dropout(background=background, **settings))
    first = min(int(path.name.removeprefix("steps-")) for path in tmp_path.glob("steps-*"))
    assert first >= 6 if background else first == 4  # it looks ten times a second, so it may see more than six
    run(tmp_path / "one", without_dropout(**settings | {"images": 32}))
    found = {path.name: path for path in (tmp_path / "run" / "checkpoints").iterdir()}
    early = Checkpoint(found["images-000000032"], 32, {}).tensors("model")
    for name, tensor in newest(tmp_path / "one")["model"].items():
        torch.testing.assert_close(early[name], tensor, rtol=0, atol=1e-5)
