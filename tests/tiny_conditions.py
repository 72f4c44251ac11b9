"""Tiny data sets whose pictures are decided by a condition, and a model that learns it in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console

import limner
from limner.generator import Generator

SIZE = 8
COLOURS = np.array([[220, 40, 40], [40, 60, 220], [230, 230, 230]], np.uint8)
NAMES = ("red", "blue", "void")


def a_map(seed: int) -> npt.NDArray[np.uint8]:
    """Class numbers (8, 8): two parts, split at a random column or row."""
    chance = np.random.default_rng(seed)
    found = np.full((SIZE, SIZE), int(chance.integers(2)), np.uint8)
    cut = int(chance.integers(2, SIZE - 1))
    if chance.random() < 0.5:
        found[:cut] = 1 - found[0, 0]
    else:
        found[:, :cut] = 1 - found[0, 0]
    return found


def painted(numbers: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return COLOURS[numbers]


def map_folder(root: Path, rows: int = 48) -> Path:
    """`images/0.png`, `semantic_maps/0.png`, ..., `classes.txt`."""
    (root / "images").mkdir(parents=True)
    (root / "semantic_maps").mkdir()
    for row in range(rows):
        numbers = a_map(row)
        Image.fromarray(painted(numbers)).save(root / "images" / f"{row}.png")
        Image.fromarray(numbers).save(root / "semantic_maps" / f"{row}.png")
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return root


def halves_folder(root: Path, rows: int = 48) -> Path:
    """Pictures of one thing, red or blue, on the left or on the right of white: `objects` in pixels, and `label` "warm"
    or "cold" for how dark the white is."""
    root.mkdir(parents=True)
    lines = []
    for row in range(rows):
        kind, right, cold = row % 2, row // 2 % 2, row // 4 % 2
        Image.fromarray(half(kind, bool(right), bool(cold))).save(root / f"{row}.png")
        box = [SIZE // 2 * right, 0, SIZE // 2, SIZE]
        label = "cold" if cold else "warm"
        lines.append({"file_name": f"{row}.png", "label": label, "objects": {"bbox": [box], "categories": [kind]}})
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    (root / "classes.txt").write_text("red\nblue\n")
    return root


def half(kind: int, right: bool, cold: bool = False) -> npt.NDArray[np.uint8]:
    picture = np.full((SIZE, SIZE, 3), 110 if cold else 240, np.uint8)
    picture[:, SIZE // 2 if right else 0 : SIZE if right else SIZE // 2] = COLOURS[kind]
    return picture


def recipe(*conditions: dict[str, Any], cross: int = 0, patch: int = 1, network: dict[str, Any] | None = None,
           **training: Any) -> dict[str, Any]:  # fmt: skip
    """Sections of a recipe as keywords of `limner.train`."""
    level = {"channels": 16 * patch, "cross_attention": cross}
    settings = {"batch": 16, "images": 2400, "lr": 4e-3, "warmup_images": 160, "precision": "fp32", "compile": "off",
                "previews": 4, "preview_every": 10**9, "held_out_every": 10**9}  # fmt: skip
    return {
        "data": {"size": [SIZE, SIZE], "held_out": 0.2},
        "model": {
            "kind": "unet",
            "levels": [level],
            "patch": patch,
            "middle": "none",
            "norm_groups": 4,
            "head_dim": 16,
        }
        | (network or {}),
        "conditions": list(conditions),
        "training": settings | training,
        "sampling": {"steps": 8, "guidance": 1.0},
    }


def train(
    data: Path,
    out: Path,
    *conditions: dict[str, Any],
    cross: int = 0,
    patch: int = 1,
    network: dict[str, Any] | None = None,
    **training: Any,
) -> Generator:
    """A generator that has learnt the conditions."""
    torch.set_num_threads(1)
    sections = recipe(*conditions, cross=cross, patch=patch, network=network, **training)
    path = out.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"task: diffusion\n{_yaml(sections)}")
    limner.train(data, preset=str(path), out=out, console=Console(quiet=True))
    loaded = limner.load(out)
    assert isinstance(loaded, Generator)
    return loaded


def _yaml(sections: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(sections)


def colour_error(pictures: npt.NDArray[np.uint8], wanted: npt.NDArray[np.uint8]) -> float:
    """Mean absolute difference of levels, 0 to 255."""
    return float(np.abs(pictures.astype(float) - wanted).mean())
