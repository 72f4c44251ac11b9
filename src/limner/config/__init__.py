"""The resolved recipe of a run: frozen models, unknown keys refused, one discriminated union per choice.

A `kind` here meets its class in `build.py` and nowhere else. Defaults are those of a small run on two CPU cores.
"""

from limner.config.base import Fraction, Section
from limner.config.files import dump, load, override, parse, read_yaml
from limner.config.networks import (
    AutoencoderConfig,
    AutoencoderLoss,
    ClassifierConfig,
    KLConfig,
    Level,
    UNetConfig,
    VQConfig,
)
from limner.config.process import (
    CosineSchedule,
    DiffusionProcess,
    DiscreteCosineSchedule,
    LinearSchedule,
    PredictionKind,
    RectifiedFlowSchedule,
    ScaledLinearSchedule,
    ScheduleConfig,
    WeightingConfig,
)
from limner.config.run import (
    BPEText,
    ConditionConfig,
    DataConfig,
    EMAConfig,
    ImageCondition,
    LabelCondition,
    LatentSpace,
    PixelSpace,
    PretrainedText,
    RunConfig,
    SamplingConfig,
    SpaceConfig,
    TextCondition,
    TrainingConfig,
)

__all__ = [
    "AutoencoderConfig",
    "AutoencoderLoss",
    "BPEText",
    "ClassifierConfig",
    "ConditionConfig",
    "CosineSchedule",
    "DataConfig",
    "DiffusionProcess",
    "DiscreteCosineSchedule",
    "EMAConfig",
    "Fraction",
    "ImageCondition",
    "KLConfig",
    "LabelCondition",
    "LatentSpace",
    "Level",
    "LinearSchedule",
    "PixelSpace",
    "PredictionKind",
    "PretrainedText",
    "RectifiedFlowSchedule",
    "RunConfig",
    "SamplingConfig",
    "ScaledLinearSchedule",
    "ScheduleConfig",
    "Section",
    "SpaceConfig",
    "TextCondition",
    "TrainingConfig",
    "UNetConfig",
    "VQConfig",
    "WeightingConfig",
    "dump",
    "load",
    "override",
    "parse",
    "read_yaml",
]
