"""A run as the source of samples: it draws batch by batch for the conditions of the reference, and nothing is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limner import build, recipe
from limner.config import DataConfig
from limner.core import guidance, losses
from limner.core.noise import step_noise
from limner.data.dataset import Dataset, prepare
from limner.errors import LimnerError
from limner.evaluation import fidelity
from limner.evaluation.collect import Batch
from limner.evaluation.evaluate import Progress
from limner.evaluation.evaluate import evaluate as compare
from limner.evaluation.processes import part_of
from limner.evaluation.reference import is_statistics
from limner.evaluation.report import Report
from limner.generator import BATCH, Generator, to_uint8
from limner.hardware import autocast
from limner.settings import Settings

NUM = 1_000
"""Samples that a run draws where no number is given."""
AHEAD = 8
"""Batches whose conditions are read at a time."""
SETTINGS = frozenset(field.name for field in fields(Settings))


def evaluate(
    generator: Generator,
    reference: Any = None,
    *,
    features: Any = "efficientnet-lite0",
    num: int | None = None,
    progress: Progress | None = None,
    **drawing: Any,
) -> Report:
    """Compare what a generator draws with real pictures; the arguments are those of `limner.evaluate`.

    A model of labels alone draws its classes in rotation; one that knows captions, maps or pictures draws for those of
    the reference's rows, held-out ones first, unless `drawing` names conditions. Raises LimnerError: the model draws
    nothing, the reference lacks its conditions.
    """
    asked = {name: value for name, value in drawing.items() if name in SETTINGS}
    how = {**asdict(generator.settings(**asked)), "seed": drawing.get("seed", 0), "run": generator.digest,
           "int8": generator.int8 or None}  # fmt: skip
    against = referred(generator, reference)
    batches = drawn(generator, part_of(range(num or NUM)), drawing, conditions_for(generator, against, drawing))
    return compare(
        batches,
        against,
        features=features,
        num=num or NUM,
        settings=how,
        trained_on=trained_elsewhere(generator, against),
        progress=progress,
    )


def referred(generator: Generator, reference: Any) -> Any:
    """The reference as evaluation reads it: the run's own data by default; a path is read as the run reads them."""
    own = generator.config.data
    if reference is None:
        return own
    if isinstance(reference, str | Path) and not _is_file_of_arrays(reference):
        return own.model_copy(update={"source": str(reference), "split": None})
    return reference


def conditions_for(generator: Generator, reference: Any, drawing: Mapping[str, Any]) -> Dataset | None:
    """The rows whose conditions are drawn for, or None where the generator needs none or `drawing` names some."""
    kinds = set(generator.modalities)
    if kinds <= {"label"} or kinds & drawing.keys():
        return None
    if isinstance(reference, Dataset):
        return reference
    source = reference if isinstance(reference, DataConfig) else generator.config.data
    section = source.model_copy(update={"size": generator.config.data.size, "flip": False, "crop": "center"})
    return prepare(section, recipe.wants(generator.config), classes=generator.classes or None)


def drawn(generator: Generator, numbers: range, drawing: Mapping[str, Any],
          data: Dataset | None = None) -> Iterator[Batch]:  # fmt: skip
    """The pictures of these numbers and what they were asked to show, batch by batch, as evaluation reads them.

    data: rows to draw for, held-out ones first, and again from the first when they are used up. Picture k is the same
    in whatever range it is drawn.
    """
    options = {"batch": BATCH, "first": 0, **drawing}
    first = options.pop("first")
    ahead = AHEAD * options["batch"] if data is not None else max(1, len(numbers))
    for start in range(numbers.start, numbers.stop, ahead):
        count = min(ahead, numbers.stop - start)
        cond = _rotated(generator, options, start, count) if data is None else _rows(generator, data, start, count)
        for made in generator.stream(num=count, first=first + start, **{**options, **cond}):
            yield to_uint8(generator.finished(made)), facts_of(made.facts)


def facts_of(facts: list[dict[str, Any]]) -> dict[str, Any]:
    """What each picture of a batch was asked to show, by modality."""
    names = [name for name in ("label", "label_name", "text") if name in facts[0]]
    found: dict[str, Any] = {name: [fact[name] for fact in facts] for name in names}
    return found | ({"label": np.array(found["label"])} if "label" in found else {})


def _rows(generator: Generator, data: Dataset, start: int, count: int) -> dict[str, Any]:
    rows = np.concatenate([data.held_out, data.train])
    content = data.batch(rows[np.arange(start, start + count) % len(rows)])
    return {"conditions": generator.config.conditions_in(content)}


def _rotated(generator: Generator, options: Mapping[str, Any], start: int, count: int) -> dict[str, Any]:
    """Conditions given by the caller, or the classes, go on in rotation from picture `start`."""
    if not start:
        return {}
    names = ("label", "text", "classifier_label")
    given = {name: options[name] for name in names if isinstance(options.get(name), list | tuple | Tensor)}
    if generator.modalities == ("label",) and options.get("label") is None:
        given["label"] = range(len(generator.classes))
    return {name: [values[k % len(values)] for k in range(start, start + count)] for name, values in given.items()}


def trained_elsewhere(generator: Generator, reference: Any) -> DataConfig | None:
    """The run's own data where the reference is another and captions are to be told apart."""
    own = generator.config.data
    if "text" not in generator.modalities or not isinstance(reference, DataConfig) or own.source is None:
        return None
    same = Path(reference.source or "").resolve() == Path(own.source).resolve()
    return None if same or not Path(own.source).exists() else own


def _is_file_of_arrays(path: str | Path) -> bool:
    return str(path).lower().endswith(".npz") or is_statistics(path)


def condition_fidelity(generator: Generator, reference: Any = None, *, num: int | None = None, seed: int = 0,
                       **drawing: Any) -> dict[str, float]:  # fmt: skip
    """Whether pictures of a run show what was asked for, see `fidelity.of_run`: for the reference's rows, or those held
    out in training. Raises LimnerError where the run has no condition that can be read from a picture."""
    if not {section.kind for section in generator.config.conditions} & set(fidelity.JUDGED):
        raise LimnerError(f"fidelity: needs a run with {', '.join(fidelity.JUDGED)}; labels and captions are judged by "
                          "`limner evaluate` without it")  # fmt: skip
    wanted = recipe.wants(generator.config)
    taught = prepare(generator.config.data, wanted, classes=generator.classes or None)
    section = referred(generator, reference)
    unseen = taught if reference is None else prepare(section, wanted, classes=generator.classes or None)
    rows = (unseen.held_out if reference is None else np.arange(len(unseen)))[: num or fidelity.ROWS]
    return fidelity.of_run(generator, unseen, taught, rows=rows, seed=seed, **drawing)


# --- likelihood -------------------------------------------------------------------------------------------------


def bits_per_dim(generator: Generator, *, num: int = 64, seed: int = 0, batch: int = BATCH) -> dict[str, Any]:
    """The variational bound (Ho et al. 2020, eq. 5) on `num` held-out pictures of a run's data, in bits per dimension.

    Over all steps of the schedule, 1,000 where it is continuous. Raises LimnerError for a latent model: the bound of
    its latents says nothing of the pictures.
    """
    if generator.config.task != "diffusion" or generator.config.space.kind != "pixels":
        raise LimnerError("bits per dim need a diffusion model of pixels")
    data = prepare(generator.config.data, recipe.wants(generator.config))
    rows = np.concatenate([data.held_out, data.train])[:num]
    path = generator.schedule.path(generator.schedule.steps or 1000, "trailing")
    plain = guidance.clipped(build.denoiser(generator.model, generator.config))
    found: dict[str, list[Tensor]] = {"bits_per_dim": [], "prior": []}
    for start in range(0, len(rows), batch):
        chosen = rows[start : start + batch]
        content = data.batch(chosen)
        x0 = content["image"].to(generator.device)
        with torch.no_grad(), autocast(generator.config.training.precision, generator.device):
            tau = generator.model.embed(generator.config.conditions_in(content), len(x0))
            noise = step_noise(seed, range(start, start + len(x0)), generator.shape, device=generator.device)
            bound = losses.bits_per_dim(plain, x0, path, noise, cond=tau)
        found["bits_per_dim"].append(bound.total)
        found["prior"].append(bound.prior)
    return {"n": len(rows), **{name: float(torch.cat(values).mean()) for name, values in found.items()}}
