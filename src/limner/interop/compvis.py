"""CompVis' latent diffusion models and autoencoders (Rombach et al. 2022, arXiv:2112.10752), with their YAML.

Averaged weights are taken where there are any. Their names lost the dots; the map back is built from the names of the
weights themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner import build
from limner import config as c
from limner.core.schedule import DiscreteSchedule
from limner.errors import LimnerError
from limner.interop import compvis_conditions, compvis_keys, hole, unet_keys
from limner.interop.compvis_config import (
    AUTOENCODERS,
    Settings,
    autoencoder_recipe,
    factor,
    latent_size,
    model_settings,
    recipe,
    scale_factor,
    unet_arguments,
)
from limner.interop.imported import Imported, imported, normalisation
from limner.interop.keymap import Change, Rule, under
from limner.interop.safe import Content

NETWORK = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."
AVERAGE = "model_ema."

BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights", "logvar",
    "scale_factor",
)  # fmt: skip
"""What follows from the schedule, and the latent's scale, which is read apart."""

UNUSED = (f"{AVERAGE}*", f"{FIRST_STAGE}loss.*", f"{FIRST_STAGE}model_ema.*", "loss.*", "*.colorize", "colorize")
"""What sampling has no use for: the other set of weights, discriminators, colours of segmentation previews."""


def is_compvis(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of a latent diffusion model, or of an autoencoder, of CompVis."""
    return f"{NETWORK}time_embed.0.weight" in weights or "encoder.down.0.block.0.norm1.weight" in weights


def read(content: Content, path: Path, config: str | Path | None) -> Imported:
    """Import a checkpoint that is already read. `config`: its YAML. Raises LimnerError where that is missing, asks for
    something that Limner lacks (named), or contradicts the weights."""
    where = str(path)
    if config is None:
        raise LimnerError(f"{where}: a CompVis checkpoint, whose YAML says what it is: needs config (--config FILE)")
    settings = model_settings(config)
    if f"{NETWORK}time_embed.0.weight" not in content.weights:
        return _autoencoder(content.weights, settings, where)
    weights, notes = _chosen_weights(content.weights, settings, where)
    classes, f, size = unet_arguments(settings)["num_classes"], factor(settings), latent_size(settings)
    told = compvis_conditions.told(settings, classes, f, size, weights, where)
    made = recipe(settings, told.sections, told.classes, where)
    _check_schedule(weights, made, where)
    rules = [*_network_table(made, told.stem), *told.rules]
    given = dict(told.given)
    if isinstance(made.space, c.LatentSpace):
        rules += under(FIRST_STAGE, "autoencoder.", compvis_keys.autoencoder(made.space.autoencoder))
        given |= _latent_scale(made.space.autoencoder, scale_factor(weights, settings))
    ignore = [*BUFFERS, *UNUSED, *told.unused]
    return imported(made, weights, rules, where, ignore=ignore, given=given, notes=[*notes, *told.notes])


def _autoencoder(weights: Mapping[str, Tensor], settings: Settings, where: str) -> Imported:
    if settings.target not in AUTOENCODERS:
        raise LimnerError(f"{where}: an autoencoder's weights, but the config describes a diffusion model")
    made = autoencoder_recipe(settings, where)
    assert isinstance(made.model, c.AutoencoderConfig)
    rules = under("", "autoencoder.", compvis_keys.autoencoder(made.model))
    return imported(made, weights, rules, where, ignore=UNUSED, given=_latent_scale(made.model, 1.0))


def _latent_scale(config: c.AutoencoderConfig, scale: float) -> dict[str, Tensor]:
    """The peer multiplies latents by one factor; ours are divided by a deviation per channel."""
    channels = config.latent_channels
    return normalisation(config, torch.zeros(channels), torch.full((channels,), 1 / scale))


@dataclass(frozen=True)
class _Averages:
    """Averaged weights by the names that they were averages of."""

    weights: dict[str, Tensor]

    @staticmethod
    def of(weights: Mapping[str, Tensor], where: str) -> _Averages:
        found: dict[str, Tensor] = {}
        origin: dict[str, str] = {}
        for name in weights:
            if not name.startswith("model."):
                continue
            mangled = AVERAGE + name.removeprefix("model.").replace(".", "")
            if mangled in origin:
                raise LimnerError(f"{where}: the averages of '{name}' and '{origin[mangled]}' have one name")
            origin[mangled] = name
            if mangled in weights:
                found[name] = weights[mangled]
        return _Averages(found)


def _chosen_weights(weights: Mapping[str, Tensor], settings: Settings,
                    where: str) -> tuple[dict[str, Tensor], list[str]]:  # fmt: skip
    """The averaged network where there is one, as the peer samples with; all other weights as they are."""
    wanted = bool(settings.get("use_ema", True))
    averages = _Averages.of(weights, where).weights if wanted else {}
    names = [name for name in weights if name.startswith(NETWORK)]
    if averages and len(averages) < len(names):
        lost = next(name for name in names if name not in averages)
        raise LimnerError(
            f"{where}: averaged weights are incomplete, '{lost}' has none; set use_ema: false to do without"
        )
    notes = [f"{where}: holds no averaged weights; the plain ones are used"] * (wanted and not averages)
    return {**weights, **averages}, notes


def _check_schedule(weights: Mapping[str, Tensor], made: c.RunConfig, where: str) -> None:
    stored, schedule = weights.get("alphas_cumprod"), build.schedule(made)
    if stored is None or not isinstance(schedule, DiscreteSchedule):
        return
    if len(stored) != schedule.steps or not torch.allclose(stored.double(), schedule.alphas_bar, rtol=1e-3, atol=1e-6):
        raise LimnerError(f"{where}: its noise schedule isn't the config's (timesteps, linear_start, linear_end)")


def _network_table(made: c.RunConfig, stem: Change | None) -> list[Rule]:
    """stem: what becomes of the first layer's weights."""
    model = made.model
    assert isinstance(model, c.UNetConfig)
    if model.middle == "transformer":
        attention: Any = unet_keys.TRANSFORMER
    else:
        new_order = made.provenance.get("new_attention_order", False)
        attention = unet_keys.self_attention(unet_keys.heads_of(model), heads_outside=not new_order)
    return under(NETWORK, "network.", [*hole.with_stem(unet_keys.ENDS, stem), *unet_keys.blocks(attention)])
