"""WebDataset: tar files in which files of the same stem are one row (`0001.jpg`, `0001.txt`, `0001.cls`).

Members are read in place, by offset; nothing is ever unpacked, so a member's name can do no harm.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from limner.data.sources import (
    Absent,
    Column,
    Encoded,
    FileSpan,
    Place,
    Problem,
    Source,
    Tell,
    kind_of,
    stat_digest,
)
from limner.data.text import reason
from limner.data.transforms import EXTENSIONS
from limner.errors import LimnerError

IMAGE = "image"

_TEXT_LIMIT = 1 << 20
_TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, zlib.error)


@dataclass
class TarSource(Source):
    """Rows of tar files. Columns: `image` (the first picture), each further suffix (`txt`, `cls`, `seg.png`), and
    the keys of the `json` member."""

    files: list[Path]
    places: list[Place] = field(default_factory=list)
    spans: dict[str, list[FileSpan | None]] = field(default_factory=dict)
    table: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.places)

    def place(self, row: int) -> Place:
        return self.places[row]

    def pictures(self, column: str) -> Iterator[Encoded]:
        if column not in self.spans:
            raise LimnerError(f"{self.name}: column '{column}' holds no pictures")
        yield from (Absent() if span is None else span for span in self.spans[column])

    def values(self, column: str) -> list[Any]:
        return self.table[column]

    def fingerprint(self) -> str:
        return stat_digest(self.files)


def tar_splits(name: str, groups: dict[str, list[Path]], tell: Tell) -> dict[str, Callable[[], Source]]:
    """A source for each group of tar files."""
    return {split: partial(_source, name, split, files, tell) for split, files in groups.items()}


def _source(name: str, split: str, files: list[Path], tell: Tell) -> TarSource:
    rows: list[tuple[Place, dict[str, FileSpan], dict[str, Any]]] = []
    for file in files:
        for key, members in _samples(file, tell).items():
            place = Place(str(file), member=key)
            pictures, values = _sorted(members, place, tell)
            rows.append((place, pictures, values))
    source = TarSource(name, split, {}, files=files, places=[place for place, _, _ in rows])
    for column in {key: None for _, pictures, _ in rows for key in pictures}:
        source.spans[column] = [pictures.get(column) for _, pictures, _ in rows]
        source.columns[column] = Column(column, "image")
    for column in {key: None for _, _, values in rows for key in values if key not in source.spans}:
        source.table[column] = [values.get(column) for _, _, values in rows]
        source.columns[column] = Column(column, kind_of(source.table[column]))
    return source


def _samples(path: Path, tell: Tell) -> dict[str, dict[str, FileSpan]]:
    """Members by sample and suffix. A damaged or truncated archive is told; what stands before the damage is kept."""
    samples: dict[str, dict[str, FileSpan]] = {}
    try:
        length = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isreg() or member.sparse is not None:
                    continue
                folder, slash, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                if not stem or not dot:
                    continue
                span = FileSpan(path, member.offset_data, member.size)
                if span.offset + member.size > length:
                    tell(Problem(Place(str(path), member=member.name), "is cut off: the tar file is truncated"))
                    break
                samples.setdefault(folder + slash + stem, {})[suffix.lower()] = span
    except _TAR_ERRORS as error:
        tell(Problem(Place(str(path)), f"is not a tar file that can be read to its end ({reason(error)})"))
    return samples


def _sorted(members: dict[str, FileSpan], place: Place, tell: Tell) -> tuple[dict[str, FileSpan], dict[str, Any]]:
    """The pictures and the values of a sample."""
    pictures: dict[str, FileSpan] = {}
    values: dict[str, Any] = {}
    for suffix, span in members.items():
        if f".{suffix}" in EXTENSIONS and IMAGE not in pictures:
            pictures[IMAGE] = span
        elif f".{suffix.rpartition('.')[2]}" in EXTENSIONS:
            pictures[suffix] = span
        elif suffix in ("txt", "text", "caption", "cls", "json"):
            values |= _value(suffix, span, place, tell)
    return pictures, values


def _value(suffix: str, span: FileSpan, place: Place, tell: Tell) -> dict[str, Any]:
    problem = None
    try:
        if (span.size or 0) > _TEXT_LIMIT:
            problem = f"its .{suffix} is larger than 1 MiB"
        else:
            text = span.read().decode("utf-8-sig").strip()
            if suffix == "json":
                value = json.loads(text)
                if isinstance(value, dict):
                    return {str(key): inner for key, inner in value.items()}
                problem = "its .json should be an object"
            elif suffix == "cls":
                return {suffix: int(text) if text.removeprefix("-").isdecimal() and len(text) < 18 else text}
            else:
                return {suffix: text}
    except (OSError, ValueError, RecursionError) as error:
        problem = f"its .{suffix} cannot be read ({reason(error)})"
    tell(Problem(place, problem))
    return {}
