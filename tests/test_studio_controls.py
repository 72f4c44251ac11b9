"""The page's controls without a browser: recipes back and forth, values from a client that no control gives."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

import tiny_studio
from limner.errors import LimnerError
from limner.redraw import Repeat
from limner.studio.engine import Engine
from limner.studio.limits import Limits
from limner.studio.page import boards
from limner.studio.page.canvases import MARKED, VARY, Boxes, SemanticMap, Start
from limner.studio.page.compare import Compare
from limner.studio.page.controls import Controls, sizes_of
from limner.studio.page.sessions import Sessions
from limner.studio.shelf import Shelf

SIZE = (8, 8)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    home = tmp_path_factory.mktemp("studio")
    recipes = {"labels": tiny_studio.recipe(), "maps": tiny_studio.map_recipe(), "boxes": tiny_studio.box_recipe()}
    made = Engine(Shelf.open([tiny_studio.write_run(home / name, recipe) for name, recipe in recipes.items()]))
    yield made
    made.close()


@pytest.fixture(scope="module")
def controls(engine: Engine) -> Controls:
    with gr.Blocks():
        return Controls(engine, "labels")


def recipe(engine: Engine, **asked: Any) -> Repeat:
    """What a PNG of this drawing would tell."""
    wanted = engine.request(model="labels", **asked)
    pictures = [{"index": wanted.first + k, "label": engine.shelf.generators["labels"].classes.index(name)}
                for k, name in enumerate(wanted.conditions["label"])]  # fmt: skip
    return Repeat.of({**engine.facts(wanted), "pictures": pictures})


def test_a_recipe_sets_the_controls_which_ask_for_the_same(engine: Engine, controls: Controls) -> None:
    given = {"label": ["dog", "fish"]}
    told = recipe(engine, num=3, seed=8, first=2, conditions=given, steps=7, interval=(0.2, 0.9), size=(8, 16))
    asked = controls.asked(controls.restore(told))
    again = engine.request(model="labels", **asked.options)
    assert asked.size == (8, 16)
    assert engine.facts(again) == engine.facts(engine.request(model="labels", num=3, seed=8, steps=7, size=(8, 16),
                                                              interval=(0.2, 0.9)))  # fmt: skip
    assert (again.numbers, again.conditions["label"]) == (range(2, 5), ["dog", "fish", "dog"])


@pytest.mark.parametrize(
    ("asked", "lost"),
    [
        ({"guidance": {"label": 3.0}}, "scales"),
        ({"conditions": {"label": ["cat", "cat", "dog"]}}, "label"),
        ({"guidance_every": 2}, "guidance_every"),
    ],
)
def test_what_the_controls_cannot_say_is_named(engine: Engine, controls: Controls, asked: dict[str, Any],
                                               lost: str) -> None:  # fmt: skip
    given = {"conditions": {"label": ["cat"]}, "num": 3, "seed": 0, **asked}
    with pytest.raises(LimnerError, match=f"^{lost}: the page cannot be set .* `limner sample --from`"):
        controls.restore(recipe(engine, **given))


def test_axes_of_a_comparison_set_their_option(engine: Engine, controls: Controls) -> None:
    with gr.Blocks():
        compare = Compare(engine, Sessions(), "labels", controls)
    base = {"conditions": {}, "interval": (0.0, 1.0)}
    assert compare._told(base, "Guide from time", 0.3)["interval"] == (0.3, 1.0)
    assert compare._told(base, "Guide up to time", 0.7)["interval"] == (0.0, 0.7)
    assert compare._told(base, "Size", "16x8")["size"] == (8, 16)
    assert compare._told(base, "Strength", 0.4)["strength"] == 0.4
    assert compare._told(base, "Class", "dog")["conditions"] == {"label": "dog"}
    with pytest.raises(LimnerError, match="size 99x99: at most 4 times"):
        compare._told(base, "Size", "99x99")


def test_sizes_are_multiples_of_what_the_network_takes() -> None:
    assert sizes_of((64, 48), 16) == ["48x64", "64x64", "48x96", "96x64", "48x128", "64x96", "96x128"]


def test_a_map_from_a_png_of_class_numbers(engine: Engine) -> None:
    with gr.Blocks():
        canvas = SemanticMap(engine.shelf.generators["maps"], Limits())
    numbers = np.arange(256, dtype=np.uint8).reshape(16, 16) % 3
    value, wrong = canvas._read(as_png(numbers))
    assert wrong == ""
    np.testing.assert_array_equal(np.asarray(canvas.options(SIZE, value)["semantic_map"]).shape, SIZE)
    for raw, said in ((as_png(numbers + 7), "class 7 at row 0"), (b"GIF", "cannot be read")):
        assert said in canvas._read(raw)[1]
    with pytest.raises(LimnerError, match="class 9 at row 0, column 0"):
        canvas.options(SIZE, boards.told(np.full(SIZE, 9)))


@pytest.mark.parametrize("value", [7, {}, {"rows": 8, "columns": 8, "cells": "AAAA"}, {"rows": 10**9, "columns": 1},
                                   {"rows": 8, "columns": 8, "cells": ["x"]}])  # fmt: skip
def test_what_no_canvas_gives_is_refused(engine: Engine, value: Any) -> None:
    with gr.Blocks():
        canvas = SemanticMap(engine.shelf.generators["maps"], Limits())
    with pytest.raises(LimnerError, match="semantic_map: should be rows, columns, and the cells"):
        canvas.options(SIZE, value)


def test_boxes_are_a_list_of_lists(engine: Engine) -> None:
    with gr.Blocks():
        canvas = Boxes(engine.shelf.generators["boxes"], Limits())
    assert canvas.options(SIZE, None) == {}
    assert canvas.options(SIZE, [["car", 0, 0, 1, 1]]) == {"boxes": [[("car", 0, 0, 1, 1)]]}
    for value in (3, ["car"], {"car": 1}):
        with pytest.raises(LimnerError, match=r"boxes: should be a list of \[class, x, y, w, h\]"):
            canvas.options(SIZE, value)


def test_a_start_is_varied_or_painted_in(engine: Engine) -> None:
    with gr.Blocks():
        start = Start(engine.shelf.generators["labels"], Limits())
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    below = start.below(picture)
    assert start.options(SIZE, start.below(None), VARY, 0.5) == {}
    varied = start.options((8, 16), below, VARY, 0.5)
    assert (varied["image"].size, varied["strength"]) == ((16, 8), 0.5)
    marked = boards.told(np.eye(8), picture)
    assert set(start.options(SIZE, marked, MARKED, 1)) == {"image", "mask"}
    assert set(start.options(SIZE, marked, MARKED, 0.5)) == {"image", "mask", "strength"}
    with pytest.raises(LimnerError, match="mask: nothing is marked"):
        start.options(SIZE, below, MARKED, 1)
    with pytest.raises(LimnerError, match="image: is not base64"):
        start.options(SIZE, {**below, "picture": "/etc/passwd"}, VARY, 0.5)


def as_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
