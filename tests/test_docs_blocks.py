"""Every block of the documentation is run, or says why it can't be; every link into the code leads somewhere."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripts.pictures import PICTURES
from scripts.site import links
from scripts.site import pages as pages_of_the_site

from limner import api, config
from limner.cli.program import run
from tiny_docs import ROOT, Block, blocks, cheap, cheap_evaluate, cheap_train, is_recipe, world

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *pages_of_the_site()]
SHELL, TOLD = ("", "bash"), ("text",)
LANGUAGES = (*SHELL, *TOLD, "python", "yaml", "json")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_say_what_they_are(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.where}: a block of {block.language} can't be run"
        assert block.norun != "", f"{block.where}: norun should say why"
        if block.language in SHELL and block.norun is None:
            others = {words[0] for words in block.commands()} - {"limner"}
            assert not others, f"{block.where}: only limner is run; mark the block with norun='why'"


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.norun is None for b in blocks(page))], ids=name_of)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "train", cheap_train(api.train))
    monkeypatch.setattr(api, "evaluate", cheap_evaluate(api.evaluate))
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.norun is None:
            carry_out(block, names)


def carry_out(block: Block, names: dict[str, Any]) -> None:
    """Run a block; names: of the page's blocks of Python, which go on where the one before ended."""
    if block.language in SHELL:
        for command in block.commands():
            assert run(cheap(command)) == 0, f"{block.where}: {' '.join(command)}"
    elif block.language == "python":
        exec(compile(block.text, block.where, "exec"), names)
    elif block.language == "yaml":
        for content in yaml.safe_load_all(block.text):
            if is_recipe(content):
                config.parse(content, block.where)
    elif block.language == "json":
        json.loads(block.text)


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == ROOT], ids=name_of)
def test_files_that_are_linked_to_are_there(page: Path) -> None:
    """MkDocs sees to it for the pages of the site."""
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (ROOT / link).exists(), f"{name_of(page)}: {link} is not there"


def test_the_pictures_of_methods_come_from_the_script() -> None:
    shown = {
        picture
        for page in PAGES
        for picture in re.findall(r"images/methods/([\w-]+)\.png", page.read_text(encoding="utf-8"))
    }
    assert shown
    assert shown <= {name.replace("_", "-") for name in PICTURES}


@pytest.mark.parametrize("page", pages_of_the_site(), ids=name_of)
def test_links_into_the_code_lead_to_their_line(page: Path) -> None:
    for link in links(page):
        link.target()


def test_a_link_that_went_stale_is_found(tmp_path: Path) -> None:
    page = ROOT / "docs" / "never.md"
    (link,) = links_of(page, tmp_path, '[x](../src/limner/core/guidance.py "def no_such_function(")')
    with pytest.raises(ValueError, match=r"docs/never.md:1: src/limner/core/guidance.py: .* stands there 0 times"):
        link.target()
    (link,) = links_of(page, tmp_path, "[x](../src/limner/core/no_such_file.py)")
    with pytest.raises(ValueError, match="is not there any more"):
        link.target()
    below = '[x](../src/limner/core/guidance.py "def classifier_free( ... {}")'
    (link,) = links_of(page, tmp_path, below.format("no such line"))
    with pytest.raises(ValueError, match="doesn't stand below"):
        link.target()
    (link,) = links_of(page, tmp_path, below.format("c, u = _pair("))
    line = link.target()
    assert line is not None
    assert "c, u = _pair(" in (ROOT / link.file).read_text().splitlines()[line - 1]


def links_of(page: Path, folder: Path, text: str) -> list[Any]:
    """The links of `text`, as if it stood in `page`."""
    written = folder / "page.md"
    written.write_text(text)
    return [replace(link, page=page) for link in links(written)]
