"""Writing what was converted: weight by weight, so that memory holds one of them, and all of it or nothing.

Safetensors: eight bytes with the length of the header, the header (JSON: name, dtype, shape, first and last byte), the
numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from limner.errors import LimnerError

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
          torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
Tell = Callable[[int, int], None]
"""Told how many weights are written, of how many."""


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `out` at the end; nothing is left of it where that isn't
    reached. Raises LimnerError where `out` holds something already, or the disk refuses."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LimnerError(f"{out}: holds something already; give another directory")
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            out.rmdir()
        partial.replace(out)
    except OSError as error:
        raise LimnerError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_weights(path: Path, weights: Mapping[str, Tensor], tell: Tell | None = None) -> None:
    """A safetensors file of `weights`, each asked for twice: for its shape, and to be written."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in weights.items():
        start, end = end, end + weight.numel() * weight.element_size()
        header[name] = {"dtype": DTYPES[weight.dtype], "shape": list(weight.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)))
        stream.write(encoded)
        for number, weight in enumerate(weights.values(), 1):
            stream.write(weight.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if tell is not None:
                tell(number, len(weights))
        stream.flush()
        os.fsync(stream.fileno())
