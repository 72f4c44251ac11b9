"""Schedules and paths: tables against their definitions, inverses, exactness at the knots, spacings, bad input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limner.core.path import Path, step_indices
from limner.core.schedule import (
    CosineSchedule,
    DiscreteCosineSchedule,
    DiscreteSchedule,
    LinearSchedule,
    RectifiedFlowSchedule,
    ScaledLinearSchedule,
    Schedule,
)
from limner.errors import LimnerError

SCHEDULES: list[Schedule] = [
    LinearSchedule(),
    LinearSchedule(steps=50),
    LinearSchedule(zero_terminal_snr=True),
    ScaledLinearSchedule(),
    ScaledLinearSchedule(zero_terminal_snr=True),
    DiscreteCosineSchedule(),
    DiscreteCosineSchedule(steps=4),
    CosineSchedule(),
    CosineSchedule(shift=0.5),
    RectifiedFlowSchedule(),
    RectifiedFlowSchedule(shift=1 / 3),
]
DISCRETE = [schedule for schedule in SCHEDULES if isinstance(schedule, DiscreteSchedule)]
ALL_SPACINGS = ["log_snr", "karras", "trailing", "leading", "leading+1", "linspace", "ddim10", "10", "2,5,3"]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def t64(values):
    return torch.as_tensor(values, dtype=torch.float64)


# --- tables -----------------------------------------------------------------------------------------------------


def test_linear_is_ddpm_at_1000_steps_and_scales_with_the_number_of_steps():
    schedule = LinearSchedule()
    assert schedule.betas[0] == pytest.approx(1e-4, rel=1e-12)
    assert schedule.betas[-1] == pytest.approx(0.02, rel=1e-12)
    assert torch.equal(schedule.alphas_bar, torch.cumprod(1 - schedule.betas, 0))
    assert LinearSchedule(steps=250).betas[-1] == pytest.approx(0.08, rel=1e-12)
    assert LinearSchedule(steps=250).alphas_bar[-1] == pytest.approx(float(schedule.alphas_bar[-1]), rel=0.2)


def test_scaled_linear_is_linear_in_the_root():
    roots = ScaledLinearSchedule().betas.sqrt()
    assert roots.diff().std() < 1e-15
    assert roots[0] ** 2 == pytest.approx(0.0015)
    assert roots[-1] ** 2 == pytest.approx(0.0195)


def test_discrete_cosine_follows_its_formula_until_the_cap():
    schedule = DiscreteCosineSchedule()
    u = t64(range(1, 1001)) / 1000
    expected = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(schedule.alphas_bar[:-1], expected[:-1], rtol=1e-10, atol=0)
    assert schedule.betas.max() == 0.999


@pytest.mark.parametrize("kind", [LinearSchedule, ScaledLinearSchedule, DiscreteCosineSchedule])
def test_zero_terminal_snr_ends_at_no_signal_and_keeps_the_start(kind):
    plain, zero = kind(), kind(zero_terminal_snr=True)
    assert zero.alphas_bar[-1] == 0
    assert zero.alphas_bar[0] == pytest.approx(float(plain.alphas_bar[0]), rel=1e-12)
    assert zero.betas[-1] == 1
    assert zero.alpha(1.0) == 0
    assert zero.sigma(1.0) == 1
    roots = plain.alphas_bar.sqrt()
    shifted = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    torch.testing.assert_close(zero.alphas_bar.sqrt(), shifted, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("schedule", DISCRETE, ids=lambda s: f"{type(s).__name__}-{s.steps}")
def test_discrete_knots_are_exact(schedule):
    t = t64(range(1, schedule.steps + 1)) / schedule.steps
    torch.testing.assert_close(schedule.alpha(t), schedule.alphas_bar.sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.sigma(t), (1 - schedule.alphas_bar).sqrt(), rtol=1e-12, atol=0)


def test_discrete_log_snr_is_linear_between_knots():
    schedule = LinearSchedule()
    t = t64([0.4, 0.4003, 0.401])
    low, between, high = schedule.log_snr(t)
    assert between == pytest.approx(float(0.7 * low + 0.3 * high), rel=1e-10)


@every_schedule
def test_ends_of_time(schedule):
    assert schedule.log_snr(0.0) >= 15
    assert schedule.log_snr(1.0) <= -4
    assert schedule.sigma(0.0) < 1e-3
    assert schedule.path(4)[-1] == (0.0, 1.0, 0.0)


def test_variance_preserved_except_by_rectified_flow():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for schedule in SCHEDULES:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        total = alpha + sigma if isinstance(schedule, RectifiedFlowSchedule) else alpha**2 + sigma**2
        torch.testing.assert_close(total, torch.ones_like(t), rtol=0, atol=1e-12)


def test_continuous_formulas_and_shifts():
    t = t64([0.1, 0.5, 0.9])
    torch.testing.assert_close(CosineSchedule().alpha(t), torch.cos(math.pi / 2 * t))
    torch.testing.assert_close(RectifiedFlowSchedule().alpha(t), 1 - t)
    for kind in (CosineSchedule, RectifiedFlowSchedule):
        shifted = kind(shift=0.25).log_snr(t) - kind().log_snr(t)
        torch.testing.assert_close(shifted, torch.full_like(t, 2 * math.log(0.25)))
    sd3 = 3 * t / (1 + 2 * t)  # Esser et al. 2024, eq. 23, with its shift 3
    torch.testing.assert_close(RectifiedFlowSchedule(shift=1 / 3).sigma(t), sd3)


# --- inverse, dtypes --------------------------------------------------------------------------------------------


@every_schedule
@settings(max_examples=60, deadline=None)
@given(t=st.floats(0.0, 1.0))
def test_log_snr_inverts(schedule, t):
    log_snr = schedule.log_snr(t)
    back = schedule.t_of_log_snr(log_snr)
    clipped = isinstance(schedule, CosineSchedule) and abs(float(log_snr)) >= 15
    assert float(back) == pytest.approx(t, abs=2e-3 if clipped else 1e-12)


@every_schedule
def test_log_snr_falls(schedule):
    values = schedule.log_snr(torch.linspace(0, 1, 5003, dtype=torch.float64))
    assert not values.isnan().any()
    assert (values[1:] <= values[:-1]).all()


@every_schedule
def test_extreme_log_snr_gives_an_end(schedule):
    assert schedule.t_of_log_snr(math.inf) == 0
    assert schedule.t_of_log_snr(-math.inf) == 1
    assert schedule.t_of_log_snr(100.0) < 1e-6
    assert schedule.t_of_log_snr(-100.0) > 1 - 1e-6


def test_shape_and_dtype_are_those_of_the_argument():
    t = torch.rand(3, 4, dtype=torch.float32)
    for schedule in SCHEDULES:
        for value in (schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t), schedule.t_of_log_snr(t)):
            assert value.shape == (3, 4)
            assert value.dtype == torch.float32
        assert schedule.alpha(0.5).dtype == torch.float64
        torch.testing.assert_close(schedule.alpha(t), schedule.alpha(t.double()).float())


# --- paths ------------------------------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize("spacing", ALL_SPACINGS)
def test_paths_fall_from_noisy_to_clean(schedule, spacing):
    if schedule.steps is not None and schedule.steps < 25:
        schedule = DiscreteCosineSchedule(steps=30)
    path = schedule.path(10, spacing)
    assert path.steps == len(path) - 1 == 10
    assert all(a.t > b.t and a.alpha < b.alpha and a.sigma > b.sigma for a, b in path.pairs())
    for knot in path[:-1]:
        assert knot.alpha == pytest.approx(float(schedule.alpha(knot.t)), rel=1e-12)


@every_schedule
@pytest.mark.parametrize("spacing", ["log_snr", "karras"])
def test_log_snr_paths_start_at_pure_noise(schedule, spacing):
    steps = min(20, schedule.steps or 20)
    path = schedule.path(steps, spacing)
    assert path.steps == steps
    assert path[0] == schedule.knot(1.0)
    inner = np.array([knot.log_snr for knot in path[1:-1]])
    assert (abs(inner) <= 11 + 1e-9).all()
    even = inner if spacing == "log_snr" else np.exp(-inner / 2) ** (1 / 7)
    np.testing.assert_allclose(np.diff(even), np.diff(even)[0], rtol=1e-6)


def test_log_snr_path_is_uniform_from_end_to_end_where_nothing_is_cut():
    path = LinearSchedule().path(15)
    gaps = np.diff([knot.log_snr for knot in path[:-1]])
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-9)
    assert path[-2].log_snr == pytest.approx(float(LinearSchedule().log_snr(0.001)))


# Made by guided-diffusion's respace.space_timesteps(T, spacing) and sorted.
PEER = {
    (1000, "ddim10"): list(range(0, 1000, 100)),
    (1000, "ddim250"): list(range(0, 1000, 4)),
    (300, "3,2,4"): [0, 50, 99, 100, 199, 200, 233, 266, 299],
    (1000, "7"): [0, 166, 333, 500, 666, 832, 999],
    (1001, "1,2,3"): [0, 334, 667, 668, 834, 1000],
    (10, "1,1"): [0, 5],
}


@pytest.mark.parametrize(("total", "spacing"), PEER)
def test_respacing_takes_the_peers_steps(total, spacing):
    assert step_indices(total, 0, spacing) == PEER[total, spacing]


def test_discrete_spacings():
    assert step_indices(10, 5, "leading") == [0, 2, 4, 6, 8]
    assert step_indices(10, 5, "leading+1") == [1, 3, 5, 7, 9]
    assert step_indices(10, 5, "trailing") == [1, 3, 5, 7, 9]
    assert step_indices(10, 5, "linspace") == [0, 2, 4, 7, 9]
    assert step_indices(1000, 7, "leading+1") == [1, 143, 285, 427, 569, 711, 853, 995]  # CompVis gives 8 for 7
    assert step_indices(1000, 37, "leading+1")[-1] == 973  # 1000, where CompVis stops, is left out


def test_leading_plus_one_ends_at_the_first_steps_alpha_bar():
    schedule = ScaledLinearSchedule()
    path = schedule.path(10, "leading+1")
    assert [round(knot.t * 1000) - 1 for knot in path] == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1, 0]
    assert path[-1].alpha == pytest.approx(float(schedule.alphas_bar[0].sqrt()))


def test_continuous_trailing_is_uniform_in_t():
    path = RectifiedFlowSchedule().path(7, "trailing")
    np.testing.assert_allclose([knot.sigma for knot in path], np.linspace(1, 0, 8), atol=1e-12)


def test_one_step():
    for schedule in SCHEDULES:
        for spacing in ("log_snr", "karras", "trailing", "linspace"):
            assert [knot.t for knot in schedule.path(1, spacing)] == [1.0, 0.0]


def test_truncate_keeps_the_end():
    path = LinearSchedule().path(10, "trailing")
    short = path.truncate(0.5)
    assert isinstance(short, Path)
    assert short.knots == path.knots[5:]
    assert path.truncate(1.0) == path
    with pytest.raises(LimnerError, match=r"no step of the path is left"):
        path.truncate(0.05)


@pytest.mark.parametrize(
    ("steps", "spacing", "message"),
    [
        (0, "log_snr", "should be at least 1"),
        (-3, "trailing", "should be at least 1"),
        (1001, "trailing", "more than the 1000 steps"),
        (1001, "log_snr", "more than the 1000 steps"),
        (10, "trailling", "did you mean 'trailing'"),
        (10, "ddim", "unknown spacing"),
        (10, "ddim300", "ddim250 or ddim334 would do"),
        (10, "600,10", "600 steps of a section of 500"),
        (10, "0", "0 steps of a section"),
    ],
)
def test_bad_paths_in_one_line(steps, spacing, message):
    with pytest.raises(LimnerError, match=message) as caught:
        LinearSchedule().path(steps, spacing)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinearSchedule(steps=10),
        lambda: LinearSchedule(steps=0),
        lambda: ScaledLinearSchedule(beta_start=0.0),
        lambda: ScaledLinearSchedule(steps=1, zero_terminal_snr=True),
        lambda: CosineSchedule(shift=0.0),
        lambda: CosineSchedule(log_snr_min=3.0, log_snr_max=-3.0),
        lambda: RectifiedFlowSchedule(shift=-1.0),
        lambda: LinearSchedule().alpha(1.5),
        lambda: LinearSchedule().alpha(torch.tensor([0.5, math.nan])),
        lambda: CosineSchedule().path(1001, "leading"),
    ],
)
def test_bad_schedules_in_one_line(make):
    with pytest.raises(LimnerError) as caught:
        make()
    assert "\n" not in str(caught.value)
