"""Prediction conversions, loss weights, the network as a denoiser, the variance of a DDPM step."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limner.core.denoiser import network_denoiser, network_time, posterior, step_log_variance
from limner.core.prediction import KINDS, WEIGHTINGS, from_x0, target, to_eps, to_x0, weight
from limner.core.schedule import CosineSchedule, LinearSchedule, RectifiedFlowSchedule
from limner.errors import LimnerError

CLEAN, NOISE = (1.0, 0.0), (0.0, 1.0)
knots = st.one_of(
    st.floats(0.01, 0.99).map(lambda t: (math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t))),
    st.floats(0.01, 0.99).map(lambda t: (1 - t, t)),
)
numbers = st.floats(-3, 3)


def image(value: float) -> torch.Tensor:
    return torch.tensor([[[[value, -value], [0.5 * value, 1.0]]]], dtype=torch.float64)


@settings(max_examples=100, deadline=None)
@given(knot=knots, clean=numbers, noise=numbers, kind=st.sampled_from(KINDS))
def test_round_trips_between_the_ends(knot, clean, noise, kind):
    alpha, sigma = knot
    x0, eps = image(clean), image(noise).flip(-1)
    x = alpha * x0 + sigma * eps
    raw = target(x0, eps, alpha, sigma, kind)
    torch.testing.assert_close(to_x0(raw, x, alpha, sigma, kind), x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(to_eps(raw, x, alpha, sigma, kind), eps, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(from_x0(x0, x, alpha, sigma, kind), raw, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trips_at_snr_infinity(kind):
    x0, eps = image(0.7), image(-1.3)
    raw = target(x0, eps, *CLEAN, kind)
    assert torch.equal(to_x0(raw, x0, *CLEAN, kind), x0)
    if kind == "sample":
        with pytest.raises(LimnerError, match="says nothing of the noise"):
            to_eps(raw, x0, *CLEAN, kind)
    else:
        torch.testing.assert_close(to_eps(raw, x0, *CLEAN, kind), eps)
        with pytest.raises(LimnerError, match="says nothing of the noise"):
            from_x0(x0, x0, *CLEAN, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trips_at_snr_zero(kind):
    x0, eps = image(0.7), image(-1.3)
    raw = target(x0, eps, *NOISE, kind)
    torch.testing.assert_close(to_eps(raw, eps, *NOISE, kind), eps)
    torch.testing.assert_close(from_x0(x0, eps, *NOISE, kind), raw)
    if kind == "epsilon":
        with pytest.raises(LimnerError, match="alpha = 0"):
            to_x0(raw, eps, *NOISE, kind)
    else:
        torch.testing.assert_close(to_x0(raw, eps, *NOISE, kind), x0)


def test_alpha_and_sigma_by_image():
    x0, eps = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    alpha = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    raw = target(x0, eps, alpha, sigma, "v_prediction")
    torch.testing.assert_close(to_x0(raw, alpha * x0 + sigma * eps, alpha, sigma, "v_prediction"), x0)
    with pytest.raises(LimnerError, match="alpha = 0"):
        to_x0(raw, x0, alpha, sigma, "epsilon")


def test_unknown_names_are_suggested():
    x = image(1.0)
    for call in (to_x0, to_eps, target, from_x0):
        with pytest.raises(LimnerError, match="did you mean 'v_prediction'"):
            call(x, x, 0.5, 0.5, "v-prediction")  # type: ignore[arg-type]
    with pytest.raises(LimnerError, match="did you mean 'min_snr'"):
        weight(torch.zeros(1), "min-snr", "epsilon")  # type: ignore[arg-type]
    with pytest.raises(LimnerError, match="unknown prediction"):
        weight(torch.zeros(1), "min_snr", "eps")  # type: ignore[arg-type]


# --- weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_finite_everywhere(weighting, kind):
    values = weight(torch.tensor([-math.inf, -30.0, 0.0, 30.0, math.inf]), weighting, kind)
    assert values.isfinite().all()
    assert (values >= 0).all()


def test_weights_follow_the_papers():
    log_snr = torch.linspace(-8, 8, 33, dtype=torch.float64)
    snr = log_snr.exp()
    expected = {
        ("min_snr", "epsilon"): snr.clamp(max=5) / snr,
        ("min_snr", "v_prediction"): snr.clamp(max=5) / (snr + 1),
        ("min_snr", "sample"): snr.clamp(max=5),
        ("truncated_snr", "sample"): snr.clamp(min=1),
        ("truncated_snr", "v_prediction"): snr.clamp(min=1) / (snr + 1),
        ("sigmoid", "epsilon"): torch.sigmoid(-2 - log_snr),
    }
    for (weighting, kind), value in expected.items():
        torch.testing.assert_close(weight(log_snr, weighting, kind, bias=-2.0), value)  # type: ignore[arg-type]
    assert (weight(log_snr, "simple", "flow") == 1).all()


@pytest.mark.parametrize("weighting", ["truncated_snr", "min_snr", "sigmoid"])
@pytest.mark.parametrize("t", [0.1, 0.4, 0.8])
def test_a_weighting_is_one_loss_whatever_the_network_predicts(weighting, t):
    """The weighted squared error of the raw output is the same number for all kinds."""
    for schedule, kinds in ((CosineSchedule(), KINDS), (RectifiedFlowSchedule(), ("epsilon", "sample", "flow"))):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x0, eps, wrong = image(0.3), image(1.1).flip(-1), image(0.45)
        x = alpha * x0 + sigma * eps
        losses = []
        for kind in kinds:
            error = from_x0(wrong, x, alpha, sigma, kind) - target(x0, eps, alpha, sigma, kind)
            losses.append(weight(schedule.log_snr(t), weighting, kind) * (error**2).mean())
        torch.testing.assert_close(torch.stack(losses), losses[0].expand(len(losses)), rtol=1e-9, atol=0)


# --- denoiser ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_denoiser_of_a_perfect_network_returns_the_image(kind):
    schedule = CosineSchedule()
    x0, eps = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    alpha, sigma = (f(t).float().reshape(2, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
    seen = {}

    def network(x, time, cond):
        seen.update(time=time, cond=cond)
        return target(x0, eps, alpha, sigma, kind)

    out = network_denoiser(network, schedule, kind)(alpha * x0 + sigma * eps, t, "a cat")
    torch.testing.assert_close(out.x0, x0, rtol=1e-4, atol=1e-5)
    assert out.variance_fraction is None
    assert seen["cond"] == "a cat"
    assert seen["time"].dtype == torch.float32
    torch.testing.assert_close(seen["time"], t.float())


def test_steps_reach_the_network_as_whole_numbers():
    schedule = LinearSchedule()
    for knot in schedule.path(1000, "trailing")[:-1]:
        time = network_time(torch.tensor(knot.t, dtype=torch.float64), 2, schedule, "step")
        assert time.tolist() == [round(knot.t * 1000) - 1] * 2
    halfway = network_time(torch.tensor(0.0305, dtype=torch.float64), 1, schedule, "step")
    assert halfway.item() == pytest.approx(29.5)


def test_learned_variance_is_a_fraction():
    def network(x, time, cond):
        return torch.cat([x, torch.full_like(x, 0.5)], dim=1)

    x = torch.randn(2, 3, 4, 4)
    schedule = LinearSchedule()
    out = network_denoiser(network, schedule, "epsilon", learned_variance=True)(x, torch.tensor(0.5))
    assert out.variance_fraction is not None
    assert (out.variance_fraction == 0.75).all()
    with pytest.raises(LimnerError, match=r"should have 3 channels"):
        network_denoiser(network, schedule, "epsilon")(x, torch.tensor(0.5))
    with pytest.raises(LimnerError, match=r"6 channels \(prediction and variance\)"):
        network_denoiser(lambda x, time, cond: x, schedule, "epsilon", learned_variance=True)(x, torch.tensor(0.5))


def test_what_cannot_be_denoised_is_refused():
    x = torch.randn(1, 3, 4, 4)
    with pytest.raises(LimnerError, match="continuous and has no steps"):
        network_denoiser(lambda x, time, cond: x, CosineSchedule(), "epsilon", time_input="step")(x, torch.tensor(0.5))
    zero = LinearSchedule(zero_terminal_snr=True)
    with pytest.raises(LimnerError, match="alpha = 0"):
        network_denoiser(lambda x, time, cond: x, zero, "epsilon")(x, torch.tensor(1.0))


# --- the variance of a step -------------------------------------------------------------------------------------


def test_posterior_is_that_of_ddpm():
    """Ho et al. 2020, eq. 6-7, by betas."""
    schedule = LinearSchedule(steps=50)
    path = schedule.path(50, "trailing")
    betas, alphas_bar = schedule.betas.tolist(), schedule.alphas_bar.tolist()
    for k, (here, there) in enumerate(path.pairs()):
        i = 49 - k
        before = alphas_bar[i - 1] if i else 1.0
        step = posterior(here, there)
        assert step.beta == pytest.approx(betas[i], rel=1e-9)
        assert step.variance == pytest.approx(betas[i] * (1 - before) / (1 - alphas_bar[i]), rel=1e-9, abs=1e-18)
        assert step.x0_weight == pytest.approx(math.sqrt(before) * betas[i] / (1 - alphas_bar[i]), rel=1e-9)
        assert step.x_weight == pytest.approx(
            math.sqrt(1 - betas[i]) * (1 - before) / (1 - alphas_bar[i]), rel=1e-9, abs=1e-18
        )


def test_posterior_by_bayes_on_rectified_flow():
    """Regression of x_s on (x_t, x0), where x_t = (alpha_t / alpha_s) x_s + noise; no variance preservation needed."""
    here, there = RectifiedFlowSchedule().knot(0.8), RectifiedFlowSchedule().knot(0.5)
    carried = here.alpha / there.alpha
    beta = here.sigma**2 - carried**2 * there.sigma**2
    precision = carried**2 / beta + 1 / there.sigma**2
    step = posterior(here, there)
    assert step.beta == pytest.approx(beta)
    assert step.variance == pytest.approx(1 / precision)
    assert step.x_weight == pytest.approx(carried / beta / precision)
    assert step.x0_weight == pytest.approx(there.alpha / there.sigma**2 / precision)


def test_posterior_at_the_ends():
    noise, clean, middle = (LinearSchedule(zero_terminal_snr=True).knot(t) for t in (1.0, 0.0, 0.5))
    assert posterior(noise, middle) == pytest.approx((0.0, middle.alpha, middle.sigma**2, 1.0))
    assert posterior(middle, clean) == pytest.approx((0.0, 1.0, 0.0, middle.sigma**2))
    assert posterior(noise, clean) == pytest.approx((0.0, 1.0, 0.0, 1.0))


def test_step_log_variance_interpolates_and_stays_finite():
    path = LinearSchedule().path(10, "trailing")
    here, there = path[3], path[4]
    small, large = math.log(posterior(here, there).variance), math.log(posterior(here, there).beta)
    assert float(step_log_variance(here, there, "small")) == pytest.approx(small)
    assert float(step_log_variance(here, there, "large")) == pytest.approx(large)
    quarter = step_log_variance(here, there, torch.full((1, 1, 1, 1), 0.25, dtype=torch.float64))
    assert float(quarter) == pytest.approx(0.75 * small + 0.25 * large)
    last = math.log(posterior(path[8], path[9]).variance)
    for kind in ("small", "large"):
        assert float(step_log_variance(path[9], path[10], kind, before=path[8])) == pytest.approx(last)
    assert math.isfinite(step_log_variance(path[9], path[10], "small"))
