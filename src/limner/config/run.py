"""The whole recipe of a run: conditions, data, space, training, sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from limner.config.base import Fraction, Section
from limner.config.conditions import ConditionConfig
from limner.config.distillation import DistillationConfig
from limner.config.networks import (
    AutoencoderConfig,
    AutoencoderLoss,
    ClassifierConfig,
    UNetConfig,
)
from limner.config.process import DiffusionProcess

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
    map_column: str | None = Field(default=None, description="semantic maps: pictures of class numbers")
    mask_column: str | None = Field(default=None, description="masks: white is what is to be painted")
    boxes_column: str | None = Field(default=None, description="objects: {bbox: [[x, y, w, h]], categories: []}")
    stream: bool = Field(
        default=False, description="tars, Parquet: decode as needed, not once into the cache; skip what is corrupt"
    )
    buffer: PositiveInt = Field(default=16_384, description="stream: rows among which the order is shuffled")
    lanes: PositiveInt | None = Field(
        default=None, description="stream: parts that are read side by side; default: up to 64 that divide the batch"
    )
    workers: PositiveInt | None = Field(default=None, description="stream: threads that decode; default: one a core")
    held_out: Fraction = Field(default=0.02, description="share of rows kept for the held-out loss (at most 2,048)")

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value


class PixelSpace(Section):
    kind: Literal["pixels"] = "pixels"


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
    align: float = Field(
        default=0.0, ge=0, description="weight of alignment with a pretrained network's features (REPA); 0: none"
    )
    balance: Fraction = Field(
        default=0.0,
        description="0: every row once an epoch; 1: rows of rare classes so often that classes come alike (by "
        "the label column, whether or not it is a condition)",
    )
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    shard: bool = Field(
        default=False, description="several processes: cut weights, moments and average over them (FSDP2)"
    )
    seed: int = 0
    deterministic: bool = Field(default=False, description="the same bits from run to run on a GPU too; slower there")
    checkpoint_every: PositiveInt = Field(default=100_000, description="images")
    keep_last: PositiveInt = 2
    background: bool = Field(default=True, description="write checkpoints, from a copy, while training goes on")
    log_every: PositiveInt = Field(default=2_000, description="images")
    held_out_every: PositiveInt = Field(default=50_000, description="images")
    preview_every: PositiveInt = Field(default=50_000, description="images")
    previews: PositiveInt = Field(default=16, description="pictures a preview")
    nan_patience: PositiveInt = Field(default=20, description="bad steps in a row before the run stops")
    patience: PositiveInt = Field(
        default=5, description="classifier: held-out rounds without a better one before it ends"
    )
    trackers: tuple[str, ...] = Field(default=(), description="tensorboard, wandb, trackio")
    timeout_s: float = Field(
        default=1800.0, gt=0, description="several processes: how long one waits for the others before all end"
    )
    init: str | None = Field(default=None, description="the run or checkpoint that training began with; set by --init")
    lora: PositiveInt | None = Field(
        default=None, description="rank of low-rank adapters on attention, trained instead of the weights"
    )
    lora_whole: tuple[str, ...] = Field(
        default=(), description="lora: weights that are trained besides; those that are new come here by themselves"
    )

    @field_validator("compile", mode="before")
    @classmethod
    def _yaml_switch(cls, value: Any) -> Any:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value  # YAML reads `off` as False


class LatentSpace(Section):
    """Diffusion in an autoencoder's latents. The trained autoencoder is kept inside the run."""

    kind: Literal["latent"] = "latent"
    autoencoder: AutoencoderConfig
    source: str | None = Field(
        default=None, description="the run or checkpoint it came from; default: trained as the first stage"
    )
    share: Fraction = Field(
        default=0.3,
        description="of the budget for the first stage; of `training.images`: as many more for the first stage",
    )
    training: TrainingConfig = Field(
        default_factory=lambda: TrainingConfig(batch=8),
        description="of the first stage; its budget, where it is given here, stands instead of `share`",
    )


SpaceConfig = Annotated[PixelSpace | LatentSpace, Field(discriminator="kind")]


class SamplingConfig(Section):
    """Defaults of `limner sample` for this run."""

    sampler: Literal["ddpm", "ddim", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"] = "dpmpp_2m"
    steps: PositiveInt = 20
    spacing: str = "log_snr"
    guidance: float = 2.0
    guidance_every: PositiveInt = Field(default=1, description="steps between calls of guidance's unconditional half")
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
    distillation: DistillationConfig | None = Field(default=None, description="of a student, what it learnt and whence")
    classes: tuple[str, ...] | None = Field(default=None, description="names of the labels, in order")
    words: str | None = Field(default=None, description="those of the captions that trained, where they are few")
    label_smoothing: Fraction = Field(default=0.0, description="classifier task")
    provenance: dict[str, Any] = Field(default_factory=dict, description="where it came from; never read by the code")

    @property
    def always(self) -> tuple[str, ...]:
        """The conditions that have no null: guidance moves away from pictures for which they hold as well."""
        return tuple(section.kind for section in self.conditions if not getattr(section, "null", True))

    def conditions_in(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The conditions of a batch of the data set, by modality."""
        return {section.kind: batch[section.key] for section in self.conditions}

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        kind = {"diffusion": "unet", "classifier": "classifier", "autoencoder": "autoencoder"}[self.task]
        if self.model.kind != kind:
            raise ValueError(f"task {self.task} needs model.kind {kind}, not {self.model.kind}")
        if self.training.align and self.task != "diffusion":
            raise ValueError(f"training.align: is for diffusion, not for task {self.task}; leave it out")
        return self
