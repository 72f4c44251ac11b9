"""Settings of diffusers' networks to sections of a recipe. What Limner has no counterpart for is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from limner.errors import LimnerError
from limner.interop.hf_files import Component

UNETS = ("UNet2DModel", "UNet2DConditionModel")
AUTOENCODERS = ("AutoencoderKL", "VQModel", "AutoencoderTiny")

CELLS = 64
"""Side of the latents of Stable Diffusion, for which tiny autoencoders are made."""
_SILU = ("silu", "swish")
_COMMON: dict[str, Any] = {
    "sample_size": None, "freq_shift": 0, "flip_sin_to_cos": True, "time_embedding_dim": None, "layers_per_block": 2,
    "downsample_padding": 1, "dropout": 0.0, "attention_head_dim": 8, "norm_num_groups": 32, "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default", "num_class_embeds": None,
}  # fmt: skip
UNET_2D: dict[str, Any] = {
    **_COMMON, "in_channels": 3, "out_channels": 3, "block_out_channels": [224, 448, 672, 896],
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3], "mid_block_type": "UNetMidBlock2D",
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"], "downsample_type": "conv", "upsample_type": "conv",
    "attn_norm_num_groups": None, "add_attention": True,
}  # fmt: skip
UNET_2D_CONDITION: dict[str, Any] = {
    **_COMMON, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"], "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3], "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1, "num_attention_heads": None,
}  # fmt: skip

_ONLY: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,), "time_embedding_type": ("positional",), "mid_block_scale_factor": (1,),
    "act_fn": _SILU, "class_embed_type": (None,),
}  # fmt: skip
UNET_2D_ONLY: dict[str, tuple[Any, ...]] = {**_ONLY, "num_train_timesteps": (None, 1000)}
UNET_2D_CONDITION_ONLY: dict[str, tuple[Any, ...]] = {
    **_ONLY, "only_cross_attention": (False,), "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,), "encoder_hid_dim_type": (None,), "dual_cross_attention": (False,),
    "use_linear_projection": (False, True), "addition_embed_type": (None,), "addition_time_embed_dim": (None,),
    "upcast_attention": (False, True, None), "resnet_skip_time_act": (False,), "resnet_out_scale_factor": (1,),
    "time_embedding_act_fn": (None,), "timestep_post_act": (None,), "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,), "conv_out_kernel": (3,), "projection_class_embeddings_input_dim": (None,),
    "attention_type": ("default",), "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False), "cross_attention_norm": (None,),
    "addition_embed_type_num_heads": (64,),
}  # fmt: skip
"""What changes the network and has no counterpart, with the values that it may have. Projections may be linear or
convolutions of one pixel, which is the same; upcasting concerns half precision."""

AUTOENCODER_KL: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"], "block_out_channels": [64], "layers_per_block": 1, "latent_channels": 4,
    "norm_num_groups": 32, "sample_size": 32, "scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None,
    "latents_std": None, "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True,
}  # fmt: skip
VQ_MODEL: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"], "block_out_channels": [64], "layers_per_block": 1, "latent_channels": 3,
    "sample_size": 32, "num_vq_embeddings": 256, "norm_num_groups": 32, "vq_embed_dim": None,
    "scaling_factor": 0.18215, "mid_block_add_attention": True,
}  # fmt: skip
AUTOENCODER_TINY: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "encoder_block_out_channels": [64] * 4, "num_encoder_blocks": [1, 3, 3, 3],
    "decoder_block_out_channels": [64] * 4, "num_decoder_blocks": [3, 3, 3, 1], "latent_channels": 4,
    "scaling_factor": 1.0, "shift_factor": 0.0, "block_out_channels": None,  # the last repeats those of the decoder
}  # fmt: skip
AUTOENCODER_TINY_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("relu",), "upsample_fn": ("nearest",), "upsampling_scaling_factor": (2,), "latent_magnitude": (3,),
    "latent_shift": (0.5,), "force_upcast": (False, True),
}  # fmt: skip
AUTOENCODER_KL_ONLY: dict[str, tuple[Any, ...]] = {"act_fn": _SILU, "force_upcast": (True, False)}
VQ_MODEL_ONLY: dict[str, tuple[Any, ...]] = {
    **AUTOENCODER_KL_ONLY, "norm_type": ("group",), "lookup_from_codebook": (False, True),
}  # fmt: skip

DOWN: dict[str, tuple[str, str]] = {
    "DownBlock2D": ("none", "conv"),
    "ResnetDownsampleBlock2D": ("none", "block"),
    "AttnDownBlock2D": ("attention", "downsample_type"),
    "CrossAttnDownBlock2D": ("transformer", "conv"),
}
UP: dict[str, tuple[str, str]] = {
    "UpBlock2D": ("none", "conv"),
    "ResnetUpsampleBlock2D": ("none", "block"),
    "AttnUpBlock2D": ("attention", "upsample_type"),
    "CrossAttnUpBlock2D": ("transformer", "conv"),
}
"""What stands after each residual block, and how the picture is resampled; or the setting that says how."""


@dataclass(frozen=True)
class UNetFacts:
    """A U-Net's section of a recipe, and what it says of its surroundings."""

    section: dict[str, Any]
    in_channels: int
    out_channels: int
    size: tuple[int, int] | None
    classes: int | None
    token_channels: int | None


def unet(component: Component) -> UNetFacts:
    """UNet2DModel or UNet2DConditionModel. Raises LimnerError for whatever has no counterpart."""
    conditional = component.kind == "UNet2DConditionModel"
    s = (component.complete(UNET_2D_CONDITION, UNET_2D_CONDITION_ONLY) if conditional
         else component.complete(UNET_2D, UNET_2D_ONLY))  # fmt: skip
    where = component.where
    widths, allowed = s["block_out_channels"], ("none", "transformer") if conditional else ("none", "attention")
    count = len(widths)
    down = [_block(s, where, "down_block_types", DOWN, name) for name in s["down_block_types"]]
    up = [_block(s, where, "up_block_types", UP, name) for name in s["up_block_types"]][::-1]
    if not len(down) == len(up) == count:
        raise LimnerError(f"{where}: down_block_types, up_block_types and block_out_channels should be equally many")
    for (after, _), (mirrored, _) in zip(down, up, strict=True):
        if after != mirrored or after not in allowed:
            raise LimnerError(f"{where}: down_block_types and up_block_types: should mirror each other, and have "
                              f"{allowed[1]} or nothing after their blocks")  # fmt: skip
    blocks, depths = _each(s, where, "layers_per_block", count), [0] * count
    if conditional:
        depths = _each(s, where, "transformer_layers_per_block", count)
    levels = [
        {"channels": widths[i], "blocks": blocks[i], "attention": down[i][0] == "attention",
         "cross_attention": depths[i] if down[i][0] == "transformer" else 0}
        for i in range(count)
    ]  # fmt: skip
    kinds = {resample for _, resample in [*down[:-1], *up[1:]]} or {"block"}
    if len(kinds) > 1:
        raise LimnerError(f"{where}: resampling by convolution at some levels and by residual blocks at others has no "
                          "counterpart")  # fmt: skip
    size, classes = s["sample_size"], s["num_class_embeds"]
    section = {
        "kind": "unet",
        "levels": levels,
        "modulation": _modulation(s, where, conditional),
        "resample": kinds.pop(),
        **_middle(s, where, conditional, depths[-1]),
        **_heads(s, where, conditional, [i for i in range(count) if down[i][0] != "none"]),
        "time_channels": widths[0],
        "emb_channels": s["time_embedding_dim"],
        "time_order": "cos_sin" if s["flip_sin_to_cos"] else "sin_cos",
        "time_scale": 1.0,
        "time_period": period(widths[0], s["freq_shift"]),
        "asymmetric": s["downsample_padding"] == 0,
        "norm_groups": s["norm_num_groups"],
        "norm_eps": s["norm_eps"],
        "dropout": s["dropout"],
    }
    return UNetFacts(section, s["in_channels"], s["out_channels"], _size(size), classes,
                     _cross_attention(s, where) if conditional else None)  # fmt: skip


def _size(size: Any) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else tuple(size) if size else None


def _block(s: Mapping[str, Any], where: str, key: str, table: Mapping[str, tuple[str, str]],
           name: str) -> tuple[str, str]:  # fmt: skip
    name = name.removeprefix("UNetRes")
    if name not in table:
        raise LimnerError(f"{where}: {key}: {name} has no counterpart; {', '.join(table)} have")
    after, resample = table[name]
    resample = s.get(resample, resample)
    if resample not in ("conv", "block", "resnet"):
        raise LimnerError(f"{where}: {key}: resampling '{resample}' has no counterpart; conv and resnet have")
    return after, "block" if resample == "resnet" else resample


def _each(s: Mapping[str, Any], where: str, key: str, count: int) -> list[int]:
    """A setting that is one number for all levels, or one for each."""
    value = s[key]
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count or not all(isinstance(one, int) for one in values):
        raise LimnerError(f"{where}: {key}: should be a number, or {count} of them, is {str(value)[:60]}")
    return values


def _modulation(s: Mapping[str, Any], where: str, conditional: bool) -> str:
    kinds = {"default": "add", "scale_shift": "scale_shift"}
    kind = s["resnet_time_scale_shift"]
    if kind not in kinds:
        raise LimnerError(f"{where}: resnet_time_scale_shift: '{kind}' has no counterpart; {' and '.join(kinds)} have")
    if conditional or not (s["mid_block_type"] and s["add_attention"]):
        return kinds[kind]
    groups = s["attn_norm_num_groups"]
    groups = s["norm_num_groups"] if groups is None and kind == "default" else groups
    if groups != s["norm_num_groups"]:
        raise LimnerError(f"{where}: attn_norm_num_groups: {groups} in the middle, which has no counterpart; "
                          f"{s['norm_num_groups']}, as norm_num_groups, has")  # fmt: skip
    return kinds[kind]


def _middle(s: Mapping[str, Any], where: str, conditional: bool, depth: int) -> dict[str, Any]:
    wanted = "UNetMidBlock2DCrossAttn" if conditional else "UNetMidBlock2D"
    if s["mid_block_type"] != wanted:
        raise LimnerError(f"{where}: mid_block_type: {s['mid_block_type']} has no counterpart; {wanted} has")
    if conditional:
        return {"middle": "transformer", "middle_depth": depth}
    return {"middle": "attention" if s["add_attention"] else "none"}


def _heads(s: Mapping[str, Any], where: str, conditional: bool, having: Sequence[int]) -> dict[str, int | None]:
    """`attention_head_dim` is channels a head in UNet2DModel, and the number of heads in UNet2DConditionModel."""
    widths, key = s["block_out_channels"], "attention_head_dim"
    wide = sorted({*having, len(widths) - 1})
    if not conditional:
        if s[key] is None:
            return {"head_dim": None, "heads": 1}
        for i in wide:
            if widths[i] % s[key]:
                raise LimnerError(f"{where}: {key}: {s[key]} doesn't divide the {widths[i]} channels of its attention")
        return {"head_dim": s[key], "heads": None}
    heads = _each(s, where, "num_attention_heads" if s["num_attention_heads"] else key, len(widths))
    for i in wide:
        if widths[i] % heads[i]:
            raise LimnerError(f"{where}: {key}: {heads[i]} heads don't divide the {widths[i]} channels of a level")
    if len({heads[i] for i in wide}) == 1:
        return {"head_dim": None, "heads": heads[wide[0]]}
    dims = {widths[i] // heads[i] for i in wide}
    if len(dims) > 1:
        raise LimnerError(f"{where}: {key}: both heads and channels a head differ between levels, {heads}")
    return {"head_dim": dims.pop(), "heads": None}


def period(channels: int, shift: int) -> float:
    """`freq_shift` divides the exponent by half - shift instead of half: another longest period."""
    half = channels // 2
    return 10_000.0 if shift == 0 else math.exp(math.log(10_000.0) * half / (half - shift))


def _cross_attention(s: Mapping[str, Any], where: str) -> int:
    widths = s["cross_attention_dim"]
    each = {widths} if isinstance(widths, int) else set(widths)
    if len(each) != 1:
        raise LimnerError(f"{where}: cross_attention_dim: should be one for all levels, is {widths}")
    return each.pop()


# --- autoencoders ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AutoencoderFacts:
    """An autoencoder's section of a recipe, and what normalises its latents: (z - mean) / std, by channel."""

    section: dict[str, Any]
    channels: int
    size: tuple[int, int]
    mean: list[float]
    std: list[float]


def autoencoder(component: Component, *, alone: bool = False) -> AutoencoderFacts:
    """AutoencoderKL, VQModel or AutoencoderTiny. alone: not beside a U-Net. Raises LimnerError for whatever has no
    counterpart."""
    where = component.where
    if component.kind not in AUTOENCODERS:
        raise LimnerError(f"{where}: {component.kind or 'no class'} has no counterpart; {', '.join(AUTOENCODERS)} have")
    if component.kind == "AutoencoderTiny":
        return _tiny(component.complete(AUTOENCODER_TINY, AUTOENCODER_TINY_ONLY), where, alone=alone)
    kl = component.kind == "AutoencoderKL"
    s = component.complete(*((AUTOENCODER_KL, AUTOENCODER_KL_ONLY) if kl else (VQ_MODEL, VQ_MODEL_ONLY)))
    if s["in_channels"] != s["out_channels"]:
        raise LimnerError(f"{where}: in_channels {s['in_channels']} and out_channels {s['out_channels']} differ")
    down, up = s["down_block_types"], s["up_block_types"][::-1]
    kinds = {"DownEncoderBlock2D": "UpDecoderBlock2D", "AttnDownEncoderBlock2D": "AttnUpDecoderBlock2D"}
    if [kinds.get(name) for name in down] != up or len(down) != len(s["block_out_channels"]):
        raise LimnerError(f"{where}: down_block_types and up_block_types: should mirror each other, one for each of "
                          f"block_out_channels, from {', '.join(kinds)}")  # fmt: skip
    quant_conv = not kl or s["use_quant_conv"]
    if kl and s["use_post_quant_conv"] != quant_conv:
        raise LimnerError(f"{where}: use_quant_conv and use_post_quant_conv differ, which has no counterpart")
    inner = s["latent_channels"]
    channels = inner if kl or s["vq_embed_dim"] is None else s["vq_embed_dim"]
    codebook = {"kind": "vq", "codes": None if kl else s["num_vq_embeddings"], "update": "gradient"}
    section = {
        "kind": "autoencoder",
        "levels": [
            {"channels": width, "blocks": s["layers_per_block"], "attention": name.startswith("Attn")}
            for width, name in zip(s["block_out_channels"], down, strict=True)
        ],
        "latent_channels": channels,
        "z_channels": inner,
        "regulariser": {"kind": "kl"} if kl else codebook,
        "middle": "attention" if s["mid_block_add_attention"] else "none",
        "quant_conv": quant_conv,
        "norm_groups": s["norm_num_groups"],
    }
    mean, std = _normalisation(s, channels, alone=alone)
    size = _size(s["sample_size"])
    assert size is not None
    return AutoencoderFacts(section, s["in_channels"], size, mean, std)


def _tiny(s: Mapping[str, Any], where: str, *, alone: bool) -> AutoencoderFacts:
    """`num_decoder_blocks` begins with the coarsest level."""
    encoder, decoder = s["num_encoder_blocks"], s["num_decoder_blocks"][::-1]
    widths = {*s["encoder_block_out_channels"], *s["decoder_block_out_channels"]}
    if len(widths) > 1 or len({len(encoder), len(decoder), len(s["encoder_block_out_channels"])}) > 1:
        raise LimnerError(f"{where}: encoder_block_out_channels, num_encoder_blocks and those of the decoder: should "
                          "be equally many, of one width")  # fmt: skip
    if s["in_channels"] != s["out_channels"]:
        raise LimnerError(f"{where}: in_channels {s['in_channels']} and out_channels {s['out_channels']} differ")
    width = widths.pop()
    section = {
        "kind": "autoencoder",
        "blocks": "tiny",
        "levels": [{"channels": width, "blocks": count} for count in encoder],
        "decoder_levels": [{"channels": width, "blocks": count} for count in decoder],
        "latent_channels": s["latent_channels"],
        "middle": "none",
        "quant_conv": False,
    }
    side = CELLS * 2 ** (len(encoder) - 1)
    mean, std = _normalisation(s, s["latent_channels"], alone=alone)
    return AutoencoderFacts(section, s["in_channels"], (side, side), mean, std)


def _normalisation(s: Mapping[str, Any], channels: int, *, alone: bool) -> tuple[list[float], list[float]]:
    """Pipelines of a U-Net multiply latents by `scaling_factor` and know nothing else; other pipelines subtract
    `shift_factor` or `latents_mean`, which is taken where the autoencoder stands alone."""
    std = [1 / s["scaling_factor"]] * channels
    if not alone:
        return [0.0] * channels, std
    if s.get("latents_mean") and s.get("latents_std"):
        return list(s["latents_mean"]), list(s["latents_std"])
    return [s.get("shift_factor") or 0.0] * channels, std
