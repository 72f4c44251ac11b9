"""The library in a few calls: `load`, `train`, `check`. What `import limner` shows."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from limner import __version__, build, config, recipe, zoo
from limner.config import RunConfig
from limner.data.dataset import Dataset, prepare
from limner.errors import LimnerError, suggest
from limner.generator import Generator
from limner.guide import NoisyClassifier
from limner.interop.conversion import Conversion
from limner.interop.imported import Imported

if TYPE_CHECKING:
    from limner import stages
    from limner.training.initial import Initial

Task = Literal["diffusion", "classifier", "autoencoder", "distill"]
Progress = Callable[[int, int], None]


# --- loading ------------------------------------------------------------------------------------------------------


def load(path: str | Path, *, flags: Mapping[str, Any] | str | Path | None = None,
         config: str | Path | None = None, int8: bool = False) -> Generator | NoisyClassifier:  # fmt: skip
    """A run, a model that comes with Limner by its name (`limner models`), or a checkpoint or folder of another
    project, ready to draw or to guide.

    flags: of a guided-diffusion `.pt`: a dict, a JSON file, or the command line that it was trained with.
    config: the YAML of a CompVis `.ckpt`. int8: draw in 8 bits on a CPU, faster and almost the same; see
    docs/performance.md. Raises LimnerError saying what is wrong with the file, what it needs, or why int8 can't be had.
    """
    found, digest = _found(path, flags, config)
    if int8 and found.config.task == "classifier":
        raise LimnerError(f"{path}: holds a classifier, which guides by gradients, and int8 has none; leave int8 out")
    return _ready(found, digest, int8)


def _found(path: str | Path, flags: Any, config: Any) -> tuple[Imported, str]:
    """The recipe and weights of what `load` reads, and the digest of its file."""
    path = zoo.located(path)
    if path.is_dir() and (path / "config.yaml").is_file():
        if flags is not None or config is not None:
            raise LimnerError(f"{path}: a run needs neither flags nor a config; leave them out")
        return read_run(path), digest_of(path / "model.safetensors")
    if not path.exists():
        raise LimnerError(f"{path}: there is no such file or directory{zoo.suggestion(path)}")
    from limner import interop

    return interop.read(path, flags=flags, config=config), digest_of(path)


def read_recipe(run: str | Path) -> RunConfig:
    """The recipe of a run. Raises LimnerError for a missing or damaged file."""
    return config.load(zoo.located(run) / "config.yaml")


def read_run(run: Path) -> Imported:
    """The recipe and weights of a run. Raises LimnerError for a missing or damaged file."""
    recipe_of_run = read_recipe(run)
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


def _ready(found: Imported, digest: str, int8: bool) -> Generator | NoisyClassifier:
    kind = NoisyClassifier if found.config.task == "classifier" else Generator
    return kind(found.config, _model(found), digest, notes=found.notes, int8=int8)


def _model(found: Imported) -> build.Model:
    """The networks of a recipe with its weights in them, every one of them (LimnerError)."""
    from limner.training.checkpoint import load_weights

    model = build.model(found.config)
    load_weights(model, found.state, "weights", "config.yaml and the weights don't belong together")
    return model


def convert(source: str | Path, out: str | Path, *, to: Literal["limner", "diffusers"] = "limner",
            flags: Mapping[str, Any] | str | Path | None = None, config: str | Path | None = None,
            licence: str | None = None, progress: Progress | None = None) -> Conversion:  # fmt: skip
    """Make a run of another project's checkpoint: `config.yaml` and `model.safetensors` in the directory `out`.

    to: "diffusers" makes a folder that diffusers loads, of a run or of another project's checkpoint.
    flags, config: as in `load`. licence: for the folder's model card. Memory holds one weight at a time. Raises
    LimnerError, and then writes nothing; also where `out` holds something already.
    """
    from limner import interop

    source = zoo.located(source)
    return interop.convert(source, Path(out), to=to, flags=flags, config=config, licence=licence, tell=progress)


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
    autoencoder: str | Path | None = None,
    init: str | Path | None = None,
    teacher: str | Path | None = None,
    flags: Mapping[str, Any] | str | Path | None = None,
    config: str | Path | None = None,
    settings: Sequence[str] = (),
    seed: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    encoding: Progress | None = None,
    console: Any = None,
    **overrides: Any,
) -> Any:
    """Train a model on pictures, and leave a run in `out`.

    data: whatever `datasets` reads, or the name of a preset that brings its own; `resume` may leave it out.
    preset: a name of `build.preset_names()`, or a recipe file. budget: "20m"; images: "2M". for_run: the diffusion run
    that a classifier is to guide. autoencoder: a run or checkpoint in whose latents to train. init: a run or
    checkpoint to train on, with `flags` and `config` as in `load`; its recipe is taken unless a preset is named.
    teacher: for task="distill", the run or checkpoint whose student this is; see docs/distillation.md.
    settings: `"training.batch=32"`, or as keywords, `training={"batch": 32}`. progress, encoding: told (done, rows)
    while pictures are read, and while they are encoded.
    Returns a `TrainResult`. Raises LimnerError for wrong input before anything is written.
    """
    from limner import stages
    from limner.training import distill_rounds

    started_at = time.monotonic()
    out = Path(out)
    if autoencoder is None and for_run is not None and read_recipe(for_run).space.kind == "latent":
        autoencoder = for_run
    if init is None and teacher is None and (flags or config):
        raise LimnerError(f"{'flags' if flags else 'config'}: says how a checkpoint is read; name it with --init FILE")
    stored = read_recipe(out) if resume and (out / "config.yaml").is_file() else None
    others = {"init": init, "preset": preset, "for": for_run, "autoencoder": autoencoder}
    if _distils(task, teacher, stored, others):
        taught = None if teacher is None else _initial(teacher, flags, config)
        wanted = _student(data, stored, taught, budget, images, settings, seed, overrides)
        complete, pictures = _prepared(wanted, progress)
        return distill_rounds.train(complete, pictures, out, teacher=taught, resume=resume, started_at=started_at,
                                    progress=encoding, console=console)  # fmt: skip
    initial = None if init is None else _initial(init, flags, config)
    given = _first_stage(autoencoder) if autoencoder is not None else _stage_of(initial)
    wanted = _recipe(data, out, preset, task, budget, images, for_run, given, initial, settings, seed, resume,
                     overrides)  # fmt: skip
    complete, pictures = _prepared(wanted, progress)
    return stages.train(complete, pictures, out, given=given, initial=initial, resume=resume, started_at=started_at,
                        progress=encoding, console=console)  # fmt: skip


def _distils(task: Task | None, teacher: Any, stored: RunConfig | None, others: Mapping[str, Any]) -> bool:
    """Whether a student is to be trained. Raises LimnerError for options that don't go together."""
    resumed = stored is not None and stored.distillation is not None
    if task != "distill" and not resumed:
        if teacher is not None:
            raise LimnerError("--teacher: goes with --task distill")
        return False
    if task not in (None, "distill"):
        raise LimnerError(f"--task {task}: the run to resume is a student's; leave it out")
    for name in (name for name, asked in others.items() if asked is not None):
        raise LimnerError(f"--{name}: doesn't go with --task distill, where the recipe is the teacher's")
    return True


def _prepared(wanted: RunConfig, progress: Progress | None) -> tuple[RunConfig, Dataset]:
    """The recipe with what its data tell, and the data."""
    if wanted.training.images is None and wanted.training.budget_s is None:
        raise LimnerError("training has no end: give a budget, such as 20m, or a number of images, such as 2M")
    pictures = prepare(wanted.data, recipe.wants(wanted), progress)
    return recipe.complete(wanted, pictures, str(wanted.data.source)), pictures


def _student(data: str | Path | None, stored: RunConfig | None, teacher: Initial | None, budget: str | float | None,
             images: str | int | None, settings: Sequence[str], seed: int | None,
             overrides: Mapping[str, Any]) -> RunConfig:  # fmt: skip
    """The recipe of a student: that of its run where there is one, else its teacher's."""
    from limner.training import distill_rounds

    if stored is not None and stored.distillation is None:
        raise LimnerError("--task distill: the run to resume is no student")
    if stored is None and teacher is None:
        raise LimnerError("task distill: say whose student it is, with --teacher RUN")
    if stored is not None:
        where, base = "config.yaml", distill_rounds.whole(stored)
    else:
        assert teacher is not None
        where, base = teacher.where, distill_rounds.raw_recipe(teacher)
    raw = recipe.raw_recipe(base, source=None if data is None else str(data), settings=settings, budget=budget,
                            images=images, seed=seed)  # fmt: skip
    raw = distill_rounds.budgeted(_overridden(raw, overrides))
    raw["provenance"] = recipe.provenance(raw, where, __version__)
    _refuse_no_data(raw)
    return config.parse(raw, where)


def _overridden(raw: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with sections, or values of sections, that were given as keywords. Raises LimnerError."""
    changed = dict(raw)
    for name, values in overrides.items():
        if name not in RunConfig.model_fields:
            raise LimnerError(f"option '{name}': there is none such{suggest(name, RunConfig.model_fields)}")
        changed[name] = {**changed.get(name, {}), **values} if isinstance(values, Mapping) else values
    return changed


def _refuse_no_data(raw: Mapping[str, Any]) -> None:
    if not raw.get("data", {}).get("source"):
        raise LimnerError("no data: name a folder, a Parquet file, a WebDataset tar or a hub's data set")


def _initial(path: str | Path, flags: Any, config: Any) -> Initial:
    """What training is to begin with."""
    from limner.training.initial import Initial

    found, digest = _found(path, flags, config)
    return Initial(found.config, found.state, str(path), digest)


def _stage_of(initial: Initial | None) -> stages.Given | None:
    """The autoencoder of a model of latents that is trained on."""
    from limner import stages

    if initial is None or initial.config.space.kind != "latent":
        return None
    inside = [name for name in initial.weights if name.startswith("autoencoder.")]
    weights = {name.removeprefix("autoencoder."): initial.weights[name] for name in inside}
    return stages.Given(initial.config.space.autoencoder, weights, initial.config.data.channels, initial.where)


def _first_stage(path: str | Path) -> stages.Given:
    """The autoencoder of a run or of another project's checkpoint."""
    from limner import stages

    loaded = load(path)
    section = loaded.config.space.autoencoder if loaded.config.space.kind == "latent" else loaded.config.model
    if loaded.model.autoencoder is None or not isinstance(section, config.AutoencoderConfig):
        raise LimnerError(f"{path}: holds no autoencoder; name a run of --task autoencoder, or of a latent model")
    weights = {name: tensor.cpu() for name, tensor in loaded.model.autoencoder.state_dict().items()}
    return stages.Given(section, weights, loaded.config.data.channels, str(path))


def _recipe(data: str | Path | None, out: Path, preset: str | None, task: Task | None, budget: str | float | None,
            images: str | int | None, for_run: str | Path | None, given: stages.Given | None, initial: Initial | None,
            settings: Sequence[str], seed: int | None, resume: bool, overrides: Mapping[str, Any]
            ) -> RunConfig:  # fmt: skip
    source = None if data is None else str(data)
    if source in build.preset_names() and not Path(source or "").exists():
        preset, source = preset or source, None
    stored = out / "config.yaml"
    if resume and preset is None and stored.is_file():
        preset = str(stored)
    base: str | dict[str, Any]
    if preset is None and initial is not None:
        from limner.training.initial import raw_recipe

        preset, base = initial.where, raw_recipe(initial)
    else:
        named = {"classifier": "cifar10-classifier", "autoencoder": "autoencoder"}
        base = preset = preset or named.get(task or "", "default")
    raw = recipe.raw_recipe(base, source=source, settings=settings, budget=budget, images=images, seed=seed)
    raw = _overridden(raw, overrides)
    if task is not None:
        raw["task"] = task
    if raw.get("task") == "classifier" and preset != str(stored) and (for_run is not None or initial is None):
        if for_run is None:
            raise LimnerError("task classifier: say which diffusion run it is to guide, with --for RUN")
        raw = recipe.for_classifier(raw, read_recipe(for_run), Path(for_run))
    elif for_run is not None and raw.get("task") != "classifier":
        raise LimnerError("--for: goes with --task classifier")
    if given is not None:
        raw = recipe.for_autoencoder(raw, given.section, given.where)
    _refuse_no_data(raw)
    if preset == "default":
        raw = recipe.automatic(raw)
    raw["provenance"] = recipe.provenance(raw, preset, __version__)
    return config.parse(raw, preset)


# --- evaluation ---------------------------------------------------------------------------------------------------


def evaluate(samples: Any, reference: Any = None, *, features: str = "efficientnet-lite0", num: int | None = None,
             trained_on: Any = None, int8: bool = False, progress: Callable[[str, int], None] | None = None,
             **drawing: Any) -> Any:  # fmt: skip
    """Compare samples with real pictures: distances, scores, precision and recall, class accuracy, with intervals.

    samples: a `Generator` (or the path of its run), which draws `num` pictures, 1,000 unless told, by the options of
    `Generator.stream`, and keeps none; or an `.npz`, a folder, a `.tar`, an array. reference: a data set or its path;
    for a generator, by default the data that it was trained on. features: see `evaluation/features.py`. trained_on:
    what drew the samples learned from this data, where that isn't the reference (captions; a generator knows). int8: of
    a path, as in `load`.
    Returns a `Report`. Raises LimnerError for whatever cannot be compared.
    """
    from limner.evaluation import runs
    from limner.evaluation.evaluate import evaluate as compare

    if isinstance(samples, str | Path) and (zoo.located(samples) / "config.yaml").is_file():
        samples, int8 = load(samples, int8=int8), False
    if int8:
        raise LimnerError("int8: goes with the path of a run, which is to draw")
    if isinstance(samples, Generator):
        return runs.evaluate(samples, reference, features=features, num=num, progress=progress, **drawing)
    if reference is None:
        raise LimnerError("reference: name the real pictures to compare with")
    if drawing:
        raise LimnerError(f"{next(iter(drawing))}: these samples are drawn already; it goes with a run")
    return compare(samples, reference, features=features, num=num, trained_on=trained_on, progress=progress)


def bits_per_dim(run: str | Path, *, num: int = 64, seed: int = 0, batch: int = 64) -> dict[str, Any]:
    """The variational bound on `num` held-out pictures of a run, in bits per dimension: `evaluation/runs.py`."""
    from limner.evaluation import runs

    return runs.bits_per_dim(_drawing(load(run), run), num=num, seed=seed, batch=batch)


def condition_fidelity(run: str | Path, reference: Any = None, **options: Any) -> dict[str, float]:
    """Whether a run's pictures show the maps, boxes, small or masked pictures they were drawn for:
    `evaluation/runs.py: condition_fidelity`, whose options these are."""
    from limner.evaluation import runs

    return runs.condition_fidelity(_drawing(load(run), run), reference, **options)


def reconstruct(run: Generator | str | Path, images: Any = None, **options: Any) -> Any:
    """Encode pictures and decode them again: PSNR, SSIM, perceptual distance, rFD, images a second.

    run: an autoencoder, or a diffusion model of latents. images and options: those of
    `evaluation/reconstruction.py: reconstruct`. Returns a `Report`. Raises LimnerError for what has no autoencoder.
    """
    from limner.evaluation.reconstruction import reconstruct as compare

    return compare(_drawing(run if isinstance(run, Generator) else load(run), run), images, **options)


def _drawing(loaded: Generator | NoisyClassifier, where: Any) -> Generator:
    if not isinstance(loaded, Generator):
        raise LimnerError(f"{where}: holds a classifier; name a run of --task diffusion or autoencoder")
    return loaded
