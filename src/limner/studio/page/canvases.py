"""Conditions that are painted or uploaded: a semantic map, boxes, a small picture, a picture to paint in."""

from __future__ import annotations

import colorsys
from typing import Any

import gradio as gr
import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from limner.data.transforms import fitted
from limner.errors import LimnerError
from limner.generator import Generator
from limner.redraw import Repeat
from limner.studio.reading import as_told

CANVAS = 320
"""Pixels on the page that a canvas' longer side has."""
Editor = dict[str, Any] | None


def palette(count: int) -> npt.NDArray[np.uint8]:
    """(count, 3) colours that are told apart: the golden angle in hue, in three lightnesses."""
    values = [colorsys.hls_to_rgb(0.618034 * k % 1, (0.45, 0.65, 0.3)[k % 3], 0.75) for k in range(count)]
    return (np.array(values).reshape(-1, 3) * 255).round().astype(np.uint8)


def section_of(generator: Generator, kind: str) -> Any:
    """The recipe's section of a condition."""
    return next(section for section in generator.config.conditions if section.kind == kind)


def canvas_of(generator: Generator) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of the model's pictures, and (width, height) of a canvas on the page, a multiple of it."""
    height, width = generator.config.data.size or (64, 64)
    scale = max(1, CANVAS // max(height, width))
    return (height, width), (width * scale, height * scale)


class SemanticMap:
    """A canvas, a brush for each class in its own colour, and the classes' names beside their colours."""

    def __init__(self, generator: Generator) -> None:
        self.size, canvas = canvas_of(generator)
        classes: tuple[str, ...] = tuple(section_of(generator, "semantic_map").classes or ())
        self.colours = palette(len(classes))
        codes = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in self.colours.tolist()]
        brush = gr.Brush(max(canvas) // 12, list(codes), codes[min(1, len(codes) - 1)], "fixed")
        self.editor = gr.ImageEditor(
            Image.new("RGB", canvas, codes[0]),
            label="Semantic map",
            type="pil",
            image_mode="RGB",
            format="png",
            sources=("upload",),
            transforms=(),
            layers=False,
            canvas_size=canvas,
            fixed_canvas=True,
            height=canvas[1] + 120,
            brush=brush,
            eraser=gr.Eraser(default_size=max(canvas) // 12),
            buttons=[],
            elem_classes="limner-map",
        )  # fmt: skip
        with gr.Row():
            fill = gr.Dropdown(list(classes), value=next(iter(classes), None), label="Fill everything with", scale=3)
            button = gr.Button("Fill", scale=1, min_width=60)
        legend = "".join(f'<li><span style="background:{code}"></span>{_escaped(name)}</li>'
                         for code, name in zip(codes, classes, strict=True))  # fmt: skip
        gr.HTML(f'<ul class="limner-legend" aria-label="colours of the classes">{legend}</ul>')
        whole = {name: Image.new("RGB", canvas, code) for name, code in zip(classes, codes, strict=True)}
        button.click(lambda name: _painted(whole.get(name)), fill, self.editor, api_visibility="private", queue=False)
        self.canvas = canvas
        self.components: list[Any] = [self.editor]

    def options(self, *values: Any) -> dict[str, Any]:
        composite = (values[0] or {}).get("composite")
        if composite is None:
            return {}
        pixels = np.asarray(fitted(composite.convert("RGB"), self.size, Image.Resampling.NEAREST)).astype(int)
        distance = np.abs(pixels[:, :, None] - self.colours.astype(int)).sum(-1)
        return {"semantic_map": Image.fromarray(distance.argmin(-1).astype(np.uint8))}

    def restore(self, repeat: Repeat) -> list[Any]:
        maps = repeat.conditions.get("semantic_map")
        if not maps:
            return [gr.skip()]
        image = Image.fromarray(self.colours[np.asarray(maps[0])])
        return [_painted(image.resize(self.canvas, Image.Resampling.NEAREST))]


class Boxes:
    """A table: the class of each box, and where it lies, in hundredths of the canvas."""

    def __init__(self, generator: Generator) -> None:
        self.names = tuple(section_of(generator, "boxes").classes or ())
        known = ", ".join(self.names[:20])
        gr.Markdown(f"Boxes: a class ({_escaped(known)}), then left, top, width and height in percent.")
        self.components: list[Any] = [
            gr.Dataframe([[self.names[0] if self.names else 0, 25, 25, 50, 50]], label="Boxes", type="array",
                         headers=["class", "left", "top", "width", "height"], interactive=True, column_count=5,
                         datatype=["str", "number", "number", "number", "number"], elem_classes="limner-boxes")
        ]  # fmt: skip

    def options(self, *values: Any) -> dict[str, Any]:
        rows = [row for row in (values[0] if values[0] is not None else []) if str(row[0] or "").strip()]
        try:
            layout = [(str(kind).strip(), *(float(value) / 100 for value in span)) for kind, *span in rows]
        except (TypeError, ValueError):
            raise LimnerError("boxes: left, top, width and height should be numbers") from None
        return {"boxes": [layout]} if layout else {}

    def restore(self, repeat: Repeat) -> list[Any]:
        layouts = repeat.conditions.get("boxes") or [[]]
        rows = [[kind, *(round(100 * value, 2) for value in span)] for kind, *span in layouts[0]]
        return [pd.DataFrame(rows, columns=pd.Index(["class", "left", "top", "width", "height"]))]


class Small:
    """A picture to enlarge, or to vary."""

    def __init__(self, generator: Generator) -> None:
        kinds = generator.modalities
        self.generator = generator
        self.size = section_of(generator, "image").size if "image" in kinds else canvas_of(generator)[0]
        label = "Small picture to enlarge" if "image" in kinds else "Picture to vary"
        self.components: list[Any] = [gr.Image(label=label, type="pil", sources=["upload", "clipboard"], height=220,
                                               image_mode="RGB", buttons=[], format="png")]  # fmt: skip

    def options(self, *values: Any) -> dict[str, Any]:
        return {} if values[0] is None else {"image": as_told(self.generator, values[0], self.size)}

    def restore(self, repeat: Repeat) -> list[Any]:
        found = repeat.conditions.get("image")
        return [found[0].convert("RGB") if found else None]


class Inpaint:
    """A picture, and what is painted over it is drawn anew."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.size, self.canvas = canvas_of(generator)
        self.components: list[Any] = [
            gr.ImageEditor(label="Picture to paint in: upload it, then paint over what is to be drawn anew", type="pil",
                           image_mode="RGBA", format="png", sources=("upload", "clipboard"), transforms=(),
                           layers=False, canvas_size=self.canvas, height=self.canvas[1] + 120, buttons=[],
                           brush=gr.Brush(default_size=max(self.canvas) // 8, colors=["#ff00ff"], color_mode="fixed"),
                           eraser=gr.Eraser(), elem_classes="limner-inpaint")
        ]  # fmt: skip

    def options(self, *values: Any) -> dict[str, Any]:
        background, layers = (values[0] or {}).get("background"), (values[0] or {}).get("layers") or []
        if background is None or not np.asarray(background.convert("RGBA"))[..., 3].any():
            return {}
        painted = np.zeros((background.height, background.width), np.uint8)
        for layer in layers:
            alpha = layer.convert("RGBA").resize(background.size).getchannel("A")
            painted = np.maximum(painted, np.asarray(alpha))
        if not painted.any():
            raise LimnerError("mask: nothing is painted over; paint over what is to be drawn anew")
        levels = np.asarray(fitted(Image.fromarray(painted), self.size))
        mask = Image.fromarray(np.where(levels >= 128, 255, 0).astype(np.uint8))
        return {"image": as_told(self.generator, background, self.size), "mask": mask}

    def restore(self, repeat: Repeat) -> list[Any]:
        image, mask = repeat.conditions.get("image"), repeat.conditions.get("mask")
        if not image or not mask:
            return [None]
        large, hole = (
            each.resize(self.canvas, Image.Resampling.NEAREST) for each in (image[0].convert("RGB"), mask[0])
        )
        layer = Image.new("RGBA", self.canvas, (255, 0, 255, 255))
        layer.putalpha(hole.convert("L"))
        return [{"background": large, "layers": [layer], "composite": None}]


def _painted(image: Image.Image | None) -> Any:
    return gr.skip() if image is None else {"background": image, "layers": [], "composite": image}


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
