"""Runs that draw for an evaluation: whose conditions, which rows, the same pictures whatever the parts."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import limner
from evaluation_doubles import Tiny, evaluate_half
from limner import build, config
from limner.cli.program import run
from limner.data.dataset import prepare
from limner.evaluation import features, processes, runs
from limner.generator import Generator

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "white": (240, 240, 240)}
RECIPE = {
    "data": {"size": 8, "held_out": 0.25, "text_column": "text"},
    "model": {"kind": "unet", "levels": [{"channels": 8, "cross_attention": 1}], "norm_groups": 4, "head_dim": 8,
              "middle": "none"},
    "conditions": [{"kind": "text", "encoder": {"kind": "bpe", "width": 8, "depth": 1, "head_dim": 8}}],
    "training": {"precision": "fp32"},
    "sampling": {"steps": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data` of 32 captioned pictures, and `unseen`, 8 others."""
    home, chance = tmp_path_factory.mktemp("captions"), np.random.default_rng(0)
    for name, numbers in (("data", range(32)), ("unseen", range(32, 40))):
        (home / name).mkdir()
        lines = []
        for k in numbers:
            colour = list(COLOURS)[k % 4]
            tile = np.clip(chance.normal(COLOURS[colour], 20, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(tile).save(home / name / f"{k}.png")
            lines.append(json.dumps({"file_name": f"{k}.png", "text": f"{colour} tile {k}"}))
        (home / name / "metadata.jsonl").write_text("\n".join(lines))
    return home


@pytest.fixture(scope="module")
def generator(home: Path) -> Generator:
    data = {**RECIPE["data"], "source": str(home / "data")}
    recipe = config.parse({**RECIPE, "data": data}, "recipe")
    torch.manual_seed(0)
    model = build.model(recipe)
    assert model.conditioner is not None
    model.conditioner.learn({"text": [f"{colour} tile" for colour in COLOURS]})
    return Generator(recipe, model, "digest", torch.device("cpu"))


def texts(batches: Any) -> list[str]:
    return [text for _, facts in batches for text in facts["text"]]


def test_captions_are_the_references_with_held_out_ones_first(home: Path, generator: Generator) -> None:
    data = runs.conditions_for(generator, runs.referred(generator, None), {})
    assert data is not None
    assert data.texts is not None
    found = texts(runs.drawn(generator, range(40), {"batch": 16}, data))
    order = [data.texts[row] for row in (*data.held_out, *data.train)]
    assert found == [*order, *order[:8]]
    elsewhere = runs.conditions_for(generator, runs.referred(generator, home / "unseen"), {})
    assert elsewhere is not None
    assert {text.split()[-1] for text in elsewhere.texts or ()} == {str(k) for k in range(32, 40)}
    assert runs.conditions_for(generator, runs.referred(generator, None), {"text": ["red tile"]}) is None
    assert texts(runs.drawn(generator, range(3), {"text": ["red tile", "blue tile"]})) == [
        *("red tile", "blue tile", "red tile")
    ]


def test_a_picture_does_not_depend_on_its_part(generator: Generator) -> None:
    data = runs.conditions_for(generator, runs.referred(generator, None), {})
    for drawing, rows in (({"batch": 4, "seed": 3}, data), ({"batch": 4, "text": ["red tile", "blue", "white"]}, None)):
        whole = list(runs.drawn(generator, range(10), drawing, rows))
        parts = [batch for part in (range(7), range(7, 10)) for batch in runs.drawn(generator, part, drawing, rows)]
        assert texts(whole) == texts(parts)
        x, y = (np.concatenate([pictures for pictures, _ in batches]) for batches in (whole, parts))
        assert np.abs(x.astype(int) - y).max() <= 1


def test_held_out_captions_are_searched_for(home: Path, generator: Generator) -> None:
    found = runs.evaluate(generator, features=Tiny(), num=32)
    assert found["retrieval"].n == 8
    assert "among 32 real ones" in found["retrieval"].notes
    assert "retrieval_by_recall-tiny" in found.figures
    assert found.about["settings"]["steps"] == 2
    assert found.about["settings"]["run"] == "digest"
    unseen = runs.evaluate(generator, home / "unseen", features=Tiny(), num=8)
    assert unseen["retrieval"].n == 8
    assert "among 8 real ones" in unseen["retrieval"].notes


def test_samples_say_what_they_learned_from(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(features.NETWORKS, "tiny", lambda *_: Tiny())
    unseen = prepare(config.DataConfig(source=str(home / "unseen")), ("text",))
    np.savez(tmp_path / "s.npz", x=unseen.uint8(range(8)), text=np.array(unseen.texts))
    asked = ["evaluate", str(tmp_path / "s.npz"), "--reference", str(home / "unseen"), "--features", "tiny", "--json"]
    assert run(asked) == 0
    own = json.loads(capsys.readouterr().out)
    assert not [name for name in own["figures"] if name.startswith("retrieval")]  # one held-out caption is too few
    assert run([*asked, "--trained-on", str(home / "data")]) == 0
    facts = json.loads(capsys.readouterr().out)["figures"]
    assert facts["retrieval-tiny"]["value"] == 1
    assert facts["retrieval-tiny"]["n"] == 8


def test_two_processes_share_an_evaluation(
    home: Path, generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started as by torchrun, they share the samples of a file and what a run draws, and one of them speaks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    real = prepare(generator.config.data, ("text",))
    pictures = np.concatenate([real.uint8(range(32))] * 3)
    np.savez(tmp_path / "s.npz", x=pictures, text=np.array((real.texts or []) * 3))
    asked = [str(tmp_path / "s.npz"), "--reference", str(home / "data")]
    torch.multiprocessing.spawn(evaluate_half, (port, asked, str(tmp_path)), nprocs=2)
    assert (tmp_path / "1.json").read_text() == ""
    shared = json.loads((tmp_path / "0.json").read_text())
    monkeypatch.setitem(features.NETWORKS, "tiny", lambda *_: Tiny())
    alone = limner.evaluate(str(tmp_path / "s.npz"), str(home / "data"), features="tiny")
    assert shared["samples"]["n"] == alone["FD"].n == 96
    assert shared["figures"]["FD-tiny"]["value"] == pytest.approx(alone["FD"].value, abs=1e-6)
    monkeypatch.setattr(processes, "place", lambda: (1, 3))
    assert processes.part_of(range(10)) == range(3, 6)
    assert list(processes.in_turn(range(7))) == [1, 4]
