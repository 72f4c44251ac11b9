"""diffusers' folders: pipelines, single networks, and single safetensors files with their settings beside them.

JSON and safetensors alone are read; neither diffusers nor any code of the folder is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner import config as c
from limner.errors import LimnerError
from limner.interop import hf_config, hf_keys, hf_recipe, hf_schedule, hf_text, hole
from limner.interop.hf_files import CONFIG, INDEX, Component, read_json
from limner.interop.imported import Imported, imported, normalisation
from limner.interop.keymap import Rule, under

ROLES = {
    "unet": "network", "vae": "autoencoder", "vqvae": "autoencoder", "text_encoder": "text", "bert": "text",
    "tokenizer": "tokenizer", "scheduler": "scheduler",
}  # fmt: skip
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that draw nothing: what checks or describes finished pictures."""
UNTRAINED = ("text.*position_ids", "text.text_projection.weight", "text.to_logits.*")
TEXT_RULES = {"clip": hf_keys.CLIP, "bert": hf_keys.BERT}


@dataclass
class Parts:
    """What was found in a folder, by role."""

    where: str
    pipeline: str = ""
    network: Component | None = None
    autoencoder: Component | None = None
    scheduler: Component | None = None
    text: Component | None = None
    tokenizer: Path | None = None
    recipe: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def is_folder(path: Path) -> bool:
    """Whether a folder is diffusers': of a pipeline, or of a single network."""
    return (path / INDEX).is_file() or (path / CONFIG).is_file()


def read(path: Path) -> Imported:
    """Import a folder of a pipeline or of a network, or a weights file with `config.json` beside it. Raises LimnerError
    for whatever has no counterpart, naming it, and for files that are missing, damaged or hostile."""
    if path.is_file():
        if not (path.parent / CONFIG).is_file():
            raise LimnerError(
                f"{path}: a network of diffusers, whose settings say what it is: needs {CONFIG} beside it"
            )
        return assemble(_single(Component.read(path.parent, weights_name=path.name)))
    return assemble(_pipeline(path) if (path / INDEX).is_file() else _single(Component.read(path)))


def _pipeline(folder: Path) -> Parts:
    index = read_json(folder / INDEX)
    found = Parts(str(folder), str(index.get("_class_name", "")))
    for name, entry in index.items():
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None or name in UNUSED:
            continue
        role = ROLES.get(name)
        if role is None:
            raise LimnerError(f"{folder / INDEX}: {name}: {entry[1]} has no counterpart; {', '.join(ROLES)} have")
        if not (folder / name).is_dir():
            raise LimnerError(f"{folder / INDEX}: names {name}, but there is no such folder")
        file = hf_schedule.FILE if role == "scheduler" else CONFIG
        setattr(found, role, folder / name if role == "tokenizer" else Component.read(folder / name, file))
    found.recipe = hf_recipe.read(folder)
    return found


def _single(component: Component) -> Parts:
    found = Parts(component.where)
    if component.kind in hf_config.UNETS:
        found.network = component
        beside = component.folder.parent / "scheduler"
        if (beside / hf_schedule.FILE).is_file():
            found.scheduler = Component.read(beside, hf_schedule.FILE)
    elif component.kind in hf_config.AUTOENCODERS:
        found.autoencoder = component
    else:
        known = ", ".join((*hf_config.UNETS, *hf_config.AUTOENCODERS))
        raise LimnerError(f"{component.where}: {component.kind or 'no class'} has no counterpart; {known} have")
    return found


def assemble(parts: Parts) -> Imported:
    """The recipe and weights of what was found."""
    if parts.network is None:
        if parts.autoencoder is None:
            raise LimnerError(f"{parts.where}: holds neither a U-Net nor an autoencoder")
        return _autoencoder_alone(parts.autoencoder)
    if parts.network.kind not in hf_config.UNETS:
        raise LimnerError(f"{parts.network.where}: {parts.network.kind} has no counterpart; "
                          f"{' and '.join(hf_config.UNETS)} have")  # fmt: skip
    facts = hf_config.unet(parts.network)
    stage = hf_config.autoencoder(parts.autoencoder) if parts.autoencoder else None
    text = hf_text.encoder(parts.text) if parts.text else None
    made = hf_recipe.recipe(parts, facts, stage, text)
    weights = {f"unet.{name}": x for name, x in parts.network.weights().items()}
    assert isinstance(made.model, c.UNetConfig)
    rules = under("unet.", "network.", hole.with_stem(hf_keys.unet(made.model), hole.order(made)))
    rules += under("unet.", "", [Rule(("class_embedding.weight",), (f"{hf_recipe.LABEL}table.weight",))])
    given: dict[str, Tensor] = {}
    if stage and parts.autoencoder and isinstance(made.space, c.LatentSpace):
        weights |= {f"vae.{name}": x for name, x in parts.autoencoder.weights().items()}
        rules += under("vae.", "autoencoder.", hf_keys.autoencoder(made.space.autoencoder))
        given |= normalisation(made.space.autoencoder, torch.tensor(stage.mean), torch.tensor(stage.std))
    if text and parts.text:
        weights |= {f"text.{name}": x for name, x in parts.text.weights().items()}
        rules += under(_text_prefix(weights, text.family), f"{hf_text.TEXT}encoder.", TEXT_RULES[text.family])
        given[f"{hf_text.TEXT}tokenizer.data"] = _tokenizer(parts, text)
    return imported(made, weights, rules, parts.where, ignore=UNTRAINED, given=given, notes=parts.notes)


def _text_prefix(weights: Mapping[str, Tensor], family: str) -> str:
    if family == "bert":
        return "text.model."
    return "text.text_model." if any(name.startswith("text.text_model.") for name in weights) else "text."


def _tokenizer(parts: Parts, text: hf_text.TextFacts) -> Tensor:
    encoder = text.section["encoder"]
    size, length = encoder["vocabulary"], encoder["length"]
    if parts.tokenizer is None:
        parts.notes.append(f"{parts.where}: has no tokenizer; give tokens instead of captions")
        return hf_text.Vocabulary(size, length).data
    return hf_text.packed(hf_text.tokenizer(parts.tokenizer, text.family), size, length)


def _autoencoder_alone(component: Component) -> Imported:
    facts = hf_config.autoencoder(component, alone=True)
    raw = {
        "task": "autoencoder",
        "model": facts.section,
        "data": {"size": list(facts.size), "channels": facts.channels},
        "training": {"precision": "fp32"},
        "provenance": {"format": "diffusers", "file": component.folder.name, "class": component.kind},
    }
    made = c.parse(raw, component.where)
    assert isinstance(made.model, c.AutoencoderConfig)
    rules = under("", "autoencoder.", hf_keys.autoencoder(made.model))
    given = normalisation(made.model, torch.tensor(facts.mean), torch.tensor(facts.std))
    return imported(made, component.weights(), rules, component.where, given=given)
