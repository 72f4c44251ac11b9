"""The loop's parts: chance by position, the clock, the learning rate, averages of logs, what is told."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from limner.config import DataConfig, TrainingConfig
from limner.data.dataset import prepare
from limner.errors import LimnerError
from limner.training import devices
from limner.training.clock import Clock, learning_rate
from limner.training.devices import wants_compile
from limner.training.draws import Batches, Part, Shuffled, balanced, rows_at, seed_of
from limner.training.progress import Display, MetricsFile, duration
from limner.training.stream import order_of
from limner.training.task import Means, band_names, by_band, to_device, total
from tiny_training import Pictures, recipe


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 3))
def test_every_row_comes_once_an_epoch_in_another_order(rows: int, epoch: int, seed: int) -> None:
    here = rows_at(range(epoch * rows, (epoch + 1) * rows), rows, seed)
    after = rows_at(range((epoch + 1) * rows, (epoch + 2) * rows), rows, seed)
    assert sorted(here) == sorted(after) == list(range(rows))
    if rows > 12:
        assert list(here) != list(after)


def test_rare_classes_come_more_often_as_far_as_asked() -> None:
    labels = np.repeat([0, 1, 2], [80, 20, 5])
    rows = np.arange(1, 105)
    half, whole = (np.bincount(labels[balanced(rows, labels, share)]) for share in (0.5, 1.0))
    assert half.tolist() == [79, 2 * 20, 4 * 5]
    assert whole.tolist() == [79, 4 * 20, 16 * 5]
    assert set(balanced(rows, labels, 1.0)) == set(rows)


def test_balance_needs_classes(tmp_path: Path) -> None:
    made, data = recipe(balance=1.0), Pictures()
    order = order_of(data, made, tmp_path)
    assert isinstance(order, Shuffled)
    assert len(order.train) == len(data.train)  # as many of each class already
    told: list[str] = []
    data.groups = None  # pyright: ignore[reportAttributeAccessIssue]
    order = order_of(data, made, tmp_path, say=told.append)
    assert isinstance(order, Shuffled)
    assert order.train.tolist() == data.train.tolist()
    assert "no label column" in told[0]


def test_balance_takes_the_label_column_of_a_model_that_is_told_of_captions_alone(tmp_path: Path) -> None:
    rows = ["file_name,label,text", *(f"{n}.png,{'cat' if n else 'dog'},picture {n}" for n in range(5))]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    for n in range(5):
        Image.new("RGB", (4, 4), (n, 0, 0)).save(tmp_path / f"{n}.png")
    data = prepare(DataConfig(source=str(tmp_path), held_out=0), ["text"])
    assert data.labels is None
    order = order_of(data, recipe(balance=1.0), tmp_path)
    assert isinstance(order, Shuffled)
    assert sorted(order.train.tolist()) == [0, 0, 0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(("accumulate", "processes"), [(1, 1), (4, 1), (1, 2), (2, 2)])
def test_a_steps_rows_flips_and_draws_do_not_depend_on_how_it_is_split(accumulate: int, processes: int) -> None:
    data = Pictures()
    whole = Batches(data, 3, 8).load(80)[0]
    parts = [
        batch for process in range(processes) for batch in Batches(data, 3, 8, accumulate, process, processes).load(80)
    ]
    assert torch.equal(torch.cat([batch["image"] for batch in parts]), whole["image"])
    assert torch.equal(torch.cat([batch["label"] for batch in parts]), whole["label"])
    noise = [batch["part"].noise(5, (3, 4, 4), torch.device("cpu")) for batch in [whole, *parts]]
    assert torch.equal(torch.cat(noise[1:]), noise[0])
    draws = [b["part"].of(torch.rand(8, generator=b["part"].generator(5, "x"))) for b in [whole, *parts]]
    assert torch.equal(torch.cat(draws[1:]), draws[0])


def test_chance_differs_by_seed_moment_and_purpose() -> None:
    seeds = {seed_of(s, i, p) for s in range(3) for i in range(3) for p in ("a", "b")}
    assert len(seeds) == 18
    assert all(0 <= seed < 2**63 for seed in seeds)
    one, two = (Part(i, 0, 4, 4).noise(0, (2,), torch.device("cpu")) for i in (0, 4))
    assert not torch.equal(one, two)


def test_the_stream_goes_on_where_it_is_told_to() -> None:
    batches = Batches(Pictures(), 0, 8)
    assert next(batches.stream(16, ahead=False))[0]["part"] == next(batches.stream(16))[0]["part"]
    stream = batches.stream(16)
    for images in (16, 24, 32):
        assert torch.equal(next(stream)[0]["image"], batches.load(images)[0]["image"])
    stream.close()


def test_an_error_while_reading_reaches_the_loop() -> None:
    class Broken(Pictures):
        def batch(self, rows: object, generator: object = None) -> dict[str, object]:
            raise LimnerError("row 7: damaged")

    with pytest.raises(LimnerError, match="row 7"):
        next(Batches(Broken(), 0, 8).stream(0))


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(LimnerError, match="no rows to train on"):
        Batches(Pictures(rows=8, held_out=8), 0, 8)


def test_progress_is_the_budget_that_is_nearer_its_end() -> None:
    clock = Clock(50, 100, 10.0, 0.0, 0.0)
    assert clock.progress(2.0) == 0.5
    assert clock.progress(8.0) == 0.8
    assert clock.progress(80.0) == 1.0
    assert Clock(50, None, 10.0, 0.0, 0.0).progress(1.0) == 0.1
    assert Clock(50, 200, None, 0.0, 0.0).progress(1e9) == 0.25


def test_multiples_are_noticed_once_however_large_the_batch() -> None:
    noticed = []
    clock = Clock(0, 1000, None, 0.0, 0.0)
    for _ in range(20):
        clock.images += 48
        if clock.passed(100, 48):
            noticed.append(clock.images)
    assert noticed == [144, 240, 336, 432, 528, 624, 720, 816, 912]


@pytest.mark.parametrize(("decay", "middle"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_learning_rate_warms_up_by_images_and_decays_by_budget(decay: str, middle: float) -> None:
    config = TrainingConfig.model_validate({"decay": decay, "decay_from": 0.2, "warmup_images": 1000})
    assert learning_rate(250, 0.0, config) == 0.25
    assert learning_rate(5000, 0.2, config) == 1.0
    assert learning_rate(5000, 0.6, config) == pytest.approx(middle)
    assert learning_rate(5000, 1.0, config) == pytest.approx(1.0 if decay == "constant" else 0.0, abs=1e-12)
    rates = [learning_rate(5000, p / 50, config) for p in range(51)]
    assert rates == sorted(rates, reverse=True)
    everything = config.model_copy(update={"decay_from": 1.0, "warmup_images": 0})
    assert learning_rate(1, 1.0, everything) == 1.0


def test_bands_hold_what_falls_into_them() -> None:
    values, t = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([0.0, 0.24, 0.25, 0.99, 1.0])
    means = Means()
    means.add({**by_band("loss", values, t), "all": total(values)})
    assert means.read() == {"loss_t0.00_0.25": 1.5, "loss_t0.25_0.50": 4.0, "loss_t0.75_1.00": 12.0, "all": 6.2}
    assert means.read() == {}
    assert band_names("x")[2] == "x_t0.50_0.75"


def test_means_weigh_micro_batches_and_leave_out_what_is_not_finite() -> None:
    means = Means()
    for value in (1.0, 3.0, float("nan"), float("inf")):
        means.add({"loss": torch.tensor(value)}, share=0.5)
    assert means.read() == {"loss": 2.0}


def test_metrics_are_json_even_where_figures_are_not_finite(tmp_path: Path) -> None:
    told = MetricsFile(tmp_path / "metrics.jsonl")
    told.write({"images": 16, "loss": math.nan, "mean": [1.0, math.inf], "skipped": 2})
    assert json.loads(told.path.read_text()) == {"images": 16, "loss": None, "mean": [1.0, None], "skipped": 2}


def test_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with Display("diffusion", Console(file=stream, width=60)) as display:
        display.update(0.25, 4000, 90.0, {"loss": 0.1234567, "images/s": 99.9})
        display.update(0.26, 4100, 80.0)
        display.say("[not markup] said")
    assert stream.getvalue() == (
        "diffusion: 25%, 4,000 images, loss 0.1235, images/s 99.9, 1 min 30 s left\n[not markup] said\n"
    )


def test_a_bar_with_the_time_left_on_a_terminal() -> None:
    stream = io.StringIO()
    with Display("diffusion", Console(file=stream, width=120, force_terminal=True)) as display:
        display.update(0.5, 4000, 90.0, {"loss": 0.25})
    assert "4,000 images, loss 0.25, 1 min 30 s left" in stream.getvalue()


@pytest.mark.parametrize(("seconds", "words"), [(8.4, "8 s"), (750, "12 min 30 s"), (3900, "1 h 05 min"), (-3, "0 s")])
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_compiling_is_decided_by_the_whole_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(devices.sys, "platform", "linux")
    cuda = torch.device("cuda")
    assert not wants_compile(TrainingConfig(budget_s=1200), torch.device("cpu"))
    assert wants_compile(TrainingConfig(budget_s=1200), cuda)
    assert not wants_compile(TrainingConfig(budget_s=60), cuda)
    assert not wants_compile(TrainingConfig(images=1000), cuda)
    assert not wants_compile(TrainingConfig(images=10_000_000, budget_s=60), cuda)
    assert wants_compile(TrainingConfig(images=10_000_000), cuda)
    assert wants_compile(TrainingConfig(images=16, compile="on"), cuda)
    assert not wants_compile(TrainingConfig(budget_s=7200, compile="off"), cuda)
    assert not wants_compile(TrainingConfig(budget_s=7200), torch.device("mps"))
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    assert not wants_compile(TrainingConfig(budget_s=1200), cuda)


def test_flips_are_drawn_for_about_half_of_the_rows() -> None:
    data = Pictures()
    flipped = seen = 0
    for images in range(0, 400, 8):
        batch = Batches(data, 0, 8).load(images)[0]
        rows = data.train[rows_at(batch["part"].positions, len(data.train), 0)]
        plain = data.batch(rows)["image"]
        flipped += sum(not torch.equal(a, b) for a, b in zip(batch["image"], plain, strict=True))
        seen += len(rows)
    assert 0.4 < flipped / seen < 0.6
    assert isinstance(rows, np.ndarray)


def test_the_host_keeps_the_numbers_of_a_batchs_rows() -> None:
    batch = {"row": torch.arange(3), "image": torch.zeros(3, 3, 4, 4), "text": ["a", "b", "c"]}
    moved = to_device(batch, torch.device("meta"))
    assert [moved[key].device.type for key in ("row", "image")] == ["cpu", "meta"]
    assert moved["text"] == batch["text"]
