"""How to sample: what a user may choose, with the run's own defaults for the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from limner.config import SamplingConfig
from limner.core.path import is_respacing
from limner.core.samplers import SAMPLERS
from limner.errors import LimnerError, suggest

STOCHASTIC = ("ddim", "dpmpp_2m_sde")
VARIANCES = ("learned", "small", "large")
COMPOSITIONS = ("chain", "sum")


@dataclass(frozen=True)
class Settings:
    """sampler: a name in `SAMPLERS`. steps: its number of steps. spacing: see `core/path.py`.

    guidance: classifier-free scale s, 1 is off. scales: one by modality instead, such as {"text": 5, "boxes": 2}; what
    isn't named has 1. composition: how scales add up: "chain", each condition given those before it, in the model's
    order (InstructPix2Pix), or "sum", each by itself (Liu et al. 2206.01714).
    guidance_every: the unconditional half is computed at every so many steps, see `core/guidance.py: classifier_free`.
    consistent: super-resolution: what is drawn is made to agree with the small picture, in pixels at each step as well.
    interval: the range of t in which guidance of any kind acts.
    rescale: phi of Lin et al. 2305.08891. classifier_scale: 0 is off. clip: x0 kept in [-1, 1].
    eta: of ddim and dpmpp_2m_sde. variance: of ddpm, learned, small or large; None: the model's own.
    """

    sampler: str = "dpmpp_2m"
    steps: int = 20
    spacing: str = "log_snr"
    guidance: float = 1.0
    scales: Mapping[str, float] | None = None
    composition: str = "chain"
    guidance_every: int = 1
    consistent: bool = False
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    clip: bool = True
    classifier_scale: float = 0.0
    eta: float | None = None
    variance: str | None = None

    @staticmethod
    def of(given: Mapping[str, Any]) -> Asked:
        """Settings as a user names them; None stands for the default. LimnerError for an unknown name."""
        known = [f.name for f in fields(Settings)]
        for name in given:
            if name not in known:
                raise LimnerError(f"setting '{name}': there is none such{suggest(name, known)}")
        if isinstance(given.get("guidance"), Mapping):
            given = {**given, "guidance": None, "scales": dict(given["guidance"])}
        return Asked({name: value for name, value in given.items() if value is not None})

    def sampler_options(self) -> dict[str, Any]:
        """What the sampler takes besides the path and the noise."""
        if self.sampler == "ddpm":
            return {"variance": self.variance}
        return {} if self.eta is None else {"eta": self.eta}

    def check(self) -> None:
        """LimnerError for a value out of range."""
        if self.sampler not in SAMPLERS:
            raise LimnerError(f"sampler '{self.sampler}': there is none such{suggest(str(self.sampler), SAMPLERS)}")
        for name in ("steps", "guidance_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise LimnerError(f"{name}: {value}, should be a whole number from 1")
        numbers = {name: getattr(self, name) for name in ("guidance", "rescale", "eta", "classifier_scale")}
        numbers |= {f"guidance of {name}": scale for name, scale in (self.scales or {}).items()}
        for name, value in numbers.items():
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise LimnerError(f"{name}: {value}, should be a number from 0")
        if self.composition not in COMPOSITIONS:
            raise LimnerError(f"composition '{self.composition}': there is none such"
                              f"{suggest(self.composition, COMPOSITIONS)}")  # fmt: skip
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise LimnerError(f"interval: {low:g},{high:g}, should be two times, 0 <= low < high <= 1")
        if self.eta is not None and self.sampler not in STOCHASTIC:
            raise LimnerError(f"eta: {self.sampler} has none; {' and '.join(STOCHASTIC)} do")
        if self.variance is not None and self.variance not in VARIANCES:
            raise LimnerError(f"variance '{self.variance}': there is none such{suggest(self.variance, VARIANCES)}")
        if self.variance is not None and self.sampler != "ddpm":
            raise LimnerError(f"variance: {self.sampler} has none; ddpm does")


@dataclass(frozen=True)
class Asked:
    """What a user asked for, before the run's defaults fill the rest."""

    values: Mapping[str, Any]

    def resolved(self, defaults: SamplingConfig) -> Settings:
        """Complete settings. An `eta` or `variance` default counts only for a sampler that has one, and a respacing
        string (`"ddim25"`) names the number of steps itself. LimnerError for a value out of range."""
        known = {f.name for f in fields(Settings)}
        base = {name: value for name, value in defaults.model_dump().items() if name in known}
        sampler = self.values.get("sampler", base["sampler"])
        if sampler != "ddpm":
            base.pop("variance", None)
        if "steps" in self.values and "spacing" not in self.values and is_respacing(base["spacing"]):
            base["spacing"] = "log_snr"
        chosen = {**base, **self.values}
        chosen["interval"] = tuple(chosen["interval"])
        settings = Settings(**chosen)
        settings.check()
        return settings
