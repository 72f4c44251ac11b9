"""What rows a data set has, before any picture is decoded: one `Source` per form in which data comes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from limner.errors import LimnerError

Kind = Literal["image", "class", "text", "integer", "number", "other"]


@dataclass(frozen=True)
class Place:
    """Where a row stands: a file, and in it a line (counted from 1) or a row (counted from 0)."""

    file: str
    line: int | None = None
    row: int | None = None

    def __str__(self) -> str:
        if self.line is not None:
            return f"{self.file} line {self.line}"
        return self.file if self.row is None else f"{self.file} row {self.row}"


@dataclass(frozen=True)
class Problem:
    """Something wrong with the data, and where."""

    place: Place
    what: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


Tell = Callable[[Problem], None]
"""Receives problems: `refuse` stops at the first, a list's `append` collects them all."""


def refuse(problem: Problem) -> None:
    """Raise the problem as a LimnerError."""
    raise LimnerError(str(problem))


@dataclass(frozen=True)
class FileSpan:
    """An encoded picture that lies in a file: the whole file, or `size` bytes from `offset`."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes. Raises OSError."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)


Encoded = bytes | FileSpan | None
"""An encoded picture, or None where a row has none."""


@dataclass(frozen=True)
class Column:
    """A column by name and kind; `names` are the class names of kind "class"."""

    name: str
    kind: Kind
    names: tuple[str, ...] | None = None


@dataclass
class Source(ABC):
    """Rows of one split, in a fixed order. Pictures stay encoded; other columns are read when asked for."""

    name: str
    split: str
    splits: tuple[str, ...]
    columns: dict[str, Column]
    notes: list[str] = field(default_factory=list)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def place(self, row: int) -> Place:
        """Where a row stands, for messages."""

    @abstractmethod
    def pictures(self, column: str) -> Iterator[Encoded]:
        """The encoded pictures of a column, row after row."""

    @abstractmethod
    def values(self, column: str) -> list[Any]:
        """A column that is no picture, as Python values; None where a row has none."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the data does: a digest of files' paths, sizes and modification times."""


def stat_digest(paths: Iterable[Path]) -> str:
    """A digest of paths, sizes and modification times."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        stat = path.stat()
        digest.update(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def open_source(source: str, split: str | None = None, tell: Tell = refuse) -> Source:
    """Find out what `source` is and read all of it but the pictures.

    Raises LimnerError when there is nothing to read; problems of single rows go to `tell`.
    """
    from limner.data.tables import parquet_source

    path = Path(source).expanduser()
    if not path.exists():
        raise LimnerError(f"{source}: no such file or folder")
    return parquet_source(path, split, tell)
