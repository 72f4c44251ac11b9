"""CompVis' models of other kinds give what CompVis' own code gave (see fixtures/record_compvis.py)."""

from __future__ import annotations

import json
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
NAMES = ["compvis_inpaint", "compvis_semantic", "compvis_enlarge", "compvis_kl", "compvis_text", "compvis_layout",
         "compvis_hybrid"]  # fmt: skip
Recorded = dict[str, Tensor]


def load(name: str, config: Path | None = None) -> Generator:
    loaded = limner.load(FIXTURES / name / "model.ckpt", config=config or FIXTURES / name / "config.yaml")
    assert isinstance(loaded, Generator)
    return loaded


def recorded(name: str) -> Recorded:
    return load_file(FIXTURES / name / "io.safetensors")


def condition(io: Recorded) -> dict[str, Any]:
    """What the model was told, by modality."""
    told = {"semantic_map": "semantic_map", "small": "image"}
    told |= {"boxes": "boxes"} if "boxes" in io else {"tokens": "text"}
    found = {ours: io[theirs] for theirs, ours in told.items() if theirs in io}
    return found | ({"mask": with_hole(io["known"], io["mask"])} if "mask" in io else {})


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


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_boxes_become_the_peers_tokens() -> None:
    """Those of its own builder of conditions, crop, corners, modified classes and rest; tokens are taken as well."""
    gen, io = load("compvis_layout"), recorded("compvis_layout")
    known: Any = gen.model.conditioner
    layout = known.modalities["boxes"]
    assert torch.equal(layout.tokens(io["boxes"]), io["tokens"])
    one_call(gen.raw(io["x"], io["t"], boxes=io["tokens"]), io["raw"])
    nothing = torch.full((2, 3, 5), -1.0)
    absent = layout(io["boxes"], 2, torch.tensor([True, False])).tokens
    assert torch.equal(absent[0], layout(nothing, 2).tokens[0])
    assert torch.equal(absent[0], layout(None, 2).tokens[0])
    assert torch.equal(absent[1], layout(io["tokens"], 2).tokens[1])


def test_a_layout_is_drawn_from_the_command_line(tmp_path: Path) -> None:
    """Classes by number, or by names written into the recipe; another place is another picture."""
    folder, boxes = FIXTURES / "compvis_layout", tmp_path / "boxes.json"
    made = ["convert", str(folder / "model.ckpt"), str(tmp_path / "run"), "--config", str(folder / "config.yaml")]
    assert run(made) == 0

    def drawn(name: str, *layout: Any) -> Any:
        boxes.write_text(json.dumps(layout))
        out = tmp_path / f"{name}.npz"
        files = ["--boxes", str(boxes), "--num", "1", "--steps", "2", "--out", str(out)]
        assert run(["sample", str(tmp_path / "run"), *files]) == 0
        with np.load(out) as data:
            return data["x"]

    first = drawn("first", [3, 0.1, 0.2, 0.3, 0.4], [19, 0.5, 0, 0.5, 1])
    assert not np.array_equal(first, drawn("moved", [3, 0.1, 0.5, 0.3, 0.4], [19, 0.5, 0, 0.5, 1]))
    recipe = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    recipe["conditions"][0]["classes"] = ["cup" if k == 3 else f"thing {k}" for k in range(20)]
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(recipe))
    assert np.array_equal(first, drawn("named", ["cup", 0.1, 0.2, 0.3, 0.4], ["thing 19", 0.5, 0, 0.5, 1]))


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ([(99, 0, 0, 1, 1)], "layout 0, box 0: class 99, there are 99, from 0 on"),
        ([("cup", 0, 0, 1, 1)], "there is no class 'cup'"),
        (torch.zeros(1, 13, dtype=torch.int64), r"shape \(1, 13\) should be \(1, M, 5\), or tokens, int \(1, 14\)"),
        (torch.full((1, 14), 100), "tokens should be 0 to 99"),
        (torch.tensor([[[99.0, 0, 0, 1, 1]]]), "boxes: class 99, there are 99"),
    ],
)
def test_layouts_that_do_not_fit_are_named(boxes: Any, said: str) -> None:
    with pytest.raises(LimnerError, match=said):
        load("compvis_layout").sample(boxes=boxes, steps=1)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("compvis_layout", {"max_seq_len": 13}, "max_seq_len: 13 has no counterpart for layouts; 3 tokens a box"),
        ("compvis_layout", {"use_tokenizer": True}, "BERTEmbedder of words has no counterpart for layouts"),
        ("compvis_layout", {"n_layer": 2}, r"attn_layers.layers.2.0.weight' is missing"),
        ("compvis_hybrid", {"concat_keys": ["depth"]}, "hybrid of depth, 9 channels, has no counterpart; inpainting"),
        ("compvis_hybrid", {"cond_stage_config": "__is_first_stage__"}, "__is_first_stage__ with hybrid of 9 channels"),
    ],
)
def test_settings_of_layouts_and_of_both_conditions_are_named(
    tmp_path: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    if name == "compvis_layout":
        stage = yaml.safe_load((FIXTURES / name / "config.yaml").read_text())["model"]["params"]["cond_stage_config"]
        changes = {"cond_stage_config": {**stage, "params": {**stage["params"], **changes}}}
    with pytest.raises(LimnerError, match=said) as caught:
        load(name, settings_with(name, tmp_path, **changes))
    assert "\n" not in str(caught.value)


# --- text and a picture with a hole ----------------------------------------------------------------------------------


def test_guidance_by_text_keeps_the_picture(tmp_path: Path) -> None:
    """Both halves of the peer's guidance see the same picture and mask."""
    gen, io = load("compvis_hybrid"), recorded("compvis_hybrid")
    told = {"image": io["known"], "mask": io["mask"], "text": io["tokens"]}
    null = torch.zeros_like(io["tokens"])
    options: dict[str, Any] = {"steps": 10, "initial_noise": io["x"], "negative_text": null, "output": "latent"}
    for guidance in (3.0, {"text": 3.0}):
        latent = gen.sample(**told, guidance=guidance, **options)
        torch.testing.assert_close(latent, io["guided"], atol=1e-3 * float(io["guided"].abs().max()), rtol=0)
    with pytest.raises(LimnerError, match="guidance of mask: this model never learnt without it"):
        gen.sample(**told, guidance={"mask": 3.0}, **options)
    with pytest.raises(LimnerError, match="paints in the holes of pictures; give image and mask"):
        gen.sample(text=io["tokens"], guidance=1.0)


def test_the_other_order_of_mask_and_picture(tmp_path: Path) -> None:
    io = recorded("compvis_hybrid")
    gen = load("compvis_hybrid", settings_with("compvis_hybrid", tmp_path, concat_keys=["masked_image", "mask"]))
    own = load("compvis_hybrid").model.state_dict()["network.stem.weight"]
    order = [*range(4), *range(5, 9), 4]
    assert torch.equal(gen.model.state_dict()["network.stem.weight"][:, order], own)
    assert (gen.raw(io["x"], io["t"], **condition(io)) - io["raw"]).abs().max() > 1e-2
