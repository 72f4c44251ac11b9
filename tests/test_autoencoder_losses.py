"""The discriminator, its losses and the perceptual measures, against closed forms and torchmetrics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from limner.errors import LimnerError
from limner.nn.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_hinge,
    generator_hinge,
    r1_penalty,
)
from limner.nn.perceptual import FeatureDistance, Lite0Features, perceptual_distance, psnr, ssim


def shapes(n: int, seed: int) -> torch.Tensor:
    """Sharp-edged pictures: a bright rectangle somewhere on a dark ground, (n, 3, 32, 32)."""
    rng = torch.Generator().manual_seed(seed)
    top, left = torch.randint(0, 16, (2, n, 1, 1), generator=rng)
    y, x = torch.arange(32)[:, None], torch.arange(32)
    inside = (y >= top) & (y < top + 14) & (x >= left) & (x < left + 14)
    return (inside.float()[:, None] * 1.6 - 0.8).repeat(1, 3, 1, 1)


@pytest.mark.parametrize("regulariser", ["none", "r1", "lecam"])
def test_the_discriminator_learns(regulariser: str) -> None:
    """It tells sharp pictures from blurred ones, on pictures it hasn't seen."""
    torch.manual_seed(0)
    network = PatchDiscriminator(3, width=16, layers=2)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, betas=(0.5, 0.9))
    losses = []
    for step in range(60):
        real = shapes(8, step).requires_grad_(regulariser == "r1")
        fake = F.avg_pool2d(real.detach(), 3, 1, 1)
        on_real, on_fake = network(real), network(fake)
        loss = discriminator_hinge(on_real, on_fake)
        losses.append(loss.item())
        if regulariser == "r1":
            loss = loss + 0.01 * r1_penalty(on_real, real)
        elif regulariser == "lecam":
            loss = loss + 0.01 * network.lecam(on_real, on_fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(1.0, abs=0.2)
    network.eval()
    with torch.no_grad():
        real = shapes(32, 999)
        gap = network(real).mean((1, 2, 3)) - network(F.avg_pool2d(real, 3, 1, 1)).mean((1, 2, 3))
    assert sum(losses[-10:]) / 10 < 0.7
    assert (gap > 0.5).float().mean() > 0.95


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_a_verdict_sees_so_many_pixels(layers: int, field: int) -> None:
    network = PatchDiscriminator(1, width=8, layers=layers)
    for module in network.modules():  # a norm would let every pixel touch every verdict
        if isinstance(module, nn.GroupNorm):
            module.forward = nn.Identity().forward
    x = torch.randn(1, 1, 128, 128, requires_grad=True)
    logits = network(x)
    (grad,) = torch.autograd.grad(logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2], x)
    rows = grad[0, 0].abs().sum(1).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == field


def test_hinge() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert discriminator_hinge(real, fake).item() == pytest.approx(0.5 * (0.5 + 1.0))
    assert generator_hinge(fake).item() == pytest.approx(1.0)


def test_r1_of_a_linear_network() -> None:
    weight, x = torch.randn(3, 4, 4), torch.randn(5, 3, 4, 4, requires_grad=True)
    penalty = r1_penalty((x * weight).sum((1, 2, 3)), x)
    assert penalty.item() == pytest.approx(0.5 * weight.square().sum().item(), rel=1e-5)


def test_adaptive_weight_is_a_ratio_of_gradients_and_clamped() -> None:
    last = nn.Parameter(torch.ones(4))
    slope = torch.tensor([1.0, 2.0, 3.0, 4.0])
    weight = adaptive_weight((6 * slope * last).sum(), (2 * slope * last).sum(), last, largest=10)
    assert weight.item() == pytest.approx(3.0, rel=1e-3)
    assert adaptive_weight((6 * slope * last).sum(), (1e-9 * slope * last).sum(), last, largest=10).item() == 10


def test_psnr_and_ssim_are_torchmetrics() -> None:
    x = torch.rand(3, 3, 24, 20) * 2 - 1
    y = (x + 0.2 * torch.randn_like(x)).clamp(-1, 1)
    _, similar = structural_similarity_index_measure(
        y / 2 + 0.5, x / 2 + 0.5, data_range=1.0, reduction="none", return_full_image=True
    )
    expected = peak_signal_noise_ratio(y, x, data_range=2.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(x, y), expected)
    inside = similar[..., 5:-5, 5:-5].mean((1, 2, 3))  # torchmetrics' own mean counts reflected borders
    torch.testing.assert_close(ssim(x, y), inside, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ssim(x, x), torch.ones(3))
    with pytest.raises(LimnerError, match="11 pixels"):
        ssim(x[..., :8], y[..., :8])


def test_feature_distance_by_hand() -> None:
    x, y = torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    x[0, 0], y[0, 1] = 3.0, 0.5
    assert FeatureDistance(lambda z: [z, z])(x, y).item() == pytest.approx(2.0)
    assert FeatureDistance(lambda z: [z, z])(x, 7 * x).item() == pytest.approx(0.0)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_perceptual_distance_grows_with_damage_and_gives_a_gradient(channels: int) -> None:
    distance = perceptual_distance("efficientnet-lite0").train()
    assert not distance.training
    assert not any(p.requires_grad for p in distance.parameters())
    x = shapes(2, 0)[:, :1].repeat(1, channels, 1, 1)
    blurred = [F.avg_pool2d(x, k, 1, k // 2) for k in (1, 3, 7)]
    measured = [distance(x, b).mean().item() for b in blurred]
    assert measured[0] == pytest.approx(0.0, abs=1e-6)
    assert measured[0] < measured[1] < measured[2]
    y = blurred[1].requires_grad_()
    assert torch.autograd.grad(distance(x, y).sum(), y)[0].abs().sum() > 0


def test_lite0_sees_four_strides() -> None:
    maps = Lite0Features().eval()(torch.zeros(1, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4)]


def test_unknown_and_missing_networks() -> None:
    with pytest.raises(LimnerError, match="did you mean 'efficientnet-lite0'"):
        perceptual_distance("efficientnet-lite")
