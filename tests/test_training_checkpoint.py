"""Checkpoints: atomic, verified, kept and let go; a full disk, a flipped byte, a file cut short."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from limner.errors import LimnerError
from limner.training import checkpoint
from limner.training.checkpoint import Checkpoints
from test_training_loop import at_images
from tiny_training import recipe, run


def tensors(value: float) -> dict[str, dict[str, Tensor]]:
    weight = torch.full((3, 4, 2, 2), value).to(memory_format=torch.channels_last)
    return {"model": {"w": weight, "tied": weight}, "ema": {"w": weight + 1}, "optimizer": {"model.w.step": weight[0]}}


def save(kept: Checkpoints, images: int, **state: Any) -> None:
    kept.save(images, tensors(images), {"seconds": 1.0, **state})


def names(run_directory: Path) -> list[str]:
    return sorted(path.name for path in (run_directory / "checkpoints").iterdir())


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    assert kept.latest() is None
    save(kept, 1024, note="x")
    found = kept.latest()
    assert found is not None
    assert (found.images, found.state["note"], found.path.name) == (1024, "x", "images-000001024")
    assert torch.equal(found.tensors("model")["w"], tensors(1024)["model"]["w"])
    assert torch.equal(found.tensors("model")["tied"], found.tensors("model")["w"])
    with pytest.raises(LimnerError, match=r"holds no discriminator\.safetensors"):
        found.tensors("discriminator")
    assert {file.suffix for file in found.path.iterdir()} == {".safetensors", ".json"}


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep_last=2)
    for images, figure in ((1, 5.0), (2, 3.0), (3, 4.0), (4, None), (5, 4.5)):
        save(kept, images, held_out=figure)
    assert names(tmp_path) == ["images-000000002", "images-000000004", "images-000000005"]
    best = kept.best()
    assert best is not None
    assert best.images == 2
    flip_a_byte(best.path / "ema.safetensors")
    next_best = kept.best(verified=True)
    assert next_best is not None
    assert next_best.images == 5


def test_the_only_good_one_is_never_let_go(tmp_path: Path) -> None:
    """With one to keep, the old one stays until the new one is whole under its name."""
    kept = Checkpoints(tmp_path, keep_last=1)
    save(kept, 1)
    originals = {name: getattr(checkpoint, name) for name in ("save_file", "_sync", "_write_text")}
    seen = []

    def watched(name: str) -> Any:
        def call(*arguments: Any, **settings: Any) -> Any:
            found = Checkpoints(tmp_path).latest()
            seen.append(found is not None and found.images)
            return originals[name](*arguments, **settings)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in originals:
            patch.setattr(checkpoint, name, watched(name))
        save(kept, 2)
    assert len(seen) > 6
    assert set(seen) <= {1, 2}
    assert names(tmp_path) == ["images-000000002"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing waits for a later step, which it would never see if that step waited for it; what is written is what
    was there when it was due."""
    config = recipe(images=64, checkpoint_every=32)
    later, original = threading.Event(), checkpoint.save_file

    def patient(*arguments: Any, **settings: Any) -> None:
        assert later.wait(30), "training waited for the disk"
        original(*arguments, **settings)

    monkeypatch.setattr(checkpoint, "save_file", patient)
    run(tmp_path / "run", config, change=at_images(48, later.set))
    monkeypatch.setattr(checkpoint, "save_file", original)
    run(tmp_path / "plain", recipe(images=64, checkpoint_every=32, background=False))
    for images in (32, 64):
        one, two = (load_file(tmp_path / name / "checkpoints" / f"images-{images:09d}" / "model.safetensors")
                    for name in ("run", "plain"))  # fmt: skip
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_full_disk_is_told_before_the_next_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(LimnerError, match="images-000000016: the disk is full"):
        run(tmp_path, recipe(images=8_000_000, checkpoint_every=16, log_every=8_000_000))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, Path.unlink])
def test_a_damaged_checkpoint_is_passed_over_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
) -> None:
    kept = Checkpoints(tmp_path)
    save(kept, 1)
    save(kept, 2)
    damage(tmp_path / "checkpoints" / "images-000000002" / name)
    with caplog.at_level(logging.WARNING):
        found = kept.latest()
    assert found is not None
    assert found.images == 1
    assert "images-000000002: damaged" in caplog.text


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    save(kept, 1)
    flip_a_byte(tmp_path / "checkpoints" / "images-000000001" / "ema.safetensors")
    with pytest.raises(LimnerError, match="every checkpoint is damaged"):
        kept.latest()


def test_retention_never_counts_damaged_ones_beyond_the_present(tmp_path: Path) -> None:
    """Resumed from images 1 because 3 was damaged: the next one must not be dropped in favour of 3."""
    kept = Checkpoints(tmp_path, keep_last=1)
    save(kept, 3)
    save(kept, 2)
    assert names(tmp_path) == ["images-000000002"]
    save(kept, 2, note="again")
    found = kept.latest()
    assert found is not None
    assert found.state["note"] == "again"


def test_leftovers_of_a_crash_are_ignored_and_cleared(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    save(kept, 1)
    shutil.copytree(
        tmp_path / "checkpoints" / "images-000000001", tmp_path / "checkpoints" / ".partial-images-000000009"
    )
    found = kept.latest()
    assert found is not None
    assert found.images == 1
    save(kept, 2)
    assert names(tmp_path) == ["images-000000001", "images-000000002"]


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["save_file", "_sync", "_write_text"])
def test_a_full_disk_leaves_the_earlier_one_loadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    kept = Checkpoints(tmp_path, keep_last=1)
    save(kept, 1)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, where, full_disk)
        with pytest.raises(
            LimnerError, match=r"images-000000002: the disk is full; images-000000001 is whole"
        ) as caught:
            save(kept, 2)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["images-000000001"]
    found = kept.latest()
    assert found is not None
    assert found.images == 1
    save(kept, 2)


def test_space_is_looked_for_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Checkpoints(tmp_path)
    save(kept, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    monkeypatch.setattr(checkpoint, "save_file", lambda *_, **__: pytest.fail("wrote to a full disk"))
    with pytest.raises(LimnerError, match=r"1\.0 MB are needed, 0\.0 MB free; images-000000001 is whole"):
        save(kept, 2)


def test_a_full_disk_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second checkpoint of a run fails; resuming from the first gives what the undisturbed run gives."""
    config = recipe(checkpoint_every=64, images=128)
    original, calls = checkpoint.save_file, iter(range(100))

    def sometimes(*arguments: Any, **settings: Any) -> None:
        if next(calls) >= 6:
            full_disk()
        original(*arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", sometimes)
        with pytest.raises(LimnerError, match="the disk is full; images-000000064 is whole"):
            run(tmp_path / "run", config)
    assert load_file(tmp_path / "run" / "model.safetensors")
    run(tmp_path / "run", config, resume=True)
    run(tmp_path / "whole", config)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_publishing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Checkpoints(tmp_path)
    kept.begin(recipe())
    kept.publish({"w": torch.zeros(2)}, recipe())
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(LimnerError, match="disk is full"):
        kept.publish({"w": torch.ones(2)}, recipe())
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], torch.zeros(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "model.safetensors"]


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(LimnerError, match=r"cannot be written .*Permission denied.*there is no earlier one") as caught:
        Checkpoints(tmp_path / "run").begin(recipe())
    assert "\n" not in str(caught.value)


def test_state_says_where_it_came_from(tmp_path: Path) -> None:
    run(tmp_path, recipe(images=16))
    state = json.loads((tmp_path / "checkpoints" / "images-000000016" / "state.json").read_text())
    assert state["images"] == 16
    assert set(state["files"]) == {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
    assert state["versions"]["torch"] == torch.__version__.split("+")[0] or state["versions"]["torch"]
    assert state["data"] == "48 tiny pictures"
