"""How far to compress, on tiny data: what the experiment leaves, how it goes on, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from evaluation_doubles import Tiny
from limner.cli.program import run
from limner.errors import LimnerError
from limner.evaluation import features
from limner.experiments import compression
from tiny_cli import pictures

QUIET = Console(quiet=True)
FILES = ("results.json", "results.csv", "report.html", "compression.png", "compression.svg")
FAST = ("training.warmup_images=8", "training.precision=fp32", "training.previews=2")
SMALL: dict[str, Any] = {
    "factors": (1, 2), "budget_s": None, "images": 32, "autoencoder_images": 16, "first": 16, "num": 6, "steps": 2,
    "size": 8, "features": "tiny", "levels": ({"channels": 32}, {"channels": 32}), "widths": (32,), "settings": FAST,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _tiny_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(features.NETWORKS, "tiny", lambda *_: Tiny())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("data") / "pictures")


def test_every_factor_is_trained_and_measured(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    facts = compression.run(str(data), out, console=QUIET, **SMALL)
    assert [(row["f"], row["images"]) for row in facts["rows"]] == [(1, 16), (1, 32), (2, 16), (2, 32)]
    assert [row["images"] for row in facts["equal_steps"]] == [32, 32]
    assert {row["f"] for row in facts["equal_time"]} <= {1, 2}
    (first,) = facts["autoencoders"]
    assert first["latent"] == "2x4x4"
    assert first["PSNR"] > 0
    assert all((out / name).is_file() for name in FILES)
    assert all((out / name).is_file() for name in ("f1/samples.png", "f2/samples.png", "f2/reconstructions.png"))
    same = [result["parameters"] for result in facts["cells"]]
    assert 0.9 < same[0] / same[1] < 1.1
    (out / "f2" / "result.json").unlink()
    (out / "f2" / "points" / "000000032.json").unlink()
    again = compression.run(str(data), out, console=QUIET, **SMALL)
    assert again["rows"][3]["FD-tiny"] == pytest.approx(facts["rows"][3]["FD-tiny"])
    with pytest.raises(LimnerError, match="holds an experiment with num 6, not 7"):
        compression.run(str(data), out, console=QUIET, **{**SMALL, "num": 7})


def test_a_budget_of_seconds_ends_a_factor(data: Path, tmp_path: Path) -> None:
    timed = {**SMALL, "factors": (1,), "budget_s": 2.0, "images": None, "first": 100_000}
    facts = compression.run(str(data), tmp_path / "out", console=QUIET, **timed)
    (row,) = facts["rows"]
    assert 0 < row["images"] < 100_000
    assert row["seconds"] >= 2


def test_where_they_are_compared() -> None:
    seen = ((1, 4, 10), (1, 7, 20), (2, 4, 4), (2, 8, 8), (2, 16, 16), (2, 21, 20))
    rows = [{"f": f, "images": images, "seconds": seconds} for f, images, seconds in seen]
    same, images = compression.at_equal_steps(rows)
    assert images == 4
    assert [row["seconds"] for row in same] == [10, 4]
    assert [row["images"] for row in compression.at_equal_time(rows)] == [7, 21]
    unequal, images = compression.at_equal_steps([{"f": 1, "images": 3}, {"f": 2, "images": 4}, {"f": 2, "images": 9}])
    assert (images, [row["images"] for row in unequal]) == (3, [3, 4])


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (["compression", "DATA", "--factors", "3", "--size", "8"], "--factors 3: pictures of 8x8"),
        (["compression", "DATA", "--factors", "32", "--size", "64"], "allow 1,2,4,8,16; --size changes the pictures"),
        (["compression", "DATA", "--factors", "2,2"], "--factors 2,2: should be different factors"),
        (["compression", "DATA", "--factors", "x"], "--factors x: should be whole numbers"),
        (["compression", "EMPTY"], "EMPTY"),
        (["compression", "DATA", "--budget", "long"], "budget 'long'"),
        (["compression", "DATA", "--first", "0"], "images '0': should be a number"),
        (["compression", "DATA", "--set", "trainin.lr=1"], "trainin"),
    ],
)
def test_wrong_input_is_one_line(
    data: Path, tmp_path: Path, asked: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "EMPTY"
    empty.mkdir()
    places = {"DATA": str(data), "EMPTY": str(empty)}
    capsys.readouterr()
    assert run(["experiment", *(places.get(word, word) for word in asked), "--out", str(tmp_path / "out")]) == 2
    error = [text for text in capsys.readouterr().err.splitlines() if text.startswith("limner: ")]
    assert len(error) == 1
    assert line in error[0]
