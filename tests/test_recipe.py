"""The default recipe fits itself to the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from limner import build, config, recipe
from pictures import picture


def fitted(folder: Path, side: int, *settings: str, **more: Any) -> config.RunConfig:
    picture(folder / "cat" / "a.png", 0, (side, side))
    picture(folder / "dog" / "b.png", 1, (side, side))
    raw = build.preset("default") | {"data": {"source": str(folder)}} | more
    return config.parse(recipe.automatic(config.override(raw, settings)), "test")


@pytest.mark.parametrize(
    ("side", "size", "patch", "prediction"),
    [(20, 32, 2, "v_prediction"), (80, 64, 4, "sample")],
)
def test_size_patch_and_prediction_follow_from_the_pictures(
    tmp_path: Path, side: int, size: int, patch: int, prediction: str
) -> None:
    made = fitted(tmp_path, side)
    assert made.data.size == (size, size)
    assert isinstance(made.model, config.UNetConfig)
    assert made.model.patch == patch
    assert (made.process.prediction, made.process.weighting.kind) == (prediction, "min_snr")
    assert [section.kind for section in made.conditions] == ["label"]


def test_what_the_user_says_stays(tmp_path: Path) -> None:
    made = fitted(tmp_path, 80, "process.prediction=epsilon", "process.weighting.kind=simple", "data.size=[48,48]")
    assert (made.process.prediction, made.process.weighting.kind) == ("epsilon", "simple")
    assert made.data.size == (48, 48)


def test_latents_are_predicted_as_v(tmp_path: Path) -> None:
    autoencoder = {"kind": "autoencoder", "levels": [{"channels": 8}, {"channels": 8}, {"channels": 8}]}
    made = fitted(tmp_path, 80, space={"kind": "latent", "autoencoder": autoencoder})
    assert isinstance(made.model, config.UNetConfig)
    assert made.model.patch == 1
    assert made.process.prediction == "v_prediction"


def test_pictures_in_no_folders_are_drawn_without_labels(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0, (40, 40))
    raw = build.preset("default") | {"data": {"source": str(tmp_path)}}
    made = config.parse(recipe.automatic(raw), "test")
    assert made.conditions == ()
    assert made.sampling.guidance == 1.0
