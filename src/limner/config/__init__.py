"""The resolved recipe of a run: frozen models, unknown keys refused, one discriminated union per choice.

A `kind` here meets its class in `build.py` and nowhere else. Defaults are those of a small run on two CPU cores.
"""

from limner.config.base import Fraction, Section
from limner.config.conditions import (
    BoxesCondition,
    BPEText,
    ConditionConfig,
    GivenText,
    ImageCondition,
    LabelCondition,
    MaskCondition,
    PretrainedText,
    SemanticMapCondition,
    TextCondition,
    VariationCondition,
)
from limner.config.distillation import DistillationConfig
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
    TableSchedule,
    WeightingConfig,
)
from limner.config.run import (
    DataConfig,
    EMAConfig,
    LatentSpace,
    PixelSpace,
    RunConfig,
    SamplingConfig,
    SpaceConfig,
    TrainingConfig,
)

__all__ = [
    "AutoencoderConfig",
    "AutoencoderLoss",
    "BPEText",
    "BoxesCondition",
    "ClassifierConfig",
    "ConditionConfig",
    "CosineSchedule",
    "DataConfig",
    "DiffusionProcess",
    "DiscreteCosineSchedule",
    "DistillationConfig",
    "EMAConfig",
    "Fraction",
    "GivenText",
    "ImageCondition",
    "KLConfig",
    "LabelCondition",
    "LatentSpace",
    "Level",
    "LinearSchedule",
    "MaskCondition",
    "PixelSpace",
    "PredictionKind",
    "PretrainedText",
    "RectifiedFlowSchedule",
    "RunConfig",
    "SamplingConfig",
    "ScaledLinearSchedule",
    "ScheduleConfig",
    "Section",
    "SemanticMapCondition",
    "SpaceConfig",
    "TableSchedule",
    "TextCondition",
    "TrainingConfig",
    "UNetConfig",
    "VQConfig",
    "VariationCondition",
    "WeightingConfig",
    "dump",
    "load",
    "override",
    "parse",
    "read_yaml",
]
