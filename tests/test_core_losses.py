"""Training times, the diffusion and hybrid losses, the variational bound, importance-sampled times."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from limner.core.denoiser import posterior
from limner.core.losses import (
    DiffusionLoss,
    ImportanceTimes,
    bits_per_dim,
    discretised_gaussian,
    stratified_times,
    vlb_term,
)
from limner.core.prediction import KINDS, target, weight
from limner.core.schedule import CosineSchedule, LinearSchedule, ScaledLinearSchedule
from limner.core.types import Denoised
from limner.errors import LimnerError

SCHEDULE = LinearSchedule(steps=60)
PATH = SCHEDULE.path(60, "trailing")
IMAGES = (torch.randint(0, 256, (4, 3, 4, 4), generator=torch.Generator().manual_seed(0)) / 127.5 - 1).double()
EPS = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- times ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 64])
def test_uniform_times_fall_one_in_each_stratum(n):
    t = stratified_times(n, generator())
    assert t.dtype == torch.float64
    assert sorted((t * n).long().tolist()) == list(range(n))


def test_times_are_in_random_order_and_depend_on_the_generator_alone():
    assert not torch.equal(stratified_times(64, generator()), stratified_times(64, generator()).sort().values)
    assert torch.equal(stratified_times(64, generator(3)), stratified_times(64, generator(3)))
    assert not torch.equal(stratified_times(64, generator(3)), stratified_times(64, generator(4)))


def test_each_time_alone_is_uniform():
    first = torch.stack([stratified_times(8, generator(seed))[0] for seed in range(2000)])
    counts = torch.histc(first, bins=10, min=0, max=1)
    assert float(((counts - 200) ** 2 / 200).sum()) < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001


def test_logit_normal_times():
    t = stratified_times(20_000, generator(), "logit_normal", mean=-0.5, std=0.8)
    logits = torch.logit(t)
    assert logits.mean().item() == pytest.approx(-0.5, abs=0.01)
    assert logits.std().item() == pytest.approx(0.8, abs=0.01)
    with pytest.raises(LimnerError, match="did you mean 'logit_normal'"):
        stratified_times(3, generator(), "logitnormal")  # type: ignore[arg-type]


# --- the diffusion loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", KINDS)
def test_loss_is_the_weighted_squared_error(prediction):
    schedule = CosineSchedule()
    loss = DiffusionLoss(schedule, prediction, weighting="min_snr", gamma=3.0)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    alpha, sigma = (f(t).reshape(4, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
    seen = {}

    def network(x, time, cond):
        seen.update(x=x, time=time, cond=cond)
        return target(IMAGES, EPS, alpha, sigma, prediction) + 0.1

    terms = loss(network, IMAGES, EPS, t, {"label": 3})
    torch.testing.assert_close(seen["x"], alpha * IMAGES + sigma * EPS)
    torch.testing.assert_close(seen["time"], t.float())
    assert seen["cond"] == {"label": 3}
    torch.testing.assert_close(terms.mse, torch.full((4,), 0.01, dtype=torch.float64))
    expected = 0.01 * weight(schedule.log_snr(t), "min_snr", prediction, gamma=3.0)
    torch.testing.assert_close(terms.loss, expected)
    assert terms.vb is None
    torch.testing.assert_close(terms.log_snr, schedule.log_snr(t))


def test_step_times_reach_the_network():
    times = []

    def network(x, time, cond):
        times.extend(time.tolist())
        return x

    DiffusionLoss(SCHEDULE, "epsilon", time_input="step")(network, IMAGES, EPS, torch.tensor([1, 2, 30, 60]) / 60)
    assert times == pytest.approx([0, 1, 29, 59], abs=1e-4)


def hybrid(mean_scale, v_value):
    """The hybrid loss and its gradients for a network of two numbers, one for the mean and one for the variance."""
    scale = torch.tensor(mean_scale, dtype=torch.float64, requires_grad=True)
    v = torch.tensor(v_value, dtype=torch.float64, requires_grad=True)

    def network(x, time, cond):
        return torch.cat([scale * x, v + torch.zeros_like(x)], dim=1)

    loss = DiffusionLoss(SCHEDULE, "epsilon", path=PATH, vlb_weight=0.01)
    terms = loss(network, IMAGES, EPS, torch.tensor([1, 2, 30, 60]) / 60)
    assert terms.vb is not None
    return terms, scale, v


def test_the_bound_teaches_the_variance_and_leaves_the_mean_alone():
    terms, scale, v = hybrid(0.7, 0.2)
    by_vb = torch.autograd.grad(terms.vb.sum(), (scale, v), allow_unused=True, retain_graph=True)
    assert by_vb[0] is None or by_vb[0] == 0
    assert by_vb[1] is not None
    assert by_vb[1] != 0
    by_mse = torch.autograd.grad(terms.mse.sum(), (scale, v), allow_unused=True, retain_graph=True)
    assert by_mse[0] is not None
    assert by_mse[1] is None or by_mse[1] == 0
    torch.testing.assert_close(terms.loss, terms.mse + terms.vb)


def test_times_are_moved_to_the_nearest_step():
    seen = []
    loss = DiffusionLoss(SCHEDULE, "epsilon", time_input="step", path=PATH)

    def network(x, time, cond):
        seen.extend(time.tolist())
        return torch.cat([x, x], dim=1)

    loss(network, IMAGES, EPS, torch.tensor([0.001, 0.0251, 0.5, 1.0], dtype=torch.float64))
    assert seen == [0, 1, 29, 59]


# --- the bound --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["learned", "small", "large"])
def test_terms_are_kl_divergences_and_a_likelihood(kind):
    """Against torch.distributions, step by step, from DDPM's own formulas by beta."""
    betas, alphas_bar = SCHEDULE.betas, SCHEDULE.alphas_bar
    fraction = torch.full_like(IMAGES, 0.3)
    guess = (0.9 * IMAGES).clamp(-1, 1)
    for i in (0, 1, 17, 59):
        k = 59 - i
        x_t = alphas_bar[i].sqrt() * IMAGES + (1 - alphas_bar[i]).sqrt() * EPS
        term = vlb_term(IMAGES, x_t, Denoised(guess, fraction), PATH, torch.full((4,), k), kind)
        before = alphas_bar[i - 1] if i else torch.tensor(1.0)
        on_x0 = before.sqrt() * betas[i] / (1 - alphas_bar[i])
        on_x = (1 - betas[i]).sqrt() * (1 - before) / (1 - alphas_bar[i])
        j = max(i, 1)  # at step 0, as the peer has it, the variance of step 1
        tilde = float(betas[j] * (1 - alphas_bar[j - 1]) / (1 - alphas_bar[j]))
        beta = float(betas[i])
        variance = {
            "small": tilde,
            "large": beta if i else tilde,
            "learned": math.exp(0.3 * math.log(beta) + 0.7 * math.log(tilde)),
        }[kind]
        model = Normal(on_x0 * guess + on_x * x_t, math.sqrt(variance))
        if i:
            nats = kl_divergence(Normal(on_x0 * IMAGES + on_x * x_t, math.sqrt(tilde)), model)
        else:
            upper = torch.where(IMAGES > 0.999, 1.0, model.cdf(IMAGES + 1 / 255))
            lower = torch.where(IMAGES < -0.999, 0.0, model.cdf(IMAGES - 1 / 255))
            nats = -(upper - lower).clamp(min=1e-12).log()
        torch.testing.assert_close(term, nats.flatten(1).mean(1) / math.log(2), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("decoder", ["exact", "tanh"])
def test_discretised_gaussian_sums_to_one(decoder):
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in ((0.0, 0.01), (0.37, 0.2), (-0.99, 0.05), (1.2, 0.3)):
        log_p = discretised_gaussian(levels, torch.full_like(levels, mean), torch.tensor(math.log(std)), decoder)
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_bits_per_dim_bounds_the_true_code_length_closely():
    """Gaussian data with its exact denoiser: the bound is at least -log2 p(x0), and near it with many steps."""
    mean, std = 0.1, 0.25
    data = (mean + std * torch.randn(3000, 2, 1, 1, generator=generator(), dtype=torch.float64)).clamp(-1, 1)
    x0 = ((data + 1) * 127.5).round() / 127.5 - 1
    schedule = LinearSchedule(steps=200)

    def denoise(x, t, cond=None, /):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return Denoised(mean + std**2 * alpha / (std**2 * alpha**2 + sigma**2) * (x - alpha * mean))

    def noise(k):
        return torch.randn(x0.shape, generator=generator(100 + k), dtype=torch.float64)

    truth = -(Normal(mean, std).log_prob(x0) + math.log(2 / 255)).flatten(1).mean(1) / math.log(2)
    bound = bits_per_dim(denoise, x0, schedule.path(200, "trailing"), noise, variance="large")
    assert bound.total.shape == (3000,)
    assert bound.vb.shape == bound.x0_mse.shape == bound.eps_mse.shape == (3000, 200)
    torch.testing.assert_close(bound.total, bound.vb.sum(1) + bound.prior)
    assert truth.mean() < bound.total.mean() < truth.mean() * 1.03
    worse = bits_per_dim(
        lambda x, t, cond=None, /: Denoised(denoise(x, t).x0 * 0.8), x0, schedule.path(200, "trailing"), noise
    )
    assert worse.total.mean() > bound.total.mean() * 1.1


def test_prior_is_small_when_the_path_ends_in_noise_and_not_when_it_does_not():
    def denoise(x, t, cond=None, /):
        return Denoised(torch.zeros_like(x))

    noise = lambda k: EPS  # noqa: E731
    full = bits_per_dim(denoise, IMAGES, LinearSchedule().path(10, "trailing"), noise).prior
    half = bits_per_dim(denoise, IMAGES, LinearSchedule().path(10, "trailing").truncate(0.3), noise).prior
    start = LinearSchedule().path(10, "trailing").truncate(0.3)[0]
    expected = kl_divergence(Normal(start.alpha * IMAGES, start.sigma), Normal(0.0, 1.0)).flatten(1).mean(1)
    torch.testing.assert_close(half, expected / math.log(2))
    assert (full < 1e-3).all()
    assert (half > 0.1).all()


def test_a_path_that_stops_short_has_no_bound():
    with pytest.raises(LimnerError, match="stops short"):
        bits_per_dim(
            lambda x, t, cond=None, /: Denoised(x),
            IMAGES,
            ScaledLinearSchedule().path(10, "leading+1"),
            lambda k: EPS,
        )


def test_bound_needs_the_variance_it_is_asked_for():
    with pytest.raises(LimnerError, match="no learned variance"):
        vlb_term(IMAGES, EPS, Denoised(IMAGES), PATH, torch.zeros(4, dtype=torch.long), "learned")


# --- importance-sampled times -----------------------------------------------------------------------------------


def test_importance_times_are_uniform_until_every_step_is_known():
    times = ImportanceTimes(PATH, history=2)
    every = torch.tensor([knot.t for knot in PATH[:-1]], dtype=torch.float64)
    times.update(every, torch.ones(60))
    times.update(every[:-1], torch.ones(59))
    assert torch.equal(times.probabilities(), torch.full((60,), 1 / 60, dtype=torch.float64))
    times.update(every[-1:], torch.tensor([math.nan]))
    assert torch.equal(times.probabilities(), torch.full((60,), 1 / 60, dtype=torch.float64))
    times.update(every[-1:], torch.full((1,), 9.0))
    assert times.probabilities()[-1] > 5 / 60


def test_importance_times_follow_the_second_moment_and_stay_unbiased():
    times = ImportanceTimes(PATH, history=3, uniform=0.1)
    every = torch.tensor([knot.t for knot in PATH[:-1]], dtype=torch.float64)
    for factor in (7.0, 1.0, 2.0, 3.0):  # the first is forgotten
        times.update(every, factor * (1 + every))
    root = (1 + every) * math.sqrt((1 + 4 + 9) / 3)
    torch.testing.assert_close(times.probabilities(), 0.9 * root / root.sum() + 0.1 / 60)
    t, weights = times.draw(200_000, generator())
    index = PATH.index_of(t)
    frequency = torch.bincount(index, minlength=60) / 200_000
    torch.testing.assert_close(frequency.double(), times.probabilities(), atol=2e-3, rtol=0)
    assert (weights * t).mean().item() == pytest.approx(float(every.mean()), rel=5e-3)


def test_importance_times_are_part_of_a_checkpoint():
    times, other = ImportanceTimes(PATH), ImportanceTimes(PATH)
    for seed in range(30):
        times.update(times.draw(40, generator(seed))[0], torch.rand(40, generator=generator(seed)))
    other.load_state_dict(times.state_dict())
    assert torch.equal(times.draw(10, generator())[0], other.draw(10, generator())[0])
    torch.testing.assert_close(times.losses, other.losses, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(LimnerError, match=r"saved for \(60, 10\)"):
        ImportanceTimes(LinearSchedule().path(50)).load_state_dict(times.state_dict())


def test_posterior_table_agrees_with_the_samplers():
    """vlb_term of a perfect prediction with the small variance is zero: q and p are one."""
    for k in (0, 30, 58):
        x_t = PATH[k].alpha * IMAGES + PATH[k].sigma * EPS
        term = vlb_term(IMAGES, x_t, Denoised(IMAGES), PATH, torch.full((4,), k), "small")
        assert term.abs().max() < 1e-12
        assert posterior(PATH[k], PATH[k + 1]).variance > 0
