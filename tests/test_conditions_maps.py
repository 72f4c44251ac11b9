"""A semantic map from the folder to the picture, by the commands alone, and what is refused on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from limner.cli.program import run
from limner.config import DataConfig, SemanticMapCondition
from limner.data.dataset import prepare
from limner.errors import LimnerError
from limner.generator import Generator
from limner.nn.layers import SpatialNorm
from limner.nn.spatial import SemanticMapConditioner
from pictures import encode, parquet, pixels, write
from tiny_conditions import COLOURS, NAMES, SIZE, a_map, colour_error, halves_folder, map_folder, painted, train

MAP = {"kind": "semantic_map", "width": 4, "dropout": 0.1}


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Generator, Path]]:
    home = tmp_path_factory.mktemp("maps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMNER_CACHE", str(home / "cache"))
        yield train(map_folder(home / "data"), home / "run", MAP), home


def test_another_map_gives_another_picture(learnt: tuple[Generator, Path]) -> None:
    gen, _ = learnt
    maps = np.stack([a_map(seed) for seed in range(1000, 1006)])
    drawn = gen.sample(semantic_map=maps, output="array", seed=1)
    right, wrong = (colour_error(drawn, painted(m)) for m in (maps, 1 - maps))
    assert right < 40
    assert wrong > 2 * right


def test_a_map_that_modulates_the_way_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SPADE: nothing at first, then another way for the map into the picture."""
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path / "cache"))
    gen = train(map_folder(tmp_path / "data"), tmp_path / "run", MAP, network={"spatial_norm": True}, images=1600)
    maps = np.stack([a_map(seed) for seed in range(1000, 1006)])
    drawn = gen.sample(semantic_map=maps, output="array", seed=1)
    assert colour_error(drawn, painted(maps)) < 40
    blocks: Any = gen.model.network.up_spatial
    for block in blocks:
        torch.nn.init.zeros_(block.out.weight)
        torch.nn.init.zeros_(block.out.bias)
    assert np.abs(gen.sample(semantic_map=maps, output="array", seed=1).astype(int) - drawn).max() > 4
    fresh = SpatialNorm(16, 4)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(fresh(x, torch.randn(2, 4, 8, 8)), x)


def test_modulating_the_way_up_needs_a_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = halves_folder(tmp_path / "data", rows=8)
    said = run(["train", str(data), "--out", str(tmp_path / "run"), "--budget", "1m",
                "--set", "model.spatial_norm=true"])  # fmt: skip
    assert said == 2
    assert "needs a condition that lies on the picture" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_maps_by_the_command_line(learnt: tuple[Generator, Path], tmp_path: Path) -> None:
    _, home = learnt
    for name in ("a", "b"):
        write(tmp_path / "maps" / f"{name}.png", encode(np.full((16, 16), "ab".index(name), np.uint8)))
    out = tmp_path / "out"
    assert run(["sample", str(home / "run"), "--condition", str(tmp_path / "maps"), "--out", f"{out}/"]) == 0
    drawn = [np.asarray(Image.open(out / f"00000{k}.png")) for k in range(2)]
    for k in range(2):
        assert colour_error(drawn[k], np.broadcast_to(COLOURS[k], drawn[k].shape)) < 50
    assert run(["sample", str(home / "run"), "--condition", str(tmp_path / "maps" / "a.png"), "--size", "24x16",
                "--out", str(tmp_path / "large.npz")]) == 0  # fmt: skip
    with np.load(tmp_path / "large.npz") as data:
        assert data["x"].shape == (1, 16, 24, 3)
        assert colour_error(data["x"], np.broadcast_to(COLOURS[0], data["x"].shape)) < 60


def test_the_recipe_knows_the_classes(learnt: tuple[Generator, Path]) -> None:
    (section,) = learnt[0].config.conditions
    assert isinstance(section, SemanticMapCondition)
    assert (section.classes, section.void) == (NAMES, 2)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (np.full((8, 8), 57, np.uint8), r"bad\.png: semantic map: class 57 at row 0, column 0, should be 0 to 2"),
        (np.zeros((8, 8, 3), np.uint8), r"bad\.png: semantic map: is RGB, should be a single-channel PNG"),
    ],
)
def test_a_wrong_map_is_named_when_sampling(learnt: tuple[Generator, Path], tmp_path: Path, numbers: np.ndarray,
                                            words: str, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    import re

    bad = write(tmp_path / "bad.png", encode(numbers))
    assert run(["sample", str(learnt[1] / "run"), "--condition", str(bad), "--out", str(tmp_path / "o.png")]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": "a cat"}, "text: this model was not trained with it; it has semantic_map"),
        ({"boxes": [["red", 0, 0, 1, 1]]}, "boxes: this model was not trained with it"),
        ({"semantic_map": torch.full((1, 8, 8), 3)}, "class 3 at row 0, column 0, should be 0 to 2"),
        ({"semantic_map": torch.zeros(1, 5, 8, 8)}, r"should be class numbers \(N, h, w\), or \(N, 3, h, w\)"),
        ({"image": torch.zeros(1, 3, 8, 8)}, "give strength, to draw from it, or mask"),
        ({"strength": 0.5}, "strength: goes with the image"),
        ({"guidance": {"text": 2.0}}, "guidance of text: this model was not trained with it"),
    ],
)
def test_what_the_model_does_not_know_is_refused(learnt: tuple[Generator, Path], options: dict, words: str) -> None:
    with pytest.raises(LimnerError, match=words):
        learnt[0].sample(**options)


# --- the data -----------------------------------------------------------------------------------------------------


def wanted(source: Path, **data: object) -> DataConfig:
    return DataConfig.model_validate({"source": str(source), **data})


def test_maps_are_cut_and_mirrored_with_their_pictures(tmp_path: Path) -> None:
    """The picture is painted from its map, so each batch can be checked against itself."""
    root = map_folder(tmp_path / "data", rows=12)
    tall = np.concatenate([a_map(5), a_map(6)])
    Image.fromarray(painted(tall)).save(root / "images" / "tall.png")
    Image.fromarray(tall).save(root / "semantic_maps" / "tall.png")
    data = prepare(wanted(root, size=[8, 8], crop="random", flip=True), {"semantic_map"})
    assert len(data) == 13
    seen = set()
    for seed in range(8):
        batch = data.batch(np.arange(13), np.random.default_rng(seed))
        made = COLOURS[batch["semantic_map"].numpy()]
        shown = ((batch["image"].permute(0, 2, 3, 1).numpy() + 1) * 127.5).round()
        assert np.abs(made - shown).max() <= 1
        seen.add(batch["semantic_map"][-1].numpy().tobytes())
    assert len(seen) > 2


def test_maps_are_resized_by_nearest_neighbour(tmp_path: Path) -> None:
    numbers = np.kron(np.array([[0, 7], [3, 5]], np.uint8), np.ones((8, 8), np.uint8))
    source = parquet(
        tmp_path / "d.parquet", {"image": [encode(pixels(0, (16, 16)))], "semantic_map": [encode(numbers)]}
    )
    small = prepare(wanted(source, size=[6, 6]), {"semantic_map"}).batch([0])["semantic_map"][0]
    assert set(small.unique().tolist()) == {0, 3, 5, 7}


@pytest.mark.parametrize(
    "files",
    [
        {"images/a.jpg": "JPEG", "semantic_maps/a.png": "map"},
        {"train/images/a.png": "PNG", "train/annotations/a.png": "map"},
        {"a.jpg": "JPEG", "a.png": "map"},
        {"a.png": "PNG", "a.map.png": "map"},
    ],
)
def test_a_map_is_found_beside_its_picture(tmp_path: Path, files: dict[str, str]) -> None:
    for name, kind in files.items():
        write(tmp_path / name, encode(np.full((8, 8), 2, np.uint8)) if kind == "map" else encode(pixels(0), kind))
    data = prepare(wanted(tmp_path), {"semantic_map"})
    assert len(data) == 1
    assert data.batch([0])["semantic_map"].unique().tolist() == [2]


def test_two_pictures_of_one_stem_are_two_pictures(tmp_path: Path) -> None:
    write(tmp_path / "a.png", encode(pixels(0)))
    write(tmp_path / "a.jpg", encode(pixels(1), "JPEG"))
    assert len(prepare(wanted(tmp_path))) == 2


def data_error(tmp_path: Path, numbers: np.ndarray | None, form: str = "PNG") -> str:
    root = map_folder(tmp_path / "data", rows=3)
    bad = root / "semantic_maps" / "1.png"
    bad.unlink()
    if numbers is not None:
        write(bad, encode(numbers, form))
    with pytest.raises(LimnerError) as caught:
        prepare(wanted(root), {"semantic_map"})
    return str(caught.value)


def test_a_class_beyond_the_names_is_told_with_file_and_pixel(tmp_path: Path) -> None:
    numbers = np.zeros((8, 8), np.uint8)
    numbers[2, 5] = 57
    numbers[0, 0] = 255
    assert data_error(tmp_path, numbers).endswith(
        "semantic_maps/1.png: semantic map: class 57 at row 2, column 5, should be 0 to 2, or 255 for none"
    )


def test_a_map_of_another_size_is_told(tmp_path: Path) -> None:
    found = data_error(tmp_path, np.zeros((9, 8), np.uint8))
    assert "semantic_maps/1.png: semantic map: is 8x9, its picture 8x8" in found


def test_a_missing_map_and_a_lossy_one_are_told(tmp_path: Path) -> None:
    assert "images/1.png: has no semantic map beside it" in data_error(tmp_path / "a", None)
    assert "is a JPEG, which smears class numbers" in data_error(tmp_path / "b", np.zeros((8, 8), np.uint8), "JPEG")


def test_no_column_of_maps(tmp_path: Path) -> None:
    write(tmp_path / "a.png", encode(pixels(0)))
    with pytest.raises(LimnerError, match=r"no semantic_map column among image; name it with data\.map_column"):
        prepare(wanted(tmp_path), {"semantic_map"})


# --- the conditioner ----------------------------------------------------------------------------------------------


def test_void_says_nothing_and_an_absent_map_is_all_void() -> None:
    torch.manual_seed(0)
    conditioner = SemanticMapConditioner(3, 4, (SIZE, SIZE), void=2)
    absent = conditioner(None, 2).spatial
    for numbers in (torch.full((2, 8, 8), 2), torch.full((2, 8, 8), 255)):
        torch.testing.assert_close(conditioner(numbers, 2).spatial, absent)
    given = conditioner(torch.zeros(2, 8, 8).long(), 2, torch.tensor([True, False])).spatial
    torch.testing.assert_close(given[0], absent[0])
    assert (given[1] - absent[1]).abs().max() > 0.1


def test_soft_maps_and_the_stride_of_latents() -> None:
    conditioner = SemanticMapConditioner(3, 4, (4, 4), factor=2)
    numbers = torch.randint(3, (2, 8, 8))
    hot = torch.nn.functional.one_hot(numbers, 3).permute(0, 3, 1, 2).float()
    found = conditioner(numbers, 2).spatial
    assert found.shape == (2, 4, 4, 4)
    torch.testing.assert_close(conditioner(hot, 2).spatial, found)
    larger = conditioner(numbers.repeat_interleave(2, 1).repeat_interleave(2, 2), 2).spatial
    torch.testing.assert_close(larger, found)
    assert conditioner(numbers, 2, None, (6, 4)).spatial.shape == (2, 4, 6, 4)
