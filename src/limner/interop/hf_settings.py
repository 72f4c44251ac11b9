"""From a recipe to diffusers' settings: the way back of `hf_config`. Where diffusers has no such network, the part that
it lacks is named."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from limner import build
from limner import config as c
from limner.errors import LimnerError
from limner.interop import hf_config
from limner.nn.conditioners import Conditioner


def refuse(part: str, why: str) -> LimnerError:
    """What is raised for a part that diffusers lacks."""
    return LimnerError(f"{part}: {why}; to diffusers it cannot go")


def unet(config: c.RunConfig) -> tuple[str, dict[str, Any]]:
    """Class and settings of the U-Net. Raises LimnerError naming what diffusers lacks."""
    model = config.model
    if not isinstance(model, c.UNetConfig):
        raise refuse("model.kind", f"diffusers has no {model.kind}")
    if model.patch > 1:
        raise refuse(f"model.patch {model.patch}", "diffusers has no U-Net of patches; train with model.patch=1")
    if model.guided:
        raise refuse("model.guided", "diffusers' U-Nets embed a guidance scale in another way")
    if model.resample == "pool":
        raise refuse("model.resample pool", "diffusers' U-Nets resample by convolutions or residual blocks")
    if model.spatial_norm:
        raise refuse("model.spatial_norm", "diffusers has no U-Net whose way up is modulated by a map")
    if model.transformer_norm_eps != 1e-6:
        raise refuse(f"model.transformer_norm_eps {model.transformer_norm_eps:g}", "diffusers has 1e-06 alone")
    conditional = model.middle == "transformer"
    if not conditional and any(level.cross_attention for level in model.levels):
        raise refuse(f"model.middle {model.middle}", "with cross-attention diffusers has a transformer in the middle")
    channels, height, width = build.space_shape(config)
    widths = [level.channels for level in model.levels]
    first = model.time_channels or widths[0]
    if first != widths[0]:
        raise refuse(f"model.time_channels {first}", f"diffusers has as many as at the first level, {widths[0]}")
    tau = _conditioner(config)
    settings = {
        "sample_size": width if height == width else [height, width],
        "in_channels": channels + (tau.spatial_channels if tau else 0),
        "out_channels": channels * (2 if config.process.learned_variance else 1),
        "block_out_channels": widths,
        "flip_sin_to_cos": model.time_order == "cos_sin",
        "freq_shift": _freq_shift(model, first),
        "time_embedding_dim": model.emb_channels,
        "downsample_padding": 0 if model.asymmetric else 1,
        "dropout": model.dropout,
        "norm_num_groups": _groups(_unet_widths(model), model.norm_groups, "model.norm_groups"),
        "norm_eps": model.norm_eps,
        "resnet_time_scale_shift": "default" if model.modulation == "add" else "scale_shift",
        "num_class_embeds": _label_rows(config),
        "act_fn": "silu",
    }
    return ("UNet2DConditionModel", settings | _conditional(model, config)) if conditional else (
        "UNet2DModel", settings | _unconditional(model))  # fmt: skip


def _unconditional(model: c.UNetConfig) -> dict[str, Any]:
    block = model.resample == "block"
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if block else ("DownBlock2D", "UpBlock2D")
    kinds = [("AttnDownBlock2D", "AttnUpBlock2D") if level.attention else plain for level in model.levels]
    blocks = {level.blocks for level in model.levels}
    if len(blocks) > 1:
        raise refuse("model.levels", "diffusers' UNet2DModel has as many blocks at each level")
    return {
        "layers_per_block": blocks.pop(),
        "down_block_types": [down for down, _ in kinds],
        "up_block_types": [up for _, up in reversed(kinds)],
        "mid_block_type": "UNetMidBlock2D",
        "add_attention": model.middle == "attention",
        "downsample_type": "resnet" if block else "conv",
        "upsample_type": "resnet" if block else "conv",
        "attention_head_dim": _head_dim(model),
        # Without it the attention in the middle has no norm where the blocks have AdaGN.
        "attn_norm_num_groups": math.gcd(model.norm_groups, model.levels[-1].channels),
    }


def _conditional(model: c.UNetConfig, config: c.RunConfig) -> dict[str, Any]:
    if model.resample == "block" and any(level.cross_attention for level in model.levels):
        raise refuse("model.resample block", "diffusers' levels with cross-attention resample by convolutions; train "
                     "with model.resample=conv")  # fmt: skip
    if any(level.attention and not level.cross_attention for level in model.levels):
        raise refuse("model.levels.attention", "diffusers' U-Net with cross-attention has no self-attention alone")
    crossing = [bool(level.cross_attention) for level in model.levels]
    depths = [max(1, level.cross_attention) for level in model.levels]
    depth = model.middle_depth or depths[-1]
    if crossing[-1] and depth != depths[-1]:
        raise refuse(f"model.middle_depth {depth}", f"diffusers has the last level's, {depths[-1]}")
    return {
        "layers_per_block": [level.blocks for level in model.levels],
        "down_block_types": ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in crossing],
        "up_block_types": ["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(crossing)],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "transformer_layers_per_block": [*depths[:-1], depth],
        # The number of heads, whatever its name says.
        "attention_head_dim": [_heads(model, level.channels) for level in model.levels],
        "cross_attention_dim": tau.token_channels if (tau := _conditioner(config)) else None,
        "use_linear_projection": False,
    }


def _conditioner(config: c.RunConfig) -> Conditioner | None:
    with torch.device("meta"):
        return build.conditioner(config, 1)


def _heads(model: c.UNetConfig, channels: int) -> int:
    return model.heads or max(1, channels // (model.head_dim or channels))


def _head_dim(model: c.UNetConfig) -> int | None:
    """Channels a head, one number for all levels, None for one head. diffusers divides the channels by it."""
    wide = {level.channels for level in model.levels if level.attention}
    wide |= {model.levels[-1].channels} if model.middle == "attention" else set()
    dims = {channels // _heads(model, channels) for channels in wide}
    if all(_heads(model, channels) == 1 for channels in wide):
        return None
    if len(dims) > 1 or any(channels % dim for channels in wide for dim in dims):
        said = " and ".join(str(channels // _heads(model, channels)) for channels in sorted(wide))
        part = "heads" if model.heads else "head_dim"
        raise refuse(f"model.{part}", f"heads of {said} channels; diffusers has one width at all levels; train with "
                     f"model.head_dim={math.gcd(*wide)}")  # fmt: skip
    return dims.pop()


def _freq_shift(model: c.UNetConfig, channels: int) -> int:
    for shift in (0, 1):
        if math.isclose(model.time_period, hf_config.period(channels, shift), rel_tol=1e-6):
            return shift
    raise refuse(f"model.time_period {model.time_period:g}", "diffusers has 10000 alone")


def _unet_widths(model: c.UNetConfig) -> Iterable[int]:
    """The channels of every norm: those of the levels, and on the way up theirs with the skip connections'."""
    widths = [level.channels for level in model.levels]
    skips = [widths[0]]
    for i, level in enumerate(model.levels):
        skips += [level.channels] * (level.blocks + (i + 1 < len(widths)))
    below = widths[-1]
    for level in reversed(model.levels):
        for _ in range(level.blocks + 1):
            widths.append(below + skips.pop())
            below = level.channels
    return widths


def _groups(widths: Iterable[int], groups: int, part: str) -> int:
    found = {math.gcd(groups, width) for width in widths}
    if len(found) > 1:
        said = ", ".join(map(str, sorted(found)))
        raise refuse(f"{part} {groups}", f"norms of {said} groups; diffusers has one number, such as {min(found)}")
    return found.pop()


def _label_rows(config: c.RunConfig) -> int | None:
    for section in config.conditions:
        if isinstance(section, c.LabelCondition) and section.enters == "vector":
            return len(config.classes or ()) + section.null
    return None


# --- autoencoders ------------------------------------------------------------------------------------------------


def autoencoder(section: c.AutoencoderConfig, channels: int, size: Sequence[int]) -> tuple[str, dict[str, Any]]:
    """Class and settings of the autoencoder, but for its latents' scale. Raises LimnerError naming what lacks."""
    if section.blocks == "tiny":
        return "AutoencoderTiny", _tiny(section, channels)
    levels, part = section.levels, "autoencoder"
    inner = section.z_channels or section.latent_channels
    kl = isinstance(section.regulariser, c.KLConfig)
    blocks, widths = {level.blocks for level in levels}, [level.channels for level in levels]
    lacking = {
        f"patch {section.patch}": section.patch > 1,
        "decoder_levels": section.decoder_levels not in (None, levels),
        f"decoder_patch {section.decoder_patch}": section.decoder_patch not in (None, section.patch),
        f"decoder_middle {section.decoder_middle}": section.decoder_middle not in (None, section.middle),
        f"stem_channels {section.stem_channels}": section.stem_channels not in (None, widths[0]),
        f"resample {section.resample}": section.resample != "conv",
        f"norm_eps {section.norm_eps:g}": section.norm_eps != 1e-6,
        f"z_channels {inner}": kl and inner != section.latent_channels,
        "levels": len(blocks) > 1,
    }
    for name, lacks in lacking.items():
        if lacks:
            raise refuse(f"{part}.{name}", f"diffusers has no autoencoder with {name.split()[0]} of its own")
    if isinstance(section.regulariser, c.VQConfig) and section.regulariser.normalised:
        raise refuse(f"{part}.regulariser.normalised", "diffusers' codebooks aren't normalised")
    settings = {
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": blocks.pop(),
        "down_block_types": ["AttnDownEncoderBlock2D" if x.attention else "DownEncoderBlock2D" for x in levels],
        "up_block_types": ["AttnUpDecoderBlock2D" if x.attention else "UpDecoderBlock2D" for x in reversed(levels)],
        "latent_channels": inner,
        "norm_num_groups": _groups(widths, section.norm_groups, f"{part}.norm_groups"),
        "mid_block_add_attention": section.middle == "attention",
        "sample_size": size[0] if size[0] == size[1] else list(size),
        "act_fn": "silu",
    }
    if isinstance(section.regulariser, c.VQConfig):
        return "VQModel", {**settings, "num_vq_embeddings": section.regulariser.codes,
                           "vq_embed_dim": section.latent_channels}  # fmt: skip
    return "AutoencoderKL", settings


def _tiny(section: c.AutoencoderConfig, channels: int) -> dict[str, Any]:
    if isinstance(section.regulariser, c.VQConfig):
        raise refuse("autoencoder.regulariser vq", "diffusers' tiny autoencoder has no codebook")
    decoder = (section.decoder_levels or section.levels)[::-1]
    return {
        "in_channels": channels,
        "out_channels": channels,
        "encoder_block_out_channels": [level.channels for level in section.levels],
        "num_encoder_blocks": [level.blocks for level in section.levels],
        "decoder_block_out_channels": [level.channels for level in decoder],
        "num_decoder_blocks": [level.blocks for level in decoder],
        "latent_channels": section.latent_channels,
    }
