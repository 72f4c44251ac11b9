"""Pictures as conditions: enlarged, painted in, varied; and by models that never learned any of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from limner import build
from limner.cli.program import run
from limner.config import DataConfig, ImageCondition, MaskCondition, RunConfig
from limner.core.noise import initial_noise, slerp
from limner.data.dataset import prepare
from limner.data.masks import LEAST, MOST, made
from limner.data.pixels import View
from limner.errors import LimnerError
from limner.evaluation.fidelity import consistency
from limner.generator import Generator
from limner.nn.spatial import ImageConditioner, MaskConditioner, with_hole
from pictures import encode, metadata_folder, pixels, write
from tiny_conditions import COLOURS, SIZE, colour_error, half, halves_folder, train

IMAGES = 2000


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMNER_CACHE", str(home / "cache"))
        halves_folder(home / "data")
        yield home


@pytest.fixture(scope="module")
def enlarger(home: Path) -> Generator:
    section = {"kind": "image", "size": [2, 2], "noise": 0.2}
    return train(home / "data", home / "enlarger", section, patch=4, images=IMAGES)


@pytest.fixture(scope="module")
def painter(home: Path) -> Generator:
    return train(home / "data", home / "painter", {"kind": "mask"}, patch=4, images=IMAGES)


@pytest.fixture(scope="module")
def plain(home: Path) -> Generator:
    """Knows labels alone."""
    return train(home / "data", home / "plain", {"kind": "label"}, patch=4, images=IMAGES)


THINGS = [half(k, right) for k in (0, 1) for right in (False, True)]


def nearest(picture: np.ndarray) -> int:
    return int(np.argmin([colour_error(picture, thing) for thing in THINGS]))


# --- enlarged -----------------------------------------------------------------------------------------------------


def small(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((2, 2), Image.Resampling.BICUBIC))


def test_an_enlarged_picture_is_the_small_one(enlarger: Generator) -> None:
    drawn = enlarger.sample(image=np.stack([small(p) for p in THINGS]), output="array", seed=0)
    assert [nearest(p) for p in drawn] == [0, 1, 2, 3]


def test_a_consistent_picture_agrees_with_the_small_one(enlarger: Generator) -> None:
    given = np.random.default_rng(0).integers(60, 200, (4, 2, 2, 3), dtype=np.uint8)
    wanted = torch.from_numpy(given).permute(0, 3, 1, 2).float() / 127.5 - 1
    drawn = [enlarger.sample(image=given, consistent=on, output="array", steps=20) for on in (False, True)]
    plain, agreeing = (consistency(pictures, wanted) for pictures in drawn)
    assert agreeing > max(30, plain + 5)


def test_a_picture_of_latents_is_made_consistent_at_the_end() -> None:
    shrinker = {"kind": "autoencoder", "levels": [{"channels": 8}, {"channels": 8}], "middle": "none",
                "latent_channels": 4, "norm_groups": 4}  # fmt: skip
    config = RunConfig.model_validate({
        "data": {"size": 16}, "space": {"kind": "latent", "autoencoder": shrinker},
        "model": {"kind": "unet", "levels": [{"channels": 16}], "middle": "none"},
        "conditions": [{"kind": "image", "size": [4, 4]}],
    })  # fmt: skip
    torch.manual_seed(0)
    gen = Generator(config, build.model(config), device=torch.device("cpu"))
    given = np.random.default_rng(0).integers(60, 200, (3, 4, 4, 3), dtype=np.uint8)
    wanted = torch.from_numpy(given).permute(0, 3, 1, 2).float() / 127.5 - 1
    plain, agreeing = (gen.sample(image=given, consistent=on, output="array", steps=2) for on in (False, True))
    assert consistency(plain, wanted) < 25 < 40 < consistency(agreeing, wanted)


def test_consistency_is_refused_elsewhere(plain: Generator) -> None:
    with pytest.raises(LimnerError, match="consistent: goes with a super-resolution model"):
        plain.sample(consistent=True)


def test_a_folder_of_small_pictures(enlarger: Generator, home: Path, tmp_path: Path) -> None:
    for k, picture in enumerate(THINGS):
        write(tmp_path / "small" / f"{k}.png", encode(picture))
    out = tmp_path / "o.npz"
    assert run(["sample", str(home / "enlarger"), "--image", str(tmp_path / "small"), "--out", str(out)]) == 0
    with np.load(out) as data:
        assert [nearest(p) for p in data["x"]] == [0, 1, 2, 3]
    assert run(["sample", str(home / "enlarger"), "--image", str(tmp_path / "small"), "--size", "16x8",
                "--out", str(tmp_path / "wide.npz")]) == 0  # fmt: skip
    with np.load(tmp_path / "wide.npz") as data:
        assert data["x"].shape == (4, 8, 16, 3)


def test_twins_are_made_on_the_fly(tmp_path: Path) -> None:
    root = metadata_folder(tmp_path, [{}] * 4)
    config = DataConfig(source=str(root))
    clean = prepare(config, [ImageCondition(size=(4, 4))])
    batch = clean.batch(np.arange(4))
    assert batch["small"].shape == (4, 3, 4, 4)
    expected = np.asarray(Image.fromarray(pixels(0)).resize((4, 4), Image.Resampling.BICUBIC))
    found = ((batch["small"][0].permute(1, 2, 0) + 1) * 127.5).round().numpy()
    assert np.array_equal(found, expected)
    rough = prepare(config, [ImageCondition(size=(4, 4), noise=0.5, blur=2.0, jpeg=20)])
    one, two = (rough.batch([0, 0], np.random.default_rng(k))["small"] for k in range(2))
    assert one.shape == (2, 4, 4, 4)
    levels = torch.cat([one, two])[:, 3, 0, 0]
    assert len(set(levels.tolist())) == 4
    assert 0 <= float(levels.min()) <= float(levels.max()) <= 0.5
    again = rough.batch([0, 0], np.random.default_rng(1))["small"]
    assert torch.equal(again, two)
    assert rough.digest != clean.digest


def test_the_level_of_the_noise_is_told() -> None:
    conditioner = ImageConditioner(3, (8, 8), (4, 4), levels=True)
    spatial = conditioner(torch.ones(1, 3, 4, 4), 1).spatial
    assert spatial.shape == (1, 4, 8, 8)
    assert not spatial[:, 3].any()
    told = conditioner(torch.cat([torch.ones(1, 3, 4, 4), torch.full((1, 1, 4, 4), 0.3)], 1), 1).spatial
    assert torch.allclose(told[:, 3], torch.tensor(0.3))


# --- painted in ---------------------------------------------------------------------------------------------------


def right_side(value: int = 255) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:, SIZE // 2 :] = value
    return mask


@pytest.mark.parametrize("which", ["painter", "plain"])
def test_known_pixels_stay_to_the_bit(which: str, home: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """By the model that learned to, and by one that never did, through the command line into a PNG."""
    request.getfixturevalue(which)
    picture = write(tmp_path / "p.png", encode(pixels(3)))
    mask = write(tmp_path / "m.png", encode(right_side()))
    told = ["--image", str(picture), "--mask", str(mask), "--num", "2", "--steps", "3", "--out", str(tmp_path / "o/")]
    assert run(["sample", str(home / which), *told]) == 0
    drawn = [np.asarray(Image.open(tmp_path / "o" / f"00000{k}.png")) for k in range(2)]
    for found in drawn:
        assert np.array_equal(found[:, : SIZE // 2], pixels(3)[:, : SIZE // 2])
        assert not np.array_equal(found[:, SIZE // 2 :], pixels(3)[:, SIZE // 2 :])
    assert not np.array_equal(drawn[0], drawn[1])


def test_what_is_painted_fits_what_is_known(painter: Generator) -> None:
    """A coloured thing on the left: on the right is grey; grey on the left: on the right is a coloured thing."""
    mask = right_side()[None, ..., None]
    for row, picture in enumerate(THINGS):
        drawn = painter.sample(image=picture[None], mask=mask, num=4, output="array", seed=1)[:, :, SIZE // 2 :]
        levels = drawn.astype(float).mean((1, 2))
        assert (float((levels.max(1) - levels.min(1)).mean()) < 60) == (row in (0, 2))


@pytest.mark.parametrize(
    ("image", "mask", "words"),
    [
        ((8, 8), np.zeros((8, 8), np.uint8), "mask: masks nothing; white is what is to be painted"),
        ((8, 8), np.full((8, 8), 255, np.uint8), "mask: masks everything"),
        ((8, 8), np.eye(9, dtype=np.uint8) * 255, "mask: is 9x9, the canvas is 8x8"),
        ((16, 16), right_side(), "image: is 16x16, the canvas is 8x8"),
    ],
)
def test_masks_that_do_not_do_are_refused(
    painter: Generator, image: tuple[int, int], mask: np.ndarray, words: str
) -> None:
    with pytest.raises(LimnerError, match=words):
        painter.sample(image=pixels(0, image)[None], mask=Image.fromarray(mask))


def test_a_mask_wants_its_picture(painter: Generator) -> None:
    with pytest.raises(LimnerError, match="mask: goes with the image"):
        painter.sample(mask=right_side()[None, ..., None])
    with pytest.raises(LimnerError, match="give a mask as well"):
        painter.sample(image=pixels(0)[None])


@pytest.mark.parametrize("shape", ["brush", "box", "outside"])
def test_made_masks_are_neither_nothing_nor_all(shape: str) -> None:
    masks = [made((12, 16), [shape], np.random.default_rng(seed)) for seed in range(200)]
    assert all(mask.shape == (12, 16) and LEAST <= mask.mean() <= MOST for mask in masks)
    assert len({mask.tobytes() for mask in masks}) > 150


def test_masks_of_training_and_of_a_column(tmp_path: Path) -> None:
    root = metadata_folder(tmp_path / "d", [{}] * 3)
    data = prepare(DataConfig(source=str(root)), [MaskCondition()])
    held_out = [data.batch([1])["mask"] for _ in range(2)]
    assert torch.equal(*held_out)
    assert not torch.equal(*(data.batch([1], np.random.default_rng(k))["mask"] for k in range(2)))
    for k in range(3):
        mask = np.zeros((8, 8), np.uint8)
        mask[k] = 255
        write(root / f"{k}.mask.png", encode(mask))
    batch = prepare(DataConfig(source=str(root)), [MaskCondition()]).batch(np.arange(3))
    assert [batch["mask"][k, 3].nonzero()[:, 0].unique().tolist() for k in range(3)] == [[0], [1], [2]]
    assert not batch["mask"][0, :3, 0].any()
    write(root / "1.mask.png", encode(np.zeros((8, 8), np.uint8)))
    with pytest.raises(LimnerError, match=r"1\.mask\.png: mask: masks nothing"):
        prepare(DataConfig(source=str(root)), [MaskCondition()])


def test_an_absent_picture_is_all_hole() -> None:
    conditioner = MaskConditioner(3, (8, 8))
    whole = with_hole(torch.randn(1, 3, 8, 8), torch.ones(1, 1, 8, 8))
    assert torch.equal(conditioner(whole, 1).spatial, conditioner(None, 1).spatial)


# --- varied, and without any training -----------------------------------------------------------------------------


def test_a_variation_shows_what_the_picture_shows(home: Path) -> None:
    section = {"kind": "variation", "side": 32, "grid": 2, "width": 16}
    gen = train(home / "data", home / "varier", section, cross=1, patch=4, images=IMAGES)
    shown = np.stack([THINGS[0], THINGS[2]])
    red, blue = gen.sample(image=shown, num=2, output="array", seed=5).astype(float).mean((1, 2))
    assert red[0] - red[2] > blue[0] - blue[2] + 30


def test_strength_says_how_much_of_a_picture_stays(plain: Generator) -> None:
    start = THINGS[1][None]
    near, far = (
        plain.sample(image=start, strength=t, label="warm", num=8, steps=30, output="array", seed=0)
        for t in (0.3, 0.95)
    )
    assert colour_error(near, start) + 20 < colour_error(far, start)
    with pytest.raises(LimnerError, match=r"strength: 1\.5, should be above 0"):
        plain.sample(image=start, strength=1.5)


def test_the_way_between_two_seeds_and_two_labels(plain: Generator, home: Path, tmp_path: Path) -> None:
    way = plain.interpolate(num=5, seed=(0, 1), label=("warm", "cold"), output="array")
    ends = [plain.sample(label=name, num=1, seed=s, output="array")[0] for name, s in (("warm", 0), ("cold", 1))]
    assert colour_error(way[0], ends[0]) < 2
    assert colour_error(way[-1], ends[1]) < 2
    steps = [colour_error(a, b.astype(float)) for a, b in itertools.pairwise(way)]
    assert max(steps) < sum(steps)
    out = tmp_path / "way.npz"
    told = ["--label", "warm", "--to-label", "cold", "--to-seed", "1", "--num", "5", "--out", str(out)]
    assert run(["sample", str(home / "plain"), *told]) == 0
    with np.load(out) as data:
        assert np.abs(data["x"].astype(int) - way).max() <= 1


def test_slerp_keeps_the_length_of_noise() -> None:
    a, b = (initial_noise(seed, [0], (3, 16, 16)) for seed in (0, 1))
    way = slerp(a, b, torch.linspace(0, 1, 5))
    torch.testing.assert_close(way[0], a[0])
    torch.testing.assert_close(way[-1], b[0])
    assert float((way.std((1, 2, 3)) - 1).abs().max()) < 0.05


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": (9, 8)}, "size"),
        ({"size": (16, 8), "label": "hot"}, "no such class"),
        ({"image": torch.zeros(2, 3, 8)}, r"should be \(N, C, h, w\)"),
        ({"conditions": {"mask": torch.zeros(1, 4, 8, 8)}}, "mask: this model was not trained with it"),
    ],
)
def test_what_a_plain_model_cannot_do(plain: Generator, options: dict[str, Any], words: str) -> None:
    with pytest.raises(LimnerError, match=words):
        plain.sample(**options)


def test_a_view_draws_the_same_for_a_row_in_any_batch() -> None:
    chance = np.random.default_rng(0).random(6)
    rows = np.arange(6)
    whole = [g.random() for g in View(chance=chance).generators(rows)]
    parts = [g.random() for k in (0, 3) for g in View(chance=chance[k : k + 3]).generators(rows[k : k + 3])]
    assert whole == parts
    assert COLOURS.shape == (3, 3)
