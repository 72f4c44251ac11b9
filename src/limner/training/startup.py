"""What a training needs before its first step: devices and processes, trackers, a directory of its own."""

from __future__ import annotations

import importlib.util
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
    return None if accelerator.num_processes == 1 else Sharding(accelerator.device, accelerator.num_processes)


def accelerator_for(config: RunConfig, out: Path) -> Accelerator:
    """Devices and processes as `torchrun` or `accelerate launch` say, and the trackers of a recipe. Raises LimnerError
    for a tracker that is unknown or not installed."""
    for name in config.training.trackers:
        if name not in TRACKERS:
            raise LimnerError(f"training.trackers: '{name}' is unknown{suggest(name, TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise LimnerError(f"training.trackers: {name} is not installed; `pip install {name}`")
    # Told that there is only a CPU, accelerate uses gloo under torchrun; untold, it forgets the other processes.
    on_cpu = best_device().type == "cpu"
    waiting = patience(config.training.timeout_s)
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
