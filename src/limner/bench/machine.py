"""What the machine can do at best: products of matrices, and copies."""

from __future__ import annotations

import platform
from typing import Any

import torch

from limner.bench.rounds import Contender
from limner.hardware import processor

SIDE = 2048
COPIED = 1 << 28
"""Bytes; far more than a cache holds."""
MATMUL_OPERATIONS = 2 * SIDE**3


def contenders(device: torch.device) -> dict[str, Contender]:
    """A product of square matrices in float32 and in bfloat16, and a copy of `COPIED` bytes."""
    return {
        "matmul fp32": _matmul(torch.float32, device),
        "matmul bf16": _matmul(torch.bfloat16, device),
        "copy": _copy(device),
    }


def _matmul(dtype: torch.dtype, device: torch.device) -> Contender:
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _copy(device: torch.device) -> Contender:
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def description(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), "system": platform.system()}  # fmt: skip
