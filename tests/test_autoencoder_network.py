"""Encoder and decoder: parity with diffusers, sizes, latents, tiling."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn

from limner.errors import LimnerError
from limner.nn.attention import SelfAttention
from limner.nn.autoencoder import Autoencoder, Posterior
from limner.nn.layers import Downsample, ResBlock, Upsample
from limner.nn.quantizer import VectorQuantizer
from limner.nn.tiling import starts, tiled
from limner.nn.unet import Level

DIFFUSERS = {
    "stem": "conv_in", "norm": "conv_norm_out", "out": "conv_out", "middle": "mid_block", "down": "down_blocks",
    "up": "up_blocks",
}  # fmt: skip
KINDS = {ResBlock: "resnets", SelfAttention: "attentions", Downsample: "downsamplers", Upsample: "upsamplers"}


def tiny(quantizer: VectorQuantizer | None = None, **options: object) -> Autoencoder:
    torch.manual_seed(0)
    levels = options.pop("levels", (Level(8), Level(16)))
    return Autoencoder(3, levels, 4, quantizer=quantizer, norm_groups=4, **options)  # pyright: ignore


def randomised(module: nn.Module) -> nn.Module:
    """Every weight random, so that no zero-initialised branch hides."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) / math.sqrt(p[0].numel() if p.ndim > 1 else 4))
    return module


def from_diffusers(ours: Autoencoder, state: dict[str, torch.Tensor]) -> None:
    """Load diffusers' weights; every one of them is used exactly once."""
    state, new = dict(state), ours.state_dict()

    def take(name: str, *sources: str) -> None:
        for part in ("weight", "bias"):
            new[f"{name}.{part}"] = torch.cat([state.pop(f"{source}.{part}") for source in sources])

    def blocks(name: str, sequence: nn.Sequential, source: str) -> None:
        counts = dict.fromkeys(KINDS, 0)
        for i, block in enumerate(sequence):
            here, there = f"{name}.{i}", f"{source}.{KINDS[type(block)]}.{counts[type(block)]}"
            counts[type(block)] += 1
            if isinstance(block, SelfAttention):
                take(f"{here}.norm", f"{there}.group_norm")
                take(f"{here}.qkv", *(f"{there}.to_{letter}" for letter in "qkv"))
                take(f"{here}.out", f"{there}.to_out.0")
            elif isinstance(block, ResBlock):
                for part in ("norm1", "conv1", "norm2", "conv2"):
                    take(f"{here}.{part}", f"{there}.{part}")
                if isinstance(block.skip, nn.Conv2d):
                    take(f"{here}.skip", f"{there}.conv_shortcut")
            else:
                take(f"{here}.conv", f"{there}.conv")

    for side, levels in (("encoder", "down"), ("decoder", "up")):
        network = getattr(ours, side)
        for part in ("stem", "norm", "out"):
            take(f"{side}.{part}", f"{side}.{DIFFUSERS[part]}")
        blocks(f"{side}.middle", network.middle, f"{side}.mid_block")
        for i, level in enumerate(getattr(network, levels)):
            blocks(f"{side}.{levels}.{i}", level, f"{side}.{DIFFUSERS[levels]}.{i}")
    take("quant_conv", "quant_conv")
    take("post_quant_conv", "post_quant_conv")
    if ours.quantizer is not None:
        new["quantizer.codebook"] = state.pop("quantize.embedding.weight")
    assert not state
    ours.load_state_dict(new)


@pytest.mark.parametrize("attention", [True, False])
def test_kl_equals_diffusers(attention: bool) -> None:
    from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]

    kind = (
        ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D") if attention else ("DownEncoderBlock2D", "UpDecoderBlock2D")
    )
    theirs = randomised(AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D", kind[0]),
        up_block_types=(kind[1], "UpDecoderBlock2D"), layers_per_block=2, norm_num_groups=4, latent_channels=4,
    ))  # fmt: skip
    ours = tiny(levels=(Level(8, 2), Level(16, 2, attention=attention)))
    if attention:  # diffusers makes as many heads as fit their width; CompVis' attention has one
        assert all(m.heads == 1 for m in theirs.modules() if type(m).__name__ == "Attention")
    from_diffusers(ours, theirs.state_dict())
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        posterior, expected = ours.encode(x), theirs.encode(x).latent_dist
        torch.testing.assert_close(posterior.mode(), expected.mean, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(posterior.std, expected.std, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(posterior.kl(), expected.kl(), atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(
            ours.decode(expected.mean), theirs.decode(expected.mean).sample, atol=1e-4, rtol=1e-4
        )


def test_vq_equals_diffusers() -> None:
    from diffusers import VQModel  # pyright: ignore[reportPrivateImportUsage]

    theirs = randomised(VQModel(
        block_out_channels=(8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4, latent_channels=3, num_vq_embeddings=20,
    ))  # fmt: skip
    ours = Autoencoder(3, [Level(8), Level(16), Level(16)], 3, norm_groups=4,
                       quantizer=VectorQuantizer(20, 3, update="gradient"))  # fmt: skip
    from_diffusers(ours.eval(), theirs.state_dict())
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        z = theirs.encode(x).latents
        torch.testing.assert_close(ours.encode(x).mode(), z, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("f", "options"),
    [
        (1, {"levels": [Level(8)]}),
        (2, {"levels": [Level(8, attention=True), Level(8)]}),
        (4, {"levels": [Level(8), Level(8)], "patch": 2, "resample": "pool"}),
        (8, {"levels": [Level(8)] * 4, "decoder_levels": [Level(8)], "decoder_patch": 8, "decoder_middle": "none"}),
        (16, {"levels": [Level(8)] * 3, "patch": 4, "middle": "none", "gradient_checkpointing": True}),
        (32, {"levels": [Level(8)] * 6, "z_channels": 5, "stem_channels": 4}),
    ],
)  # fmt: skip
def test_every_factor(f: int, options: dict[str, object]) -> None:
    made = tiny(**options)
    assert made.factor == f
    x = torch.randn(1, 3, 64, 96)
    out = made(x)
    assert out.image.shape == x.shape
    assert out.posterior.mean.shape == (1, 4, 64 // f, 96 // f)
    (out.image.square().mean() + out.posterior.kl().mean()).backward()
    assert all(p.grad is not None for p in made.parameters())


def test_vq_trains_through_the_codebook() -> None:
    made = tiny(VectorQuantizer(16, 4, update="gradient", normalised=True)).train()
    out = made(torch.randn(2, 3, 8, 8), torch.Generator().manual_seed(0))
    assert out.quantised is not None
    torch.testing.assert_close(out.posterior.mean.norm(dim=1), torch.ones(2, 4, 4))
    (out.image.square().mean() + out.quantised.loss).backward()
    assert all(p.grad is not None for p in made.parameters())


def test_vq_decode_absorbs_the_quantiser() -> None:
    made = randomised(tiny(VectorQuantizer(16, 4))).eval()
    z = torch.randn(2, 4, 3, 3)
    codes, _ = made.quantizer.quantise(z)
    torch.testing.assert_close(made.decode(z), made.decode(codes))
    torch.testing.assert_close(made.decode(z), made.decoder(made.post_quant_conv(codes)))


def test_posterior() -> None:
    mean, log_variance = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    posterior = Posterior(mean, log_variance)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, posterior.std), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(posterior.kl(), expected.sum((1, 2, 3)), rtol=1e-4, atol=1e-4)
    draws = torch.stack([posterior.sample(torch.Generator().manual_seed(i)) for i in range(2000)])
    torch.testing.assert_close(draws.mean(0), mean, atol=0.4, rtol=0)
    torch.testing.assert_close(draws.std(0) / posterior.std, torch.ones_like(mean), atol=0.1, rtol=0)
    same = [posterior.sample(torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*same)
    point = Posterior(mean)
    assert torch.equal(point.sample(), point.mode())
    assert point.kl().tolist() == [0, 0]
    assert point.std.abs().max() == 0


def test_normalise_round_trip() -> None:
    made = tiny()
    made.latent_mean.copy_(torch.randn(4))
    made.latent_std.copy_(torch.rand(4) + 0.5)
    z = torch.randn(8, 4, 5, 5) * made.latent_std[:, None, None] + made.latent_mean[:, None, None]
    torch.testing.assert_close(made.denormalise(made.normalise(z)), z)
    torch.testing.assert_close(made.normalise(z).mean((0, 2, 3)), torch.zeros(4), atol=0.3, rtol=0)
    assert {"latent_mean", "latent_std"} <= set(made.state_dict())


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda a: a.encode(torch.zeros(1, 3, 33, 32)), "33x32 is not a multiple .* f = 2; 32x32 or 34x32 would do"),
        (lambda a: a.encode(torch.zeros(1, 1, 32, 32)), r"should be \(B, 3, H, W\)"),
        (lambda a: a.decode(torch.zeros(1, 3, 32, 32)), r"should be \(B, 4, h, w\)"),
        (lambda a: a.encode(torch.zeros(1, 3, 32, 32), tile=7), "multiple of 2, at least 8"),
        (lambda a: tiny(decoder_levels=[Level(8)]), "shrinks by 2, but .* enlarge by 1"),
        (lambda a: tiny(quant_conv=False, z_channels=8), "z_channels 8 without quant_conv"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_said(call: Callable[[Autoencoder], object], says: str) -> None:
    with pytest.raises(LimnerError, match=says):
        call(tiny())


@pytest.mark.parametrize("length", [5, 16, 17, 40, 100])
def test_tiles_cover(length: int) -> None:
    begin = starts(length, 16, 4)
    covered = sorted({i for s in begin for i in range(s, min(s + 16, length))})
    assert covered == list(range(length))
    assert all(b - a <= 12 for a, b in pairwise(begin))


def test_tiling_blends_without_seams() -> None:
    """A function of a pixel alone comes out exactly; resampling keeps its place."""
    x = torch.rand(2, 3, 40, 56)
    torch.testing.assert_close(tiled(torch.tanh, x, 16, 4), x.tanh())
    half = tiled(lambda t: torch.nn.functional.avg_pool2d(t, 2), x, 8, 2, shrink=2)
    torch.testing.assert_close(half, torch.nn.functional.avg_pool2d(x, 2))
    double = tiled(lambda t: t.repeat_interleave(2, 2).repeat_interleave(2, 3), x, 16, 4, grow=2)
    torch.testing.assert_close(double, x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_tiled_autoencoder() -> None:
    made = randomised(tiny(middle="none")).eval()
    x = torch.rand(1, 3, 48, 64)
    with torch.no_grad():
        whole, pieces = made.encode(x), made.encode(x, tile=32)
        assert pieces.mean.shape == whole.mean.shape
        assert pieces.std.shape == whole.std.shape
        assert torch.equal(made.encode(x, tile=64).mean, whole.mean)
        assert made.decode(whole.mean, tile=32).shape == x.shape
        assert torch.equal(made.decode(whole.mean, tile=64), made.decode(whole.mean))
