"""One box moved, and all else the same: does what it names move with it?

python benchmarks/moved_box.py RUN --test camvid/test.parquet --train camvid/train.parquet --class car --out moved

Each layout of a row that the run never saw loses its boxes of the class, and gets one, at three places in turn, drawn
from the same noise. Writes OUT.png, a line for each row: layout and picture at each place; and OUT.json: the share of
the box's pixels that a segmentation network taught by the real maps takes for the class, `there` where the box is, and
`elsewhere`, in the pictures with the box at another place; and how often a picture's box has more than its other two
places.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import limner
from condition_grid import shown
from limner import recipe
from limner.data.dataset import prepare
from limner.errors import LimnerError
from limner.evaluation.fidelity import judge
from limner.generator import Generator
from limner.outputs import grid, png

LEFTS = (0.06, 0.38, 0.70)
TOP, WIDTH, HEIGHT = 0.45, 0.24, 0.28
"""Of the moved box, in shares of the picture: about what a near car has in CamVid."""


def moved(boxes: Tensor, number: int, left: float) -> Tensor:
    """Boxes (M, 5) without those of a class, and with one of it at `left`; class -1 is none."""
    rest = [row for row in boxes if int(row[0]) not in (number, -1)][: len(boxes) - 1]
    rows = torch.stack([*rest, torch.tensor([float(number), left, TOP, WIDTH, HEIGHT])])
    return torch.cat([rows, torch.tensor([[-1.0, 0, 0, 0, 0]]).expand(len(boxes) - len(rows), 5)])


def shares(seen: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """seen (N, H, W) at each place: share of the pixels of the box there."""
    height, width = seen.shape[1:]
    top, bottom = round(TOP * height), round((TOP + HEIGHT) * height)
    inside = [seen[:, top:bottom, round(x * width) : round((x + WIDTH) * width)] for x in LEFTS]
    return np.stack([part.mean((1, 2)) for part in inside], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--test", required=True, help="data that the run never saw")
    parser.add_argument("--train", required=True, help="data with semantic maps, that teach the judge")
    parser.add_argument("--class", dest="name", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=6, help="layouts in the picture")
    parser.add_argument("--num", type=int, default=32, help="layouts in the figures")
    parser.add_argument("--guidance", type=float)
    asked = parser.parse_args()
    gen = limner.load(asked.run)
    if not isinstance(gen, Generator):
        raise LimnerError(f"{asked.run}: draws nothing")
    test = prepare(gen.config.data.model_copy(update={"source": asked.test}), recipe.wants(gen.config))
    names = list(test.facts["boxes"]["classes"])
    train = prepare(gen.config.data.model_copy(update={"source": asked.train}), ["semantic_map"])
    number, of_maps = names.index(asked.name), list(train.facts["semantic_map"]["classes"]).index(asked.name)
    rows = np.linspace(0, len(test) - 1, asked.num).astype(int)
    layouts = test.batch(rows)["boxes"]
    each = [torch.stack([moved(boxes, number, left) for boxes in layouts]) for left in LEFTS]
    options = {} if asked.guidance is None else {"guidance": asked.guidance}
    drawn = [gen.sample(conditions={"boxes": boxes}, seed=0, output="array", **options) for boxes in each]
    network = judge(train, "semantic_map")
    found = np.stack([shares(network.classify(pictures) == of_maps) for pictures in drawn])  # asked at, row, looked at
    there, places = found[range(len(LEFTS)), :, range(len(LEFTS))], len(LEFTS)
    facts = {"n": found.shape[1] * places, "there": float(there.mean()),
             "elsewhere": float((found.sum() - there.sum()) / (found.size - there.size)),
             "most": float((found.argmax(2) == np.arange(places)[:, None]).mean())}  # fmt: skip
    pictures, size = [], drawn[0][0]
    for row in np.linspace(0, asked.num - 1, asked.rows).astype(int):
        pictures += [one for k in range(places) for one in (shown("boxes", each[k][row], size), drawn[k][row])]
    asked.out.with_suffix(".png").write_bytes(png(grid(pictures, columns=2 * places)))
    asked.out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
