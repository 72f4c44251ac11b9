"""Distances and scores against closed forms, against torchmetrics, and against their own definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from limner.evaluation import metrics


def normal(n, dim, seed=0, mean=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) * torch.as_tensor(scale) + mean


class Same(nn.Module):
    """For torchmetrics: the "picture" is its own feature vector."""

    num_features = 6

    def forward(self, x):
        return x.flatten(1)


def fd(x, y):
    return metrics.frechet_distance(metrics.gaussian(x), metrics.gaussian(y))


# --- moments ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=2, max_size=6))
@settings(max_examples=20, deadline=None)
def test_streaming_moments_are_those_of_the_whole(sizes):
    x = normal(sum(sizes), 5, seed=sum(sizes), mean=100.0)
    streamed, halves = metrics.Moments(), [metrics.Moments(), metrics.Moments()]
    for k, part in enumerate(x.split(sizes)):
        streamed.update(part.float() if k < 0 else part)
        halves[k % 2].update(part)
    halves[0].merge(halves[1])
    for moments in (streamed, halves[0]):
        np.testing.assert_allclose(moments.gaussian().mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.gaussian().covariance, np.cov(x.numpy().T), atol=1e-10)
    assert streamed.n == len(x)


def test_merging_nothing_changes_nothing():
    moments = metrics.Moments()
    moments.update(normal(10, 3))
    before = moments.gaussian()
    moments.merge(metrics.Moments())
    assert torch.equal(before.covariance, moments.gaussian().covariance)


# --- Fréchet distance -------------------------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_in_closed_form():
    a = metrics.Gaussian(torch.tensor([1.0, 2.0, 3.0]).double(), torch.diag(torch.tensor([4.0, 9.0, 0.0]).double()), 10)
    b = metrics.Gaussian(torch.tensor([0.0, 2.0, 5.0]).double(), torch.diag(torch.tensor([1.0, 1.0, 1.0]).double()), 10)
    assert metrics.frechet_distance(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 1) ** 2 + 1)


def test_frechet_distance_of_covariances_that_do_not_commute():
    x, y = normal(300, 6) @ normal(6, 6, 3), normal(200, 6, 1, mean=0.3) @ normal(6, 6, 4)
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert fd(x, y) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_equals_torchmetrics():
    x, y = normal(120, 6, 1, mean=0.4).float(), normal(150, 6, 2, scale=1.5).float()
    theirs = FrechetInceptionDistance(feature=Same(), normalize=True, input_img_size=(1, 1, 6))
    theirs.set_dtype(torch.float64)
    theirs.update(y.view(-1, 1, 1, 6), real=True)
    theirs.update(x.view(-1, 1, 1, 6), real=False)
    assert fd(x, y) == pytest.approx(float(theirs.compute()), rel=1e-5)


@pytest.mark.parametrize("n", [400, 8])
def test_frechet_distance_of_a_set_to_itself_is_zero(n):
    x = normal(n, 24, mean=3.0)
    assert fd(x, x) == pytest.approx(0, abs=1e-8)
    assert metrics.frechet_interval(metrics.gaussian(x), metrics.gaussian(x), x).value == pytest.approx(0, abs=1e-8)


def test_noise_raises_the_frechet_distance_step_by_step():
    x, noise = normal(500, 10), normal(500, 10, 1)
    values = [fd(x + level * noise, x) for level in (0, 0.1, 0.3, 0.6, 1.0, 2.0)]
    assert values == sorted(values)
    assert values[-1] > 1


@pytest.mark.parametrize(("n", "dim"), [(150, 5), (24, 40)])
def test_the_frechet_interval_covers_the_figure_of_other_draws(n, dim):
    reference = metrics.gaussian(normal(2000, dim, 999, mean=0.5, scale=1.3))
    draws = [normal(n, dim, seed) for seed in range(200)]
    estimates = [metrics.frechet_interval(metrics.gaussian(x), reference, x) for x in draws]
    expected = np.mean([e.value for e in estimates])
    covered = np.mean([e.low <= expected <= e.high for e in estimates])
    assert 0.89 <= covered <= 0.99


def test_the_interval_keeps_the_value_and_shrinks_with_the_samples():
    reference = metrics.gaussian(normal(1000, 6, 5))
    wide, narrow = (normal(n, 6, 1, mean=0.5) for n in (100, 1600))
    a, b = (metrics.frechet_interval(metrics.gaussian(x), reference, x) for x in (wide, narrow))
    assert a.value == pytest.approx(metrics.frechet_distance(metrics.gaussian(wide), reference))
    assert (a.high - a.low) / (b.high - b.low) == pytest.approx(4, rel=0.35)


def test_extrapolation_removes_most_of_the_bias():
    reference = metrics.Gaussian(torch.zeros(20).double(), torch.eye(20).double(), 10**9)
    truth = 20 * (1.5 - 1) ** 2
    plain, extrapolated = [], []
    for seed in range(12):
        x = normal(300, 20, seed, scale=1.5)
        plain.append(metrics.frechet_distance(metrics.gaussian(x), reference) - truth)
        extrapolated.append(metrics.fd_infinity(x, reference) - truth)
    assert np.mean(plain) > 0.5
    assert abs(np.mean(extrapolated)) < 0.35 * np.mean(plain)


# --- kernel distance --------------------------------------------------------------------------------------------


def test_kid_equals_torchmetrics_and_its_definition():
    x, y = normal(60, 6, 1, mean=0.4).float(), normal(60, 6, 2).float()
    theirs = KernelInceptionDistance(feature=Same(), subsets=1, subset_size=60, normalize=True)
    theirs.update(y.view(-1, 1, 1, 6), real=True)
    theirs.update(x.view(-1, 1, 1, 6), real=False)
    value = metrics.kid(x, y).value
    assert value == pytest.approx(float(theirs.compute()[0]), rel=1e-4)
    kernel = lambda a, b: (a.double() @ b.double().T / 6 + 1) ** 3  # noqa: E731
    within = [(k.sum() - k.trace()) / (60 * 59) for k in (kernel(x, x), kernel(y, y))]
    assert value == pytest.approx(float(sum(within) - 2 * kernel(x, y).mean()), rel=1e-6)


def test_kid_does_not_depend_on_its_blocks():
    x, y = normal(70, 6, 1, mean=0.4), normal(50, 6, 2)
    assert metrics.kid(x, y, block=7).value == pytest.approx(metrics.kid(x, y).value, rel=1e-7)


def test_kid_is_unbiased():
    """The size of the sets must not matter: small ones average to what large ones say."""
    large = np.mean([metrics.kid(normal(400, 4, s, mean=0.5), normal(400, 4, 900 + s)).value for s in range(10)])
    small = np.mean([metrics.kid(normal(40, 4, s, mean=0.5), normal(40, 4, 900 + s)).value for s in range(200)])
    assert small == pytest.approx(large, rel=0.15)
    equal = [metrics.kid(normal(60, 4, s), normal(60, 4, 900 + s)).value for s in range(80)]
    assert min(equal) < 0 < max(equal)
    assert abs(np.mean(equal)) < 3 * np.std(equal) / np.sqrt(80)


def test_the_kid_interval_covers_the_figure_of_other_draws():
    reference = normal(300, 4, 77)
    estimates = [metrics.kid(normal(80, 4, s, mean=0.5), reference) for s in range(200)]
    centre = np.mean([e.value for e in estimates])
    assert 0.88 <= np.mean([e.low <= centre <= e.high for e in estimates]) <= 0.99


def test_kid_of_subsets_is_about_that_of_all():
    x, y = normal(300, 6, 1, mean=0.4), normal(300, 6, 2)
    mean, deviation = metrics.kid_subsets(x, y, subsets=40, size=60)
    assert mean == pytest.approx(metrics.kid(x, y).value, rel=0.25)
    assert deviation > 0
    assert metrics.kid_subsets(x, y, subsets=2, size=10**6)[0] == pytest.approx(metrics.kid(x, y).value, rel=1e-6)


# --- scores -----------------------------------------------------------------------------------------------------


def test_the_score_equals_torchmetrics():
    logits = normal(200, 6, scale=2.0).float()
    theirs = InceptionScore(feature=Same(), splits=1)
    theirs.update(logits.view(-1, 1, 1, 6))
    assert metrics.inception_score(logits, splits=1).value == pytest.approx(float(theirs.compute()[0]), rel=1e-5)


def test_the_score_in_closed_form():
    certain = 200 * torch.eye(5).repeat(40, 1)
    assert metrics.inception_score(certain, splits=8).value == pytest.approx(5)
    assert metrics.inception_score(torch.zeros(200, 5)).value == pytest.approx(1)
    assert metrics.inception_score(certain[:1].expand(200, 5)).value == pytest.approx(1)


def test_the_streamed_score_is_that_of_the_whole():
    logits = normal(230, 7, scale=2.0)
    whole, parts, halves = metrics.ScoreSums(), metrics.ScoreSums(), [metrics.ScoreSums(), metrics.ScoreSums()]
    whole.update(logits)
    for part in logits.split(33):
        parts.update(part)
    halves[0].update(logits[:100])
    halves[1].update(logits[100:])
    halves[0].merge(halves[1])
    np.testing.assert_allclose(parts.scores(), whole.scores(), rtol=1e-12)
    np.testing.assert_allclose(halves[0].scores(), whole.scores(), rtol=1e-12)
    estimate = whole.estimate()
    assert estimate.low < estimate.value < estimate.high


# --- shares, means, colours -------------------------------------------------------------------------------------


def test_wilson_intervals_hold_at_the_ends():
    none, some = metrics.share(np.zeros(20, bool)), metrics.share(np.arange(100) < 30)
    assert none.value == 0
    assert none.low == 0
    assert none.high == pytest.approx(0.1611, abs=1e-4)
    assert (some.low, some.high) == (pytest.approx(0.2189, abs=1e-4), pytest.approx(0.3959, abs=1e-4))


@pytest.mark.parametrize("estimator", [metrics.bootstrap_mean, metrics.bootstrap_median])
def test_bootstrap_intervals_cover(estimator):
    generator = np.random.default_rng(0)
    estimates = [estimator(generator.normal(3, 2, 120), replicates=200, seed=s) for s in range(150)]
    assert 0.88 <= np.mean([e.low <= 3 <= e.high for e in estimates]) <= 0.99


def test_wilson_intervals_cover():
    generator = np.random.default_rng(1)
    estimates = [metrics.share(generator.random(80) < 0.2) for _ in range(400)]
    assert 0.91 <= np.mean([e.low <= 0.2 <= e.high for e in estimates]) <= 0.99


def test_colours_are_those_of_all_pixels():
    x = np.random.default_rng(0).integers(0, 256, (9, 4, 5, 3), dtype=np.uint8)
    sums, other = metrics.ColourSums(), metrics.ColourSums()
    sums.update(x[:4])
    other.update(x[4:])
    sums.merge(other)
    np.testing.assert_allclose(sums.mean, x.mean((0, 1, 2)))
    np.testing.assert_allclose(sums.std, x.std((0, 1, 2)))
