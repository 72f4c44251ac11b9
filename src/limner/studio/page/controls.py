"""The controls of one model: its conditions, how to draw, and how many; as a request for the engine, and back."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import gradio as gr

from limner.core.path import SPACINGS
from limner.core.samplers import SAMPLERS
from limner.errors import LimnerError
from limner.redraw import Repeat
from limner.settings import STOCHASTIC
from limner.studio.drawing import expanded
from limner.studio.engine import Engine
from limner.studio.page.canvases import Start, size_of
from limner.studio.page.modalities import Modality, modalities_of
from limner.studio.reading import Size
from limner.studio.reading import size_of as size_told

MOST_SEED = 2**31 - 1
OWN_PICTURE = ("mask", "image", "variation")
"""Conditions that bring a picture themselves."""


@dataclass(frozen=True)
class Asked:
    """What the controls say: options of `Engine.request`."""

    conditions: dict[str, Any]
    settings: dict[str, Any]
    num: int
    seed: int
    first: int
    strength: float | None = None
    size: Size | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"conditions": self.conditions, "num": self.num, "seed": self.seed, "first": self.first,
                "strength": self.strength, "size": self.size, **self.settings}  # fmt: skip


class Controls:
    """Made inside the page that is being built; `components` in order are the inputs of every event."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name = engine, name
        self.generator = engine.shelf.generators[name]
        self.own = engine.settings(name)
        limits = engine.limits
        self.modalities: list[Modality] = [kind(self.generator, limits) for kind in modalities_of(self.generator)]
        self.settings: dict[str, Any] = {}
        self._plain()
        if not any(kind in OWN_PICTURE for kind in self.generator.modalities):
            with gr.Accordion("Start from a picture", open=False, elem_classes="limner-start-fold"):
                self.modalities.append(Start(self.generator, limits))
        with gr.Accordion("Advanced", open=False):
            self._advanced()
        conditions = [component for modality in self.modalities for component in modality.components]
        self.components = [*conditions, self.num, self.seed, self.first, self.size, *self.settings.values()]

    @property
    def start(self) -> Start | None:
        """Where a picture to start from goes, for a model that takes one."""
        return next((each for each in self.modalities if isinstance(each, Start)), None)

    def _plain(self) -> None:
        limits = self.engine.limits
        most = min(limits.steps, max(100, self.own.steps))
        with gr.Row():
            self.num = gr.Slider(1, limits.num, min(4, limits.num), step=1, label="Pictures")
            self.settings["steps"] = gr.Slider(1, most, self.own.steps, step=1, label="Steps")
        if self.generator.modalities:
            least, greatest = self.generator.guidance_range or (0, 10)
            self.settings["guidance"] = gr.Slider(least, greatest, self.own.guidance, step=0.1, label="Guidance",
                                                  info="1 is off; more keeps closer to what you ask.")  # fmt: skip
        with gr.Row(elem_classes="limner-seed"):
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MOST_SEED, scale=3)
            dice = gr.Button("New seed", size="sm", scale=1, min_width=90)
        dice.click(lambda: secrets.randbelow(MOST_SEED), None, self.seed, api_visibility="private", queue=False)

    def _advanced(self) -> None:
        own = size_of(self.generator)
        shrinks = own[0] // self.generator.shape[1]  # of the autoencoder
        self.sizes = sizes_of(own, shrinks * getattr(self.generator.model.network, "factor", 1))
        self.size = gr.Dropdown(self.sizes, value=self.sizes[0], allow_custom_value=True, label="Size",
                                info=f"Width and height. The model learnt from {self.sizes[0]}.")  # fmt: skip
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
        parts = sum(len(modality.components) for modality in self.modalities)
        left, (num, seed, first, size_text, *rest) = list(values[:parts]), values[parts:]
        size = size_told(size_text, self.generator, self.engine.limits)
        conditions: dict[str, Any] = {}
        for modality in self.modalities:
            count = len(modality.components)
            conditions |= modality.options(size or size_of(self.generator), *left[:count])
            left = left[count:]
        strength = conditions.pop("strength", None)
        settings = dict(zip(self.settings, rest, strict=True))
        if "low" in settings:
            settings["interval"] = (settings.pop("low"), settings.pop("high"))
        if settings["sampler"] not in STOCHASTIC or settings["eta"] is None:
            settings.pop("eta")
        return Asked(conditions, settings, int(num or 1), int(seed or 0), int(first or 0), strength, size)

    def restore(self, repeat: Repeat) -> list[Any]:
        """The controls' values that draw this again. Raises LimnerError unless this model drew it, and for what there
        are no controls for."""
        repeat.check(self.generator, self.name)
        values = [value for modality in self.modalities for value in modality.restore(repeat)]
        settings: dict[str, Any] = asdict(self.own) | dict(repeat.settings)
        settings["low"], settings["high"] = settings["interval"]
        height, width = repeat.size or size_of(self.generator)
        found = [*values, repeat.num, repeat.seed, repeat.first, f"{width}x{height}",
                 *(settings[name] for name in self.settings)]  # fmt: skip
        self._refuse_other(repeat, found)
        return found

    def _refuse_other(self, repeat: Repeat, values: list[Any]) -> None:
        """Raises LimnerError where these values of the controls would draw something else than the recipe does."""
        asked = self.asked(values)
        want = self.generator.settings(**repeat.settings)
        have = self.generator.settings(**asked.settings)
        lost = [name for name, value in asdict(want).items() if value != asdict(have)[name]]
        further = ("num", "seed", "first", "strength", "size")
        lost += [name for name in further if getattr(asked, name) != getattr(repeat, name)]
        lost += [name for name in repeat.conditions if name not in asked.conditions]
        for name in ("label", "text"):
            told = repeat.conditions.get(name)
            numbers = [self.generator.classes[k] for k in told or ()] if name == "label" else told
            if (
                told is not None
                and name in asked.conditions
                and expanded(asked.conditions[name], repeat.num) != numbers
            ):
                lost.append(name)
        if lost:
            raise LimnerError(f"{', '.join(lost)}: the page cannot be set to what this picture's recipe says; "
                              "`limner sample --from` draws it again")  # fmt: skip


def sizes_of(own: Size, factor: int) -> list[str]:
    """Sizes to choose from as WIDTHxHEIGHT, the model's own first, all multiples of `factor`."""
    height, width = own
    scales = ((1, 1), (1.5, 1), (1, 1.5), (2, 1), (1, 2), (1.5, 1.5), (2, 2))
    sizes = [(round(width * a / factor) * factor, round(height * b / factor) * factor) for a, b in scales]
    return list(dict.fromkeys(f"{w}x{h}" for w, h in sizes))
