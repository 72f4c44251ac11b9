"""What rows a data set has, before any picture is decoded: a `Source` for each form in which data comes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from limner.data.stream_files import File, absolute, read_span, stamp
from limner.data.text import printable
from limner.errors import LimnerError

Kind = Literal["image", "class", "text", "integer", "number", "other"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands: a file, and in it a line (counted from 1), a row (counted from 0) or an archive's member."""

    file: str
    line: int | None = None
    row: int | None = None
    member: str | None = None

    def __str__(self) -> str:
        words = [self.file]
        words += [] if self.line is None else [f"line {self.line}"]
        words += [] if self.row is None else [f"row {self.row}"]
        words += [] if self.member is None else [f"member {self.member}"]
        return printable(" ".join(words))


@dataclass(frozen=True)
class Problem:
    """Something wrong with the data, and where."""

    place: Place
    what: str

    def __str__(self) -> str:
        return f"{self.place}: {printable(self.what)}"


Tell = Callable[[Problem], None]
"""Receives problems: `refuse` stops at the first, a list's `append` collects them all."""


def refuse(problem: Problem) -> None:
    """Raise the problem as a LimnerError."""
    raise LimnerError(str(problem))


@dataclass(frozen=True, slots=True)
class FileSpan:
    """An encoded picture that lies in a file: the whole file, or `size` bytes from `offset`."""

    path: File
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes. Raises OSError, and ValueError for a path that no system has."""
        return read_span(self.path, self.offset, self.size)


@dataclass(frozen=True)
class Absent:
    """A row has no picture, and why."""

    why: str = "has no picture"


Encoded = bytes | FileSpan | Absent


def encoded(value: Any, folder: File) -> Encoded:
    """The picture in a cell: bytes, `{bytes, path}`, or a path inside `folder`."""
    if isinstance(value, dict):
        data = value.get("bytes")
        return encoded(value.get("path") if data is None else data, folder)
    if isinstance(value, str):
        return FileSpan(folder / value) if stays_inside(value) else Absent(f"'{value}' points outside the folder")
    return value if isinstance(value, bytes) else Absent()


def stays_inside(path: str) -> bool:
    """Whether a relative path stays in the folder that it starts from."""
    steps = PurePosixPath(path.replace("\\", "/"))
    return bool(steps.parts) and not steps.is_absolute() and ".." not in steps.parts and ":" not in steps.parts[0]


@dataclass(frozen=True)
class Column:
    """A column by name and kind; `names` are the class names of kind "class"."""

    name: str
    kind: Kind
    names: tuple[str, ...] | None = None


@dataclass
class Source(ABC):
    """Rows of one split, in a fixed order. Pictures stay encoded; other columns are read when asked for.

    `notes` say what was chosen or left out; `orphans` are pictures that no metadata names.
    """

    name: str
    split: str
    columns: dict[str, Column]
    notes: list[str] = field(default_factory=list, kw_only=True)
    orphans: list[Place] = field(default_factory=list, kw_only=True)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def place(self, row: int) -> Place:
        """Where what is known of a row stands, for messages."""

    def picture_place(self, row: int, column: str | None = None) -> Place:
        """Where a row's picture stands, or that of another column, for messages."""
        return self.place(row)

    @abstractmethod
    def pictures(self, column: str) -> Iterator[Encoded]:
        """The encoded pictures of a column, row after row. Raises LimnerError where a whole file cannot be read."""

    @abstractmethod
    def values(self, column: str) -> list[Any]:
        """A column that is no picture, as Python values; None where a row has none."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the data does: a digest of files' paths, sizes and modification times."""


@dataclass
class ShardSource(Source):
    """Rows of files one after the other, any of whose pictures can be read by itself."""

    files: list[File] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """The row numbers at which the files end."""

    @abstractmethod
    def picture(self, column: str, row: int) -> Encoded:
        """One row's encoded picture. Raises LimnerError where a whole file cannot be read."""

    def runs(self) -> list[int]:
        """The row numbers at which what is best read in one go ends."""
        return self.ends

    def fingerprint(self) -> str:
        return stat_digest(self.files)


def stat_digest(paths: Iterable[File]) -> str:
    """A digest of paths, sizes and modification times, in this order; a missing file counts as such."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(f"{absolute(path)}\0{stamp(path)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def kind_of(values: Iterable[Any]) -> Kind:
    """The kind of a column of Python values (None: no value)."""
    kinds = {type(value) for value in values} - {type(None)}
    if kinds <= {str}:
        return "text"
    if kinds <= {int, bool}:
        return "integer"
    return "number" if kinds <= {int, float} else "other"
