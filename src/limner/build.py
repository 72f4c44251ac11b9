"""From a recipe to objects: the only place where a `kind` meets a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limner import config as c
from limner import native
from limner.core import schedule as schedules
from limner.core.denoiser import network_denoiser
from limner.core.types import Denoise
from limner.errors import LimnerError
from limner.nn.autoencoder import Autoencoder
from limner.nn.classifier import NoisyClassifier
from limner.nn.conditioners import Conditioner, Embedded, LabelConditioner
from limner.nn.int8 import LEAST, Int8Conv2d, quantised
from limner.nn.layout import BoxesConditioner, TokenBoxesConditioner, VariationConditioner
from limner.nn.lite0 import LITE0_CHANNELS, see_lite0
from limner.nn.quantizer import VectorQuantizer
from limner.nn.spatial import Cells, ImageConditioner, MaskConditioner, SemanticMapConditioner, mask_of_latents
from limner.nn.text import (
    GivenTokens,
    PretrainedEncoder,
    PretrainedTokenizer,
    TextConditioner,
    TextTransformer,
    Vocabulary,
)
from limner.nn.unet import Level, UNet
from limner.nn.words import Rewording, WordTokenizer, WordVectors

SCHEDULES = {
    "linear": schedules.LinearSchedule,
    "scaled_linear": schedules.ScaledLinearSchedule,
    "discrete_cosine": schedules.DiscreteCosineSchedule,
    "table": schedules.TableSchedule,
    "cosine": schedules.CosineSchedule,
    "rectified_flow": schedules.RectifiedFlowSchedule,
}
HOLES = {"grey": 0.0, "black": -1.0}
"""What a picture is in its hole."""


class Model(nn.Module):
    """What a run's `model.safetensors` holds: the network, its conditioner, and the autoencoder of its latents.

    The autoencoder of a diffusion run is frozen; a run that trains one has nothing else.
    """

    def __init__(self, network: nn.Module, conditioner: Conditioner | None = None,
                 autoencoder: Autoencoder | None = None) -> None:  # fmt: skip
        super().__init__()
        self.network = network
        self.conditioner = conditioner
        self.autoencoder = autoencoder

    def raw(self, x: Tensor, time: Tensor, cond: Embedded | None = None) -> Tensor:
        """The network's own output at x (B, C, H, W) and time (B,); `cond` None is the null condition."""
        if cond is None:
            cond = self.embed({}, len(x), size=(x.shape[2], x.shape[3]))
        return self.network(x, time, cond.vector, cond.tokens, cond.token_mask, cond.spatial, cond.guidance)

    def embed(self, cond: Mapping[str, Any], batch: int, drop: Mapping[str, Tensor] | None = None,
              size: tuple[int, int] | None = None) -> Embedded:  # fmt: skip
        """tau(y); size: (H, W) of x_t. Raises LimnerError for a condition that this model doesn't have."""
        if self.conditioner is None:
            for name in cond:
                raise LimnerError(f"condition '{name}': this model is unconditional")
            return Embedded()
        if cond.get("mask") is not None and "mask" in self.conditioner.modalities:
            cond = {**cond, "mask": self._hole(self.conditioner.modalities["mask"], cond["mask"])}
        return self.conditioner(cond, batch, drop, size)

    def _hole(self, known: Any, pictures: Tensor) -> Tensor:
        """Pictures with a hole (B, C + 1, H, W) in the network's space, as the conditioner `known` has them."""
        pictures = known.coloured(pictures)
        if self.autoencoder is None:
            return pictures
        return self.hole_of_latents(self.autoencoder, pictures, known.cells)

    @staticmethod
    @torch.no_grad()
    def hole_of_latents(autoencoder: Autoencoder, pictures: Tensor, cells: Cells = "any") -> Tensor:
        """Pictures with a hole (B, C + 1, H, W) as their latents and the hole's cells (B, c + 1, H/f, W/f)."""
        pictures = pictures.to(autoencoder.latent_mean.device)
        latents = autoencoder.normalise(autoencoder.encode(pictures[:, :-1]).mode())
        mask = mask_of_latents(pictures[:, -1:], autoencoder.factor, cells)
        return torch.cat([latents, mask.to(latents)], dim=1)

    def forward(self, x: Tensor, time: Tensor, cond: Mapping[str, Any], drop: Mapping[str, Tensor],
                guidance: Tensor | None = None) -> Tensor:  # fmt: skip
        """Training's call: tau and the network in one, so that both learn from the one loss. guidance (B,): what a
        network that is told its scale is told."""
        tau = self.embed(cond, len(x), drop, (x.shape[2], x.shape[3]))
        return self.raw(x, time, tau if guidance is None else replace(tau, guidance=guidance))


def ready(model: Model, device: torch.device, *, int8: bool = False) -> None:
    """For use, not for training: on the device, in the memory layout that convolutions are fastest in. A model whose
    weights are cut over processes stays as it lies.

    int8: what draws, the network and the decoder, computes in 8 bits where that pays; LimnerError where it can't.
    """
    if device.type == "cpu":
        native.keep_memory()
    if any(hasattr(parameter, "placements") for parameter in model.parameters()):
        model.eval()
        return
    tensors: Any = model.to(device).eval().requires_grad_(False)
    tensors.to(memory_format=torch.channels_last)  # its overload for this keyword alone is missing from the stubs
    if int8:
        model.network = quantised(model.network)
        if model.autoencoder is not None:
            model.autoencoder.decoder = quantised(model.autoencoder.decoder)
        if not any(isinstance(module, Int8Conv2d) for module in model.modules()):
            raise LimnerError(f"int8: nothing to gain, no convolution here has {LEAST} channels or more; leave it out")


def schedule(config: c.RunConfig) -> schedules.Schedule:
    """The noise schedule of a recipe."""
    section = config.process.schedule
    return SCHEDULES[section.kind](**section.model_dump(exclude={"kind"}))


def space_shape(config: c.RunConfig) -> tuple[int, int, int]:
    """(C, H, W) of what the network works on: the picture, or its latent."""
    if config.data.size is None:
        raise LimnerError("data.size: is not set; it should be [height, width]")
    height, width = config.data.size
    if isinstance(config.space, c.PixelSpace):
        return config.data.channels, height, width
    section = config.space.autoencoder
    factor = section.patch * 2 ** (len(section.levels) - 1)
    refuse_size("data.size", (height, width), factor, "the autoencoder")
    return section.latent_channels, height // factor, width // factor


def refuse_size(name: str, size: tuple[int, int], factor: int, whose: str) -> None:
    """Raises LimnerError where `factor` doesn't divide height and width, with sizes that would do."""
    if size[0] % factor or size[1] % factor:
        near = [max(1, n // factor) * factor for n in size]
        raise LimnerError(
            f"{name} {list(size)}: {whose} shrinks it to 1/{factor}, so both sides should be multiples of {factor}, "
            f"such as {near} or {[n + factor for n in near]}"
        )


def autoencoder(section: c.AutoencoderConfig, channels: int) -> Autoencoder:
    """The autoencoder of a recipe for pictures of so many channels, with fresh weights."""
    options = section.model_dump(exclude={"kind", "levels", "decoder_levels", "regulariser"})
    regulariser = section.regulariser
    quantizer = None
    if isinstance(regulariser, c.VQConfig):
        quantizer = VectorQuantizer(channels=section.latent_channels, **regulariser.model_dump(exclude={"kind"}))
    decoder_levels = levels_of(section.decoder_levels) if section.decoder_levels else None
    return Autoencoder(channels, levels_of(section.levels), quantizer=quantizer, decoder_levels=decoder_levels,
                       **options)  # fmt: skip


def levels_of(sections: Sequence[c.Level]) -> list[Level]:
    return [Level(**section.model_dump()) for section in sections]


def conditioner(config: c.RunConfig, emb_channels: int) -> Conditioner | None:
    """tau of a recipe, or None for an unconditional model. Vectors come out `emb_channels` wide."""
    if not config.conditions:
        return None
    return Conditioner({section.kind: modality(section, config, emb_channels) for section in config.conditions})


def modality(section: c.ConditionConfig, config: c.RunConfig, emb_channels: int) -> nn.Module:
    """The conditioner of one section of a recipe. Raises LimnerError where the names of classes are missing."""
    if isinstance(section, c.TextCondition):
        given = section.encoder if isinstance(section.encoder, c.GivenText) else None
        return text_conditioner(section, emb_channels, config.words) if given is None else GivenTokens(given.width)
    vector = emb_channels if getattr(section, "pooled", True) else None
    if isinstance(section, c.BoxesCondition):
        return boxes_conditioner(section, vector, space_shape(config)[1:])
    if isinstance(section, c.VariationCondition):
        return VariationConditioner(see_lite0, LITE0_CHANNELS, section.width, section.side, section.grid, vector)
    if isinstance(section, c.LabelCondition):
        classes = _classes(config.classes, "a label")
        return LabelConditioner(len(classes), section.width or emb_channels, enters=section.enters, null=section.null)
    channels, *size = space_shape(config)
    height, width = size
    if isinstance(section, c.ImageCondition):
        return ImageConditioner(config.data.channels, (height, width), section.size, null=section.null,
                                levels=section.noise > 0)  # fmt: skip
    if isinstance(section, c.MaskCondition):
        return MaskConditioner(channels, (height, width), null=section.null, colour=HOLES[section.hole],
                               signed=section.signed, cells=section.cells)  # fmt: skip
    assert config.data.size is not None
    factor = config.data.size[0] // height
    return SemanticMapConditioner(len(_classes(section.classes, "a semantic map")), section.width, (height, width),
                                  void=section.void, factor=factor)  # fmt: skip


def boxes_conditioner(section: c.BoxesCondition, emb_channels: int | None, size: tuple[int, int]) -> nn.Module:
    """tau for layouts, on x_t of this (H, W). Raises LimnerError where there are no classes, or more than tokens for
    them, and for boxes that are to be drawn as well as discrete."""
    classes = len(_classes(section.names, "boxes"))
    if section.tokens is None:
        return BoxesConditioner(classes, section.width, section.depth, section.most, head_dim=section.head_dim,
                                emb_channels=emb_channels, size=size if section.drawn else None)  # fmt: skip
    if section.drawn:
        raise LimnerError("conditions.boxes: drawn and tokens don't go together; leave one out")
    vocabulary = section.tokens.vocabulary
    if classes >= vocabulary:
        raise LimnerError(f"conditions.boxes.tokens.vocabulary: {vocabulary}, should be above the {classes} classes")
    length = 3 * section.most + 2 * section.tokens.crop
    heads = section.tokens.heads or max(1, section.width // section.head_dim)
    encoder = TextTransformer(vocabulary, section.width, section.depth, length, heads=heads, head_dim=section.head_dim,
                              masked=False)  # fmt: skip
    return TokenBoxesConditioner(encoder, vocabulary, section.most, crop=section.tokens.crop,
                                 emb_channels=emb_channels)  # fmt: skip


def _classes(names: Sequence[str] | None, whose: str) -> Sequence[str]:
    if not names:
        raise LimnerError(f"classes: {whose} condition needs the names of the classes; the data has none")
    return names


def text_conditioner(section: c.TextCondition, emb_channels: int, known: str | None = None) -> TextConditioner:
    """tau for captions; a BPE vocabulary is empty until `learn` or a run's weights fill it. known: the words that it
    learnt, apart by spaces; any other is read as the nearest of them."""
    encoder = section.encoder
    assert not isinstance(encoder, c.GivenText)
    if isinstance(encoder, c.PretrainedText):
        parts: tuple[nn.Module, nn.Module] = (PretrainedTokenizer(encoder.name, encoder.length),
                                              PretrainedEncoder(encoder.name, encoder.length))  # fmt: skip
    elif isinstance(encoder, c.WordsText):
        options = encoder.model_dump(include={"width", "depth", "length", "head_dim"})
        parts = (WordTokenizer(encoder.length),
                 TextTransformer(WordVectors(encoder.width, encoder.noise),
                                 heads=max(1, encoder.width // encoder.head_dim), **options))  # fmt: skip
    else:
        options = encoder.model_dump(exclude={"kind", "heads", "frozen"})
        heads = encoder.heads or max(1, encoder.width // encoder.head_dim)
        parts = (Vocabulary(encoder.vocabulary, encoder.length),
                 TextTransformer(heads=heads, **options).requires_grad_(not encoder.frozen))  # fmt: skip
    reworded = Rewording(known.split()) if known and isinstance(encoder, c.BPEText) else None
    return TextConditioner(*parts, emb_channels if section.pooled else None, null=section.null, reworded=reworded)


def model(config: c.RunConfig) -> Model:
    """The networks of a recipe, with fresh weights. Raises LimnerError where the parts don't fit together."""
    section = config.model
    if isinstance(section, c.AutoencoderConfig):
        return Model(nn.Identity(), autoencoder=autoencoder(section, config.data.channels))
    channels, height, width = space_shape(config)
    levels = levels_of(section.levels)
    factor = section.patch * 2 ** (len(levels) - 1)
    refuse_size("data.size" if isinstance(config.space, c.PixelSpace) else "latent size", (height, width), factor,
                "the network")  # fmt: skip
    options = section.model_dump(exclude={"kind", "levels", "spatial_norm"})
    if isinstance(section, c.ClassifierConfig):
        if not config.classes:
            raise LimnerError("classes: a classifier needs labelled data; this data has no labels")
        return Model(NoisyClassifier(channels, len(config.classes), levels, (height, width), **options))
    tau = conditioner(config, section.emb_channels or 4 * (section.time_channels or levels[0].channels))
    out = channels * (2 if config.process.learned_variance else 1)
    first_stage = None
    if isinstance(config.space, c.LatentSpace):
        first_stage = autoencoder(config.space.autoencoder, config.data.channels).freeze()
    token_channels = None if tau is None else tau.token_channels
    spatial = 0 if tau is None else tau.spatial_channels
    if section.spatial_norm and not spatial:
        raise LimnerError("model.spatial_norm: needs a condition that lies on the picture: a map, a mask or an image")
    modulated = spatial if section.spatial_norm else None
    try:
        return Model(UNet(channels + spatial, out, levels, token_channels=token_channels, spatial_channels=modulated,
                          **options), tau, first_stage)  # fmt: skip
    except ValueError as error:
        raise LimnerError(f"model.levels: {error}") from None


def step_time(step: Tensor, config: c.RunConfig) -> Tensor:
    """What the network is told of time at DDPM steps i (B,) in 0..T-1. LimnerError for a continuous schedule."""
    total = schedule(config).steps
    if total is None:
        raise LimnerError(f"schedule {config.process.schedule.kind}: is continuous, it has no DDPM steps")
    return step.float() if config.process.time_input == "step" else (step.float() + 1) / total


def denoiser(model: Model, config: c.RunConfig) -> Denoise:
    """`denoise(x_t, t, Embedded) -> Denoised` of a diffusion model."""
    process = config.process
    return network_denoiser(model.raw, schedule(config), process.prediction, time_input=process.time_input,
                            learned_variance=process.learned_variance)  # fmt: skip


def preset_names() -> list[str]:
    """The recipes that come with Limner."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def preset(name: str) -> dict[str, Any]:
    """A recipe by name, before it is resolved against data. Raises LimnerError with the nearest names."""
    from limner.errors import suggest

    path = _PRESETS / f"{name}.yaml"
    if name not in preset_names():
        raise LimnerError(f"preset '{name}': there is none such{suggest(name, preset_names())}")
    return c.read_yaml(path)


_PRESETS = Path(__file__).parent / "presets"
