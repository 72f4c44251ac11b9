"""Guidance against Bayes' rule and the integrated guided processes, and each wrapper against its paper's algebra."""

import math
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from limner.core import guidance
from limner.core.guidance import ClassifierGradient
from limner.core.noise import initial_noise
from limner.core.prediction import from_x0, to_x0
from limner.core.samplers import SAMPLERS, ddim, ddpm
from limner.core.schedule import CosineSchedule, LinearSchedule, RectifiedFlowSchedule
from limner.core.types import Denoised
from limner.errors import LimnerError
from mixture import Mixture, energy_p_value, integrated_ode, integrated_sde

LINEAR = LinearSchedule()
MIXTURE = Mixture(LINEAR)
TIMES = [0.02, 0.2, 0.5, 0.8, 1.0]


def t64(t):
    return torch.tensor(t, dtype=torch.float64)


def noise(n, seed=0):
    return initial_noise(seed, range(n), (2, 1, 1), dtype=torch.float64)


def step_noise(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda k: torch.randn((n, 2, 1, 1), generator=generator, dtype=torch.float64)


class Counted:
    """A denoiser of random images that depends on x, t and the condition (a float), and counts its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, cond=None, /):
        self.calls.append((len(x), cond))
        shift = torch.as_tensor(0.0 if cond is None else cond).reshape(-1, 1, 1, 1)
        x0 = torch.tanh(x * (1 + shift) + shift + 0.1 * t.reshape(-1, 1, 1, 1))
        return Denoised(x0, variance_fraction=x0 * 0 + shift)


IMAGES = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
HALF = t64(0.5)


# --- classifier guidance, Algorithm 2 ---------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [LINEAR, CosineSchedule(), RectifiedFlowSchedule()])
@pytest.mark.parametrize("t", [0.02, 0.2, 0.5, 0.8, 0.99])
def test_algorithm_2_at_scale_one_is_bayes_rule(schedule, t):
    """The unconditional denoiser with the exact classifier is the conditional denoiser."""
    mixture = Mixture(schedule)
    guided = guidance.classifier(mixture.denoise, mixture.log_prob(1), 1.0, schedule)
    x = noise(64)
    torch.testing.assert_close(guided(x, t64(t)).x0, mixture.denoise(x, t64(t), 1).x0, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "ddpm"])
def test_algorithm_2_at_scale_one_draws_the_conditional_distribution(name):
    guided = guidance.classifier(MIXTURE.denoise, MIXTURE.log_prob(1), 1.0, LINEAR)
    steps = {"ddim": 100, "euler": 100, "ddpm": 200}.get(name, 40)
    drawn = SAMPLERS[name](guided, noise(800), LINEAR.path(steps), noise=step_noise(800))
    assert energy_p_value(drawn, MIXTURE.sample(800, 1, label=1)) > 0.02
    assert energy_p_value(drawn, MIXTURE.sample(800, 1)) < 0.01


GUIDED = {
    "classifier, s = 3": guidance.classifier(MIXTURE.denoise, MIXTURE.log_prob(1), 3.0, LINEAR),
    "classifier-free, s = 2": guidance.bind(guidance.classifier_free(MIXTURE.denoise, 2.0), 1),
    "both": guidance.classifier(
        guidance.bind(guidance.classifier_free(MIXTURE.denoise, 2.0), 1), MIXTURE.log_prob(1), 1.0, LINEAR
    ),
}


@lru_cache
def truth(guided):
    return integrated_ode(GUIDED[guided], LINEAR, noise(24), LINEAR.path(16))


@pytest.mark.parametrize("guided", GUIDED)
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 3)])
def test_guided_samplers_converge_to_the_integrated_guided_ode_at_their_order(guided, name, order):
    errors = [
        (SAMPLERS[name](GUIDED[guided], noise(24), LINEAR.path(n)) - truth(guided)).abs().median().item()
        for n in (64, 128)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)
    assert errors[1] < {1: 2e-2, 2: 1e-3, 3: 3e-4}[order]


# --- classifier guidance, Algorithm 1 ---------------------------------------------------------------------------


def test_algorithm_1_moves_the_mean_by_the_variance_times_the_gradient():
    path = LINEAR.path(10, "trailing").truncate(0.5)
    gradient = ClassifierGradient(MIXTURE.log_prob(1), 3.0)
    x = noise(8)
    first = {}
    for name, given in (("plain", None), ("guided", gradient)):

        def keep(step, name=name):
            first.setdefault(name, step)

        ddpm(MIXTURE.denoise, x, path, noise=lambda k: torch.zeros_like(x), gradient=given, on_step=keep)
    here, there = path[0], path[1]
    beta = 1 - here.alpha**2 / there.alpha**2
    variance = beta * there.sigma**2 / here.sigma**2
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(MIXTURE.log_prob(1)(leaf, t64(here.t)).sum(), leaf)
    torch.testing.assert_close(first["guided"].x - first["plain"].x, variance * 3 * slope)
    assert torch.equal(first["guided"].x0, first["plain"].x0)


def test_algorithm_1_on_the_last_step():
    """As in guided-diffusion: beta-tilde is 0 there, and the large variance is the beta-tilde of the step before."""
    path, x, ones = LINEAR.path(5, "trailing"), noise(2), torch.ones(2, 2, 1, 1, dtype=torch.float64)
    before, here, _ = path[-3:]
    expected = {"small": 0.0, "large": (1 - before.alpha**2 / here.alpha**2) * here.sigma**2 / before.sigma**2}
    for variance, shift in expected.items():
        drawn = [
            ddpm(
                lambda x, t, cond=None, /: Denoised(torch.zeros_like(x)),
                x,
                path,
                noise=lambda k: torch.zeros_like(x),
                variance=variance,
                gradient=lambda x, t, cond, given=given: given * ones,
            )
            for given in (0.0, 1.0)
        ]
        torch.testing.assert_close(drawn[1] - drawn[0], shift * ones)  # x0 is 0: earlier shifts end with their steps


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_algorithm_1_at_scale_one_draws_the_conditional_distribution(variance):
    def denoise(x, t, cond=None, /):
        return replace(MIXTURE.denoise(x, t), variance_fraction=torch.full_like(x, 0.4))

    gradient = ClassifierGradient(MIXTURE.log_prob(1), 1.0)
    path = LINEAR.path(250)
    drawn = ddpm(denoise, noise(800), path, noise=step_noise(800), gradient=gradient, variance=variance)
    assert energy_p_value(drawn, MIXTURE.sample(800, 1, label=1)) > 0.02
    assert energy_p_value(drawn, MIXTURE.sample(800, 1)) < 0.01


def test_algorithm_1_and_2_at_scale_three_draw_from_the_integrated_tilted_process():
    """ddpm with either against the reverse SDE of the score plus 3 grad log p(y | x_t), by Euler-Maruyama."""
    tilted = guidance.classifier(MIXTURE.denoise, MIXTURE.log_prob(1), 3.0, LINEAR)
    path = LINEAR.path(300)
    expected = integrated_sde(tilted, LINEAR, noise(600, seed=5), path, 900, seed=6)
    gradient = ClassifierGradient(MIXTURE.log_prob(1), 3.0)
    first = ddpm(MIXTURE.denoise, noise(600), path, noise=step_noise(600), gradient=gradient)
    second = ddpm(tilted, noise(600), path, noise=step_noise(600))
    assert energy_p_value(first, expected) > 0.02
    assert energy_p_value(second, expected) > 0.02
    assert energy_p_value(first, MIXTURE.sample(600, 1, label=1)) < 0.01


# --- the gradient -----------------------------------------------------------------------------------------------


def test_gradient_works_in_inference_mode_and_leaves_no_graph():
    with torch.inference_mode():
        x = noise(4)
        gradient = ClassifierGradient(MIXTURE.log_prob(1), 2.0)(x, HALF)
    leaf = noise(4).requires_grad_()
    (expected,) = torch.autograd.grad(MIXTURE.log_prob(1)(leaf, HALF).sum(), leaf)
    torch.testing.assert_close(gradient, 2 * expected)
    assert not gradient.requires_grad


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_skipped_for_its_image_and_counted(poison):
    def log_prob(x, t):
        factor = torch.ones(len(x), 1, dtype=x.dtype)
        factor[1] = poison
        return (x.flatten(1) * factor).sum(dim=1)

    gradient = ClassifierGradient(log_prob, 2.0)
    result = gradient(IMAGES, HALF)
    assert (result[[0, 2]] == 2).all()
    assert (result[1] == 0).all()
    assert gradient.skipped == 1
    guided = guidance.classifier(Counted(), log_prob, 2.0, LINEAR)
    drawn = ddim(guided, IMAGES, LINEAR.path(5))
    assert drawn.isfinite().all()
    assert guided.skipped == 5


def test_the_interval_and_scale_zero_skip_the_classifier():
    calls = []

    def log_prob(x, t):
        calls.append(float(t))
        return x.flatten(1).sum(dim=1)

    path = LINEAR.path(10, "trailing")
    plain = ddim(Counted(), IMAGES, path)
    ddim(guidance.classifier(Counted(), log_prob, 1.0, LINEAR, interval=(0.35, 0.75)), IMAGES, path)
    assert calls == pytest.approx([0.7, 0.6, 0.5, 0.4])
    calls.clear()
    gradient = ClassifierGradient(log_prob, 1.0, (0.35, 0.75))
    ddpm(Counted(), IMAGES, path, noise=lambda k: torch.randn_like(IMAGES), variance="small", gradient=gradient)
    assert calls == pytest.approx([0.7, 0.6, 0.5, 0.4])
    calls.clear()
    limited = guidance.interval(guidance.classifier(Counted(), log_prob, 1.0, LINEAR), Counted(), 0.35, 0.75)
    ddim(limited, IMAGES, path)
    assert calls == pytest.approx([0.7, 0.6, 0.5, 0.4])
    calls.clear()
    off = ddim(guidance.classifier(Counted(), log_prob, 0.0, LINEAR), IMAGES, path)
    assert calls == []
    assert torch.equal(off, plain)


def test_pure_noise_says_nothing_of_the_label():
    zero = LinearSchedule(zero_terminal_snr=True)
    calls = []

    def log_prob(x, t):
        calls.append(float(t))
        return x.flatten(1).sum(dim=1)

    drawn = ddim(guidance.classifier(Counted(), log_prob, 1.0, zero), IMAGES, zero.path(4, "trailing"))
    assert drawn.isfinite().all()
    assert calls == pytest.approx([0.75, 0.5, 0.25])


def test_gradient_takes_times_by_image():
    t = t64([0.2, 0.5, 0.9])
    gradient = ClassifierGradient(lambda x, t: x.flatten(1).sum(dim=1), 1.0, (0.4, 0.6))
    assert gradient(IMAGES, t).flatten(1).sum(dim=1).tolist() == [0, 32, 0]


@pytest.mark.parametrize("log_prob", [lambda x, t: x.sum(), lambda x, t: x, lambda x, t: torch.zeros(len(x))])
def test_a_log_prob_of_another_shape_or_without_gradient_is_refused(log_prob):
    with pytest.raises(LimnerError, match=r"should be \(3,\) and depend on x_t"):
        ClassifierGradient(log_prob, 1.0)(IMAGES, HALF)


# --- classifier-free guidance -----------------------------------------------------------------------------------


def test_extrapolation_is_the_same_in_every_prediction():
    c, u = Counted()(IMAGES, HALF, 0.5), Counted()(IMAGES, HALF)
    guided = guidance.classifier_free(Counted(), 2.5)(IMAGES, HALF, 0.5)
    alpha, sigma = LINEAR.alpha(HALF), LINEAR.sigma(HALF)
    for kind in ("epsilon", "sample", "v_prediction", "flow"):
        raw_c, raw_u = (from_x0(out.x0, IMAGES, alpha, sigma, kind) for out in (c, u))
        expected = to_x0(raw_u + 2.5 * (raw_c - raw_u), IMAGES, alpha, sigma, kind)
        torch.testing.assert_close(guided.x0, expected)
    assert torch.equal(guided.variance_fraction, c.variance_fraction)
    assert torch.equal(guided.plain, c.x0)


def test_calls_of_the_network():
    def join(conds):
        return torch.cat([torch.full((3,), 0.0 if c is None else c) for c in conds])

    denoise = Counted()
    two = guidance.classifier_free(denoise, 3.0)(IMAGES, HALF, 0.5)
    assert denoise.calls == [(3, 0.5), (3, None)]
    denoise.calls.clear()
    one = guidance.classifier_free(denoise, 3.0, join=join)(IMAGES, HALF, 0.5)
    assert [n for n, _ in denoise.calls] == [6]
    torch.testing.assert_close(one.x0, two.x0)
    torch.testing.assert_close(one.variance_fraction, two.variance_fraction.float().double())
    times = t64([0.1, 0.5, 0.9])
    torch.testing.assert_close(
        guidance.classifier_free(denoise, 3.0, join=join)(IMAGES, times, 0.5).x0,
        guidance.classifier_free(denoise, 3.0)(IMAGES, times, 0.5).x0,
    )
    for scale, cond in ((1.0, 0.5), (0.0, -0.25)):
        denoise.calls.clear()
        out = guidance.classifier_free(denoise, scale, null=-0.25, join=join)(IMAGES, HALF, 0.5)
        assert denoise.calls == [(3, cond)]
        assert torch.equal(out.x0, Counted()(IMAGES, HALF, cond).x0)


def test_negative_condition_is_the_null_argument():
    guided = guidance.classifier_free(Counted(), 2.0, null=-0.3)(IMAGES, HALF, 0.5).x0
    c, n = Counted()(IMAGES, HALF, 0.5).x0, Counted()(IMAGES, HALF, -0.3).x0
    torch.testing.assert_close(guided, 2 * c - n)


@pytest.mark.parametrize("schedule", [LINEAR, LinearSchedule(zero_terminal_snr=True), RectifiedFlowSchedule()])
def test_cfg_plus_plus_is_the_papers_ddim(schedule):
    """Chung et al. 2024, Algorithm 2: x0 from the interpolated prediction, noise from the unconditional one."""
    path = schedule.path(6)
    x = IMAGES
    for here, there in path.pairs():
        c, u = (Counted()(x, t64(here.t), cond).x0 for cond in (0.5, None))
        eps_u = (x - here.alpha * u) / here.sigma
        x = there.alpha * (u + 0.6 * (c - u)) + there.sigma * eps_u
    guided = guidance.cfg_plus_plus(Counted(), 0.6, path)
    torch.testing.assert_close(ddim(guided, IMAGES, path, cond=0.5), x, rtol=1e-9, atol=1e-9)
    for name in ("heun", "dpmpp_2m", "unipc"):
        assert SAMPLERS[name](guided, IMAGES, path, cond=0.5).isfinite().all()
    with pytest.raises(LimnerError, match="from 0 to 1"):
        guidance.cfg_plus_plus(Counted(), 3.0, path)


def test_apg_with_everything_off_is_classifier_free():
    expected = guidance.classifier_free(Counted(), 4.0)(IMAGES, HALF, 0.5).x0
    torch.testing.assert_close(guidance.apg(Counted(), 4.0, parallel=1.0)(IMAGES, HALF, 0.5).x0, expected)


def test_apg_projects_and_limits():
    c, u = Counted()(IMAGES, HALF, 0.5).x0, Counted()(IMAGES, HALF).x0
    update = guidance.apg(Counted(), 2.0)(IMAGES, HALF, 0.5).x0 - c
    assert (update * c).flatten(1).sum(dim=1).abs().max() < 1e-12
    unlimited = guidance.apg(Counted(), 2.0, parallel=1.0)(IMAGES, HALF, 0.5).x0 - c
    limited = guidance.apg(Counted(), 2.0, parallel=1.0, threshold=0.5)(IMAGES, HALF, 0.5).x0 - c
    torch.testing.assert_close(unlimited, c - u)
    assert (limited.flatten(1).norm(dim=1) - 0.5).abs().max() < 1e-12
    torch.testing.assert_close(limited / 0.5, unlimited / unlimited.flatten(1).norm(dim=1)[:, None, None, None])


def test_apg_momentum_runs_over_the_steps_and_starts_anew():
    guided = guidance.apg(Counted(), 2.0, parallel=1.0, momentum=-0.5)
    for _ in range(2):  # the second time around t has risen
        average = torch.zeros_like(IMAGES)
        for t in (0.9, 0.6, 0.3):
            c, u = Counted()(IMAGES, t64(t), 0.5).x0, Counted()(IMAGES, t64(t)).x0
            average = c - u - 0.5 * average
            torch.testing.assert_close(guided(IMAGES, t64(t), 0.5).x0, c + average)


def test_autoguidance():
    strong, weak = Counted(), Counted()
    shifted = guidance.bind(weak, 0.2)
    out = guidance.autoguided(strong, shifted, 2.0)(IMAGES, HALF, 0.5)
    s, w = Counted()(IMAGES, HALF, 0.5).x0, Counted()(IMAGES, HALF, 0.2).x0
    torch.testing.assert_close(out.x0, w + 2 * (s - w))
    weak.calls.clear()
    assert torch.equal(guidance.autoguided(strong, shifted, 1.0)(IMAGES, HALF, 0.5).x0, s)
    assert weak.calls == []


# --- interval, rescale, clip ------------------------------------------------------------------------------------


def test_interval_calls_only_what_it_needs():
    guided, plain = Counted(), Counted()
    limited = guidance.interval(guidance.classifier_free(guided, 3.0), plain, 0.3, 0.7)
    for t in (0.2, 0.3, 0.5, 0.7, 0.8):
        limited(IMAGES, t64(t), 0.5)
    assert len(guided.calls) == 6
    assert len(plain.calls) == 2
    mixed = limited(IMAGES, t64([0.1, 0.5, 0.9]), 0.5).x0
    assert torch.equal(mixed[[0, 2]], Counted()(IMAGES, t64([0.1, 0.5, 0.9]), 0.5).x0[[0, 2]])
    torch.testing.assert_close(
        mixed[1], guidance.classifier_free(Counted(), 3.0)(IMAGES, t64([0.1, 0.5, 0.9]), 0.5).x0[1]
    )
    for lo, hi in ((0.7, 0.3), (-0.1, 0.5), (0.5, 1.2)):
        with pytest.raises(LimnerError, match="guidance interval"):
            guidance.interval(guided, plain, lo, hi)


def test_interval_of_sigma():
    for schedule in (LINEAR, CosineSchedule(), RectifiedFlowSchedule()):
        lo, hi = guidance.interval_of_sigma(schedule, 0.28, 2.9)
        for t, sigma in ((lo, 0.28), (hi, 2.9)):
            assert float(schedule.sigma(t) / schedule.alpha(t)) == pytest.approx(sigma)
        assert guidance.interval_of_sigma(schedule, 0, math.inf) == (0, 1)
    with pytest.raises(LimnerError, match="of sigma"):
        guidance.interval_of_sigma(LINEAR, 2, 1)


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction"])
def test_rescale_is_the_papers_in_the_space_asked_for(kind):
    alpha, sigma = LINEAR.alpha(HALF), LINEAR.sigma(HALF)
    plain = Counted()(IMAGES, HALF, 0.5).x0
    guided = guidance.classifier_free(Counted(), 5.0)
    positive, cfg = (from_x0(x0, IMAGES, alpha, sigma, kind) for x0 in (plain, guided(IMAGES, HALF, 0.5).x0))
    dims = (1, 2, 3)
    rescaled = cfg * positive.std(dim=dims, keepdim=True) / cfg.std(dim=dims, keepdim=True)  # eq. 15
    expected = to_x0(0.7 * rescaled + 0.3 * cfg, IMAGES, alpha, sigma, kind)  # eq. 16
    out = guidance.rescaled(guided, 0.7, kind=kind, schedule=LINEAR)(IMAGES, HALF, 0.5)
    torch.testing.assert_close(out.x0, expected)


def test_rescale_costs_no_call_and_leaves_what_was_not_guided():
    denoise = Counted()
    guidance.rescaled(guidance.classifier_free(denoise, 5.0), 0.7)(IMAGES, HALF, 0.5)
    assert len(denoise.calls) == 2
    limited = guidance.interval(guidance.classifier_free(Counted(), 5.0), Counted(), 0.6, 0.7)
    out = guidance.rescaled(limited, 0.7)(IMAGES, HALF, 0.5)
    assert torch.equal(out.x0, Counted()(IMAGES, HALF, 0.5).x0)
    with pytest.raises(LimnerError, match="from 0"):
        guidance.rescaled(denoise, 1.5)
    with pytest.raises(LimnerError, match="needs the schedule"):
        guidance.rescaled(denoise, 0.5, kind="epsilon")


def test_clipping():
    def large(x, t, cond=None, /):
        return Denoised(torch.linspace(-3, 2, 32, dtype=torch.float64).reshape(1, 2, 4, 4))

    static = guidance.clipped(large)(IMAGES[:1], HALF).x0
    assert torch.equal(static, large(None, None).x0.clamp(-1, 1))
    dynamic = guidance.clipped(large, "dynamic", quantile=0.9)(IMAGES[:1], HALF).x0
    limit = torch.quantile(large(None, None).x0.abs(), 0.9)
    torch.testing.assert_close(dynamic, large(None, None).x0.clamp(-limit, limit) / limit, rtol=1e-6, atol=1e-6)
    within = guidance.clipped(Counted(), "dynamic")(IMAGES, HALF, 0.5).x0
    torch.testing.assert_close(within, Counted()(IMAGES, HALF, 0.5).x0)
    with pytest.raises(LimnerError, match="did you mean 'dynamic'"):
        guidance.clipped(large, "dynamical")  # type: ignore[arg-type]


def test_bind_ignores_another_condition():
    assert torch.equal(guidance.bind(Counted(), 0.5)(IMAGES, HALF, 0.9).x0, Counted()(IMAGES, HALF, 0.5).x0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_everything_at_once_with_every_sampler(name):
    free = guidance.classifier_free(MIXTURE.denoise, 2.0)
    limited = guidance.interval(free, MIXTURE.denoise, 0.1, 0.9)
    steady = guidance.clipped(guidance.rescaled(limited, 0.5))
    guided = guidance.classifier(steady, MIXTURE.log_prob(1), 1.0, LINEAR, interval=(0.2, 0.8))
    drawn = SAMPLERS[name](guided, noise(200), LINEAR.path(30), cond=1, noise=step_noise(200))
    assert drawn.isfinite().all()
    label = MIXTURE.log_prob(1)(drawn, t64(0.001)).exp()
    assert label.mean() > 0.9  # 0.55 without a condition
