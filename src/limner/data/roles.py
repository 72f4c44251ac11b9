"""Which column is the picture, the label and the caption; labels as numbers with names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from limner.config import DataConfig
from limner.data.sources import Column, Problem, Source, Tell, refuse
from limner.errors import LimnerError, suggest

IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "pixel_values", "bytes")
LABEL_NAMES = ("label", "labels", "class", "category", "cls", "target", "class_name", "fine_label", "y")
TEXT_NAMES = ("text", "caption", "prompt", "description", "txt", "title")
_NOT_CAPTIONS = ("file_name", "filename", "path", "file", "url", "id", "key", "__key__", "__url__", "split")

MISSING = -1


@dataclass(frozen=True)
class Roles:
    """Names of the columns that play a part; None: there is none."""

    image: str
    label: str | None
    text: str | None


def find_roles(source: Source, config: DataConfig, wants: Collection[str] = ()) -> Roles:
    """The columns named by the config, else found by type and name.

    Raises LimnerError when a named column does not exist, or one of `wants` ("label", "text") has no column.
    """
    image = _named(source, config.image_column, "image_column") or _image(source)
    label = _named(source, config.label_column, "label_column") or _label(source)
    taken = {image, label}
    text = _named(source, config.text_column, "text_column") or _text(source, taken)
    for want, found in (("label", label), ("text", text)):
        if want in wants and found is None:
            have = ", ".join(source.columns)
            raise LimnerError(f"{source.name}: no {want} column among {have}; name it with data.{want}_column")
    return Roles(image, label, text)


def _named(source: Source, name: str | None, setting: str) -> str | None:
    if name is not None and name not in source.columns:
        raise LimnerError(f"{source.name}: data.{setting} '{name}' does not exist{suggest(name, source.columns)}")
    return name


def _image(source: Source) -> str:
    names = [column.name for column in source.columns.values() if column.kind == "image"]
    known = [name for name in IMAGE_NAMES if name in names]
    if known or len(names) == 1:
        return (known or names)[0]
    if names:
        raise LimnerError(f"{source.name}: several picture columns ({', '.join(names)}); set data.image_column")
    have = ", ".join(source.columns) or "none"
    raise LimnerError(f"{source.name}: no picture column among the columns {have}; name it with data.image_column")


def _label(source: Source) -> str | None:
    classes = [column.name for column in source.columns.values() if column.kind == "class"]
    plain = [column.name for column in source.columns.values() if column.kind in ("integer", "text", "number")]
    for among in (classes, plain):
        for name in LABEL_NAMES:
            if name in among:
                return name
    return classes[0] if classes else None


def _text(source: Source, taken: Collection[str | None]) -> str | None:
    strings = [c.name for c in source.columns.values() if c.kind == "text" and c.name not in taken]
    known = [name for name in TEXT_NAMES if name in strings]
    left = [name for name in strings if name.lower() not in _NOT_CAPTIONS]
    if known or len(left) == 1:
        return (known or left)[0]
    return None


def read_labels(source: Source, name: str, tell: Tell = refuse) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Labels (N,) int64 in 0..K-1 and the K class names.

    ClassLabel numbers keep their names; strings are numbered in alphabetical order; plain integers count from 0 and
    are named by their digits. Rows without a usable label go to `tell` and are MISSING (-1).
    """
    column = source.columns[name]
    values = [_plain(value, column) for value in source.values(name)]
    kinds = {type(value) for value in values if value is not None}
    texts = kinds == {str}
    if not kinds <= {str, int} or len(kinds) == 2:
        return _odd_labels(source, name, values, tell)
    names = column.names or _class_names(source, name, values, texts)
    numbers = {text: number for number, text in enumerate(names)}
    labels = np.full(len(values), MISSING, dtype=np.int64)
    for row, value in enumerate(values):
        number = numbers.get(value, MISSING) if isinstance(value, str) else value
        if number is None or value in ("", -1):
            tell(Problem(source.place(row), f"has no label in column '{name}'"))
        elif not 0 <= number < len(names):
            tell(Problem(source.place(row), f"label {value!r} is not one of the {len(names)} classes"))
        else:
            labels[row] = number
    return labels, names


def _plain(value: Any, column: Column) -> Any:
    """Booleans as words, whole floats as integers; the rest as it is."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if np.isnan(value):
            return None
        return int(value) if value.is_integer() else value
    return value


def _class_names(source: Source, name: str, values: list[Any], texts: bool) -> tuple[str, ...]:
    if texts:
        return tuple(sorted({value for value in values if value}))
    present = {value for value in values if value is not None and value >= 0}
    if not present:
        return ()
    if max(present) >= max(1000, 10 * len(present)):
        raise LimnerError(
            f"{source.name}: column '{name}' has label {max(present)} with {len(present)} labels in use; "
            f"class numbers should count from 0 (or be written as names)"
        )
    return tuple(str(number) for number in range(max(present) + 1))


def _odd_labels(
    source: Source, name: str, values: list[Any], tell: Tell
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Labels of mixed or useless types: the first row that differs is named."""
    first = next(value for value in values if value is not None)
    for row, value in enumerate(values):
        if value is not None and (type(value) is not type(first) or not isinstance(value, str | int)):
            tell(Problem(source.place(row), f"label {value!r:.60} should be a class name or number, as in all rows"))
    return np.full(len(values), MISSING, dtype=np.int64), ()


def read_texts(source: Source, name: str, tell: Tell = refuse) -> list[str]:
    """Captions (N,); rows without one go to `tell` and are empty."""
    texts = source.values(name)
    for row, text in enumerate(texts):
        if text is None:
            tell(Problem(source.place(row), f"has no caption in column '{name}'"))
        elif not isinstance(text, str):
            tell(Problem(source.place(row), f"caption {text!r:.60} in column '{name}' should be text"))
    return [text if isinstance(text, str) else "" for text in texts]
