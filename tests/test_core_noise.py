"""The noise of image k depends on (seed, k) and the step alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limner.core.noise import initial_noise, step_noise

SHAPE = (3, 4, 4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**70), cut=st.integers(0, 12), step=st.integers(0, 2000))
def test_any_split_into_batches_gives_the_same_noise(seed, cut, step):
    whole = initial_noise(seed, range(12), SHAPE)
    parts = [initial_noise(seed, range(cut), SHAPE), initial_noise(seed, range(cut, 12), SHAPE)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole[[7, 2]], initial_noise(seed, [7, 2], SHAPE))
    stepped = step_noise(seed, range(12), SHAPE)(step)
    parts = [step_noise(seed, indices, SHAPE)(step) for indices in (range(cut), range(cut, 12))]
    assert torch.equal(stepped, torch.cat(parts))


def test_order_of_drawing_does_not_matter_nor_does_the_global_generator():
    noise = step_noise(3, range(2), SHAPE)
    first, second = noise(0), noise(1)
    torch.manual_seed(99)
    again = step_noise(3, range(2), SHAPE)
    assert torch.equal(again(1), second)
    assert torch.equal(again(0), first)


def test_no_two_draws_are_alike():
    draws = [initial_noise(seed, range(50), SHAPE) for seed in range(3)]
    draws += [step_noise(seed, range(50), SHAPE)(k) for seed in range(3) for k in range(3)]
    rows = torch.cat(draws).flatten(1)
    correlation = torch.corrcoef(rows).fill_diagonal_(0)
    assert correlation.abs().max() < 0.75  # 600 rows of 48 numbers: 180,000 pairs, standard deviation 0.146


def test_standard_normal():
    values = initial_noise(0, range(200), (3, 16, 16)).flatten()
    assert values.mean().item() == pytest.approx(0, abs=0.01)
    assert values.std().item() == pytest.approx(1, abs=0.01)
    assert (values**4).mean().item() == pytest.approx(3, abs=0.08)


def test_dtype_and_emptiness():
    assert initial_noise(0, range(2), SHAPE).dtype == torch.float32
    assert initial_noise(0, range(2), SHAPE, dtype=torch.float64).dtype == torch.float64
    assert initial_noise(0, [], SHAPE).shape == (0, *SHAPE)
