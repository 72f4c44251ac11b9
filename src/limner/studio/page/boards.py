"""The two canvases of the page, each a script of our own in a `gr.HTML`: cells to paint, and boxes to drag."""

from __future__ import annotations

import base64
import binascii
import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import numpy.typing as npt
from PIL import Image

from limner.data.overlays import VOID
from limner.errors import LimnerError
from limner.redraw import as_text
from limner.studio.limits import Limits

_HERE = Path(__file__).parent
Size = tuple[int, int]
Cells = npt.NDArray[np.uint8]


def palette(count: int) -> list[str]:
    """So many colours that are told apart, as #rrggbb: the golden angle in hue, in three lightnesses."""
    values = [colorsys.hls_to_rgb(0.618034 * k % 1, (0.45, 0.65, 0.3)[k % 3], 0.75) for k in range(count)]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in value) for value in values]


def class_board(names: Sequence[str], size: Size) -> gr.HTML:
    """A canvas of class numbers; `VOID` stands for no class."""
    count = len(names)
    return _board([*names, "(none)"], [*palette(count), ""], [*range(count), VOID], size, "limner-map",
                  start=min(1, count), said="Semantic map", legend="Classes")  # fmt: skip


def hole_board(size: Size) -> gr.HTML:
    """A canvas over a picture: 1 is what is drawn anew."""
    return _board(["Draw anew", "Keep"], ["#d6249f", ""], [1, 0], size, "limner-hole", start=0,
                  said="What is drawn anew", legend="Paint")  # fmt: skip


def _board(names: list[str], colours: list[str], numbers: list[int], size: Size, kind: str, **props: Any) -> gr.HTML:
    empty: Any = told(np.zeros(size, np.uint8))
    return gr.HTML(empty, html_template="", js_on_load=_script("board.js"), apply_default_css=False, elem_classes=kind,
                   rows=size[0], columns=size[1], names=names, colours=colours, numbers=numbers, opacity=0.6,
                   **props)  # fmt: skip


def box_board(names: Sequence[str], size: Size) -> gr.HTML:
    """A canvas of named boxes; its value is what the HTTP API takes: [[class, x, y, w, h], ...] in 0..1."""
    none: Any = []
    return gr.HTML(none, html_template="", js_on_load=_script("boxes.js"), apply_default_css=False,
                   elem_classes="limner-boxes", rows=size[0], columns=size[1], names=list(names),
                   colours=palette(len(names)))  # fmt: skip


def _script(name: str) -> str:
    return "".join((_HERE / part).read_text(encoding="utf-8") for part in ("dom.js", name))


def told(cells: npt.NDArray[Any], picture: Image.Image | None = None) -> dict[str, Any]:
    """The value of a board: cells (H, W), and the picture below them."""
    shown = None if picture is None else f"data:image/png;base64,{as_text(picture)}"
    rows, columns = cells.shape
    encoded = base64.b64encode(cells.astype(np.uint8).tobytes()).decode()
    return {"rows": rows, "columns": columns, "cells": encoded, "picture": shown}


def cells_of(value: Any, name: str, limits: Limits) -> Cells:
    """The cells (H, W) of a board's value. Raises LimnerError for another form, or for too many."""
    try:
        size = (int(value["rows"]), int(value["columns"]))
        if not all(1 <= side <= limits.side for side in size):
            raise ValueError
        return np.frombuffer(base64.b64decode(value["cells"], validate=True), np.uint8).reshape(size)
    except (TypeError, KeyError, ValueError, binascii.Error):
        raise LimnerError(f"{name}: should be rows, columns, and the cells of a canvas in base64") from None
