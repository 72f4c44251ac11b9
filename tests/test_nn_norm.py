"""Group norm, modulation and SiLU in one pass equal PyTorch's, and so do their gradients."""

from __future__ import annotations

import pytest
import torch

from limner.nn.norm import GroupNorm


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_the_kernels_and_their_gradients(silu, modulated, channels_last):
    torch.manual_seed(0)
    norm = GroupNorm(24, groups=32).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = 3 + 2 * torch.randn(3, 24, 5, 4, dtype=torch.float64)
    x = (x.to(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    pair = [torch.randn(3, 24, dtype=torch.float64, requires_grad=True) for _ in range(2)] if modulated else []
    inputs = [x, *norm.parameters(), *pair]
    ours = norm(x, *pair, silu=silu)
    theirs = norm.by_kernels(x, *(pair or (None, None)), silu=silu)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_bfloat16_is_as_near_to_float32_as_its_rounding():
    torch.manual_seed(0)
    norm, x = GroupNorm(32), torch.randn(2, 32, 8, 8)
    scale, shift = torch.randn(2, 2, 32)
    for near in (norm(x.bfloat16(), silu=True), norm.by_kernels(x.bfloat16(), None, None, silu=True)):
        assert near.dtype == torch.bfloat16
        torch.testing.assert_close(near.float(), norm(x, silu=True), rtol=0.02, atol=0.02)
    near = norm.by_kernels(x.bfloat16(), scale, shift, silu=False)
    assert near.dtype == torch.bfloat16
    torch.testing.assert_close(near.float(), norm(x, scale, shift), rtol=0.03, atol=0.05)


def test_groups_that_do_not_divide_fall_to_the_largest_that_does():
    assert GroupNorm(48).num_groups == 16
    assert GroupNorm(64).num_groups == 32
