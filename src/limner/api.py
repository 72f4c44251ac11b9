"""The library in a few calls: `load`, `train`, `check`. What `import limner` shows."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from limner import __version__, build, config, recipe
from limner.config import AutoencoderConfig, RunConfig
from limner.data.dataset import Dataset, prepare
from limner.errors import LimnerError, suggest
from limner.generator import Generator
from limner.guide import NoisyClassifier
from limner.interop.imported import Imported

Task = Literal["diffusion", "classifier", "autoencoder"]
Progress = Callable[[int, int], None]


# --- loading ------------------------------------------------------------------------------------------------------


def load(path: str | Path, *, flags: Mapping[str, Any] | str | Path | None = None,
         config: str | Path | None = None) -> Generator | NoisyClassifier:  # fmt: skip
    """A run, or a checkpoint of another project, ready to draw or to guide.

    flags: of a guided-diffusion `.pt`: a dict, a JSON file, or the command line that it was trained with.
    config: the YAML of a CompVis `.ckpt`. Raises LimnerError saying what is wrong with the file, or what it needs.
    """
    path = Path(path)
    if path.is_dir() and (path / "config.yaml").is_file():
        return _ready(read_run(path), digest_of(path / "model.safetensors"))
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise LimnerError(f"{path}: is no run, it has no config.yaml")
    if not path.exists():
        raise LimnerError(f"{path}: there is no such file or directory")
    from limner import interop

    found = interop.read(path, flags=flags, config=config)
    return _ready(found, digest_of(path) if path.is_file() else "")


def read_run(run: Path) -> Imported:
    """The recipe and weights of a run. Raises LimnerError for a missing or damaged file."""
    recipe_of_run = config.load(run / "config.yaml")
    weights = run / "model.safetensors"
    if not weights.is_file():
        raise LimnerError(f"{run}: holds no model yet (model.safetensors); train it, or go on with --resume")
    return Imported(recipe_of_run, read_tensors(weights))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file as float32. Raises LimnerError for a damaged file."""
    try:
        with safe_open(path, framework="pt") as stream:
            return {name: stream.get_tensor(name).float() for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LimnerError(f"{path}: damaged, not readable as safetensors ({' '.join(str(error).split())})") from None


def digest_of(path: Path) -> str:
    """The first 12 hex digits of a file's SHA-256, or nothing where there is no file."""
    if not path.is_file():
        return ""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]


def _ready(found: Imported, digest: str) -> Generator | NoisyClassifier:
    model = build.model(found.config)
    _put(model, found.state)
    if isinstance(found.config.model, AutoencoderConfig):
        return Generator(found.config, model, digest)
    kind = NoisyClassifier if found.config.task == "classifier" else Generator
    return kind(found.config, model, digest)


def _put(model: build.Model, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    for name in [*own, *state]:
        if name not in own or name not in state:
            whose = "is missing from the weights" if name in own else "is unknown to the recipe's model"
            raise LimnerError(f"model.safetensors: '{name}' {whose}; config.yaml and weights don't belong together")
        if own[name].shape != state[name].shape:
            raise LimnerError(f"model.safetensors: '{name}' is {list(state[name].shape)}, the recipe's model has "
                              f"{list(own[name].shape)}; config.yaml and weights don't belong together")  # fmt: skip
    model.load_state_dict(dict(state))


def convert(source: str | Path, out: str | Path, *, flags: Mapping[str, Any] | str | Path | None = None,
            config: str | Path | None = None) -> Imported:  # fmt: skip
    """Make a run of another project's checkpoint: `config.yaml` and `model.safetensors` in the directory `out`.

    flags, config: as in `load`. Raises LimnerError, and then writes nothing; also where `out` holds something already.
    """
    from limner import interop
    from limner.training.checkpoint import Checkpoints

    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LimnerError(f"{out}: holds something already; give another directory")
    if not Path(source).exists():
        raise LimnerError(f"{source}: there is no such file or directory")
    found = interop.read(source, flags=flags, config=config)
    _put(build.model(found.config), found.state)
    out.mkdir(parents=True, exist_ok=True)
    Checkpoints(out).publish(found.state, found.config)
    return found


# --- training -----------------------------------------------------------------------------------------------------


def train(
    data: str | Path | None = None,
    *,
    out: str | Path,
    preset: str | None = None,
    task: Task | None = None,
    budget: str | float | None = None,
    images: str | int | None = None,
    for_run: str | Path | None = None,
    settings: Sequence[str] = (),
    seed: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    console: Any = None,
    **overrides: Any,
) -> Any:
    """Train a model on pictures, and leave a run in `out`.

    data: whatever `datasets` reads, or the name of a preset that brings its own; `resume` may leave it out.
    preset: a name of `build.preset_names()`, or a recipe file. budget: "20m"; images: "2M". for_run: the diffusion run
    that a classifier is to guide. settings: `"training.batch=32"`, or as keywords, `training={"batch": 32}`.
    Returns a `TrainResult`. Raises LimnerError for wrong input before anything is written.
    """
    from limner.training.autoencoder import AutoencoderTask
    from limner.training.loop import train as run_loop
    from limner.training.tasks import ClassifierTask, DiffusionTask

    started_at = time.monotonic()
    out = Path(out)
    wanted = _recipe(data, out, preset, task, budget, images, for_run, settings, seed, resume, overrides)
    if wanted.training.images is None and wanted.training.budget_s is None:
        raise LimnerError("training has no end: give a budget, such as 20m, or a number of images, such as 2M")
    pictures = prepare(wanted.data, recipe.wants(wanted), progress)
    complete = recipe.complete(wanted, pictures, str(wanted.data.source))
    torch.manual_seed(complete.training.seed)
    model = build.model(complete)
    if model.conditioner is not None and pictures.texts is not None:
        model.conditioner.learn({"text": [pictures.texts[row] for row in pictures.train]})
    if complete.task == "classifier":
        made: Any = ClassifierTask(model, complete)
    elif complete.task == "autoencoder":
        made = AutoencoderTask(model, complete, pictures)
    else:
        made = DiffusionTask(model, complete, pictures)
    return run_loop(made, pictures, complete, out, resume=resume, started_at=started_at, console=console)


def _recipe(data: str | Path | None, out: Path, preset: str | None, task: Task | None, budget: str | float | None,
            images: str | int | None, for_run: str | Path | None, settings: Sequence[str], seed: int | None,
            resume: bool, overrides: Mapping[str, Any]) -> RunConfig:  # fmt: skip
    source = None if data is None else str(data)
    if source in build.preset_names() and not Path(source or "").exists():
        preset, source = preset or source, None
    stored = out / "config.yaml"
    if resume and preset is None and stored.is_file():
        preset = str(stored)
    if preset is None:
        preset = {"classifier": "cifar10-classifier"}.get(task or "", "default")
    raw = recipe.raw_recipe(preset, source=source, settings=settings, budget=budget, images=images, seed=seed)
    for name, values in overrides.items():
        if name not in RunConfig.model_fields:
            raise LimnerError(f"option '{name}': there is none such{suggest(name, RunConfig.model_fields)}")
        raw[name] = {**raw.get(name, {}), **values} if isinstance(values, Mapping) else values
    if task is not None:
        raw["task"] = task
    if raw.get("task") == "classifier" and preset != str(stored):
        if for_run is None:
            raise LimnerError("task classifier: say which diffusion run it is to guide, with --for RUN")
        raw = recipe.for_classifier(raw, config.load(Path(for_run) / "config.yaml"), Path(for_run))
    elif for_run is not None and raw.get("task") != "classifier":
        raise LimnerError("--for: goes with --task classifier")
    if not raw.get("data", {}).get("source"):
        raise LimnerError("no data: name a folder, a Parquet file, a WebDataset tar or a hub's data set")
    if preset == "default":
        raw = recipe.automatic(raw)
    raw["provenance"] = recipe.provenance(raw, preset, __version__)
    return config.parse(raw, preset)


def data_of(run: RunConfig, progress: Progress | None = None) -> Dataset:
    """The data set that a run was trained on, as its recipe names it."""
    return prepare(run.data, recipe.wants(run), progress)
