"""Draw: ask, watch the pictures form, stop, keep them, take a picture's recipe back."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from limner.errors import LimnerError
from limner.generator import to_pil
from limner.outputs import CHUNK, Picture
from limner.redraw import Repeat
from limner.studio.engine import Engine
from limner.studio.jobs import Cancelled, Progress
from limner.studio.page import markup
from limner.studio.page.controls import Controls
from limner.studio.page.sessions import Sessions

KEPT = 48
"""Pictures that an open page keeps; the oldest go."""


@dataclass(frozen=True)
class Kept:
    """A picture of the gallery: PNG with its recipe inside, the words below it, and the recipe."""

    image: Image.Image
    words: str
    facts: dict[str, Any]

    @staticmethod
    def of(picture: Picture, facts: dict[str, Any]) -> Kept:
        """facts: of its drawing. Gradio writes `info` into the PNG that it shows and that is downloaded."""
        whole = {**facts, "index": picture.index, **picture.facts}
        image = to_pil(picture.pixels[None])[0]
        image.info[CHUNK] = json.dumps(whole, ensure_ascii=False)
        return Kept(image, f"{picture.caption} · seed {facts['seed']}, {picture.index}".lstrip(" ·"), whole)


class Draw:
    """The tab of one model."""

    def __init__(self, engine: Engine, sessions: Sessions, name: str) -> None:
        self.engine, self.sessions, self.name = engine, sessions, name
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self.controls = Controls(engine, name)
                with gr.Row():
                    self.start = gr.Button("Draw", variant="primary", elem_classes="limner-start")
                    self.stop = gr.Button("Stop", variant="stop", elem_classes="limner-stop")
            with gr.Column(scale=3, min_width=280):
                self.status = gr.HTML(markup.status("Ready."), elem_classes="limner-told")
                self.forming = gr.HTML("", elem_classes="limner-forming")
                self.gallery = gr.Gallery(label="Pictures, the newest first", show_label=False, columns=4, format="png",
                                          object_fit="contain", height="auto", elem_classes="limner-gallery",
                                          buttons=["download", "fullscreen"], interactive=False)  # fmt: skip
                with gr.Row():
                    self.take = gr.Button("Use this recipe", interactive=False, size="sm", elem_classes="limner-take")
                    self.onward = gr.Button("Start from this picture", interactive=False, size="sm",
                                            visible=self.controls.start is not None)  # fmt: skip
                    self.upload = gr.UploadButton("Recipe from a PNG", file_types=[".png"], type="binary", size="sm")
                self.recipe = gr.JSON(label="Recipe of the chosen picture", visible=False, elem_classes="limner-recipe")
        self.kept, self.chosen = gr.State([]), gr.State(None)
        self._wire()

    def _wire(self) -> None:
        shown = [self.status, self.forming, self.gallery, self.kept]
        self.start.click(self._draw, [self.kept, *self.controls.components], shown, concurrency_limit=None,
                         show_progress="hidden", api_name=f"draw_{self.name}")  # fmt: skip
        self.stop.click(self.sessions.stop, None, None, queue=False, api_visibility="private")
        chosen = [self.recipe, self.chosen, self.take, self.onward]
        self.gallery.select(self._choose, self.kept, chosen, api_visibility="private")
        given = [self.status, *self.controls.components]
        self.take.click(self._give_back, self.chosen, given, api_visibility="private")
        self.upload.upload(self._read, self.upload, given, api_visibility="private")
        if self.controls.start is not None:
            below = [self.status, self.controls.start.board]
            self.onward.click(self._start_from, self.chosen, below, api_visibility="private")

    def _draw(self, request: gr.Request, kept: list[Kept], *values: Any) -> Iterator[tuple[Any, ...]]:
        try:
            asked = self.controls.asked(values)
            wanted = self.engine.request(model=self.name, previews=True, **asked.options)
            job = self.engine.submit(wanted)
            with self.sessions.holding(request, job):
                for progress in job.events():
                    yield told(progress, self.engine.waiting), forming(progress), gr.skip(), gr.skip()
                facts = self.engine.facts(wanted)
                kept = [*(Kept.of(picture, facts) for picture in job.pictures()), *kept][:KEPT]
            took = markup.status(f"{wanted.num} drawn in {markup.seconds(job.took_s)}.")
            yield took, "", gr.Gallery([(each.image, each.words) for each in kept], selected_index=None), kept
        except Cancelled:
            yield markup.status("Stopped."), "", gr.skip(), gr.skip()
        except LimnerError as error:
            yield markup.wrong(error), "", gr.skip(), gr.skip()

    def _choose(self, kept: list[Kept], event: gr.SelectData) -> tuple[Any, ...]:
        if not isinstance(event.index, int) or event.index >= len(kept):
            return (gr.skip(),) * 4
        chosen = kept[event.index]
        return gr.JSON(chosen.facts, visible=True), chosen, gr.Button(interactive=True), gr.Button(interactive=True)

    def _give_back(self, chosen: Kept | None) -> list[Any]:
        return self._restored(lambda: Repeat.of(None if chosen is None else chosen.facts))

    def _start_from(self, chosen: Kept | None) -> tuple[Any, Any]:
        if chosen is None or self.controls.start is None:
            return markup.status("Choose a picture first."), gr.skip()
        return markup.status("It lies below 'Start from a picture'."), self.controls.start.below(chosen.image)

    def _read(self, file: bytes | None) -> list[Any]:
        return self._restored(lambda: Repeat.read(io.BytesIO(file or b""), "the file"))

    def _restored(self, find: Any) -> list[Any]:
        """The status and the controls for a recipe; what is wrong with it is said, and the controls stay."""
        try:
            return [markup.status("The controls are as they were for this picture."), *self.controls.restore(find())]
        except LimnerError as error:
            return [markup.wrong(error), *([gr.skip()] * len(self.controls.components))]


def told(progress: Progress | None, waiting: int) -> str:
    """How far it is, in words and as a bar."""
    if progress is None:
        return markup.status(f"Waiting; {waiting} in the queue." if waiting > 1 else "Beginning.", 0.0)
    left = "" if progress.left_s is None else f", {markup.seconds(progress.left_s)} left"
    return markup.status(f"Step {progress.step} of {progress.total}{left}", progress.step / progress.total)


def forming(progress: Progress | None) -> Any:
    """The pictures as the model now expects them to become."""
    if progress is None:
        return ""
    if progress.previews is None:
        return gr.skip()
    said = f"step {progress.step} of {progress.total}"
    pictures = [markup.image(each, f"forming picture {k + 1}, {said}") for k, each in enumerate(progress.previews)]
    return markup.row(pictures, "pictures while they form")
