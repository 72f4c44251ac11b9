"""The average of the weights against its closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limner.training.ema import EMA, gamma_of


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))


@given(st.floats(0.005, 0.28))
def test_gamma_inverts_the_width_of_the_profile(relative_std: float) -> None:
    gamma = gamma_of(relative_std)
    assert gamma > -1
    assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(relative_std, rel=1e-6)


def test_gamma_of_the_papers_values() -> None:
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.01)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.floats(-5, 5)), min_size=1, max_size=20), st.floats(0.02, 0.25))
def test_average_is_the_integral_of_the_profile(steps: list[tuple[int, float]], relative_std: float) -> None:
    """Weights that stand still between updates: the share of theta_i is (n_i^(g+1) - n_{i-1}^(g+1)) / n^(g+1)."""
    source = Scalar()
    ema = EMA(source, relative_std)
    images, shares = 0, []
    power = gamma_of(relative_std) + 1
    for since, value in steps:
        before, images = images, images + since
        source.weight.data.fill_(value)
        ema.update(images, since)
        shares.append((images**power - before**power, value))
    expected = sum(share * value for share, value in shares) / images**power
    assert float(ema.module.weight) == pytest.approx(expected, abs=1e-9)


def test_the_first_update_copies_and_the_random_start_is_forgotten() -> None:
    source = Scalar()
    source.weight.data.fill_(1e6)
    ema = EMA(source)
    source.weight.data.fill_(3.0)
    ema.update(16, 16)
    assert float(ema.module.weight) == 3.0


def test_buffers_are_copied_and_frozen_weights_are_shared() -> None:
    source = Scalar()
    ema = EMA(source)
    source.seen.fill_(7)
    ema.update(32, 16)
    assert int(ema.module.seen) == 7
    assert ema.module.frozen is source.frozen
    assert ema.module.weight is not source.weight
    assert not ema.module.weight.requires_grad
    assert source.weight.requires_grad
    assert list(ema.module.state_dict()) == list(source.state_dict())
