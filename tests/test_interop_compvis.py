"""CompVis' latent diffusion gives what CompVis' own code gave (see fixtures/README.md)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import limner
from limner.errors import LimnerError
from limner.generator import Generator
from limner.interop import safe

FOLDER = Path(__file__).parent / "fixtures" / "compvis_vq_class"
CHECKPOINT, CONFIG = FOLDER / "model.ckpt", FOLDER / "config.yaml"


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    return load_file(FOLDER / "io.safetensors")


@pytest.fixture(scope="module")
def gen() -> Generator:
    loaded = limner.load(CHECKPOINT, config=CONFIG)
    assert isinstance(loaded, Generator)
    return loaded


def one_call(mine: Tensor, peer: Tensor) -> None:
    torch.testing.assert_close(mine, peer, atol=1e-4, rtol=0)


def test_raw_network_with_averaged_weights(gen: Generator, io: dict[str, Tensor]) -> None:
    one_call(gen.raw(io["x"], io["t"], label=io["label"]), io["raw"])


def test_autoencoder(gen: Generator, io: dict[str, Tensor]) -> None:
    one_call(gen.encode(io["image"]), io["latent"])
    one_call(gen.decode(io["latent"]), io["decoded"].clamp(-1, 1))


def test_guided_ddim(gen: Generator, io: dict[str, Tensor]) -> None:
    """Leading steps plus one, to alpha-bar of step 0, with the last row as the null class."""
    options: dict[str, Any] = {"sampler": "ddim", "steps": 10, "guidance": 3.0, "label": io["label"]}
    latent = gen.sample(**options, initial_noise=io["x"], output="latent")
    torch.testing.assert_close(latent, io["ddim10"], atol=1e-3 * float(io["ddim10"].abs().max()), rtol=0)
    one_call(gen.decode(latent), io["ddim10_decoded"].clamp(-1, 1))
    pictures = gen.sample(**options, initial_noise=io["x"], output="tensor")
    one_call(pictures, io["ddim10_decoded"].clamp(-1, 1))


def test_the_recipe_says_what_it_is(gen: Generator) -> None:
    config = gen.config
    assert config.data.size == (32, 32)
    assert config.classes == tuple(map(str, range(10)))
    assert config.sampling.spacing == "leading+1"
    assert not config.sampling.clip


# --- other settings of the same checkpoint ---------------------------------------------------------------------------


def settings_with(tmp_path: Path, **changes: Any) -> Path:
    """The fixture's YAML with `a__b=value` changed under model.params; None takes a key away."""
    raw = copy.deepcopy(yaml.safe_load(CONFIG.read_text()))
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        node = raw["model"]["params"]
        for parent in parents:
            node = node[parent]
        node[leaf] = value
        if value is None:
            del node[leaf]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "config.yaml"


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(LimnerError) as caught:
        limner.load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_averages_the_plain_weights_are_used(tmp_path: Path, io: dict[str, Tensor]) -> None:
    loaded = limner.load(CHECKPOINT, config=settings_with(tmp_path, use_ema=False))
    assert isinstance(loaded, Generator)
    assert not loaded.raw(io["x"], io["t"], label=io["label"]).any()


def test_a_single_safetensors_file_does_as_well(tmp_path: Path, io: dict[str, Tensor]) -> None:
    weights = {k: x.clone() for k, x in safe.read(CHECKPOINT).weights.items() if not k.startswith("betas")}
    save_file(weights, tmp_path / "model.safetensors")
    loaded = limner.load(tmp_path / "model.safetensors", config=CONFIG)
    assert isinstance(loaded, Generator)
    one_call(loaded.raw(io["x"], io["t"], label=io["label"]), io["raw"])


def test_the_latent_is_scaled(tmp_path: Path, gen: Generator, io: dict[str, Tensor]) -> None:
    """By the YAML's factor, or by the buffer where it was measured."""
    loaded = limner.load(CHECKPOINT, config=settings_with(tmp_path, scale_factor=0.5))
    assert isinstance(loaded, Generator)
    one_call(loaded.encode(io["image"]), 0.5 * io["latent"])
    weights = {**safe.read(CHECKPOINT).weights, "scale_factor": torch.tensor(0.25)}
    torch.save({"state_dict": weights}, tmp_path / "model.ckpt")
    loaded = limner.load(tmp_path / "model.ckpt", config=settings_with(tmp_path, scale_by_std=True))
    assert isinstance(loaded, Generator)
    one_call(loaded.encode(io["image"]), 0.25 * io["latent"])
    one_call(loaded.decode(loaded.encode(io["image"])), io["decoded"].clamp(-1, 1))


def test_an_autoencoder_alone(tmp_path: Path, io: dict[str, Tensor]) -> None:
    prefix = "first_stage_model."
    found = {k.removeprefix(prefix): x for k, x in safe.read(CHECKPOINT).weights.items() if k.startswith(prefix)}
    torch.save({"state_dict": {**found, "loss.discriminator.main.0.weight": torch.ones(1)}}, tmp_path / "model.ckpt")
    stage = yaml.safe_load(CONFIG.read_text())["model"]["params"]["first_stage_config"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": stage}))
    loaded = limner.load(tmp_path / "model.ckpt", config=tmp_path / "config.yaml")
    assert isinstance(loaded, Generator)
    one_call(loaded.reconstruct(io["image"]), io["decoded"].clamp(-1, 1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"linear_end": 0.02}, "noise schedule isn't the config's"),
        ({"beta_schedule": "sqrt"}, "beta_schedule: 'sqrt' should be"),
        ({"parameterization": "x1"}, "parameterization: 'x1' should be eps, x0, v"),
        ({"unet_config": None}, "config.yaml: model.unet_config: is missing"),
        ({"unet_config__params__num_heds": 3}, "num_heds: unknown argument; did you mean 'num_heads'"),
        ({"unet_config__params__num_heads": None}, "needs num_heads or num_head_channels"),
        ({"unet_config__params__model_channels": 64}, "gives the shape"),
        ({"conditioning_key": "hybrid"}, "hybrid of mask and masked_image, 3 channels, has no counterpart; inpainting"),
        ({"conditioning_key": "hybrid-adm"}, "conditioning_key 'hybrid-adm' has no counterpart"),
        ({"conditioning_key": "concat"}, "ClassEmbedder has no counterpart for concat"),
        ({"cond_stage_config__target": "ldm.modules.encoders.modules.FrozenT5Embedder"},
         "FrozenT5Embedder has no counterpart"),
        ({"first_stage_config__target": "somebody.Else"}, "Else has no counterpart"),
        ({"first_stage_config__params__ddconfig__attn_type": "linear"}, "'linear' has no counterpart"),
        ({"cond_stage_config": "__is_unconditional__"}, "cross_attention needs a condition"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(CHECKPOINT, config=settings_with(tmp_path, **changes))


def test_what_is_needed_is_said(tmp_path: Path) -> None:
    assert "needs config" in refusal(CHECKPOINT)
    assert "has a config, not flags" in refusal(CHECKPOINT, config=CONFIG, flags={})
    (tmp_path / "empty.yaml").write_text("{}")
    assert "empty.yaml: model: is missing" in refusal(CHECKPOINT, config=tmp_path / "empty.yaml")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("network.out.bias", "a Limner run"),
        ("down_blocks.0.x", "needs config.json beside it"),
        ("a.b", "such as 'a.b'"),
    ],
)
def test_other_weights_are_told_apart(tmp_path: Path, name: str, said: str) -> None:
    save_file({name: torch.ones(1)}, tmp_path / "model.safetensors")
    assert said in refusal(tmp_path / "model.safetensors")
