"""Models that draw in milliseconds, for the studio's tests: untrained, but with weights that let conditions through."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from limner import build
from limner.config import RunConfig
from limner.training.checkpoint import Checkpoints

CLASSES = ("cat", "dog", "fish")


def recipe(conditions: list[dict[str, Any]] | None = None, **sections: Any) -> RunConfig:
    """8x8 pictures, three classes."""
    return RunConfig.model_validate(
        {
            "data": {"size": 8, "source": "tiny"},
            "model": {"kind": "unet", "levels": [{"channels": 8}], "middle": "none", "norm_groups": 4, "head_dim": 8},
            "conditions": [{"kind": "label"}] if conditions is None else conditions,
            "classes": list(CLASSES),
            "sampling": {"steps": 4, "guidance": 2.0},
            "training": {"precision": "fp32"},
        }
        | sections
    )


def text_recipe() -> RunConfig:
    """The same by caption, with cross-attention."""
    encoder = {"kind": "bpe", "vocabulary": 300, "width": 8, "depth": 1, "head_dim": 8, "length": 12}
    model = {"kind": "unet", "levels": [{"channels": 8, "cross_attention": 1}], "norm_groups": 4, "head_dim": 8}
    return recipe([{"kind": "text", "encoder": encoder}], model=model)


def write_run(folder: Path, recipe: RunConfig, captions: list[str] | None = None) -> Path:
    """A run directory whose weights are random and none of them zero, so that every condition changes the picture."""
    torch.manual_seed(0)
    model = build.model(recipe)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    if captions is not None and model.conditioner is not None:
        model.conditioner.learn({"text": captions})
    folder.mkdir(parents=True)
    Checkpoints(folder).publish(model.state_dict(), recipe)
    return folder


def until(true: Callable[[], Any], patience_s: float = 20.0) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)


def map_recipe() -> RunConfig:
    """The same by semantic map."""
    return recipe([{"kind": "semantic_map", "classes": ["sky", "road", "grass"], "width": 4}], classes=None)


def hole_recipe() -> RunConfig:
    """The same for painting in pictures."""
    return recipe([{"kind": "mask"}], classes=None)
