"""Every sampler against the closed form: what it draws, and how fast its error falls."""

import math
from itertools import pairwise

import pytest
import torch

from limner.core.noise import initial_noise, step_noise
from limner.core.path import Path
from limner.core.samplers import SAMPLERS, ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, euler, heun
from limner.core.schedule import CosineSchedule, LinearSchedule, RectifiedFlowSchedule, ScaledLinearSchedule, Schedule
from limner.core.types import Denoised, Step
from limner.errors import LimnerError
from mixture import Mixture, energy_p_value, integrated_ode

ONE = (2, 1, 1)
STEPS = {"ddpm": 250, "ddim": 100, "euler": 100, "heun": 40, "dpmpp_2m": 40, "dpmpp_2m_sde": 60, "unipc": 30}
ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2, "unipc": 3}
SCHEDULES = {
    "linear": LinearSchedule(),
    "zero terminal SNR": LinearSchedule(zero_terminal_snr=True),
    "cosine": CosineSchedule(),
    "flow": RectifiedFlowSchedule(),
}


def draw(name, denoise, path, n, *, seed=0, cond=None, **options):
    x = initial_noise(seed, range(n), ONE, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    noise = lambda k: torch.randn(x.shape, generator=generator, dtype=x.dtype)  # noqa: E731
    return SAMPLERS[name](denoise, x, path, cond=cond, noise=noise, **options)


# --- what is drawn ----------------------------------------------------------------------------------------------


def test_two_sample_test_has_power():
    """1,000 against 1,000: a shift by a tenth (an eighth of the spread of the data), a spread 15% wider, or the
    wrong label, are each told from the truth at p < 0.02; the truth itself is not."""
    mixture = Mixture(LinearSchedule())
    for seed in range(5):
        truth, again = mixture.sample(1000, seed, label=1), mixture.sample(1000, 100 + seed, label=1)
        assert energy_p_value(truth, again) > 0.02
        assert energy_p_value(truth, again + 0.1) < 0.02
        assert energy_p_value(truth, again * 1.15) < 0.02
        assert energy_p_value(truth, mixture.sample(1000, seed, label=0)) < 0.02


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_conditional_samples_are_those_of_the_conditional_distribution(name, schedule):
    mixture = Mixture(SCHEDULES[schedule])
    drawn = draw(name, mixture.denoise, SCHEDULES[schedule].path(STEPS[name]), 1000, cond=1)
    assert energy_p_value(drawn, mixture.sample(1000, 1, label=1)) > 0.02


def test_condition_is_per_image():
    mixture = Mixture(LinearSchedule())
    labels = torch.arange(1000) % 2
    drawn = draw("dpmpp_2m", mixture.denoise, LinearSchedule().path(40), 1000, cond=labels)
    for label in (0, 1):
        assert energy_p_value(drawn[labels == label], mixture.sample(500, 1, label=label)) > 0.02


@pytest.mark.parametrize("spacing", ["trailing", "karras", "ddim100"])
@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m", "unipc"])
def test_other_spacings_draw_the_same(name, spacing):
    mixture = Mixture(ScaledLinearSchedule())
    drawn = draw(name, mixture.denoise, ScaledLinearSchedule().path(100, spacing), 500, cond=0)
    assert energy_p_value(drawn, mixture.sample(500, 1, label=0)) > 0.02


@pytest.mark.parametrize("variance", ["small", "large"])
def test_both_ends_of_the_variance_draw_the_same(variance):
    mixture = Mixture(LinearSchedule())
    drawn = draw("ddpm", mixture.denoise, LinearSchedule().path(400), 1000, cond=1, variance=variance)
    assert energy_p_value(drawn, mixture.sample(1000, 1, label=1)) > 0.02


# --- order of convergence ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name):
    """The error against the integrated ODE falls by 2^order when the steps are doubled."""
    schedule = LinearSchedule()
    mixture = Mixture(schedule)
    x = initial_noise(0, range(48), ONE, dtype=torch.float64)
    truth = integrated_ode(mixture.denoise, schedule, x, schedule.path(16), cond=1)
    drawn = [SAMPLERS[name](mixture.denoise, x, schedule.path(n), cond=1) for n in (100, 200)]
    errors = [(x - truth).abs().median().item() for x in drawn]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[name], abs=0.2)
    assert errors[1] < {1: 1e-2, 2: 5e-4, 3: 3e-5}[ORDERS[name]]


def output_variance(sampler, schedule: Schedule, path: Path, **options) -> float:
    """Variance of what a stochastic sampler draws when the data is N(0, 0.5^2), exactly: the denoiser is then linear,
    so the output is a sum of responses to x_T and to each step's noise, one response by each image of the batch."""
    n = path.steps + 1
    eye = torch.eye(n, dtype=torch.float64).reshape(n, n, 1, 1, 1)

    def denoise(x, t, cond=None, /):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return Denoised(0.25 * alpha / (0.25 * alpha**2 + sigma**2) * x)

    start = path[0]
    scale = math.sqrt(0.25 * start.alpha**2 + start.sigma**2)
    responses = sampler(denoise, scale * eye[:, 0], path, noise=lambda k: eye[:, k + 1], **options)
    return float((responses**2).sum())


@pytest.mark.parametrize(
    ("sampler", "options", "order"),
    [
        (ddpm, {"variance": "small"}, 1),
        (ddpm, {"variance": "large"}, 1),
        (ddim, {"eta": 1.0}, 1),
        (ddim, {"eta": 0.5}, 1),
        (dpmpp_2m_sde, {}, 2),
        (dpmpp_2m_sde, {"eta": 0.5}, 2),
    ],
)
def test_stochastic_samplers_converge_in_distribution(sampler, options, order):
    schedule = LinearSchedule()
    truth = 0.25
    end = schedule.path(2)[-2]  # the last step returns E[x0 | x_t], which lacks Var[x0 | x_t]
    truth *= 0.25 * end.alpha**2 / (0.25 * end.alpha**2 + end.sigma**2)
    errors = [abs(output_variance(sampler, schedule, schedule.path(n), **options) - truth) for n in (100, 200)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)
    assert errors[1] < {1: 0.02, 2: 2e-4}[order]


# --- identities -------------------------------------------------------------------------------------------------


@pytest.fixture
def setting():
    mixture = Mixture(LinearSchedule())
    return mixture.denoise, initial_noise(0, range(16), ONE, dtype=torch.float64), LinearSchedule().path(12)


def test_euler_is_ddim_without_noise(setting):
    torch.testing.assert_close(euler(*setting), ddim(*setting), rtol=1e-12, atol=1e-12)


def test_sde_without_noise_is_the_ode(setting):
    torch.testing.assert_close(dpmpp_2m_sde(*setting, eta=0.0), dpmpp_2m(*setting), rtol=1e-12, atol=1e-12)


def test_ddim_at_eta_one_is_ddpm_with_small_variance(setting):
    noise = step_noise(0, range(16), ONE, dtype=torch.float64)
    expected = ddpm(*setting, noise=noise, variance="small")
    torch.testing.assert_close(ddim(*setting, noise=noise, eta=1.0), expected, rtol=1e-10, atol=1e-10)


def test_heun_is_edm_s(setting):
    """Karras et al. 2022, Algorithm 1, written in its own coordinates."""
    denoise, x, path = setting
    y = x / path[0].alpha
    for here, there in path.pairs():
        s, s_next = here.sigma / here.alpha, there.sigma / there.alpha
        slope = (y - denoise(here.alpha * y, torch.tensor(here.t, dtype=torch.float64)).x0) / s
        following = y + (s_next - s) * slope
        if s_next > 0:
            slope_next = (
                following - denoise(there.alpha * following, torch.tensor(there.t, dtype=torch.float64)).x0
            ) / s_next
            following = y + (s_next - s) * (slope + slope_next) / 2
        y = following
    torch.testing.assert_close(heun(denoise, x, path), y, rtol=1e-9, atol=1e-9)


def test_learned_variance_between_small_and_large(setting):
    plain, x, path = setting
    noise = step_noise(0, range(16), ONE, dtype=torch.float64)

    def at(fraction):
        return lambda x, t, cond=None, /: Denoised(plain(x, t, cond).x0, torch.full_like(x, fraction))

    assert torch.equal(ddpm(at(0.0), x, path, noise=noise), ddpm(plain, x, path, noise=noise, variance="small"))
    torch.testing.assert_close(
        ddpm(at(1.0), x, path, noise=noise), ddpm(plain, x, path, noise=noise, variance="large"), rtol=1e-9, atol=1e-9
    )
    assert not torch.allclose(ddpm(at(0.5), x, path, noise=noise), ddpm(at(0.0), x, path, noise=noise))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_and_two_steps_stay_finite(name, schedule):
    mixture = Mixture(SCHEDULES[schedule])
    for steps in (1, 2):
        drawn = draw(name, mixture.denoise, SCHEDULES[schedule].path(steps), 8, cond=1)
        assert drawn.isfinite().all()
        assert drawn.abs().max() < 3 or name == "heun"  # two slopes 10 e-folds apart: EDM's Heun needs more steps
    x = initial_noise(0, range(8), ONE, dtype=torch.float64)
    one = mixture.denoise(x, torch.tensor(1.0, dtype=torch.float64), 1).x0
    torch.testing.assert_close(draw(name, mixture.denoise, SCHEDULES[schedule].path(1), 8, cond=1), one)


@pytest.mark.parametrize("name", SAMPLERS)
def test_batches_split_as_they_like(name):
    mixture = Mixture(LinearSchedule())
    path = LinearSchedule().path(8)

    def images(indices):
        x = initial_noise(0, indices, ONE, dtype=torch.float64)
        noise = step_noise(0, indices, ONE, dtype=torch.float64)
        return SAMPLERS[name](mixture.denoise, x, path, cond=1, noise=noise)

    parts = torch.cat([images(range(2)), images(range(2, 6))])
    torch.testing.assert_close(parts, images(range(6)), rtol=1e-12, atol=1e-12)


# --- the calls they make ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_steps_and_dtype(name):
    mixture, path, calls, told = Mixture(LinearSchedule()), LinearSchedule().path(5), [], []

    def denoise(x, t, cond=None, /):
        calls.append((float(t), cond))
        assert t.shape == ()
        return Denoised(mixture.denoise(x.double(), t, cond).x0.float())

    x = initial_noise(0, range(3), ONE)
    result = SAMPLERS[name](denoise, x, path, cond=1, noise=step_noise(0, range(3), ONE), on_step=told.append)
    assert result.dtype == torch.float32
    expected = [knot.t for knot in path[:-1]]
    if name == "heun":
        expected = [t for pair in pairwise(expected) for t in pair] + expected[-1:]
    assert calls == [(t, 1) for t in expected]
    assert [step.index for step in told] == [1, 2, 3, 4, 5]
    assert [step.t for step in told] == [knot.t for knot in path[1:]]
    assert all(isinstance(step, Step) and step.total == 5 and step.x0.shape == x.shape for step in told)
    assert torch.equal(told[-1].x, result)


def test_on_step_stops_by_raising(setting):
    seen = []

    def stop(step):
        seen.append(step.index)
        if step.index == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dpmpp_2m(*setting, on_step=stop)
    assert seen == [1, 2, 3]


def test_leading_plus_one_stops_above_zero():
    """CompVis' last step ends at alpha-bar of step 0; with eta its noise is added there too."""
    schedule = ScaledLinearSchedule()
    path = schedule.path(10, "leading+1")
    x = initial_noise(0, range(4), ONE, dtype=torch.float64)
    used = []

    def noise(k):
        used.append(k)
        return torch.zeros_like(x)

    ddim(Mixture(schedule).denoise, x, path, noise=noise, eta=0.3)
    assert used == list(range(10))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: ddpm(*s), "ddpm draws noise"),
        (lambda s: ddim(*s, eta=0.1), "eta above 0 draws noise"),
        (lambda s: dpmpp_2m_sde(*s), "draws noise"),
        (lambda s: ddpm(*s, noise=lambda k: torch.zeros(3, 2, 1, 1)), r"noise of step 0: \(3, 2, 1, 1\)"),
        (lambda s: ddpm(*s, variance="learned"), "no learned variance"),
        (lambda s: ddpm(*s, variance="larg"), "did you mean 'large'"),
    ],
)
def test_bad_input_in_one_line(setting, call, message):
    with pytest.raises(LimnerError, match=message) as caught:
        call(setting)
    assert "\n" not in str(caught.value)
