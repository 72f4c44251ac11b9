"""One small class for each thing that a model can be told: it makes its controls, and turns them into what
`Generator.stream` takes. A model's page shows those of its own modalities and no others."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import gradio as gr

from limner.generator import Generator
from limner.redraw import Repeat
from limner.studio.limits import Limits
from limner.studio.page.canvases import Boxes, SemanticMap, Small, Start
from limner.studio.reading import Size

CHIPS = 40
"""Classes up to which each is a chip; more of them are searched in a list."""


class Modality(Protocol):
    """components: the controls, made inside the page that is being built."""

    components: list[Any]

    def __init__(self, generator: Generator, limits: Limits, /) -> None: ...

    def options(self, canvas: Size, *values: Any) -> dict[str, Any]:
        """Options of `Generator.stream` from the controls' values, pictures fitted to a canvas of this (height, width);
        what is left empty is not among them."""
        ...

    def restore(self, repeat: Repeat) -> list[Any]:
        """The controls' values that draw this again."""
        ...


class Label:
    """Classes as chips, several of them in rotation; none stands for all."""

    def __init__(self, generator: Generator, _: Limits) -> None:
        self.classes = generator.classes
        words: dict[str, Any] = {"label": "Classes", "info": "Several are drawn in turn; none chosen means every one."}
        if len(self.classes) <= CHIPS:
            chosen: Any = gr.CheckboxGroup(list(self.classes), elem_classes="limner-chips", **words)
        else:
            chosen = gr.Dropdown(list(self.classes), multiselect=True, filterable=True, **words)
        self.components: list[Any] = [chosen]

    def options(self, canvas: Size, *values: Any) -> dict[str, Any]:
        (chosen,) = values
        return {"label": list(chosen)} if chosen else {}

    def restore(self, repeat: Repeat) -> list[Any]:
        numbers = dict.fromkeys(repeat.conditions.get("label", ()))
        return [[self.classes[number] for number in numbers if number < len(self.classes)]]


class Text:
    """A caption, or several, one a line; and what the picture should not be, where the model's guidance knows that."""

    def __init__(self, generator: Generator, _: Limits) -> None:
        caption = gr.Textbox(label="Caption", lines=2, max_lines=6, info="One a line; several are drawn in turn.")
        self.components: list[Any] = [caption]
        if "negative_text" in inspect.signature(generator.stream).parameters:
            self.components.append(gr.Textbox(label="Not this", info="A caption to lead away from."))

    def options(self, canvas: Size, *values: Any) -> dict[str, Any]:
        captions = [line.strip() for line in (values[0] or "").splitlines() if line.strip()]
        found: dict[str, Any] = {"text": captions} if captions else {}
        if len(values) > 1 and (values[1] or "").strip():
            found["negative_text"] = values[1].strip()
        return found

    def restore(self, repeat: Repeat) -> list[Any]:
        captions = dict.fromkeys(str(text) for text in repeat.conditions.get("text", ()) if text)
        against = [str(text) for text in repeat.conditions.get("negative_text", ()) if text]
        return ["\n".join(captions), *([against[0] if against else ""] if len(self.components) > 1 else [])]


MODALITIES: dict[str, type[Modality]] = {
    "label": Label,
    "text": Text,
    "semantic_map": SemanticMap,
    "boxes": Boxes,
    "image": Small,
    "variation": Small,
    "mask": Start,
}
"""By the kind of the condition in the recipe."""


def modalities_of(generator: Generator) -> list[type[Modality]]:
    """What a model's page shows, each once, in the order of its recipe."""
    return list(dict.fromkeys(MODALITIES[kind] for kind in generator.modalities))
