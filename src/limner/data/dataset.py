"""A data set ready to train on: every picture decoded once into memory-mapped uint8, conditions beside it.

dataset = prepare(DataConfig(source="photos", size=(64, 64)), wants={"label"})
batch = dataset.batch(dataset.train[:16], np.random.default_rng(0))     # image, label
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from limner.config import ConditionConfig, DataConfig
from limner.data.boxes import Boxes
from limner.data.catalog import open_source
from limner.data.conditions import RANDOM, AtOnce, Condition, Labels, Texts, by_kind, on_pictures
from limner.data.overlays import SemanticMaps
from limner.data.pixels import Pixels, Progress, View, decode_all
from limner.data.roles import find_roles, read_labels, read_texts
from limner.data.sources import Problem, Source, refuse
from limner.errors import LimnerError

HELD_OUT_MOST = 2048
_SPLIT_SEED = 20210511

Rows = Sequence[int] | npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Dataset:
    """Pictures as memory-mapped uint8 and their conditions.

    `train` and `held_out` are row numbers in a fixed random order that depends on the number of rows alone.
    `digest` names the contents: pixels after resizing, labels, class names, captions. `groups` (N,) are the numbers
    of the label column, whether the model is told of it or not; None where there is none.
    """

    pixels: Pixels
    conditions: dict[str, Condition]
    digest: str
    train: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.int64]
    flip: bool = False
    notes: tuple[str, ...] = field(default=())
    groups: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of every batch."""
        return self.pixels.size

    @property
    def channels(self) -> int:
        """1 grey, 3 RGB, 4 RGBA."""
        return self.pixels.channels

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """All class numbers (N,), or None."""
        labels = self.conditions.get("label")
        return labels.numbers if isinstance(labels, Labels) else None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Name of each class number, or None where there are no labels."""
        labels = self.conditions.get("label")
        return labels.names if isinstance(labels, Labels) else None

    @property
    def texts(self) -> list[str] | None:
        """All captions, or None."""
        texts = self.conditions.get("text")
        return texts.texts if isinstance(texts, Texts) else None

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """What a recipe's section has to be told of a condition's classes, by modality."""
        return {
            key: {"classes": list(known.names)} | ({"void": known.void} if isinstance(known, SemanticMaps) else {})
            for key, known in self.conditions.items()
            if isinstance(known, SemanticMaps | Boxes)
        }

    def batch(self, rows: Rows, generator: np.random.Generator | None = None) -> dict[str, Any]:
        """`image` float32 (B, C, H, W) in [-1, 1], `row` int64 (B,), `mirror` bool (B,), and a value by condition:
        `label` int64 (B,), `text` list[str], `semantic_map` int64 (B, H, W), `boxes` (B, M, 5), `mask` (B, C + 1, H,
        W), `small` (B, C, h, w), `variation`.

        With a generator the picture is flipped (where the recipe says so and the conditions allow) and cropped at
        random (where the recipe says so), masks and small twins are made at random; without, never flipped and cropped
        to the centre, and masks and twins are those of the row. Random numbers are drawn row by row,
        `generator.random(B)` or `generator.random((B, 2))`.
        """
        chosen = np.asarray(rows, dtype=np.int64)
        view = self._view(chosen, generator)
        image = torch.from_numpy(self.pixels.take(chosen, view)).to(torch.float32).div_(127.5).sub_(1.0)
        conditions = {name: c.take(chosen, view) for name, c in self.conditions.items()}
        return {"image": image, **view.told(chosen)} | conditions

    def uint8(self, rows: Rows) -> npt.NDArray[np.uint8]:
        """The pictures (B, H, W, C), not augmented."""
        return self.pixels.take(np.asarray(rows, dtype=np.int64), View()).transpose(0, 2, 3, 1).copy()

    def iterate(
        self, rows: Rows | None = None, batch: int = 256
    ) -> Iterator[tuple[npt.NDArray[np.uint8], dict[str, Any]]]:
        """Pairs of pictures (B, H, W, C) and their conditions, batch after batch: what evaluation reads."""
        chosen = np.arange(len(self)) if rows is None else np.asarray(rows, dtype=np.int64)
        for start in range(0, len(chosen), batch):
            part = chosen[start : start + batch]
            yield self.uint8(part), {name: c.take(part, View()) for name, c in self.conditions.items()}

    def _view(self, rows: npt.NDArray[np.int64], generator: np.random.Generator | None) -> View:
        if generator is None:
            return View()
        corner = generator.random((len(rows), 2)) if self.pixels.has_margins else None
        by_chance = any(isinstance(condition, RANDOM) for condition in self.conditions.values())
        chance = generator.random(len(rows)) if by_chance else None
        if not self.flip:
            return View(None, corner, chance)
        mirror = generator.random(len(rows)) < 0.5
        for condition in self.conditions.values():
            allowed = condition.mirrorable(rows)
            if allowed is not None:
                mirror &= allowed
        return View(mirror, corner, chance)


def prepare(
    config: DataConfig,
    wants: Collection[str | ConditionConfig] = (),
    progress: Progress | None = None,
    *,
    classes: Sequence[str] | None = None,
) -> Dataset:
    """Read the data set that a recipe names, decoding its pictures on the first use.

    `wants`: conditions that every row must have, as sections of a recipe or by name, which means the sections'
    defaults. `progress(done, rows)` is called while pictures are decoded. `classes`: class names in the order of an
    earlier run; by default the data's own.

    Raises LimnerError: nothing there, a column missing, a row without a label or with one that is not among
    `classes`, a picture that cannot be read (with file and row), pictures of several sizes when `config.size` is
    not set.
    """
    if config.source is None:
        raise LimnerError("data.source is not set; give a folder, Parquet, WebDataset tar or hub name")
    problems: list[Problem] = []
    source = open_source(config.source, config.split, problems.append if config.stream else refuse)
    sections = by_kind(wants)
    if not len(source):
        raise LimnerError(f"{config.source}: split '{source.split}' has no rows")
    if config.stream:
        from limner.data.stream import streamed  # it builds on this module

        return streamed(source, config, sections, problems, classes)
    roles = find_roles(source, config, sections)
    conditions: dict[str, Condition] = {}
    if "label" in sections and roles.label is not None:
        conditions["label"] = Labels(*read_labels(source, roles.label, classes=classes))
    if "text" in sections and roles.text is not None:
        conditions["text"] = Texts(read_texts(source, roles.text))
    pixels = decode_all(source, roles.image, config, progress)
    conditions |= on_pictures(source, roles, sections, config, pixels, AtOnce(source, progress))
    notes = [*source.notes, *(note for known in conditions.values() for note in getattr(known, "notes", ()))]
    train, held_out = split_rows(len(pixels), config.held_out)
    digest = digest_of(pixels, conditions)
    return Dataset(pixels, conditions, digest, train, held_out, flip=config.flip, notes=tuple(notes),
                   groups=_groups(source, roles.label, conditions.get("label")))  # fmt: skip


def _groups(source: Source, label: str | None, told: Condition | None) -> npt.NDArray[np.int64] | None:
    """The numbers of the label column: those that the model is told of, where it is told of them."""
    if label is None or isinstance(told, Labels):
        return told.numbers if isinstance(told, Labels) else None
    try:
        return read_labels(source, label, lambda _: None)[0]
    except LimnerError:  # a column that only looks like one of labels, and isn't asked for
        return None


def conditions_in(config: DataConfig) -> frozenset[str]:
    """Which of "label" and "text" the data has columns for; no picture is decoded. Raises LimnerError as `prepare`."""
    roles = find_roles(open_source(config.source or "", config.split), config)
    return frozenset(name for name in ("label", "text") if getattr(roles, name) is not None)


def split_rows(rows: int, share: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(train, held_out) row numbers: min(share x rows, 2048) are held out, rounded up, and one row always trains."""
    order = np.random.default_rng(_SPLIT_SEED).permutation(rows)
    count = min(math.ceil(share * rows - 1e-9), HELD_OUT_MOST, rows - 1)
    return order[count:], order[:count]


def digest_of(pixels: Pixels, conditions: dict[str, Condition]) -> str:
    """What names the contents of a data set."""
    digest = hashlib.blake2b(pixels.digest.encode(), digest_size=16)
    for name, condition in sorted(conditions.items()):
        digest.update(f"{name} {condition.fingerprint()}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
