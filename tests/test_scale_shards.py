"""`limner sample --shard`: the parts are, together, what is drawn in one piece."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from limner.cli.given import part_of
from limner.errors import LimnerError
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
