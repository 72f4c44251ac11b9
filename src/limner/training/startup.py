"""What a training needs before its first step: devices and processes, trackers, a directory of its own."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from limner.config import RunConfig
from limner.errors import LimnerError, suggest
from limner.hardware import best_device
from limner.training.devices import patience
from limner.training.sharded import Sharding, refuse_others

TRACKERS = ("tensorboard", "wandb", "trackio")


def sharding_for(config: RunConfig, accelerator: Accelerator) -> Sharding | None:
    """What cuts the network where the recipe says so and there is more than one process. Raises LimnerError for a
    recipe that can't be cut, in one process too."""
    if not config.training.shard:
        return None
    refuse_others(config)
    if accelerator.num_processes == 1:
        return None
    return Sharding(accelerator.device, accelerator.num_processes, config.training.timeout_s)


@contextmanager
def reached(timeout_s: float) -> Iterator[None]:
    """What a process is told of when the others don't come to the start."""
    try:
        yield
    except RuntimeError as error:
        rank, processes = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if processes == "1":
            raise
        raise LimnerError(
            f"process {rank} of {processes}: the others weren't there within training.timeout_s, {timeout_s:g} s; see "
            f"what they say, and that MASTER_ADDR can be reached from all ({' '.join(str(error).split())[:160]})"
        ) from error


def accelerator_for(config: RunConfig, out: Path) -> Accelerator:
    """Devices and processes as `torchrun` or `accelerate launch` say, and the trackers of a recipe. Raises LimnerError
    for a tracker that is unknown or not installed, and where the other processes don't come."""
    for name in config.training.trackers:
        if name not in TRACKERS:
            raise LimnerError(f"training.trackers: '{name}' is unknown{suggest(name, TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise LimnerError(f"training.trackers: {name} is not installed; `pip install {name}`")
    # Told that there is only a CPU, accelerate uses gloo under torchrun; untold, it forgets the other processes.
    on_cpu = best_device().type == "cpu"
    waiting = patience(config.training.timeout_s)
    with reached(config.training.timeout_s):
        accelerator = Accelerator(
            cpu=on_cpu, log_with=list(config.training.trackers) or None, project_dir=out, kwargs_handlers=[waiting]
        )
    if config.training.trackers:
        accelerator.init_trackers("limner", config={"recipe": config.model_dump_json()})
    return accelerator


def claim(out: Path, resume: bool) -> None:
    """Refuse a directory that holds a run already, unless it is to be resumed."""
    if out.exists() and not out.is_dir():
        raise LimnerError(f"{out}: is a file; --out should be a directory")
    held = [name for name in ("checkpoints", "model.safetensors", "config.yaml") if (out / name).exists()]
    if held and not resume:
        raise LimnerError(f"{out}: holds a run already ({held[0]}); go on with it by --resume, or give another --out")
