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
from typing import Any

from limner.data.sources import (
    Absent,
    Column,
    Encoded,
    FileSpan,
    Place,
    Problem,
    ShardSource,
    Source,
    Tell,
    kind_of,
)
from limner.data.stream_files import File, open_file, size_of
from limner.data.text import reason
from limner.data.transforms import EXTENSIONS
from limner.errors import LimnerError

IMAGE = "image"
VALUES = ("txt", "text", "caption", "cls", "json")

Member = FileSpan | bytes
"""Where a picture lies, or what a small member holds."""

_TEXT_LIMIT = 1 << 20
_TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, zlib.error)


@dataclass
class TarSource(ShardSource):
    """Rows of tar files. Columns: `image` (the first picture), each further suffix (`txt`, `cls`, `seg.png`), and
    the keys of the `json` member."""

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

    def picture(self, column: str, row: int) -> Encoded:
        return self.spans[column][row] or Absent()

    def values(self, column: str) -> list[Any]:
        return self.table[column]


def tar_splits(name: str, groups: dict[str, list[File]], tell: Tell) -> dict[str, Callable[[], Source]]:
    """A source for each group of tar files."""
    return {split: partial(_source, name, split, files, tell) for split, files in groups.items()}


def _source(name: str, split: str, files: list[File], tell: Tell) -> TarSource:
    rows: list[tuple[Place, dict[str, FileSpan], dict[str, Any]]] = []
    ends = []
    for file in files:
        for key, members in _samples(file, tell).items():
            place = Place(str(file), member=key)
            pictures, values = _sorted(members, place, tell)
            rows.append((place, pictures, values))
        ends.append(len(rows))
    source = TarSource(name, split, {}, files=files, places=[place for place, _, _ in rows], ends=ends)
    for column in {key: None for _, pictures, _ in rows for key in pictures}:
        source.spans[column] = [pictures.get(column) for _, pictures, _ in rows]
        source.columns[column] = Column(column, "image")
    for column in {key: None for _, _, values in rows for key in values if key not in source.spans}:
        source.table[column] = [values.get(column) for _, _, values in rows]
        source.columns[column] = Column(column, kind_of(source.table[column]))
    return source


def _samples(path: File, tell: Tell) -> dict[str, dict[str, Member]]:
    """Members by sample and suffix; those that hold values are read on the way, so that an archive that lies elsewhere
    is gone through once. A damaged or truncated archive is told; what stands before the damage is kept."""
    samples: dict[str, dict[str, Member]] = {}
    try:
        length = size_of(path)
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
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
                small = suffix.lower() in VALUES and member.size <= _TEXT_LIMIT
                if small:
                    file.seek(member.offset_data)  # the archive seeks for itself
                content = file.read(member.size) if small else span
                samples.setdefault(folder + slash + stem, {})[suffix.lower()] = content
    except _TAR_ERRORS as error:
        tell(Problem(Place(str(path)), f"is not a tar file that can be read to its end ({reason(error)})"))
    return samples


def _sorted(members: dict[str, Member], place: Place, tell: Tell) -> tuple[dict[str, FileSpan], dict[str, Any]]:
    """The pictures and the values of a sample."""
    pictures: dict[str, FileSpan] = {}
    values: dict[str, Any] = {}
    for suffix, member in members.items():
        if suffix in VALUES:
            values |= _value(suffix, member, place, tell)
        elif isinstance(member, bytes):
            continue
        elif f".{suffix}" in EXTENSIONS and IMAGE not in pictures:
            pictures[IMAGE] = member
        elif f".{suffix.rpartition('.')[2]}" in EXTENSIONS:
            pictures[suffix] = member
    return pictures, values


def _value(suffix: str, member: Member, place: Place, tell: Tell) -> dict[str, Any]:
    problem = None
    try:
        if not isinstance(member, bytes):
            problem = f"its .{suffix} is larger than 1 MiB"
        else:
            text = member.decode("utf-8-sig").strip()
            if suffix == "json":
                value = json.loads(text)
                if isinstance(value, dict):
                    return {str(key): inner for key, inner in value.items()}
                problem = "its .json should be an object"
            elif suffix == "cls":
                return {suffix: int(text) if text.removeprefix("-").isdecimal() and len(text) < 18 else text}
            else:
                return {suffix: text}
    except (ValueError, RecursionError) as error:
        problem = f"its .{suffix} cannot be read ({reason(error)})"
    tell(Problem(place, problem))
    return {}
