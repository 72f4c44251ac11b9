"""`limner evaluate`: a run that draws, samples on disk, several scales, bits per dimension, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from limner.cli.program import run
from tiny_cli import Workshop


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        yield Workshop(tmp_path_factory.mktemp("shop"), patch)


def test_a_run_is_compared_with_what_it_was_trained_on(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--num", "6", "--interval", "0.1,0.9", "--rescale", "0.5", "--json"]
    assert run(["evaluate", str(shop.run), *asked]) == 0
    facts = json.loads(capsys.readouterr().out)
    settings = facts["settings"]
    assert (settings["steps"], settings["interval"], settings["rescale"]) == (2, [0.1, 0.9], 0.5)
    assert "FD-efficientnet-lite0" in json.dumps(facts)
    assert "class_accuracy" in json.dumps(facts)


def test_several_scales_make_a_table_and_a_plot(
    shop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot, page = tmp_path / "plot.png", tmp_path / "page.html"
    asked = ["evaluate", str(shop.run), "--num", "6", "--guidance", "1,3", "--plot", str(plot), "--html", str(page)]
    assert run(asked) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert plot.stat().st_size > 1000
    assert "<html" in page.read_text()


def test_samples_on_disk_need_a_reference(shop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shop.sample("--num", "6", "--out", str(tmp_path / "s.npz")) == 0
    capsys.readouterr()
    assert run(["evaluate", str(tmp_path / "s.npz")]) == 2
    assert capsys.readouterr().err.startswith("limner: reference: name the real pictures")
    assert run(["evaluate", str(tmp_path / "s.npz"), "--reference", str(shop.data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"]["n"] == 6


def test_bits_per_dim_of_held_out_pictures(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", str(shop.run), "--bits-per-dim", "--num", "3", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["n"] == 3
    assert 0 <= facts["prior"] < 0.1 < facts["bits_per_dim"]


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (["--guidance", "1,x"], "--guidance 1,x: should be numbers"),
        (["--interval", "0.1"], "--interval 0.1: should be two times LO,HI"),
        (["--guidance", "1", "--plot", "p.png"], "--plot: goes with several scales"),
        (["--features", "efficientnet-lite1"], "efficientnet-lite0"),
    ],
)
def test_wrong_input_is_one_line(
    shop: Workshop, asked: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", str(shop.run), "--num", "6", *asked]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
