"""The whole recipe of a run: conditions, data, space, training, sampling."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from limner.config.base import Fraction, Section
from limner.config.networks import (
    AutoencoderConfig,
    AutoencoderLoss,
    ClassifierConfig,
    UNetConfig,
)
from limner.config.process import DiffusionProcess


class LabelCondition(Section):
    """One of K classes, as a vector into AdaGN (or as one token for cross-attention, LDM's ClassEmbedder)."""

    kind: Literal["label"] = "label"
    dropout: Fraction = Field(default=0.1, description="how often training sees the null condition instead")
    enters: Literal["vector", "token"] = "vector"
    width: PositiveInt | None = Field(default=None, description="token: its width")
    null: bool = Field(default=True, description="a learned row for the absent label; False: absent adds nothing")


class BPEText(Section):
    """A transformer trained from nothing, with the diffusion model, on byte-level BPE of the captions."""

    kind: Literal["bpe"] = "bpe"
    vocabulary: PositiveInt = 2048
    width: PositiveInt = 128
    depth: PositiveInt = 2
    head_dim: PositiveInt = 64
    heads: PositiveInt | None = Field(default=None, description="default: width / head_dim")
    length: PositiveInt = Field(
        default=32, description="tokens a caption, with its start and end marks; longer ones are cut"
    )
    masked: bool = Field(default=True, description="False: padding is attended to, as in CompVis' model")


class PretrainedText(Section):
    """A frozen encoder of transformers: a local folder, a hub name, or `minilm` (from its wheel)."""

    kind: Literal["pretrained"] = "pretrained"
    name: str = "minilm"
    length: PositiveInt = 64


class TextCondition(Section):
    """Captions: tokens for cross-attention, and a pooled vector into AdaGN."""

    kind: Literal["text"] = "text"
    dropout: Fraction = 0.1
    encoder: Annotated[BPEText | PretrainedText, Field(discriminator="kind")] = BPEText()
    pooled: bool = Field(default=True, description="a pooled vector into AdaGN besides the tokens")
    null: Literal["learned", "empty"] = Field(
        default="learned", description="empty: an absent caption is the empty one"
    )


class ImageCondition(Section):
    """A small picture, enlarged to the picture's size and concatenated to x_t: super-resolution."""

    kind: Literal["image"] = "image"
    dropout: Fraction = 0.1
    size: tuple[PositiveInt, PositiveInt] = Field((16, 16), description="height, width of the small picture")
    null: bool = Field(True, description="an absent picture is grey; False: every picture must be given")


ConditionConfig = Annotated[LabelCondition | TextCondition | ImageCondition, Field(discriminator="kind")]


# --- data, space ------------------------------------------------------------------------------------------------


class DataConfig(Section):
    """What is read, and how a picture becomes an array. Columns left out are found by type."""

    source: str | None = Field(default=None, description="folder, Parquet, WebDataset tar, or a hub name")
    split: str | None = None
    size: tuple[PositiveInt, PositiveInt] | None = Field(
        default=None, description="height, width; default: as the data is"
    )
    channels: Literal[1, 3, 4] = 3
    ground: str = Field(default="white", description="colour under transparent pixels")
    crop: Literal["center", "random"] = "center"
    flip: bool = Field(default=False, description="mirror left and right at random")
    image_column: str | None = None
    label_column: str | None = None
    text_column: str | None = None
    held_out: Fraction = Field(default=0.02, description="share of rows kept for the held-out loss (at most 2,048)")

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value


class PixelSpace(Section):
    kind: Literal["pixels"] = "pixels"


class LatentSpace(Section):
    """Diffusion in an autoencoder's latents. The trained autoencoder is kept inside the run."""

    kind: Literal["latent"] = "latent"
    autoencoder: AutoencoderConfig
    source: str | None = Field(
        default=None, description="a run or folder it came from; default: trained as the first stage"
    )
    share: Fraction = Field(default=0.3, description="share of the budget that the autoencoder stage gets")


SpaceConfig = Annotated[PixelSpace | LatentSpace, Field(discriminator="kind")]


# --- training, sampling -----------------------------------------------------------------------------------------


class EMAConfig(Section):
    """Power-function average (Karras et al. 2024, eq. 126): its length is a fixed share of the training so far,
    so that a short run is averaged over its end and never over its random start."""

    relative_std: float = Field(
        default=0.05, gt=0, lt=0.28, description="width of the averaging profile, share of training"
    )
    every: PositiveInt = Field(default=1, description="optimizer steps between updates")


class TrainingConfig(Section):
    images: PositiveInt | None = Field(default=None, description="stop after this many images")
    budget_s: float | None = Field(default=None, gt=0, description="stop after this many seconds")
    batch: PositiveInt = 16
    accumulate: PositiveInt = Field(default=1, description="micro-batches a step; `batch` is their sum")
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    muon_lr: float = Field(default=0.02, gt=0, description="muon: step of the hidden matrices; the rest uses lr")
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_images: int = Field(default=2_000, ge=0)
    decay: Literal["constant", "linear", "cosine"] = "linear"
    decay_from: Fraction = Field(default=0.3, description="share of the budget after which the learning rate falls")
    clip: float = Field(default=1.0, gt=0)
    ema: EMAConfig = EMAConfig()
    times: Literal["uniform", "logit_normal", "log_uniform"] = Field(
        default="uniform", description="stratified over the batch; log_uniform dwells on little noise (classifiers)"
    )
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    seed: int = 0
    checkpoint_every: PositiveInt = Field(default=100_000, description="images")
    keep_last: PositiveInt = 2
    log_every: PositiveInt = Field(default=2_000, description="images")
    held_out_every: PositiveInt = Field(default=50_000, description="images")
    preview_every: PositiveInt = Field(default=50_000, description="images")
    previews: PositiveInt = Field(default=16, description="pictures a preview")
    nan_patience: PositiveInt = Field(default=20, description="bad steps in a row before the run stops")
    patience: PositiveInt = Field(
        default=5, description="classifier: held-out rounds without a better one before it ends"
    )
    trackers: tuple[str, ...] = Field(default=(), description="tensorboard, wandb, trackio")

    @field_validator("compile", mode="before")
    @classmethod
    def _yaml_switch(cls, value: Any) -> Any:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value  # YAML reads `off` as False


class SamplingConfig(Section):
    """Defaults of `limner sample` for this run."""

    sampler: Literal["ddpm", "ddim", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"] = "dpmpp_2m"
    steps: PositiveInt = 20
    spacing: str = "log_snr"
    guidance: float = 2.0
    interval: tuple[float, float] = Field(default=(0.0, 1.0), description="guidance acts for t in this range")
    rescale: Fraction = 0.0
    clip: bool = Field(default=True, description="predicted x0 clipped to [-1, 1]; pixels only")
    variance: Literal["learned", "small", "large"] | None = Field(
        default=None, description="ddpm: the steps' variance; default: learned where the network has it, else small"
    )


class RunConfig(Section):
    """Everything that a run is: `config.yaml`. `task` says which of the sections are used."""

    task: Literal["diffusion", "classifier", "autoencoder"] = "diffusion"
    data: DataConfig = DataConfig()
    space: SpaceConfig = PixelSpace()
    process: DiffusionProcess = DiffusionProcess()
    model: Annotated[UNetConfig | ClassifierConfig | AutoencoderConfig, Field(discriminator="kind")]
    conditions: tuple[ConditionConfig, ...] = ()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()
    autoencoder_loss: AutoencoderLoss = AutoencoderLoss()
    classes: tuple[str, ...] | None = Field(default=None, description="names of the labels, in order")
    label_smoothing: Fraction = Field(default=0.0, description="classifier task")
    provenance: dict[str, Any] = Field(default_factory=dict, description="where it came from; never read by the code")

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        kind = {"diffusion": "unet", "classifier": "classifier", "autoencoder": "autoencoder"}[self.task]
        if self.model.kind != kind:
            raise ValueError(f"task {self.task} needs model.kind {kind}, not {self.model.kind}")
        return self
