"""What a model makes of its condition, on rows that it never saw: a grid, and the fidelity in figures.

python benchmarks/condition_grid.py RUN --test camvid/test.parquet --train camvid/train.parquet --out docs/streets

Writes OUT.png, a line for each row: what was asked, the real picture, three samples; and OUT.json, the figures over
--num rows beside what the real pictures score.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

import limner
from limner import recipe
from limner.data.dataset import Dataset, prepare
from limner.errors import LimnerError
from limner.evaluation import fidelity
from limner.generator import Generator, to_uint8
from limner.outputs import grid, png

SEEDS = (0, 1, 2)
HUES = np.random.default_rng(3).integers(40, 255, (256, 3), dtype=np.uint8)


def shown(kind: str, asked: Any, real: np.ndarray) -> np.ndarray:
    """A condition of one picture as a picture (H, W, 3) of the real one's size."""
    height, width = real.shape[:2]
    if kind == "semantic_map":
        return HUES[asked.numpy().astype(np.uint8)]
    if kind == "boxes":
        canvas = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(canvas)
        for number, x, y, w, h in asked.tolist():
            if number >= 0:
                left, top = x * width, y * height
                corners = (left, top, max(left, left + w * width - 1), max(top, top + h * height - 1))
                draw.rectangle(corners, outline=tuple(HUES[int(number)].tolist()), width=2)
        return np.asarray(canvas)
    picture = to_uint8(asked[None, : real.shape[2]])[0]
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST))


def lines(generator: Generator, test: Dataset, among: np.ndarray, rows: int) -> tuple[list[np.ndarray], list[str]]:
    """The pictures of the grid, line by line, and their captions."""
    numbers = among[np.linspace(0, len(among) - 1, rows).astype(int)]
    asked = generator.config.conditions_in(test.batch(numbers))
    kind = next(name for name in ("semantic_map", "boxes", "mask", "image", "variation") if name in asked)
    if kind == "image":
        asked[kind] = asked[kind][:, : test.channels]
    real = test.uint8(numbers)
    drawn = [
        to_uint8(torch.cat([generator.finished(each) for each in generator.stream(conditions=asked, seed=seed)]))
        for seed in SEEDS
    ]
    pictures = []
    for row in range(rows):
        pictures += [shown(kind, asked[kind][row], real[row]), real[row], *(each[row] for each in drawn)]
    return pictures, ["asked", "real", *(f"seed {seed}" for seed in SEEDS)] * rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--test", required=True, help="data that the run never saw, or that of --train")
    parser.add_argument("--train", required=True, help="data that teach the judge of maps and boxes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--num", type=int, default=64)
    asked = parser.parse_args()
    generator = limner.load(asked.run)
    if not isinstance(generator, Generator):
        raise LimnerError(f"{asked.run}: draws nothing")
    test, train = (
        prepare(generator.config.data.model_copy(update={"source": source}), recipe.wants(generator.config))
        for source in (asked.test, asked.train)
    )
    among = test.held_out if asked.test == asked.train else np.arange(len(test))
    pictures, captions = lines(generator, test, among, asked.rows)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.with_suffix(".png").write_bytes(png(grid(pictures, captions, columns=2 + len(SEEDS))))
    figures = fidelity.of_run(generator, test, train, rows=among[: asked.num])
    asked.out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
