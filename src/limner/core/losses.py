"""Training losses and the variational bound. Everything per image, (B,); the trainer takes the mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from limner.core.denoiser import (
    Network,
    TimeInput,
    Variance,
    chosen_variance,
    network_time,
    per_image,
    posterior,
    split_variance,
    step_log_variance,
)
from limner.core.path import Path
from limner.core.prediction import PredictionKind, Weighting, target, to_x0, weight
from limner.core.schedule import Schedule
from limner.core.types import Cond, Denoise, Denoised, Noise
from limner.errors import LimnerError, suggest

Times = Literal["uniform", "logit_normal"]
Decoder = Literal["exact", "tanh"]


def stratified_times(
    n: int, generator: torch.Generator, kind: Times = "uniform", *, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """n training times in (0, 1), float64 on the CPU: one in each of n equally likely strata, in random order.

    kind: "uniform", or "logit_normal": sigmoid of a normal with `mean` and `std` (Esser et al. 2024, eq. 19).
    Every single time is distributed as without strata; the mean over a batch varies less (Kingma et al. 2021, I.1).
    """
    u = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator, dtype=torch.float64)) / n
    u = u.clamp(1e-9, 1 - 1e-9)
    if kind == "uniform":
        return u
    if kind == "logit_normal":
        return torch.sigmoid(mean + std * torch.special.ndtri(u))
    raise LimnerError(f"unknown distribution of times '{kind}'{suggest(kind, ['uniform', 'logit_normal'])}")


@dataclass(frozen=True)
class LossTerms:
    """Per image (B,): `loss` is what is minimised, `mse` the unweighted squared error of the raw output, `vb` the
    bound's term as it enters the loss (None without a learned variance), `log_snr` where on the schedule it was."""

    loss: Tensor
    mse: Tensor
    vb: Tensor | None
    log_snr: Tensor


@dataclass(frozen=True)
class DiffusionLoss:
    """The diffusion objective: weight(SNR) |raw - target|^2, and with a learned variance the hybrid loss
    L_simple + lambda L_vlb (Nichol & Dhariwal 2021, eq. 16), the mean held fixed in the second term.

    path: with a learned variance only: the steps whose variances are learned. Times are then moved to its nearest knot.
        All T steps: `schedule.path(T, "trailing")`.
    vlb_weight: lambda. The bound's term of one step stands for all N steps of the path: it enters as lambda N term.
        guided-diffusion's RESCALED_MSE is lambda = 0.001, its MSE (rescale_learned_sigmas off) is lambda = 1 / N.
    decoder: see `discretised_gaussian`.
    """

    schedule: Schedule
    prediction: PredictionKind
    weighting: Weighting = "simple"
    gamma: float = 5.0
    bias: float = 0.0
    time_input: TimeInput = "continuous"
    path: Path | None = None
    vlb_weight: float = 0.001
    decoder: Decoder = "exact"

    def __call__(self, network: Network, x0: Tensor, eps: Tensor, t: Tensor, cond: Any = None) -> LossTerms:
        """network: as in `network_denoiser`. x0, eps: (B, C, H, W). t: (B,) in (0, 1]."""
        index = None
        if self.path is not None:
            index = self.path.index_of(t)
            t = torch.tensor([self.path[int(k)].t for k in index], dtype=torch.float64)
        alpha, sigma = per_image(self.schedule.alpha(t), x0), per_image(self.schedule.sigma(t), x0)
        x_t = alpha * x0 + sigma * eps
        time = network_time(t, len(x0), self.schedule, self.time_input).to(x0.device)
        raw, fraction = split_variance(network(x_t, time, cond).to(x0.dtype), self.path is not None)
        mse = _per_image_mean((raw - target(x0, eps, alpha, sigma, self.prediction)) ** 2)
        log_snr = self.schedule.log_snr(t)
        scale = weight(log_snr, self.weighting, self.prediction, gamma=self.gamma, bias=self.bias)
        loss = scale.to(mse) * mse
        if self.path is None or index is None:
            return LossTerms(loss, mse, None, log_snr)
        fixed = Denoised(to_x0(raw.detach(), x_t, alpha, sigma, self.prediction), fraction)
        vb = self.vlb_weight * self.path.steps * vlb_term(x0, x_t, fixed, self.path, index, decoder=self.decoder)
        return LossTerms(loss + vb, mse, vb, log_snr)


def vlb_term(
    x0: Tensor,
    x_t: Tensor,
    out: Denoised,
    path: Path,
    index: Tensor,
    variance: Variance | None = None,
    decoder: Decoder = "exact",
) -> Tensor:
    """The variational bound's term of one step, in bits per dimension, (B,); Ho et al. 2020, eq. 5.

    index: (B,) int on the CPU: the step from path[index] to path[index + 1]. A step between noisy knots costs
    KL(q(x_s | x_t, x0) || p(x_s | x_t)); the step to the clean image costs -log p(x0 | x_t), p a Gaussian
    discretised to the 256 levels (`discretised_gaussian`).
    variance: as `samplers.ddpm` takes it. decoder: as `discretised_gaussian`.
    """
    steps = _StepTable.of(path)
    x_weight, x0_weight = per_image(steps.x_weight[index], x0), per_image(steps.x0_weight[index], x0)
    true_log_variance = per_image(steps.small[index], x0)
    log_variance = steps.log_variance(index, chosen_variance(out, variance), x0)
    true_mean, mean = x_weight * x_t + x0_weight * x0, x_weight * x_t + x0_weight * out.x0
    kl = 0.5 * (
        log_variance
        - true_log_variance
        + torch.exp(true_log_variance - log_variance)
        + (true_mean - mean) ** 2 * torch.exp(-log_variance)
        - 1
    )
    nll = -discretised_gaussian(x0, mean, 0.5 * log_variance, decoder)
    nats = torch.where(per_image(steps.last[index], x0) > 0, nll, kl)
    return _per_image_mean(nats) / math.log(2)


@dataclass(frozen=True)
class _StepTable:
    """`posterior` and `step_log_variance` of every step of a path, float64 (N,), to be indexed by image."""

    x_weight: Tensor
    x0_weight: Tensor
    small: Tensor
    large: Tensor
    beta: Tensor
    last: Tensor

    @staticmethod
    @lru_cache(maxsize=8)
    def of(path: Path) -> _StepTable:
        rows = []
        for k, (here, there) in enumerate(path.pairs()):
            step, before = posterior(here, there), path[k - 1] if k else None
            small, large = (float(step_log_variance(here, there, v, before=before)) for v in ("small", "large"))
            rows.append((step.x_weight, step.x0_weight, small, large, math.log(step.beta), float(there.sigma == 0)))
        return _StepTable(*torch.tensor(rows, dtype=torch.float64).unbind(dim=1))

    def log_variance(self, index: Tensor, variance: Tensor | Literal["small", "large"], like: Tensor) -> Tensor:
        """As `step_log_variance`, of the step that `index` (B,) names for each image; broadcasts with `like`."""
        if not isinstance(variance, Tensor):
            return per_image((self.small if variance == "small" else self.large)[index], like)
        low, high = per_image(self.small[index], like), per_image(self.beta[index], like)
        return low + variance * (high - low)


def discretised_gaussian(x0: Tensor, mean: Tensor, log_std: Tensor, decoder: Decoder = "exact") -> Tensor:
    """log p(x0) in nats, shaped like x0: a Gaussian's mass on the bin of an 8-bit level in [-1, 1] (2/255 wide, the
    outermost bins open), at least 1e-12; Ho et al. 2020, eq. 13.

    decoder: "exact", the normal distribution function; "tanh", the fit to it that guided-diffusion has, off by up to
    3e-4, for comparison with its figures.
    """
    upper = torch.where(x0 > 0.999, math.inf, (x0 - mean + 1 / 255) * torch.exp(-log_std))
    lower = torch.where(x0 < -0.999, -math.inf, (x0 - mean - 1 / 255) * torch.exp(-log_std))
    if decoder == "tanh":
        mass = _tanh_cdf(upper) - _tanh_cdf(lower)
    else:
        side = torch.where(x0 > mean, -1.0, 1.0)  # the tail that is small, for the digits
        mass = (torch.special.ndtr(side * upper) - torch.special.ndtr(side * lower)).abs()
    return mass.clamp(min=1e-12).log()


def _tanh_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@dataclass(frozen=True)
class BitsPerDim:
    """A bound on -log2 p(x0) per dimension, by image. total (B,) = vb.sum(dim=1) + prior.

    vb: (B, N), the term of each step, noisiest first; the last is that of the discretised likelihood. prior: (B,).
    x0_mse, eps_mse: (B, N), squared errors of the prediction at the same x_t.
    """

    total: Tensor
    prior: Tensor
    vb: Tensor
    x0_mse: Tensor
    eps_mse: Tensor


def bits_per_dim(
    denoise: Denoise,
    x0: Tensor,
    path: Path,
    noise: Noise,
    *,
    cond: Cond = None,
    variance: Variance | None = None,
    decoder: Decoder = "exact",
) -> BitsPerDim:
    """The whole variational bound (Ho et al. 2020, eq. 5), estimated with one noise a step.

    x0: (B, C, H, W), 8-bit images in [-1, 1]. path: all the steps of the process, `schedule.path(T, "trailing")`; the
    bound is that of the process with the path's steps. noise(k): that of step k. denoise: clipped, as in sampling.
    LimnerError for a path that stops short of the clean image.
    """
    if path[-1].sigma > 0:
        raise LimnerError("bits per dim: the path stops short of the clean image; use spacing 'trailing'")
    terms: list[tuple[Tensor, Tensor, Tensor]] = []
    for k, knot in enumerate(path[:-1]):
        eps = noise(k)
        x_t = knot.alpha * x0 + knot.sigma * eps
        out = denoise(x_t, torch.tensor(knot.t, dtype=torch.float64), cond)
        vb = vlb_term(x0, x_t, out, path, torch.full((len(x0),), k), variance, decoder)
        guess = (x_t - knot.alpha * out.x0) / knot.sigma
        terms.append((vb, _per_image_mean((out.x0 - x0) ** 2), _per_image_mean((guess - eps) ** 2)))
    vb, x0_mse, eps_mse = (torch.stack(column, dim=1) for column in zip(*terms, strict=True))
    start = path[0]
    kl = 0.5 * ((start.alpha * x0) ** 2 + start.sigma**2 - 1) - math.log(start.sigma)
    prior = _per_image_mean(kl) / math.log(2)
    return BitsPerDim(vb.sum(dim=1) + prior, prior, vb, x0_mse, eps_mse)


class ImportanceTimes:
    """Steps drawn in proportion to sqrt(E[loss^2]), Nichol & Dhariwal 2021 (2102.09672), eq. 18, for training on L_vlb.

    Uniform until every step has `history` losses; after that the last `history` of each count, and a share `uniform`
    of the probability is spread evenly. Its state is part of a checkpoint. Processes that train together should each
    `update` with the losses of all, in one order, so that they stay equal.
    """

    def __init__(self, path: Path, history: int = 10, uniform: float = 0.001) -> None:
        self.path, self.uniform = path, uniform
        self.losses = torch.full((path.steps, history), math.nan, dtype=torch.float64)

    def probabilities(self) -> Tensor:
        """(N,), by the knots of the path."""
        steps = self.path.steps
        if bool(self.losses.isnan().any()):
            return torch.full((steps,), 1 / steps, dtype=torch.float64)
        moment = (self.losses**2).mean(dim=1).sqrt()
        return (1 - self.uniform) * moment / moment.sum() + self.uniform / steps

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n times t and the weights, 1 / (N p), that keep the mean loss unbiased: (n,) float64 each, on the CPU."""
        p = self.probabilities()
        index = torch.multinomial(p, n, replacement=True, generator=generator)
        return torch.tensor([self.path[int(k)].t for k in index], dtype=torch.float64), 1 / (self.path.steps * p[index])

    def update(self, t: Tensor, loss: Tensor) -> None:
        """The unweighted losses (n,) at times t (n,) that `draw` gave. Those that are not finite are left out."""
        for k, value in zip(self.path.index_of(t).tolist(), loss.detach().double().tolist(), strict=True):
            if math.isfinite(value):
                self.losses[k] = torch.cat([self.losses[k, 1:], self.losses.new_tensor([value])])

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self.losses.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state["losses"].shape != self.losses.shape:
            raise LimnerError(
                f"importance sampling of times: saved for {tuple(state['losses'].shape)} (steps, history), "
                f"this run has {tuple(self.losses.shape)}"
            )
        self.losses = state["losses"].clone()


def _per_image_mean(value: Tensor) -> Tensor:
    return value.flatten(1).mean(dim=1)
