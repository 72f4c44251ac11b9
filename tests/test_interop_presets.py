"""Every preset's run goes to diffusers and comes back; or the part that cannot is named, and what would do instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import limner
from hf_networks import noise, raw_network, run_of
from limner import build
from limner import config as c
from limner.api import convert
from limner.errors import LimnerError
from limner.generator import Generator

STEP = torch.tensor([3, 900])
CAPTIONS = ["a red heart", "a tree"]
LARGE = {"imagenet64-adm": 6, "imagenet256-adm": 8, "imagenet256-ldm4": 6, "text256-ldm8": 10}
"""The presets that are made for large machines; their channels are divided by this, and all else stays."""
LACKS = {
    "autoencoder": "autoencoder.patch 2: ",
    "camvid-layout": "conditions.boxes: ",
    "camvid-semantic": "conditions.semantic_map: ",
    "cifar10": "model.patch 2: ",
    "cifar10-classifier": "task classifier: ",
    "cifar10-uncond": "model.patch 2: ",
    "default": "model.head_dim: heads of 96 and 64 channels; ",
    "digits": "model.patch 2: ",
    "emoji": "model.patch 4: ",
    "emoji-inpaint": "conditions.mask",
    "emoji-text": "model.resample block: ",
    "emoji-variation": "conditions.variation: ",
    "emoji-x4": "conditions.image: ",
    "imagenet256-ldm4": "conditions.label.enters token: ",
}
"""What stands first in the refusal; presets that aren't here go."""
INSTEAD: dict[str, list[str]] = {
    "autoencoder": ["model.patch=1", "model.norm_groups=16"],
    "cifar10": ["model.patch=1"],
    "cifar10-uncond": ["model.patch=1"],
    "default": ["model.head_dim=96"],
    "digits": ["model.patch=1", "model.norm_groups=8"],
    "emoji": ["model.patch=1", "model.head_dim=96"],
    "emoji-text": [
        "model.resample=conv", "conditions.0.pooled=false", "conditions.0.null=empty",
        "conditions.0.encoder.masked=false", "conditions.0.encoder.length=77", "space.autoencoder.patch=1",
        "space.autoencoder.norm_groups=16",
    ],
}  # fmt: skip
"""Settings with which a preset goes, in the order in which the refusals name them."""


def preset(name: str) -> dict[str, Any]:
    raw = build.preset(name)
    if name in LARGE:
        return {**small(raw, LARGE[name]), "classes": ["a", "b"]}
    raw["data"] = {**raw.get("data", {}), "size": raw.get("data", {}).get("size", [64, 64])}
    for section in raw.get("conditions", ()):
        if section["kind"] in ("semantic_map", "boxes"):
            section.setdefault("classes", ["a", "b"])
    return {**raw, "classes": ["a", "b"]}


def small(raw: dict[str, Any], share: int) -> dict[str, Any]:
    """The same with fewer channels, so that a test can hold it."""
    model = raw["model"]
    model["levels"] = [{**level, "channels": level["channels"] // share} for level in model["levels"]]
    model["time_channels"] //= share
    if model["head_dim"] is not None:
        model["head_dim"] //= 4
    raw["data"]["size"] = [64, 64]
    if "space" in raw:
        first = raw["space"]["autoencoder"]
        first["levels"] = [{**level, "channels": level["channels"] // 4} for level in first["levels"]]
    for section in raw["conditions"]:
        if section["kind"] == "text":
            section["encoder"] |= {"vocabulary": 300, "width": 32, "depth": 2, "head_dim": 4}
    return raw


def alike(mine: Tensor, theirs: Tensor) -> None:
    assert mine.shape == theirs.shape
    assert float((mine - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())


def load(path: Path) -> Generator:
    loaded = limner.load(path)
    assert isinstance(loaded, Generator)
    return loaded


def said_in_refusal(run: Path, out: Path) -> str | None:
    """Why a run cannot go to diffusers, or None where it did."""
    try:
        convert(run, out, to="diffusers")
    except LimnerError as error:
        return str(error)
    return None


def check_there_and_back(run: Path, out: Path) -> None:
    """diffusers' own network, and ours read back, give what the run gives."""
    mine, back = load(run), load(out)
    if mine.config.task == "autoencoder":
        image = noise(1, 3, 64, 64)
        alike(back.encode(image), mine.encode(image))
        theirs = diffusers.AutoencoderKL.from_pretrained(out)
        with torch.no_grad():
            alike(theirs.encode(image).latent_dist.mode(), mine.encode(image))  # pyright: ignore
        return
    kind = mine.modalities[0] if mine.modalities else ""
    told = {"label": {"label": torch.tensor([0, 1])}, "text": {"text": CAPTIONS}}.get(kind, {})
    x = noise(2, *mine.shape)
    expected = raw_network(mine, x, STEP, **told)
    alike(back.raw(x, STEP, **told), expected)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(out)
    given: dict[str, Any] = {"class_labels": told["label"]} if kind == "label" else {}
    if kind == "text":
        tokens = pipeline.tokenizer(CAPTIONS, padding="max_length", max_length=77, return_tensors="pt").input_ids
        given["encoder_hidden_states"] = pipeline.bert(tokens)[0].detach()
    with torch.no_grad():
        alike(pipeline.unet(x, STEP, **given).sample, expected)
    assert back.config.conditions == mine.config.conditions
    assert back.classes == mine.classes


@pytest.mark.parametrize("name", build.preset_names())
def test_presets_come_back_or_say_what_cannot(tmp_path: Path, name: str) -> None:
    run, out = run_of(preset(name), tmp_path / "run", CAPTIONS), tmp_path / "out"
    said = said_in_refusal(run, out)
    if name not in LACKS:
        assert said is None
        check_there_and_back(run, out)
        return
    assert said is not None
    assert said.startswith(LACKS[name])
    assert said.endswith("; to diffusers it cannot go")
    assert not out.exists()


@pytest.mark.parametrize("name", INSTEAD)
def test_presets_go_with_the_settings_that_refusals_name(tmp_path: Path, name: str) -> None:
    for count, setting in enumerate(INSTEAD[name]):
        raw = c.override(preset(name), INSTEAD[name][:count])
        said = said_in_refusal(run_of(raw, tmp_path / f"run{count}", CAPTIONS), tmp_path / "out")
        key, value = setting.rsplit(".", 1)[-1].split("=")
        assert said is not None
        assert f"{key}={value}" in said or (key in said and f"such as {value}" in said) or f"{key} " in said
    run = run_of(c.override(preset(name), INSTEAD[name]), tmp_path / "run", CAPTIONS)
    assert said_in_refusal(run, tmp_path / "out") is None
    check_there_and_back(run, tmp_path / "out")
