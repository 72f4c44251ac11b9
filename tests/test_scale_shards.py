"""`limner sample` in parts (`--shard`) and by several processes: together, what is drawn in one piece."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from limner.cli.given import part_of
from limner.cli.program import run
from limner.errors import LimnerError
from limner.hardware import best_device
from tiny_cli import Workshop


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        yield Workshop(tmp_path_factory.mktemp("shop"), patch)


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as data:
        return dict(data)


@pytest.mark.parametrize("asked", [[], ["--label", "fish,cat", "--guidance", "2"], ["--sampler", "ddim", "--eta", "1"]])
def test_the_parts_are_the_whole(shop: Workshop, tmp_path: Path, asked: list[str]) -> None:
    """Eleven pictures in three parts: noise, labels and order go by a picture's number."""
    common = ["--num", "11", "--batch", "4", *asked]
    assert shop.sample("--out", str(tmp_path / "whole.npz"), *common) == 0
    for index in range(3):
        assert shop.sample("--out", str(tmp_path / f"{index}.npz"), "--shard", f"{index}/3", *common) == 0
    parts = [arrays(tmp_path / f"{index}.npz") for index in range(3)]
    whole = arrays(tmp_path / "whole.npz")
    assert [len(part["x"]) for part in parts] == [3, 4, 4]
    for name, values in whole.items():
        joined = np.concatenate([part[name] for part in parts])
        assert np.abs(joined.astype(int) - values.astype(int)).max() <= (1 if name == "x" else 0)


def test_numbers_in_archives_are_those_of_the_whole(shop: Workshop, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    names = []
    for index in range(2):
        out = tmp_path / f"{index}.tar"
        assert shop.sample("--out", str(out), "--num", "5", "--shard", f"{index}/2", "--json") == 0
        assert json.loads(capsys.readouterr().out)["num"] == 2 + index
        with tarfile.open(out) as archive:
            names += [name for name in archive.getnames() if name.endswith(".png")]
    assert names == [f"{number:06d}.png" for number in range(5)]


@pytest.mark.parametrize("shard", ["3/3", "1", "-1/3", "a/b", "0/0", "0/12", "1/2/3"])
def test_other_shards_are_refused(shop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                  shard: str) -> None:  # fmt: skip
    assert shop.sample("--out", str(tmp_path / "x.npz"), "--num", "11", "--shard", shard) == 2
    said = capsys.readouterr().err
    assert "--shard" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "x.npz").exists()


def test_every_picture_is_in_one_part() -> None:
    for num, shards in ((1, 1), (7, 7), (50_000, 13)):
        parts = [part_of(f"{index}/{shards}", num) for index in range(shards)]
        assert [number for part in parts for number in part] == list(range(num))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(LimnerError, match="I below N"):
        part_of("8/8", 100)


def half(rank: int, port: int, asked: list[str], said: str) -> None:
    """One of two processes, as torchrun starts them."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
    with open(f"{said}-{rank}", "w") as file, contextlib.redirect_stdout(file):
        code = run(asked)
    assert code == 0


def test_two_processes_draw_what_one_draws(shop: Workshop, tmp_path: Path) -> None:
    """To the bit, into one file, and one of them speaks: eleven pictures, three batches, noise in the sampler."""
    common = ["--num", "11", "--batch", "4", "--json", "--sampler", "ddim", "--eta", "1", "--label", "fish,cat"]
    assert shop.sample("--out", str(tmp_path / "one.npz"), *common) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = ["sample", str(shop.run), "--out", str(tmp_path / "two.npz"), *common]
    torch.multiprocessing.spawn(half, (port, asked, str(tmp_path / "said")), nprocs=2)
    one, two = arrays(tmp_path / "one.npz"), arrays(tmp_path / "two.npz")
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert json.loads((tmp_path / "said-0").read_text())["num"] == 11
    assert (tmp_path / "said-1").read_text() == ""


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert best_device() == torch.device("cuda")
    for rank, device in (("0", "cuda:0"), ("1", "cuda:1"), ("2", "cuda")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert best_device() == torch.device(device)
