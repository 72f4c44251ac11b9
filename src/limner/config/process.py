"""The process: noise schedule, what the network predicts, how the loss is weighted."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from limner.config.base import Section

PredictionKind = Literal["epsilon", "sample", "v_prediction", "flow"]


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


class TableSchedule(Section):
    """Any beta of every step, in order: what an imported model was trained with, where no formula gives it."""

    kind: Literal["table"] = "table"
    betas: tuple[float, ...] = Field(min_length=1)
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
    LinearSchedule
    | ScaledLinearSchedule
    | DiscreteCosineSchedule
    | TableSchedule
    | CosineSchedule
    | RectifiedFlowSchedule,
    Field(discriminator="kind"),
]


class WeightingConfig(Section):
    """Weight of the x0 error by SNR, see `core/prediction.py`."""

    kind: Literal["simple", "truncated_snr", "min_snr", "sigmoid"] = "simple"
    gamma: float = Field(default=5.0, gt=0, description="min_snr: the cap")
    bias: float = Field(default=0.0, description="sigmoid: log-SNR at which the weight is one half")


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
