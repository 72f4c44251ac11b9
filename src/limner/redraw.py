"""From a drawing to the facts that its PNG carries, and from these back to the drawing."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from limner.errors import LimnerError
from limner.generator import Generator
from limner.outputs import read_recipe
from limner.settings import Settings

CONDITIONS = ("label", "text", "negative_text", "boxes")
"""Facts of a picture that are options of `Generator.stream`, one value a picture."""
PICTURES = ("image", "mask", "semantic_map")
"""The same, but for pictures: as PNG in base64."""
MOST_TEXT = 2**19
"""Characters of such a picture; of a larger one its file's name is kept."""


def facts_of(generator: Generator, run: str, settings: Settings, seed: int,
             classifier_digest: str | None = None, strength: float | None = None,
             size: tuple[int, int] | None = None) -> dict[str, Any]:  # fmt: skip
    """What is needed to draw the same again; it goes into every PNG, beside each picture's own facts."""
    facts = {"run": run, "digest": generator.digest, "seed": seed, **asdict(settings)}
    facts |= {"classifier_digest": classifier_digest, "strength": strength, "size": size and list(size),
              "int8": generator.int8 or None}  # fmt: skip
    return {name: value for name, value in facts.items() if value is not None}


def further_facts(conditions: Mapping[str, Any], row: int) -> dict[str, Any]:
    """What a picture was told beside its label, caption and boxes: pictures, and a caption to move away from. Of each
    condition the values come in turn."""
    told = {name: conditions[name][row % len(conditions[name])] for name in (*PICTURES, "negative_text")
            if conditions.get(name)}  # fmt: skip
    found = {name: value if name == "negative_text" else as_text(value) for name, value in told.items()}
    return {name: text for name, text in found.items() if name == "negative_text" or len(text) <= MOST_TEXT}


def as_text(image: Image.Image) -> str:
    """A picture as PNG in base64."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def from_text(text: str) -> Image.Image:
    """The picture that `as_text` wrote. Raises ValueError or OSError for anything else."""
    with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",)) as image:
        image.load()
        return image


@dataclass(frozen=True)
class Repeat:
    """A drawing as its PNG tells it: `generator.stream(**options)` draws it again.

    run, digest: of the model. conditions: one value for each of the `num` pictures, from number `first` on. settings:
    by name. classifier_digest: of the classifier that steered it, else None. size: (height, width), None for the
    model's own. int8: whether it was computed in 8 bits.
    """

    run: str
    digest: str
    seed: int
    first: int
    num: int
    conditions: Mapping[str, list[Any]]
    settings: Mapping[str, Any]
    classifier_digest: str | None = None
    strength: float | None = None
    size: tuple[int, int] | None = None
    int8: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of `Generator.stream`, the classifier aside."""
        further = {"strength": self.strength, "size": self.size}
        told = {name: value for name, value in further.items() if value is not None}
        return {"num": self.num, "seed": self.seed, "first": self.first, **told, **self.conditions, **self.settings}

    def check(self, generator: Generator, run: str) -> None:
        """Raises LimnerError unless this model drew it, in as many bits."""
        if self.digest and generator.digest and self.digest != generator.digest:
            raise LimnerError(f"{run}: its weights are {generator.digest}, the picture was drawn by {self.digest} "
                              f"({self.run}); name that run")  # fmt: skip
        if self.int8 != generator.int8:
            own, told = ("with" if each else "without" for each in (generator.int8, self.int8))
            raise LimnerError(f"{run}: was loaded {own} int8, the picture was drawn {told}; `limner sample --from` "
                              "draws it again")  # fmt: skip

    @staticmethod
    def read(picture: str | Path | BinaryIO, name: str | None = None) -> Repeat:
        """The drawing that a PNG of Limner's, one picture or a grid, tells of. Raises LimnerError for another file."""
        name = str(picture) if name is None else name
        try:
            facts = read_recipe(picture)  # pyright: ignore[reportArgumentType]
        except (UnidentifiedImageError, OSError, ValueError) as error:
            missing = isinstance(error, FileNotFoundError)
            raise LimnerError(f"{name}: there is no such file" if missing else f"{name}: is no picture") from None
        if facts is None:
            raise LimnerError(f"{name}: carries no recipe; only pictures that Limner drew do")
        for key, file in (facts.get("files") or {}).items() if isinstance(facts, dict) else ():
            if key not in (facts.get("pictures") or [facts])[0]:
                raise LimnerError(f"{name}: was drawn from {file}, which is too large for its recipe; "
                                  f"name it anew, without --from")  # fmt: skip
        return Repeat.of(facts, name)

    @staticmethod
    def of(facts: Any, name: str = "recipe") -> Repeat:
        """The same from the facts themselves. Raises LimnerError where they are not whole."""
        try:
            pictures = list(facts.get("pictures") or [facts])
            known = {field.name for field in fields(Settings)}
            numbers = [int(each["index"]) for each in pictures]
            if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
                raise ValueError
            return Repeat(
                str(facts["run"]),
                str(facts.get("digest", "")),
                int(facts["seed"]),
                numbers[0],
                len(numbers),
                {key: [each[key] for each in pictures] for key in CONDITIONS if key in pictures[0]}
                | {key: [from_text(each[key]) for each in pictures] for key in PICTURES if key in pictures[0]},
                {key: value for key, value in facts.items() if key in known},
                facts.get("classifier_digest"),
                facts.get("strength"),
                None if facts.get("size") is None else (int(facts["size"][0]), int(facts["size"][1])),
                bool(facts.get("int8", False)),
            )
        except (AttributeError, KeyError, TypeError, ValueError, IndexError, OSError):
            raise LimnerError(
                f"{name}: its recipe is damaged; it lacks what is needed to draw the picture again"
            ) from None
