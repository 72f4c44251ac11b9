"""The presets at the papers' scale: their published sizes and hyperparameters, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from limner import build
from limner import config as c
from limner.interop import adm, compvis_config
from limner.interop.compvis_config import Settings
from limner.recipe import raw_recipe

CLASSES = [str(number) for number in range(1000)]


def recipe(name: str, *settings: str) -> c.RunConfig:
    raw = raw_recipe(name, source=None, settings=settings, budget=None, images=None, seed=None)
    return c.parse({**raw, "classes": CLASSES}, name)


def sizes(config: c.RunConfig) -> tuple[int, int, int]:
    """Parameters of the network, the conditioner and the autoencoder; nothing is allocated."""
    with torch.device("meta"):
        model = build.model(config)
    parts = (model.network, model.conditioner, model.autoencoder)
    return tuple(0 if part is None else sum(p.numel() for p in part.parameters()) for part in parts)


LEVELS = {128: (256, 256, 512, 768, 1024), 512: (128, 256, 256, 512, 512, 1024, 1024)}


def other_size(pixels: int) -> c.RunConfig:
    """ADM at 128 and 512 pixels, as docs/scale.md says it: another list of levels."""
    levels = [
        {"channels": channels, "blocks": 2, "attention": pixels // 2**i <= 32 and i > 0}
        for i, channels in enumerate(LEVELS[pixels])
    ]
    heads = ["model.head_dim=null", "model.heads=4"] if pixels == 128 else []
    return recipe("imagenet256-adm", f"data.size={pixels}", f"model.levels={levels}", *heads)


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (recipe("imagenet64-adm"), 295.9),
        (other_size(128), 421.5),
        (recipe("imagenet256-adm"), 553.8),
        (other_size(512), 559.0),
    ],
)
def test_adm_has_its_published_size(config: c.RunConfig, millions: float) -> None:
    """Of the U-Net and the table of its 1,000 classes (Dhariwal & Nichol 2021, table 11)."""
    assert round(sum(sizes(config)) / 1e6, 1) == millions


@pytest.mark.parametrize(("name", "flags"), [("imagenet64-adm", "64x64_diffusion"),
                                             ("imagenet256-adm", "256x256_diffusion")])  # fmt: skip
def test_adm_is_the_published_model(name: str, flags: str) -> None:
    """Network, process and condition are those that the published flags describe."""
    ours, published = recipe(name), adm.recipe(flags)
    assert ours.model == published.model
    assert ours.process == published.process
    assert ours.conditions == published.conditions
    assert ours.data.size == published.data.size


def test_ldm_4_has_its_published_size() -> None:
    network, table, autoencoder = sizes(recipe("imagenet256-ldm4"))
    assert (network, table) == (400_920_579, 1001 * 512)
    assert autoencoder == 55_322_782


def test_ldm_8_for_text_has_its_published_size() -> None:
    """1.45 G: the published encoder carries a layer for predicting words, which draws nothing and which ours lacks."""
    network, text, autoencoder = sizes(recipe("text256-ldm8"))
    assert network == 872_300_484
    assert autoencoder == 83_653_863
    predicting = 1280 * 30522 + 30522
    assert round((network + text + predicting) / 1e9, 2) == 1.45


def compvis(unet: dict[str, Any], stage: dict[str, Any], *, kl: bool, start: float, end: float, side: int) -> Settings:
    network = {"image_size": side, "num_res_blocks": 2, "use_spatial_transformer": True, "transformer_depth": 1, **unet}
    coder = {"double_z": kl, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "num_res_blocks": 2,
             "attn_resolutions": [], "dropout": 0.0, **stage}  # fmt: skip
    first = {"embed_dim": stage["z_channels"], "ddconfig": coder} | ({} if kl else {"n_embed": 8192})
    params = {
        "linear_start": start,
        "linear_end": end,
        "timesteps": 1000,
        "image_size": side,
        "unet_config": {"target": "ldm.UNetModel", "params": network},
        "first_stage_config": {"target": "ldm.AutoencoderKL" if kl else "ldm.VQModelInterface", "params": first},
    }
    return Settings(params, "LatentDiffusion", "published.yaml")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("imagenet256-ldm4", compvis(
            {"in_channels": 3, "out_channels": 3, "model_channels": 192, "attention_resolutions": [8, 4, 2],
             "channel_mult": [1, 2, 3, 5], "num_heads": 1, "context_dim": 512},
            {"z_channels": 3, "ch_mult": [1, 2, 4]}, kl=False, start=0.0015, end=0.0195, side=64)),
        ("text256-ldm8", compvis(
            {"in_channels": 4, "out_channels": 4, "model_channels": 320, "attention_resolutions": [4, 2, 1],
             "channel_mult": [1, 2, 4, 4], "num_heads": 8, "context_dim": 1280, "use_checkpoint": True},
            {"z_channels": 4, "ch_mult": [1, 2, 4, 4]}, kl=True, start=0.00085, end=0.012, side=32)),
    ],
)  # fmt: skip
def test_latent_diffusion_is_the_published_model(name: str, settings: Settings) -> None:
    """Network, process and autoencoder are those that the published configuration describes."""
    ours = recipe(name)
    published = compvis_config.recipe(
        settings, [section.model_dump(mode="json") for section in ours.conditions], None, name
    )
    assert ours.process == published.process
    assert ours.model == published.model
    assert isinstance(ours.space, c.LatentSpace)
    assert isinstance(published.space, c.LatentSpace)
    assert ours.space.autoencoder.regulariser == published.space.autoencoder.regulariser
    assert [level.channels for level in ours.space.autoencoder.levels] == [
        level.channels for level in published.space.autoencoder.levels
    ]


@pytest.mark.parametrize(("name", "steps"), [("imagenet64-adm", 540_000), ("imagenet256-adm", 1_980_000),
                                             ("imagenet256-ldm4", 178_000), ("text256-ldm8", 390_000)])  # fmt: skip
def test_budgets_and_averages_are_those_of_the_papers(name: str, steps: int) -> None:
    """As many steps as published; an average as wide, at the end, as an exponential one of 0.9999."""
    training = recipe(name).training
    assert training.images == steps * training.batch
    assert training.ema.relative_std == pytest.approx(10_000 / steps, rel=0.02)
