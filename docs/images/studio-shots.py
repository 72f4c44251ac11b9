"""The studio's pictures in the documentation, made anew: python docs/images/studio-shots.py RUN [--only NAME ...]

RUN: a model of captions or classes. A run that has previews gives the picture of Watch too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from limner.studio.server import prepare, running

HERE = Path(__file__).parent
PATIENCE_MS = 600_000
CAPTIONS = "a red heart\ngrinning cat face\na slice of pizza\na blue car"


def drawn(page: Page) -> None:
    """Fill the caption in, where there is one, and draw."""
    caption = page.get_by_label("Caption").locator("visible=true")
    if caption.count():
        caption.first.fill(CAPTIONS)
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator(".limner-gallery img").first.wait_for()


def draw(page: Page) -> None:
    drawn(page)
    page.locator(".limner-gallery img").first.click()
    page.locator(".limner-recipe").wait_for()


def compare(page: Page) -> None:
    drawn(page)
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator(".limner-compared td img").nth(8).wait_for()


def understand(page: Page) -> None:
    drawn(page)
    page.get_by_role("tab", name="Understand").click()
    page.get_by_role("button", name="Look", exact=True).click()
    page.locator(".limner-way img").first.wait_for()


def watch(page: Page) -> None:
    page.get_by_role("tab", name="Watch").click()
    page.locator(".limner-preview img").wait_for()


SHOTS: dict[str, tuple[Callable[[Page], None], dict[str, Any]]] = {
    "draw": (draw, {}),
    "narrow-dark": (drawn, {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}),
    "compare": (compare, {}),
    "understand": (understand, {}),
    "watch": (watch, {}),
}


def shoot(browser: Browser, address: str, name: str) -> None:
    use, options = SHOTS[name]
    page = browser.new_page(**{"viewport": {"width": 1280, "height": 800}, **options})
    page.set_default_timeout(PATIENCE_MS)
    page.goto(address)
    page.get_by_role("tab", name="Watch").wait_for()
    page.wait_for_timeout(1000)
    use(page)
    page.wait_for_timeout(1000)
    page.screenshot(path=HERE / f"studio-{name}.png", full_page=True)
    page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(SHOTS))
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    asked = parser.parse_args()
    names = asked.only or [name for name in SHOTS if name != "watch" or (asked.run / "previews").is_dir()]
    app, _ = prepare([asked.run])
    with running(app) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=asked.chromium, args=["--no-sandbox", "--disable-gpu"])
        for name in names:
            shoot(browser, address, name)
        browser.close()


if __name__ == "__main__":
    main()
