"""Files of a data set that may lie elsewhere: local paths, and addresses that fsspec opens (s3://, gs://, https://)."""

from __future__ import annotations

import errno
import glob
import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from limner.data.text import printable, reason
from limner.errors import LimnerError

SUFFIXES = (".tar", ".parquet")
MOST_FILES = 1_000_000
_RANGE = re.compile(r"\{(-?\d{1,12})\.\.(-?\d{1,12})[.}]")
_SPECIAL = frozenset("{*?[")


@dataclass(frozen=True, slots=True)
class Url:
    """A file that fsspec opens; what `Path` calls the same means the same."""

    address: str

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, inside: str) -> Url:
        return Url(f"{self.address.rstrip('/')}/{inside}")

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    @property
    def parent(self) -> Url:
        return Url(self.address.rpartition("/")[0])

    @property
    def system(self) -> tuple[Any, str]:
        """fsspec's file system and the path in it. Raises LimnerError for a kind that isn't known or installed."""
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise LimnerError(f"{printable(self.address)}: cannot be opened ({reason(error)})") from None


File = Path | Url


def is_url(text: str) -> bool:
    """Whether a source is an address rather than a path."""
    return "://" in text


def is_pattern(text: str) -> bool:
    """Whether a source stands for several files: `{0000..0009}`, `*`, `?`, `[ab]`."""
    return bool(_SPECIAL & set(text))


def expand(pattern: str) -> list[File]:
    """The tar and Parquet files that a pattern, an address or a folder at an address stands for, in order.

    Raises LimnerError where there are none, or one of those that braces spell out isn't there.
    """
    from braceexpand import braceexpand

    ranges = (abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(pattern))
    if math.prod(ranges) * 2 ** pattern.count(",") > MOST_FILES:  # the library would write all of them out
        raise LimnerError(f"{printable(pattern)}: stands for more than {MOST_FILES:,} files")
    try:
        texts = list(braceexpand(pattern))
    except ValueError as error:
        raise LimnerError(f"{printable(pattern)}: its braces make no sense ({reason(error)})") from None
    found = [file for text in texts for file in (_remote(text) if is_url(text) else _local(text))]
    if not found:
        raise LimnerError(f"{printable(pattern)}: there is no such tar or Parquet file")
    return found


def _local(text: str) -> list[File]:
    paths = sorted(Path(match) for match in glob.glob(text)) if is_pattern(text) else [Path(text)]
    for path in paths:
        if not path.is_file():
            raise LimnerError(f"{printable(str(path))}: no such file")
    return [path for path in paths if path.suffix.lower() in SUFFIXES]


def _remote(text: str) -> list[File]:
    system, path = Url(text).system
    with _as_os_error(text):
        if is_pattern(path):
            found = sorted(system.glob(path))
        else:
            found = sorted(system.find(path)) if system.isdir(path) else [path]
    files = [name for name in found if PurePosixPath(name).suffix.lower() in SUFFIXES]
    return [Url(system.unstrip_protocol(name)) for name in files]


@contextmanager
def _as_os_error(where: object) -> Iterator[None]:
    """Whatever a remote file system raises, as the OSError that a disk would raise."""
    try:
        yield
    except (OSError, LimnerError):
        raise
    except Exception as error:  # each has classes of its own
        raise OSError(errno.EIO, f"{where}: {reason(error)}") from error


def open_file(file: File) -> BinaryIO:
    """A file to read and to seek in. Raises OSError, and ValueError for a path that no system has."""
    if isinstance(file, Path):
        return open(file, "rb")
    system, path = file.system
    with _as_os_error(file):
        return cast(BinaryIO, system.open(path, "rb"))


def read_span(file: File, offset: int, size: int | None) -> bytes:
    """`size` bytes from `offset`, or all that follow. Raises as `open_file`."""
    if isinstance(file, Url):
        system, path = file.system
        with _as_os_error(file):
            return system.cat_file(path, start=offset, end=None if size is None else offset + size)
    with open(file, "rb") as stream:
        stream.seek(offset)
        return stream.read() if size is None else stream.read(size)


def size_of(file: File) -> int:
    """In bytes. Raises OSError."""
    if isinstance(file, Path):
        return file.stat().st_size
    system, path = file.system
    with _as_os_error(file):
        return int(system.size(path))


def stamp(file: File) -> str:
    """Changes when the file does; "missing" where it isn't there."""
    try:
        if isinstance(file, Path):
            stat = file.stat()
            return f"{stat.st_size}\0{stat.st_mtime_ns}"
        system, path = file.system
        with _as_os_error(file):
            return str(system.ukey(path))
    except OSError:
        return "missing"


def absolute(file: File) -> str:
    """A name that doesn't depend on the working directory."""
    return str(file.absolute()) if isinstance(file, Path) else file.address


def contents_digest(files: Iterable[File]) -> str:
    """A digest of names and sizes, the same wherever the files lie."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.name}\0{size_of(file)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
