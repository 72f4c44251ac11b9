"""The closed form: a labelled Gaussian mixture, whose denoiser, posterior and samples are known exactly.

Images are (B, 2, 1, 1), float64. For x_t = alpha x0 + sigma eps, x0 from sum_k w_k N(mu_k, v_k I), component k of x_t
is N(alpha mu_k, (alpha^2 v_k + sigma^2) I), and everything else follows by Bayes' rule.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from limner.core.path import Path
from limner.core.schedule import Schedule
from limner.core.types import Cond, Denoise, Denoised, LogProb


class Mixture:
    """Five components of two labels; label 0 has two of them, unequal, label 1 has three, of another width."""

    means = torch.tensor([[-0.7, -0.2], [0.3, 0.8], [0.6, -0.6], [-0.5, 0.6], [0.9, 0.3]], dtype=torch.float64)
    variances = torch.tensor([0.04, 0.09, 0.02, 0.05, 0.04], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.15, 0.2, 0.25, 0.1], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 1])

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def joint(self, x: Tensor, t: Tensor) -> Tensor:
        """log p(x_t, k), (B, K)."""
        alpha, sigma = self.schedule.alpha(t).reshape(-1, 1), self.schedule.sigma(t).reshape(-1, 1)
        variance = alpha**2 * self.variances + sigma**2
        squares = ((x.flatten(1)[:, None] - alpha[..., None] * self.means) ** 2).sum(dim=-1)
        return self.weights.log() - squares / (2 * variance) - torch.log(2 * math.pi * variance)

    def denoise(self, x: Tensor, t: Tensor, cond: Cond = None, /) -> Denoised:
        """E[x0 | x_t, y]; cond: a label, labels (B,), or None for E[x0 | x_t]."""
        alpha, sigma = self.schedule.alpha(t).reshape(-1, 1, 1), self.schedule.sigma(t).reshape(-1, 1, 1)
        v = self.variances[:, None]
        gain = alpha * v / (alpha**2 * v + sigma**2)
        by_component = self.means + gain * (x.flatten(1)[:, None] - alpha * self.means)
        joint = self.joint(x, t)
        if cond is not None:
            joint = joint.masked_fill(self.labels != torch.as_tensor(cond).reshape(-1, 1), -math.inf)
        x0 = (joint.softmax(dim=1)[..., None] * by_component).sum(dim=1)
        return Denoised(x0.reshape(x.shape))

    def log_prob(self, label: int) -> LogProb:
        """log p(y | x_t) of one label."""

        def log_prob(x: Tensor, t: Tensor) -> Tensor:
            joint = self.joint(x, t)
            return joint[:, self.labels == label].logsumexp(dim=1) - joint.logsumexp(dim=1)

        return log_prob

    def sample(self, n: int, seed: int, label: int | None = None) -> Tensor:
        """n draws of p(x) or p(x | y)."""
        generator = torch.Generator().manual_seed(seed)
        weights = self.weights if label is None else self.weights * (self.labels == label)
        k = torch.multinomial(weights, n, replacement=True, generator=generator)
        z = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return (self.means[k] + self.variances[k].sqrt()[:, None] * z).reshape(n, 2, 1, 1)


def integrated_ode(denoise: Denoise, schedule: Schedule, x: Tensor, path: Path, cond: Cond = None) -> Tensor:
    """The probability-flow ODE dy/du = y - D(alpha y), y = x / alpha, u = log(sigma / alpha), from the path's first
    knot to its last noisy one, by an eighth-order Runge-Kutta method at tolerance 1e-10; then the data prediction
    there, which is what every sampler's last step returns."""

    def slope(u: float, flat: np.ndarray) -> np.ndarray:
        y = torch.from_numpy(flat).reshape(x.shape)
        t = schedule.t_of_log_snr(torch.tensor(-2 * u, dtype=torch.float64))
        return (y - denoise(schedule.alpha(t) * y, t, cond).x0).flatten().numpy()

    start, end = path[0], path[-2]
    span = (-start.log_snr / 2, -end.log_snr / 2)
    solved = solve_ivp(slope, span, (x / start.alpha).flatten().numpy(), method="DOP853", rtol=1e-10, atol=1e-10)
    y = torch.from_numpy(solved.y[:, -1]).reshape(x.shape)
    return denoise(end.alpha * y, torch.tensor(end.t, dtype=torch.float64), cond).x0


def integrated_sde(denoise: Denoise, schedule: Schedule, x: Tensor, path: Path, steps: int, seed: int) -> Tensor:
    """The reverse SDE dy = 2 (y - D(alpha y)) du + sqrt(2) s dW, s = exp(u), u falling, between the same knots, by
    Euler-Maruyama with many steps; then the data prediction."""
    generator = torch.Generator().manual_seed(seed)
    start, end = path[0], path[-2]
    us = np.linspace(-start.log_snr / 2, -end.log_snr / 2, steps + 1)
    y = x / start.alpha
    for u, following in pairwise(us):
        t = schedule.t_of_log_snr(torch.tensor(-2 * u, dtype=torch.float64))
        drift = 2 * (y - denoise(schedule.alpha(t) * y, t).x0)
        noise = torch.randn(y.shape, generator=generator, dtype=y.dtype)
        y = y + (following - u) * drift + math.exp(u) * math.sqrt(2 * (u - following)) * noise
    return denoise(end.alpha * y, torch.tensor(end.t, dtype=torch.float64)).x0


def energy_p_value(a: Tensor, b: Tensor, *, permutations: int = 199, seed: int = 0) -> float:
    """Two-sample test by energy distance (Szekely & Rizzo 2013): the p-value of "a and b have one distribution".

    Its power for mixtures as above, 1,000 against 1,000, at p < 0.02: `test_two_sample_test_has_power`.
    """
    pooled = torch.cat([a, b]).flatten(1)
    distances = torch.cdist(pooled, pooled)
    generator = torch.Generator().manual_seed(seed)
    side = torch.ones(len(pooled), permutations + 1, dtype=torch.float64)
    side[len(a) :, 0] = -1
    for k in range(1, permutations + 1):
        side[:, k] = side[torch.randperm(len(pooled), generator=generator), 0]
    energies = -(side * (distances @ side)).sum(dim=0)  # up to constants, for equal sizes
    return float((energies >= energies[0]).double().mean())
