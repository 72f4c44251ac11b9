"""Conditions that are painted, dragged or uploaded: a semantic map, boxes, a small picture, a picture to start from."""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from limner.data.overlays import class_numbers, refuse_classes
from limner.data.transforms import PictureError, fitted
from limner.errors import LimnerError
from limner.generator import Generator
from limner.redraw import Repeat
from limner.studio import reading
from limner.studio.limits import Limits
from limner.studio.page import boards, markup
from limner.studio.reading import Size, as_told

VARY, MARKED = "Vary all of it", "Draw the marked part anew"


def section_of(generator: Generator, kind: str) -> Any:
    """The recipe's section of a condition."""
    return next(section for section in generator.config.conditions if section.kind == kind)


def size_of(generator: Generator) -> Size:
    """(height, width) of the pictures that the model learnt from."""
    return generator.config.data.size or (64, 64)


class SemanticMap:
    """A canvas with the classes' names and colours, brush and fill."""

    def __init__(self, generator: Generator, limits: Limits) -> None:
        self.size, self.limits = size_of(generator), limits
        self.classes: tuple[str, ...] = tuple(section_of(generator, "semantic_map").classes or ())
        board = boards.class_board(self.classes, self.size)
        upload = gr.UploadButton("Map from a PNG of class numbers", file_types=[".png"], type="binary", size="sm")
        wrong = gr.HTML(elem_classes="limner-said")
        upload.upload(self._read, upload, [board, wrong], api_visibility="private")
        self.components: list[Any] = [board]

    def _read(self, raw: bytes) -> tuple[Any, str]:
        try:
            reading.decoded(raw, "semantic_map", self.limits)  # its bounds
            numbers = class_numbers(raw)
            refuse_classes(np.asarray(numbers), len(self.classes) or None)
        except (LimnerError, PictureError) as error:
            return gr.skip(), markup.wrong(error)
        return boards.told(np.asarray(fitted(numbers, self.size, Image.Resampling.NEAREST))), ""

    def options(self, canvas: Size, *values: Any) -> dict[str, Any]:
        if values[0] is None:
            return {}
        cells = boards.cells_of(values[0], "semantic_map", self.limits)
        try:
            refuse_classes(cells, len(self.classes) or None)
        except PictureError as error:
            raise LimnerError(str(error)) from None
        return {"semantic_map": fitted(Image.fromarray(cells), canvas, Image.Resampling.NEAREST)}

    def restore(self, repeat: Repeat) -> list[Any]:
        maps = repeat.conditions.get("semantic_map")
        if not maps:
            return [None]
        return [boards.told(np.asarray(maps[0]))]


class Boxes:
    """Boxes dragged on a canvas, each of a class."""

    def __init__(self, generator: Generator, _: Limits) -> None:
        names = section_of(generator, "boxes").names
        self.components: list[Any] = [boards.box_board(names, size_of(generator))]

    def options(self, canvas: Size, *values: Any) -> dict[str, Any]:
        boxes = values[0] or []
        if not isinstance(boxes, list) or not all(isinstance(box, list | tuple) for box in boxes):
            raise LimnerError("boxes: should be a list of [class, x, y, w, h]")
        return {"boxes": [[tuple(box) for box in boxes]]} if boxes else {}

    def restore(self, repeat: Repeat) -> list[Any]:
        layouts = repeat.conditions.get("boxes") or [[]]
        return [[list(box) for box in layouts[0]]]


class Small:
    """A picture to enlarge, or to vary; with a strength below 1 drawing starts from it, noised so far."""

    def __init__(self, generator: Generator, _: Limits) -> None:
        self.generator = generator
        label = "Small picture to enlarge" if "image" in generator.modalities else "Picture to vary"
        image = gr.Image(label=label, type="pil", sources=["upload", "clipboard"], height=220, image_mode="RGB",
                         buttons=[], format="png")  # fmt: skip
        strength = _strength("1 draws from noise alone; less starts from the picture, and keeps more of it.")
        self.components: list[Any] = [image, strength]

    def options(self, canvas: Size, *values: Any) -> dict[str, Any]:
        image, strength = values
        if image is None:
            return {}
        found: dict[str, Any] = {"image": as_told(self.generator, image, reading.small_of(self.generator, canvas))}
        return found if strength is None or strength >= 1 else {**found, "strength": strength}

    def restore(self, repeat: Repeat) -> list[Any]:
        found = repeat.conditions.get("image")
        return [found[0].convert("RGB") if found else None, 1.0 if repeat.strength is None else repeat.strength]


class Start:
    """A picture to paint in, where it is marked, or to vary as a whole (SDEdit). Every model can."""

    def __init__(self, generator: Generator, limits: Limits) -> None:
        self.generator, self.limits, self.size = generator, limits, size_of(generator)
        self.usual = (MARKED, 1.0) if "mask" in generator.modalities else (VARY, 0.6)
        with gr.Row():
            upload = gr.UploadButton("Choose a picture", file_types=["image"], type="binary", size="sm",
                                     elem_classes="limner-start-from")  # fmt: skip
            drop = gr.Button("No picture", size="sm")
        self.wrong = gr.HTML(elem_classes="limner-said")
        self.board = boards.hole_board(self.size)
        self.how = gr.Radio([MARKED, VARY], value=self.usual[0], label="What to do with it")
        self.strength = _strength("How much to change: 1 keeps nothing.", self.usual[1])
        self.components: list[Any] = [self.board, self.how, self.strength]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        upload.upload(self._read, upload, [self.board, self.wrong], **quiet)
        drop.click(lambda: (self.below(None), ""), None, [self.board, self.wrong], queue=False, **quiet)
        self.how.input(lambda how: 1.0 if how == MARKED else 0.6, self.how, self.strength, queue=False, **quiet)

    def _read(self, raw: bytes) -> tuple[Any, str]:
        try:
            return self.below(reading.decoded(raw, "the picture", self.limits)), ""
        except LimnerError as error:
            return gr.skip(), markup.wrong(error)

    def below(self, picture: Image.Image | None) -> dict[str, Any]:
        """The board's value with this picture and nothing marked. A large picture is kept at twice the model's size,
        for a canvas of that size."""
        if picture is not None:
            height, width = self.size
            large = picture.height >= 2 * height and picture.width >= 2 * width
            picture = as_told(self.generator, picture, (2 * height, 2 * width) if large else self.size)
        return boards.told(np.zeros(self.size, np.uint8), picture)

    def options(self, canvas: Size, *values: Any) -> dict[str, Any]:
        board, how, strength = values
        shown = board.get("picture") if isinstance(board, dict) else None
        if not isinstance(shown, str):
            return {}
        picture = as_told(self.generator, reading.picture(shown, "image", self.limits), canvas)
        if how == VARY:
            return {"image": picture, "strength": strength}
        marked = boards.cells_of(board, "mask", self.limits) > 0
        if not marked.any():
            raise LimnerError("mask: nothing is marked; paint over what is to be drawn anew")
        mask = fitted(Image.fromarray(np.where(marked, 255, 0).astype(np.uint8)), canvas, Image.Resampling.NEAREST)
        found = {"image": picture, "mask": mask}
        return found if strength is None or strength >= 1 else {**found, "strength": strength}

    def restore(self, repeat: Repeat) -> list[Any]:
        image, mask = repeat.conditions.get("image"), repeat.conditions.get("mask")
        if not image:
            return [self.below(None), *self.usual]
        marked = np.asarray(mask[0].convert("L")) >= 128 if mask else np.zeros(self.size, bool)
        strength = 1.0 if repeat.strength is None else repeat.strength
        return [boards.told(marked, image[0]), MARKED if mask else VARY, strength]


def _strength(info: str, value: float = 1.0) -> gr.Slider:
    return gr.Slider(0.05, 1, value, step=0.05, label="Strength", info=info)
