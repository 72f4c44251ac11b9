"""diffusers' schedulers to the process and the sampling defaults of a recipe, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from limner import build
from limner import config as c
from limner.errors import LimnerError
from limner.interop.hf_files import Component

FILE = "scheduler_config.json"
SAMPLERS: dict[str, str] = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
}
INSTEAD: dict[str, str] = {
    "PNDMScheduler": "ddim",
    "LMSDiscreteScheduler": "dpmpp_2m",
    "EulerAncestralDiscreteScheduler": "ddpm",
    "KDPM2DiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "ddpm",
    "DPMSolverSinglestepScheduler": "dpmpp_2m",
    "DPMSolverSDEScheduler": "dpmpp_2m_sde",
    "DEISMultistepScheduler": "unipc",
    "DDPMParallelScheduler": "ddpm",
    "DDIMParallelScheduler": "ddim",
}
"""Schedulers with the same noise and another solver; Limner draws with the nearest that it has."""
STEPS = {"ddpm": 1000, "ddim": 50, "euler": 30, "heun": 20}
_VARIANCES = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "fixed_large_log": "large"}
_NEEDED = {"thresholding": False, "use_flow_sigmas": False}


def process(component: Component, *, learned_variance: bool) -> dict[str, Any]:
    """The process of a recipe. Raises LimnerError for a scheduler, noise or prediction that has no counterpart."""
    s, where = component.settings, component.where
    if component.kind not in SAMPLERS and component.kind not in INSTEAD:
        raise LimnerError(f"{where}: {component.kind or 'no class'} has no counterpart; {', '.join(SAMPLERS)} have")
    for name, only in _NEEDED.items():
        if s.get(name, only) not in (only, None):
            raise LimnerError(f"{where}: {name}: {s[name]} has no counterpart; {only} has")
    predicted = s.get("prediction_type") or "epsilon"
    if predicted not in ("epsilon", "sample", "v_prediction"):
        raise LimnerError(f"{where}: prediction_type: '{predicted}' should be epsilon, sample or v_prediction")
    return {
        "schedule": _schedule(s, where),
        "prediction": predicted,
        "learned_variance": learned_variance,
        "time_input": "step",
    }


def _schedule(s: Mapping[str, Any], where: str) -> dict[str, Any]:
    zero = {"zero_terminal_snr": bool(s.get("rescale_betas_zero_snr", False))}
    if s.get("trained_betas") is not None:
        return {"kind": "table", "betas": s["trained_betas"], **zero}
    steps, kind = s.get("num_train_timesteps", 1000), s.get("beta_schedule", "linear")
    start, end = s.get("beta_start", 1e-4), s.get("beta_end", 0.02)
    kinds: dict[str, dict[str, Any]] = {
        # Ours scales its ends by 1000 / steps; diffusers takes them as they are.
        "linear": {"kind": "linear", "beta_start": start * steps / 1000, "beta_end": end * steps / 1000},
        "scaled_linear": {"kind": "scaled_linear", "beta_start": start, "beta_end": end},
        "squaredcos_cap_v2": {"kind": "discrete_cosine"},
    }
    if kind not in kinds:
        raise LimnerError(f"{where}: beta_schedule: '{kind}' has no counterpart; {', '.join(kinds)} have")
    return {**kinds[kind], "steps": steps, **zero}


def sampling(component: Component, *, latent: bool, guidance: float,
             learned_variance: bool) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """Sampling as the scheduler has it, and what of that is only near, in words."""
    s, notes = component.settings, []
    sampler = SAMPLERS.get(component.kind) or INSTEAD[component.kind]
    if component.kind in INSTEAD:
        notes.append(f"{component.where}: Limner has no {component.kind}; draws with {sampler}")
    if sampler == "dpmpp_2m" and s.get("algorithm_type") == "sde-dpmsolver++":
        sampler = "dpmpp_2m_sde"
    return {
        "sampler": sampler,
        "steps": min(STEPS.get(sampler, 20), s.get("num_train_timesteps", 1000)),
        "spacing": _spacing(s, sampler),
        "guidance": guidance,
        "clip": not latent and bool(s.get("clip_sample", sampler in ("ddpm", "ddim"))),
        "variance": _VARIANCES.get(s.get("variance_type", "fixed_small"))
        if sampler == "ddpm" and not learned_variance
        else None,
    }, notes


def _spacing(s: Mapping[str, Any], sampler: str) -> str:
    """CompVis' steps, one later and ending at alpha-bar of step 0, are diffusers' `steps_offset` 1 without
    `set_alpha_to_one`. The other solvers' "leading" divides the steps in another way; "trailing" is alike in all."""
    if s.get("use_karras_sigmas"):
        return "karras"
    named = s.get("timestep_spacing") or ("leading" if sampler in ("ddpm", "ddim") else "linspace")
    if sampler not in ("ddpm", "ddim"):
        return "trailing"
    if named == "leading" and s.get("steps_offset", 0) == 1:
        return "leading+1" if s.get("set_alpha_to_one") is False else "trailing"
    return named


# --- out ------------------------------------------------------------------------------------------------------------

CLASSES = {sampler: name for name, sampler in SAMPLERS.items()} | {"dpmpp_2m_sde": "DPMSolverMultistepScheduler"}
VIRTUAL_STEPS = 1000


def steps(config: c.RunConfig) -> int:
    """Steps of the schedule: its own, or 1000 where it is continuous. Raises LimnerError where diffusers' network
    could not be told of time as this one is."""
    model, total = config.model, build.schedule(config).steps or VIRTUAL_STEPS
    assert isinstance(model, c.UNetConfig)
    step = model.time_scale if config.process.time_input == "step" else model.time_scale / total
    if not math.isclose(step, 1):
        raise LimnerError(f"model.time_scale {model.time_scale:g}: diffusers tells the network the step itself; to "
                          "diffusers it cannot go")  # fmt: skip
    return total


def settings(config: c.RunConfig, *, plain: bool) -> tuple[str, dict[str, Any], list[str]]:
    """Class and settings of the scheduler that draws as the recipe's sampler does, and what is only near, in words.

    plain: the pipeline knows DDPM and DDIM alone. Raises LimnerError for noise that diffusers has no scheduler for.
    """
    process, asked = config.process, config.sampling
    if process.prediction == "flow" or process.schedule.kind == "rectified_flow":
        raise LimnerError(f"process {process.schedule.kind}, {process.prediction}: no pipeline of diffusers draws "
                          "flows with a U-Net; to diffusers it cannot go")  # fmt: skip
    sampler, notes = asked.sampler, []
    if process.learned_variance and sampler != "ddpm":
        sampler = "ddpm"
        notes.append(f"scheduler: DDPM instead of {asked.sampler}, since it knows of the learned variance")
    elif plain and sampler not in ("ddpm", "ddim"):
        sampler = "ddim"
        notes.append(f"scheduler: DDIM instead of {asked.sampler}, which the pipeline doesn't know")
    common = {**_noise(config), "prediction_type": process.prediction, **_steps_visited(config, sampler, notes)}
    if sampler in ("ddpm", "ddim"):
        common["clip_sample"] = asked.clip and config.space.kind == "pixels"
    elif asked.clip and config.space.kind == "pixels":
        notes.append(f"scheduler: {CLASSES[sampler]} doesn't clip x0 to [-1, 1], as the run does by default")
    own = {
        "ddpm": {
            "variance_type": "learned_range" if process.learned_variance else f"fixed_{asked.variance or 'small'}"
        },
        "dpmpp_2m": {"algorithm_type": "dpmsolver++", "solver_order": 2},
        "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
        "unipc": {"solver_order": 2, "solver_type": "bh2"},
    }
    return CLASSES[sampler], {**common, **own.get(sampler, {})}, notes


def _noise(config: c.RunConfig) -> dict[str, Any]:
    section, schedule, total = config.process.schedule, build.schedule(config), steps(config)
    found: dict[str, Any] = {"num_train_timesteps": total}
    if getattr(section, "zero_terminal_snr", False):
        found["rescale_betas_zero_snr"] = True
    if isinstance(section, c.LinearSchedule):
        ends = {"beta_start": section.beta_start * 1000 / total, "beta_end": section.beta_end * 1000 / total}
        return {**found, "beta_schedule": "linear", **ends}
    if isinstance(section, c.ScaledLinearSchedule):
        ends = {"beta_start": section.beta_start, "beta_end": section.beta_end}
        return {**found, "beta_schedule": "scaled_linear", **ends}
    if isinstance(section, c.DiscreteCosineSchedule) and (section.offset, section.max_beta) == (0.008, 0.999):
        return {**found, "beta_schedule": "squaredcos_cap_v2"}
    if isinstance(section, c.TableSchedule):
        return {**found, "trained_betas": list(section.betas)}
    signal = schedule.alpha(torch.arange(1, total + 1, dtype=torch.float64) / total).square()
    before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
    found.pop("rescale_betas_zero_snr", None)  # it is in the table
    return {**found, "trained_betas": (1 - signal / before).clamp(1e-8, 1).tolist()}


def _steps_visited(config: c.RunConfig, sampler: str, notes: list[str]) -> dict[str, Any]:
    """Which steps a scheduler takes. "trailing" is alike in all; the others have no counterpart in the solvers."""
    spacing = config.sampling.spacing
    if sampler in ("ddpm", "ddim"):
        if spacing == "leading+1" and sampler == "ddim":
            return {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
        if spacing in ("leading", "linspace", "trailing"):
            return {"timestep_spacing": spacing}
    if spacing == "karras":
        return {"timestep_spacing": "trailing", "use_karras_sigmas": True}
    if spacing != "trailing":
        notes.append(f"scheduler: steps are spaced by 'trailing', not by '{spacing}'; draw with --spacing trailing to "
                     "compare")  # fmt: skip
    return {"timestep_spacing": "trailing"}
