"""What `limner check` looks at besides pictures, labels and captions: semantic maps, masks and boxes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from limner.config import DataConfig
from limner.data.boxes import leaving, read_layouts
from limner.data.overlays import VOID, MapRecipe, MaskRecipe, class_names
from limner.data.pixels import fetch, in_parallel
from limner.data.roles import spatial_roles
from limner.data.sources import Encoded, Problem, Source, Tell
from limner.data.text import printable
from limner.data.transforms import PictureError, quiet


@dataclass
class Overlays:
    """By split: the share of the maps' pixels that each class has, how many masks there are, how many boxes of each
    class."""

    maps: dict[str, dict[str, float]] = field(default_factory=dict)
    masks: dict[str, int] = field(default_factory=dict)
    boxes: dict[str, dict[str, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"semantic_maps": self.maps, "masks": self.masks, "boxes": self.boxes}

    def lines(self) -> list[str]:
        """To read."""
        shares = {
            split: _listed({n: f"{share:.1%}" for n, share in found.items()}) for split, found in self.maps.items()
        }
        return [
            *(f"semantic maps ({split}): {words}" for split, words in shares.items()),
            *(f"masks ({split}): {count:,}" for split, count in self.masks.items()),
            *(
                f"boxes ({split}): {_listed({n: f'{k:,}' for n, k in found.items()})}"
                for split, found in self.boxes.items()
            ),
        ]

    def look(self, source: Source, config: DataConfig, image: str, tell: Tell, note: Any) -> dict[str, str | None]:
        """Look at all that lies on the pictures of a split; returns the columns by role. What is wrong goes to `tell`,
        what is worth knowing to `note`. Raises LimnerError for a wrong column in the config."""
        maps, masks, boxes = spatial_roles(source, config)
        if maps is not None:
            self.maps[source.split] = _shares(source, (maps, image), tell)
        if masks is not None:
            self.masks[source.split] = sum(_each(source, (masks, image), MaskRecipe(None, False), tell).values())
        if boxes is not None:
            found = read_layouts(source, (boxes, image), tell=tell)
            counts = Counter(int(box[0]) for row in found.boxes for box in row)
            self.boxes[source.split] = {name: counts[k] for k, name in enumerate(found.names)}
            for words in leaving(source, found.outside):
                note(words)
        return {"semantic_map": maps, "mask": masks, "boxes": boxes}


def _shares(source: Source, columns: tuple[str, str], tell: Tell) -> dict[str, float]:
    names = class_names(source)
    counts = _each(source, columns, MapRecipe(None, False, None if names is None else len(names)), tell)
    total = sum(counts.values()) or 1
    known = names or [str(k) for k in range(max((k for k in counts if k != VOID), default=-1) + 1)]
    shares = {name: counts[k] / total for k, name in enumerate(known)}
    return shares | ({f"{VOID} (none)": counts[VOID] / total} if counts[VOID] else {})


def _each(source: Source, columns: tuple[str, str], recipe: MapRecipe | MaskRecipe, tell: Tell) -> Counter[int]:
    """How often each value is in the pixels of maps; of masks, how many there are, as that of 1."""

    def values(row: tuple[Encoded, ...]) -> Counter[int] | PictureError:
        try:
            pixels = recipe(*(fetch(encoded) for encoded in row))
        except PictureError as error:
            return error
        if isinstance(recipe, MaskRecipe):
            return Counter({1: 1})
        return Counter(dict(enumerate(np.bincount(pixels.ravel()).tolist())))

    found: Counter[int] = Counter()
    rows = zip(*(source.pictures(column) for column in columns), strict=True)
    with quiet():
        for row, counted in enumerate(in_parallel(values, rows)):
            if isinstance(counted, PictureError):
                tell(Problem(source.picture_place(row, columns[0]), str(counted)))
            else:
                found.update(counted)
    return found


def _listed(facts: dict[str, str]) -> str:
    return ", ".join(f"{printable(name)} {value}" for name, value in facts.items())
