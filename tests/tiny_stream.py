"""Shards of tiny pictures, some of them corrupt, in which each picture tells its own number."""

from __future__ import annotations

import tarfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def numbered(number: int) -> bytes:
    """A 1x1 picture (PPM) whose colour is the number."""
    return b"P6 1 1 255\n" + number.to_bytes(3, "big")


def numbers(pictures: np.ndarray) -> list[int]:
    """The numbers of pictures (B, H, W, C)."""
    red, green, blue = pictures[:, 0, 0].astype(int).T
    return (red * 65536 + green * 256 + blue).tolist()


def tar_shards(folder: Path, shards: int, each: int, corrupt: Collection[int] = (), *, labels: bool = True) -> str:
    """`folder/0000.tar` and so on; a corrupt record's picture is cut short. Returns the pattern for all."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        with open(folder / f"{shard:04d}.tar", "wb") as file:
            for number in range(shard * each, (shard + 1) * each):
                file.write(member(f"{number:06d}.ppm", numbered(number)[: -2 if number in corrupt else None]))
                file.write(member(f"{number:06d}.cls", str(number % 3).encode()) if labels else b"")
            file.write(bytes(2 * tarfile.BLOCKSIZE))
    return str(folder / f"{{0000..{shards - 1:04d}}}.tar")


def member(name: str, data: bytes) -> bytes:
    """A file as it stands in a tar, several times as fast as `TarFile.addfile`."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf() + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def parquet_shards(folder: Path, shards: int, each: int, corrupt: Collection[int] = ()) -> str:
    """As `tar_shards`, with row groups of 100. Returns the folder."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        own = range(shard * each, (shard + 1) * each)
        pictures = [numbered(number)[: -2 if number in corrupt else None] for number in own]
        table = pa.table({"image": [{"bytes": data, "path": None} for data in pictures],
                          "label": [number % 3 for number in own]})  # fmt: skip
        pq.write_table(table, folder / f"train-{shard:05d}.parquet", row_group_size=100)
    return str(folder)
