"""Boxes and a label: moving a box moves the thing, each scale moves what it should."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from limner import build
from limner import config as c
from limner.cli.program import run
from limner.config import BoxesCondition, DataConfig
from limner.data.boxes import Boxes, regions, seen_boxes
from limner.data.dataset import prepare
from limner.errors import LimnerError
from limner.generator import Generator
from limner.nn.layout import BoxesConditioner
from limner.training.initial import Initial, take
from pictures import metadata_folder
from tiny_conditions import COLOURS, SIZE, colour_error, half, halves_folder, map_folder, train

BOXES = {"kind": "boxes", "width": 16, "depth": 1, "most": 3, "dropout": 0.2}
LABEL = {"kind": "label", "dropout": 0.2}
LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 0.5, 1)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Generator, Path]]:
    home = tmp_path_factory.mktemp("boxes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMNER_CACHE", str(home / "cache"))
        data = halves_folder(home / "data")
        yield train(data, home / "run", BOXES, LABEL, cross=1, patch=4, images=5600), home


def asked(gen: Generator, *boxes: Any, label: str = "warm", **options: Any) -> np.ndarray:
    return gen.sample(boxes=[[box] for box in boxes], label=label, output="array", seed=2, **options)


def test_moving_a_box_moves_the_thing_and_its_class_colours_it(learnt: tuple[Generator, Path]) -> None:
    gen, _ = learnt
    layouts = [("red", *LEFT), ("red", *RIGHT), ("blue", *LEFT), (1, *RIGHT)]
    drawn = asked(gen, *layouts)
    wanted = [half(k, right) for k in (0, 1) for right in (False, True)]
    for row in range(4):
        errors = [colour_error(drawn[row], picture) for picture in wanted]
        assert int(np.argmin(errors)) == row


def test_each_scale_moves_what_it_should(learnt: tuple[Generator, Path]) -> None:
    """Background tells the label, the thing's side the box: each is turned by its own scale."""
    gen, _ = learnt
    box, options = ("red", *LEFT), {"num": 4, "steps": 6}

    def far(**scales: float) -> tuple[float, float]:
        drawn = asked(gen, box, label="cold", guidance=scales, **options).astype(float)
        return float(drawn[:, :, SIZE // 2 :].mean()), colour_error(
            drawn[:, :, : SIZE // 2].astype(np.uint8), COLOURS[0]
        )

    ground = {scale: far(label=scale, boxes=1.0)[0] for scale in (0.0, 1.0)}
    assert abs(ground[1.0] - 110) < abs(ground[0.0] - 110) - 10
    thing = {scale: far(label=1.0, boxes=scale)[1] for scale in (0.0, 1.0)}
    assert thing[1.0] < thing[0.0] - 10


@pytest.mark.parametrize("composition", ["chain", "sum"])
def test_scales_of_one_are_no_guidance_in_a_chain(learnt: tuple[Generator, Path], composition: str) -> None:
    gen, _ = learnt
    plain = asked(gen, ("red", *LEFT), guidance=1.0, num=2).astype(int)
    found = asked(gen, ("red", *LEFT), guidance={"label": 1.0, "boxes": 1.0}, composition=composition, num=2).astype(
        int
    )
    assert (np.abs(found - plain).max() <= 2) == (composition == "chain")


def test_boxes_by_the_command_line(learnt: tuple[Generator, Path], tmp_path: Path) -> None:
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps([["blue", *RIGHT]]))
    out = tmp_path / "o.npz"
    told = ["--label", "warm", "--num", "2", "--guidance", "boxes=1.5,label=1"]
    assert run(["sample", str(learnt[1] / "run"), "--boxes", str(file), "--out", str(out), *told]) == 0
    with np.load(out) as data:
        assert colour_error(data["x"], half(1, True)) < colour_error(data["x"], half(1, False))


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ([["green", *LEFT]], "boxes: layout 0, box 0: there is no class 'green'; known: red, blue"),
        ([["red", *LEFT], [2, *LEFT]], "box 1: class 2, there are 2"),
        ([["red", 1.5, 0, 0.5, 0.5]], "lies outside of the canvas"),
        ([["red", 0, 0, 0.5]], r"should be \(class, x, y, w, h\)"),
        ([["red", 0, 0, 0, 1]], "a width and a height above 0"),
    ],
)
def test_wrong_boxes_are_refused(learnt: tuple[Generator, Path], layout: list[Any], words: str) -> None:
    with pytest.raises(LimnerError, match=words):
        learnt[0].sample(boxes=[layout] if len(layout) == 2 else layout)


def test_boxes_that_leave_the_canvas_are_clipped_and_told(
    learnt: tuple[Generator, Path], caplog: pytest.LogCaptureFixture
) -> None:
    over, inside = (asked(learnt[0], ("red", x, 0, w, 1), num=1) for x, w in ((-0.5, 1.0), (0, 0.5)))
    assert np.array_equal(over, inside)
    assert "layout 0 has boxes that leave the canvas; they are clipped" in caplog.text


def test_guidance_that_is_no_guidance_is_refused(learnt: tuple[Generator, Path]) -> None:
    with pytest.raises(LimnerError, match="composition 'all': there is none such"):
        asked(learnt[0], ("red", *LEFT), composition="all")
    with pytest.raises(LimnerError, match="guidance of boxes: -1"):
        asked(learnt[0], ("red", *LEFT), guidance={"boxes": -1.0})


# --- the data -----------------------------------------------------------------------------------------------------


def test_boxes_are_cut_and_mirrored_with_the_picture() -> None:
    boxes = np.array([[3, 2, 4, 4, 8], [1, 0, 0, 1, 1]], np.float32)
    seen = seen_boxes(boxes, np.array([0, 0]), (16, 8), mirror=False)
    np.testing.assert_allclose(seen, [[3, 0.25, 0.25, 0.5, 0.5], [1, 0, 0, 0.125, 0.0625]])
    np.testing.assert_allclose(seen_boxes(boxes, np.array([0, 0]), (16, 8), mirror=True)[0], [3, 0.25, 0.25, 0.5, 0.5])
    np.testing.assert_allclose(seen_boxes(boxes, np.array([0, 0]), (16, 8), mirror=True)[1, 1], 0.875)
    cropped = seen_boxes(boxes, np.array([6, 4]), (8, 4), mirror=False)
    np.testing.assert_allclose(cropped, [[3, 0, 0, 0.5, 0.75]])


def test_pixels_and_shares_of_a_data_set_mean_the_same(tmp_path: Path) -> None:
    layout = {"bbox": [[2, 0, 4, 4]], "categories": ["cup"]}
    shares = {"bbox": [[0.25, 0, 0.5, 0.5]], "categories": ["cup"]}
    found = [
        prepare(DataConfig(source=str(metadata_folder(tmp_path / str(k), [{"objects": each}]))), {"boxes"}).batch([0])
        for k, each in enumerate((layout, shares))
    ]
    assert found[0]["boxes"].tolist() == found[1]["boxes"].tolist() == [[[0, 0.25, 0, 0.5, 0.5]]]


def test_boxes_beyond_the_picture_are_clipped_and_noted(tmp_path: Path) -> None:
    root = metadata_folder(tmp_path, [{"objects": {"bbox": [[4, 4, 8, 8]], "categories": [0]}}])
    data = prepare(DataConfig(source=str(root)), {"boxes"})
    assert data.batch([0])["boxes"].tolist() == [[[0, 0.5, 0.5, 0.5, 0.5]]]
    assert "1 pictures have boxes that leave them, which are clipped; the first is" in data.notes[-1]


@pytest.mark.parametrize(
    "objects",
    [
        {"bbox": [[0, 0, 4]], "categories": [1]},
        {"bbox": [[0, 0, 4, 4]], "categories": []},
        {"bbox": [[0, 0, 4, 4]]},
        [3],
    ],
)
def test_a_cell_that_is_no_layout_is_told(tmp_path: Path, objects: Any) -> None:
    root = metadata_folder(tmp_path, [{"objects": objects}])
    with pytest.raises(LimnerError, match=r"metadata\.jsonl line 1: column 'objects' should hold"):
        prepare(DataConfig(source=str(root)), {"boxes"})


def test_an_unknown_class_is_told(tmp_path: Path) -> None:
    root = metadata_folder(tmp_path, [{"objects": {"bbox": [[0, 0, 4, 4]], "categories": ["cut"]}}])
    section = BoxesCondition(classes=("cup", "pot"))
    with pytest.raises(LimnerError, match="class 'cut' of a box is none of the 2 classes; did you mean 'cup'"):
        prepare(DataConfig(source=str(root)), [section])


def test_boxes_are_made_of_maps(tmp_path: Path) -> None:
    numbers = np.zeros((6, 8), np.uint8)
    numbers[1:3, 1:4], numbers[4, 6:], numbers[0, 7] = 1, 1, 2
    assert regions(numbers, [1], 1).tolist() == [[0, 1, 1, 3, 2], [0, 6, 4, 2, 1]]
    assert regions(numbers, [2, 1], 3).tolist() == [[1, 1, 1, 3, 2]]
    data = prepare(DataConfig(source=str(map_folder(tmp_path / "maps", 4))), {"boxes"})
    made = data.conditions["boxes"]
    assert isinstance(made, Boxes)
    assert made.names == ("red", "blue")
    assert sum(float(w * h) for _, _, _, w, h in data.batch([0])["boxes"][0].tolist()) == pytest.approx(1)


# --- the conditioner ----------------------------------------------------------------------------------------------


def test_an_empty_layout_is_not_an_absent_one() -> None:
    torch.manual_seed(0)
    conditioner = BoxesConditioner(2, 16, 1, 3, head_dim=8, emb_channels=8)
    one = torch.tensor([[[1.0, 0, 0, 0.5, 0.5]]])
    empty = torch.full((1, 1, 5), -1.0)
    vectors = [conditioner(boxes, 1).vector for boxes in (None, empty, one)]
    assert all((a - b).abs().max() > 1e-3 for a, b in ((vectors[0], vectors[1]), (vectors[1], vectors[2])))
    torch.testing.assert_close(conditioner(one, 1, torch.tensor([True])).vector, vectors[0])
    padded = torch.cat([one, empty], 1)
    torch.testing.assert_close(conditioner(padded, 1).vector, vectors[2])
    with pytest.raises(LimnerError, match="class 2, there are 2"):
        conditioner(torch.tensor([[[2.0, 0, 0, 1, 1]]]), 1)


# --- as tokens -------------------------------------------------------------------------------------------------------


def of_tokens(*classes: str, **tokens: Any) -> c.RunConfig:
    section = {"kind": "boxes", "classes": list(classes), "width": 16, "depth": 1, "head_dim": 8, "most": 2,
               "tokens": {"vocabulary": 26, "crop": False, **tokens}}  # fmt: skip
    levels = [{"channels": 32, "cross_attention": 1}]
    raw = {"data": {"size": 8}, "model": {"kind": "unet", "levels": levels, "heads": 1}, "conditions": [section]}
    return c.parse(raw, "recipe")


def layout_of(model: build.Model) -> Any:
    assert model.conditioner is not None
    return model.conditioner.modalities["boxes"]


def test_a_box_is_its_class_and_two_cells_of_a_grid() -> None:
    """A grid of floor(sqrt 26) = 5 cells a side; 25 is no box."""
    model = build.model(of_tokens("a", "b"))
    boxes = torch.tensor([[[1, 0.25, 0.5, 0.5, 0.5]], [[-1, 0, 0, 0, 0]]])
    layout = layout_of(model)
    assert layout.tokens(boxes).tolist() == [[1, 11, 23, 25, 25, 25], [25] * 6]
    many = torch.tensor([[[0, 0, 0, 1, 1]] * 3])
    assert layout.tokens(many.float()).tolist() == [[0, 0, 24, 0, 0, 24]]
    told = model.embed({"boxes": boxes}, 2)
    assert told.tokens is not None
    assert told.vector is not None
    assert told.tokens.shape == (2, 6, 16)
    (told.tokens.sum() + told.vector.sum()).backward()
    assert layout.encoder.embedding.weight.grad[11].abs().sum() > 0
    cropped = layout_of(build.model(of_tokens("a", crop=True)))
    assert cropped.tokens(boxes)[0, -2:].tolist() == [0, 24]


def test_more_classes_than_tokens_are_refused() -> None:
    with pytest.raises(LimnerError, match=r"tokens.vocabulary: 4, should be above the 4 classes"):
        build.model(of_tokens(*"abcd", vocabulary=4))


def test_training_on_keeps_the_tokens_whatever_the_names() -> None:
    recipes = of_tokens("a", "b"), of_tokens("c")
    before, model = (build.model(recipe) for recipe in recipes)
    found = take(model, recipes[1], Initial(recipes[0], before.state_dict(), "run"))
    assert "conditions.boxes" in found.kept
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before.state_dict().items())


def test_boxes_are_drawn_on_a_map_of_their_class() -> None:
    drawn = {"classes": ("red", "blue"), "drawn": True}
    raw = {"data": {"size": [4, 8]}, "model": {"kind": "unet", "levels": [{"channels": 8}], "norm_groups": 4},
           "conditions": [BOXES | drawn]}  # fmt: skip
    model = build.model(c.RunConfig.model_validate(raw))
    tau = model.conditioner
    assert tau is not None
    assert tau.spatial_channels == 2
    layout = torch.tensor([[0.0, 0.25, 0.5, 0.5, 0.5], [0, 0.5, 0, 0.0625, 0.125], [-1, 0, 0, 1, 1]])
    maps = tau({"boxes": layout[None].expand(2, -1, -1)}, 2, drop={"boxes": torch.tensor([False, True])}).spatial
    expected = torch.zeros(2, 2, 4, 8)
    expected[0, 0, 2:, 2:6] = 1
    expected[0, 0, 0, 4] = 0.25
    torch.testing.assert_close(maps, expected)
    larger = tau({"boxes": layout[None]}, 1, size=(8, 16)).spatial
    assert larger.shape == (1, 2, 8, 16)
    assert larger[0, 0].sum() == 4 * 8 + 1
    assert model.raw(torch.zeros(1, 3, 4, 8), torch.zeros(1), tau({"boxes": layout[None]}, 1)).shape == (1, 3, 4, 8)
    both = raw | {"conditions": [BOXES | drawn | {"tokens": {"vocabulary": 64}}]}
    with pytest.raises(LimnerError, match="drawn and tokens"):
        build.model(c.RunConfig.model_validate(both))
