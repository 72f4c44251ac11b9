"""The page in Debian's Chromium, on a real server over tiny models."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

import limner
import tiny_studio
from limner.redraw import Repeat
from limner.studio.engine import Engine
from limner.studio.guard import Guard
from limner.studio.http import application
from limner.studio.limits import Limits
from limner.studio.page import mount
from limner.studio.shelf import Shelf

PATIENCE_MS = 60_000
MODELS = ("labels", "words", "maps", "holes")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, installed where it is missing."""
    found = shutil.which("chromium")
    if found is None:
        subprocess.run(["apt-get", "update", "-q"], check=True)
        subprocess.run(["apt-get", "install", "-q", "-y", "--no-install-recommends", "chromium"], check=True)
        found = shutil.which("chromium")
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        made = playwright.chromium.launch(executable_path=found, args=options)
        yield made
        made.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("runs")
    write = tiny_studio.write_run
    return {
        "labels": write(home / "labels", tiny_studio.recipe()),
        "words": write(home / "words", tiny_studio.text_recipe(), ["a red cat", "a blue dog"]),
        "maps": write(home / "maps", tiny_studio.map_recipe()),
        "holes": write(home / "holes", tiny_studio.hole_recipe()),
    }


@pytest.fixture(scope="module")
def engine(runs: dict[str, Path]) -> Iterator[Engine]:
    made = Engine(Shelf.open(list(runs.values())), Limits(steps=100))
    yield made
    made.close()


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    app = Guard(mount(application(engine), engine), token=None, upload=8_000_000, metrics=engine.metrics)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        tiny_studio.until(lambda: server.started)
        yield f"http://localhost:{bound.getsockname()[1]}/"
        server.should_exit = True
        thread.join(20)


class Studio:
    """The page as a person uses it."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.outside, self.errors = page, [], []
        page.set_default_timeout(PATIENCE_MS)
        page.on(
            "request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else self.outside.append(r.url)
        )
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(address)
        self.button("Draw").wait_for()

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True).locator("visible=true").first

    def choose(self, model: str) -> None:
        box = self.page.get_by_label("Model", exact=True)
        box.click()
        self.page.get_by_role("option", name=model, exact=True).click()
        self.page.locator(f".limner-model-{MODELS.index(model)}:visible").first.wait_for()
        expect(self.page.locator(".limner-start:visible")).to_have_count(1)

    def number(self, name: str, value: int) -> None:
        field = self.page.locator(f'input[aria-label="number input for {name}"]:visible')
        field.fill(str(value))
        field.press("Tab")

    def told(self, text: str) -> None:
        expect(self.page.locator(".limner-told:visible").first).to_contain_text(text, timeout=PATIENCE_MS)

    def draw(self) -> np.ndarray:
        """Draw, and the newest picture."""
        self.page.evaluate("document.querySelectorAll('.limner-status').forEach(said => said.textContent = '')")
        self.button("Draw").click()
        self.told("drawn in")
        return np.asarray(Image.open(io.BytesIO(self.newest())))

    def paint(self, editor: str) -> None:
        """A stroke across the middle of a canvas."""
        canvas = self.page.locator(f"{editor}:visible canvas").first
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        assert box is not None
        self.page.mouse.move(box["x"] + box["width"] * 0.35, box["y"] + box["height"] * 0.5)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.5, steps=2)
        self.page.mouse.up()
        self.page.wait_for_timeout(500)

    def newest(self) -> bytes:
        """The file that the gallery shows first and that a download gives."""
        image = self.page.locator(".limner-gallery:visible img").first
        image.wait_for()
        return self.page.request.get(image.get_attribute("src") or "").body()


@pytest.fixture
def studio(browser: Browser, address: str) -> Iterator[Studio]:
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
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
        image = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
        answers = []
        for editor in (None, {"background": image, "layers": [], "composite": image}):
            values = [editor, 1, 0, 0, 2.0, 4, "ddim", "log_snr", 0, 1, 0, None]
            asked = client.post("gradio_api/call/draw_holes", json={"data": values}).json()
            answers.append(client.get(f"gradio_api/call/draw_holes/{asked['event_id']}", timeout=60).text)
    assert "event: complete" in answers[0]
    assert "event: error" in answers[1]
    assert "norm_groups" not in answers[1]


def test_a_label_becomes_a_picture_whose_recipe_draws_it_again(studio: Studio, runs: dict[str, Path]) -> None:
    studio.page.get_by_label("dog").check()
    studio.number("Pictures", 3)
    studio.page.get_by_label("Seed").fill("7")
    first = studio.draw()
    repeat = Repeat.read(io.BytesIO(studio.newest()), "x.png")
    assert (repeat.seed, repeat.first, repeat.conditions) == (7, 0, {"label": [1]})
    np.testing.assert_array_equal(limner.load(runs["labels"]).sample(output="array", **repeat.options)[0], first)

    studio.page.locator(".limner-gallery:visible img").nth(2).click()
    expect(studio.page.locator(".limner-recipe:visible")).to_contain_text("dpmpp_2m")
    third = np.asarray(Image.open(io.BytesIO(studio.newest())))
    studio.page.get_by_label("cat").check()
    studio.page.get_by_label("Seed").fill("1")
    studio.button("Use this recipe").click()
    studio.told("The controls are as they were")
    expect(studio.page.get_by_label("Seed")).to_have_value("7")
    expect(studio.page.get_by_label("cat")).not_to_be_checked()
    np.testing.assert_array_equal(studio.draw(), third)


def test_a_caption_becomes_a_picture(studio: Studio) -> None:
    studio.choose("words")
    drawn = []
    for caption in ("a red cat", "a blue dog"):
        studio.page.get_by_label("Caption").locator("visible=true").first.fill(caption)
        drawn.append(studio.draw())
        assert Repeat.read(io.BytesIO(studio.newest()), "x").conditions["text"][0] == caption
    assert not np.array_equal(*drawn)
    studio.page.get_by_role("tab", name="Understand").click()
    studio.button("Look").click()
    expect(studio.page.locator(".limner-way:visible").first).to_contain_text(
        "Where each word acted", timeout=PATIENCE_MS
    )
    expect(studio.page.locator(".limner-way:visible img[alt*=\"'dog'\"]")).to_have_count(1)


def test_a_painted_map_changes_the_picture(studio: Studio) -> None:
    studio.choose("maps")
    before = studio.draw()
    studio.paint(".limner-map")
    after = studio.draw()
    assert not np.array_equal(before, after)
    map_ = np.asarray(Repeat.read(io.BytesIO(studio.newest()), "x").conditions["semantic_map"][0])
    assert map_.shape == (8, 8)
    assert set(np.unique(map_)) == {0, 1}, "sky, and road where it was painted"


def test_a_hole_is_painted_anew_and_the_rest_is_kept(studio: Studio, tmp_path: Path) -> None:
    studio.choose("holes")
    known = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    file = tmp_path / "known.png"
    Image.fromarray(known).resize((320, 320), Image.Resampling.NEAREST).save(file)
    studio.page.locator('.limner-inpaint:visible input[type="file"]').first.set_input_files(file)
    for _ in range(40):  # until the editor has taken the picture in
        studio.button("Draw").click()
        studio.page.wait_for_timeout(1500)
        if "Mask: nothing is painted over" in studio.page.locator(".limner-told:visible").first.inner_text():
            break
    studio.told("Mask: nothing is painted over")
    studio.paint(".limner-inpaint")
    drawn = studio.draw()
    repeat = Repeat.read(io.BytesIO(studio.newest()), "x")
    hole = np.asarray(repeat.conditions["mask"][0]) > 0
    assert 2 < hole.sum() < 40
    kept = np.asarray(repeat.conditions["image"][0])
    np.testing.assert_array_equal(drawn[~hole], kept[~hole])
    assert (drawn[hole] != kept[hole]).any()


def test_stop_in_the_middle(studio: Studio, engine: Engine) -> None:
    network = engine.shelf.generators["labels"].model.network
    hook = network.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    try:
        studio.number("Steps", 100)
        studio.button("Draw").click()
        studio.told("Step ")
        studio.page.locator(".limner-forming:visible img").first.wait_for()
        studio.button("Stop").click()
        studio.told("Stopped.")
        tiny_studio.until(lambda: not engine._drawing, 2)
    finally:
        hook.remove()
    studio.number("Steps", 4)
    studio.draw()


def test_what_is_wrong_is_said_in_a_sentence(studio: Studio) -> None:
    studio.page.get_by_role("tab", name="Compare").click()
    studio.page.get_by_label("Across: values").locator("visible=true").first.fill("1, lots")
    studio.button("Compare").click()
    expect(studio.page.get_by_role("alert").locator("visible=true")).to_have_text(
        "Guidance: '1, lots' should be numbers with commas between."
    )
    studio.page.get_by_label("Across: values").locator("visible=true").first.fill("1, 3")
    studio.button("Compare").click()
    expect(studio.page.locator(".limner-compared:visible img")).to_have_count(6, timeout=PATIENCE_MS)


def test_a_training_is_watched_while_it_goes_on(studio: Studio, runs: dict[str, Path]) -> None:
    def line(images: int) -> None:
        figures = {
            "images": images,
            "seconds": images / 100,
            "loss": 0.5,
            "loss_t0.00_0.25": 0.7,
            "images_per_s": 100.0,
        }
        with (runs["labels"] / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(figures) + "\n")

    line(1000)
    studio.page.get_by_role("tab", name="Watch").click()
    told = studio.page.locator(".limner-training:visible").first
    expect(told).to_contain_text("1,000 images", timeout=PATIENCE_MS)
    line(2000)
    expect(told).to_contain_text("2,000 images", timeout=PATIENCE_MS)
    expect(told).to_contain_text("images a second 100")
