"""Quality against speed: every solver at several numbers of steps, pixel and latent runs (Rombach et al. 2022, fig. 7).

sampling.run(["runs/pixel", "runs/latent"], "photos", "experiments/sampling")
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from limner import api
from limner.core.path import check as check_spacing
from limner.core.samplers import SAMPLERS
from limner.errors import LimnerError, suggest
from limner.evaluation import features as networks
from limner.evaluation import runs
from limner.evaluation.arrays import npz_batches
from limner.evaluation.collect import Batch
from limner.evaluation.evaluate import evaluate as compare
from limner.experiments import figures, report
from limner.experiments.cells import MEASURE_S, Cell, Experiment, carry_out
from limner.generator import Generator
from limner.outputs import grid, png

STEPS = {"ddim": (10, 20, 50, 100, 200)}
FEWER = (10, 20, 50)
"""Steps of the other solvers: past these they gain nothing that DDIM's curve doesn't show."""
PART = 256
"""Pictures between saves: what a killed cell draws again at the most."""
SHOWN = 8


@dataclass(frozen=True)
class Sampling(Experiment):
    """runs: their directories. reference: real pictures; None: what each run was trained on. samplers, steps: every
    pair of them; steps None: the paper's for DDIM and `FEWER` for the others. guidance, spacing: None, the run's own.
    """

    runs: tuple[str, ...]
    reference: str | None
    num: int = 1_000
    samplers: tuple[str, ...] = tuple(SAMPLERS)
    steps: tuple[int, ...] | None = None
    guidance: float | None = None
    spacing: str | None = None
    batch: int = 64
    seed: int = 0
    features: str = "efficientnet-lite0"
    estimates: dict[str, tuple[float, float]] = field(default_factory=dict, compare=False, hash=False)

    def plan(self) -> dict[str, Any]:
        digests = {run: _generator(run).digest for run in self.runs}
        return {"experiment": "sampling", **{k: v for k, v in asdict(self).items() if k != "estimates"},
                "digests": digests}  # fmt: skip

    def cells(self) -> list[Cell]:
        if not self.runs:
            raise LimnerError("experiment sampling: name at least one run")
        for sampler in self.samplers:
            if sampler not in SAMPLERS:
                raise LimnerError(f"sampler '{sampler}': there is none such{suggest(sampler, SAMPLERS)}")
        if self.spacing is not None:
            check_spacing(self.spacing, 1, None)
        if self.num < 2:
            raise LimnerError(f"num: {self.num}, should be 2 or more")
        names = _names(self.runs)
        return [
            Cell(f"{names[run]}/{sampler}-{steps}", f"{names[run]}, {sampler}, {steps} steps",
                 self._seconds(run, sampler, steps))
            for run in self.runs
            for sampler in self.samplers
            for steps in self.steps or STEPS.get(sampler, FEWER)
        ]  # fmt: skip

    def work(self, cell: Cell, directory: Path, console: Console) -> dict[str, Any]:
        run, sampler, steps = self._asked(cell)
        generator = _generator(run)
        drawing = {"sampler": sampler, "steps": steps, "guidance": self.guidance, "spacing": self.spacing,
                   "batch": self.batch, "seed": self.seed}  # fmt: skip
        against = runs.referred(generator, self.reference)
        data = runs.conditions_for(generator, against, drawing)
        seconds = 0.0
        for start in range(0, self.num, PART):
            numbers = range(start, min(start + PART, self.num))
            seconds += _part(directory / f"part-{start:06d}.npz", generator, numbers, drawing, data)
        settings = {k: v for k, v in drawing.items() if k in runs.SETTINGS}
        found = compare(
            _saved(directory, generator.classes), against, features=_network(self.features),
            trained_on=runs.trained_elsewhere(generator, against),
            settings={**asdict(generator.settings(**settings)), "seed": self.seed, "run": generator.digest},
        )  # fmt: skip
        if found.sheet is not None:
            (directory / "samples.png").write_bytes(png(grid(list(found.sheet.pictures[:SHOWN]), columns=SHOWN)))
        for part in directory.glob("part-*.npz"):
            part.unlink()
        return {
            "run": run,
            "name": cell.name.split("/")[0],
            "space": generator.config.space.kind,
            "sampler": sampler,
            "steps": steps,
            "seconds": seconds,
            "images_per_s": self.num / seconds,
            **found.to_dict(),
        }

    def _asked(self, cell: Cell) -> tuple[str, str, int]:
        name, _, rest = cell.name.partition("/")
        sampler, _, steps = rest.rpartition("-")
        run = next(run for run, own in _names(self.runs).items() if own == name)
        return run, sampler, int(steps)

    def _seconds(self, run: str, sampler: str, steps: int) -> float:
        """About how long a cell takes, by what one batch took."""
        if run not in self.estimates:
            self.estimates[run] = _measured(_generator(run), self.batch, self.features)
        call, rest = self.estimates[run]
        return self.num * (call * steps * (2 if sampler == "heun" else 1) + rest) + MEASURE_S


def run(runs: Sequence[str], reference: str | None, out: str | Path, *, processes: int = 1,
        console: Console | None = None, **options: Any) -> dict[str, Any]:  # fmt: skip
    """Do the experiment (options: the fields of `Sampling`), write the report into `out`, return its facts."""
    experiment = Sampling(tuple(str(run) for run in runs), reference, **options)
    results = carry_out(experiment, out, processes=processes, console=console)
    return _report(experiment, results, Path(out))


def _report(experiment: Sampling, results: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    shared = ("name", "space", "sampler", "steps", "images_per_s", "seconds")
    rows = [{key: result[key] for key in shared} | report.flat(result["figures"]) for result in results]
    distance, score = report.column(rows, "FID", "FD") or "", report.column(rows, "IS")
    about = f"{experiment.num:,} samples a point; {results[0]['features']}"
    best = min(rows, key=lambda row: row[distance])
    words = [
        f"{len(rows)} combinations of run, solver and steps. {about}.",
        f"The lowest {distance} is {best[distance]:.4g}: {best['name']} by {best['sampler']} in {best['steps']} steps, "
        f"{best['images_per_s']:.3g} images a second.",
    ]
    facts = {**experiment.plan(), "about": about, "rows": rows, "cells": results}
    kinds = ("KID", "precision", "recall", "class_accuracy", "retrieval")
    columns = (*shared[:5], distance, score, *(report.column(rows, kind) for kind in kinds))
    table = report.Table("All cells", rows, [name for name in columns if name])
    pictures = [(result["title"], (out / result["cell"] / "samples.png").read_bytes()) for result in results]
    drawn = {"speed": figures.speed(rows, distance, score, about)}
    report.write(report.Findings("Quality against speed", words, facts, rows, [table], drawn, pictures), out)
    return facts


# --- parts ------------------------------------------------------------------------------------------------------


def _part(path: Path, generator: Generator, numbers: range, drawing: dict[str, Any], data: Any) -> float:
    """Draw these pictures into a file, unless they are there; the seconds that it took."""
    if path.is_file():
        with np.load(path) as stored:
            return float(stored["seconds"])
    _warm(generator, drawing["batch"])
    began = time.perf_counter()
    batches = list(runs.drawn(generator, numbers, drawing, data))
    seconds = time.perf_counter() - began
    arrays = {"x": np.concatenate([x for x, _ in batches]), "seconds": np.array(seconds)}
    for name, key in (("label", "y"), ("text", "text")):
        if name in batches[0][1]:
            arrays[key] = np.concatenate([np.asarray(facts[name]) for _, facts in batches])
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial.npz")
    np.savez(beside, **arrays)
    beside.replace(path)
    return seconds


def _saved(directory: Path, classes: Sequence[str]) -> Iterator[Batch]:
    """The parts in order, with the names of the classes beside their numbers."""
    for path in sorted(directory.glob("part-??????.npz")):
        for pictures, facts in npz_batches(path):
            named = {"label_name": [classes[k] for k in facts["label"]]} if "label" in facts and classes else {}
            yield pictures, {**facts, **named}


def _names(given: Sequence[str]) -> dict[str, str]:
    """A short name of each run: its directory's, and more of the path where that isn't enough. LimnerError: twice."""
    if len({Path(run).resolve() for run in given}) < len(given):
        raise LimnerError("experiment sampling: a run is named twice")
    last = [Path(run).resolve().name for run in given]
    return {run: name if last.count(name) == 1 else "-".join(Path(run).resolve().parts[-2:])
            for run, name in zip(given, last, strict=True)}  # fmt: skip


@lru_cache(maxsize=1)
def _generator(run: str) -> Generator:
    found = api.load(run)
    if not isinstance(found, Generator) or found.config.task != "diffusion":
        raise LimnerError(f"{run}: draws nothing; name diffusion runs")
    return found


@lru_cache(maxsize=1)
def _network(name: str) -> networks.FeatureNetwork:
    return networks.network(name)


_warmed: set[tuple[int, int]] = set()


def _warm(generator: Generator, batch: int) -> None:
    """The first calls set up kernels and caches; they belong to no measurement."""
    if (id(generator), batch) not in _warmed:
        _warmed.add((id(generator), batch))
        _draw(generator, batch, 2)


def _draw(generator: Generator, batch: int, steps: int) -> float:
    began = time.perf_counter()
    drawing = {"sampler": "ddim", "steps": steps, "batch": batch}
    for made in generator.stream(num=batch, **drawing):
        generator.decode(made.latent)
    return time.perf_counter() - began


def _measured(generator: Generator, batch: int, features: str) -> tuple[float, float]:
    """Seconds a picture of one step, and of all that isn't steps: decoder and feature network."""
    _warm(generator, batch)
    short, long = _draw(generator, batch, 1), _draw(generator, batch, 3)
    step = max(0.0, long - short) / 2
    pictures = np.zeros((32, *(generator.config.data.size or (64, 64)), 3), np.uint8)
    network = _network(features)
    network(pictures)
    began = time.perf_counter()
    network(pictures)
    return step / batch, max(0.0, short - step) / batch + (time.perf_counter() - began) / len(pictures)
