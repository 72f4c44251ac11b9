"""Stable Diffusion's inpainting, nine channels in: read from diffusers, written for it, and drawn as it draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import hf_networks as hf
from hf_networks import alike, load, noise, run_of
from limner import build
from limner import config as c
from limner.api import convert
from limner.cli.program import run as cli
from limner.errors import LimnerError
from limner.generator import Generator
from limner.interop import hf_config, hole
from limner.interop.hf_files import Component
from limner.nn.spatial import with_hole

CAPTIONS = ["a cat", "zebra"]
STEP = torch.tensor([3, 900])
UNET = "unet/diffusion_pytorch_model.safetensors"


def photos() -> tuple[Tensor, Tensor]:
    """Two pictures (2, 3, 16, 16) in [-1, 1], and their masks (2, 1, 16, 16), which no latent cell's border follows."""
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, :, 3:10, 4:13], mask[1, :, :7, 9:] = 1, 1
    return image, mask


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    made = hf.stable_diffusion(folder / "tokenizer", diffusers.StableDiffusionInpaintPipeline, in_channels=9)
    with torch.no_grad():  # so that caption and picture tell in what is drawn
        for name, weight in made.unet.named_parameters():
            weight.mul_(20 if "attn2" in name and weight.ndim > 1 else 1)
        made.unet.conv_in.weight[:, 4:] *= 5
    made.save_pretrained(folder / "sd")
    return folder / "sd"


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer draws the masked picture's latent at random around its mode; here it takes the mode."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def theirs(folder: Path, x: Tensor, guidance: float) -> Tensor:
    """What plain diffusers paints: latents."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipeline, diffusers.StableDiffusionInpaintPipeline)
    pipeline.set_progress_bar_config(disable=True)
    image, mask = photos()
    return pipeline(CAPTIONS, image, mask, num_inference_steps=4, guidance_scale=guidance, latents=x.clone(),
                    output_type="latent").images  # fmt: skip


def mine(gen: Generator, x: Tensor, guidance: float, **options: Any) -> Tensor:
    image, mask = photos()
    return gen.sample(text=CAPTIONS, image=image, mask=mask, steps=4, guidance=guidance, initial_noise=x,
                      **{"output": "latent", **options})  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.usefixtures("modes")
def test_a_photo_a_mask_and_a_caption_are_painted_as_diffusers_does(sd: Path, guidance: float) -> None:
    gen, x = load(sd), noise(2, 4, 8, 8)
    expected = theirs(sd, x, guidance)
    alike(mine(gen, x, guidance), expected)
    image, mask = photos()
    drawn = mine(gen, x, guidance, output="tensor")
    kept = mask.expand_as(drawn) == 0
    assert torch.equal(drawn[kept], image[kept])
    alike(drawn[~kept], gen.decode(expected)[~kept])
    given: dict[str, Any] = {"text": CAPTIONS, "image": image, "mask": mask, "guidance": guidance}
    for name, other in (("text", CAPTIONS[::-1]), ("image", -image), ("mask", mask.flip(0)), ("guidance", 2.0)):
        changed = gen.sample(**{**given, name: other}, steps=4, initial_noise=x, output="latent")
        assert float((changed - expected).abs().max()) > 1e-3 * float(expected.abs().max()), name


def test_there_and_back_is_the_same_to_the_bit(sd: Path, tmp_path: Path) -> None:
    convert(sd, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "out", to="diffusers")
    before, after = (load_file(folder / UNET) for folder in (sd, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipeline, diffusers.StableDiffusionInpaintPipeline)
    card = (tmp_path / "out/README.md").read_text()
    assert 'pictures = pipe("a cat", image, mask,' in card
    assert "pipeline_tag: image-to-image" in card


RUN: dict[str, Any] = {
    "data": {"size": [16, 16]},
    "space": {"kind": "latent", "autoencoder": {"kind": "autoencoder", "latent_channels": 4,
                                                "levels": [{"channels": 32}, {"channels": 64}]}},
    "process": {"schedule": {"kind": "scaled_linear"}, "prediction": "epsilon", "time_input": "step"},
    "model": {"kind": "unet", "heads": 4, "resample": "conv", "modulation": "add", "middle": "transformer",
              "time_scale": 1, "levels": [{"channels": 32}, {"channels": 64, "cross_attention": 1}]},
    "conditions": [
        {"kind": "text", "pooled": False, "null": "empty",
         "encoder": {"kind": "bpe", "vocabulary": 300, "width": 32, "head_dim": 8, "depth": 1, "length": 16,
                     "masked": False, "causal": True, "bias": True}},
        {"kind": "mask", "cells": "first"},
    ],
    "sampling": {"sampler": "ddim", "steps": 4, "spacing": "leading+1", "clip": False},
}  # fmt: skip


@pytest.mark.usefixtures("modes")
def test_a_run_of_ones_own_goes_to_diffusers_and_comes_back(tmp_path: Path) -> None:
    """Its latents have a mean and a deviation of their own; its conditions stand in another order."""
    run, x = run_of(RUN, tmp_path / "run", CAPTIONS * 4), noise(2, 4, 8, 8)
    convert(run, tmp_path / "out", to="diffusers")
    expected = mine(load(run), x, 1.0)
    alike(theirs(tmp_path / "out", x, 1.0), expected, 1e-3)
    back = load(tmp_path / "out")
    assert back.config.conditions == load(run).config.conditions
    alike(mine(back, x, 1.0), expected, 1e-3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["conditions.1.hole=black"], "conditions.mask.hole black: .* train with hole=grey; to diffusers"),
        (["conditions.1.signed=true"], "conditions.mask.signed True: .* train with signed=false; to diffusers"),
        (["conditions.1.cells=any"], "conditions.mask.cells any: .* train with cells=first; to diffusers"),
        (
            ["conditions.0.encoder.causal=false", "conditions.0.encoder.bias=false", "conditions.0.encoder.length=77"],
            "conditions.mask: diffusers' inpainting pipeline has CLIP's text encoder alone",
        ),
        (["conditions.1={kind: label}", "classes=[a, b]"], "diffusers' pipelines have one at a time, or mask and text"),
    ],
)
def test_what_diffusers_would_not_see_so_is_named(tmp_path: Path, settings: list[str], said: str) -> None:
    run = run_of(c.override(RUN, settings), tmp_path / "run", CAPTIONS * 4)
    with pytest.raises(LimnerError, match=said):
        convert(run, tmp_path / "out", to="diffusers")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("modes")
def test_the_unet_alone_takes_latents_and_another_encoders_output(sd: Path) -> None:
    gen, x = load(sd / "unet"), noise(2, 4, 8, 8)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(sd)
    told, null = pipeline.encode_prompt(CAPTIONS, "cpu", 1, True)
    known, mask = noise(2, 4, 8, 8, seed=1), (noise(2, 1, 8, 8, seed=2) > 0).float()
    expected = pipeline.unet(torch.cat([x, mask, known * (1 - mask)], dim=1), STEP, told).sample.detach()
    alike(gen.raw(x, STEP, text=told, mask=with_hole(known, mask)), expected)
    image, mask = photos()
    latent = pipeline.vae.encode(image * (1 - mask)).latent_dist.mode() * pipeline.vae.config["scaling_factor"]
    hole = torch.cat([latent, mask[:, :, ::2, ::2]], dim=1).detach()
    drawn = gen.sample(text=told, negative_text=null, conditions={"mask": hole}, guidance=3.0, steps=4,
                       initial_noise=x, output="latent")  # fmt: skip
    alike(drawn, theirs(sd, x, 3.0))


def test_channels_that_are_no_hole_are_named(sd: Path, tmp_path: Path) -> None:
    """As those of depth, or of a picture to edit."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(sd)
    for channels in (5, 8):
        pipeline.unet = hf.unet_condition(in_channels=channels)
        pipeline.save_pretrained(tmp_path / str(channels))
        with pytest.raises(LimnerError, match=f"in_channels: {channels}, of which the latent has 4") as caught:
            load(tmp_path / str(channels))
        assert "\n" not in str(caught.value)


def test_sample_paints_by_a_caption_from_the_command_line(sd: Path, tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[2:10, 4:15] = 255
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")

    def drawn(name: str, *options: str) -> np.ndarray:
        files = ["--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png"), "--steps", "2"]
        assert cli(["sample", str(sd), *files, *options, "--out", str(tmp_path / name)]) == 0
        with np.load(tmp_path / name) as data:
            return data["x"][0]

    cat = drawn("cat.npz", "--text", "a cat")
    assert np.array_equal(cat[mask == 0], photo[mask == 0])
    assert not np.array_equal(cat[mask > 0], photo[mask > 0])
    assert not np.array_equal(cat, drawn("zebra.npz", "--text", "zebra"))
    assert not np.array_equal(cat, drawn("plain.npz", "--text", "a cat", "--guidance", "1"))


def test_a_picture_is_needed_and_said_so(sd: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli(["sample", str(sd), "--text", "a cat", "--out", str(tmp_path / "x.png")]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert "this model paints in the holes of pictures; give image and mask" in told[-1]
    assert not (tmp_path / "x.png").exists()


def test_a_full_size_one_has_its_published_size() -> None:
    """Five channels more than Stable Diffusion 1.5's, which 859,520,964 weights are."""
    unet = hf_config.unet(Component("UNet2DConditionModel", {"in_channels": 9, "cross_attention_dim": 768}, Path("u")))
    text = {"kind": "text", "pooled": False, "encoder": {"kind": "given", "width": 768}}
    raw = {"data": {"size": 64, "channels": 4}, "model": unet.section, "conditions": [hole.SECTION, text]}
    with torch.device("meta"):
        model = build.model(c.parse(raw, "recipe"))
    assert sum(x.numel() for x in model.network.parameters()) == 859_520_964 + 5 * 320 * 9


def test_the_recipe_says_what_the_network_sees(sd: Path) -> None:
    sections = load(sd).config.conditions
    assert [section.kind for section in sections] == ["mask", "text"]
    assert isinstance(sections[0], c.MaskCondition)
    assert (sections[0].hole, sections[0].signed, sections[0].cells, sections[0].null) == (
        "grey",
        False,
        "first",
        False,
    )
