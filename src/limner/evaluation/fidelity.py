"""Whether a picture shows what was asked for, condition by condition, beside what real pictures would score.

data = prepare(config, recipe.wants(config))                         # the training rows teach the judges
of_run(generator, test, data)                                # {"map_miou": ..., "map_miou_real": ..., ...}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.data.dataset import Dataset, Rows
from limner.data.overlays import VOID, SemanticMaps
from limner.errors import LimnerError
from limner.generator import Generator, to_uint8
from limner.nn.perceptual import Lite0Features, perceptual_distance, psnr

STEPS, BATCH, LR = 400, 8, 3e-3
ROWS = 64
JUDGED = ("semantic_map", "boxes", "image", "mask")
"""The conditions that can be read from a picture."""
LEAST_SIDE = 128
"""Pictures are enlarged so that their shorter side has about as many pixels: the features were learnt on large ones."""
SPANS = (16, 24, 40, 112)
"""Channels of EfficientNet-Lite0's maps at strides 2, 4, 8 and 16."""

Uint8 = npt.NDArray[np.uint8]


class Segmenter(nn.Module):
    """The class of each pixel: EfficientNet-Lite0's frozen features at four strides, each through its own projection,
    added up and read by two convolutions (after Kirillov et al. 2019, 1901.02446). Small enough to learn from a few
    hundred pictures in a minute."""

    def __init__(self, classes: int, width: int = 48) -> None:
        super().__init__()
        self.classes = classes
        self.features = Lite0Features().eval().requires_grad_(False)
        self.project = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in SPANS)
        self.read = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) of pictures (B, C, H, W) in [-1, 1]."""
        scale = max(1, round(LEAST_SIDE / min(x.shape[2:])))
        with torch.no_grad():
            maps = self.features(F.interpolate(x, scale_factor=scale, mode="bilinear") if scale > 1 else x)
        size = maps[0].shape[2:]
        rows = [F.interpolate(p(m), size, mode="bilinear") for p, m in zip(self.project, maps, strict=True)]
        return F.interpolate(self.read(F.gelu(torch.stack(rows).sum(0))), x.shape[2:], mode="bilinear")

    def train(self, mode: bool = True) -> Segmenter:
        """The features stay as they are."""
        super().train(mode)
        self.features.eval()
        return self

    @torch.no_grad()
    def classify(self, pictures: Uint8) -> npt.NDArray[np.int64]:
        """Class numbers (N, H, W) of pictures (N, H, W, C)."""
        self.eval()
        parts = [self(x).argmax(1) for x in as_floats(pictures).split(BATCH)]
        return torch.cat(parts).numpy()


def as_floats(pictures: Uint8) -> Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def judge(data: Dataset, kind: str, *, steps: int = STEPS, seed: int = 0) -> Segmenter:
    """A segmentation network taught by the real pictures of a data set's training rows and what they show: its
    semantic maps, or its boxes filled in (kind "boxes"). Raises LimnerError where the data set has none."""
    classes = _classes(data, kind)
    torch.manual_seed(seed)
    network = Segmenter(classes).train()
    chance = np.random.default_rng(seed)
    learnt = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    for _ in range(steps):
        rows = chance.choice(data.train, BATCH)
        batch = data.batch(rows)
        truth = torch.from_numpy(wanted_maps(data, kind, batch[kind]))
        image = batch["image"]
        if chance.random() < 0.5:
            image, truth = image.flip(-1), truth.flip(-1)
        loss = F.cross_entropy(network(image), truth, ignore_index=VOID)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def _classes(data: Dataset, kind: str) -> int:
    facts = data.facts.get(kind)
    if facts is None:
        raise LimnerError(f"fidelity: the data set has no {kind.replace('_', ' ')} to judge by")
    return len(facts["classes"]) + (kind == "boxes")


def wanted_maps(data: Dataset, kind: str, asked: Tensor) -> npt.NDArray[np.int64]:
    """What pictures should show, class numbers (N, H, W), VOID where nothing is asked. Boxes are filled, the smaller on
    top of the larger; outside of all of them is the last class."""
    if kind == "semantic_map":
        found = asked.numpy().astype(np.int64)
        known = data.conditions[kind]
        if isinstance(known, SemanticMaps) and known.void is not None:
            found = np.where(found == known.void, VOID, found)
        return found
    return np.stack([filled_boxes(boxes, data.size, _classes(data, kind) - 1) for boxes in asked.numpy()])


def filled_boxes(boxes: npt.NDArray[np.float32], size: tuple[int, int], ground: int) -> npt.NDArray[np.int64]:
    """Boxes (n, 5) in 0..1, class -1 for none, as class numbers (H, W), with `ground` where there is no box."""
    found = np.full(size, ground, np.int64)
    for kind, x, y, w, h in sorted(boxes.tolist(), key=lambda box: -box[3] * box[4]):
        if kind >= 0:
            top, left = int(y * size[0] + 0.5), int(x * size[1] + 0.5)
            bottom, right = int((y + h) * size[0] + 0.5), int((x + w) * size[1] + 0.5)
            found[top : max(bottom, top + 1), left : max(right, left + 1)] = int(kind)
    return found


def mean_iou(found: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64], classes: int) -> float:
    """Intersection over union of class numbers (N, H, W), over all pixels that aren't VOID, averaged over the classes
    that are wanted anywhere."""
    known = wanted != VOID
    pairs = wanted[known] * classes + found[known]
    table = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    both, either = np.diag(table), table.sum(0) + table.sum(1) - np.diag(table)
    present = table.sum(1) > 0
    return float((both[present] / either[present]).mean()) if present.any() else float("nan")


def consistency(drawn: Uint8, small: Tensor) -> float:
    """PSNR in dB, averaged over pictures, of drawn pictures reduced (bicubic, antialiased) against the small ones
    (N, C, h, w) that were enlarged."""
    large = as_floats(drawn)
    reduced = F.interpolate(large, (small.shape[2], small.shape[3]), mode="bicubic", antialias=True).clamp(-1, 1)
    return float(psnr(reduced, small[:, : large.shape[1]].to(large)).mean())


@torch.no_grad()
def nearness(drawn: Uint8, small: Tensor, real: Uint8) -> dict[str, float]:
    """Perceptual distance to the real pictures (EfficientNet-Lite0's features), averaged: `perceptual`, of what was
    drawn, and `perceptual_bicubic`, of the small pictures (N, C, h, w) enlarged by bicubic interpolation."""
    distance, there = perceptual_distance("efficientnet-lite0"), as_floats(real)
    plain = F.interpolate(small[:, : there.shape[1]].to(there), there.shape[2:], mode="bicubic").clamp(-1, 1)
    made = {"perceptual": as_floats(drawn), "perceptual_bicubic": plain}
    pairs = {name: zip(found.split(BATCH), there.split(BATCH), strict=True) for name, found in made.items()}
    return {name: float(torch.cat([distance(x, y) for x, y in each]).mean()) for name, each in pairs.items()}


def kept(drawn: Uint8, holes: Tensor) -> float:
    """The share of known pixels, of pictures with a hole (N, C + 1, H, W), that drawn pictures show to the bit."""
    known = holes[:, -1] == 0
    same = (torch.from_numpy(drawn) == torch.from_numpy(to_uint8(holes[:, :-1]))).all(-1)
    return float(same[known].float().mean()) if known.any() else float("nan")


def fidelity(drawn: Uint8, asked: Mapping[str, Any], data: Dataset, real: Uint8 | None = None,
             judges: Mapping[str, Segmenter] | None = None) -> dict[str, float]:  # fmt: skip
    """How well pictures (N, H, W, C) show what was asked, by modality as `RunConfig.conditions_in` gives it.

    real: real pictures of the same conditions, to say what the judge can see at all. data: teaches the judges that
    aren't given. Returns, as far as the conditions go, `map_miou`, `boxes_miou`, each with `_real` and `_share` where
    there are real pictures, `downsampled_psnr` in dB and what `nearness` tells, `known_pixels` (1 is exact). For labels
    see `probe.py`.
    """
    found: dict[str, float] = {}
    for kind, name in (("semantic_map", "map_miou"), ("boxes", "boxes_miou")):
        if kind in asked:
            network = (judges or {}).get(kind) or judge(data, kind)
            wanted = wanted_maps(data, kind, asked[kind])
            found[name] = mean_iou(network.classify(drawn), wanted, network.classes)
            if real is not None:
                found[f"{name}_real"] = mean_iou(network.classify(real), wanted, network.classes)
                found[f"{name}_share"] = found[name] / max(found[f"{name}_real"], 1e-9)
    if "image" in asked:
        found["downsampled_psnr"] = consistency(drawn, asked["image"])
        found |= {} if real is None else nearness(drawn, asked["image"], real)
    if "mask" in asked:
        found["known_pixels"] = kept(drawn, asked["mask"])
    return found


def of_run(generator: Generator, test: Dataset, data: Dataset, *, rows: Rows | None = None, seed: int = 0,
           judges: Mapping[str, Segmenter] | None = None, **drawing: Any) -> dict[str, float]:  # fmt: skip
    """The fidelity of a run on the conditions of `rows` of `test`, which it wasn't trained on; by default the first 64.

    test, data: data sets with the run's conditions; the training rows of `data` teach the judges. drawing: options of
    `Generator.stream`. A small picture is given without noise. Raises LimnerError as `Generator.stream` does.
    """
    rows = np.arange(min(ROWS, len(test))) if rows is None else np.asarray(rows)
    asked = generator.config.conditions_in(test.batch(rows))
    if "image" in asked:
        asked["image"] = asked["image"][:, : test.channels]
    batches = generator.stream(num=len(rows), seed=seed, conditions=asked, **drawing)
    drawn = np.concatenate([to_uint8(generator.finished(batch)) for batch in batches])
    return {"n": float(len(rows))} | fidelity(drawn, asked, data, test.uint8(rows), judges)
