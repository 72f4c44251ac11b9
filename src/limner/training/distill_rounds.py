"""Distillation round by round, each a run of its own whose teacher is the one before:

RUN/teacher/           a copy of the teacher
RUN/rounds/guidance/   a student that guides in one call a step
RUN/rounds/8-steps/    one that draws in 8 steps
RUN                    the last: it draws in 4
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from limner import build
from limner import config as c
from limner.core.distill import SPACING, Strides
from limner.data.dataset import Dataset
from limner.data.latents import with_latents
from limner.data.pixels import Progress
from limner.errors import LimnerError
from limner.hardware import best_device
from limner.training import loop
from limner.training.checkpoint import Checkpoints, load_weights, read_model
from limner.training.distill import DistillTask
from limner.training.initial import Initial, is_main_process, say
from limner.training.loop import TrainResult
from limner.training.progress import duration

TRAINING = {"lr": 3e-4, "warmup_images": 500}
"""Of a student, where the user doesn't say; the rest are the defaults."""
TOLD = "network.time.guidance.weight"
"""What a student has that its teacher may not have."""


@dataclass(frozen=True)
class Round:
    """steps: of its student; None: it learns guidance alone. teacher_steps: that become one `steps`-th each.
    share: of the budget."""

    steps: int | None
    teacher_steps: int
    share: float

    @property
    def name(self) -> str:
        return "guidance" if self.steps is None else f"{self.steps}-step{'s' if self.steps > 1 else ''}"


# --- the recipe ---------------------------------------------------------------------------------------------------


def raw_recipe(teacher: Initial) -> dict[str, Any]:
    """The recipe of a student: the teacher's schedule, space, network, conditions, data and picture size. Raises
    LimnerError for a teacher that draws nothing."""
    config, where = teacher.config, teacher.where
    if config.task != "diffusion":
        kind = {"classifier": "a classifier", "autoencoder": "an autoencoder"}[config.task]
        raise LimnerError(f"{where}: holds {kind}, which draws nothing; a teacher is a diffusion model")
    stored = config.model_dump(mode="json")
    distillation: dict[str, Any] = {"teacher": where, "guidance": _range(config)}
    if config.distillation is not None:
        steps = config.distillation.steps
        distillation |= {"guidance_share": 0.0}
        if steps is not None:
            halved = max(1, steps // 2)
            distillation |= {"teacher_steps": steps, "first_steps": halved, "steps": min(4, halved)}
    return {**stored, "distillation": distillation, "training": dict(TRAINING), "provenance": {}}


def _range(config: c.RunConfig) -> list[float] | None:
    """The guidance that a student is told unless the user says: all around the teacher's own."""
    if config.distillation is not None and config.distillation.guidance is not None:
        return list(config.distillation.guidance)
    scale = config.sampling.guidance
    return None if scale == 1 or not _guidable(config) else [1.0, max(2 * scale - 1, scale + 1)]


def _guidable(config: c.RunConfig) -> bool:
    return any(getattr(section, "null", True) for section in config.conditions)


def whole(student: c.RunConfig) -> dict[str, Any]:
    """The recipe of a student's run with the budget and the steps of all rounds."""
    assert student.distillation is not None
    raw = student.model_dump(mode="json")
    budget = {name: raw["distillation"][name] for name in ("images", "budget_s")}
    return {**raw, "training": {**raw["training"], **budget}}


def budgeted(raw: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the budget that was asked for as that of all rounds together."""
    asked = {name: raw["training"].get(name) for name in ("images", "budget_s")}
    return {**raw, "distillation": {**raw["distillation"], **asked}}


def rounds(section: c.DistillationConfig) -> list[Round]:
    """What is learnt in turn. Halvings have equal shares of what guidance leaves."""
    halvings, share = section.halvings, section.guidance_share if section.guidance is not None else 0.0
    share = share if halvings else 1.0
    found = [Round(None, section.teacher_steps, share)] if share > 0 else []
    before = section.teacher_steps
    for steps in halvings:
        found.append(Round(steps, before, (1 - share) / len(halvings)))
        before = steps
    return found


def check(recipe: c.RunConfig, teacher: c.RunConfig, where: str) -> None:
    """Raises LimnerError for what this teacher can't teach."""
    section = recipe.distillation
    assert section is not None
    if section.guidance is not None and not teacher.conditions:
        raise LimnerError(f"{where}: is unconditional, so it has no guidance to learn; set distillation.guidance=null")
    if section.guidance is not None and not _guidable(teacher):
        raise LimnerError(f"{where}: has no null condition, so there is no guidance to learn; set "
                          "distillation.guidance=null")  # fmt: skip
    known = teacher.distillation.guidance if teacher.distillation is not None else None
    if known is not None and (section.guidance is None or section.guidance[0] < known[0]
                              or section.guidance[1] > known[1]):  # fmt: skip
        raise LimnerError(f"{where}: was itself distilled for guidance {known[0]:g} to {known[1]:g}; "
                          f"distillation.guidance is {section.guidance}")  # fmt: skip
    if section.steps is not None and recipe.process.prediction == "epsilon":
        raise LimnerError(f"{where}: predicts epsilon, which says nothing of the picture in pure noise, where a few "
                          "steps begin; let the student predict v: --set process.prediction=v_prediction")  # fmt: skip
    if recipe.training.lora is not None:
        raise LimnerError("training.lora: a student is trained whole; leave it out")


def of_round(recipe: c.RunConfig, teacher: c.RunConfig, one: Round) -> c.RunConfig:
    """The recipe of a round's own run, with its share of the budget, and how its student draws."""
    section = recipe.distillation
    assert section is not None
    images = None if section.images is None else max(recipe.training.batch, round(one.share * section.images))
    seconds = None if section.budget_s is None else one.share * section.budget_s
    sampling = teacher.sampling.model_copy(update={"guidance": recipe.sampling.guidance})
    if section.guidance is not None:
        scale = min(max(sampling.guidance, section.guidance[0]), section.guidance[1])
        update = {"guidance": scale, "guidance_every": 1, "interval": (0.0, 1.0), "rescale": 0.0}
        sampling = sampling.model_copy(update=update)
    if one.steps is not None:
        sampling = sampling.model_copy(update={"sampler": "ddim", "steps": one.steps, "spacing": SPACING})
    return recipe.model_copy(update={
        "model": recipe.model.model_copy(update={"guided": section.guidance is not None}),
        "sampling": sampling,
        "training": recipe.training.model_copy(update={"images": images, "budget_s": seconds}),
        "distillation": section.model_copy(update={"steps": one.steps}),
    })  # fmt: skip


# --- the rounds ---------------------------------------------------------------------------------------------------


def train(recipe: c.RunConfig, pictures: Dataset, out: Path, *, teacher: Initial | None = None, resume: bool = False,
          started_at: float | None = None, progress: Progress | None = None,
          console: Console | None = None) -> TrainResult:  # fmt: skip
    """Distil, all rounds in turn, and leave the last student as the run in `out`.

    teacher: the one to learn from; the copy that is in `out` goes before. Raises LimnerError as `training.loop.train`
    does, for what the teacher can't teach, and where there is no teacher.
    """
    started_at = time.monotonic() if started_at is None else started_at
    loop.claim(out, resume)
    teacher = _teacher(out, teacher)
    check(recipe, teacher.config, teacher.where)
    section = recipe.distillation
    assert section is not None
    todo = rounds(section)
    recipes = [of_round(recipe, teacher.config, one) for one in todo]
    if is_main_process():
        _keep(teacher, out)
        Checkpoints(out).begin(recipes[-1])
        say(f"{out}: learns {', '.join(map(_told, todo, recipes))}", console)
    data, images, seconds = pictures, 0, 0.0
    if isinstance(recipe.space, c.LatentSpace):
        data = with_latents(pictures, _autoencoder(teacher), progress=progress)
    for number, (one, own) in enumerate(zip(todo, recipes, strict=True)):
        last = number + 1 == len(todo)
        directory = out if last else out / "rounds" / one.name
        task = _task(own, teacher, one, data)
        result = loop.train(task, data, own, directory, resume=True, started_at=started_at, console=console)
        images, seconds, started_at = images + result.images, seconds + result.seconds, time.monotonic()
        if result.stopped is not None or last:
            figures = {**result.figures, "images": images, "seconds": round(seconds, 2)}
            return replace(result, run=out, images=images, seconds=seconds, figures=figures)
        teacher = Initial(own, read_model(directory), str(directory))
    raise AssertionError("a distillation has a last round")


def _told(one: Round, recipe: c.RunConfig) -> str:
    """A round in words."""
    what = "guidance in one call" if one.steps is None else f"{one.steps} steps out of {one.teacher_steps}"
    training = recipe.training
    budget = f"{training.images:,} images" if training.images is not None else duration(training.budget_s or 0)
    return f"{what} ({budget})"


def _task(recipe: c.RunConfig, teacher: Initial, one: Round, data: Dataset) -> DistillTask:
    """A round's student, which begins as its teacher, and what it learns."""
    torch.manual_seed(recipe.training.seed)
    student, taught = build.model(recipe), build.model(teacher.config)
    load_weights(taught, teacher.weights, teacher.where, "the recipe and the weights don't belong together")
    given: Mapping[str, Any] = taught.state_dict()
    own = {name: tensor for name, tensor in student.state_dict().items() if name == TOLD}
    load_weights(student, {**own, **given}, teacher.where, "a student has its teacher's network")
    strides = None
    if one.steps is not None:
        strides = Strides.of(build.schedule(recipe), one.steps, one.teacher_steps,
                             second_order=_many(teacher.config))  # fmt: skip
    return DistillTask(student, recipe, data, taught, teacher.config, strides)


def _many(config: c.RunConfig) -> bool:
    """Whether a teacher solves an equation, in as many steps as one likes, rather than taking its own few."""
    return config.distillation is None or config.distillation.steps is None


def _autoencoder(teacher: Initial) -> Any:
    """The teacher's autoencoder, frozen, on the device."""
    model = build.model(teacher.config)
    load_weights(model, teacher.weights, teacher.where, "the recipe and the weights don't belong together")
    assert model.autoencoder is not None
    return model.autoencoder.to(best_device())


def _teacher(out: Path, given: Initial | None) -> Initial:
    kept = out / "teacher"
    if (kept / "model.safetensors").is_file():
        return Initial(c.load(kept / "config.yaml"), read_model(kept), str(kept))
    if given is None:
        raise LimnerError(f"{out}: holds no copy of its teacher; name it with --teacher RUN")
    return given


def _keep(teacher: Initial, out: Path) -> None:
    """A copy of the teacher, so that the run needs nothing else."""
    run = Checkpoints(out / "teacher")
    if not (run.run / "model.safetensors").is_file():
        run.begin(teacher.config)
        run.publish(dict(teacher.weights.items()), teacher.config)
