"""The condition that is a picture: enlarged, concatenated, ignored nowhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from limner import build, config
from limner.errors import LimnerError
from limner.generator import Generator
from limner.nn.spatial import ImageConditioner


def generator(**section: Any) -> Generator:
    recipe = {
        "data": {"size": [16, 16]},
        "model": {"kind": "unet", "levels": [{"channels": 32}, {"channels": 32}]},
        "conditions": [{"kind": "image", "size": [4, 4], **section}],
    }
    made = config.parse(recipe, "recipe")
    torch.manual_seed(0)
    model = build.model(made)
    torch.nn.init.normal_(model.network.out.weight, std=0.1)  # pyright: ignore
    return Generator(made, model)


def test_a_picture_is_enlarged_smoothly_and_a_large_one_is_reduced_first() -> None:
    conditioner = ImageConditioner(3, (16, 16), (4, 4))
    small = torch.randn(2, 3, 4, 4)
    spatial = conditioner(small, 2).spatial
    torch.testing.assert_close(spatial, torch.nn.functional.interpolate(small, (16, 16), mode="bilinear"))
    blocks = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(conditioner(blocks, 2).spatial, spatial)


def test_an_absent_picture_is_grey_or_refused() -> None:
    conditioner, image = ImageConditioner(3, (8, 8), (4, 4)), torch.ones(2, 3, 4, 4)
    assert not conditioner(None, 2).spatial.any()
    spatial = conditioner(image, 2, torch.tensor([True, False])).spatial
    assert not spatial[0].any()
    assert spatial[1].all()
    with pytest.raises(LimnerError, match="pictures of 4x4; give image"):
        ImageConditioner(3, (8, 8), (4, 4), null=False)(None, 2)
    with pytest.raises(LimnerError, match=r"should be \(B, 3, h, w\)"):
        conditioner(torch.ones(2, 1, 4, 4), 2)


def test_another_picture_gives_another_sample() -> None:
    gen = generator()
    pictures = (np.random.default_rng(0).random((2, 4, 4, 3)) * 255).astype(np.uint8)
    options: dict[str, Any] = {"steps": 2, "guidance": 1.0, "output": "tensor", "seed": 3}
    drawn = gen.sample(image=pictures, **options)
    assert drawn.shape == (2, 3, 16, 16)
    torch.testing.assert_close(gen.sample(image=[Image.fromarray(p) for p in pictures], **options), drawn)
    assert (gen.sample(image=pictures[::-1].copy(), **options) - drawn).abs().max() > 1e-3
    assert gen.sample(image=pictures, num=3, **{**options, "output": "pil"})[2].size == (16, 16)
