"""Which column is the picture, the label and the caption; labels as numbers with names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from limner.config import DataConfig
from limner.data.sources import Kind, Problem, Source, Tell, refuse
from limner.errors import LimnerError, suggest

IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "pixel_values", "bytes")
LABEL_NAMES = ("label", "labels", "class", "category", "cls", "target", "class_name", "fine_label", "y")
TEXT_NAMES = ("text", "caption", "prompt", "description", "txt", "title")
MAP_NAMES = ("semantic_map", "segmentation", "segmentation_map", "annotation", "seg", "seg.png", "map.png")
MASK_NAMES = ("mask", "mask.png", "inpainting_mask")
BOXES_NAMES = ("objects", "boxes", "layout")
MADE = ("image", "mask", "boxes", "variation")
"""Conditions that need no column of their own: they can be made of the pictures, boxes of the semantic maps."""
_NOT_CAPTIONS = ("file_name", "filename", "path", "file", "url", "id", "key", "__key__", "__url__", "split")
_FITTING: dict[str, tuple[Kind, ...]] = {
    "image": ("image", "text"),
    "label": ("class", "integer", "text", "number"),
    "text": ("text", "class"),
    "map": ("image", "text"),
    "mask": ("image", "text"),
    "boxes": ("other",),
}

MISSING = -1
_TOLD = object()


@dataclass(frozen=True)
class Roles:
    """Names of the columns that play a part; None: there is none."""

    image: str
    label: str | None
    text: str | None
    semantic_map: str | None = None
    mask: str | None = None
    boxes: str | None = None


def find_roles(source: Source, config: DataConfig, wants: Collection[str] = ()) -> Roles:
    """The columns named by the config, else found by type and name.

    Raises LimnerError when there is no picture column, a named column does not exist or holds something else, or one
    of `wants` ("label", "text", "semantic_map", ...) has no column and cannot be made.
    """
    image, label = image_role(source, config), label_role(source, config)
    roles = Roles(image, label, text_role(source, config, label), *spatial_roles(source, config))
    for want in wants:
        if want not in MADE and getattr(roles, want) is None:
            _refuse_missing(source, want, want.removeprefix("semantic_"))
    if "boxes" in wants and roles.boxes is None and roles.semantic_map is None:
        _refuse_missing(source, "boxes", "boxes")
    return roles


def _refuse_missing(source: Source, want: str, option: str) -> None:
    have = ", ".join(source.columns)
    raise LimnerError(f"{source.name}: no {want} column among {have}; name it with data.{option}_column")


def spatial_roles(source: Source, config: DataConfig) -> tuple[str | None, str | None, str | None]:
    """The columns of semantic maps, masks and boxes. Raises LimnerError for a wrong one in the config."""
    found = []
    for role, named, names, kind in (
        ("map", config.map_column, MAP_NAMES, "image"),
        ("mask", config.mask_column, MASK_NAMES, "image"),
        ("boxes", config.boxes_column, BOXES_NAMES, "other"),
    ):
        columns = (name for name in names if name in source.columns and source.columns[name].kind == kind)
        found.append(next(columns, None) if named is None else _named(source, named, role))
    return found[0], found[1], found[2]


def image_role(source: Source, config: DataConfig) -> str:
    """The picture column. Raises LimnerError when there is none, or no way to choose."""
    if config.image_column is not None:
        return _named(source, config.image_column, "image")
    overlays = set(spatial_roles(source, config))
    names = [c.name for c in source.columns.values() if c.kind == "image" and c.name not in overlays]
    known = [name for name in IMAGE_NAMES if name in names]
    if known or len(names) == 1:
        return (known or names)[0]
    if names:
        raise LimnerError(f"{source.name}: several picture columns ({', '.join(names)}); set data.image_column")
    have = ", ".join(source.columns) or "none at all"
    raise LimnerError(f"{source.name}: no picture column among the columns ({have}); name it with data.image_column")


def label_role(source: Source, config: DataConfig) -> str | None:
    """The label column: one of class names first, then by name. Raises LimnerError for a wrong `label_column`."""
    if config.label_column is not None:
        return _named(source, config.label_column, "label")
    classes = [column.name for column in source.columns.values() if column.kind == "class"]
    plain = [column.name for column in source.columns.values() if column.kind in ("integer", "text", "number")]
    for among in (classes, plain):
        for name in LABEL_NAMES:
            if name in among:
                return name
    return classes[0] if classes else None


def text_role(source: Source, config: DataConfig, label: str | None) -> str | None:
    """The caption column: by name, else the only text left. Raises LimnerError for a wrong `text_column`."""
    if config.text_column is not None:
        return _named(source, config.text_column, "text")
    texts = [column.name for column in source.columns.values() if column.kind == "text" and column.name != label]
    known = [name for name in TEXT_NAMES if name in texts]
    left = [name for name in texts if name.lower() not in _NOT_CAPTIONS]
    return (known or left)[0] if known or len(left) == 1 else None


def _named(source: Source, name: str, role: str) -> str:
    column = source.columns.get(name)
    if column is None:
        hint = suggest(name, source.columns)
        raise LimnerError(f"{source.name}: data.{role}_column: there is no column '{name}'{hint}")
    if column.kind not in _FITTING[role]:
        fitting = [other.name for other in source.columns.values() if other.kind in _FITTING[role]]
        raise LimnerError(
            f"{source.name}: data.{role}_column: column '{name}' holds {_HOLDS[column.kind]}{suggest(name, fitting)}"
        )
    return name


_HOLDS: dict[Kind, str] = {
    "image": "pictures",
    "class": "labels",
    "text": "text",
    "integer": "whole numbers",
    "number": "numbers",
    "other": "values of another kind",
}


def read_labels(
    source: Source, name: str, tell: Tell = refuse, classes: Sequence[str] | None = None
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Labels (N,) int64 in 0..K-1 and the K class names.

    ClassLabel numbers keep their names; names are numbered in alphabetical order; plain numbers count from 0 and are
    named by their digits. `classes` gives the names in another order, such as that of a run. Rows without a usable
    label go to `tell` and are MISSING (-1).
    """
    column = source.columns[name]
    values = [_plain(value) for value in source.values(name)]
    if column.names is None:
        values = _of_one_type(source, values, tell)
    own = column.names if column.names is not None else _class_names(source, name, values)
    names = own if classes is None else tuple(classes)
    numbers = {text: number for number, text in enumerate(names)}
    labels = np.full(len(values), MISSING, dtype=np.int64)
    for row, value in enumerate(values):
        if value is _TOLD:
            continue
        if value is None or value in ("", MISSING):
            tell(Problem(source.place(row), f"has no label in column '{name}'"))
            continue
        text = own[value] if isinstance(value, int) and 0 <= value < len(own) else str(value)
        if text in numbers:
            labels[row] = numbers[text]
        else:
            tell(
                Problem(source.place(row), f"label '{text}' is none of the {len(names)} classes{suggest(text, names)}")
            )
    return labels, names


def _plain(value: Any) -> Any:
    """Booleans as words, whole floats as integers, no number as None; the rest as it is."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if np.isnan(value):
            return None
        return int(value) if value.is_integer() else value
    return value


def _of_one_type(source: Source, values: list[Any], tell: Tell) -> list[Any]:
    """All names or all whole numbers, as the first is; others are told and become _TOLD."""
    first = next((value for value in values if value is not None), None)
    kept = []
    for row, value in enumerate(values):
        fits = value is None or (type(value) is type(first) and isinstance(value, str | int))
        kept.append(value if fits else _TOLD)
        if not fits:
            should = "a class name" if isinstance(first, str) else "a class number"
            tell(Problem(source.place(row), f"label {value!r:.60} should be {should}"))
    return kept


def _class_names(source: Source, name: str, values: list[Any]) -> tuple[str, ...]:
    texts = sorted({value for value in values if isinstance(value, str) and value})
    present = {value for value in values if isinstance(value, int) and value >= 0}
    if texts or not present:
        return tuple(texts)
    if max(present) >= max(1000, 10 * len(present)):
        raise LimnerError(
            f"{source.name}: column '{name}' has label {max(present)} with {len(present)} different labels; "
            f"class numbers should count from 0, or be written as names"
        )
    return tuple(str(number) for number in range(max(present) + 1))


def read_texts(source: Source, name: str, tell: Tell = refuse) -> list[str]:
    """Captions (N,); of a class column, the class names. Rows without one go to `tell` and are empty."""
    texts = list(source.values(name))
    names = source.columns[name].names
    for row, text in enumerate(texts):
        if names is not None and isinstance(text, int):
            texts[row] = names[text] if 0 <= text < len(names) else None
            text = texts[row]
        if text is None:
            tell(Problem(source.place(row), f"has no caption in column '{name}'"))
        elif not isinstance(text, str):
            tell(Problem(source.place(row), f"caption {text!r:.60} in column '{name}' should be text"))
        elif not _is_unicode(text):
            tell(Problem(source.place(row), f"caption in column '{name}' holds half a character, which is no Unicode"))
        else:
            continue
        texts[row] = ""
    return texts


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which no encoder of text takes."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
