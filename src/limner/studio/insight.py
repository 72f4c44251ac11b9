"""How one picture came to be: its states on the way, where each word of its caption acted, and what is nearest to it
among the pictures that the model learnt from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from limner.core.types import OnStep, Step
from limner.errors import LimnerError
from limner.evaluation import features, reference
from limner.evaluation.neighbours import squared_distances
from limner.evaluation.real import RealPictures, open_real
from limner.generator import Generator, to_uint8
from limner.guide import NoisyClassifier
from limner.nn import words
from limner.nn.attention import CrossAttention
from limner.nn.text import PretrainedTokenizer, pretrained
from limner.outputs import Picture
from limner.studio import drawing
from limner.studio.jobs import Request

Pixels = npt.NDArray[np.uint8]
FRAMES = 10
REFERENCES = 5000
"""Training pictures that are searched for the nearest, at most."""


@dataclass(frozen=True)
class Frame:
    """A state on the way: step of total at time t, the noisy picture x, and the x0 that the model expected. uint8."""

    step: int
    total: int
    t: float
    x: Pixels
    x0: Pixels


@dataclass(frozen=True)
class Insight:
    """words: by word of the caption, a map (H, W) in 0..1 of where it acted; empty without cross-attention."""

    picture: Picture
    frames: list[Frame]
    words: list[tuple[str, npt.NDArray[np.float32]]]


def insight(generator: Generator, request: Request, guide: NoisyClassifier | None, tell: OnStep) -> Insight:
    """Draw the first picture of a request and keep what happens. Raises LimnerError as drawing does."""
    frames: list[Frame] = []

    def keep(step: Step) -> None:
        every = max(1, step.total // FRAMES)
        if step.index % every == 0 or step.index in (1, step.total):
            seen = [to_uint8(generator.decode(z[:1].float()))[0] for z in (step.x, step.x0)]
            frames.append(Frame(step.index, step.total, step.t, *seen))
        tell(step)

    with attention(generator.model.network, generator.shape[1:]) as watched:
        ((picture, *_),) = drawing.draw(generator, [request], guide, keep)
    caption = picture.facts.get("text")
    words = word_maps(generator, str(caption), watched) if caption and watched.maps is not None else []
    return Insight(picture, frames, words)


# --- attention ----------------------------------------------------------------------------------------------------


@dataclass
class Watched:
    """maps: (L, H, W), the attention of the first picture to each token, summed over layers, heads and steps."""

    size: tuple[int, ...]
    maps: Tensor | None = None

    def add(self, weights: Tensor) -> None:
        """weights: (N, L), each pixel's attention over the tokens, averaged over heads."""
        height = round((weights.shape[0] * self.size[0] / self.size[1]) ** 0.5)
        map_ = weights.T.unflatten(1, (height, -1))[None]
        grown = F.interpolate(map_, self.size, mode="bilinear", align_corners=False)[0]
        self.maps = grown if self.maps is None else self.maps + grown


@contextmanager
def attention(network: torch.nn.Module, size: tuple[int, ...]) -> Iterator[Watched]:
    """Inside the block, what every cross-attention of the network looks at is recorded, of the first picture of a
    batch: its conditional half comes first under classifier-free guidance. size: height, width of the maps."""
    watched = Watched(size)

    def hook(module: Any, given: Any, _: Tensor) -> None:
        tokens = given[1] if len(given) > 1 else None
        if tokens is None:
            return
        mask = given[2] if len(given) > 2 else None
        q = module.q(given[0][:1]).float().unflatten(2, (module.heads, -1)).transpose(1, 2)
        k = module.kv(tokens[:1]).chunk(2, dim=2)[0].float().unflatten(2, (module.heads, -1)).transpose(1, 2)
        with torch.autocast(q.device.type, enabled=False):  # else the product is in bf16, which NumPy doesn't know
            scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:1, None, None, :], -torch.inf)
        watched.add(scores.softmax(dim=3).mean(1)[0].cpu())

    hooks = [module.register_forward_hook(hook) for module in network.modules() if isinstance(module, CrossAttention)]
    try:
        yield watched
    finally:
        for each in hooks:
            each.remove()


def word_maps(generator: Generator, caption: str, watched: Watched) -> list[tuple[str, npt.NDArray[np.float32]]]:
    """Each word with its map, the largest value of all words 1. A word of several tokens has the mean of theirs."""
    assert watched.maps is not None
    conditioner: Any = generator.model.conditioner
    start = 0
    for name, module in conditioner.modalities.items():
        if name == "text":
            break
        start += 1 if getattr(module, "token_channels", None) else 0
    text = conditioner.modalities["text"]
    read = caption if text.reworded is None else text.reworded(caption)
    spans = token_spans(text.tokenizer, read)
    found = []
    for match, word in zip(re.finditer(r"\S+", read), caption.split(), strict=True):
        rows = [start + row for row, (low, high) in enumerate(spans) if low < match.end() and high > match.start()]
        if rows:
            found.append((word, watched.maps[rows].mean(0)))
    most = max((float(map_.max()) for _, map_ in found), default=1.0) or 1.0
    return [(word, (map_ / most).numpy()) for word, map_ in found]


def token_spans(tokenizer: Any, caption: str) -> list[tuple[int, int]]:
    """Where in the caption each token stands: (from, to) by characters, (0, 0) for marks and padding."""
    if isinstance(tokenizer, PretrainedTokenizer):
        own = pretrained(tokenizer.name).tokenizer
        return own(caption, return_offsets_mapping=True, truncation=True, max_length=tokenizer.length)["offset_mapping"]
    if isinstance(tokenizer, words.WordTokenizer):
        return words.tokenizer(tokenizer.length).encode(caption).offsets
    return tokenizer._tokenizer().encode(caption).offsets


def overlaid(pixels: Pixels, map_: npt.NDArray[np.float32]) -> Pixels:
    """A picture (H, W, C) darkened where a word did not act: map (h, w) in 0..1."""
    shown = torch.from_numpy(map_)[None, None]
    weight = F.interpolate(shown, pixels.shape[:2], mode="bilinear", align_corners=False)[0, 0].numpy()[..., None]
    return (pixels * (0.15 + 0.85 * weight)).round().astype(np.uint8)


# --- the nearest training pictures --------------------------------------------------------------------------------


@dataclass
class Memory:
    """The training pictures of one model and their features, read when they are first asked for."""

    generator: Generator
    _data: RealPictures | None = None
    _known: reference.Reference | None = None
    _network: features.FeatureNetwork | None = None

    def nearest(self, pixels: Pixels, count: int = 4) -> list[tuple[Pixels, float]]:
        """The training pictures nearest to uint8 (H, W, C) in the space of EfficientNet-Lite0, with their distance,
        1 being the middle distance between training pictures. Raises LimnerError where the data are not there."""
        size = self.generator.config.data.size
        if size is None or self.generator.config.data.source is None:
            raise LimnerError("this model says nothing of the pictures that it was trained on")
        if self._known is None:
            self._data = open_real(self.generator.config.data, size)
            self._network = features.network("efficientnet-lite0")
            self._known = reference.of_dataset(self._data, self._network, num=REFERENCES)
        assert self._network is not None
        assert self._data is not None
        known = self._known.features.float()
        mean = known.mean(0)
        asked = self._network(pixels[None])["pooled"] - mean
        distance = squared_distances(asked, known - mean)[0]
        usual = squared_distances((known - mean)[:200], known - mean).median().sqrt()
        found = distance.topk(min(count, len(distance)), largest=False)
        pictures = self._data.uint8(self._known.rows[found.indices.numpy()])
        return [(each, float(value.sqrt() / usual)) for each, value in zip(pictures, found.values, strict=True)]
