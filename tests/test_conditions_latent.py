"""The same conditions where the network works on latents: brought to their size, and back to the pictures' pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from limner import build, config
from limner.data.dataset import prepare
from limner.data.latents import with_latents
from limner.generator import Generator, to_uint8
from limner.nn.autoencoder import Autoencoder
from limner.nn.spatial import mask_of_latents
from tiny_conditions import SIZE, map_folder

RECIPE = {
    "data": {"size": [SIZE, SIZE], "flip": True},
    "space": {
        "kind": "latent",
        "autoencoder": {
            "kind": "autoencoder",
            "levels": [{"channels": 8}],
            "patch": 2,
            "middle": "none",
            "norm_groups": 4,
        },
    },
    "model": {"kind": "unet", "levels": [{"channels": 16}], "middle": "none", "norm_groups": 4, "head_dim": 16},
    "conditions": [
        {"kind": "semantic_map", "classes": ["red", "blue", "void"], "void": 2, "width": 4},
        {"kind": "mask"},
        {"kind": "image", "size": [2, 2]},
    ],
    "sampling": {"steps": 2, "guidance": 1.0},
}


@pytest.fixture(scope="module")
def generator() -> Generator:
    recipe = config.parse(RECIPE, "recipe")
    torch.manual_seed(0)
    model = build.model(recipe)
    torch.nn.init.normal_(model.network.out.weight, std=0.1)  # pyright: ignore
    return Generator(recipe, model)


def picture(seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (1, *size, 3), dtype=np.uint8)


def test_known_pixels_stay_to_the_bit_through_the_autoencoder(generator: Generator) -> None:
    mask = np.zeros((1, SIZE, SIZE, 1), np.uint8)
    mask[:, 2:5, 3:6] = 255
    drawn = generator.sample(image=picture(0), mask=mask, num=2, output="array")
    for found in drawn:
        assert np.array_equal(found[mask[0, ..., 0] == 0], picture(0)[0][mask[0, ..., 0] == 0])
        assert not np.array_equal(found, picture(0)[0])


def test_a_cell_with_any_of_the_hole_belongs_to_it(generator: Generator) -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 3, 4] = 1
    assert mask_of_latents(mask, 2).nonzero().tolist() == [[0, 0, 1, 2]]
    assert isinstance(generator.model.autoencoder, Autoencoder)
    found = generator.model.hole_of_latents(generator.model.autoencoder, torch.rand(1, 4, 8, 8).round())
    assert found.shape == (1, 5, 4, 4)


def test_each_condition_changes_the_picture_and_a_canvas_may_be_larger(generator: Generator) -> None:
    maps, base = torch.zeros(1, SIZE, SIZE).long(), {"output": "tensor", "seed": 1}
    drawn = generator.sample(semantic_map=maps, **base)
    assert (generator.sample(semantic_map=maps + 1, **base) - drawn).abs().max() > 1e-3
    assert (generator.sample(semantic_map=maps, image=picture(1, (2, 2)), **base) - drawn).abs().max() > 1e-3
    larger = generator.sample(semantic_map=maps, size=(12, 16), **base)
    assert larger.shape == (1, 3, 12, 16)


def test_strength_starts_from_the_latents_of_a_picture(generator: Generator) -> None:
    config_of_plain = config.parse({**RECIPE, "conditions": []}, "recipe")
    plain = Generator(config_of_plain, build.model(config_of_plain))
    start = torch.from_numpy(picture(2)).permute(0, 3, 1, 2).float() / 127.5 - 1
    near = plain.sample(image=start, strength=0.1, steps=40, output="tensor")
    kept = plain.reconstruct(start)
    assert (near - kept).abs().mean() < 0.3


def test_cached_latents_bring_their_conditions(tmp_path: Path) -> None:
    recipe = config.parse(
        {**RECIPE, "data": {**RECIPE["data"], "source": str(map_folder(tmp_path / "d", 8))}}, "recipe"
    )
    pictures = prepare(recipe.data, recipe.conditions)
    model = build.model(recipe)
    assert model.autoencoder is not None
    data = with_latents(pictures, model.autoencoder)
    batch = data.batch(np.arange(4), np.random.default_rng(0))
    loss = model(batch["latent"], torch.rand(4), recipe.conditions_in(batch), {}).square().mean()
    loss.backward()
    assert batch["latent"].shape == (4, 4, 4, 4)
    plain = pictures.batch(np.arange(4), np.random.default_rng(0))
    assert torch.equal(plain["semantic_map"], batch["semantic_map"])
    known = batch["mask"][:, 3:] == 0
    assert torch.equal((batch["mask"][:, :3] * known), plain["image"] * known)
    assert to_uint8(plain["image"]).shape == (4, SIZE, SIZE, 3)
