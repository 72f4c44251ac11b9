"""Streams of shards: every whole record once an epoch, whatever the processes, workers and restarts."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from rich.console import Console
from torch import nn

from limner.cli.program import run as command
from limner.config import DataConfig, RunConfig
from limner.data.check import check
from limner.data.dataset import prepare
from limner.data.stream import StreamDataset
from limner.data.stream_files import expand
from limner.data.stream_order import Plan, blocks_of, lanes_for
from limner.errors import LimnerError
from limner.recipe import automatic
from limner.training.draws import Batches
from limner.training.loop import train
from limner.training.share import Share
from limner.training.stream import CORRUPT, order_of
from limner.training.task import Losses, Task
from test_training_crash import two_processes
from tiny_cli import RECIPE
from tiny_stream import member, numbers, parquet_shards, tar_shards
from tiny_training import exit_code, in_a_child, recipe


def stream(source: str, wants: tuple[str, ...] = (), **settings: Any) -> StreamDataset:
    asked = {"source": source, "stream": True, "held_out": 0.0, "workers": 2} | settings
    data = prepare(DataConfig.model_validate(asked), wants)
    assert isinstance(data, StreamDataset)
    return data


def settings_for(data: StreamDataset, **training: Any) -> RunConfig:
    return recipe(**training).model_copy(update={"data": data.config})


def told(batch: Mapping[str, Any]) -> list[int]:
    pictures = (batch["image"].permute(0, 2, 3, 1).numpy() + 1.0) * 127.5
    return numbers(np.rint(pictures))


def steps(data: StreamDataset, out: Path, count: int, process: int = 0, processes: int = 1,
          **training: Any) -> list[list[int]]:  # fmt: skip
    """The numbers that each step shows a process."""
    config = settings_for(data, **training)
    order = order_of(data, config, out, process, processes)
    batches = Batches(data, 0, config.training.batch, config.training.accumulate, process, processes, order)
    return [[n for part in batches.load(k * config.training.batch) for n in told(part)] for k in range(count)]


# --- the order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ends", "lanes"), [([10, 20, 30], 4), ([1000], 8), ([3], 8), ([7, 7 + 2048, 5000], 64)])
def test_each_epoch_has_every_row_once(ends: list[int], lanes: int) -> None:
    trains = np.ones(ends[-1], dtype=bool)
    trains[::5] = False
    plan = Plan(blocks_of(ends, lanes), trains, seed=3, lanes=lanes, buffer=64)
    epochs = [[plan.lane(lane, epoch) for lane in range(lanes)] for epoch in range(2)]
    for lanes_of_epoch in epochs:
        assert sorted(np.concatenate(lanes_of_epoch).tolist()) == np.flatnonzero(trains).tolist()
    assert [lane.tolist() for lane in epochs[0]] != [lane.tolist() for lane in epochs[1]]
    other = replace(plan, seed=4)
    assert ends[-1] < 10 or any(plan.lane(k, 0).tolist() != other.lane(k, 0).tolist() for k in range(lanes))


def test_rows_are_shuffled_within_the_buffer_and_blocks_over_all() -> None:
    plan = Plan(blocks_of([4096], 1), np.ones(4096, dtype=bool), seed=0, lanes=1, buffer=512)
    rows = plan.lane(0, 0)
    assert len({row // 256 for row in rows[:512].tolist()}) == 2
    assert np.abs(np.diff(rows[:512])).mean() > 20
    assert {row // 256 for row in rows[:512].tolist()} != {0, 1}


def test_lanes_divide_the_batch() -> None:
    assert [lanes_for(batch) for batch in (1, 16, 48, 256, 1216)] == [1, 16, 16, 64, 64]


@pytest.mark.parametrize("make", [tar_shards, parquet_shards])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_and_micro_batches_share_what_one_would_take(tmp_path: Path, make: Any, accumulate: int) -> None:
    data = stream(make(tmp_path / "shards", 3, 100, {7, 120, 299}), held_out=0.05)
    whole = steps(data, tmp_path / "one", 12, batch=16)
    parts = [steps(data, tmp_path / "two", 12, p, 2, batch=16, accumulate=accumulate) for p in range(2)]
    assert whole == [first + second for first, second in zip(*parts, strict=True)]
    held_out = set(numbers(data.uint8(data.held_out)))
    seen = {number for step in whole for number in step}
    assert not seen & (held_out | {7, 120, 299})
    assert data.corrupt.keys() == {7, 120, 299}


def test_reading_ahead_doesnt_move_the_place(tmp_path: Path) -> None:
    data = stream(tar_shards(tmp_path / "shards", 2, 40))
    config = settings_for(data, batch=8)
    order = order_of(data, config, tmp_path / "run")
    batches = Batches(data, 0, 8, order=order)
    loaded = [told(batches.load(8 * k)[0]) for k in range(6)]
    place = order.place(24, lambda own: own)
    other = order_of(data, config, tmp_path / "other")
    other.restore(24, place)
    again = Batches(data, 0, 8, order=other)
    assert [told(again.load(8 * k)[0]) for k in range(3, 6)] == loaded[3:]
    fewer = order_of(replace(data, config=data.config.model_copy(update={"lanes": 4})), config, tmp_path / "fewer")
    with pytest.raises(LimnerError, match=r"the run has 8, and the recipe given 4; resume with --set data\.lanes=8"):
        fewer.restore(24, place)


def test_lanes_that_dont_fit_the_processes_are_refused(tmp_path: Path) -> None:
    data = stream(tar_shards(tmp_path / "shards", 1, 40), lanes=6)
    with pytest.raises(LimnerError, match=r"data\.lanes: 6 should divide training\.batch, 8, and be a multiple of 1"):
        order_of(data, settings_for(data, batch=8), tmp_path)
    with pytest.raises(LimnerError, match=r"a multiple of 4 \(2 micro-batches on each of 2 processes\)"):
        order_of(data, settings_for(data, batch=12, accumulate=2), tmp_path, 0, 2)


# --- through a training, with a kill in the middle --------------------------------------------------------------------


class Recorder(Task):
    """Learns nothing to speak of, and writes down what it was shown: a file a process, a line a step."""

    def __init__(self, seen: Path) -> None:
        self.modules = {"model": nn.Linear(3, 1)}
        self.seen = seen

    def losses(self, batch: Mapping[str, Any], rng: torch.Generator, progress: float) -> Losses:
        part = batch["part"]
        line = json.dumps([part.images, part.start, told(batch)])
        with self.seen.with_suffix(f".{os.environ.get('RANK', 0)}").open("a") as file:
            file.write(line + "\n")
        loss = self.modules["model"](batch["image"].mean((2, 3))).square().mean()
        return Losses({"model": loss}, {"loss": loss.detach()})

    def held_out(self, average: nn.Module, data: Any, share: Share) -> dict[str, float]:
        return {}

    def preview(self, average: nn.Module, share: Share) -> tuple[npt.NDArray[np.uint8], list[str]]:
        return np.empty((0, 1, 1, 3), np.uint8), []


BATCH = 64


def sit(source: str, out: Path, images: int) -> None:
    torch.set_num_threads(1)
    data = stream(source)
    config = settings_for(data, batch=BATCH, images=images, checkpoint_every=16 * BATCH, log_every=10_000)
    train(Recorder(out.parent / "seen"), data, config, out, resume=True, console=Console(quiet=True))


def lanes_seen(folder: Path) -> dict[int, list[int]]:
    """By place in the batch (a lane each), the numbers in the order of steps. What was done twice was the same."""
    by_step: dict[tuple[int, int], list[int]] = {}
    for file in folder.glob("seen.*"):
        for line in file.read_text().splitlines():
            if line.endswith("]"):
                images, start, found = json.loads(line)
                assert by_step.setdefault((images, start), found) == found
    lanes: dict[int, list[int]] = {}
    for (_, start), found in sorted(by_step.items()):
        for k, number in enumerate(found):
            lanes.setdefault(start + k, []).append(number)
    return lanes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes to kill them")
def test_ten_thousand_records_seven_corrupt_two_processes_and_a_kill(tmp_path: Path) -> None:
    """Exactly the 9,993 whole ones once an epoch, over two processes with two workers each, both killed midway."""
    corrupt = {5, 1234, 2500, 4999, 7777, 8000, 9999}
    source = tar_shards(tmp_path / "shards", 10, 1000, corrupt, labels=False)
    out, images = tmp_path / "run", 170 * BATCH
    children = two_processes(lambda rank: sit(source, out, images))
    while not list((out / "checkpoints").glob("images-00000[3-9]*")):
        assert all(os.waitpid(child, os.WNOHANG) == (0, 0) for child in children)
        time.sleep(0.005)
    for child in children:
        os.kill(child, signal.SIGKILL)
    assert {exit_code(child) for child in children} == {-signal.SIGKILL}
    seen_before = sum(map(len, lanes_seen(tmp_path).values()))
    assert 3000 < seen_before < images
    assert [exit_code(child) for child in two_processes(lambda rank: sit(source, out, images))] == [0, 0]
    data = stream(source)
    plan = Plan(blocks_of(data.ends, BATCH), np.ones(10_000, dtype=bool), 0, BATCH, data.config.buffer)
    lanes = lanes_seen(tmp_path)
    first_epoch = []
    for lane, found in lanes.items():
        first_epoch += found[: len(set(plan.lane(lane, 0).tolist()) - corrupt)]
    assert sorted(first_epoch) == [number for number in range(10_000) if number not in corrupt]
    listed = [json.loads(line) for line in (out / CORRUPT).read_text().splitlines()]
    assert sorted(entry["row"] for entry in listed) == sorted(corrupt)
    assert sorted(entry["place"][-22:] for entry in listed) == [
        f"{n // 1000:04d}.tar member {n:06d}" for n in sorted(corrupt)
    ]
    alone = tmp_path / "alone"
    alone.mkdir()
    assert exit_code(in_a_child(lambda: sit(source, alone / "run", images))) == 0
    assert lanes_seen(alone) == lanes


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_more_than_one_in_a_hundred_is_refused_in_one_line(tmp_path: Path) -> None:
    early = tar_shards(tmp_path / "early", 2, 100, {0, 1, 2})
    with pytest.raises(LimnerError, match=r"member 000002: is a damaged .*; 3 of 200 rows are corrupt by now, and more "
                                          r"than 1% are refused") as caught:  # fmt: skip
        stream(early)
    assert "\n" not in str(caught.value)
    late = stream(tar_shards(tmp_path / "late", 2, 1000, range(1900, 1921)), lanes=8)
    assert not late.corrupt
    with pytest.raises(LimnerError, match="21 of 2,000 rows are corrupt by now"):
        steps(late, tmp_path / "run", 250, batch=8)
    assert len((tmp_path / "run" / CORRUPT).read_text().splitlines()) == 21
    again = stream(late.config.source or "", lanes=8)
    order_of(again, settings_for(again, batch=8), tmp_path / "run")
    assert len(again.corrupt) == 21
    assert len((tmp_path / "run" / CORRUPT).read_text().splitlines()) == 21


def test_a_record_without_its_label_is_skipped_as_corrupt(tmp_path: Path) -> None:
    source = tar_shards(tmp_path / "shards", 1, 200)
    file = tmp_path / "shards" / "0000.tar"
    named, other = member("000150.cls", b"0"), member("000150.xyz", b"0")
    assert named in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(named, other))
    data = stream(source, ("label",))
    assert data.corrupt.keys() == {150}
    raw = {"data": {"source": source, "stream": True}, "model": {"kind": "unet", "levels": [{"channels": 8}]}}
    assert automatic(raw)["data"]["size"] == [32, 32]
    assert {n for step in steps(data, tmp_path / "run", 120, batch=8) for n in step} == set(range(200)) - {150}


def test_a_shard_that_is_no_tar_or_isnt_there_stops_it(tmp_path: Path) -> None:
    source = tar_shards(tmp_path / "shards", 3, 10)
    (tmp_path / "shards" / "0001.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(LimnerError, match=r"0001\.tar: is not a tar file"):
        stream(source)
    (tmp_path / "shards" / "0001.tar").unlink()
    with pytest.raises(LimnerError, match=r"0001\.tar: no such file"):
        stream(source)


def test_a_shard_that_is_cut_off_stops_it(tmp_path: Path) -> None:
    """What is lost with it can't be counted."""
    source = tar_shards(tmp_path / "shards", 2, 100, labels=False)
    file = tmp_path / "shards" / "0001.tar"
    file.write_bytes(file.read_bytes()[: 60 * 1024 + 512 + 4])
    with pytest.raises(LimnerError, match=r"0001\.tar member 000160\.ppm: is cut off: the tar file is truncated"):
        stream(source)


def test_a_file_that_vanishes_is_no_corrupt_record(tmp_path: Path) -> None:
    data = stream(tar_shards(tmp_path / "shards", 2, 2000))
    (tmp_path / "shards" / "0001.tar").unlink()
    with pytest.raises(LimnerError, match=r"0001\.tar member \d+: cannot be read .*go on with --resume"):
        steps(data, tmp_path / "run", 20, batch=64)


@pytest.mark.parametrize(
    ("wants", "said"), [(("semantic_map",), "no semantic_map column"), (("text",), "no text column")]
)
def test_conditions_that_arent_there(tmp_path: Path, wants: tuple[str, ...], said: str) -> None:
    with pytest.raises(LimnerError, match=said):
        stream(tar_shards(tmp_path / "shards", 1, 10), wants)


def test_other_forms_of_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "0.ppm").write_bytes(b"P6 1 1 255\nabc")
    with pytest.raises(LimnerError, match=r"data\.stream needs WebDataset tars or Parquet files"):
        stream(str(tmp_path))


# --- patterns and addresses -------------------------------------------------------------------------------------------


def test_patterns_and_addresses(tmp_path: Path) -> None:
    braces = tar_shards(tmp_path / "test" / "shards", 3, 4)
    assert [file.name for file in expand(braces)] == ["0000.tar", "0001.tar", "0002.tar"]
    assert len(stream(braces)) == len(stream(str(tmp_path / "test" / "shards" / "*.tar"))) == 12
    assert len(stream(str(tmp_path / "test" / "shards"))) == 12
    tar_shards(tmp_path / "train", 1, 5)
    assert len(stream(str(tmp_path / "{train,test/shards}" / "0000.tar"))) == 5
    memory = fsspec.filesystem("memory")
    for file in expand(braces):
        memory.pipe(f"/shards/{file.name}", Path(str(file)).read_bytes())
    for address in ("memory://shards", "memory://shards/{0000..0002}.tar", "memory://shards/*.tar"):
        data = stream(address, ("label",))
        assert numbers(data.uint8(np.arange(12))) == list(range(12))
        assert data.labels is not None
        assert data.labels.tolist() == [n % 3 for n in range(12)]
    assert prepare(DataConfig(source="memory://shards")).digest != data.digest


def test_parquet_at_an_address(tmp_path: Path) -> None:
    folder = Path(parquet_shards(tmp_path / "shards", 2, 150, {7}))
    memory = fsspec.filesystem("memory")
    for file in folder.iterdir():
        memory.pipe(f"/parquet/{file.name}", file.read_bytes())
    data = stream("memory://parquet", ("label",))
    assert data.ends == [100, 150, 250, 300]
    assert numbers(data.uint8([0, 299, 120])) == [0, 299, 120]
    assert data.corrupt.keys() == {7}


@pytest.mark.parametrize(("source", "said"), [
    ("shards/{0..}.tar", "no such tar"), ("nosuch://x/y.tar", "cannot be opened"), ("x{0..99999999}.tar", "more than"),
    ("memory://nothing/*.tar", "no such tar or Parquet file"), ("*.tar", "no such tar or Parquet file")])  # fmt: skip
def test_what_stands_for_nothing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str,
                                             said: str) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LimnerError, match=said) as caught:
        stream(source)
    assert "\n" not in str(caught.value)


# --- the command line -------------------------------------------------------------------------------------------------


def test_check_says_what_a_stream_would_skip(tmp_path: Path) -> None:
    report = check(tar_shards(tmp_path / "shards", 2, 100, {3}))
    assert not report.ok
    assert any("1 of 200 rows (0.50%): data.stream=true skips" in line for line in report.lines())
    many = check(tar_shards(tmp_path / "many", 1, 100, {3, 4}))
    assert not any("data.stream" in line for line in many.lines())


def test_a_stream_trains_and_resumes_from_the_command_line(tmp_path: Path) -> None:
    shards = tar_shards(tmp_path / "shards", 2, 60)
    preset = tmp_path / "tiny.yaml"
    preset.write_text(RECIPE.replace("data: {size: [8, 8]", "data: {stream: true, size: [8, 8]"))
    asked = ["train", shards, "--preset", str(preset), "--out", str(tmp_path / "run")]
    for images, more in ((32, []), (64, ["--resume"])):
        assert command([*asked, "--images", str(images), *more]) == 0
    state = json.loads((tmp_path / "run" / "checkpoints" / "images-000000064" / "state.json").read_text())
    assert sum(passed for _, passed in state["place"]["lanes"]) == 64
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["corrupt"] == 0
