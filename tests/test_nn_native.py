"""The loops in C: they equal PyTorch's operations, and whoever can't have them goes on without."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from limner import native
from limner.nn import norm, winograd
from limner.nn.norm import GroupNorm
from limner.nn.winograd import Conv3x3

HERE = any(shutil.which(name) for name in native.COMPILERS)
Works = Callable[[], Tensor]


@pytest.fixture(params=["in C", "by PyTorch"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether the loops are to be had: both ways have to hold."""
    for module in (norm, winograd):
        module._loops.cache_clear()
    if request.param == "by PyTorch":
        monkeypatch.setenv("LIMNER_NATIVE", "0")
    yield HERE and request.param == "in C"
    for module in (norm, winograd):
        module._loops.cache_clear()


def gradients(work: Works, inputs: list[Tensor], seed: int = 0) -> list[Tensor]:
    """The result, and its gradients by the inputs."""
    y = work()
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]


def near(mine: Tensor, other: Tensor, within: float) -> bool:
    """Alike to so many standard deviations."""
    return float((mine - other).abs().max()) <= within * float(other.std() + 1e-6)


@pytest.mark.parametrize("shape", [(8, 32, 48, 16, 16), (3, 48, 32, 31, 26), (40, 64, 32, 5, 7), (1, 80, 112, 50, 45)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_convolution_and_its_gradients(shape: tuple[int, ...], layout: Any, loops: bool) -> None:
    torch.manual_seed(0)
    batch, ins, outs, height, width = shape
    conv = Conv3x3(ins, outs).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    x = torch.randn(batch, ins, height, width).to(memory_format=layout).requires_grad_()
    assert winograd.pays(x, conv.weight) == loops
    inputs = [x, *conv.parameters()]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    theirs = gradients(lambda: F.conv2d(exact[0], exact[1], exact[2], padding=1), exact)
    for mine, other in zip(gradients(lambda: conv(x), inputs), theirs, strict=True):
        assert near(mine, other, 5e-5)
    with torch.no_grad():
        assert near(conv(x), theirs[0], 5e-5)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("batch", [1, 8])
def test_an_offset_of_each_picture_and_its_gradient(batch: int) -> None:
    torch.manual_seed(0)
    conv, x = Conv3x3(32, 48), torch.randn(8, 32, 17, 18)
    offset = torch.randn(batch, 48, requires_grad=True)  # or one for all
    inputs = [offset, *conv.parameters()]
    found = gradients(lambda: conv(x, offset=offset), inputs)
    theirs = gradients(lambda: F.conv2d(x, conv.weight, conv.bias, padding=1) + offset[:, :, None, None], inputs)
    for mine, other in zip(found, theirs, strict=True):
        assert near(mine, other, 2e-4)


@pytest.mark.parametrize("threads", [1, 3, 7])
@pytest.mark.parametrize("channels", [32, 112])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_by_any_number_of_threads(threads: int, channels: int, dtype: torch.dtype,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    torch.manual_seed(0)
    monkeypatch.setattr(winograd, "faster_in_bf16", lambda: True)
    conv, half = Conv3x3(channels, channels), dtype == torch.bfloat16
    own = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in (2, 11, 50):
            x = torch.randn(batch, channels, 15, 13).to(dtype)
            upstream = torch.randn(x.shape).to(dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                y = conv(x)
            (mine,) = torch.autograd.grad(y, [conv.weight], upstream)
            exact = conv.weight.detach().double().requires_grad_()
            (other,) = torch.autograd.grad(F.conv2d(x.double(), exact, padding=1), [exact], upstream.double())
            assert near(mine, other, 0.1 if half else 5e-5)
    finally:
        torch.set_num_threads(own)


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_a_convolution_under_autocast(faster: bool, given: torch.dtype, loops: bool,
                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    torch.manual_seed(0)
    monkeypatch.setattr(winograd, "faster_in_bf16", lambda: faster)
    conv = Conv3x3(48, 32)
    x, beside = (torch.randn(6, n, 19, 18).to(given).requires_grad_() for n in (48, 32))
    inputs = [x, beside, *conv.parameters()]
    exact = [t.detach().double().requires_grad_() for t in inputs]

    def work() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            assert winograd.pays(x, conv.weight) == (loops and faster)
            return conv(x, beside)

    theirs = gradients(lambda: F.conv2d(exact[0], exact[2], exact[3], padding=1) + exact[1], exact)
    found = gradients(work, inputs)
    assert [t.dtype for t in found[1:]] == [t.dtype for t in inputs]
    assert found[0].dtype == torch.bfloat16
    for mine, other in zip(found, theirs, strict=True):
        assert near(mine.double(), other, 0.1)  # a rounding of 2^-9 in Winograd's numbers is one of 0.012 afterwards
        assert float((mine - other).std()) <= 0.015 * float(other.std())


def test_which_is_faster_in_bf16_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path))
    (tmp_path / "native").mkdir()
    for first in (True, False):
        answers = [first, not first]
        monkeypatch.setattr(winograd, "measured_faster_in_bf16", lambda left=answers: left.pop(0))
        for _ in range(3):
            winograd.faster_in_bf16.cache_clear()  # as in a later process
            assert winograd.faster_in_bf16() == first
        assert len(answers) == 1
        for kept in (tmp_path / "native").glob("bf16*"):
            kept.unlink()
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path / "nowhere"))
    monkeypatch.setattr(winograd, "measured_faster_in_bf16", lambda: True)
    winograd.faster_in_bf16.cache_clear()
    assert winograd.faster_in_bf16()  # where nothing can be kept each process measures
    winograd.faster_in_bf16.cache_clear()


@pytest.mark.skipif(not HERE, reason="no C compiler")
def test_measuring_leaves_chance_modes_and_checkpoints_alone() -> None:
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert winograd.measured_faster_in_bf16() in (True, False)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    turns = iter([winograd.measured_faster_in_bf16, bool])  # by the first pass alone, not when it is done again

    def stage(x: Tensor) -> Tensor:
        next(turns)()
        return x.exp()

    x = torch.ones(3, requires_grad=True)
    checkpoint(stage, x, use_reentrant=False).sum().backward()  # pyright: ignore[reportOptionalMemberAccess]
    assert x.grad is not None


@pytest.mark.usefixtures("loops")
def test_a_residual_is_added_and_has_its_gradient() -> None:
    torch.manual_seed(0)
    conv, x = Conv3x3(32, 48), torch.randn(8, 32, 17, 18)
    beside = torch.randn(8, 48, 17, 18, requires_grad=True)
    y = conv(x, beside)
    assert near(y.detach(), (F.conv2d(x, conv.weight, conv.bias, padding=1) + beside).detach(), 2e-4)
    upstream = torch.randn(y.shape)
    assert torch.equal(*torch.autograd.grad(y, [beside], upstream), upstream)


@pytest.mark.usefixtures("loops")
def test_only_the_gradients_that_are_wanted() -> None:
    conv, x = Conv3x3(32, 32), torch.randn(8, 32, 16, 16)
    conv(x).sum().backward()
    assert conv.weight.grad is not None
    conv.requires_grad_(False)
    x.requires_grad_()
    conv(x).sum().backward()
    assert x.grad is not None


def test_a_frozen_networks_picture_is_the_same_alone_and_among_others() -> None:
    for channels, least in ((64, 1), (144, 13)):  # the filters of many channels cost too much for a small picture
        conv = Conv3x3(channels, channels).requires_grad_(False)
        normed = GroupNorm(channels).requires_grad_(False)
        for size in (4, 8, 16, 23):
            x = torch.randn(9, channels, size, size)
            assert winograd.pays(x, conv.weight) == winograd.pays(x[:1], conv.weight) == (HERE and size >= least)
            if HERE and size >= least:
                assert torch.equal(normed(conv(x))[:1], normed(conv(x[:1])))


def test_what_is_left_to_pytorch() -> None:
    conv, x = Conv3x3(32, 32), torch.randn(8, 32, 16, 16)
    assert winograd.pays(x, conv.weight) == HERE
    for unfit in (x.double(), x.bfloat16(), x[:0], x[:, :, :4, :4], x.to("meta")):
        assert not winograd.pays(unfit, conv.weight)
    assert not winograd.pays(torch.randn(8, 20, 16, 16), Conv3x3(20, 32).weight)
    with torch.autocast("cpu", torch.float16):
        assert not winograd.pays(x, conv.weight)


@pytest.mark.parametrize("channels", [32, 48, 192])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
def test_a_norm_and_its_gradients(channels: int, silu: bool, modulated: bool, loops: bool) -> None:
    torch.manual_seed(0)
    module = GroupNorm(channels)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    x = (30 * torch.randn(3, channels, 9, 8) + 5).requires_grad_()
    pair = [3 * torch.randn(3, channels) for _ in range(2)] if modulated else []
    inputs = [x, *module.parameters(), *(part.requires_grad_() for part in pair)]
    assert norm.native_pays(norm._rows(x), module.weight, module.bias) == loops
    exact = [t.detach().double().requires_grad_() for t in inputs]
    double = GroupNorm(channels).double()
    double.weight, double.bias = nn.Parameter(exact[1]), nn.Parameter(exact[2])
    exact[1], exact[2] = double.weight, double.bias
    theirs = gradients(lambda: double.by_kernels(exact[0], *(exact[3:] or (None, None)), silu=silu), exact)
    for mine, other in zip(gradients(lambda: module(x, *pair, silu=silu), inputs), theirs, strict=True):
        assert near(mine, other, 1e-4)
    with torch.no_grad():
        assert near(module(x, *pair, silu=silu), theirs[0], 1e-4)


def test_a_norm_in_bf16(loops: bool) -> None:
    torch.manual_seed(0)
    module = GroupNorm(48)
    nn.init.normal_(module.weight)
    x = (4 * torch.randn(3, 48, 9, 8) + 2).bfloat16().requires_grad_()
    pair = [torch.randn(3, 48, requires_grad=True) for _ in range(2)]
    inputs = [x, *module.parameters(), *pair]
    assert norm.native_pays(norm._rows(x), module.weight, module.bias) == loops
    found = gradients(lambda: module(x, *pair, silu=True), inputs)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    exact = [t.detach().float().requires_grad_() for t in inputs]
    module.weight, module.bias = (nn.Parameter(t) for t in exact[1:3])
    exact[1:3] = [module.weight, module.bias]
    theirs = gradients(lambda: module(exact[0], *exact[3:], silu=True), exact)
    for mine, other in zip(found, theirs, strict=True):
        assert torch.allclose(mine.float(), other, rtol=0.01, atol=(0.03 if loops else 0.1) * float(other.std()))


@pytest.mark.usefixtures("loops")
def test_what_isnt_a_number_is_passed_on() -> None:
    x = torch.randn(2, 32, 16, 16)
    x[0, 3, 4, 5] = torch.nan
    conv, module = Conv3x3(32, 32).requires_grad_(False), GroupNorm(32).requires_grad_(False)
    for y in (conv(x), module(x, silu=True), module(x.bfloat16(), silu=True)):
        assert y[0].isnan().any()
        assert not y[1].isnan().any()
    module.bias.view(torch.int32).fill_(0x7FFFFFFF)  # rounded as a number it would be zero
    assert module(x.bfloat16(), silu=True).isnan().all()


@pytest.mark.usefixtures("loops")
def test_saturated_silu() -> None:
    module = GroupNorm(32)
    far = torch.tensor([[-1e4], [-90.0], [0.0], [90.0], [1e4]]).expand(5, 32)
    y = module(torch.zeros(5, 32, 4, 4), None, far, silu=True)
    assert torch.allclose(y, F.silu(far)[:, :, None, None].expand_as(y), atol=1e-6)


def test_arithmetic_is_counted_as_that_of_a_convolution() -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Conv3x3(32, 32)(torch.randn(8, 32, 16, 16))
    assert counter.get_total_flops() == 2 * 8 * 16 * 16 * 32 * 32 * 9


def test_compiled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "seven.c"
    source.write_text("int seven(long add) { return add - 7; }\n")
    with ThreadPoolExecutor(4) as pool:  # several processes may ask at once, here threads
        found = list(pool.map(lambda _: native.compiled(source, {"seven": [native.ctypes.c_long]}), range(4)))
    assert all((loops is not None) == HERE for loops in found)
    if not HERE:
        return
    native.call(found[0], "seven", 7)
    with pytest.raises(MemoryError, match="seven"):
        native.call(found[0], "seven", 8)
    (kept,) = (tmp_path / "cache" / "native").iterdir()
    before = kept.stat().st_mtime_ns
    assert native.compiled(source, {}) is not None
    assert kept.stat().st_mtime_ns == before
    source.write_text("int eight(void) { return 0; }\n")
    assert native.compiled(source, {"eight": []}) is not None


def test_without_a_compiler_nothing_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "wrong.c"
    source.write_text("this is not C\n")
    assert native.compiled(source, {}) is None
    source.write_text("int right(void) { return 0; }\n")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda _: None)
        assert native.compiled(source, {}) is None
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(subprocess.TimeoutExpired("cc", 1)))
        assert native.compiled(source, {}) is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path / "file" / "cache"))
    assert native.compiled(source, {}) is None
