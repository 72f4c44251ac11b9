"""Which split a file belongs to, by its name, and which split is read when none is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import TypeVar

from limner.data.stream_files import File
from limner.errors import LimnerError, suggest

T = TypeVar("T")

_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
}
_WORD = re.compile(r"[a-z]+")


def split_name(word: str) -> str | None:
    """`val` -> `validation`; None for a word that names no split."""
    return _NAMES.get(word.lower())


def split_of(path: PurePath) -> str:
    """The split that a file's name tells (`train-00000-of-00002.parquet`), else its folders' names, else `train`."""
    for part in reversed(path.parts):
        for word in _WORD.findall(part.lower()):
            if word in _NAMES:
                return _NAMES[word]
    return "train"


def group_by_split(root: Path, files: Iterable[str]) -> dict[str, list[File]]:
    """Files of a folder by the split that their names tell, `train` first."""
    return grouped((split_of(PurePath(file)), root / file) for file in files)


def grouped(files: Iterable[tuple[str, File]]) -> dict[str, list[File]]:
    """Files by their split, `train` first."""
    groups: dict[str, list[File]] = {}
    for split, file in files:
        groups.setdefault(split, []).append(file)
    return in_order(groups)


def in_order(groups: dict[str, T]) -> dict[str, T]:
    """`train` first, then by name."""
    return dict(sorted(groups.items(), key=lambda item: (item[0] != "train", item[0])))


def choose_split(name: str, splits: tuple[str, ...], asked: str | None) -> tuple[str, list[str]]:
    """The split to read, and a note that says so. Raises LimnerError for an unknown or an ambiguous one."""
    if asked is not None:
        wanted = asked if asked in splits else split_name(asked)
        if wanted not in splits:
            raise LimnerError(f"{name}: has no split '{asked}'{suggest(asked, splits)}")
        return str(wanted), []
    if len(splits) == 1:
        return splits[0], []
    if "train" in splits:
        rest = ", ".join(other for other in splits if other != "train")
        return "train", [f"reading split 'train'; there is also {rest} (data.split chooses)"]
    raise LimnerError(f"{name}: has splits {', '.join(splits)} and no 'train'; choose one with data.split")
