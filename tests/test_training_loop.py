"""The loop: budgets, accumulation, bad steps, signals, metrics, resuming."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from limner import config as configuration
from limner.errors import LimnerError
from limner.training.task import Losses, Task
from tiny_training import Pictures, recipe, run


def weights(run_directory: Path, name: str = "model") -> dict[str, Tensor]:
    newest = sorted((run_directory / "checkpoints").iterdir())[-1]
    return load_file(newest / f"{name}.safetensors")


def lines(run_directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def spoil(when: Callable[[int], bool], how: float = float("nan")) -> Callable[[Task], None]:
    """Makes the loss of steps that begin at these images bad."""

    def change(task: Task) -> None:
        original = task.losses

        def losses(batch: Mapping[str, Any], rng: torch.Generator, progress: float) -> Losses:
            result = original(batch, rng, progress)
            factor = how if when(batch["part"].images) else 1.0
            return Losses({name: x * factor for name, x in result.objectives.items()}, result.logs)

        task.losses = losses  # type: ignore[method-assign]

    return change


def at_images(images: int, what: Callable[[], Any]) -> Callable[[Task], None]:
    """Does something in the step that begins at these images."""

    def change(task: Task) -> None:
        original = task.losses

        def losses(batch: Mapping[str, Any], rng: torch.Generator, progress: float) -> Losses:
            if batch["part"].images == images:
                what()
            return original(batch, rng, progress)

        task.losses = losses  # type: ignore[method-assign]

    return change


def test_a_run_holds_all_that_sampling_and_reading_need(tmp_path: Path) -> None:
    config = recipe(held_out_every=64, preview_every=64, checkpoint_every=64)
    result = run(tmp_path / "run", config)
    assert result.images == 160
    assert result.stopped is None
    assert configuration.load(tmp_path / "run" / "config.yaml") == config
    assert same(load_file(tmp_path / "run" / "model.safetensors"), weights(tmp_path / "run", "ema"))
    assert not same(weights(tmp_path / "run"), weights(tmp_path / "run", "ema"))
    found = lines(tmp_path / "run")
    assert [line["images"] for line in found] == list(range(16, 161, 16))
    assert {"loss", "loss_t0.00_0.25", "loss_t0.75_1.00", "grad_norm", "lr", "images_per_s", "skipped",
            "seconds"} <= found[0].keys()  # fmt: skip
    with_held_out = [line["images"] for line in found if "held_out_loss" in line]
    assert with_held_out == [64, 128, 160]
    assert {"preview_mean", "preview_std", "data_mean", "data_std", "held_out_loss_t0.25_0.50"} <= found[-1].keys()
    assert len(found[-1]["preview_mean"]) == len(found[-1]["data_mean"]) == 3
    assert len(list((tmp_path / "run" / "previews").glob("*.png"))) == 3
    assert result.figures["held_out_loss"] == found[-1]["held_out_loss"]


def test_training_learns(tmp_path: Path) -> None:
    run(tmp_path, recipe(images=1600, lr=5e-3, log_every=320))
    first, *_, last = lines(tmp_path)
    assert last["loss"] < 0.7 * first["loss"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulation_equals_the_large_batch(tmp_path: Path, optimizer: str) -> None:
    settings = {"optimizer": optimizer, "images": 80}
    for accumulate in (1, 4):
        config = recipe(accumulate=accumulate, **settings)
        no_dropout = config.model.model_copy(update={"dropout": 0.0})
        run(tmp_path / str(accumulate), config.model_copy(update={"model": no_dropout}))
    one, four = weights(tmp_path / "1"), weights(tmp_path / "4")
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-3, atol=2e-4)
    assert lines(tmp_path / "1")[-1]["loss"] == pytest.approx(lines(tmp_path / "4")[-1]["loss"], rel=1e-3)


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LimnerError, match=r"training\.batch: 8 should be a multiple of 3"):
        run(tmp_path, recipe(accumulate=3))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_equals_undisturbed_bit_by_bit(tmp_path: Path, optimizer: str) -> None:
    whole = recipe(optimizer=optimizer, decay="constant")
    run(tmp_path / "whole", whole)
    half = recipe(optimizer=optimizer, decay="constant", images=72)
    run(tmp_path / "parts", half)
    run(tmp_path / "parts", whole, resume=True)
    for name in ("model", "ema", "optimizer"):
        assert same(weights(tmp_path / "whole", name), weights(tmp_path / "parts", name)), name


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    run(tmp_path / "0", recipe(images=16))
    run(tmp_path / "1", recipe(images=16, seed=1))
    assert not same(weights(tmp_path / "0"), weights(tmp_path / "1"))


@pytest.mark.parametrize("how", [float("nan"), float("inf")])
def test_bad_steps_are_skipped_and_counted(tmp_path: Path, how: float) -> None:
    run(tmp_path, recipe(images=96, nan_patience=3), change=spoil(lambda images: images in (16, 24, 64), how))
    last = lines(tmp_path)[-1]
    assert last["skipped"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path).values())
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path, "optimizer").values())


def test_too_many_bad_steps_stop_the_run_and_name_the_last_good_checkpoint(tmp_path: Path) -> None:
    config = recipe(images=400, nan_patience=4, checkpoint_every=64)
    with pytest.raises(LimnerError, match=r"NaN or infinite.*images-000000128.*training\.lr.*--resume") as caught:
        run(tmp_path, config, change=spoil(lambda images: images >= 144))
    assert "\n" not in str(caught.value)
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path).values())
    result = run(tmp_path, config, resume=True)
    assert result.images == 400


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_resume_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    stop = at_images(72, lambda: os.kill(os.getpid(), number))
    result = run(tmp_path / "run", recipe(), change=stop)
    assert (result.stopped, result.images) == (number.name, 80)
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert signal.getsignal(number) == before
    assert run(tmp_path / "run", recipe(), resume=True).stopped is None
    run(tmp_path / "whole", recipe())
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_second_interrupt_is_immediate(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, recipe(), change=at_images(72, twice))
    assert not (tmp_path / "checkpoints").exists()


def test_the_budget_in_seconds_ends_it_and_counts_the_time_before(tmp_path: Path) -> None:
    config = recipe(images=None, budget_s=1.0, log_every=8)
    result = run(tmp_path / "now", config)
    assert result.images > 0
    assert result.seconds >= 1.0
    assert lines(tmp_path / "now")[-1]["lr"] < 0.3 * config.training.lr
    with pytest.raises(LimnerError, match="budget was spent before the first step"):
        run(tmp_path / "late", config, started_at=time.monotonic() - 5)


def test_seconds_add_up_over_sittings_and_a_finished_run_stays_finished(tmp_path: Path) -> None:
    config = recipe(images=None, budget_s=1.0)
    first = run(tmp_path, config)
    before = weights(tmp_path)
    spent = max(json.loads(state.read_text())["seconds"] for state in tmp_path.glob("checkpoints/*/state.json"))
    (tmp_path / "model.safetensors").unlink()
    second = run(tmp_path, config, resume=True)
    assert second.images == first.images
    assert first.seconds >= spent >= 1.0
    assert second.seconds >= spent
    assert (tmp_path / "model.safetensors").is_file()
    assert same(before, weights(tmp_path))
    third = run(tmp_path, recipe(images=first.images + 16), resume=True)
    assert third.images == first.images + 16


def test_a_run_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LimnerError, match=r"no end.*--budget.*--images"):
        run(tmp_path, recipe(images=None))
    assert not list(tmp_path.iterdir())


def test_a_directory_with_a_run_is_refused_without_resume(tmp_path: Path) -> None:
    run(tmp_path, recipe(images=16))
    with pytest.raises(LimnerError, match=r"holds a run already.*--resume.*--out"):
        run(tmp_path, recipe(images=16))
    (tmp_path / "file").touch()
    with pytest.raises(LimnerError, match="is a file"):
        run(tmp_path / "file", recipe(images=16))


def test_resume_where_there_is_no_checkpoint_starts_and_says_so(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    result = run(tmp_path / "new", recipe(images=16), resume=True, console=console)
    assert result.images == 16
    assert "no checkpoint yet, starting from the beginning" in console.export_text()


def test_resume_says_what_was_restored(tmp_path: Path) -> None:
    run(tmp_path, recipe(images=16))
    console = Console(record=True, width=200)
    run(tmp_path, recipe(images=32), resume=True, console=console, data=Pictures(rows=40))
    told = console.export_text()
    assert "restored model, average and optimizer at 16 images" in told
    assert "data differ" in told


def test_resume_with_another_recipe_is_refused_in_one_line(tmp_path: Path) -> None:
    run(tmp_path, recipe(images=16))
    other = recipe(images=32)
    level = other.model.levels[0].model_copy(update={"channels": 16})
    wider = other.model.model_copy(update={"levels": (level,)})
    with pytest.raises(LimnerError, match=r"model\.levels\.0\.channels is 8 in the run and 16") as caught:
        run(tmp_path, other.model_copy(update={"model": wider}), resume=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(LimnerError, match=r"training\.optimizer is adamw in the run and muon"):
        run(tmp_path, recipe(images=32, optimizer="muon"), resume=True)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(LimnerError, match=r"weight 'network\.\S+' is \[.*\] in the checkpoint and \[.*\]"):
        run(tmp_path, other.model_copy(update={"model": wider}), resume=True)


def test_metrics_beyond_the_checkpoint_are_wound_back(tmp_path: Path) -> None:
    run(tmp_path, recipe(images=64))
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"images": 72, "loss": 1}\n{"images": 80, "lo')
    run(tmp_path, recipe(images=96), resume=True)
    assert [line["images"] for line in lines(tmp_path)] == [16, 32, 48, 64, 80, 96]


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    """Held-out figures fall, then rise: the run ends after `patience` rounds, its model that of the lowest."""
    figures = iter([3.0, 2.0, 1.0, 2.0, 3.0, 4.0, 5.0])

    def change(task: Task) -> None:
        task.best_is, task.patience = "held_out_loss", 2
        task.held_out = lambda *_: {"held_out_loss": next(figures)}  # type: ignore[method-assign]

    result = run(tmp_path, recipe(images=8000, held_out_every=16, keep_last=1, decay="constant"), change=change)
    assert result.images < 120
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert "images-000000048" in kept
    best = load_file(tmp_path / "checkpoints" / "images-000000048" / "ema.safetensors")
    assert same(load_file(tmp_path / "model.safetensors"), best)
    assert not same(load_file(tmp_path / "model.safetensors"), weights(tmp_path, "ema"))


@pytest.mark.parametrize(("last", "told"), [(2.1, False), (float("nan"), False), (3.0, True)])
def test_a_model_that_remembers_is_told_of(tmp_path: Path, last: float, told: bool) -> None:
    figures = iter([4.0, 2.0, last, last])

    def change(task: Task) -> None:
        task.held_out = lambda *_: {"held_out_loss": next(figures)}  # type: ignore[method-assign]

    console = Console(record=True, width=300)
    run(tmp_path, recipe(images=48, held_out_every=16), change=change, console=console)
    assert ("held_out_loss was 2 and is 3 now: it may be remembering" in console.export_text()) == told


def test_compiled_networks_keep_their_names_and_a_failing_compiler_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no\ncompiler here")

    monkeypatch.setattr(torch._dynamo, "optimize", broken)
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: setattr(self, "_compiled_call_impl", broken))
    console = Console(record=True, width=200)
    run(tmp_path / "compiled", recipe(images=32, compile="on"), console=console)
    assert "torch.compile failed (no compiler here); going on without it" in console.export_text()
    run(tmp_path / "plain", recipe(images=32))
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "compiled"))


def test_an_unknown_or_absent_tracker_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LimnerError, match=r"'tensorbord' is unknown; did you mean 'tensorboard'"):
        run(tmp_path, recipe(trackers=["tensorbord"]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LimnerError, match="wandb is not installed"):
        run(tmp_path, recipe(trackers=["wandb"]))
