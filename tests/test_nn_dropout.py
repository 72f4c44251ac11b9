"""Dropout by random bytes: as many elements are dropped as asked for, the mean stays, chance is PyTorch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from limner.nn.layers import Dropout


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_share_the_mean_and_the_gradient(layout: Any, dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 67, 31, 9).to(dtype).to(memory_format=layout).requires_grad_()
    y = Dropout(p)(x)
    assert y.dtype == dtype
    dropped = (y == 0).float()
    assert abs(float(dropped.mean()) - p) < 0.005
    assert (dropped.mean((0, 2, 3)) - p).abs().max() < 0.1, "some channel is dropped more often than others"
    kept = y[y != 0].double() / x[y != 0].double()
    assert (kept * (1 - round(p * 256) / 256) - 1).abs().max() < (0.01 if dtype == torch.bfloat16 else 1e-6)
    (gradient,) = torch.autograd.grad(y.sum(), [x])
    assert torch.equal(gradient == 0, y == 0)


def test_the_seed_decides_whatever_the_layout() -> None:
    x = torch.ones(3, 33, 5, 7)
    seen = []
    for layout in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(7)
        seen.append(Dropout(0.3)(x.to(memory_format=layout)))
    assert torch.equal(*seen)
    assert not torch.equal(seen[0], Dropout(0.3)(x))


def test_a_pass_that_is_made_again_drops_the_same() -> None:
    torch.manual_seed(0)
    seen: list[torch.Tensor] = []

    def stage(x: torch.Tensor) -> torch.Tensor:
        y = Dropout(0.4)(x)
        seen.append(y.detach())
        return y.exp()

    x = torch.ones(2, 32, 8, 8, requires_grad=True)
    checkpoint(stage, x, use_reentrant=False).sum().backward()  # pyright: ignore[reportOptionalMemberAccess]
    assert torch.equal(*seen)


@pytest.mark.parametrize("p", [0.0, 1e-4, 0.9999, 1.0])
def test_what_is_left_to_pytorch(p: float) -> None:
    x = torch.randn(4, 32, 8, 8)
    torch.manual_seed(1)
    mine = Dropout(p)(x)
    torch.manual_seed(1)
    assert torch.equal(mine, nn.Dropout(p)(x))
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert Dropout(0.5)(x.to("meta")).shape == x.shape
