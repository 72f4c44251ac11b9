"""diffusers' schedulers to the process and the sampling defaults of a recipe, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
