"""How far apart two sets of features lie. Arrays in, numbers out; sums in float64, streaming where a sum will do.

Features are (N, D), logits (N, K); torch tensors or numpy arrays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import stdtrit
from torch import Tensor

Array = Tensor | npt.NDArray[np.generic]
Z95 = 1.959963984540054
"""Half width of a 95% interval in standard errors."""


class Estimate(NamedTuple):
    """A number and its 95% interval."""

    value: float
    low: float
    high: float


# --- Fréchet distance -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and unbiased covariance (D, D) of n feature vectors, float64."""

    mean: Tensor
    covariance: Tensor
    n: int

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance."""
        values, vectors = self._eigen
        return (vectors * values.clamp_min(0).sqrt()) @ vectors.T

    @cached_property
    def inverse_root(self) -> Tensor:
        """The pseudo-inverse of `root`, directions without variance left out."""
        values, vectors = self._eigen
        kept = values > values[-1].clamp_min(0) * len(values) * torch.finfo(torch.float64).eps
        return (vectors[:, kept] / values[kept].sqrt()) @ vectors[:, kept].T

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.covariance)
        return values, vectors


class Moments:
    """Mean and covariance of features that come in batches; memory does not grow with their number."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, features: Array) -> None:
        """Add a batch (B, D)."""
        x = _float64(features)
        mean = x.mean(0)
        centred = x - mean
        self._add(len(x), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Add what another process has seen."""
        if other.n:
            self._add(other.n, other.mean, other.scatter)

    def gaussian(self) -> Gaussian:
        """What was seen so far; at least two vectors."""
        return Gaussian(self.mean, self.scatter / (self.n - 1), self.n)

    def _add(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        """Chan, Golub & LeVeque 1983, eq. 2.1: pairwise update, no cancellation."""
        if not self.n:
            self.n, self.mean, self.scatter = n, mean.clone(), scatter.clone()
            return
        shift, total = mean - self.mean, self.n + n
        self.scatter += scatter
        self.scatter.addr_(shift, shift, alpha=self.n * n / total)
        self.mean = self.mean + shift * (n / total)
        self.n = total


def gaussian(features: Array) -> Gaussian:
    """Mean and covariance of features (N, D)."""
    moments = Moments()
    moments.update(features)
    return moments.gaussian()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), the squared 2-Wasserstein distance of two Gaussians
    (Dowson & Landau 1982; Heusel et al. 2017, arXiv:1706.08500, eq. 6).

    The last trace is the sum of the singular values of A^1/2 B^1/2, which is exact for singular covariances too.
    """
    shared = torch.linalg.svdvals(a.root @ b.root).sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * shared
    return max(0.0, float((a.mean - b.mean).square().sum() + spread))


def frechet_interval(a: Gaussian, b: Gaussian, features: Array) -> Estimate:
    """Fréchet distance with a 95% interval over the draw of a's samples; b is held fixed.

    `features`: a's own, or a random part of them. The interval is the infinitesimal jackknife's (Efron 1982): the
    spread of each sample's influence 2 (mu_a - mu_b) d + d (I - T) d - tr((I - T) A), d = x - mu_a, where T is the
    optimal transport map of a to b. It says how the figure moves between draws of the same size; the bias that every
    Fréchet distance has at finite n is not in it (see `fd_infinity`).
    """
    left, singular, right = torch.linalg.svd(a.root @ b.root)
    spread = a.covariance.trace() + b.covariance.trace() - 2 * singular.sum()
    value = max(0.0, float((a.mean - b.mean).square().sum() + spread))
    d = _float64(features) - a.mean
    transported = d @ (a.inverse_root @ left @ right @ b.root)
    influence = 2 * d @ (a.mean - b.mean) + (d * (d - transported)).sum(1)
    error = float(influence.std()) / math.sqrt(a.n)
    return Estimate(value, max(0.0, value - Z95 * error), value + Z95 * error)


def fd_infinity(features: Array, reference: Gaussian, *, points: int = 5, seed: int = 0) -> float:
    """Fréchet distance extrapolated to infinitely many samples (Chong & Forsyth 2020, arXiv:1911.07023): a line in
    1/n through the distances of random subsets of n in [N/2, N] samples, read off at 0. b keeps its own finite size.
    """
    x = _float64(features)
    generator = torch.Generator().manual_seed(seed)
    sizes = np.unique(np.linspace(max(2, len(x) // 2), len(x), points).astype(int))
    distances = []
    for size in sizes:
        part = gaussian(x[torch.randperm(len(x), generator=generator)[: int(size)]])
        # The same sum of singular values as in `frechet_distance`, of one product: quicker, exact to half the digits.
        shared = torch.linalg.eigvalsh(reference.root @ part.covariance @ reference.root).clamp_min(0).sqrt().sum()
        spread = part.covariance.trace() + reference.covariance.trace() - 2 * shared
        distances.append(float((part.mean - reference.mean).square().sum() + spread))
    if len(sizes) < 2:
        return distances[0]
    _, intercept = np.polyfit(1 / sizes, distances, 1)
    return float(intercept)


# --- kernel distance --------------------------------------------------------------------------------------------


def kid(samples: Array, reference: Array, *, block: int = 1000) -> Estimate:
    """Unbiased squared MMD with the kernel (x y / D + 1)^3 (Bińkowski et al. 2018, arXiv:1801.01401), all pairs, in
    blocks; it may be slightly negative for equal distributions.

    The 95% interval is over the draw of the samples, from the first-order influence of each; the reference is fixed.
    """
    x, y = _float32(samples), _float32(reference)
    n, m = len(x), len(y)
    within_x, within_y = (_sums_within(z, block) - _kernel(z, z, paired=True) for z in (x, y))
    across = torch.cat([_sums_across(part, y, block) for part in x.split(block)])
    value = float(within_x.sum() / (n * (n - 1)) + within_y.sum() / (m * (m - 1)) - 2 * across.mean() / m)
    influence = 2 * (within_x / (n - 1) - across / m)
    error = float(influence.std()) / math.sqrt(n)
    return Estimate(value, value - Z95 * error, value + Z95 * error)


def kid_subsets(
    samples: Array, reference: Array, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation of `kid` over random subsets of `size`: the way published figures are given."""
    x, y = _float32(samples), _float32(reference)
    size = min(size, len(x), len(y))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        rows_x, rows_y = (torch.randperm(len(z), generator=generator)[:size] for z in (x, y))
        values.append(kid(x[rows_x], y[rows_y]).value)
    return float(np.mean(values)), float(np.std(values))


def _kernel(x: Tensor, y: Tensor, *, paired: bool = False) -> Tensor:
    """k of all pairs (N, M), or of the pairs in step (N,)."""
    dot = (x * y).sum(1) if paired else x @ y.T
    return dot.div_(x.shape[1]).add_(1).pow_(3)


def _sums_across(x: Tensor, y: Tensor, block: int) -> Tensor:
    """Sum over y of k(x, y) for each x, float64 (N,)."""
    total = torch.zeros(len(x), dtype=torch.float64)
    for part in y.split(block):
        total += _kernel(x, part).sum(1)
    return total


def _sums_within(x: Tensor, block: int) -> Tensor:
    """Sum over all of x of k(x_i, x), float64 (N,): each pair of blocks is worked out once, for both sides."""
    total = torch.zeros(len(x), dtype=torch.float64)
    for i in range(0, len(x), block):
        for j in range(i, len(x), block):
            k = _kernel(x[i : i + block], x[j : j + block])
            total[i : i + block] += k.sum(1)
            if j > i:
                total[j : j + block] += k.sum(0)
    return total


# --- Inception-style score --------------------------------------------------------------------------------------


class ScoreSums:
    """exp of the mean KL of p(class | picture) from p(class) (Salimans et al. 2016, arXiv:1606.03498), streaming.

    Pictures are dealt to `splits` parts in turn; the score is the mean of the parts' scores.
    """

    def __init__(self, splits: int = 10) -> None:
        self.splits = splits
        self.n = np.zeros(splits)
        self.seen = 0
        self.p = torch.zeros(splits, 0, dtype=torch.float64)
        self.p_log_p = torch.zeros(splits, dtype=torch.float64)

    def update(self, logits: Array) -> None:
        """Add a batch (B, K)."""
        log_p = _float64(logits).log_softmax(1)
        p = log_p.exp()
        if not self.seen:
            self.p = torch.zeros(self.splits, p.shape[1], dtype=torch.float64)
        part = (self.seen + torch.arange(len(p))) % self.splits
        self.p.index_add_(0, part, p)
        self.p_log_p.index_add_(0, part, (p * log_p).sum(1))
        self.n += np.bincount(part.numpy(), minlength=self.splits)
        self.seen += len(p)

    def merge(self, other: ScoreSums) -> None:
        """Add what another process has seen."""
        if not other.seen:
            return
        self.p = self.p + other.p if self.seen else other.p.clone()
        self.p_log_p = self.p_log_p + other.p_log_p
        self.n, self.seen = self.n + other.n, self.seen + other.seen

    def scores(self) -> npt.NDArray[np.float64]:
        """The score of each part that has pictures."""
        used = torch.from_numpy(self.n > 0)
        n = torch.from_numpy(self.n)[used]
        p, p_log_p = self.p[used] / n[:, None], self.p_log_p[used] / n
        return (p_log_p - torch.special.xlogy(p, p).sum(1)).exp().numpy()

    def estimate(self) -> Estimate:
        """Mean over the parts, and its 95% interval by Student's t."""
        scores = self.scores()
        value = float(scores.mean())
        if len(scores) < 2:
            return Estimate(value, math.nan, math.nan)
        half = float(stdtrit(len(scores) - 1, 0.975) * scores.std(ddof=1) / math.sqrt(len(scores)))
        return Estimate(value, value - half, value + half)


def inception_score(logits: Array, splits: int = 10) -> Estimate:
    """The score of logits (N, K) that are all there."""
    sums = ScoreSums(splits)
    sums.update(logits)
    return sums.estimate()


# --- colour, shares, means --------------------------------------------------------------------------------------


class ColourSums:
    """Mean and standard deviation of each channel of uint8 pictures, streaming, in 0..255."""

    def __init__(self) -> None:
        self.n = 0
        self.total = np.zeros(0)
        self.squares = np.zeros(0)

    def update(self, pictures: npt.NDArray[np.uint8]) -> None:
        """Add a batch (B, H, W, C)."""
        flat = pictures.reshape(-1, pictures.shape[-1]).astype(np.float64)
        self._add(len(flat), flat.sum(0), (flat**2).sum(0))

    def merge(self, other: ColourSums) -> None:
        """Add what another process has seen."""
        if other.n:
            self._add(other.n, other.total, other.squares)

    def _add(self, n: int, total: npt.NDArray[np.float64], squares: npt.NDArray[np.float64]) -> None:
        self.total = self.total + total if self.n else total
        self.squares = self.squares + squares if self.n else squares
        self.n += n

    @property
    def mean(self) -> list[float]:
        return [float(v) for v in self.total / self.n]

    @property
    def std(self) -> list[float]:
        return [float(v) for v in np.sqrt(np.maximum(0, self.squares / self.n - (self.total / self.n) ** 2))]


def share(hits: Array) -> Estimate:
    """Share of True, with Wilson's 95% interval, which stays honest at 0 and 1."""
    values = np.asarray(hits, dtype=bool)
    n, p = len(values), float(values.mean())
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))


def bootstrap_mean(values: Array, *, replicates: int = 1000, seed: int = 0) -> Estimate:
    """Mean with the 95% percentile bootstrap (Efron & Tibshirani 1993, chapter 13)."""
    return _bootstrap(np.asarray(values, dtype=np.float64), np.mean, replicates, seed)


def bootstrap_median(values: Array, *, replicates: int = 1000, seed: int = 0) -> Estimate:
    """Median with the 95% percentile bootstrap."""
    return _bootstrap(np.asarray(values, dtype=np.float64), np.median, replicates, seed)


def _bootstrap(values: npt.NDArray[np.float64], of, replicates: int, seed: int) -> Estimate:
    generator = np.random.default_rng(seed)
    draws = [of(values[generator.integers(0, len(values), len(values))]) for _ in range(replicates)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(float(of(values)), float(low), float(high))


def _float64(x: Array) -> Tensor:
    return torch.as_tensor(x).detach().to("cpu", torch.float64)


def _float32(x: Array) -> Tensor:
    return torch.as_tensor(x).detach().to("cpu", torch.float32)
