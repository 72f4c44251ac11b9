"""The resolved recipe of a run: frozen models, unknown keys refused, one discriminated union per choice.

A `kind` here meets its class in `build.py` and nowhere else. Defaults are those of a small run on two CPU cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from limner.errors import LimnerError, suggest

Fraction = Annotated[float, Field(ge=0, le=1)]
PredictionKind = Literal["epsilon", "sample", "v_prediction", "flow"]


class Section(BaseModel):
    """Frozen, and strict about names: a misspelt key is an error, never a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# --- the process: schedule, prediction, weighting -------------------------------------------------------------


class LinearSchedule(Section):
    """DDPM (Ho et al. 2020): beta linear in the step; end points scaled by 1000 / steps."""

    kind: Literal["linear"] = "linear"
    steps: PositiveInt = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    zero_terminal_snr: bool = False


class ScaledLinearSchedule(Section):
    """LDM (Rombach et al. 2022): sqrt(beta) linear in the step."""

    kind: Literal["scaled_linear"] = "scaled_linear"
    steps: PositiveInt = 1000
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    zero_terminal_snr: bool = False


class DiscreteCosineSchedule(Section):
    """Nichol & Dhariwal 2021, eq. 17, with beta capped."""

    kind: Literal["discrete_cosine"] = "discrete_cosine"
    steps: PositiveInt = 1000
    offset: float = 0.008
    max_beta: float = 0.999
    zero_terminal_snr: bool = False


class CosineSchedule(Section):
    """Continuous cosine, alpha = cos(pi t / 2); log-SNR shifted by 2 log `shift` (simple diffusion, eq. 4)."""

    kind: Literal["cosine"] = "cosine"
    shift: float = Field(default=1.0, gt=0, description="64 / resolution in simple diffusion; below 1 adds noise")
    log_snr_max: float = 15.0
    log_snr_min: float = -15.0


class RectifiedFlowSchedule(Section):
    """alpha = 1 - t, sigma = t (Liu et al. 2022); log-SNR shifted by 2 log `shift`."""

    kind: Literal["rectified_flow"] = "rectified_flow"
    shift: float = Field(default=1.0, gt=0)


ScheduleConfig = Annotated[
    LinearSchedule | ScaledLinearSchedule | DiscreteCosineSchedule | CosineSchedule | RectifiedFlowSchedule,
    Field(discriminator="kind"),
]


class WeightingConfig(Section):
    """Weight of the x0 error by SNR, see `core/prediction.py`."""

    kind: Literal["simple", "truncated_snr", "min_snr", "sigmoid"] = "simple"
    gamma: float = Field(default=5.0, gt=0, description="min_snr: the cap")
    bias: float = Field(default=0.0, description="sigmoid: log-SNR at which the weight is one half")


# --- networks ---------------------------------------------------------------------------------------------------


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
    norm_groups: PositiveInt = 32
    norm_eps: float = 1e-5
    transformer_norm_eps: float = 1e-6
    dropout: Fraction = 0.0
    gradient_checkpointing: bool = False


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


# --- conditions -------------------------------------------------------------------------------------------------


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


class DiffusionProcess(Section):
    schedule: ScheduleConfig = CosineSchedule()
    schedule_known: bool = Field(
        default=True, description="False: an imported classifier whose flags don't say; it takes the diffusion model's"
    )
    prediction: PredictionKind = "v_prediction"
    learned_variance: bool = Field(
        default=False, description="ADM: the output's second half interpolates the log variance"
    )
    vlb_weight: float = Field(default=0.001, ge=0, description="lambda of the hybrid loss, with learned_variance")
    weighting: WeightingConfig = WeightingConfig()
    time_input: Literal["continuous", "step"] = Field(
        default="continuous", description="step: the network sees the DDPM step i = t x T - 1 (imported models)"
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


# --- reading, overriding, writing -------------------------------------------------------------------------------


def parse(raw: dict[str, Any], where: str) -> RunConfig:
    """Validate a recipe. Raises LimnerError naming the file, the key and what would be right."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise LimnerError(f"{where}: {_explain(error, raw)}") from None


def load(path: str | Path) -> RunConfig:
    """Read `config.yaml`. Raises LimnerError when it is missing or wrong."""
    return parse(read_yaml(path), str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping; LimnerError when the file is missing, is not YAML, or is something else."""
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise LimnerError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LimnerError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(raw, dict):
        raise LimnerError(f"{path}: should be a mapping of keys to values, is a {type(raw).__name__}")
    return raw


def dump(config: RunConfig, path: str | Path) -> None:
    """Write the recipe as YAML."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
    Path(path).write_text(text, encoding="utf-8")


def override(raw: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Apply `a.b.0.c=value` settings (values in YAML) to a copy of a recipe. Raises LimnerError on bad syntax."""
    result = yaml.safe_load(yaml.safe_dump(raw))
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise LimnerError(f"--set {setting}: should be KEY=VALUE, such as training.batch=32")
        *parents, leaf = name.split(".")
        node: Any = result
        for key in parents:
            if isinstance(node, list):
                node = node[_index(node, key, setting)]
                continue
            if not isinstance(node, dict):
                raise LimnerError(f"--set {setting}: '{key}' has nothing below it")
            node = node.setdefault(key, {})
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise LimnerError(f"--set {setting}: '{text}' is not a YAML value") from None
        if isinstance(node, list):
            node[_index(node, leaf, setting)] = value
        elif isinstance(node, dict):
            node[leaf] = value
        else:
            raise LimnerError(f"--set {setting}: '{leaf}' cannot be set there")
    return result


def _index(node: list[Any], key: str, setting: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise LimnerError(f"--set {setting}: '{key}' should be an index below {len(node)}")
    return int(key)


def _explain(error: ValidationError, raw: dict[str, Any]) -> str:
    """The first validation error in one line, with the nearest known key for an unknown one."""
    first = error.errors()[0]
    place = [part for part in first["loc"] if part not in _UNION_TAGS]
    name = ".".join(str(part) for part in place) or "recipe"
    if first["type"] == "extra_forbidden":
        return f"unknown key '{name}'{suggest(str(place[-1]), _siblings(first['loc']))}"
    return f"{name}: {first['msg'].removeprefix('Value error, ')} (is {first['input']!r})"[:400]


_UNION_TAGS = frozenset(
    "linear scaled_linear discrete_cosine cosine rectified_flow unet classifier autoencoder kl vq "
    "label text image bpe pretrained pixels latent".split()
)


def _siblings(loc: tuple[int | str, ...]) -> list[str]:
    """Names allowed where an unknown key stood, found by walking the models along `loc`."""
    models: list[type[BaseModel]] = [RunConfig]
    for part in loc[:-1]:
        following: list[type[BaseModel]] = []
        for model in models:
            if part in model.model_fields:
                following += _sections(model.model_fields[part].annotation)
            elif part in _UNION_TAGS and model.model_fields.get("kind") is not None:
                following += [model] if model.model_fields["kind"].default == part else []
            elif isinstance(part, int):
                following.append(model)
        models = following or models
    return [name for model in models for name in model.model_fields]


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in getattr(annotation, "__args__", ()) for found in _sections(inner)]
