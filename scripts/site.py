"""What MkDocs does to the pages besides: links into the code get their line and a page to lead to, and formulas become
MathML.

A link to code names a file, and in its title a fragment of the line that is meant, which must stand there just once, or
`one ... another`, the first line with the other below it:

    [classifier_free](../../src/limner/core/guidance.py "def classifier_free")

The site shows it with the line's number and leads to that line of the file. Formulas stand in $...$ and $$...$$. A
fence may say why its block isn't run by the tests: ```bash norun="needs eight GPUs". Nothing comes from elsewhere.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
CODE = re.compile(
    r'\[(?P<text>[^\]]+)\]\((?P<up>(?:\.\./)*)(?P<file>src/limner/[\w/-]+\.(?:py|yaml))(?: "(?P<fragment>[^"]+)")?\)'
)
NORUN = re.compile(r'^(?P<fence>\s*```+\w*) norun="[^"]*"', re.MULTILINE)
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)
PAGE = '---\nsearch:\n  exclude: true\n---\n# {file}\n\n~~~~~~{language} linenums="1"\n{text}\n~~~~~~\n'


@dataclass(frozen=True)
class CodeLink:
    """A link into the code: where it is written (page, line), what it leads to."""

    page: Path
    line: int
    file: str
    fragment: str | None

    def target(self) -> int | None:
        """The number of the line that holds the fragment; None for a link to a whole file. Raises ValueError unless the
        file is there and the fragment stands in it once."""
        where = f"{self.page.relative_to(ROOT)}:{self.line}: {self.file}"
        path = ROOT / self.file
        if not path.is_file():
            raise ValueError(f"{where}: is not there any more")
        if self.fragment is None:
            return None
        fragment, _, below = html.unescape(self.fragment).partition(" ... ")
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [number for number, text in enumerate(lines, 1) if fragment in text]
        if len(found) != 1:
            raise ValueError(f"{where}: '{fragment}' stands there {len(found)} times, should once")
        line = next((number for number, text in enumerate(lines, 1) if number > found[0] and below in text), None)
        if below and line is None:
            raise ValueError(f"{where}: '{below}' doesn't stand below '{fragment}'")
        return line if below else found[0]


def links(page: Path) -> Iterator[CodeLink]:
    """The links into the code of a Markdown file."""
    for number, text in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        for match in CODE.finditer(text):
            yield CodeLink(page, number, match["file"], match["fragment"])


def pages() -> list[Path]:
    """The Markdown files of the site."""
    return sorted((ROOT / "docs").rglob("*.md"))


def on_files(files: Files, *, config: Any) -> Files:
    """A page for each file of code that is linked to."""
    for file in sorted({link.file for page in pages() for link in links(page)}):
        path = ROOT / file
        language = {".py": "python", ".yaml": "yaml"}[path.suffix]
        text = path.read_text(encoding="utf-8").rstrip()
        content = PAGE.format(file=file, language=language, text=text)
        files.append(File.generated(config, f"{_page_of(file)}", content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Fences without what is said to the tests, and links into the code with their lines."""
    source = Path(page.file.abs_src_path or page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        line = CodeLink(source, 0, match["file"], match["fragment"]).target()
        to = os.path.relpath(_page_of(match["file"]), Path(page.file.src_uri).parent)
        short = match["file"].removeprefix("src/limner/")
        if line is None:
            return f"[{match['text']}]({to})"
        return f"[{match['text']} ({short}:{line})]({to}#__codelineno-0-{line})"

    return CODE.sub(link, NORUN.sub(r"\g<fence>", markdown))


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw by themselves."""
    return FORMULA.sub(_mathml, html)


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match["tag"] == "div" else "inline"
    return convert(html.unescape(match["tex"]).strip(), display=display)


def _page_of(file: str) -> str:
    return f"code/{file.removeprefix('src/limner/').replace('.', '-')}.md"
