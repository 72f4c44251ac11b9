"""Convolutions whose gradient by the filters is a product of the processor's matrices: they equal PyTorch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from limner.nn import amx, winograd
from limner.nn.amx import Conv1x1, convolution
from limner.nn.winograd import Conv3x3

needs_matrices = pytest.mark.skipif(not amx.available(), reason="this processor has no matrices (AMX)")
SHAPES = [
    (2, 16, 32, 5, 7),
    (3, 16, 16, 1, 1),
    (2, 160, 96, 2, 9),
    (3, 48, 80, 9, 13),
    (64, 64, 48, 4, 4),
    (5, 32, 32, 33, 31),
    (1, 96, 64, 64, 64),
]


def given(shape: tuple[int, ...], side: int, layout: Any = torch.channels_last) -> list[Tensor]:
    """Picture, filters and bias, and a gradient by the result; all but the bias as bf16 has them."""
    torch.manual_seed(0)
    batch, ins, outs, height, width = shape
    sizes = ((batch, ins, height, width), (outs, ins, side, side), (outs,), (batch, outs, height, width))
    made = [torch.randn(size).bfloat16().float() for size in sizes]
    return [t.to(memory_format=layout) if t.dim() == 4 else t for t in made]


def gradients(x: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        assert amx.pays(*inputs)
        y = convolution(*inputs)
    assert y.dtype == torch.bfloat16
    return y.detach(), *torch.autograd.grad(y, inputs, upstream.bfloat16())


def exact(x: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    inputs = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    y = F.conv2d(*inputs, padding=weight.shape[2] // 2)
    return y.detach(), *torch.autograd.grad(y, inputs, upstream.double())


@needs_matrices
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_gradients_by_filters_and_bias_are_exact(shape: tuple[int, ...], side: int, layout: Any) -> None:
    tensors = given(shape, side, layout)
    found, true = gradients(*tensors), exact(*tensors)
    for mine, other, within in zip(found, true, (0.02, 0.02, 2e-5, 2e-5), strict=True):  # bf16 where PyTorch's are
        assert float((mine.double() - other).abs().max()) <= within * float(other.std())


@needs_matrices
def test_a_picture_in_bf16_however_it_lies() -> None:
    large = torch.randn(6, 64, 11, 11).bfloat16().to(memory_format=torch.channels_last)
    weight, bias = torch.randn(32, 32, 3, 3, requires_grad=True), torch.zeros(32)
    parts = [large[:, :32].clone(), large[:, :32], large.chunk(2, 1)[1], large[:, :32, :8, :8], large[::2, 32:],
             large[:1, :32].expand(3, -1, -1, -1)]  # fmt: skip
    for x in parts:
        with torch.autocast("cpu", torch.bfloat16):
            assert amx.pays(x, weight, bias)
            y = convolution(x, weight, bias)
        upstream = torch.randn(y.shape).bfloat16()
        (mine,) = torch.autograd.grad(y, [weight], upstream)
        true = exact(x, weight, bias, upstream.float())[2]
        assert float((mine.double() - true).abs().max()) <= 2e-5 * float(true.std())


@needs_matrices
def test_kept_in_another_layout_for_the_way_back() -> None:
    x, weight, bias, upstream = given((4, 32, 32, 16, 16), 3)
    weight.requires_grad_()
    turned = torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t)
    with turned, torch.autocast("cpu", torch.bfloat16):
        y = convolution(x, weight, bias)
    (mine,) = torch.autograd.grad(y, [weight], upstream.bfloat16())
    true = exact(x, weight, bias, upstream)[2]
    assert float((mine.double() - true).abs().max()) <= 2e-5 * float(true.std())


@needs_matrices
@pytest.mark.parametrize("threads", [1, 3, 7])
def test_by_any_number_of_threads(threads: int) -> None:
    own = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in (1, 2, 50):
            tensors = given((batch, 32, 48, 15, 13), 3)
            mine, other = gradients(*tensors)[2], exact(*tensors)[2]
            assert float((mine.double() - other).abs().max()) <= 2e-5 * float(other.std())
    finally:
        torch.set_num_threads(own)


@needs_matrices
def test_within_a_checkpoint_and_beside_products_of_pytorch() -> None:
    """PyTorch configures the same matrices for itself, and counts on finding them as it left them."""
    x, weight, bias, upstream = given((4, 32, 32, 16, 16), 3)
    square = torch.randn(64, 64)
    apart = gradients(x, weight, bias, upstream)

    def stage(x: Tensor) -> Tensor:
        return convolution(x, weight, bias)

    with torch.autocast("cpu", torch.bfloat16):
        before = square @ square
        y: Any = checkpoint(stage, x, use_reentrant=False)
    within = torch.autograd.grad(y, [x, weight, bias], upstream.bfloat16())
    for mine, other in zip(within, apart[1:], strict=True):
        assert torch.equal(mine, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(square @ square, before)


def test_what_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x = Conv1x1(32, 16), torch.randn(2, 32, 6, 6)
    assert not amx.pays(x, conv.weight, conv.bias)  # float32: exactly what it was
    assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias))
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            assert not amx.pays(x, conv.weight, conv.bias)
        frozen = conv.weight.detach()
        assert not amx.pays(x, frozen, conv.bias)
        assert not amx.pays(x[0], conv.weight, conv.bias)
        assert not amx.pays(x[:, :20], torch.randn(16, 20, 1, 1, requires_grad=True), conv.bias)
        monkeypatch.setattr(amx, "available", lambda: False)
        assert not amx.pays(x, conv.weight, conv.bias)
        assert conv(x).dtype == torch.bfloat16


@needs_matrices
def test_a_block_trains_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "faster_in_bf16", lambda: False)
    conv, x = Conv3x3(32, 32), torch.randn(2, 32, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x, residual=x, offset=torch.zeros(2, 32))
    assert any("_Convolution" in type(node).__name__ for node in graph(y.grad_fn))


def graph(node: Any) -> list[Any]:
    return [] if node is None else [node, *(found for after, _ in node.next_functions for found in graph(after))]
