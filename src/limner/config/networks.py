"""The networks, declared level by level."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from limner.config.base import Fraction, Section


class Level(Section):
    """One resolution of a U-Net: `blocks` residual blocks on the way down, `blocks + 1` on the way up."""

    channels: PositiveInt
    blocks: PositiveInt = 1
    attention: bool = Field(default=False, description="self-attention after each block")
    cross_attention: int = Field(
        default=0, ge=0, description="depth of the spatial transformer after each block; 0: none"
    )


class UNetConfig(Section):
    """The AdaGN U-Net (Dhariwal & Nichol 2021, section 3; Rombach et al. 2022, appendix E.2), declared by levels."""

    kind: Literal["unet"] = "unet"
    levels: tuple[Level, ...] = Field(min_length=1)
    patch: PositiveInt = Field(default=1, description="pixel-unshuffle stem: the network works on patches of this side")
    modulation: Literal["scale_shift", "add"] = Field(default="scale_shift", description="scale_shift is AdaGN")
    resample: Literal["block", "conv", "pool"] = Field(
        default="block", description="block: BigGAN's residual resampling"
    )
    middle: Literal["attention", "transformer", "none"] = "attention"
    middle_depth: PositiveInt | None = Field(
        default=None, description="of the transformer in the middle; default: the last level's, at least 1"
    )
    head_dim: PositiveInt | None = Field(default=64, description="channels a head; or give `heads`")
    heads: PositiveInt | None = Field(default=None, description="a fixed number of heads instead of head_dim")
    time_channels: PositiveInt | None = Field(
        default=None, description="width of the sinusoids; default: first level's channels"
    )
    emb_channels: PositiveInt | None = Field(
        default=None, description="width of the embedding; default: 4 x time_channels"
    )
    time_order: Literal["cos_sin", "sin_cos"] = "cos_sin"
    time_scale: float = Field(default=1000.0, description="continuous t is multiplied by this before the sinusoids")
    time_period: float = Field(default=10_000.0, gt=1, description="the longest of the sinusoids' periods, over 2 pi")
    asymmetric: bool = Field(default=False, description="conv: downsampling pads right and below only")
    spatial_norm: bool = Field(
        default=False, description="what is concatenated also modulates each block of the way up, by pixel (SPADE)"
    )
    norm_groups: PositiveInt = 32
    norm_eps: float = 1e-5
    transformer_norm_eps: float = 1e-6
    dropout: Fraction = 0.0
    gradient_checkpointing: bool = False
    guided: bool = Field(default=False, description="told the guidance scale, as a student of distillation is")


class ClassifierConfig(Section):
    """The down half of the U-Net with a pooled head (Dhariwal & Nichol 2021, section 4.1)."""

    kind: Literal["classifier"] = "classifier"
    levels: tuple[Level, ...] = Field(min_length=1)
    patch: PositiveInt = 1
    pool: Literal["attention", "adaptive", "spatial", "spatial_v2"] = "attention"
    modulation: Literal["scale_shift", "add"] = "scale_shift"
    resample: Literal["block", "conv", "pool"] = "block"
    middle: Literal["attention", "none"] = "attention"
    head_dim: PositiveInt | None = 64
    heads: PositiveInt | None = None
    time_channels: PositiveInt | None = None
    emb_channels: PositiveInt | None = None
    time_order: Literal["cos_sin", "sin_cos"] = "cos_sin"
    time_scale: float = 1000.0
    norm_groups: PositiveInt = 32
    norm_eps: float = 1e-5
    dropout: Fraction = 0.0
    gradient_checkpointing: bool = False


class KLConfig(Section):
    """Diagonal Gaussian latents, Rombach et al. 2022, section 3.1."""

    kind: Literal["kl"] = "kl"
    weight: float = Field(default=1e-6, ge=0)


class VQConfig(Section):
    """A codebook (van den Oord et al. 2017), absorbed by the decoder."""

    kind: Literal["vq"] = "vq"
    codes: PositiveInt = 1024
    update: Literal["gradient", "ema"] = "ema"
    estimator: Literal["straight_through", "rotation"] = "straight_through"
    normalised: bool = Field(default=False, description="l2-normalised codes")
    commitment: float = Field(default=0.25, ge=0)
    ema_decay: Fraction = 0.99
    restart_after: PositiveInt = Field(default=200, description="batches without use before a code is restarted")


class AutoencoderConfig(Section):
    """Convolutional encoder and decoder; f = 2^(levels - 1) x patch."""

    kind: Literal["autoencoder"] = "autoencoder"
    levels: tuple[Level, ...] = Field(min_length=1)
    latent_channels: PositiveInt = 4
    regulariser: Annotated[KLConfig | VQConfig, Field(discriminator="kind")] = KLConfig()
    patch: PositiveInt = 1
    middle: Literal["attention", "none"] = "attention"
    blocks: Literal["residual", "tiny"] = Field(
        default="residual",
        description="tiny: convolutions and ReLU alone, of one width, as TAESD",
    )
    decoder_levels: tuple[Level, ...] | None = Field(
        default=None, description="another, smaller decoder; default: mirror"
    )
    decoder_patch: PositiveInt | None = Field(default=None, description="default: patch; f must stay the same")
    decoder_middle: Literal["attention", "none"] | None = Field(default=None, description="default: middle")
    z_channels: PositiveInt | None = Field(default=None, description="before quant_conv; default: latent_channels")
    stem_channels: PositiveInt | None = Field(
        default=None, description="encoder's stem; default: first level's channels"
    )
    quant_conv: bool = Field(default=True, description="1x1 convolutions around the latent, as CompVis has them")
    resample: Literal["conv", "pool"] = "conv"
    norm_groups: PositiveInt = 32
    norm_eps: float = 1e-6
    dropout: Fraction = 0.0
    gradient_checkpointing: bool = False


class AutoencoderLoss(Section):
    """What an autoencoder is trained for (Rombach et al. 2022, appendix G), besides its regulariser.

    The adversarial stage is off by default: at small budgets it does more harm than good.
    """

    pixel: Literal["l1", "l2"] = "l1"
    perceptual: float = Field(default=1.0, ge=0, description="weight of the perceptual distance; 0: none")
    perceptual_network: Literal["efficientnet-lite0", "lpips"] = "efficientnet-lite0"
    adversarial: float = Field(
        default=0.0, ge=0, description="weight of the patch discriminator's verdict, 0: none; try 0.1"
    )
    adversarial_from: int = Field(default=100_000, ge=0, description="images before the discriminator begins to learn")
    adversarial_warmup: int = Field(
        default=20_000, ge=0, description="images over which its weight then rises from zero"
    )
    adaptive_max: float = Field(
        default=1.0, gt=0, description="clamp of the adaptive weight (Esser et al. 2021, eq. 7)"
    )
    discriminator_channels: PositiveInt = 64
    discriminator_layers: PositiveInt = Field(
        default=3, description="halvings; a verdict sees 70 x 70 pixels at 3, 34 at 2"
    )
    r1: float = Field(default=0.0, ge=0, description="gradient penalty on real pictures (Mescheder et al. 2018, eq. 9)")
    lecam: float = Field(default=0.0, ge=0, description="LeCam regularisation (Tseng et al. 2021, eq. 7)")
    equivariance: Fraction = Field(
        default=0.0,
        description="share of batches that decode a shrunk or turned latent to the picture shrunk or turned alike",
    )
