"""Watch: a training live from its directory, and its previews as a time-lapse."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from limner.errors import LimnerError
from limner.studio.page import markup
from limner.studio.watching import Watched, watch

EVERY_S = 2.0
FRAME_S = 0.5


class Watch:
    """The tab, over runs by name: a client chooses a name, never a path."""

    def __init__(self, runs: Mapping[str, Path]) -> None:
        self.runs = runs
        names = list(runs)
        self.name = gr.Dropdown(names, value=names[0], label="Run")
        self.status = gr.HTML(elem_classes="limner-training")
        with gr.Row():
            axes: dict[str, Any] = {"x": "images", "y": "value", "color": "what", "height": 260, "min_width": 300}
            self.loss = gr.LinePlot(
                title="Loss by noise band", x_title="images", y_title="loss", color_title="t", **axes
            )
            self.held_out = gr.LinePlot(title="Held-out loss", x_title="images", y_title="loss", color_title="", **axes)
            self.speed = gr.LinePlot(
                title="Images a second", x_title="images", y_title="images/s", color_title="", **axes
            )
        with gr.Row():
            self.frame = gr.Slider(0, 1, 0, step=1, label="Preview", scale=4)
            self.play = gr.Button("Play", scale=1, min_width=80)
        self.preview = gr.HTML(elem_classes="limner-preview")
        self.seen = gr.State(None)
        figures = [self.status, self.loss, self.held_out, self.speed, self.frame, self.preview, self.seen]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        timer = gr.Timer(EVERY_S)
        timer.tick(self._look, [self.name, self.seen, self.frame], figures, **quiet)
        self.name.change(lambda name: self._look(name, None, None), self.name, figures, **quiet)
        self.frame.input(self._shown, [self.name, self.frame], self.preview, **quiet)
        self.play.click(self._lapse, self.name, [self.frame, self.preview], **quiet)

    def _look(self, name: str, seen: Any, frame: float | None) -> tuple[Any, ...]:
        """Figures and pictures, where there are new ones. A page that shows the newest preview goes on to the next."""
        try:
            found = watch(self.runs[name])
        except (KeyError, LimnerError) as error:
            said = error if isinstance(error, LimnerError) else LimnerError(f"run '{name}': there is none such here")
            return markup.wrong(said), *([gr.skip()] * 6)
        now = (name, len(found.lines), found.lines[-1]["images"] if found.lines else 0, len(found.previews))
        if seen is not None and tuple(seen) == now:
            return _told(found), *([gr.skip()] * 6)
        last = len(found.previews) - 1
        follows = seen is None or seen[0] != name or frame is None or frame >= seen[3] - 1
        shown = last if follows else int(frame or 0)
        slider = gr.Slider(0, max(last, 1), max(shown, 0), step=1, interactive=last > 0)
        bands = {**found.bands, "loss": "all"}
        return (_told(found), _frame(found, bands), _frame(found, {"held_out_loss": "held out", "loss": "training"}),
                _frame(found, {"images_per_s": "images/s"}), slider, _preview(found, shown), now)  # fmt: skip

    def _shown(self, name: str, frame: float) -> str:
        return _preview(watch(self.runs[name]), int(frame)) if name in self.runs else ""

    def _lapse(self, name: str) -> Iterator[tuple[Any, str]]:
        if name not in self.runs:
            return
        found = watch(self.runs[name])
        for number in range(len(found.previews)):
            yield gr.Slider(value=number), _preview(found, number)
            time.sleep(FRAME_S)


def _told(found: Watched) -> str:
    if not found.lines:
        return markup.status("Nothing is written yet; the first line comes after some hundreds of pictures.")
    last = found.lines[-1]
    words = [f"{last['images']:,.0f} images", f"{markup.seconds(float(last.get('seconds', 0)))} of training"]
    for name, said in (("loss", "loss"), ("held_out_loss", "held-out loss"), ("images_per_s", "images a second")):
        if isinstance(last.get(name), int | float):
            words.append(f"{said} {last[name]:.4g}")
    if found.left_s is not None:
        words.append(f"{markup.seconds(found.left_s)} left")
    finished = found.share is not None and found.share >= 1
    state = "Training: " if found.going_on else "Finished: " if finished else "Not going on now: "
    return markup.status(state + ", ".join(words) + ".", found.share)


def _frame(found: Watched, names: Mapping[str, str]) -> pd.DataFrame:
    """Lines of metrics in the long form that plots read."""
    rows = [(line["images"], said, line[name]) for line in found.lines for name, said in names.items()
            if isinstance(line.get(name), int | float)]  # fmt: skip
    return pd.DataFrame(rows, columns=pd.Index(["images", "what", "value"]))


def _preview(found: Watched, number: int) -> str:
    if not 0 <= number < len(found.previews):
        return ""
    images, path = found.previews[number]
    return markup.figure(markup.file(path, f"pictures after {images:,} images"), f"after {images:,} images")
