"""What is known of each row besides its picture: columns of the data set, or made of its pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from limner import config as c
from limner.data.boxes import Boxes, boxes_of_maps, read_boxes
from limner.data.masks import Masks
from limner.data.overlays import MaskRecipe, SemanticMaps, read_maps
from limner.data.pixels import Decoder, Pixels, Progress, View, stored
from limner.data.roles import Roles
from limner.data.sources import Source
from limner.data.twins import Themselves, Twins

_SIDES = re.compile(r"\b((left|right)(wards?|hand(ed)?)?|(anti|counter)?-?clockwise|east|west)\b", re.IGNORECASE)


class Condition(Protocol):
    """What is known of each row besides its picture. It is given the same `View` as the picture, so that whatever
    lies on the picture (a semantic map, a mask, boxes) is mirrored and cropped with it."""

    def take(self, rows: npt.NDArray[np.int64], view: View) -> Any:
        """The batch of these rows as a network's conditioner wants it."""
        ...

    def mirrorable(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_] | None:
        """Rows that stay true when the picture is mirrored; None: all."""
        ...

    def fingerprint(self) -> str:
        """Changes when what `take` gives does."""
        ...


@dataclass(frozen=True)
class Labels:
    """Class numbers (N,); they stay true in a mirror."""

    numbers: npt.NDArray[np.int64]
    names: tuple[str, ...]

    def take(self, rows: npt.NDArray[np.int64], view: View) -> torch.Tensor:
        return torch.from_numpy(self.numbers[rows])

    def mirrorable(self, rows: npt.NDArray[np.int64]) -> None:
        return None

    def fingerprint(self) -> str:
        return f"{self.names} {self.numbers.tolist()}"


@dataclass(frozen=True)
class Texts:
    """Captions; one that names a side ("a left arrow") would be false in a mirror, so its picture is never flipped."""

    texts: list[str]

    def __post_init__(self) -> None:
        sided = [_SIDES.search(text) is not None for text in self.texts]
        object.__setattr__(self, "_sideless", ~np.asarray(sided, dtype=bool))

    def take(self, rows: npt.NDArray[np.int64], view: View) -> list[str]:
        return [self.texts[row] for row in rows]

    def mirrorable(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        return self._sideless[rows]  # type: ignore[attr-defined]

    def fingerprint(self) -> str:
        return str(self.texts)


RANDOM = (Masks, Twins)
"""Conditions that are made by chance."""

SECTIONS: Mapping[str, Callable[..., Any]] = {
    "semantic_map": c.SemanticMapCondition,
    "mask": c.MaskCondition,
    "boxes": c.BoxesCondition,
    "image": c.ImageCondition,
    "variation": c.VariationCondition,
}


def by_kind(wants: Collection[str | c.ConditionConfig]) -> dict[str, Any]:
    """What is wanted by modality: sections of a recipe, or names for the sections' defaults."""
    sections = (SECTIONS.get(want, lambda want=want: want)() if isinstance(want, str) else want for want in wants)
    return {section if isinstance(section, str) else section.kind: section for section in sections}


class Reading(Protocol):
    """How what lies on the pictures is read."""

    def store(self, columns: Sequence[str], recipe: Decoder) -> Pixels: ...

    def boxes(self, columns: tuple[str, str], pixels: Pixels, section: c.BoxesCondition) -> Boxes: ...

    def boxes_of(self, maps: SemanticMaps, section: c.BoxesCondition) -> Boxes: ...


@dataclass(frozen=True)
class AtOnce:
    """Everything before training begins, pictures into the cache."""

    source: Source
    progress: Progress | None = None

    def store(self, columns: Sequence[str], recipe: Decoder) -> Pixels:
        return stored(self.source, columns, recipe, self.progress)

    def boxes(self, columns: tuple[str, str], pixels: Pixels, section: c.BoxesCondition) -> Boxes:
        return read_boxes(self.source, columns, pixels, section)

    def boxes_of(self, maps: SemanticMaps, section: c.BoxesCondition) -> Boxes:
        return boxes_of_maps(maps, section)


def on_pictures(source: Source, roles: Roles, wants: Mapping[str, Any], config: c.DataConfig, pixels: Pixels,
                reading: Reading) -> dict[str, Condition]:  # fmt: skip
    """The conditions that lie on the pictures or are made of them, by their key in a batch. Raises LimnerError."""
    found: dict[str, Condition] = {}
    maps: SemanticMaps | None = None
    if roles.semantic_map is not None and ("semantic_map" in wants or ("boxes" in wants and roles.boxes is None)):
        section = wants.get("semantic_map") or c.SemanticMapCondition()
        maps = read_maps(source, (roles.semantic_map, roles.image), config, section, reading.store)
        found |= {"semantic_map": maps} if "semantic_map" in wants else {}
    if "boxes" in wants:
        if roles.boxes is not None:
            found["boxes"] = reading.boxes((roles.boxes, roles.image), pixels, wants["boxes"])
        elif maps is not None:
            found["boxes"] = reading.boxes_of(maps, wants["boxes"])
    if "mask" in wants:
        recipe = MaskRecipe(config.size, config.crop == "random")
        column = None if roles.mask is None else reading.store((roles.mask, roles.image), recipe)
        found["mask"] = Masks(pixels, wants["mask"].shapes, column)
    if "image" in wants:
        found["small"] = Twins(pixels, wants["image"])
    if "variation" in wants:
        found["variation"] = Themselves(pixels)
    return found
