"""8-bit convolutions against those in float, and `--int8` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import limner
from limner import build
from limner.cli.program import run
from limner.errors import LimnerError
from limner.nn import int8
from limner.nn.int8 import Int8Conv2d, integers_of, quantised
from limner.nn.unet import Level, UNet
from limner.outputs import read_recipe
from limner.redraw import Repeat
from tiny_cli import Workshop

needs_operators = pytest.mark.skipif(not int8.available(), reason="this PyTorch has no 8-bit convolutions")


@pytest.mark.skipif(not hasattr(torch.ops.onednn, "qconv_pointwise"), reason="this PyTorch has no such operator")
def test_where_the_operator_is_there_it_is_used() -> None:
    """Or else a mistake of ours would skip what follows in silence."""
    assert int8.available()


def error_and_bound(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """|8-bit - float|, and how large it may be where each input is off by its step and each weight by half of its."""
    exact = conv(x)
    near = Int8Conv2d(conv)(x)
    assert near.shape == exact.shape
    assert near.is_contiguous(memory_format=torch.channels_last)
    _, step, _ = integers_of(x)
    weight = conv.weight.abs()
    off = (weight.amax((1, 2, 3), keepdim=True) / 127 / 2).expand_as(weight)
    place: Any = (None, conv.stride, conv.padding, conv.dilation, conv.groups)
    bound = F.conv2d(x.abs(), off, *place) + step * F.conv2d(torch.ones_like(x), weight + off, *place)
    return (near - exact).abs(), bound + 1e-5 * exact.abs().max()


@needs_operators
@torch.no_grad()
@pytest.mark.parametrize("options", [
    {}, {"kernel_size": 1, "padding": 0}, {"stride": 2}, {"groups": 4}, {"dilation": 2, "padding": 2}, {"padding": 0},
    {"bias": False}, {"kernel_size": (1, 3), "padding": (0, 1)}, {"groups": 32},
])  # fmt: skip
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolution_is_as_near_as_its_steps(options: dict[str, Any], channels_last: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 64, **{"kernel_size": 3, "padding": 1, **options})
    x = torch.randn(3, 32, 9, 7) + 0.5
    error, bound = error_and_bound(conv, x.to(memory_format=torch.channels_last) if channels_last else x)
    assert (error <= bound).all()
    assert error.square().mean().sqrt() < 0.02 * conv(x).square().mean().sqrt()


@needs_operators
@torch.no_grad()
@pytest.mark.parametrize("channels", [(33, 47), (48, 40), (7, 5)])
@pytest.mark.parametrize("batch", [1, 2])
def test_any_number_of_channels_and_a_batch_of_one(channels: tuple[int, int], batch: int) -> None:
    torch.manual_seed(0)
    error, bound = error_and_bound(nn.Conv2d(*channels, 3, padding=1), torch.randn(batch, channels[0], 6, 6))
    assert (error <= bound).all()


@needs_operators
@torch.no_grad()
@pytest.mark.parametrize("low", [-1.0, 1.0, -6.0])
def test_padding_is_with_zeros_wherever_zero_lies_among_the_levels(low: float) -> None:
    """With weights of one sign a border padded with anything else would be off by a fifth or more."""
    conv = nn.Conv2d(32, 32, 3, padding=1)
    nn.init.constant_(conv.weight, 0.1)
    x = torch.linspace(low, low + 5, 32 * 36).reshape(1, 32, 6, 6)
    error, bound = error_and_bound(conv, x)
    assert (error <= bound).all()
    assert error.max() < 0.02 * conv(x).abs().max()


@needs_operators
@torch.no_grad()
def test_one_input_after_another_of_other_sizes_and_ranges() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 32, 3, padding=1)
    assert conv.bias is not None
    near = Int8Conv2d(conv)
    for size, scale in ((8, 1.0), (4, 100.0), (16, 1e-3), (8, 1.0)):
        x = scale * torch.randn(2, 32, size, size)
        bare = conv(x) - conv.bias[:, None, None]
        assert (near(x) - conv(x)).square().mean().sqrt() < 0.02 * bare.square().mean().sqrt()


@needs_operators
@torch.no_grad()
def test_nothing_and_what_is_not_a_number() -> None:
    conv = nn.Conv2d(32, 32, 3, padding=1)
    near = Int8Conv2d(conv)
    torch.testing.assert_close(near(torch.zeros(1, 32, 4, 4)), conv(torch.zeros(1, 32, 4, 4)))
    x = torch.zeros(1, 32, 4, 4)
    x[0, 0, 0, 0] = torch.nan
    assert near(x).isnan().any()


def test_integers_of_a_range_and_without_the_fused_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(-1.3, 4.1, 1001)
    q, step, zero = integers_of(x)
    assert q.dtype == torch.uint8
    assert (q.min(), q.max()) == (0, 255)
    assert (step * (q.float() - zero) - x).abs().max() <= step * 1.001
    monkeypatch.delattr(torch, "quantize_per_tensor")
    plain, same_step, same_zero = integers_of(x)
    assert (same_step, same_zero) == (step, zero)
    assert (plain.int() - q.int()).abs().max() <= 1


def network() -> UNet:
    torch.manual_seed(0)
    made = UNet(3, 3, [Level(channels=32, blocks=1), Level(channels=64, blocks=1, attention=True)], head_dim=32)
    for parameter in made.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)  # what training would have moved from zero
    return made.eval().requires_grad_(False)


@needs_operators
@torch.no_grad()
def test_a_network_is_near_and_its_original_untouched() -> None:
    made = network()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    near = quantised(made)
    x, time = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.9])
    exact = made(x, time)
    assert (near(x, time) - exact).norm() < 0.05 * exact.norm()
    assert not torch.equal(near(x, time), exact)
    assert not any(isinstance(module, Int8Conv2d) for module in made.modules())
    assert before.keys() == made.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in made.state_dict().items())
    assert {id(p) for p in near.parameters()} < {id(p) for p in made.parameters()}  # what is float is shared


@needs_operators
def test_what_is_sensitive_stays_in_float() -> None:
    near = quantised(network())
    left = {name for name, module in near.named_modules() if isinstance(module, nn.Conv2d)}
    assert {"stem", "out"} < left
    assert all(name in ("stem", "out") or name.endswith("skip") for name in left)
    assert sum(isinstance(module, nn.Linear) for module in near.modules()) == sum(
        isinstance(module, nn.Linear) for module in network().modules()
    )
    again = quantised(near)
    assert [type(module) for module in again.modules()] == [type(module) for module in near.modules()]


def test_refused_elsewhere_than_on_a_cpu_and_without_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LimnerError, match="int8: works on CPUs alone, and the model is on 'meta'"):
        quantised(network().to("meta"))
    monkeypatch.setattr(int8, "available", lambda: False)
    with pytest.raises(LimnerError, match="has no 8-bit convolutions"):
        quantised(network())


# --- the command line -------------------------------------------------------------------------------------------------

WIDE = ("--set", "model.levels.0.channels=32", "--set", "model.levels.1.channels=32")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        made = Workshop(tmp_path_factory.mktemp("shop"), patch)
        assert made.train(made.folder / "wide", *WIDE) == 0
        yield made


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@needs_operators
def test_int8_draws_and_is_recorded(shop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["sample", str(shop.folder / "wide"), "--label", "cat", "--num", "2", "--json", "--out"]
    assert run([*asked, str(tmp_path / "exact")]) == 0
    assert "int8" not in json.loads(capsys.readouterr().out)
    assert run([*asked, str(tmp_path / "near"), "--int8"]) == 0
    assert json.loads(capsys.readouterr().out)["int8"] is True
    exact, near = tmp_path / "exact/000000.png", tmp_path / "near/000000.png"
    assert (read_recipe(near) or {})["int8"] is True
    assert "int8" not in (read_recipe(exact) or {})
    assert np.abs(pixels(near) - pixels(exact)).mean() < 5
    x, y = (limner.load(shop.folder / "wide", int8=each).sample(label="cat", output="tensor") for each in (False, True))  # pyright: ignore
    assert not torch.equal(x, y)  # pixels of so young a model may be equal


@needs_operators
def test_from_such_a_picture_the_same_is_drawn(shop: Workshop, tmp_path: Path) -> None:
    asked = ["sample", str(shop.folder / "wide"), "--num", "3", "--int8", "--out", str(tmp_path / "first.png")]
    assert run(asked) == 0
    assert run(["sample", "--from", str(tmp_path / "first.png"), "--out", str(tmp_path / "again.png")]) == 0
    np.testing.assert_array_equal(pixels(tmp_path / "again.png"), pixels(tmp_path / "first.png"))
    told = Repeat.read(tmp_path / "again.png")
    assert told.int8
    told.check(limner.load(shop.folder / "wide", int8=True), "wide")  # pyright: ignore[reportArgumentType]
    with pytest.raises(LimnerError, match="was loaded without int8"):
        told.check(limner.load(shop.folder / "wide"), "wide")  # pyright: ignore[reportArgumentType]


@needs_operators
def test_an_evaluation_says_so(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", str(shop.folder / "wide"), "--num", "6", "--int8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["int8"] is True


def test_refusals_are_one_line(shop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def refused(arguments: list[str], words: str) -> None:
        assert run(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error

    out = ["--out", str(tmp_path / "x.png")]
    wide = str(shop.folder / "wide")
    refused(["sample", "--from", wide, "--int8", *out], "--int8: doesn't go with --from")
    refused(["evaluate", wide, "--int8", "--bits-per-dim"], "--int8: goes with")
    refused(["evaluate", "x.npz", "--int8", "--reference", str(shop.data)], "int8: goes with the path of a run")
    monkeypatch.setattr(int8, "available", lambda: False)
    refused(["sample", wide, "--int8", *out], "has no 8-bit convolutions")
    monkeypatch.setattr(int8, "available", lambda: True)
    refused(["sample", str(shop.run), "--int8", *out], "no convolution here has 32 channels")
    monkeypatch.setattr("limner.guide.best_device", lambda: torch.device("meta"))
    with pytest.raises(LimnerError, match="works on CPUs alone"):
        build.ready(build.Model(network().to("meta")), torch.device("meta"), int8=True)


def test_a_classifier_is_refused(shop: Workshop, tmp_path: Path) -> None:
    guide = tmp_path / "guide"
    asked = ["train", str(shop.data), "--task", "classifier", "--for", str(shop.run), "--out", str(guide)]
    assert run([*asked, "--images", "8", "--set", "training.batch=8"]) == 0
    with pytest.raises(LimnerError, match="holds a classifier"):
        limner.load(guide, int8=True)
