"""From a picture back to its drawing: the facts of a PNG, and `limner sample --from`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny_studio
from limner import redraw
from limner.cli.program import run as limner
from limner.errors import LimnerError
from limner.outputs import png
from limner.redraw import Repeat
from limner.studio.engine import Engine
from limner.studio.http import png_of
from limner.studio.shelf import Shelf


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of labels and what it drew, as a grid and as single pictures."""
    home = tmp_path_factory.mktemp("redraw")
    run = tiny_studio.write_run(home / "run", tiny_studio.recipe())
    asked = [
        "sample",
        str(run),
        "--label",
        "dog,fish",
        "--num",
        "4",
        "--seed",
        "3",
        "--sampler",
        "ddpm",
        "--guidance",
        "3",
    ]
    assert limner([*asked, "--out", str(home / "grid.png")]) == 0
    assert limner([*asked, "--out", str(home / "single")]) == 0
    return home


@pytest.mark.parametrize("source", ["grid.png", "single/000002.png"])
def test_from_a_picture_the_same_is_drawn(home: Path, source: str, tmp_path: Path) -> None:
    out = tmp_path / "again.png" if source == "grid.png" else tmp_path / "again"
    assert limner(["sample", "--from", str(home / source), "--out", str(out)]) == 0
    found = out if source == "grid.png" else out / "000002.png"
    np.testing.assert_array_equal(np.asarray(Image.open(found)), np.asarray(Image.open(home / source)))
    assert Repeat.read(found) == Repeat.read(home / source)


@pytest.mark.parametrize("further", [["--strength", "0.6"], ["--mask", "hole.png"]])
def test_a_picture_made_of_others_is_drawn_again_without_them(home: Path, tmp_path: Path, further: list[str],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    side = Image.open(home / "single" / "000000.png").size[0]
    for number in range(2):
        (tmp_path / "given").mkdir(exist_ok=True)
        Image.new("RGB", (side, side), (200 * number, 90, 30)).save(tmp_path / "given" / f"{number}.png")
    Image.fromarray(np.tri(side, dtype=np.uint8) * 255).save(tmp_path / "hole.png")
    asked = ["sample", str(home / "run"), "--image", "given", *further, "--label", "dog", "--num", "3", "--out"]
    assert limner([*asked, "first"]) == 0
    for name in ("given", "hole.png"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    assert limner(["sample", "--from", "first/000001.png", "--out", "again"]) == 0
    first, again = (np.asarray(Image.open(f"{folder}/000001.png")) for folder in ("first", "again"))
    np.testing.assert_array_equal(again, first)
    assert "iVBOR" not in Path("first/metadata.jsonl").read_text()  # the pictures themselves are in the PNG alone


def test_a_picture_made_of_a_large_one_says_that_it_lacks_it(home: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(redraw, "MOST_TEXT", 40)
    given = home / "single" / "000000.png"
    out = tmp_path / "out.png"
    asked = ["sample", str(home / "run"), "--image", str(given), "--strength", "0.5", "--label", "dog", "--num", "1"]
    assert limner([*asked, "--out", str(out)]) == 0
    with pytest.raises(LimnerError, match=r"was drawn from 000000\.png, which is too large"):
        Repeat.read(out)


def test_what_a_picture_tells(home: Path) -> None:
    told = Repeat.read(home / "grid.png")
    assert (told.seed, told.first, told.num) == (3, 0, 4)
    assert told.conditions == {"label": [1, 2, 1, 2]}
    assert (told.settings["sampler"], told.settings["guidance"]) == ("ddpm", 3.0)


def test_what_does_not_go_is_said(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = {"kind": "unet", "levels": [{"channels": 16}], "middle": "none", "norm_groups": 4, "head_dim": 8}
    other = tiny_studio.recipe(model=network)
    stranger = tiny_studio.write_run(tmp_path / "stranger", other)
    source, out = str(home / "single/000000.png"), str(tmp_path / "x.png")
    for arguments, said in (
        ([str(stranger), "--from", source], "its weights are"),
        (["--from", source, "--steps", "3"], "--steps: doesn't go with --from"),
        (["--from", str(tmp_path / "no.png")], "there is no such file"),
        ([], "no RUN: name a run to draw with"),
    ):
        assert limner(["sample", *arguments, "--out", out]) == 2
        assert said in capsys.readouterr().err


def test_pictures_without_a_whole_recipe_are_refused(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    for facts, said in ((None, "carries no recipe"), ({"seed": 1}, "is damaged"), ({"pictures": 3}, "is damaged")):
        file = tmp_path / "x.png"
        file.write_bytes(png(pixels, facts))
        with pytest.raises(LimnerError, match=said):
            Repeat.read(file)
    file.write_bytes(b"no picture")
    with pytest.raises(LimnerError, match="is no picture"):
        Repeat.read(file)


def test_size_and_strength_are_kept_from_repeat_to_repeat(home: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 16, 3), 90, np.uint8)).save(tmp_path / "start.png")
    engine = Engine(Shelf.open([home / "run"]))
    try:
        picture = {"image": [Image.open(tmp_path / "start.png")], "label": ["dog"]}
        wanted = engine.request(seed=5, conditions=picture, strength=0.5, size=(8, 16))
        (drawn,) = engine.submit(wanted).pictures()
        (tmp_path / "000000.png").write_bytes(png_of(drawn, engine.facts(wanted)))
    finally:
        engine.close()
    source = tmp_path / "000000.png"
    for out in (tmp_path / "again", tmp_path / "once more"):
        assert limner(["sample", "--from", str(source), "--out", str(out)]) == 0
        source = out / "000000.png"
        np.testing.assert_array_equal(np.asarray(Image.open(source)), drawn.pixels)
        told = Repeat.read(source)
        assert (told.strength, told.size) == (0.5, (8, 16))
