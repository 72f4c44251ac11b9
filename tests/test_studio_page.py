"""The page in Debian's Chromium, on a real server over tiny models."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import BrowserContext, Locator, Page, expect

import limner
import tiny_studio
from limner import zoo
from limner.redraw import Repeat
from limner.studio.engine import Engine
from limner.studio.guard import Guard
from limner.studio.http import application
from limner.studio.limits import Limits
from limner.studio.page import mount
from limner.studio.server import running
from limner.studio.shelf import Shelf

PATIENCE_MS = 60_000
MODELS = ("labels", "words", "maps", "holes", "boxes", "digits")


@pytest.fixture(scope="module")
def browser() -> Iterator[BrowserContext]:
    with tiny_studio.chromium() as made:
        yield made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("runs")
    write = tiny_studio.write_run
    return {
        "labels": write(home / "labels", tiny_studio.recipe()),
        "words": write(home / "words", tiny_studio.text_recipe(), ["a red cat", "a blue dog"]),
        "maps": write(home / "maps", tiny_studio.map_recipe()),
        "holes": write(home / "holes", tiny_studio.hole_recipe()),
        "boxes": write(home / "boxes", tiny_studio.box_recipe()),
        "digits": zoo.HOME / "digits",
    }


@pytest.fixture(scope="module")
def engine(runs: dict[str, Path]) -> Iterator[Engine]:
    made = Engine(Shelf.open(list(runs.values())), Limits(steps=100))
    yield made
    made.close()


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    app = Guard(mount(application(engine), engine), token=None, upload=8_000_000, metrics=engine.metrics)
    with running(app) as found:
        yield f"{found}/"


def redrawn(source: str | Path, told: Repeat) -> np.ndarray:
    """The same by the library alone."""
    gen = limner.load(source)
    assert isinstance(gen, limner.Generator)
    return gen.sample(output="array", **told.options)[0]


class Studio:
    """The page as a person uses it."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.outside, self.errors = page, [], []
        page.set_default_timeout(PATIENCE_MS)
        inside = (address, "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(inside) else self.outside.append(r.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(address)
        self.button("Draw").wait_for()

    def seen(self, place: str | Locator) -> Locator:
        """The first of them that is visible."""
        found = self.page.locator(place) if isinstance(place, str) else place
        return found.locator("visible=true").first

    def button(self, name: str) -> Locator:
        return self.seen(self.page.get_by_role("button", name=name, exact=True))

    def unfold(self, name: str) -> None:
        self.seen(self.page.get_by_role("button", name=re.compile(f"^{name}"))).click()

    def choose(self, model: str) -> None:
        self.page.get_by_label("Model", exact=True).click()
        self.page.get_by_role("option", name=model, exact=True).click()
        self.seen(f".limner-model-{MODELS.index(model)}").wait_for()
        expect(self.page.locator(".limner-start:visible")).to_have_count(1)

    def number(self, name: str, value: float) -> None:
        """Fill a field in. One that has just been unfolded may not listen yet, hence again until its slider follows."""
        field = self.page.locator(f'input[aria-label="number input for {name}"]:visible')
        slider = self.page.locator(f'input[aria-label="range slider for {name}"]:visible')
        for _ in range(10):
            field.fill(str(value))
            field.press("Tab")
            self.page.wait_for_timeout(200)
            if slider.input_value() == str(value):
                break
        expect(slider).to_have_value(str(value))

    def told(self, text: str) -> None:
        expect(self.seen(".limner-told")).to_contain_text(text, timeout=PATIENCE_MS)

    def draw(self) -> np.ndarray:
        """Draw, and the newest picture."""
        self.page.evaluate("document.querySelectorAll('.limner-status').forEach(said => said.textContent = '')")
        self.button("Draw").click()
        self.told("drawn in")
        return np.asarray(Image.open(io.BytesIO(self.newest())))

    def drag(self, place: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press at one point of an element, in shares of its width and height, and let go at another."""
        area = self.seen(place)
        area.scroll_into_view_if_needed()
        box = area.bounding_box()
        assert box is not None
        points = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in (start, end)]
        self.page.mouse.move(*points[0])
        self.page.mouse.down()
        self.page.mouse.move(*points[1], steps=3)
        self.page.mouse.up()

    def newest(self) -> bytes:
        """The file that the gallery shows first and that a download gives."""
        image = self.seen(".limner-gallery img")
        image.wait_for()
        return self.page.request.get(image.get_attribute("src") or "").body()

    def repeat(self) -> Repeat:
        """What the newest picture tells of its drawing."""
        return Repeat.read(io.BytesIO(self.newest()), "x.png")


@pytest.fixture
def studio(browser: BrowserContext, address: str) -> Iterator[Studio]:
    page = browser.new_page()
    made = Studio(page, address)
    yield made
    assert not made.outside, "the page fetched something from elsewhere"
    assert not made.errors
    page.close()


def test_paths_from_a_client_are_not_opened(address: str, runs: dict[str, Path]) -> None:
    secret = runs["labels"] / "config.yaml"
    with httpx.Client(base_url=address) as client:
        for path in ("/etc/passwd", secret, "../../etc/passwd"):
            assert client.get(f"gradio_api/file={path}").status_code in (403, 404)
        answers = []
        for picture in (None, str(secret), {"path": str(secret), "meta": {"_type": "gradio.FileData"}}):
            board = {"rows": 8, "columns": 8, "cells": "/////w==", "picture": picture}
            values = [board, "Vary all of it", 0.5, 1, 0, 0, "8x8", 4, 2.0, "ddim", "log_snr", 0, 1, 0, None]
            asked = client.post("gradio_api/call/draw_holes", json={"data": values}).json()
            answers.append(client.get(f"gradio_api/call/draw_holes/{asked['event_id']}", timeout=60).text)
    assert "1 drawn in" in answers[0]
    assert "is not base64" in answers[1]
    assert "event: error" in answers[2] or "1 drawn in" in answers[2]
    assert not any("norm_groups" in answer for answer in answers)


def test_a_label_becomes_a_picture_whose_recipe_draws_it_again(studio: Studio, runs: dict[str, Path]) -> None:
    studio.page.get_by_label("dog").check()
    studio.number("Pictures", 3)
    studio.page.get_by_label("Seed", exact=True).fill("7")
    first = studio.draw()
    repeat = studio.repeat()
    assert (repeat.seed, repeat.first, repeat.conditions) == (7, 0, {"label": [1]})
    np.testing.assert_array_equal(redrawn(runs["labels"], repeat), first)
    tiny_studio.shoot(studio.page, "draw")

    studio.page.locator(".limner-gallery:visible img").nth(2).click()
    expect(studio.page.locator(".limner-recipe:visible")).to_contain_text("dpmpp_2m")
    third = np.asarray(Image.open(io.BytesIO(studio.newest())))
    studio.page.get_by_label("cat").check()
    studio.page.get_by_label("Seed", exact=True).fill("1")
    studio.button("Use this recipe").click()
    studio.told("The controls are as they were")
    expect(studio.page.get_by_label("Seed", exact=True)).to_have_value("7")
    expect(studio.page.get_by_label("cat")).not_to_be_checked()
    np.testing.assert_array_equal(studio.draw(), third)


def test_a_trained_model_draws_what_was_asked(studio: Studio) -> None:
    studio.choose("digits")
    studio.page.get_by_label("0", exact=True).locator("visible=true").check()
    drawn = studio.draw()
    told = studio.repeat()
    assert told.conditions["label"][0] == 0
    np.testing.assert_array_equal(redrawn("digits", told).squeeze(), drawn)
    middle, around = drawn[6:10, 7:9], np.concatenate([drawn[6:10, 3:6], drawn[6:10, 10:13]], axis=1)
    assert middle.mean() > 180 > around.min(1).mean() + 80  # white within the ring


def test_another_size_and_a_start_from_a_picture(studio: Studio, runs: dict[str, Path]) -> None:
    studio.unfold("Advanced")
    size = studio.page.get_by_label("Size", exact=True)
    size.fill("16x8")
    size.press("Enter")
    assert studio.draw().shape == (8, 16, 3)
    studio.seen(".limner-gallery img").click()
    studio.button("Start from this picture").click()
    studio.told("It lies below")
    studio.unfold("Start from a picture")
    studio.number("Strength", 0.5)
    varied = studio.draw()
    repeat = studio.repeat()
    assert (repeat.strength, repeat.size) == (0.5, (8, 16))
    np.testing.assert_array_equal(redrawn(runs["labels"], repeat), varied)
    size.fill("900x900")
    size.press("Enter")
    studio.button("Draw").click()
    studio.told("Size 900x900: at most 4 times as many pixels")


def test_a_caption_becomes_a_picture(studio: Studio) -> None:
    studio.choose("words")
    drawn = []
    for caption in ("a red cat", "a blue dog"):
        studio.seen(studio.page.get_by_label("Caption")).fill(caption)
        drawn.append(studio.draw())
        assert studio.repeat().conditions["text"][0] == caption
    assert not np.array_equal(*drawn)
    studio.page.get_by_role("tab", name="Understand").click()
    studio.button("Look").click()
    expect(studio.seen(".limner-way")).to_contain_text("Where each word acted", timeout=PATIENCE_MS)
    expect(studio.page.locator(".limner-way:visible img[alt*=\"'dog'\"]")).to_have_count(1)
    tiny_studio.shoot(studio.page, "understand")


def test_a_painted_map_changes_the_picture(studio: Studio) -> None:
    studio.choose("maps")
    board = ".limner-map canvas"
    before = studio.draw()
    assert not np.asarray(studio.repeat().conditions["semantic_map"][0]).any(), "sky"
    studio.drag(board, (0.05, 0.5), (0.95, 0.5))
    after = studio.draw()
    assert not np.array_equal(before, after)
    map_ = np.asarray(studio.repeat().conditions["semantic_map"][0])
    assert map_.shape == (8, 8)
    np.testing.assert_array_equal(map_.any(1), [False] * 4 + [True] + [False] * 3)
    assert (map_[4] == 1).all(), "road, where it was painted"

    studio.seen(studio.page.get_by_label("grass")).check()
    studio.seen(studio.page.get_by_label("Fill", exact=True)).check()
    studio.drag(board, (0.5, 0.9), (0.5, 0.9))
    studio.seen(board).focus()
    for key in ("ArrowUp", "ArrowUp", "Space"):  # a cell above the road: half of the picture more
        studio.page.keyboard.press(key)
    tiny_studio.shoot(studio.page, "map")
    studio.draw()
    map_ = np.asarray(studio.repeat().conditions["semantic_map"][0])
    np.testing.assert_array_equal(map_[:, 0], [2, 2, 2, 2, 1, 2, 2, 2])
    studio.button("Undo").click()
    filled = studio.draw()
    map_ = np.asarray(studio.repeat().conditions["semantic_map"][0])
    np.testing.assert_array_equal(map_[:, 0], [0, 0, 0, 0, 1, 2, 2, 2])
    studio.button("Fill all").click()
    studio.seen(".limner-gallery img").click()
    studio.button("Use this recipe").click()
    studio.told("The controls are as they were")
    np.testing.assert_array_equal(studio.draw(), filled)


def test_a_hole_is_painted_anew_and_the_rest_is_kept(studio: Studio, tmp_path: Path) -> None:
    studio.choose("holes")
    known = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    file = tmp_path / "known.png"
    Image.fromarray(known).save(file)
    with studio.page.expect_file_chooser() as chooser:
        studio.button("Choose a picture").click()
    chooser.value.set_files(file)
    board = ".limner-hole canvas"
    studio.page.wait_for_function(
        "() => [...document.querySelectorAll('.limner-hole canvas')].some(c => c.offsetParent && "
        "c.getContext('2d').getImageData(0, 0, 1, 1).data[3])"
    )
    studio.button("Draw").click()
    studio.told("Mask: nothing is marked")
    studio.drag(board, (0.3, 0.6), (0.7, 0.6))
    tiny_studio.shoot(studio.page, "hole")
    drawn = studio.draw()
    repeat = studio.repeat()
    hole = np.asarray(repeat.conditions["mask"][0]) > 0
    assert 2 < hole.sum() < 16
    assert repeat.strength is None
    np.testing.assert_array_equal(drawn[~hole], known[~hole])
    assert (drawn[hole] != known[hole]).any()


def test_boxes_are_dragged_and_named(studio: Studio) -> None:
    studio.choose("boxes")
    field, box = ".limner-field", ".limner-box"
    none = studio.draw()
    studio.drag(field, (0.1, 0.1), (0.5, 0.4))
    studio.drag(box, (0.5, 0.6), (1.0, 0.6))  # half of its width to the right
    studio.seen(studio.page.get_by_label("Class of the box")).select_option("tree")
    studio.button("Add a box").click()
    studio.page.keyboard.press("ArrowDown")
    tiny_studio.shoot(studio.page, "boxes")
    two = studio.draw()
    (layout,) = studio.repeat().conditions["boxes"]
    assert [name for name, *_ in layout] == ["tree", "tree"]
    np.testing.assert_allclose([span for _, *span in layout], [[0.3, 0.1, 0.4, 0.3], [0.25, 0.27, 0.5, 0.5]], atol=0.02)
    assert json.loads(studio.seen(".limner-boxes-in").locator("code").text_content() or "") == layout
    assert not np.array_equal(none, two)
    studio.button("Delete the box").click()
    studio.draw()
    assert len(studio.repeat().conditions["boxes"][0]) == 1


def test_stop_in_the_middle(studio: Studio, engine: Engine) -> None:
    network = engine.shelf.generators["labels"].model.network
    hook = network.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    try:
        studio.number("Steps", 100)
        studio.button("Draw").click()
        studio.told("Step ")
        studio.seen(".limner-forming img").wait_for()
        tiny_studio.shoot(studio.page, "forming")
        studio.button("Stop").click()
        studio.told("Stopped.")
        tiny_studio.until(lambda: not engine._drawing, 2)
    finally:
        hook.remove()
    studio.number("Steps", 4)
    studio.draw()


def test_what_is_wrong_is_said_in_a_sentence(studio: Studio) -> None:
    studio.page.get_by_role("tab", name="Compare").click()
    values = studio.seen(studio.page.get_by_label("Across: values"))
    values.fill("1, lots")
    studio.button("Compare").click()
    expect(studio.page.get_by_role("alert").locator("visible=true")).to_have_text(
        "Guidance: '1, lots' should be numbers with commas between."
    )
    values.fill("1, 3")
    studio.button("Compare").click()
    expect(studio.page.locator(".limner-compared:visible img")).to_have_count(6, timeout=PATIENCE_MS)
    tiny_studio.shoot(studio.page, "compare")


def test_on_a_narrow_dark_screen_nothing_leaves_it(studio: Studio) -> None:
    studio.page.emulate_media(color_scheme="dark")
    studio.page.set_viewport_size({"width": 390, "height": 844})
    for model in ("maps", "boxes"):
        studio.choose(model)
        studio.draw()
        assert studio.page.evaluate("document.documentElement.scrollWidth") <= 390
        tiny_studio.shoot(studio.page, f"narrow-{model}")
