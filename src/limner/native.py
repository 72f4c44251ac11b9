"""The few loops in C, compiled where they are first used; whoever asks gets None where that can't be done.

Several processes may compile the same at once: each writes a file of its own and renames it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

FLAGS = ("-O3", "-march=native", "-fno-strict-aliasing", "-fopenmp", "-fPIC")
"""Of the compiler, for this very processor. What was written as numbers is read as vectors, or as pairs. OpenMP's
runtime isn't linked: PyTorch has loaded one, and the threads of a second would fight with its own."""
COMPILERS = ("gcc", "cc", "clang")
SECONDS = 60
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""PyTorch asks Linux for pages of 2 MiB for large tensors, if it finds 1 there in the environment when the process
makes its first tensor. Between pages of 4 KiB passes over whole pictures wait for where the next one is."""
os.environ.setdefault(HUGE_PAGES, "1")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""As malloc.h of glibc numbers them."""
LARGEST, KEPT = 1 << 25, 1 << 30
"""Bytes: of a tensor whose place is kept, which glibc allows no larger; and of free memory that is kept."""


class Shape(ctypes.Structure):
    """Of pictures (N, H, W, C), as `vectors.h` has it."""

    _fields_ = [(name, ctypes.c_long) for name in ("pictures", "height", "width", "channels")]


def cache_root() -> Path:
    """`$LIMNER_CACHE`, else `~/.cache/limner`."""
    chosen = os.environ.get("LIMNER_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "limner"


def compiled(source: Path, functions: Mapping[str, Sequence[Any]], number: torch.dtype = torch.float32) -> (
    ctypes.CDLL | None
):  # fmt: skip
    """A C file's functions, by name with the ctypes of what they take; they give 0, else an error. number: what they
    find pictures in, float32 or bfloat16. None: not Linux, no compiler, nowhere to keep what it makes, or
    LIMNER_NATIVE=0."""
    if sys.platform != "linux" or os.environ.get("LIMNER_NATIVE") == "0":
        return None
    try:
        kept = _place(f"{source.stem}-{str(number).removeprefix('torch.')}-{_key(source)}.so")
        if not kept.exists():
            _compile(source, kept, ["-DBF16"] if number == torch.bfloat16 else [])
        found = ctypes.CDLL(str(kept))
    except (OSError, subprocess.SubprocessError):
        return None
    for name, takes in functions.items():
        getattr(found, name).argtypes = takes
    return found


def remembered(question: str, source: Path, measure: Callable[[], bool]) -> bool:
    """What was measured with the functions of a C file: once on each kind of processor, then kept beside them."""
    kept = _place(f"{question}-{_key(source)}")
    with contextlib.suppress(OSError):
        return kept.read_text(encoding="utf-8") == str(True)
    answer = measure()
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        made = Path(folder) / "made"
        made.write_text(str(answer), encoding="utf-8")
        with contextlib.suppress(FileExistsError):  # of several processes the first one's counts
            os.link(made, kept)
        return kept.read_text(encoding="utf-8") == str(True)
    return answer


def call(loops: ctypes.CDLL | None, function: str, *given: Any) -> None:
    """Call a function, tensors by their place in memory, one number after another. Raises MemoryError."""
    assert loops is not None
    if getattr(loops, function)(*(x.data_ptr() if isinstance(x, Tensor) else x for x in given)):
        raise MemoryError(f"{function}: no memory left")


def takes(picture: Tensor, *others: Tensor) -> bool:
    """Whether loops in C can read these: on a CPU, the picture in float32 or bfloat16, the others in float32; really
    there, not to be compiled; and nobody counts PyTorch's operations, who would miss them."""
    return (
        all(x.device.type == "cpu" and x.numel() for x in (picture, *others))
        and all(type(x) in (Tensor, nn.Parameter) for x in (picture, *others))
        and picture.dtype in (torch.float32, torch.bfloat16)
        and all(x.dtype == torch.float32 for x in others)
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
    )


def autocast_dtype() -> torch.dtype:
    """What autocast has networks compute in on a CPU now; float32: there's none."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


@lru_cache
def keep_memory() -> None:
    """Let this process keep what it once had of memory: glibc otherwise gives the place of each large tensor back to
    the system, which then clears it again page by page; a tenth of a training step on a CPU. Elsewhere nothing."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def _place(name: str) -> Path:
    return cache_root() / "native" / name


def _key(source: Path) -> str:
    """Names the source, how it is compiled, and the kind of processor: a home may be shared by different machines."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    kind = "".join(line for line in cpu if line.startswith(("model", "flags", "Features", "CPU part")))
    files = (source, *sorted(source.parent.glob("*.h")))
    parts = (
        *(file.read_bytes() for file in files),
        " ".join(FLAGS).encode(),
        platform.machine().encode(),
        kind.encode(),
    )
    return hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()


def _compile(source: Path, kept: Path, defined: Sequence[str]) -> None:
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        made = Path(folder) / "made"
        steps = ([*FLAGS, *defined, "-c", str(source), "-o", f"{made}.o"], ["-shared", f"{made}.o", "-o", f"{made}.so"])
        for arguments in steps:
            subprocess.run([compiler, *arguments], check=True, capture_output=True, timeout=SECONDS)
        os.replace(f"{made}.so", kept)
