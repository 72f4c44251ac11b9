"""Draw many pictures on a Ray cluster, into Parquet files that Limner reads.

    pip install 'ray[data]'
    python examples/ray_generate.py runs/photos samples --num 50000 --workers 8 --gpus 1

Each worker loads the run once and draws the numbers that it is handed. Picture k is the same whoever draws it, and the
same that `limner sample runs/photos --num 50000` draws.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

import limner
from limner.outputs import png


class Drawer:
    """One worker: a run, and what to draw with it."""

    def __init__(self, run: str, num: int, seed: int, steps: int | None = None) -> None:
        self.generator: Any = limner.load(run)
        self.options = {"num": num, "seed": seed} | ({} if steps is None else {"steps": steps})

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Numbers `id` (B,) to the same numbers and their pictures as PNG files."""
        numbers = np.sort(batch["id"])
        pictures: list[bytes] = []
        for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):  # whatever Ray has made of the order
            part = range(int(run[0]), int(run[-1]) + 1)
            drawn = self.generator.sample(part=part, batch=len(part), output="array", **self.options)
            pictures += [png(pixels) for pixels in drawn]
        return {"number": numbers, "image": np.array(pictures, dtype=object)}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 2 where Ray isn't installed."""
    parser = argparse.ArgumentParser(description="Draw many pictures on a Ray cluster.")
    parser.add_argument("run")
    parser.add_argument("out", help="a folder, or an address such as s3://bucket/samples")
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="for each worker")
    asked = parser.parse_args(arguments)
    try:
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("ray_generate: Ray is not installed; `pip install 'ray[data]'`", file=sys.stderr)
        return 2
    numbers = ray.data.range(asked.num, override_num_blocks=max(asked.workers, asked.num // 1000))
    options = (asked.run, asked.num, asked.seed, asked.steps)
    drawn = numbers.map_batches(Drawer, fn_constructor_args=options, batch_size=asked.batch, num_gpus=asked.gpus,
                                concurrency=asked.workers)  # fmt: skip
    drawn.write_parquet(asked.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
