"""Models by name: what ships is whole, and a name stands wherever a run does."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripts.ship import ship

import limner
from limner import build, zoo
from limner.cli.program import run
from limner.errors import LimnerError
from limner.generator import Generator
from limner.studio.shelf import Shelf
from tiny_cli import Workshop

REPORT = {"figures": {"FD-tiny": {"name": "FD-tiny", "value": 12.5, "low": 11.0, "high": 14.0, "n": 8}}}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return Workshop(tmp_path_factory.mktemp("workshop"), monkeypatch)


@pytest.fixture(scope="module")
def shipped(workshop: Workshop) -> Path:
    """A zoo with one model, `tiny`."""
    home = workshop.folder / "zoo"
    ship(workshop.run, "tiny", summary="One of three colours", licence="cc0-1.0", source="public/colours",
         report=REPORT, figures=["FD"], notes="Seen by nobody.", home=home)  # fmt: skip
    return home


@pytest.fixture
def in_zoo(shipped: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(zoo, "HOME", shipped)
    monkeypatch.chdir(tmp_path)
    zoo._say_which.cache_clear()
    return tmp_path


def test_what_ships_is_the_average_in_half_the_bytes(workshop: Workshop, shipped: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (workshop.run, shipped / "tiny"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert after[name].dtype == (torch.bfloat16 if weight.dim() >= 2 else weight.dtype), name
        torch.testing.assert_close(after[name].float(), weight.float(), rtol=2**-8, atol=0)
    pictures = [
        limner.load(folder).sample(num=3, output="tensor", seed=1) for folder in (workshop.run, shipped / "tiny")
    ]
    torch.testing.assert_close(*pictures, rtol=0, atol=0.05)


def test_what_ships_tells_nothing_of_the_machine(workshop: Workshop, shipped: Path) -> None:
    text = "".join(file.read_text() for file in (shipped / "tiny").iterdir() if file.suffix != ".safetensors")
    assert str(workshop.folder) in (workshop.run / "config.yaml").read_text()
    assert str(workshop.folder) not in text
    assert "source: public/colours" in text


def test_the_card_says_what_was_measured(shipped: Path) -> None:
    model = zoo.read(shipped / "tiny")
    assert (model.name, model.task, model.conditions, model.size) == ("tiny", "diffusion", ("label",), (8, 8))
    assert model.figures == ({"name": "FD-tiny", "value": 12.5, "low": 11.0, "high": 14.0, "n": 8},)
    card = (shipped / "tiny" / "README.md").read_text()
    assert "| FD-tiny | 12.5 | 11 to 14 | 8 |" in card
    assert "Seen by nobody." in card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "tiny"}, "holds something already"),
        ({"figures": ["KID"]}, "the report has 0 of that name"),
        ({"checkpoint": "images-9"}, "holds no ema.safetensors"),
    ],
)
def test_what_cannot_ship_is_refused(workshop: Workshop, shipped: Path, change: dict, message: str) -> None:
    asked = {"name": "other", "summary": "", "licence": "", "source": None, "report": REPORT, "home": shipped} | change
    with pytest.raises(LimnerError, match=message):
        ship(workshop.run, **asked)
    assert not (shipped / "other").exists()


def test_models_are_listed(in_zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models"]) == 0
    said = capsys.readouterr().out
    assert "tiny: One of three colours" in said
    assert "FD-tiny 12.5 (11 to 14), n = 8" in said
    assert run(["models", "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["models"]
    assert facts["licence"] == "cc0-1.0"
    assert facts["size"] == [8, 8]


def test_a_name_stands_where_a_run_does(in_zoo: Path, workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sample", "tiny", "--label", "dog", "--num", "2", "--out", "dogs"]) == 0
    assert run(["sample", "--from", "dogs/000001.png", "--out", "again.png"]) == 0
    assert run(["convert", "tiny", "exported", "--to", "diffusers"]) == 0
    assert run(["train", str(workshop.data), "--init", "tiny", "--out", "more", "--images", "8"]) == 0
    guide = ["--task", "classifier", "--for", "tiny", "--out", "guide", "--images", "8"]
    assert run(["train", str(workshop.data), *guide, "--set", "model.levels=[{channels: 8}]"]) == 0
    assert run(["plan", "tiny", "--devices", "CPU2"]) == 0
    assert isinstance(limner.load("tiny"), Generator)
    assert list(Shelf.open(["tiny"]).generators) == ["tiny"]
    capsys.readouterr()


def test_what_is_here_goes_before_and_is_said(
    in_zoo: Path, workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    assert zoo.located("tiny") == zoo.HOME / "tiny"
    Path("tiny").symlink_to(workshop.run)
    with caplog.at_level(logging.WARNING):
        assert [zoo.located("tiny"), zoo.located("tiny")] == [Path("tiny")] * 2
    assert caplog.messages == ["tiny: the model here is taken, not the one of that name that comes with Limner"]
    assert zoo.located("runs/tiny") == Path("runs/tiny")


def test_a_folder_of_pictures_here_is_no_model(
    in_zoo: Path, workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    Path("tiny").symlink_to(workshop.data)
    with caplog.at_level(logging.WARNING):
        assert zoo.located("tiny") == zoo.HOME / "tiny"
    assert caplog.messages == ["tiny: the model that comes with Limner is taken; the folder here, ./tiny, holds none"]
    assert isinstance(limner.load("tiny"), Generator)
    with pytest.raises(LimnerError, match="neither a run"):
        limner.load("./tiny")


def test_a_name_that_is_nearly_right_is_answered(in_zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sample", "tinny", "--out", "x.png"]) == 2
    assert "tinny: there is no such file or directory, nor a model of that name; did you mean 'tiny'?" in (
        capsys.readouterr().err
    )


# --- the models themselves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.names())
def test_each_model_is_whole(name: str) -> None:
    model = zoo.read(zoo.HOME / name)
    assert model.draws
    assert model.licence not in ("", "unknown")
    assert model.figures
    assert model.megabytes < 16
    assert (zoo.HOME / name / "metrics.jsonl").is_file()
    recipe = limner.load(name).config
    assert not Path(recipe.data.source or "").is_absolute()


@pytest.mark.parametrize("name", zoo.names())
def test_each_model_does_what_it_says(name: str) -> None:
    loaded = limner.load(name)
    height, width = loaded.config.data.size or (0, 0)
    channels = loaded.config.data.channels
    if isinstance(loaded, Generator):
        given = {"text": {"text": "red heart"}, "image": {"image": torch.zeros(1, channels, 16, 16)}}
        asked = {k: v for modality in loaded.modalities for k, v in given.get(modality, {}).items()}
        pictures = loaded.sample(num=1, steps=2, output="array", **asked)
        assert pictures.shape == (1, height, width, channels)
        assert pictures.std() > 0
    else:
        x = torch.randn(8, *build.space_shape(loaded.config), generator=torch.Generator().manual_seed(0))
        one, other = (loaded.log_prob_at(x, torch.tensor(0.3), torch.full((8,), label)) for label in (0, 1))
        assert (one - other).abs().max() > 0
