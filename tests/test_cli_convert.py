"""Other projects' checkpoints by the commands: converted, or straight into `sample`, and the same pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from limner.cli.program import run

ADM = Path(__file__).parent / "fixtures/adm_cosine"
FLAGS = ["--flags", str(ADM / "flags.json")]


def draw(source: Path, out: Path, *more: str) -> np.ndarray:
    assert run(["sample", str(source), "--num", "2", "--steps", "2", "--out", str(out), *more]) == 0
    with np.load(out) as data:
        return data["x"]


def test_a_converted_checkpoint_draws_what_the_checkpoint_itself_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(ADM / "model.pt"), str(tmp_path / "run"), *FLAGS, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["task"] == "diffusion"
    assert facts["parameters"] > 100_000
    converted = draw(tmp_path / "run", tmp_path / "a.npz")
    straight = draw(ADM / "model.pt", tmp_path / "b.npz", *FLAGS)
    assert np.array_equal(converted, straight)
    assert converted.std() > 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([str(ADM / "model.pt"), "RUN"], "--flags"),
        ([str(ADM / "flags.json"), "RUN", *FLAGS], "flags.json"),
        ([str(ADM / "nowhere.pt"), "RUN", *FLAGS], "no such file"),
        ([str(ADM / "model.pt"), "FULL", *FLAGS], "holds something already"),
        ([str(ADM / "model.pt"), "RUN", "--flags", "--image_sise 32"], "image_size"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine")
    places = {"RUN": str(tmp_path / "run"), "FULL": str(tmp_path / "full")}
    assert run(["convert", *(places.get(argument, argument) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("limner: ")
    assert captured.err.count("\n") == 1
    assert word in captured.err
    assert not (tmp_path / "run").exists()
