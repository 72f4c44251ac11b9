"""From what a user asks for to a complete recipe: preset, overrides, then what only the data can tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limner import build, config
from limner.config import AutoencoderConfig, ConditionConfig, DataConfig, RunConfig
from limner.data.catalog import open_source
from limner.data.dataset import Dataset
from limner.data.roles import image_role, label_role
from limner.data.sources import FileSpan, Source, refuse
from limner.data.transforms import PictureError, opened, oriented_size
from limner.errors import LimnerError

_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
GRID = 16
"""Patches along the shorter side of a picture, in the automatic recipe."""
WIDE = 4
_MULTIPLES = {"": 1, "k": 1_000, "m": 1_000_000}


def seconds(budget: str | float) -> float:
    """Seconds of a budget such as "20m", "1h30m", "90s", or a number. Raises LimnerError."""
    if isinstance(budget, int | float):
        total = float(budget)
    else:
        match = _DURATION.fullmatch(budget.strip().lower())
        parts = [float(part or 0) for part in match.groups()] if match else [0.0]
        total = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if not 0 < total < float("inf"):
        raise LimnerError(f"budget '{budget}': should be a time such as 20m, 1h30m or 90s")
    return total


def count(images: str | int) -> int:
    """A number of images such as "2M", "500k" or 200000. Raises LimnerError."""
    text = str(images).strip().lower().replace("_", "").replace(",", "")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([km]?)", text)
    number = int(float(match[1]) * _MULTIPLES[match[2]]) if match else 0
    if number < 1:
        raise LimnerError(f"images '{images}': should be a number such as 2M, 500k or 200000")
    return number


def raw_recipe(preset: str | dict[str, Any], *, source: str | None, settings: Sequence[str], budget: str | float | None,
               images: str | int | None, seed: int | None) -> dict[str, Any]:  # fmt: skip
    """A preset, a recipe file of one's own (`.yaml`) or a recipe, with everything that was asked for on top."""
    raw = preset
    if isinstance(raw, str):
        raw = config.read_yaml(raw) if raw.endswith((".yaml", ".yml")) else build.preset(raw)
    raw = config.override(raw, list(settings))
    if source is not None:
        raw.setdefault("data", {})["source"] = source
    training = raw.setdefault("training", {})
    if budget is not None:
        training["budget_s"] = seconds(budget)
        training.setdefault("images", None)
    if images is not None:
        training["images"] = count(images)
        if budget is None:
            training["budget_s"] = None
    if seed is not None:
        training["seed"] = seed
    return raw


def automatic(raw: dict[str, Any]) -> dict[str, Any]:
    """The default recipe made to fit its data: unconditional where there are no labels; 64x64, or 32x32 for pictures
    smaller than that, on a 16x16 grid of patches. From patches of `WIDE` pixels on the network predicts the picture
    instead of v, mostly noise that a wide patch must hand through to the pixel: short trainings end with shapes
    instead of noise (Li & He 2025, 2511.13720). What the user has set stays."""
    section = config.parse(raw, "recipe").data
    # What is wrong with single rows of a stream is skipped later.
    source = open_source(str(section.source), section.split, (lambda _: None) if section.stream else refuse)
    if label_role(source, section) is None:
        raw = {**raw, "conditions": [], "sampling": {**raw.get("sampling", {}), "guidance": 1.0}}
    size = section.size or (2 * (64 if min(_first_size(source, section)) >= 64 else 32,))
    space = raw.get("space", {})
    patch = max(1, min(size) // GRID)
    if space.get("kind") == "latent":
        first = space["autoencoder"]
        patch = max(1, patch // (first.get("patch", 1) * 2 ** (len(first["levels"]) - 1)))
    model = {"patch": patch, **raw["model"]}
    process = raw.get("process", {})
    if model["patch"] >= WIDE and "prediction" not in process:
        process = {**process, "prediction": "sample"}
    return {**raw, "data": {**raw["data"], "size": list(size)}, "model": model, "process": process}


def _first_size(source: Source, section: DataConfig) -> tuple[int, int]:
    """(height, width) of the first picture that can be read, or the default size."""
    for picture in source.pictures(image_role(source, section)):
        try:
            data = picture.read() if isinstance(picture, FileSpan) else picture
            if isinstance(data, bytes):
                return oriented_size(opened(data))
        except (OSError, ValueError, PictureError):
            continue
    return 64, 64


def for_classifier(raw: dict[str, Any], run: RunConfig, where: Path) -> dict[str, Any]:
    """The recipe of a classifier that guides `run`: its schedule, space, picture size and classes are the run's."""
    stored = run.model_dump(mode="json")
    data = {**stored["data"], **{k: v for k, v in raw.get("data", {}).items() if v is not None}}
    data |= {"size": stored["data"]["size"], "channels": stored["data"]["channels"]}
    process = {**stored["process"], "learned_variance": False}
    classes = stored["classes"] if any(s.kind == "label" for s in run.conditions) else None
    model = {"patch": stored["model"].get("patch", 1), **raw.get("model", {})}
    return {**raw, "task": "classifier", "model": model, "data": data, "process": process, "space": stored["space"],
            "classes": classes, "conditions": [], "provenance": {"for": str(where)}}  # fmt: skip


def for_autoencoder(raw: dict[str, Any], section: AutoencoderConfig, where: str) -> dict[str, Any]:
    """The recipe of a model in the latents of a given autoencoder."""
    if raw.get("task", "diffusion") == "autoencoder":
        raise LimnerError("--autoencoder: goes with diffusion; to train one on, use --resume")
    space = {**raw.get("space", {}), "kind": "latent", "autoencoder": section.model_dump(mode="json"), "source": where}
    return {**raw, "space": space}


def wants(recipe: RunConfig) -> tuple[str | ConditionConfig, ...]:
    """The conditions that every row of the data must have."""
    if recipe.task == "classifier":
        return ("label",)
    return recipe.conditions if recipe.task == "diffusion" else ()


def complete(recipe: RunConfig, data: Dataset, where: str) -> RunConfig:
    """The recipe with what the data tell: picture size and class names, then checked to be buildable."""
    names = data.class_names
    if recipe.classes is not None and names is not None and tuple(names) != tuple(recipe.classes):
        raise LimnerError(f"{where}: its classes are {_some(names)}, those of the recipe {_some(recipe.classes)}")
    filled: dict[str, Any] = recipe.model_dump(mode="json")
    filled["data"] |= {"size": list(data.size), "channels": data.channels}
    filled["classes"] = list(names) if names is not None else filled["classes"]
    filled["conditions"] = [section | data.facts.get(section["kind"], {}) for section in filled["conditions"]]
    return config.parse(filled, where)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f", ... ({len(names)})" if len(names) > 6 else "")


def provenance(raw: Mapping[str, Any], preset: str, version: str) -> dict[str, Any]:
    """Where a run came from, for its `config.yaml`."""
    return {**raw.get("provenance", {}), "preset": preset, "limner": version}
