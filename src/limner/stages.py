"""Training stage by stage: an autoencoder, the latents of all pictures, then what learns from them (Rombach et al.
2022, arXiv:2112.10752, section 3). In pixel space the last stage is the only one.

A run that trains in latents keeps its first stage in `autoencoder/`, a run of its own: `--resume` finds there how far
it came, and the latents it needs. The trained autoencoder is inside the finished run's `model.safetensors` as well.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from limner import build
from limner.config import AutoencoderConfig, LatentSpace, RunConfig
from limner.data.dataset import Dataset
from limner.data.latents import with_latents
from limner.data.pixels import Progress
from limner.data.stream import StreamDataset
from limner.errors import LimnerError
from limner.hardware import best_device
from limner.interop import hf_lora
from limner.nn.autoencoder import Autoencoder
from limner.training import loop, lora
from limner.training.autoencoder import AutoencoderTask
from limner.training.checkpoint import Checkpoints, load_weights, read_model
from limner.training.initial import Initial, begin, is_main_process, say
from limner.training.loop import TrainResult
from limner.training.stream import CORRUPT, CorruptRows
from limner.training.tasks import ClassifierTask, DiffusionTask

FIRST_STAGE = "autoencoder"
"""The directory of the first stage, inside the run."""


@dataclass(frozen=True)
class Given:
    """A trained autoencoder to take instead of training one: its network, weights by name, the pictures' channels."""

    section: AutoencoderConfig
    weights: dict[str, Tensor]
    channels: int
    where: str


def train(recipe: RunConfig, pictures: Dataset, out: Path, *, given: Given | None = None,
          initial: Initial | None = None, resume: bool = False, started_at: float | None = None,
          progress: Progress | None = None, console: Console | None = None) -> TrainResult:  # fmt: skip
    """Train what a complete recipe says, all of its stages in turn, and leave a run in `out`.

    given: the autoencoder of a latent recipe, where it has been trained already; a stage that is in `out` goes before.
    initial: a trained model to begin with, unless `out` holds a checkpoint of this run, which goes before.
    started_at: `time.monotonic()` when the budget began to run. progress(done, rows): of encoding.
    Raises LimnerError as `training.loop.train` and `data.latents.with_latents` do.
    """
    started_at = time.monotonic() if started_at is None else started_at
    spent_s, data = 0.0, pictures
    loop.claim(out, resume)
    torch.manual_seed(recipe.training.seed)
    model = build.model(recipe)
    texts = None if pictures.texts is None else [pictures.texts[row] for row in pictures.train]
    recipe = begin(model, recipe, initial, out, texts, console)
    if isinstance(recipe.space, LatentSpace):
        if given is not None:
            _keep(given, recipe, out / FIRST_STAGE)
        Checkpoints(out).begin(recipe)
        resume = True
        if recipe.space.source is None:
            begun = Checkpoints(out).newest() is not None
            first = _first_stage(recipe, recipe.space, pictures, out / FIRST_STAGE, started_at, console, over=begun)
            if first.stopped is not None:
                return TrainResult(out, 0, first.seconds, first.figures, first.stopped)
            spent_s, started_at = first.seconds, time.monotonic()
        autoencoder = _kept(recipe, recipe.space, out / FIRST_STAGE)
        data = with_latents(pictures, autoencoder, progress=progress)
        if isinstance(pictures, StreamDataset):
            CorruptRows(pictures, out / CORRUPT, writes=is_main_process())
        if model.autoencoder is not None:
            model.autoencoder.load_state_dict(autoencoder.state_dict())
    result = loop.train(_task(model, recipe, data), data, recipe, out, resume=resume, started_at=started_at,
                        spent_s=spent_s, console=console)  # fmt: skip
    if recipe.training.lora is not None and is_main_process():
        say(f"{out}: {_adapters(recipe, out)}", console)
    return result


def _adapters(recipe: RunConfig, out: Path) -> str:
    """Write the adapters of the newest checkpoint for diffusers, beside the model that has them added in; returns what
    is to be said of it."""
    newest = Checkpoints(out).newest()
    if newest is None:
        return "no adapters yet"
    with safe_open(newest / "ema.safetensors", framework="pt") as stream:
        names = [name for name in stream.keys() if lora.is_adapter(name)]  # noqa: SIM118
        pairs = lora.pairs({name: stream.get_tensor(name) for name in names})
    folder = out / "lora"
    try:
        weights = hf_lora.weights(recipe, pairs, str(out))
        folder.mkdir(exist_ok=True)
        save_file(weights, folder / f".{hf_lora.FILE}", metadata={"format": "pt"})
        (folder / f".{hf_lora.FILE}").replace(folder / hf_lora.FILE)
    except LimnerError as error:
        return f"the adapters are in model.safetensors, and not by themselves for diffusers: {error}"
    except (OSError, SafetensorError) as error:
        raise LimnerError(f"{folder}: cannot be written ({' '.join(str(error).split())})") from None
    return f"the adapters are in model.safetensors, and by themselves in {folder / hf_lora.FILE}"


def _task(model: build.Model, recipe: RunConfig, data: Dataset) -> Any:
    if recipe.task == "classifier":
        return ClassifierTask(model, recipe)
    return (AutoencoderTask if recipe.task == "autoencoder" else DiffusionTask)(model, recipe, data)


def _first_stage(recipe: RunConfig, space: LatentSpace, pictures: Dataset, out: Path, started_at: float,
                 console: Console | None, *, over: bool) -> TrainResult:  # fmt: skip
    """Train the autoencoder, or go on with it, within its share of the budget; not where it's `over`: what has learned
    from its latents would not know others, though a longer budget has a larger share."""
    whole, own = recipe.training, space.training
    done = Checkpoints(out).latest() if over else None
    if done is not None:
        own = own.model_copy(update={"images": done.images, "budget_s": None})
    elif own.images is None and own.budget_s is None:
        images = None if whole.images is None else max(1, round(space.share * whole.images))
        budget_s = None if whole.budget_s is None else space.share * whole.budget_s
        own = own.model_copy(update={"images": images, "budget_s": budget_s})
    stage = recipe.model_copy(update={"task": "autoencoder", "model": space.autoencoder, "conditions": (),
                                      "training": own.model_copy(update={"seed": whole.seed,
                                                                         "deterministic": whole.deterministic}),
                                      "space": RunConfig.model_fields["space"].default})  # fmt: skip
    torch.manual_seed(whole.seed)
    task = AutoencoderTask(build.model(stage), stage, pictures)
    return loop.train(task, pictures, stage, out, resume=True, started_at=started_at, console=console)


def _keep(given: Given, recipe: RunConfig, out: Path) -> None:
    """Put a given autoencoder where a trained one would be. Raises LimnerError where it doesn't fit the pictures."""
    if given.channels != recipe.data.channels:
        raise LimnerError(f"{given.where}: its autoencoder takes pictures of {given.channels} channels, the data have "
                          f"{recipe.data.channels}; set data.channels={given.channels}")  # fmt: skip
    if (out / "model.safetensors").is_file():
        return
    stage = recipe.model_copy(update={"task": "autoencoder", "model": given.section, "conditions": (),
                                      "space": RunConfig.model_fields["space"].default})  # fmt: skip
    weights = {f"autoencoder.{name}": tensor for name, tensor in given.weights.items()}
    run = Checkpoints(out)
    run.begin(stage)
    run.publish(weights, stage)


def _kept(recipe: RunConfig, space: LatentSpace, out: Path) -> Autoencoder:
    """The first stage, frozen. Raises LimnerError where it isn't there, or isn't the recipe's."""
    if not (out / "model.safetensors").is_file():
        raise LimnerError(f"{out}: holds no autoencoder; give it again with --autoencoder RUN")
    autoencoder = build.autoencoder(space.autoencoder, recipe.data.channels).freeze()
    weights = {name.removeprefix("autoencoder."): tensor for name, tensor in read_model(out).items()}
    load_weights(autoencoder, weights, str(out), "the recipe and this autoencoder don't belong together")
    return autoencoder.to(best_device())
