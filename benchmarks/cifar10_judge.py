"""A judge of CIFAR-10 samples that no generator has learned from: a ResNet trained here on the real pictures.

    python benchmarks/cifar10_judge.py train data/cifar10 judge.pt
    python benchmarks/cifar10_judge.py judge judge.pt data/cifar10 one.npz other.npz

The first takes some ten minutes on two cores and prints the accuracy on the test pictures. The second prints, for the
samples of each file (x pictures, y labels, as `limner sample --out s.npz` writes them), the Fréchet distance of
the judge's 256 features to those of the training pictures, and how many it takes for what was asked; and the same of
1,000 real test pictures, for comparison.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.config import DataConfig
from limner.data.dataset import prepare
from limner.evaluation.metrics import frechet_distance, gaussian
from limner.hardware import autocast

EPOCHS, BATCH, LR, DECAY = 7, 256, 0.4, 5e-4
MEAN, STD = 120.0, 63.0
CPU = torch.device("cpu")


class Block(nn.Sequential):
    def __init__(self, ins: int, outs: int, pool: bool) -> None:
        super().__init__(nn.Conv2d(ins, outs, 3, padding=1, bias=False), *([nn.MaxPool2d(2)] if pool else []),
                         nn.BatchNorm2d(outs), nn.CELU(0.3))  # fmt: skip


class Judge(nn.Module):
    """Pictures (B, 3, 32, 32), normalised -> features (B, 256) and logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Block(3, 32, False), Block(32, 64, True))
        self.first = nn.Sequential(Block(64, 64, False), Block(64, 64, False))
        self.middle = nn.Sequential(Block(64, 128, True), Block(128, 256, True))
        self.second = nn.Sequential(Block(256, 256, False), Block(256, 256, False))
        self.head = nn.Linear(256, 10, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        x = self.middle(x + self.first(x))
        features = F.adaptive_avg_pool2d(x + self.second(x), 1).flatten(1)
        return features, 0.25 * self.head(features)


def normalised(pictures: Any) -> Tensor:
    x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float()
    return ((x - MEAN) / STD).contiguous(memory_format=torch.channels_last)


def moved(x: Tensor) -> Tensor:
    """Each shifted by up to four pixels, and mirrored at random."""
    padded = F.pad(x, (4, 4, 4, 4), "reflect")
    out = torch.empty_like(x)
    for i, (dy, dx) in enumerate(torch.randint(9, (len(x), 2)).tolist()):
        out[i] = padded[i, :, dy : dy + 32, dx : dx + 32]
    mirrored = torch.rand(len(x)) < 0.5
    out[mirrored] = out[mirrored].flip(3)
    return out


def learn(pictures: Any, labels: Tensor) -> Judge:
    torch.manual_seed(0)
    judge = Judge().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(judge.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=DECAY)
    steps = EPOCHS * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=steps, pct_start=0.25, anneal_strategy="linear"
    )
    began = time.monotonic()
    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(labels))[: len(labels) // BATCH * BATCH].split(BATCH):
            with autocast("auto", CPU):
                logits = judge(moved(normalised(pictures[np.sort(rows.numpy())])))[1]
            loss = F.cross_entropy(logits.float(), labels[rows.sort().values], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {EPOCHS}: loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
    return judge


@torch.no_grad()
def seen(judge: Judge, pictures: Any) -> tuple[Tensor, Tensor]:
    """Features (N, 256) and classes (N,)."""
    features, classes = [], []
    for start in range(0, len(pictures), 500):
        with autocast("auto", CPU):
            found, logits = judge(normalised(pictures[start : start + 500]))
        features.append(found.float())
        classes.append(logits.argmax(1))
    return torch.cat(features), torch.cat(classes)


def rows(folder: str, split: str) -> tuple[Any, Tensor]:
    data = prepare(DataConfig(source=folder, split=split, size=(32, 32), held_out=0), ["label"])
    return data.uint8(np.arange(len(data.labels))), torch.from_numpy(np.asarray(data.labels)).long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="way", required=True)
    train, judged = ways.add_parser("train"), ways.add_parser("judge")
    train.add_argument("data")
    train.add_argument("judge", type=Path)
    judged.add_argument("judge", type=Path)
    judged.add_argument("data")
    judged.add_argument("samples", nargs="+", type=Path)
    given = parser.parse_args()
    test, answers = rows(given.data, "test")
    if given.way == "train":
        judge = learn(*rows(given.data, "train"))
        torch.save(judge.state_dict(), given.judge)
        classes = seen(judge.eval(), test)[1]
        print(f"right on {(classes == answers).float().mean():.3f} of {len(answers)} test pictures")
        return
    judge = Judge().to(memory_format=torch.channels_last).eval()
    judge.load_state_dict(torch.load(given.judge, weights_only=True))
    real = gaussian(seen(judge, rows(given.data, "train")[0])[0])
    print("| samples | number | FD | class accuracy |\n| --- | --- | --- | --- |")
    for path in [None, *given.samples]:
        pictures, asked = test[:1000], answers[:1000]
        if path is not None:
            with np.load(path) as held:
                pictures, asked = held["x"], torch.from_numpy(held["y"])
        features, classes = seen(judge, pictures)
        distance, right = frechet_distance(real, gaussian(features)), (classes == asked).float().mean()
        print(f"| {path or 'real test pictures'} | {len(pictures)} | {distance:.3f} | {right:.3f} |")


if __name__ == "__main__":
    main()
