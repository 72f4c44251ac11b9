"""Two conditions at once, each with its own scale: the small picture of one row and the caption of another.

python benchmarks/two_conditions.py RUN --data examples/emoji --out docs/images/two-conditions

RUN knows captions and small pictures. Writes OUT.png, a line for each pair, a column for each two scales; and OUT.json:
`small`, in dB, how well the pictures agree with the small picture that was given (reduced again), and `caption`, how
like they are to the real picture of the caption that was given (cosine of EfficientNet-Lite0's features).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch.nn.functional as F

import limner
from limner import recipe
from limner.data.dataset import prepare
from limner.errors import LimnerError
from limner.evaluation.features import SIDE, EfficientNetLite0
from limner.evaluation.fidelity import consistency
from limner.evaluation.retrieval import pooled
from limner.generator import Generator, to_uint8
from limner.outputs import grid, png

SCALES = ((1.0, 1.0), (1.0, 3.0), (1.0, 0.3), (3.0, 0.3), (6.0, 0.3), (6.0, 1.0))
"""Of the caption, of the small picture."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=6, help="pairs in the picture")
    parser.add_argument("--num", type=int, default=48, help="pairs in the figures")
    asked = parser.parse_args()
    gen = limner.load(asked.run)
    if not isinstance(gen, Generator):
        raise LimnerError(f"{asked.run}: draws nothing")
    section = gen.config.data.model_copy(update={"source": asked.data})
    data = prepare(section, recipe.wants(gen.config))
    rows = np.random.default_rng(0).choice(data.held_out, 2 * asked.num, replace=False)
    shapes, names = rows[: asked.num], rows[asked.num :]
    small = gen.config.conditions_in(data.batch(shapes))["image"][:, : data.channels]
    captions = gen.config.conditions_in(data.batch(names))["text"]
    net = EfficientNetLite0(side=SIDE)
    real = pooled(data.uint8(data.held_out), net)
    middle, wanted = real.mean(0), pooled(data.uint8(names), net)
    columns, figures = [], []
    for text, image in SCALES:
        scales = {"text": text, "image": image}
        made = gen.sample(conditions={"image": small, "text": captions}, guidance=scales, composition="sum", seed=0,
                          output="array")  # fmt: skip
        like = F.cosine_similarity(pooled(made, net) - middle, wanted - middle).mean()
        figures.append({**scales, "small": consistency(made, small), "caption": float(like), "n": asked.num})
        columns.append(made)
        print(json.dumps(figures[-1]), flush=True)
    twins = to_uint8(F.interpolate(small, data.size, mode="nearest"))
    lines, heads = [], [f"{text:g}, {image:g}" for text, image in SCALES]
    for k in range(asked.rows):
        lines += [twins[k], *(column[k] for column in columns)]
    words = [name for k in range(asked.rows) for name in [captions[k], *heads]]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.with_suffix(".png").write_bytes(png(grid(lines, words, columns=1 + len(SCALES))))
    asked.out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
