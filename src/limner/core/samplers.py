"""Samplers: pure functions from a denoiser, noise and a path to images.

    sampler(denoise, x, path, *, cond=None, noise=None, on_step=None, ...) -> x at the path's last knot

x: (B, C, H, W), at the noise level of path[0]. cond: handed to the denoiser as it is. noise(k): the noise of step k,
needed by the stochastic ones. on_step(Step): told after each step; it stops the sampler by raising. Gradients flow
if they are on: sample under `torch.inference_mode()` unless you want them.

Symbols. A step goes from knot t ("here": alpha, sigma) to the cleaner knot s ("there": alpha', sigma'). Papers write
sqrt(alpha-bar) for alpha, and half our log-SNR for lambda; h = log(alpha'/sigma') - log(alpha/sigma) > 0 throughout.
Every update is a combination of x and predictions of x0 in native (alpha, sigma), finite at both ends:
h is infinite on the first step when alpha = 0 (zero terminal SNR) and on the last when sigma' = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from limner.core.denoiser import Variance, chosen_variance, posterior, step_log_variance
from limner.core.path import Path
from limner.core.types import Cond, Denoise, Denoised, Gradient, Knot, Noise, OnStep, Step
from limner.errors import LimnerError


def ddim(
    denoise: Denoise,
    x: Tensor,
    path: Path,
    *,
    cond: Cond = None,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM, Song et al. 2021 (2010.02502), eq. 12. Deterministic and of order 1 at eta = 0; DDPM's noise at eta = 1.

    | here | paper |
    | --- | --- |
    | x0 | (x_t - sqrt(1 - alpha_t) eps) / sqrt(alpha_t), "predicted x0" |
    | spread | sigma_t = eta sqrt((1 - alpha_{t-1}) / (1 - alpha_t)) sqrt(1 - alpha_t / alpha_{t-1}), eq. 16 |
    | kept eps | sqrt(1 - alpha_{t-1} - sigma_t^2) eps, "direction pointing to x_t" |
    """
    for k, (here, there) in enumerate(path.pairs()):
        x0 = _at(denoise, x, here, cond).x0
        spread = eta * math.sqrt(posterior(here, there).variance)
        kept = math.sqrt(max(there.sigma**2 - spread**2, 0.0))
        x = there.alpha * x0 + kept / here.sigma * (x - here.alpha * x0)
        if spread > 0:
            x = x + spread * _draw(noise, k, x, "ddim with eta above 0")
        _tell(on_step, k, path, x, x0)
    return x


def ddpm(
    denoise: Denoise,
    x: Tensor,
    path: Path,
    *,
    cond: Cond = None,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    gradient: Gradient | None = None,
    variance: Variance | None = None,
) -> Tensor:
    """Ancestral sampling, Ho et al. 2020 (2006.11239), Algorithm 2, between any knots.

    gradient: classifier guidance by Dhariwal & Nichol 2021 (2105.05233), Algorithm 1: the mean moves by
        Sigma s grad log p(y | x_t), the gradient taken at x_t; `gradient(x_t, t, cond)` includes s.
    variance: Sigma. "learned" (the denoiser's fraction between the two others), "small" (beta-tilde) or "large"
        (beta); None: learned where the denoiser has it, else small. No noise is added on reaching the clean image.

    | here | paper |
    | --- | --- |
    | x_weight x + x0_weight x0 | mu-tilde_t(x_t, x0), eq. 7 |
    | exp(log_variance) | sigma_t^2; Sigma_theta of Nichol & Dhariwal 2021, eq. 15 |
    """
    for k, (here, there) in enumerate(path.pairs()):
        out = _at(denoise, x, here, cond)
        step = posterior(here, there)
        chosen = chosen_variance(out, variance)
        log_variance = step_log_variance(here, there, chosen, before=path[k - 1] if k else None)
        mean = step.x_weight * x + step.x0_weight * out.x0
        if gradient is not None:
            spread = step.variance if chosen == "small" else log_variance.exp()  # beta-tilde is 0 on the last step
            mean = mean + spread * gradient(x, _time(here), cond)
        x = mean
        if there.sigma > 0:
            x = x + (0.5 * log_variance).exp() * _draw(noise, k, x, "ddpm")
        _tell(on_step, k, path, x, out.x0)
    return x


def euler(
    denoise: Denoise,
    x: Tensor,
    path: Path,
    *,
    cond: Cond = None,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Euler's method on the probability-flow ODE, Karras et al. 2022 (2206.00364), eq. 4, in the coordinates
    (x / alpha, sigma / alpha) where it reads dx/dsigma = (x - D) / sigma. Order 1; `noise` is not used.

    In native coordinates this is DDIM at eta = 0 (Song et al. 2021, section 4.3), and so it starts at alpha = 0.
    """
    for k, (here, there) in enumerate(path.pairs()):
        x0 = _at(denoise, x, here, cond).x0
        x = _towards(x0, x, here, there)
        _tell(on_step, k, path, x, x0)
    return x


def heun(
    denoise: Denoise,
    x: Tensor,
    path: Path,
    *,
    cond: Cond = None,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Heun's method on the same ODE, Karras et al. 2022 (2206.00364), Algorithm 1. Order 2, two calls a step;
    Euler's step to the clean image, and from pure noise, where the slope is infinite. `noise` is not used.

    | here | paper, with x / alpha for x and sigma / alpha for sigma |
    | --- | --- |
    | euler | x_i + (sigma_{i+1} - sigma_i) d_i |
    | (x0 - x0_there) / 2 (1 - 1/ratio) | (sigma_{i+1} - sigma_i) (d'_i - d_i) / 2, since x on the line cancels |
    | ratio | sigma_{i+1} / sigma_i = exp(-h) |
    """
    for k, (here, there) in enumerate(path.pairs()):
        x0 = _at(denoise, x, here, cond).x0
        x = _towards(x0, x, here, there)
        ratio = math.exp(-_h(here, there))
        if ratio > 0:
            x0_there = _at(denoise, x, there, cond).x0
            x = x + there.alpha * (1 - 1 / ratio) / 2 * (x0 - x0_there)
        _tell(on_step, k, path, x, x0)
    return x


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    path: Path,
    *,
    cond: Cond = None,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022 (2211.01095), Algorithm 2. Order 2 with one call a step; order 1 on the first
    step and on an infinite one. `noise` is not used.

    | here | paper |
    | --- | --- |
    | h, h_before | h_i = lambda_{t_i} - lambda_{t_{i-1}}, h_{i-1} |
    | guess | D_i = (1 + 1 / 2r_i) x_theta(i-1) - 1 / 2r_i x_theta(i-2), r_i = h_{i-1} / h_i |
    | _towards(guess) | sigma_i / sigma_{i-1} x - alpha_i (exp(-h_i) - 1) D_i |
    """
    x0_before, h_before = None, math.inf
    for k, (here, there) in enumerate(path.pairs()):
        x0, h = _at(denoise, x, here, cond).x0, _h(here, there)
        guess = x0 if x0_before is None else x0 + _half_slope(h, h_before) * (x0 - x0_before)
        x = _towards(guess, x, here, there)
        x0_before, h_before = x0, h
        _tell(on_step, k, path, x, x0)
    return x


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    path: Path,
    *,
    cond: Cond = None,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
) -> Tensor:
    """SDE-DPM-Solver++(2M), Lu et al. 2022 (2211.01095), section 5 and appendix; midpoint form, as k-diffusion has it.
    eta: noise put in, 1 for the reverse SDE, 0 for the ODE, where this is DPM-Solver++(2M).

    | here | paper, at eta = 1 |
    | --- | --- |
    | gain | 1 - exp(-2h): weight of alpha_t times the data prediction |
    | exp(-eta h) sigma'/sigma | sigma_t / sigma_s exp(-h): what is left of x |
    | sigma' sqrt(1 - exp(-2 eta h)) | sigma_t sqrt(1 - exp(-2h)): the noise |
    """
    x0_before, h_before = None, math.inf
    for k, (here, there) in enumerate(path.pairs()):
        x0, h = _at(denoise, x, here, cond).x0, _h(here, there)
        guess = x0 if x0_before is None else x0 + _half_slope(h, h_before) * (x0 - x0_before)
        left = there.sigma / here.sigma * _exp_minus(eta, h)
        gain = 1 - _exp_minus(1 + eta, h)
        x = left * x + there.alpha * gain * guess
        spread = there.sigma * math.sqrt(1 - _exp_minus(2 * eta, h))
        if spread > 0:
            x = x + spread * _draw(noise, k, x, "dpmpp_2m_sde")
        x0_before, h_before = x0, h
        _tell(on_step, k, path, x, x0)
    return x


def unipc(
    denoise: Denoise,
    x: Tensor,
    path: Path,
    *,
    cond: Cond = None,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """UniPC-2, Zhao et al. 2023 (2302.04867), data prediction, B(h) = exp(h) - 1 ("bh2"), Algorithms 5 and 6.
    Each prediction first corrects the step that led to it (UniC), then makes the next one (UniP): one call a step.
    Order 3 with the corrector; order 1 on the first step, the last and an infinite one. `noise` is not used.

    | here | paper |
    | --- | --- |
    | guess | x_theta(i-1) + a_1 D_1 / r_1, UniP with a_1 = 1/2: that of DPM-Solver++(2M) |
    | better | x_theta(i-1) + sum of c_m D_m / r_m, UniC |
    | r | r_1 = (lambda_{i-2} - lambda_{i-1}) / h_i, below 0 |
    | big | B(h), with h negated for data prediction |
    | rho_older, rho_here | c_1, c_2 of R_2(h) c = phi_2(h) / B(h) |
    """
    x0_before, x0_older, x_before = None, None, x
    h_before = h_older = math.inf
    for k, (here, there) in enumerate(path.pairs()):
        x0, h = _at(denoise, x, here, cond).x0, _h(here, there)
        if x0_before is not None:
            better = _corrected(x0, x0_before, x0_older, h_before, h_older)
            x = _towards(better, x_before, path[k - 1], here)
        last = k == path.steps - 1
        guess = x0 if x0_before is None or last else x0 + _half_slope(h, h_before) * (x0 - x0_before)
        x_before, x = x, _towards(guess, x, here, there)
        x0_before, x0_older = x0, x0_before
        h_before, h_older = h, h_before
        _tell(on_step, k, path, x, x0)
    return x


def _corrected(x0: Tensor, x0_before: Tensor, x0_older: Tensor | None, h: float, h_older: float) -> Tensor:
    """UniC: the data prediction for the step just made, now that x0 at its end is known. `h` is that step,
    `h_older` the one before it. R_2 rho = b solved by hand; order 1 takes rho = 1/2, as the authors do."""
    if x0_older is None or math.isinf(h_older):
        return x0_before + 0.5 * (x0 - x0_before)
    r, big = -h_older / h, math.expm1(-h)
    phi_2 = -big / h - 1
    phi_3 = -phi_2 / h - 0.5
    rho_older = (phi_2 - 2 * phi_3) / big / (1 - r)
    rho_here = phi_2 / big - rho_older
    return x0_before + rho_older / r * (x0_older - x0_before) + rho_here * (x0 - x0_before)


def _at(denoise: Denoise, x: Tensor, knot: Knot, cond: Cond) -> Denoised:
    return denoise(x, _time(knot), cond)


def _time(knot: Knot) -> Tensor:
    """0-dim float64 on the CPU: exact in the schedule's tables, and it combines with x of any dtype and device."""
    return torch.tensor(knot.t, dtype=torch.float64)


def _towards(x0: Tensor, x: Tensor, here: Knot, there: Knot) -> Tensor:
    """alpha' x0 + sigma' eps, eps such that x = alpha x0 + sigma eps: the ODE's solution while x0 stands still."""
    ratio = there.sigma / here.sigma
    return (there.alpha - here.alpha * ratio) * x0 + ratio * x


def _h(here: Knot, there: Knot) -> float:
    """The step in log(alpha / sigma), half the log-SNR: the lambda of the DPM-Solver papers."""
    return (there.log_snr - here.log_snr) / 2


def _half_slope(h: float, h_before: float) -> float:
    """1 / (2r) = h / (2 h_before): how far the change of x0 over the step before is carried on; 0 when a step is
    infinite, where a slope means nothing."""
    return 0.0 if math.isinf(h) or math.isinf(h_before) else h / (2 * h_before)


def _exp_minus(rate: float, h: float) -> float:
    """exp(-rate h), 1 at rate 0 even for an infinite h."""
    return math.exp(-rate * h) if rate > 0 else 1.0


def _draw(noise: Noise | None, k: int, x: Tensor, sampler: str) -> Tensor:
    if noise is None:
        raise LimnerError(f"{sampler} draws noise: give noise=..., such as limner.core.noise.step_noise(seed, ...)")
    drawn = noise(k)
    if drawn.shape != x.shape:
        raise LimnerError(f"noise of step {k}: {tuple(drawn.shape)}, should be {tuple(x.shape)}")
    return drawn


def _tell(on_step: OnStep | None, k: int, path: Path, x: Tensor, x0: Tensor) -> None:
    if on_step is not None:
        on_step(Step(k + 1, path.steps, path[k + 1].t, x, x0))


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
}
"""By the names that the command line and recipes use."""
