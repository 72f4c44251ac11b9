"""CompVis' models of other kinds give what CompVis' own code gave (see fixtures/record_compvis.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import limner
from limner import build
from limner import config as c
from limner.cli.program import run
from limner.errors import LimnerError
from limner.generator import Generator
from limner.nn.spatial import with_hole

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ["compvis_inpaint", "compvis_semantic", "compvis_enlarge", "compvis_kl", "compvis_text"]
Recorded = dict[str, Tensor]


def load(name: str, config: Path | None = None) -> Generator:
    loaded = limner.load(FIXTURES / name / "model.ckpt", config=config or FIXTURES / name / "config.yaml")
    assert isinstance(loaded, Generator)
    return loaded


def recorded(name: str) -> Recorded:
    return load_file(FIXTURES / name / "io.safetensors")


def condition(io: Recorded) -> dict[str, Any]:
    """What the model was told, by modality."""
    if "mask" in io:
        return {"mask": with_hole(io["known"], io["mask"])}
    told = {"semantic_map": "semantic_map", "small": "image", "tokens": "text"}
    return {ours: io[theirs] for theirs, ours in told.items() if theirs in io}


def one_call(mine: Tensor, peer: Tensor) -> None:
    torch.testing.assert_close(mine, peer, atol=1e-4, rtol=0)


def settings_with(name: str, folder: Path, **changes: Any) -> Path:
    """The fixture's YAML with some of `model.params` changed."""
    raw = yaml.safe_load((FIXTURES / name / "config.yaml").read_text())
    raw["model"]["params"] |= changes
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    return folder / "config.yaml"


@pytest.mark.parametrize("name", NAMES)
def test_network_autoencoder_and_ddim(name: str) -> None:
    gen, io = load(name), recorded(name)
    told = condition(io)
    one_call(gen.raw(io["x"], io["t"], **told), io["raw"])
    one_call(gen.encode(io["image"]), io["latent"])
    one_call(gen.decode(io["latent"]), io["decoded"].clamp(-1, 1))
    latent = gen.sample(conditions=told, guidance=1.0, steps=10, initial_noise=io["x"], output="latent")
    torch.testing.assert_close(latent, io["ddim10"], atol=1e-3 * float(io["ddim10"].abs().max()), rtol=0)
    one_call(gen.decode(latent), io["ddim10_decoded"].clamp(-1, 1))


def test_the_condition_matters() -> None:
    """Another condition is another output: none of the comparisons above holds without one."""
    for name in NAMES:
        gen, io = load(name), recorded(name)
        turned = {kind: value.flip(0) for kind, value in condition(io).items()}
        if turned:
            assert (gen.raw(io["x"], io["t"], **turned) - io["raw"]).abs().max() > 1e-2


# --- inpainting ------------------------------------------------------------------------------------------------------


def test_a_photo_and_a_mask_are_painted_as_the_peers_script_does() -> None:
    """What is kept stays as it is; the hole is the peer's picture."""
    gen, io = load("compvis_inpaint"), recorded("compvis_inpaint")
    drawn = gen.sample(image=io["known"], mask=io["mask"], sampler="ddim", steps=10, initial_noise=io["x"],
                       output="tensor")  # fmt: skip
    hole = io["mask"].expand_as(drawn) > 0
    assert torch.equal(drawn[~hole], io["known"][~hole])
    one_call(drawn[hole], io["ddim10_decoded"].clamp(-1, 1)[hole])


def test_sample_paints_a_photo_from_the_command_line(tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[4:20, 8:30] = 255
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    folder = FIXTURES / "compvis_inpaint"
    made = ["convert", str(folder / "model.ckpt"), str(tmp_path / "run"), "--config", str(folder / "config.yaml")]
    assert run(made) == 0
    files = ["--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png")]
    assert run(["sample", str(tmp_path / "run"), *files, "--steps", "2", "--out", str(tmp_path / "x.npz")]) == 0
    with np.load(tmp_path / "x.npz") as data:
        drawn = data["x"][0]
    assert np.array_equal(drawn[mask == 0], photo[mask == 0])
    assert not np.array_equal(drawn[mask > 0], photo[mask > 0])


def test_a_scaled_latent_is_told_unscaled(tmp_path: Path) -> None:
    """`scripts/inpaint.py` concatenates what the first stage gives, whatever x_t is scaled by."""
    io = recorded("compvis_inpaint")
    gen = load("compvis_inpaint", settings_with("compvis_inpaint", tmp_path, scale_factor=0.5))
    one_call(gen.encode(io["image"]), 0.5 * io["latent"])
    one_call(gen.raw(io["x"], io["t"], **condition(io)), io["raw"])


def test_inpainting_needs_a_picture_and_knows_no_guidance() -> None:
    gen = load("compvis_inpaint")
    with pytest.raises(LimnerError, match="paints in the holes of pictures; give image and mask"):
        gen.sample()
    with pytest.raises(LimnerError, match="no null condition"):
        gen.sample(guidance=2.0)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("compvis_semantic", {"cond_stage_config": "__is_first_stage__"}, "with concat of 6 channels has no counter"),
        ("compvis_inpaint", {"conditioning_key": "crossattn"}, "with crossattn of 7 channels has no counterpart"),
    ],
)
def test_other_uses_of_the_first_stage_are_named(tmp_path: Path, name: str, changes: Any, said: str) -> None:
    with pytest.raises(LimnerError, match=said):
        load(name, settings_with(name, tmp_path, **changes))


def test_a_model_of_pixels_may_see_a_hole_in_the_same_way() -> None:
    section = {"kind": "mask", "hole": "black", "signed": True}
    raw = {"data": {"size": [8, 8]}, "model": {"kind": "unet", "levels": [{"channels": 32}]}, "conditions": [section]}
    image, mask = torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 1, 8, 8)
    mask[..., :2] = 1
    told = build.model(c.parse(raw, "recipe")).embed({"mask": with_hole(image, mask)}, 1).spatial
    assert told is not None
    assert told[0, :, 0, 0].tolist() == [-1, -1, -1, 1]
    assert told[0, :, 0, 5].tolist() == [0.5, 0.5, 0.5, -1]
