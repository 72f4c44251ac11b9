"""CompVis' YAML to a recipe. What Limner has no counterpart for is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from limner import config as c
from limner.errors import LimnerError, suggest

AUTOENCODERS = ("AutoencoderKL", "VQModel", "VQModelInterface")
UNCONDITIONAL = "__is_unconditional__"
IMAGENET = 1000

UNET_DEFAULTS: dict[str, Any] = {
    "image_size": 0, "in_channels": 0, "out_channels": 0, "model_channels": 0, "num_res_blocks": 0,
    "attention_resolutions": [], "dropout": 0, "channel_mult": [1, 2, 4, 8], "conv_resample": True, "dims": 2,
    "num_classes": None, "use_checkpoint": False, "use_fp16": False, "num_heads": -1, "num_head_channels": -1,
    "num_heads_upsample": -1, "use_scale_shift_norm": False, "resblock_updown": False,
    "use_new_attention_order": False, "use_spatial_transformer": False, "transformer_depth": 1, "context_dim": None,
    "n_embed": None, "legacy": True, "use_linear_in_transformer": False,
}  # fmt: skip
"""Arguments of its UNetModel; Stable Diffusion 2 added the last."""

NETWORK_DEFAULTS: dict[str, Any] = {
    "double_z": True, "z_channels": 0, "resolution": 0, "in_channels": 0, "out_ch": 0, "ch": 0,
    "ch_mult": [1, 2, 4, 8], "num_res_blocks": 0, "attn_resolutions": [], "dropout": 0.0, "resamp_with_conv": True,
    "attn_type": "vanilla", "use_linear_attn": False, "tanh_out": False, "give_pre_end": False,
}  # fmt: skip
"""Arguments of its Encoder and Decoder."""


@dataclass(frozen=True)
class Settings:
    """`params` of one object of the YAML, its class's name, and where it stands (`model.unet_config`)."""

    params: Mapping[str, Any]
    target: str
    file: str
    place: str = ""

    @property
    def where(self) -> str:
        """File and place, for messages."""
        return f"{self.file}: {self.place}"

    def inner(self, name: str) -> str:
        return f"{self.place}.{name}" if self.place else name

    def get(self, name: str, default: Any) -> Any:
        value = self.params.get(name, default)
        return default if value is None else value

    def need(self, name: str) -> Any:
        if self.params.get(name) is None:
            raise LimnerError(f"{self.file}: {self.inner(name)}: is missing")
        return self.params[name]

    def part(self, name: str) -> Settings:
        """An object inside this one: `{target: package.Class, params: {...}}`."""
        raw = self.need(name)
        place = self.inner(name)
        if not isinstance(raw, Mapping) or not isinstance(raw.get("target"), str):
            raise LimnerError(f"{self.file}: {place}: should have `target` and `params`, is {str(raw)[:60]!r}")
        return Settings(raw.get("params") or {}, raw["target"].split(".")[-1], self.file, place)

    def complete(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of a class. Raises LimnerError for one that it doesn't have."""
        for name in self.params:
            if name not in defaults:
                raise LimnerError(f"{self.file}: {self.inner(name)}: unknown argument{suggest(str(name), defaults)}")
        return {**defaults, **{name: value for name, value in self.params.items() if value is not None}}


def model_settings(config: str | Path) -> Settings:
    """The `model` section of a YAML file."""
    raw = c.read_yaml(config)
    return Settings(raw, "", str(config)).part("model")


def autoencoder_recipe(settings: Settings, where: str) -> c.RunConfig:
    """The recipe of an autoencoder. Raises LimnerError for whatever has no counterpart."""
    raw = {"task": "autoencoder", "model": autoencoder(settings),
           "data": {"size": settings.need("ddconfig")["resolution"]}, "training": {"precision": "fp32"},
           "provenance": _provenance(settings, where)}  # fmt: skip
    return c.parse(raw, settings.file)


def _provenance(settings: Settings, where: str) -> dict[str, Any]:
    return {"format": "CompVis", "file": Path(where).name, "target": settings.target}


def scale_factor(weights: Mapping[str, Tensor], settings: Settings) -> float:
    """What latents are multiplied by: a buffer with `scale_by_std`, otherwise in the YAML, and 1 where in neither."""
    if settings.get("scale_by_std", False) and "scale_factor" in weights:
        return float(weights["scale_factor"])
    return float(settings.get("scale_factor", 1.0))


def unet_arguments(settings: Settings) -> dict[str, Any]:
    """All arguments of the U-Net. Raises LimnerError for one that it doesn't have."""
    return settings.part("unet_config").complete(UNET_DEFAULTS)


def factor(settings: Settings) -> int:
    """f: by how much the autoencoder shrinks pictures; 1 in pixels."""
    if settings.params.get("first_stage_config") is None:
        return 1
    return 2 ** (len(autoencoder(settings.part("first_stage_config"))["levels"]) - 1)


def latent_size(settings: Settings) -> tuple[int, int]:
    """Height and width of what the U-Net works on."""
    size = settings.need("image_size")
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def recipe(settings: Settings, conditions: list[dict[str, Any]], classes: list[str] | None,
           where: str) -> c.RunConfig:  # fmt: skip
    """The recipe of a diffusion model. Raises LimnerError for whatever has no counterpart."""
    arguments = unet_arguments(settings)
    latent = settings.params.get("first_stage_config") is not None
    space = {"kind": "latent", "autoencoder": autoencoder(settings.part("first_stage_config"))} if latent else None
    guided = any(section.get("null") for section in conditions)
    raw = {
        "data": {"size": [side * factor(settings) for side in latent_size(settings)],
                 "channels": _image_channels(settings)},
        **({"space": space} if space else {}),
        "process": _process(settings),
        "model": _network(arguments, settings.part("unet_config").where),
        "conditions": conditions,
        "classes": classes,
        "sampling": {"sampler": "ddim", "steps": 50, "spacing": "leading+1", "guidance": 3.0 if guided else 1.0,
                     "clip": not latent},
        "training": {"precision": "fp32"},
        "provenance": {**_provenance(settings, where), "new_attention_order": arguments["use_new_attention_order"]},
    }  # fmt: skip
    return c.parse(raw, settings.file)


def _image_channels(settings: Settings) -> int:
    if settings.params.get("first_stage_config") is None:
        return settings.get("channels", 3)
    return settings.part("first_stage_config").need("ddconfig")["in_channels"]


# --- the networks ---------------------------------------------------------------------------------------------------


def autoencoder(settings: Settings) -> dict[str, Any]:
    """An AutoencoderKL or VQModel as a section of a recipe."""
    if settings.target not in AUTOENCODERS:
        raise LimnerError(f"{settings.where}: {settings.target} has no counterpart; {', '.join(AUTOENCODERS)} have")
    inner = Settings(settings.need("ddconfig"), "", settings.file, settings.inner("ddconfig"))
    arguments = inner.complete(NETWORK_DEFAULTS)
    _refuse(arguments, {"use_linear_attn": False, "tanh_out": False, "give_pre_end": False}, inner.where)
    if arguments["attn_type"] not in ("vanilla", "none"):
        raise LimnerError(
            f"{inner.where}.attn_type: '{arguments['attn_type']}' has no counterpart; vanilla and none have"
        )
    if arguments["in_channels"] != arguments["out_ch"]:
        raise LimnerError(
            f"{inner.where}: in_channels {arguments['in_channels']} and out_ch {arguments['out_ch']} differ"
        )
    vanilla, blocks = arguments["attn_type"] == "vanilla", arguments["num_res_blocks"]
    levels = [
        {"channels": arguments["ch"] * mult, "blocks": blocks,
         "attention": vanilla and arguments["resolution"] // 2**i in arguments["attn_resolutions"]}
        for i, mult in enumerate(arguments["ch_mult"])
    ]  # fmt: skip
    kl = settings.target == "AutoencoderKL"
    codebook = {"kind": "vq", "codes": None if kl else settings.need("n_embed"), "update": "gradient"}
    return {
        "kind": "autoencoder",
        "levels": levels,
        "latent_channels": settings.need("embed_dim"),
        "z_channels": arguments["z_channels"],
        "stem_channels": arguments["ch"],
        "regulariser": {"kind": "kl"} if kl else codebook,
        "middle": "attention" if vanilla else "none",
        "resample": "conv" if arguments["resamp_with_conv"] else "pool",
        "dropout": arguments["dropout"],
    }


def _network(arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Its UNetModel. `attention_resolutions` are factors here, not pixels as in guided-diffusion."""
    _refuse(arguments, {"n_embed": None, "dims": 2}, where)
    transformer, depth = arguments["use_spatial_transformer"], arguments["transformer_depth"]
    factors, multipliers = arguments["attention_resolutions"], arguments["channel_mult"]
    blocks = arguments["num_res_blocks"]
    counts = blocks if isinstance(blocks, Sequence) else [blocks] * len(multipliers)
    levels = [
        {"channels": arguments["model_channels"] * mult, "blocks": count,
         "attention": 2**i in factors and not transformer, "cross_attention": depth * (2**i in factors and transformer)}
        for i, (mult, count) in enumerate(zip(multipliers, counts, strict=True))
    ]  # fmt: skip
    fixed, number = arguments["num_head_channels"], arguments["num_heads"]
    above = arguments["num_heads_upsample"]
    if fixed == -1 and above not in (-1, number):
        raise LimnerError(f"{where}.num_heads_upsample: {above}, but num_heads is {number}; they should be the same")
    if fixed == -1 and number == -1:
        raise LimnerError(f"{where}: needs num_heads or num_head_channels")
    resample = "block" if arguments["resblock_updown"] else "conv" if arguments["conv_resample"] else "pool"
    return {
        "kind": "unet",
        "levels": levels,
        "modulation": "scale_shift" if arguments["use_scale_shift_norm"] else "add",
        "resample": resample,
        "middle": "transformer" if transformer else "attention",
        "middle_depth": depth if transformer else None,
        "head_dim": None if fixed == -1 else fixed,
        "heads": number if fixed == -1 else None,
        "time_channels": arguments["model_channels"],
        "time_scale": 1.0,
        "dropout": arguments["dropout"],
        "gradient_checkpointing": arguments["use_checkpoint"],
    }


def _refuse(arguments: Mapping[str, Any], only: Mapping[str, Any], where: str) -> None:
    for name, value in only.items():
        if arguments[name] != value:
            raise LimnerError(f"{where}.{name}: {arguments[name]} has no counterpart; only {value} has")


# --- the process ----------------------------------------------------------------------------------


def _process(settings: Settings) -> dict[str, Any]:
    kind, steps = settings.get("beta_schedule", "linear"), settings.get("timesteps", 1000)
    start, end = settings.get("linear_start", 1e-4), settings.get("linear_end", 2e-2)
    schedules: dict[str, dict[str, Any]] = {
        "linear": {"kind": "scaled_linear", "beta_start": start, "beta_end": end},
        # Ours scales its ends by 1000 / steps, as DDPM's; the peer's are as they are.
        "sqrt_linear": {"kind": "linear", "beta_start": start * steps / 1000, "beta_end": end * steps / 1000},
        "cosine": {"kind": "discrete_cosine", "offset": settings.get("cosine_s", 8e-3)},
    }
    if kind not in schedules or settings.get("given_betas", None) is not None:
        raise LimnerError(
            f"{settings.where}.beta_schedule: '{kind}' should be {', '.join(schedules)}, without given_betas"
        )
    predictions = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
    predicted = settings.get("parameterization", "eps")
    if predicted not in predictions:
        raise LimnerError(f"{settings.where}.parameterization: '{predicted}' should be {', '.join(predictions)}")
    return {
        "schedule": {**schedules[kind], "steps": steps},
        "prediction": predictions[predicted],
        "time_input": "step",
    }
