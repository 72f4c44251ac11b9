"""Bits of HTML that the page shows; whatever comes from a user or a run is escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from limner.outputs import png

Pixels = npt.NDArray[np.uint8]
SHOWN = 128
"""Pixels on the page that a small picture is enlarged to."""


def image(pixels: Pixels, alt: str, facts: Mapping[str, Any] | None = None, side: int = SHOWN) -> str:
    """uint8 (H, W, C) as an `img` that holds its own PNG; `facts` as for `outputs.png`."""
    data = base64.b64encode(png(pixels, facts)).decode()
    height, width = pixels.shape[:2]
    scale = max(1.0, side / max(height, width))
    return (f'<img class="limner-picture" src="data:image/png;base64,{data}" alt="{escape(alt)}" '
            f'width="{round(width * scale)}" height="{round(height * scale)}">')  # fmt: skip


def file(path: Path, alt: str) -> str:
    """A PNG of the studio's own as an `img` that fits the page; nothing when it has gone meanwhile."""
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError:
        return ""
    return f'<img class="limner-sheet" src="data:image/png;base64,{data}" alt="{escape(alt)}">'


def figure(picture: str, caption: str) -> str:
    """A picture with words below it."""
    return f'<figure class="limner-figure">{picture}<figcaption>{escape(caption)}</figcaption></figure>'


def row(figures: Iterable[str], label: str) -> str:
    """Figures side by side, in as many lines as they need."""
    return f'<div class="limner-row" role="group" aria-label="{escape(label)}">{"".join(figures)}</div>'


def strip(figures: Iterable[str], label: str) -> str:
    """Figures in one line that scrolls sideways, by the keyboard too."""
    return f'<div class="limner-strip" role="region" tabindex="0" aria-label="{escape(label)}">{"".join(figures)}</div>'


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def status(text: str, done: float | None = None, *, wrong: bool = False) -> str:
    """What is going on, told to screen readers too. done: 0 to 1, for a bar."""
    bar = "" if done is None else f'<progress max="1" value="{done:.3f}" aria-label="progress"></progress>'
    kind, role = ("limner-wrong", "alert") if wrong else ("limner-status", "status")
    return f'<div class="{kind}" role="{role}">{escape(text)}{bar}</div>'


def wrong(error: Exception) -> str:
    """An error as a sentence."""
    text = str(error)
    return status(f"{text[:1].upper()}{text[1:]}.", wrong=True)


def table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], corner: str, caption: str) -> str:
    """A table of cells that are HTML already, with headings that are not."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in rows
    )
    return (f'<div class="limner-strip" role="region" tabindex="0" aria-label="{escape(caption)}">'
            f'<table class="limner-grid"><caption>{escape(caption)}</caption>'
            f"<thead><tr><td>{escape(corner)}</td>{head}</tr></thead><tbody>{body}</tbody></table></div>")  # fmt: skip


def seconds(value: float) -> str:
    """`8 s`, `2 min 05 s`, `1 h 05 min`."""
    whole = max(0, round(value))
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    return f"{minutes} min {whole % 60:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
