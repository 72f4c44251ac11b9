"""Quality against speed on tiny runs: what the experiment leaves, how it goes on, and what it refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from evaluation_doubles import Tiny
from limner import api, build, config
from limner.cli.program import run
from limner.evaluation import features
from limner.experiments import sampling
from limner.training.checkpoint import Checkpoints
from tiny_cli import Workshop

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _tiny_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(features.NETWORKS, "tiny", lambda *_: Tiny())


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        yield Workshop(tmp_path_factory.mktemp("shop"), patch)


@pytest.fixture(scope="module")
def latent(shop: Workshop) -> Path:
    """A latent run of the same data, untrained."""
    raw = api.read_recipe(shop.run).model_dump(mode="json")
    raw["space"] = {"kind": "latent", "autoencoder": {"kind": "autoencoder", "norm_groups": 4, "middle": "none",
                                                      "levels": [{"channels": 8}, {"channels": 8}]}}  # fmt: skip
    recipe = config.parse(raw, "latent")
    torch.manual_seed(0)
    out = shop.folder / "latent"
    out.mkdir()
    Checkpoints(out).publish(build.model(recipe).state_dict(), recipe)
    return out


def test_every_solver_and_number_of_steps_is_measured(shop: Workshop, latent: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"num": 7, "samplers": ("ddim", "heun"), "steps": (2, 3), "features": "tiny", "batch": 4}
    facts = sampling.run([str(shop.run), str(latent)], None, out, console=QUIET, **options)
    assert [(row["name"], row["sampler"], row["steps"]) for row in facts["rows"]] == [
        (name, sampler, steps) for name in ("run", "latent") for sampler in ("ddim", "heun") for steps in (2, 3)
    ]
    assert {row["space"] for row in facts["rows"]} == {"pixels", "latent"}
    for row in facts["rows"]:
        assert row["images_per_s"] == pytest.approx(7 / row["seconds"])
        assert row["FD-tiny"] > 0
        assert {"FD-tiny_low", "IS-tiny", "class_accuracy"} <= row.keys()
    assert all(
        (out / name).is_file() for name in ("results.json", "results.csv", "report.html", "speed.png", "speed.svg")
    )
    assert len(list(csv.DictReader((out / "results.csv").open()))) == 8
    assert not list(out.rglob("part-*"))
    page = (out / "report.html").read_text()
    assert page.count("<img ") == 1 + 8
    assert "http" not in page


def test_parts_that_were_drawn_are_not_drawn_again(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "PART", 3)
    options: dict[str, Any] = {"num": 7, "samplers": ("ddim",), "steps": (2,), "features": "tiny", "batch": 2}
    drawn: list[range] = []
    real = sampling.runs.drawn

    def counting(generator: Any, numbers: range, *more: Any) -> Any:
        drawn.append(numbers)
        if len(drawn) == 3 and numbers.start == 6:
            raise KeyboardInterrupt
        return real(generator, numbers, *more)

    monkeypatch.setattr(sampling.runs, "drawn", counting)
    with pytest.raises(KeyboardInterrupt):
        sampling.run([str(shop.run)], None, tmp_path / "a", console=QUIET, **options)
    facts = sampling.run([str(shop.run)], None, tmp_path / "a", console=QUIET, **options)
    assert drawn == [range(3), range(3, 6), range(6, 7), range(6, 7)]
    monkeypatch.setattr(sampling, "PART", 256)
    whole = sampling.run([str(shop.run)], None, tmp_path / "b", console=QUIET, **options)
    assert facts["rows"][0]["FD-tiny"] == pytest.approx(whole["rows"][0]["FD-tiny"], rel=1e-4)


def test_the_command_passes_everything_on(shop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "s")
    asked = [
        "experiment",
        "sampling",
        str(shop.run),
        "--smoke",
        "--features",
        "tiny",
        "--samplers",
        "ddim",
        "--spacing",
        "trailing",
        "--json",
    ]
    assert run([*asked, "--out", out]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["num"], facts["samplers"], [row["steps"] for row in facts["rows"]]) == (8, ["ddim"], [2, 4])
    assert [cell["settings"]["spacing"] for cell in facts["cells"]] == ["trailing"] * 2


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (["sampling", "RUN", "--samplers", "dim"], "sampler 'dim': there is none such; did you mean 'ddim'"),
        (["sampling", "RUN", "--spacing", "trail"], "unknown spacing 'trail'; did you mean 'trailing'"),
        (["sampling", "RUN", "RUN"], "a run is named twice"),
        (["sampling", "DATA"], "neither a run"),
        (["sampling", "RUN", "--features", "lite"], "features 'lite'"),
        (["sampling", "RUN", "--reference", "EMPTY", "--smoke"], "EMPTY"),
    ],
)
def test_wrong_input_is_one_line(
    shop: Workshop, tmp_path: Path, asked: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "EMPTY"
    empty.mkdir()
    places = {"DATA": str(shop.data), "RUN": str(shop.run), "EMPTY": str(empty)}
    capsys.readouterr()
    assert run(["experiment", *(places.get(word, word) for word in asked), "--out", str(tmp_path / "out")]) == 2
    error = [text for text in capsys.readouterr().err.splitlines() if text.startswith("limner: ")]
    assert len(error) == 1
    assert line in error[0]
