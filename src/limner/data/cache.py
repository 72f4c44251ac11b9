"""Things worked out once and kept: built beside, sealed, renamed; a damaged entry is built again.

An entry is a directory `<root>/<kind>/<key>`. Its `seal.json` holds the size and a checksum of every file, so that a
copy cut short or a flipped bit is noticed. Removing the whole cache is always safe.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from limner.errors import LimnerError
from limner.native import cache_root

_SEAL = "seal.json"
_BLOCK = 1 << 20
_BLOCKS = 256


def entry(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """The directory of an entry, made by `build(directory)` when it is missing or damaged.

    Safe with any number of processes: the first builds, the others wait and then use what it built. A builder that
    is killed leaves nothing that could be taken for an entry. Raises LimnerError when the cache cannot be written.
    """
    home = cache_root() / kind
    final = home / key
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f"{key}.lock"):
            if not intact(final):
                _rebuild(home, key, build)
    except OSError as error:
        reason = error.strerror or error
        raise LimnerError(
            f"{home}: the cache cannot be written ({reason}); set LIMNER_CACHE to another folder"
        ) from None
    return final


def intact(directory: Path) -> bool:
    """Whether every file of an entry has the size and checksum of its seal."""
    try:
        seal = json.loads((directory / _SEAL).read_text(encoding="utf-8"))
        return bool(seal) and all(_stamp(directory / name) == stamp for name, stamp in seal.items())
    except (OSError, ValueError, AttributeError):
        return False


def _rebuild(home: Path, key: str, build: Callable[[Path], None]) -> None:
    """Build in a directory beside, then rename. The lock is held, so leftovers of this key have no owner."""
    for leftover in [*home.glob(f".{key}-*"), home / key]:
        _remove(leftover)
    beside = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=home))
    try:
        build(beside)
        seal = {path.name: _stamp(path) for path in sorted(beside.iterdir())}
        with open(beside / _SEAL, "w", encoding="utf-8") as file:
            json.dump(seal, file)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(home / key)
    finally:
        _remove(beside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _stamp(path: Path) -> list[int]:
    """Size, and a CRC over at most 256 blocks of 1 MiB spread evenly over the file: opening stays quick at any size."""
    size = path.stat().st_size
    stride = max(1, -(-size // (_BLOCK * _BLOCKS))) * _BLOCK
    checksum = 0
    with open(path, "rb") as file:
        for start in range(0, size, stride):
            file.seek(start)
            checksum = zlib.crc32(file.read(_BLOCK), checksum)
    return [size, checksum]
