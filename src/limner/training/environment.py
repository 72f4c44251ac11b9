"""On what a run was trained: versions, commit and hardware, a line for each sitting."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from limner.hardware import processor

FILE = "environment.jsonl"
PACKAGES = ("limner", "torch", "numpy", "accelerate", "datasets", "pillow", "pyarrow", "safetensors", "scipy")


def record(run: Path, images: int, device: torch.device, processes: int) -> None:
    """Add a line for a sitting that begins at so many images. Raises OSError."""
    with open(run / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps({"images": images, "processes": processes, **describe(device)}) + "\n")


def describe(device: torch.device) -> dict[str, Any]:
    """Versions of Python and of packages, Limner's commit (None outside a checkout), and hardware."""
    hardware: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count(), "cpu": processor(),
                                "threads": torch.get_num_threads(), "device": device.type}  # fmt: skip
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        hardware |= {"gpu": about.name, "gpu_bytes": about.total_memory, "cuda": torch.version.cuda,
                     "cudnn": torch.backends.cudnn.version()}  # fmt: skip
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    system = f"{platform.system()} {platform.release()}"
    return {"python": platform.python_version(), "system": system, "versions": versions, "commit": _commit(),
            "hardware": hardware}  # fmt: skip


@lru_cache
def _commit() -> str | None:
    """Of the checkout that this file is in, with -dirty where something was changed; None where there is none."""
    here = Path(__file__).parent
    asked = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
        tracked = subprocess.run(["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name],
                                 capture_output=True, timeout=10, check=False)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if tracked.returncode == 0 else None
