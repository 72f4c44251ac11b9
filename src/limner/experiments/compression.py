"""How far to compress: diffusion in the latents of autoencoders of several factors (Rombach et al. 2022, figure 6).

Every factor has the same network, the same budget of seconds (its autoencoder's share included) and the same data. At
`first` x 2^k training images and at the end it is measured: that compares at equal steps and at equal time.

compression.run("photos", "experiments/compression", budget_s=1800)
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from limner import api, build, config, recipe
from limner.data.dataset import prepare
from limner.errors import LimnerError
from limner.experiments import figures, report
from limner.experiments.cells import MEASURE_S, Cell, Experiment, carry_out, read, write
from limner.generator import Generator
from limner.hardware import best_device
from limner.outputs import grid, png

FACTORS = (1, 2, 4, 8)
LATENT_CHANNELS = {2: 2, 4: 3, 8: 4, 16: 8, 32: 32}
"""Rombach et al. 2022, appendix E: those of figure 6's LDM-2 to LDM-32."""
LEVELS = ({"channels": 64}, {"channels": 96, "attention": True}, {"channels": 192, "attention": True})
WIDTHS = (48, 96)
"""Of the autoencoder's levels after its patches of 2x2; deeper ones stay at the last."""
SHARE = 0.3
"""Of the budget, for the autoencoder."""
FEATURES_S = 0.02
"""About how long the feature network takes for a picture."""
RECONSTRUCTED = 512
SHOWN = 16
CHECKPOINTS = 50_000
"""Images between checkpoints inside a leg of training."""


@dataclass(frozen=True)
class Compression(Experiment):
    """data: what to train on. factors: f; 1 is diffusion of pixels. budget_s: seconds of all stages of one factor, or
    None; images: training images at the most, or None; autoencoder_images: instead of its share of the budget. first:
    images at the first measurement, every later one at twice as many. num: samples measured. size: pictures' side, by
    default what suits the data. levels: of the U-Net, the same for all factors. settings: further ones of the recipe.
    """

    data: str
    factors: tuple[int, ...] = FACTORS
    budget_s: float | None = 1_800.0
    images: int | None = None
    autoencoder_images: int | None = None
    first: int = 4_000
    num: int = 1_000
    steps: int = 20
    guidance: float = 1.0
    batch: int = 64
    seed: int = 0
    size: int | None = None
    features: str = "efficientnet-lite0"
    levels: tuple[Mapping[str, Any], ...] = LEVELS
    widths: tuple[int, ...] = WIDTHS
    settings: tuple[str, ...] = ()

    def plan(self) -> dict[str, Any]:
        return {"experiment": "compression", **asdict(self)}

    def cells(self) -> list[Cell]:
        if self.budget_s is None and self.images is None:
            raise LimnerError("experiment compression: has no end; give a budget, such as 30m, or a number of images")
        if not self.factors or len(set(self.factors)) < len(self.factors):
            raise LimnerError(
                f"--factors {_listed(self.factors)}: should be different factors, such as {_listed(FACTORS)}"
            )
        for f in self.factors:
            self.recipe(f)
        return [Cell(f"f{f}", f"f = {f}", self._seconds(f)) for f in self.factors]

    def recipe(self, f: int) -> dict[str, Any]:
        """The recipe of factor f, as a preset file holds it. Raises LimnerError where f doesn't fit the pictures."""
        raw = _fitted(self.data, self.size)
        height, width = raw["data"]["size"]
        least = 2 ** (len(self.levels) - 1)
        fitting = [k for k in (1, *LATENT_CHANNELS) if height % (k * least) == width % (k * least) == 0]
        if f not in fitting:
            raise LimnerError(f"--factors {f}: pictures of {width}x{height} and a network of {len(self.levels)} levels "
                              f"allow {_listed(fitting) or 'none'}; --size changes the pictures")  # fmt: skip
        raw["model"] = {"kind": "unet", "patch": 1, "levels": [dict(level) for level in self.levels]}
        raw["training"] = {"batch": 16, "lr": 1.0e-3, "decay": "constant", "checkpoint_every": CHECKPOINTS,
                           "seed": self.seed}  # fmt: skip
        if f > 1:
            raw["space"] = {"kind": "latent", "autoencoder": self.autoencoder(f)}
        return config.override(raw, list(self.settings))

    def autoencoder(self, f: int) -> dict[str, Any]:
        """The autoencoder of factor f: patches of 2x2, then convolutions, as the preset of that name at f = 4."""
        depth = f.bit_length() - 1
        widths = [self.widths[min(k, len(self.widths) - 1)] for k in range(depth)]
        return {"kind": "autoencoder", "patch": 2, "levels": [{"channels": width} for width in widths],
                "middle": "none", "latent_channels": LATENT_CHANNELS[f]}  # fmt: skip

    def work(self, cell: Cell, directory: Path, console: Console) -> dict[str, Any]:
        f = int(cell.name[1:])
        first = {} if f == 1 else self._first_stage(f, directory, console)
        points = list(self._points(f, directory, first.get("seconds", 0.0), console))
        return {"f": f, "autoencoder": first, "points": points, "parameters": _parameters(directory / "run")}

    def _first_stage(self, f: int, directory: Path, console: Console) -> dict[str, Any]:
        """Train the autoencoder and measure what it loses."""
        done, out = directory / "autoencoder.json", directory / "autoencoder"
        if done.is_file():
            return read(done)
        whole = self.recipe(f)
        raw = build.preset("autoencoder")
        raw["model"], raw["data"] = whole["space"]["autoencoder"], whole["data"]
        raw["training"] |= {"seed": self.seed, "checkpoint_every": CHECKPOINTS}
        budget = None if self.budget_s is None or self.autoencoder_images else SHARE * self.budget_s
        images = self.autoencoder_images or (None if self.images is None else max(1, round(SHARE * self.images)))
        result = _train(out, raw, budget, images, None, console)
        found = api.reconstruct(out, num=RECONSTRUCTED, features=self.features, out=directory / "reconstructions.png",
                                overwrite=True)  # fmt: skip
        facts = {"images": result.images, "seconds": result.seconds, **found.to_dict()}
        write(done, facts)
        return facts

    def _points(self, f: int, directory: Path, spent_s: float, console: Console) -> Iterator[dict[str, Any]]:
        """Train to each mark in turn and measure there; those that were measured before are read."""
        left = None if self.budget_s is None else self.budget_s - spent_s
        before = 0
        for images in self._marks():
            done = directory / "points" / f"{images:09d}.json"
            if done.is_file():
                point = read(done)
            else:
                result = _train(directory / "run", self.recipe(f), left, images,
                                None if f == 1 else directory / "autoencoder", console)  # fmt: skip
                if result.images == before:  # the budget ended on the mark before
                    return
                point = {"f": f, "images": result.images, "seconds": spent_s + result.seconds,
                         "images_per_s": result.figures.get("images_per_s"), **self._measured(directory)}  # fmt: skip
                write(done, point)
            yield point
            before = point["images"]
            if before < images:
                return

    def _measured(self, directory: Path) -> dict[str, Any]:
        found = api.evaluate(directory / "run", num=self.num, steps=self.steps, batch=self.batch, seed=self.seed,
                             features=self.features, guidance=self.guidance)  # fmt: skip
        if found.sheet is not None:
            (directory / "samples.png").write_bytes(png(grid(list(found.sheet.pictures[:SHOWN]), columns=SHOWN // 2)))
        return found.to_dict()

    def _marks(self) -> Iterator[int]:
        for k in itertools.count():
            images = self.first * 2**k
            if self.images is not None and images >= self.images:
                yield self.images
                return
            yield images

    def _seconds(self, f: int) -> float:
        """About how long a factor takes: its budget, and as many measurements as its speed will lead to."""
        call = _call_seconds(json.dumps(self.recipe(f)))
        training = 4 * call  # a step forward and back, and the rest of it, in calls of the network
        images = self.images or max(1.0, (1 - SHARE * (f > 1)) * (self.budget_s or 0) / training)
        images = images if self.budget_s is None else min(images, self.budget_s / training)
        measurements = 1 + max(0, int(images / self.first)).bit_length()
        each = self.num * (self.steps * call + FEATURES_S) + MEASURE_S
        return (self.budget_s or images * training) + measurements * each


def run(data: str, out: str | Path, *, processes: int = 1, console: Console | None = None,
        **options: Any) -> dict[str, Any]:  # fmt: skip
    """Do the experiment (options: the fields of `Compression`), write the report into `out`, return its facts."""
    experiment = Compression(data, **options)
    results = carry_out(experiment, out, processes=processes, console=console)
    return _report(experiment, results, Path(out))


def _report(experiment: Compression, results: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    shared = ("f", "images", "seconds", "images_per_s")
    rows = [{key: point[key] for key in shared} | report.flat(point["figures"])
            for result in results for point in result["points"]]  # fmt: skip
    distance, score = report.column(rows, "FID", "FD") or "", report.column(rows, "IS")
    about = f"{experiment.num:,} samples a point, {experiment.steps} steps; {results[0]['points'][0]['features']}"
    steps, common = at_equal_steps(rows)
    ends = at_equal_time(rows)
    seconds = min(row["seconds"] for row in ends)
    words = [f"The same network and the same budget for every factor. {about}.",
             _lowest(steps, distance, f"At equal training steps ({common:,} images)"),
             _lowest(ends, distance, f"At equal time ({seconds:,.0f} s of all stages)")]  # fmt: skip
    firsts = [_first_row(result) for result in results if result["autoencoder"]]
    columns = [name for name in (*shared, distance, score, *(report.column(rows, k) for k in _KINDS)) if name]
    tables = [report.Table("At equal training steps", steps, columns), report.Table("At equal time", ends, columns),
              *([report.Table("Autoencoders", firsts, list(firsts[0]))] if firsts else []),
              report.Table("All measurements", rows, columns)]  # fmt: skip
    facts = {**experiment.plan(), "about": about, "rows": rows, "autoencoders": firsts, "cells": results,
             "equal_steps": steps, "equal_time": ends}  # fmt: skip
    pictures = [(f"f = {result['f']}: {what}", path.read_bytes())
                for result in results for what in ("samples", "reconstructions")
                if (path := out / result["cell"] / f"{what}.png").is_file()]  # fmt: skip
    drawn = {"compression": figures.compression(rows, distance, score, about)}
    report.write(report.Findings("How far to compress", words, facts, rows, tables, drawn, pictures, (10.5, 7.0)), out)
    return facts


_KINDS = ("KID", "precision", "recall", "class_accuracy", "retrieval")


def at_equal_steps(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], int]:
    """The row of each factor at the largest number of images that all have reached, and that number.

    Where one factor's budget ended between marks, the others are taken at the last mark before.
    """
    marks = [{row["images"] for row in rows if row["f"] == f} for f in _factors(rows)]
    common = set.intersection(*marks)
    if common:
        images = max(common)
        return [row for row in rows if row["images"] == images], images
    images = min(max(mark) for mark in marks)
    nearest = [min((r for r in rows if r["f"] == f), key=lambda r: abs(r["images"] - images)) for f in _factors(rows)]
    return nearest, images


def at_equal_time(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last row of each factor that came within the time of the factor that ended first."""
    end = min(max(row["seconds"] for row in rows if row["f"] == f) for f in _factors(rows))
    within = [[row for row in rows if row["f"] == f and row["seconds"] <= 1.02 * end] for f in _factors(rows)]
    return [max(each, key=lambda row: row["seconds"]) for each in within if each]


def _factors(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return list(dict.fromkeys(row["f"] for row in rows))


def _lowest(rows: Sequence[Mapping[str, Any]], distance: str, where: str) -> str:
    best = min(rows, key=lambda row: row[distance])
    each = ", ".join(f"f = {row['f']} {row[distance]:.4g}" for row in rows)
    return f"{where}: f = {best['f']} has the lowest {distance} ({each})."


def _first_row(result: Mapping[str, Any]) -> dict[str, Any]:
    first = result["autoencoder"]
    row = {"f": result["f"], "latent": first["autoencoder"]["latent"], "images": first["images"],
           "seconds": first["seconds"]}  # fmt: skip
    return row | {name: figure["value"] for name, figure in first["figures"].items()}


# --- parts ------------------------------------------------------------------------------------------------------


def _train(out: Path, raw: dict[str, Any], budget_s: float | None, images: int | None, autoencoder: Path | None,
           console: Console) -> Any:  # fmt: skip
    """`limner.train` of a recipe, going on with what is there. Raises KeyboardInterrupt when a signal stopped it."""
    if budget_s is not None and budget_s <= 0:
        raise LimnerError(f"{out}: the autoencoder took the whole budget; give a longer --budget")
    file = out.parent / f"{out.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    result = api.train(out=out, preset=str(file), budget=budget_s, images=images, autoencoder=autoencoder, resume=True,
                       console=console)  # fmt: skip
    if result.stopped is not None:
        raise KeyboardInterrupt
    return result


@lru_cache
def _automatic(data: str, size: int | None) -> str:
    raw = build.preset("default")
    raw["data"] = {"source": data} | ({} if size is None else {"size": [size, size]})
    fitted = {**recipe.automatic(raw), "process": raw["process"]}  # that of patches of one pixel, for every factor
    prepare(config.parse(fitted, "recipe").data, recipe.wants(config.parse(fitted, "recipe")))
    return json.dumps({key: fitted[key] for key in ("task", "data", "process", "conditions", "sampling")})


def _fitted(data: str, size: int | None) -> dict[str, Any]:
    """The default recipe's parts for this data, without network and training; the data are read once."""
    return json.loads(_automatic(data, size))


@lru_cache
def _call_seconds(raw: str) -> float:
    """Seconds a picture of one call of a recipe's network, measured."""
    parsed = config.parse(json.loads(raw), "recipe").model_copy(update={"conditions": ()})
    model = build.model(parsed)
    build.ready(model, best_device())
    generator = Generator(parsed, model)
    x = torch.zeros(8, *generator.shape, device=generator.device)
    with torch.no_grad():
        model.raw(x, torch.zeros(8, device=generator.device))
        began = time.perf_counter()
        model.raw(x, torch.zeros(8, device=generator.device))
    return (time.perf_counter() - began) / 8


def _parameters(run: Path) -> int:
    """Of the U-Net, in units."""
    return sum(tensor.numel() for name, tensor in api.read_run(run).state.items() if name.startswith("network."))


def _listed(values: Sequence[int]) -> str:
    return ",".join(map(str, values))
