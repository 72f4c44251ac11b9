"""A diffusion training that takes milliseconds a step: 8x8 pictures of two colours, a U-Net of one level."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from limner import build
from limner.config import RunConfig
from limner.training.loop import TrainResult, train
from limner.training.task import Task
from limner.training.tasks import ClassifierTask, DiffusionTask

SIZE = 8


class Pictures:
    """Noisy pictures, class 0 reddish and class 1 bluish, flipped at random where a generator is given."""

    def __init__(self, rows: int = 48, held_out: int = 8) -> None:
        chance = np.random.default_rng(0)
        self.labels = self.groups = np.arange(rows) % 2
        self.pixels = chance.integers(0, 120, (rows, SIZE, SIZE, 3), dtype=np.uint8)
        self.pixels[self.labels == 0, :, :, 0] += 120
        self.pixels[self.labels == 1, :, :, 2] += 120
        self.train, self.held_out = np.arange(held_out, rows), np.arange(held_out)
        self.digest = f"{rows} tiny pictures"

    def batch(self, rows: npt.NDArray[np.int64], generator: np.random.Generator | None = None) -> dict[str, Any]:
        pictures = self.pixels[rows]
        if generator is not None:
            mirrored = generator.random(len(rows)) < 0.5
            pictures = np.where(mirrored[:, None, None, None], pictures[:, :, ::-1], pictures)
        image = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return {"image": image, "label": torch.from_numpy(self.labels[rows])}

    def uint8(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return self.pixels[rows]


def recipe(task: str = "diffusion", **training: Any) -> RunConfig:
    """The tiny recipe, with these settings of `training`."""
    settings = {
        "batch": 8,
        "images": 160,
        "warmup_images": 16,
        "precision": "fp32",
        "compile": "off",
        "log_every": 16,
        "held_out_every": 10_000,
        "preview_every": 10_000,
        "checkpoint_every": 10_000,
        "previews": 2,
    }
    return RunConfig.model_validate(
        {
            "task": task,
            "data": {"size": SIZE, "source": "tiny"},
            "model": {
                "kind": "unet" if task == "diffusion" else "classifier",
                "levels": [{"channels": 8}],
                "middle": "none",
                "norm_groups": 4,
                "head_dim": 8,
                "dropout": 0.1,
            },
            "conditions": [{"kind": "label", "dropout": 0.2}] if task == "diffusion" else [],
            "classes": ["red", "blue"],
            "sampling": {"steps": 2},
            "training": settings | training,
        }
    )


def make_task(config: RunConfig, data: Pictures) -> Task:
    torch.manual_seed(config.training.seed)
    model = build.model(config)
    return DiffusionTask(model, config, data) if config.task == "diffusion" else ClassifierTask(model, config)


def run(out: Path, config: RunConfig, *, resume: bool = False, data: Pictures | None = None,
        change: Callable[[Task], None] | None = None, console: Console | None = None,
        started_at: float | None = None) -> TrainResult:  # fmt: skip
    """Train the tiny recipe into `out`, on one thread, which is fastest for it; `change` may spoil the task first."""
    torch.set_num_threads(1)
    data = data or Pictures()
    task = make_task(config, data)
    if change is not None:
        change(task)
    quiet = console or Console(quiet=True)
    return train(task, data, config, out, resume=resume, console=quiet, started_at=started_at)


def in_a_child(function: Callable[[], Any], environment: dict[str, str] | None = None) -> int:
    """Run a function in a forked process; returns its process id at once."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        from accelerate.state import AcceleratorState

        os.environ.update(environment or {})
        AcceleratorState._reset_state(True)
        function()
        code = 0
    except BaseException as error:
        print(f"child: {type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def exit_code(child: int, patience_s: float = 120.0) -> int:
    """Wait for a forked process: its exit code, or minus the signal that ended it."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise TimeoutError("the child did not end")
