"""Published sizes, and the memory that a conversion takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import hf_networks as hf
from limner import build
from limner import config as c
from limner.interop import adm, hf_config, hf_text
from limner.interop.hf_files import Component

SD_UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
SD_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "sample_size": 512,
}  # fmt: skip
CLIP_L: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}


def count(module: torch.nn.Module | None) -> int:
    assert module is not None
    return sum(parameter.numel() for parameter in module.parameters())


def test_stable_diffusion_1_5_has_its_published_size() -> None:
    """Of diffusers' default settings, and of its autoencoder and text encoder: nothing is allocated."""
    unet = hf_config.unet(Component("UNet2DConditionModel", SD_UNET, Path("unet")))
    stage = hf_config.autoencoder(Component("AutoencoderKL", SD_VAE, Path("vae")))
    text = hf_text.encoder(Component("CLIPTextModel", CLIP_L, Path("text")))
    space = {"kind": "latent", "autoencoder": stage.section}
    raw = {"data": {"size": 512}, "space": space, "model": unet.section, "conditions": [text.section]}
    with torch.device("meta"):
        model = build.model(c.parse(raw, "recipe"))
    assert count(model.network) == 859_520_964
    assert count(model.autoencoder) == 83_653_863
    assert count(model.conditioner) == 123_060_480


def test_adm_256_has_its_published_size() -> None:
    with torch.device("meta"):
        assert count(build.model(adm.recipe("256x256_diffusion")).network) + 1000 * 1024 == 553_838_086


CONVERT = """
import resource, sys
from limner.api import convert
def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
convert(sys.argv[1], sys.argv[2])  # whatever is imported on the way is in memory now
before, told = most(), []
convert(sys.argv[3], sys.argv[4], progress=lambda k, n: told.append((k, n)))
assert told[-1][0] == told[-1][1] > 100
print(most() - before)
"""


def test_a_conversion_holds_less_than_the_file_and_a_third(tmp_path: Path) -> None:
    """The mapped file itself among it."""
    hf.unet().save_pretrained(tmp_path / "small")
    hf.unet(block_out_channels=(256, 512), layers_per_block=2).half().save_pretrained(tmp_path / "large")
    size = (tmp_path / "large/diffusion_pytorch_model.safetensors").stat().st_size
    assert size > 100e6
    folders = [str(tmp_path / name) for name in ("small", "out", "large", "out2")]
    made = subprocess.run([sys.executable, "-c", CONVERT, *folders], capture_output=True, text=True, check=True)
    assert int(made.stdout.split()[-1]) < 1.3 * size
