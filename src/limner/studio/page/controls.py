"""The controls of one model: its conditions, how to draw, and how many; as a request for the engine, and back."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import gradio as gr

from limner.core.path import SPACINGS
from limner.core.samplers import SAMPLERS
from limner.redraw import Repeat
from limner.settings import STOCHASTIC
from limner.studio.engine import Engine
from limner.studio.page.modalities import Modality, modalities_of

MOST_SEED = 2**31 - 1


@dataclass(frozen=True)
class Asked:
    """What the controls say: options of `Engine.request`."""

    conditions: dict[str, Any]
    settings: dict[str, Any]
    num: int
    seed: int
    first: int

    @property
    def options(self) -> dict[str, Any]:
        return {"conditions": self.conditions, "num": self.num, "seed": self.seed, "first": self.first, **self.settings}


class Controls:
    """Made inside the page that is being built; `components` in order are the inputs of every event."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name = engine, name
        self.generator = engine.shelf.generators[name]
        self.own = engine.settings(name)
        self.modalities: list[Modality] = [kind(self.generator) for kind in modalities_of(self.generator)]
        self.settings: dict[str, Any] = {}
        self._plain()
        with gr.Accordion("Advanced", open=False):
            self._advanced()
        conditions = [component for modality in self.modalities for component in modality.components]
        self.components = [*conditions, self.num, self.seed, self.first, *self.settings.values()]

    def _plain(self) -> None:
        limits = self.engine.limits
        guided = bool(self.generator.modalities)
        least, greatest = self.generator.guidance_range or (0, 10)
        with gr.Row():
            self.num = gr.Slider(1, limits.num, min(4, limits.num), step=1, label="Pictures")
            if guided:
                self.settings["guidance"] = gr.Slider(
                    least,
                    greatest,
                    self.own.guidance,
                    step=0.1,
                    label="Guidance",
                    info="1 is off; more keeps closer to what you ask.",
                )
        with gr.Row():
            most = min(limits.steps, max(100, self.own.steps))
            self.settings["steps"] = gr.Slider(1, most, self.own.steps, step=1, label="Steps")
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MOST_SEED,
                                  info="The same seed draws the same pictures.")  # fmt: skip
            dice = gr.Button("New seed", min_width=80, scale=0)
            dice.click(lambda: secrets.randbelow(MOST_SEED), None, self.seed, api_visibility="private", queue=False)

    def _advanced(self) -> None:
        self.settings["sampler"] = gr.Dropdown(list(SAMPLERS), value=self.own.sampler, label="Solver")
        self.settings["spacing"] = gr.Dropdown(
            list(dict.fromkeys([self.own.spacing, *SPACINGS])), value=self.own.spacing, label="Spacing of the steps"
        )
        if self.generator.modalities:
            low, high = self.own.interval
            self.settings["low"] = gr.Slider(
                0, 1, low, step=0.01, label="Guide from time", info="0 is the picture, 1 noise."
            )
            self.settings["high"] = gr.Slider(0, 1, high, step=0.01, label="Guide up to time")
            self.settings["rescale"] = gr.Slider(0, 1, self.own.rescale, step=0.05, label="Rescale contrast",
                                                 info="Against burnt colours.")  # fmt: skip
        self.settings["eta"] = gr.Number(None, label="Eta", minimum=0, info=f"Noise of {' and '.join(STOCHASTIC)}.")
        if self.name in self.engine.shelf.guides:
            self.settings["classifier_scale"] = gr.Slider(
                0, 10, 0, step=0.1, label="Classifier guidance", info="0 is off."
            )
        self.first = gr.Number(0, label="Number of the first picture", precision=0, minimum=0)

    def asked(self, values: Sequence[Any]) -> Asked:
        """What the controls' values say."""
        left = list(values)
        conditions: dict[str, Any] = {}
        for modality in self.modalities:
            count = len(modality.components)
            conditions |= modality.options(*left[:count])
            left = left[count:]
        num, seed, first, *rest = left
        settings = dict(zip(self.settings, rest, strict=True))
        if "low" in settings:
            settings["interval"] = (settings.pop("low"), settings.pop("high"))
        if settings["sampler"] not in STOCHASTIC or settings["eta"] is None:
            settings.pop("eta")
        return Asked(conditions, settings, int(num or 1), int(seed or 0), int(first or 0))

    def restore(self, repeat: Repeat) -> list[Any]:
        """The controls' values that draw this again. Raises LimnerError unless this model drew it."""
        repeat.check(self.generator, self.name)
        values = [value for modality in self.modalities for value in modality.restore(repeat)]
        settings: dict[str, Any] = asdict(self.own) | dict(repeat.settings)
        settings["low"], settings["high"] = settings["interval"]
        return [*values, repeat.num, repeat.seed, repeat.first, *(settings[name] for name in self.settings)]
