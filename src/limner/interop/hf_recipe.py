"""From what diffusers' settings say to one recipe; and the recipe that Limner leaves beside what it exports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner import config as c
from limner.errors import LimnerError
from limner.interop import hf_schedule, hole
from limner.interop.hf_config import AutoencoderFacts, UNetFacts
from limner.interop.hf_text import TextFacts

if TYPE_CHECKING:
    from limner.interop.hf import Parts

LABEL = "conditioner.modalities.label."
FILE = "limner.yaml"
"""What diffusers has no word for: names of the classes, which row is null, what it was trained on, how to sample."""
KEPT = ("data", "classes", "conditions", "training", "sampling", "provenance")
DEFAULT_SIZE = 64
GUIDANCE = {"clip": 7.5, "bert": 5.0}


def read(folder: Path) -> Mapping[str, Any] | None:
    """What Limner left beside its export, or None."""
    return c.read_yaml(folder / FILE) if (folder / FILE).is_file() else None


def recipe(parts: Parts, unet: UNetFacts, stage: AutoencoderFacts | None, text: TextFacts | None) -> c.RunConfig:
    """The recipe of a pipeline. Raises LimnerError where its parts don't fit together."""
    space, painted = _space(unet, stage)
    where = parts.network.where if parts.network else parts.where
    if unet.in_channels != space and not painted:
        raise LimnerError(f"{where}: in_channels: {unet.in_channels}, of which the latent has {space}; what else is "
                          "concatenated has no counterpart")  # fmt: skip
    if stage is None and space not in (1, 3, 4):
        raise LimnerError(f"{where}: in_channels: {space}; Limner has pictures of 1, 3 or 4 channels")
    if unet.out_channels not in (space, 2 * space):
        raise LimnerError(f"{where}: out_channels: {unet.out_channels} for {space} in; should be {space}, or "
                          f"{2 * space} with a learned variance")  # fmt: skip
    learned = unet.out_channels == 2 * space
    latent = stage is not None or unet.token_channels is not None  # alone, as those with cross-attention mostly are
    guidance = GUIDANCE[text.family] if text else 1.0
    process, sampling = _process(parts, latent=latent, learned=learned, guidance=guidance)
    raw: dict[str, Any] = {
        "data": {"size": _size(parts, unet, stage), "channels": stage.channels if stage else space},
        **({"space": {"kind": "latent", "autoencoder": stage.section}} if stage else {}),
        "process": process,
        "model": unet.section,
        "conditions": [*([hole.SECTION] if painted else []), *_conditions(where, unet, text, parts.notes)],
        "classes": [str(k) for k in range(unet.classes)] if unet.classes else None,
        "sampling": sampling,
        "training": {"precision": "fp32"},
        "provenance": {"format": "diffusers", "file": Path(parts.where).name, "pipeline": parts.pipeline},
    }
    return c.parse(_completed(raw, parts.recipe), parts.where)


def _space(unet: UNetFacts, stage: AutoencoderFacts | None) -> tuple[int, bool]:
    """The channels of x_t, and whether a mask and a picture with a hole are concatenated to them."""
    crossing, channels = unet.token_channels is not None, unet.in_channels
    half, odd = divmod(channels, 2)
    alone = half if crossing and odd and unet.out_channels in (half, 2 * half) else channels
    space = stage.section["latent_channels"] if stage else alone
    return space, crossing and channels == 2 * space + 1


def _completed(raw: dict[str, Any], kept: Mapping[str, Any] | None) -> dict[str, Any]:
    """With what Limner left beside its export, where that is of the same kind of model."""
    if kept is None:
        return raw
    same = _kinds(kept.get("conditions", ())) == _kinds(raw["conditions"])
    return {**raw, **{name: kept[name] for name in KEPT if name in kept}} if same else raw


def _kinds(conditions: Iterable[Mapping[str, Any]]) -> list[str]:
    return sorted(str(section.get("kind")) for section in conditions)


def _size(parts: Parts, unet: UNetFacts, stage: AutoencoderFacts | None) -> list[int]:
    factor = 2 ** (len(stage.section["levels"]) - 1) if stage else 1
    if unet.size is not None:
        return [side * factor for side in unet.size]
    size = stage.size if stage else (DEFAULT_SIZE, DEFAULT_SIZE)
    parts.notes.append(f"{parts.where}: its U-Net has no sample_size; pictures of {size[1]}x{size[0]} are assumed")
    return list(size)


def _process(parts: Parts, *, latent: bool, learned: bool, guidance: float) -> tuple[dict[str, Any], dict[str, Any]]:
    if parts.scheduler is None:
        parts.notes.append(f"{parts.where}: no scheduler beside it; DDPM's linear schedule and epsilon are assumed")
        process: dict[str, Any] = {"schedule": {"kind": "linear"}, "prediction": "epsilon", "time_input": "step",
                                   "learned_variance": learned}  # fmt: skip
        return process, {"guidance": guidance, "clip": not latent}
    process = hf_schedule.process(parts.scheduler, learned_variance=learned)
    sampling, notes = hf_schedule.sampling(parts.scheduler, latent=latent, guidance=guidance, learned_variance=learned)
    parts.notes += notes
    return process, sampling


def _conditions(where: str, unet: UNetFacts, text: TextFacts | None, notes: list[str]) -> list[dict[str, Any]]:
    conditions: list[dict[str, Any]] = []
    if unet.classes:
        conditions.append({"kind": "label", "dropout": 0.0, "null": False})
    if unet.token_channels is None:
        return conditions
    if text is None:
        notes.append(f"{where}: cross-attention without a text encoder beside it; give the pipeline's folder, or "
                     f"captions as an encoder's output (B, L, {unet.token_channels})")  # fmt: skip
        encoder = {"kind": "given", "width": unet.token_channels}
        return [*conditions, {"kind": "text", "dropout": 0.0, "pooled": False, "null": "empty", "encoder": encoder}]
    if text.width != unet.token_channels:
        raise LimnerError(f"{where}: cross_attention_dim: {unet.token_channels}, but the text encoder gives "
                          f"{text.width}")  # fmt: skip
    return [*conditions, text.section]
