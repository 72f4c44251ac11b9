"""Understand: one picture on its way from noise, where each word acted, and its nearest training pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np

from limner.errors import LimnerError
from limner.studio.engine import Engine
from limner.studio.insight import Insight, Memory, insight, overlaid
from limner.studio.jobs import Cancelled
from limner.studio.page import markup
from limner.studio.page.controls import Controls
from limner.studio.page.draw import told
from limner.studio.page.sessions import Sessions

SIDE = 96


class Understand:
    """The tab of one model; the picture is the first that Draw would draw."""

    def __init__(self, engine: Engine, sessions: Sessions, name: str, controls: Controls) -> None:
        self.engine, self.sessions, self.name, self.controls = engine, sessions, name, controls
        self.memory = Memory(engine.shelf.generators[name])
        gr.Markdown("The first picture of what is chosen under Draw.")
        with gr.Row():
            look = gr.Button("Look", variant="primary", elem_classes="limner-look")
            near = gr.Button("Nearest training pictures", interactive=False, elem_classes="limner-near")
            stop = gr.Button("Stop", variant="stop")
        status = gr.HTML(elem_classes="limner-told")
        shown = gr.HTML(elem_classes="limner-way")
        nearest = gr.HTML(elem_classes="limner-nearest")
        drawn = gr.State(None)
        look.click(self._look, controls.components, [status, shown, drawn, near, nearest], concurrency_limit=None,
                   show_progress="hidden", api_visibility="private")  # fmt: skip
        near.click(self._near, drawn, [status, nearest], concurrency_limit=1, concurrency_id="nearest",
                   show_progress="hidden", api_visibility="private")  # fmt: skip
        stop.click(sessions.stop, None, None, queue=False, api_visibility="private")

    def _look(self, request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        try:
            asked: dict[str, Any] = self.controls.asked(values).options | {"model": self.name, "num": 1}
            wanted = self.engine.request(**asked)
            guide = self.engine.shelf.guides.get(self.name)
            job = self.engine.errand(self.name, lambda generator, tell: insight(generator, wanted, guide, tell))
            with self.sessions.holding(request, job):
                for progress in job.events():
                    yield told(progress, self.engine.waiting), *([gr.skip()] * 4)
                found: Insight = job.done.result()
            button = gr.Button(interactive=True)
            yield markup.status("Drawn."), way(found), found.picture.pixels, button, ""
        except Cancelled:
            yield markup.status("Stopped."), *([gr.skip()] * 4)
        except LimnerError as error:
            yield markup.wrong(error), *([gr.skip()] * 4)

    def _near(self, pixels: np.ndarray | None) -> Iterator[tuple[Any, Any]]:
        if pixels is None:
            yield markup.status("Look at a picture first."), gr.skip()
            return
        yield markup.status("Comparing with the training pictures; the first time takes a while."), gr.skip()
        try:
            found = self.memory.nearest(pixels)
        except LimnerError as error:
            yield markup.wrong(error), gr.skip()
            return
        figures = [markup.figure(markup.image(pixels, "the picture drawn", side=SIDE), "drawn")]
        figures += [markup.figure(markup.image(each, f"training picture {k + 1} in nearness", side=SIDE), f"{far:.2f}")
                    for k, (each, far) in enumerate(found)]  # fmt: skip
        said = "Nearest training pictures, by distance in features; 1 is usual between two of them, 0 is a copy"
        yield markup.status("Compared."), markup.heading(said) + markup.row(figures, said)


def way(found: Insight) -> str:
    """The film strips and, where there are any, the words."""
    states = [markup.figure(markup.image(f.x, f"noisy picture after step {f.step}", side=SIDE), f"t {f.t:.2f}")
              for f in found.frames]  # fmt: skip
    guesses = [markup.figure(markup.image(f.x0, f"expected picture at step {f.step}", side=SIDE), f"step {f.step}")
               for f in found.frames]  # fmt: skip
    parts = [markup.heading("From noise to picture"), markup.strip(states, "the noisy picture, step by step"),
             markup.heading("What the model expects it to become"),
             markup.strip(guesses, "the expected picture, step by step")]  # fmt: skip
    if found.words:
        pixels = found.picture.pixels
        words = [markup.figure(markup.image(overlaid(pixels, map_), f"where '{word}' acted", side=SIDE), word)
                 for word, map_ in found.words]  # fmt: skip
        parts += [markup.heading("Where each word acted (cross-attention, all steps)"),
                  markup.row(words, "the picture, bright where each word acted")]  # fmt: skip
    return "".join(parts)
