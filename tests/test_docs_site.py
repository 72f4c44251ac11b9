"""The site is built strictly, and a reader's browser fetches nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parents[1]
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b[^>]*\bhref=["']?https?://"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning of MkDocs fails it."""
    made = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(ROOT)
        build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(made)))
    return made


def test_the_site_is_whole(site: Path) -> None:
    assert "Your own pictures in an hour" in (site / "tutorial/index.html").read_text()
    assert "sigma^2 / alpha" in (site / "reference/core/index.html").read_text()
    assert (site / "search/search_index.json").is_file()


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        found = LOADED.search(page.read_text())
        assert found is None, f"{page.relative_to(site)}: {found and found.group()}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?://", style.read_text()), style


def test_formulas_are_mathml(site: Path) -> None:
    page = (site / "methods/classifier-free-guidance/index.html").read_text()
    assert "<math" in page
    assert all('class="arithmatex"' not in page.read_text() for page in (site / "methods").rglob("*.html"))


def test_code_is_shown_with_the_line_that_is_meant(site: Path) -> None:
    page = (site / "methods/classifier-free-guidance/index.html").read_text()
    found = re.search(r'href="([^"]+)#(__codelineno-0-(\d+))"[^>]*>classifier_free \(core/guidance\.py:(\d+)\)', page)
    assert found is not None
    assert found[3] == found[4]
    assert f'id="{found[2]}"' in (site / "methods/classifier-free-guidance" / found[1] / "index.html").read_text()
