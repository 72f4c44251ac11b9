"""Fidelity against diversity as the classifier's scale grows: Dhariwal & Nichol 2021, figure 4, for one's own models.

    python benchmarks/classifier_guidance.py RUN CLASSIFIER DATA docs/classifier-guidance --num 1000

Writes a JSON file with every figure, a Markdown table and a plot. Cells that are in the JSON file already are not
computed again, so it can be stopped and gone on with.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

import limner
from limner.config import DataConfig
from limner.data.dataset import Dataset, prepare
from limner.evaluation.evaluate import quick

SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
SAMPLERS = {"dpmpp_2m": 10, "ddim": 15, "ddpm": 20}
SHOWN = (
    "FD-efficientnet-lite0",
    "class_accuracy",
    "precision",
    "recall",
    "class_precision",
    "class_recall",
    "images_per_s",
)


def cell(gen: Any, guide: Any, data: Dataset, sampler: str, steps: int, scale: float, num: int) -> dict[str, Any]:
    """Sample `num` pictures, labels in rotation, and measure them."""
    labels = np.arange(num) % len(guide.classes)
    began = time.monotonic()
    pictures = gen.sample(num=num, label=labels, classifier=guide, classifier_scale=scale, sampler=sampler,
                          steps=steps, output="array", batch=100)  # fmt: skip
    seconds = time.monotonic() - began
    figures = quick(pictures, labels, data, 10_000, neighbours_of=num)
    return {"sampler": sampler, "steps": steps, "scale": scale, "images_per_s": num / seconds, **figures}


def table(cells: list[dict[str, Any]]) -> str:
    head = ["sampler", "steps", "scale", *SHOWN]
    rows = [[f"{c[k]:.3g}" if isinstance(c.get(k), float) else str(c.get(k, "")) for k in head] for c in cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def plot(cells: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6.4), constrained_layout=True)
    for axis, name in zip(axes.flat, SHOWN[:6], strict=True):
        for sampler, steps in SAMPLERS.items():
            own = [c for c in cells if c["sampler"] == sampler and name in c]
            axis.plot([c["scale"] for c in own], [c[name] for c in own], "o-", label=f"{sampler}, {steps} steps")
        axis.set(title=name.replace("_", " "), xlabel="classifier scale")
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    for suffix in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{suffix}"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("run", "classifier", "data", "out"):
        parser.add_argument(name)
    parser.add_argument("--num", type=int, default=1000)
    asked = parser.parse_args()
    gen, guide = limner.load(asked.run), limner.load(asked.classifier)
    data = prepare(DataConfig(source=asked.data, size=gen.config.data.size), {"label"})
    out = Path(asked.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    results = out.with_suffix(".json")
    cells: list[dict[str, Any]] = json.loads(results.read_text()) if results.exists() else []
    for sampler, steps in SAMPLERS.items():
        for scale in SCALES:
            if not any(c["sampler"] == sampler and c["scale"] == scale for c in cells):
                cells.append(cell(gen, guide, data, sampler, steps, scale, asked.num))
                results.write_text(json.dumps(cells, indent=1) + "\n")
                print(cells[-1], flush=True)
    out.with_suffix(".md").write_text(table(cells))
    plot(cells, out)


if __name__ == "__main__":
    main()
