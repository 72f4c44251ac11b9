"""Tiny data sets made on the spot, in every form that Limner reads."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Pixels = np.ndarray[Any, Any]


def pixels(seed: int, size: tuple[int, int] = (8, 8), channels: int = 3) -> Pixels:
    """Random uint8 (H, W, C), or (H, W) with one channel; the same for the same seed."""
    shape = size if channels == 1 else (*size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(picture: Pixels | Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """An encoded picture."""
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write(path: Path, data: bytes | str) -> Path:
    """A file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def picture(path: Path, seed: int, size: tuple[int, int] = (8, 8)) -> Path:
    """A PNG file of random pixels."""
    return write(path, encode(pixels(seed, size)))


def class_folder(root: Path, classes: Sequence[str] = ("cat", "dog"), each: int = 3) -> Path:
    """`root/class/0.png` and so on; picture k of class c has seed 100 c + k."""
    for c, name in enumerate(classes):
        for k in range(each):
            picture(root / name / f"{k}.png", 100 * c + k)
    return root


def metadata_folder(root: Path, rows: Sequence[Mapping[str, Any]], pictures: int | None = None) -> Path:
    """`root/0.png`... and `root/metadata.jsonl`, whose rows get `file_name` by their number if they have none."""
    for k in range(len(rows) if pictures is None else pictures):
        picture(root / f"{k}.png", k)
    lines = [json.dumps({"file_name": f"{k}.png"} | dict(row)) for k, row in enumerate(rows)]
    write(root / "metadata.jsonl", "\n".join(lines) + "\n")
    return root


def parquet(
    path: Path, columns: Mapping[str, Sequence[Any]], features: Mapping[str, Any] | None = None, **options: Any
) -> Path:
    """A Parquet file; a column of bytes is a column of pictures. `features` is what `datasets` would write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, values in columns.items():
        if any(isinstance(value, bytes) for value in values):
            values = [{"bytes": value, "path": None} for value in values]
        arrays[name] = pa.array(values)
    table = pa.table(arrays)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **options)
    return path


def class_label(*names: str) -> dict[str, Any]:
    """The feature that names the numbers of a label column."""
    return {"_type": "ClassLabel", "names": list(names)}


def tar(path: Path, members: Mapping[str, bytes | str]) -> Path:
    """A tar file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            raw = data if isinstance(data, bytes) else data.encode()
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return path
