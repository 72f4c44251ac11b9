"""What CompVis' models are told: classes, text, layouts as tokens; semantic maps, small pictures and pictures with a
hole, concatenated; pictures with a hole and text together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from limner.errors import LimnerError
from limner.interop import compvis_text, hf_text, hole
from limner.interop.compvis_config import IMAGENET, UNCONDITIONAL, Settings, scale_factor
from limner.interop.keymap import Change, Rule, per_weight, rule

CONDITION = "cond_stage_model."
FIRST_STAGE = "__is_first_stage__"
MAP = "conditioner.modalities.semantic_map.rescale"
LABEL = "conditioner.modalities.label.table"
BOXES = "conditioner.modalities.boxes."
LAYOUTS = ("coordinates_bbox", "objects_bbox")
"""Keys of the peer's batches that hold layouts as tokens."""


@dataclass(frozen=True)
class Told:
    """A model's conditions: their sections of a recipe, names of the classes, the table of their weights, weights that
    the file says in another way, what of its weights draws nothing, what the user should know, and how the weights of
    the network's first layer change."""

    sections: list[dict[str, Any]] = field(default_factory=list)
    classes: list[str] | None = None
    rules: list[Rule] = field(default_factory=list)
    given: dict[str, Tensor] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    stem: Change | None = None


def told(settings: Settings, classes: int | None, factor: int, latent: tuple[int, int], weights: Mapping[str, Tensor],
         where: str) -> Told:  # fmt: skip
    """classes: of the U-Net's own embedding. factor: f. latent: height and width of x_t. `concat` is the default key
    where the YAML names none. Raises LimnerError for whatever has no counterpart."""
    stage = settings.get("cond_stage_config", UNCONDITIONAL)
    key = settings.get("conditioning_key", "concat" if settings.get("concat_mode", True) else "crossattn")
    if stage == UNCONDITIONAL:
        return Told(unused=(f"{CONDITION}*",))
    if key == "adm":
        section = {"kind": "label", "dropout": 0.0, "null": False}
        rules = [rule("model.diffusion_model.label_emb", LABEL), rule(f"{CONDITION}embedding", LABEL)]
        return Told([section], [str(k) for k in range(classes or 0)], rules)
    if key not in ("crossattn", "concat", "hybrid"):
        raise LimnerError(f"{settings.where}: conditioning_key '{key}' has no counterpart; crossattn, concat, adm, "
                          "hybrid have")  # fmt: skip
    if stage == FIRST_STAGE:
        return _inpainting(settings, key, weights)
    embedder = settings.part("cond_stage_config")
    if key == "concat":
        return _concatenated(embedder, factor, latent, weights)
    found = _tokens(settings, embedder, weights, where)
    return found if key == "crossattn" else _painted(settings, found)


def _tokens(settings: Settings, embedder: Settings, weights: Mapping[str, Tensor], where: str) -> Told:
    """What cross-attention sees."""
    if embedder.target == "ClassEmbedder":
        return _classes(embedder, where)
    if settings.get("cond_stage_key", None) in LAYOUTS:
        return _boxes(embedder, where)
    text = compvis_text.read(embedder, weights, CONDITION)
    data, notes = text.vocabulary(where)
    return Told([text.section], None, text.rules, {f"{hf_text.TEXT}tokenizer.data": data}, text.unused, notes)


def _painted(settings: Settings, found: Told) -> Told:
    """Text, mostly, and a picture with a hole, scaled as x_t is: Stable Diffusion's `LatentInpaintDiffusion`."""
    unet, latent = settings.part("unet_config"), settings.part("first_stage_config").need("embed_dim")
    channels, picture = unet.get("in_channels", 0), settings.get("masked_image_key", "masked_image")
    keys = list(settings.get("concat_keys", ["mask", "masked_image"]))
    if channels != 2 * latent + 1 or keys not in (["mask", picture], [picture, "mask"]):
        raise LimnerError(f"{settings.where}: hybrid of {' and '.join(map(str, keys))}, {channels} channels, has no "
                          f"counterpart; inpainting has: mask and masked_image, {2 * latent + 1} channels")  # fmt: skip
    stem = hole.mask_last(latent) if keys[0] == "mask" else None
    return replace(found, sections=[hole.SECTION, *found.sections], stem=stem)


def _boxes(embedder: Settings, where: str) -> Told:
    """Layouts as taming-transformers' `objects_bbox` builds them: three tokens a box; and, where `encode_crop` made
    them, two of the crop, which the length tells."""
    if embedder.target not in compvis_text.TRANSFORMERS or compvis_text.is_tokenised(embedder):
        raise LimnerError(f"{embedder.where}: {embedder.target} of words has no counterpart for layouts; BERTEmbedder "
                          "with use_tokenizer: false and TransformerEmbedder have")  # fmt: skip
    facts, rules = compvis_text.transformer(embedder, CONDITION, BOXES)
    most, crop = divmod(facts["length"], 3)
    if crop == 1 or not most:
        raise LimnerError(f"{embedder.where}.max_seq_len: {facts['length']} has no counterpart for layouts; 3 tokens a "
                          "box have, and 2 more of the crop")  # fmt: skip
    tokens = {"vocabulary": facts["vocabulary"], "heads": facts["heads"], "crop": bool(crop)}
    section = {"kind": "boxes", "dropout": 0.0, "pooled": False, "most": most, "tokens": tokens,
               **{name: facts[name] for name in ("width", "depth", "head_dim")}}  # fmt: skip
    notes = [f"{where}: names no classes; boxes take their numbers, or names once the run's config.yaml lists them"]
    return Told([section], None, rules, unused=(f"{CONDITION}{compvis_text.UNUSED}",), notes=notes)


def _inpainting(settings: Settings, key: str, weights: Mapping[str, Tensor]) -> Told:
    """`scripts/inpaint.py`: to x_t are concatenated the latent of the picture, black in the hole, and the mask, whose
    cells are the nearest pixels and whose values are -1 and 1. That latent isn't scaled as x_t is; ours is, so that
    the first layer's weights for it are divided by the scale."""
    unet, latent = settings.part("unet_config"), settings.part("first_stage_config").need("embed_dim")
    channels = unet.get("in_channels", 0)
    if key != "concat" or channels != 2 * latent + 1:
        raise LimnerError(f"{settings.where}.cond_stage_config: {FIRST_STAGE} with {key} of {channels} channels has no "
                          f"counterpart; inpainting has: concat of {2 * latent + 1}")  # fmt: skip
    section = {"kind": "mask", "dropout": 0.0, "null": False, "hole": "black", "signed": True, "cells": "first"}
    stem = hole.scaled(latent, 1 / scale_factor(weights, settings))
    return Told([section], unused=(f"{CONDITION}*",), stem=stem)


def _classes(embedder: Settings, where: str) -> Told:
    rows, null = embedder.get("n_classes", IMAGENET), "n_classes" in embedder.params
    section = {"kind": "label", "dropout": 0.1 if null else 0.0, "enters": "token", "null": null,
               "width": embedder.need("embed_dim")}  # fmt: skip
    notes = [f"{where}: the last row of its class embedding is taken for the null class"] * null
    return Told([section], [str(k) for k in range(rows - null)], [rule(f"{CONDITION}embedding", LABEL)], notes=notes)


def _concatenated(embedder: Settings, factor: int, latent: tuple[int, int], weights: Mapping[str, Tensor]) -> Told:
    if embedder.target == "Identity":
        return Told([{"kind": "image", "dropout": 0.0, "null": False, "size": list(latent)}])
    if embedder.target != "SpatialRescaler":
        raise LimnerError(f"{embedder.where}: {embedder.target} has no counterpart for concat; SpatialRescaler and "
                          "torch.nn.Identity have")  # fmt: skip
    classes, method = embedder.get("in_channels", 3), embedder.get("method", "bilinear")
    shrinks = (1 / embedder.get("multiplier", 0.5)) ** embedder.get("n_stages", 1)
    if shrinks != factor or method not in ("bilinear", "area", "nearest"):
        raise LimnerError(f"{embedder.where}: {method} to 1/{shrinks:g} has no counterpart; bilinear, area or nearest "
                          f"to 1/{factor}, as the autoencoder, has")  # fmt: skip
    width = embedder.get("out_channels", classes)
    section = {"kind": "semantic_map", "dropout": 0.0, "classes": [str(k) for k in range(classes)], "width": width}
    kernel = torch.full((factor, factor), 1 / factor**2)
    if method == "nearest":
        kernel = torch.zeros(factor, factor)
        kernel[0, 0] = 1
    # Halving by two pixels' mean, again and again, then a convolution of one pixel: one strided convolution.
    spread = per_weight(lambda x: x * kernel.to(x), lambda x: x.sum((2, 3), keepdim=True))
    given: dict[str, Tensor] = {}
    if f"{CONDITION}channel_mapper.weight" not in weights:
        given[f"{MAP}.weight"] = torch.eye(classes)[:, :, None, None] * kernel
    if f"{CONDITION}channel_mapper.bias" not in weights:
        given[f"{MAP}.bias"] = torch.zeros(width)
    rules = [
        Rule((f"{CONDITION}channel_mapper.weight",), (f"{MAP}.weight",), spread),
        Rule((f"{CONDITION}channel_mapper.bias",), (f"{MAP}.bias",)),
    ]
    return Told([section], None, rules, given)
