"""Compare: the same picture over any two controls, side by side on the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import gradio as gr

from limner.core.path import SPACINGS
from limner.core.samplers import SAMPLERS
from limner.errors import LimnerError
from limner.studio.engine import Engine
from limner.studio.jobs import Cancelled, Job, Request
from limner.studio.page import markup
from limner.studio.page.controls import Controls
from limner.studio.page.sessions import Sessions
from limner.studio.reading import size_of

MOST = 8
"""Values of an axis."""
AHEAD = 8
"""Cells that are asked for at once."""
NOTHING = "(nothing)"


class Compare:
    """The tab of one model; what neither axis says is as the controls of Draw are."""

    def __init__(self, engine: Engine, sessions: Sessions, name: str, controls: Controls) -> None:
        self.engine, self.sessions, self.name, self.controls = engine, sessions, name, controls
        self.axes = _axes(engine, controls)
        names = list(self.axes)
        gr.Markdown("All else is as chosen under Draw. Values are parted by commas; one a line where they hold commas.")
        pairs = []
        for said, start in (("Across", names[0]), ("Down", names[1])):
            with gr.Row():
                axis = gr.Dropdown([*names, NOTHING], value=start, label=said, scale=1, min_width=140)
                values = gr.Textbox(self._usual(start), label=f"{said}: values", lines=1, max_lines=MOST, scale=3)
                axis.change(self._usual, axis, values, queue=False, api_visibility="private")
            pairs += [axis, values]
        with gr.Row():
            start_button = gr.Button("Compare", variant="primary", elem_classes="limner-compare")
            stop = gr.Button("Stop", variant="stop")
        status = gr.HTML(elem_classes="limner-told")
        grid = gr.HTML(elem_classes="limner-compared")
        start_button.click(self._compare, [*pairs, *controls.components], [status, grid], concurrency_limit=None,
                           show_progress="hidden", api_name=f"compare_{name}")  # fmt: skip
        stop.click(sessions.stop, None, None, queue=False, api_visibility="private")

    def _usual(self, axis: str) -> str:
        """Values to begin with."""
        return "" if axis == NOTHING else self.axes[axis][1]

    def _compare(self, request: gr.Request, x_axis: str, x_values: str, y_axis: str, y_values: str,
                 *values: Any) -> Iterator[tuple[Any, Any]]:  # fmt: skip
        try:
            across, down = self._values(x_axis, x_values), self._values(y_axis, y_values)
            if x_axis == y_axis != NOTHING:
                raise LimnerError(f"both axes are {x_axis.lower()}; choose another for one of them")
            base = self.controls.asked(values).options | {"num": 1, "model": self.name}
            wanted = [self.engine.request(**self._told(self._told(base, x_axis, x), y_axis, y))
                      for y in down for x in across]  # fmt: skip
            jobs: list[Job] = []
            with ExitStack() as held:
                for done in range(len(wanted)):
                    while len(jobs) < min(len(wanted), done + AHEAD):
                        jobs.append(self.engine.submit(wanted[len(jobs)]))
                        held.enter_context(self.sessions.holding(request, jobs[-1]))
                    jobs[done].pictures()
                    cells = [self._cell(job, each) for job, each in zip(jobs, wanted[: done + 1], strict=False)]
                    share = (done + 1) / len(wanted)
                    yield (
                        markup.status(f"{done + 1} of {len(wanted)} drawn.", share),
                        _table((x_axis, across), (y_axis, down), cells),
                    )
        except Cancelled:
            yield markup.status("Stopped."), gr.skip()
        except LimnerError as error:
            yield markup.wrong(error), gr.skip()

    def _values(self, axis: str, text: str) -> list[Any]:
        """The values of an axis. Raises LimnerError for one that the axis doesn't take, for none and for too many."""
        if axis == NOTHING:
            return [""]
        if axis not in self.axes:
            raise LimnerError(f"axis '{axis}': there is none such here")
        read = self.axes[axis][0]
        parts = text.splitlines() if "\n" in text.strip() else text.split(",")
        words = [part.strip() for part in parts if part.strip()]
        if not 1 <= len(words) <= MOST:
            raise LimnerError(f"{axis.lower()}: {len(words)} values, should be 1 to {MOST}")
        try:
            return [read(word) for word in words]
        except ValueError:
            raise LimnerError(f"{axis.lower()}: '{text.strip()}' should be numbers with commas between") from None

    def _told(self, options: dict[str, Any], axis: str, value: Any) -> dict[str, Any]:
        """The options with one of them as the axis says."""
        if axis == NOTHING:
            return options
        key = self.axes[axis][2]
        if key in ("label", "text", "negative_text"):
            return options | {"conditions": {**options["conditions"], key: value}}
        if key == "size":
            value = size_of(value, self.controls.generator, self.engine.limits)
        if key in ("low", "high"):
            low, high = options["interval"]
            return options | {"interval": (value, high) if key == "low" else (low, value)}
        return options | {key: value}

    def _cell(self, job: Job, wanted: Request) -> str:
        (picture,) = job.pictures()
        facts = self.engine.facts(wanted) | {"index": picture.index, **picture.facts}
        said = f"{picture.caption or 'picture'}, seed {wanted.seed}, {wanted.settings.steps} steps"
        return markup.image(picture.pixels, f"{said}, guidance {wanted.settings.guidance:g}", facts)


def _table(across: tuple[str, Sequence[Any]], down: tuple[str, Sequence[Any]], cells: Sequence[str]) -> str:
    width = len(across[1])
    rows = [
        (_said(value), [*cells[k * width : (k + 1) * width], *[""] * (width - len(cells[k * width : (k + 1) * width]))])
        for k, value in enumerate(down[1])
    ]
    named = [name.lower() for name, _ in (across, down) if name != NOTHING]
    caption = " against ".join(named) or "one picture"
    return markup.table([_said(value) for value in across[1]], rows, "", caption[:1].upper() + caption[1:])


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _axes(engine: Engine, controls: Controls) -> dict[str, tuple[Callable[[str], Any], str, str]]:
    """By the axis's name: how a value is read, the values to begin with, and the option of `Engine.request`."""
    kinds, classes = controls.generator.modalities, controls.generator.classes
    numbers: dict[str, tuple[Callable[[str], Any], str, str]] = {}
    if kinds:
        numbers["Guidance"] = (float, "1, 2, 4", "guidance")
    numbers["Steps"] = (int, "5, 10, 20", "steps")
    numbers["Seed"] = (int, "0, 1, 2, 3", "seed")
    if "label" in kinds:
        numbers["Class"] = (str, "\n".join(classes[:4]), "label")
    if "text" in kinds:
        numbers["Caption"] = (str, "", "text")
        numbers["Not this"] = (str, "", "negative_text")
    numbers["Solver"] = (str, ", ".join(list(SAMPLERS)[:4]), "sampler")
    numbers["Spacing"] = (str, ", ".join(SPACINGS[:4]), "spacing")
    if kinds:
        numbers["Rescale"] = (float, "0, 0.35, 0.7", "rescale")
        numbers["Guide from time"] = (float, "0, 0.2, 0.4", "low")
        numbers["Guide up to time"] = (float, "0.6, 0.8, 1", "high")
    numbers["Eta"] = (float, "0, 0.5, 1", "eta")
    if controls.name in engine.shelf.guides:
        numbers["Classifier guidance"] = (float, "0, 1, 2, 4", "classifier_scale")
    numbers["Strength"] = (float, "0.3, 0.5, 0.7, 0.9", "strength")
    numbers["Size"] = (str, ", ".join(controls.sizes[:3]), "size")
    if len(engine.shelf.generators) > 1:
        numbers["Model"] = (str, "\n".join(list(engine.shelf.generators)[:MOST]), "model")
    return numbers
