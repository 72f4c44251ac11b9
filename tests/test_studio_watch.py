"""A training that another process does, watched on the page while it goes on."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

import tiny_cli
import tiny_studio
from limner.studio.engine import Engine
from limner.studio.guard import Guard
from limner.studio.http import application
from limner.studio.page import mount
from limner.studio.server import running
from limner.studio.shelf import Shelf
from limner.studio.watching import watch

PATIENCE_MS = 60_000


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Path]:
    """The run of a process that trains, longer than the test lasts."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "limner", "train", str(tiny_cli.pictures(tmp_path / "data"))]
    command += ["--preset", str(tiny_cli.recipe(tmp_path)), "--out", str(out), "--images", "1000000"]
    command += ["--set", "training.preview_every=64", "--set", "training.log_every=64"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            tiny_studio.until(lambda: process.poll() is not None or (out / "config.yaml").is_file(), 60)
            assert process.poll() is None, process.stderr and process.stderr.read()
            yield out
            assert process.poll() is None, "it should still be training"
        finally:
            process.kill()


def test_a_training_is_watched_while_it_goes_on(training: Path) -> None:
    engine = Engine(Shelf.open([training]))
    app = Guard(mount(application(engine), engine), token=None, upload=10_000, metrics=engine.metrics)
    with running(app) as address, tiny_studio.chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(address)
        told, preview = page.locator(".limner-training").first, page.locator(".limner-preview img")
        going_on = re.compile(r"Training: ([\d,]+) images, .*loss [\d.]+, .*images a second [\d.]+, .* left\.")
        expect(told).to_have_text(going_on, timeout=PATIENCE_MS)
        first = going_on.search(told.inner_text())
        preview.wait_for()
        assert first is not None
        expect(told).not_to_contain_text(f"{first[1]} images", timeout=PATIENCE_MS)
        expect(page.locator("canvas.marks, svg.marks")).to_have_count(3)
        tiny_studio.until(lambda: len(watch(training).previews) > 1, 60)
        frame = page.locator('input[aria-label="number input for Preview"]')
        frame.fill("0")
        frame.press("Tab")
        oldest = f"pictures after {watch(training).previews[0][0]:,} images"
        expect(preview).to_have_attribute("alt", oldest, timeout=PATIENCE_MS)
        tiny_studio.shoot(page, "watch")
        page.get_by_role("button", name="Play").click()
        expect(preview).not_to_have_attribute("alt", oldest, timeout=PATIENCE_MS)
    engine.close()
