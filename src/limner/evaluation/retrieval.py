"""Text-image retrieval: is the real picture that a caption belongs to the one, of many, that its sample is most like?

Pooled EfficientNet-Lite0 features at 224x224 (resized with antialiasing), around the mean of the real ones, compared by
cosine. Beside it stands what recall alone would reach: the training picture whose caption shares most words.

found = retrieve(samples, asked, real, captions)      # uint8 (N, H, W, C), N captions; uint8 (M, H, W, C), M captions
found.within(1), found.within(5)                      # share and its 95% interval
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from limner.errors import LimnerError, suggest
from limner.evaluation import neighbours, processes
from limner.evaluation.collect import BATCH, Batch
from limner.evaluation.features import SIDE, EfficientNetLite0, FeatureNetwork, Pictures
from limner.evaluation.metrics import Estimate, bootstrap_mean
from limner.evaluation.real import RealPictures

GALLERY = 200
"""Real pictures among which a caption's own is to be found."""
MOST = 2_000
"""Samples that are looked at."""


@dataclass(frozen=True)
class Retrieved:
    """ranks: (N,) of each sample's own real picture, from 1. own: (N,) which of the `among` real ones that is."""

    ranks: npt.NDArray[np.int64]
    own: npt.NDArray[np.int64]
    among: int

    def within(self, first: int) -> Estimate:
        """Share of captions whose own picture is among the first; a 95% bootstrap over captions, since samples of one
        caption are alike."""
        place = np.unique(self.own, return_inverse=True)[1]
        return bootstrap_mean(np.bincount(place, self.ranks <= first) / np.bincount(place))

    def chance(self, first: int) -> float:
        """The share that guessing would have."""
        return min(1.0, first / self.among)


def retrieve(samples: Pictures, asked: Sequence[str], real: Pictures, captions: Sequence[str], *,
             network: FeatureNetwork | None = None) -> Retrieved:  # fmt: skip
    """Ranks of the pictures asked for among the real ones.

    samples: uint8 (N, H, W, C), drawn for the captions `asked` (N). real: uint8 (M, H', W', C), with their `captions`
    (M), no two alike. network: another than EfficientNet-Lite0 at 224x224. Raises LimnerError: a caption that no real
    picture has, two real ones with one caption, lengths that differ, fewer than two real pictures.
    """
    net = network or EfficientNetLite0(side=SIDE)
    for name, pictures, texts in (("samples", samples, asked), ("real pictures", real, captions)):
        if len(pictures) != len(texts):
            raise LimnerError(f"retrieval: {len(texts)} captions for {len(pictures)} {name}")
    number = {text: k for k, text in enumerate(captions)}
    if len(number) < len(captions):
        double = next(text for k, text in enumerate(captions) if number[text] != k)
        raise LimnerError(f"retrieval: two real pictures are called '{double}'; captions should differ")
    unknown = next((text for text in asked if text not in number), None)
    if unknown is not None:
        raise LimnerError(f"retrieval: no real picture is called '{unknown}'{suggest(unknown, captions)}")
    own = np.array([number[text] for text in asked], dtype=np.int64)
    return ranked(pooled(samples, net), own, pooled(real, net))


def ranked(samples: Tensor, own: npt.NDArray[np.int64], gallery: Tensor) -> Retrieved:
    """The same from features (N, D), rows of the gallery (N,), and the gallery's features (M, D)."""
    if len(gallery) < 2 or not len(samples):
        raise LimnerError(f"retrieval: {len(samples)} samples and {len(gallery)} real pictures are too few")
    return Retrieved(neighbours.retrieval_ranks(samples, gallery, own), own, len(gallery))


def pooled(pictures: Pictures, network: FeatureNetwork) -> Tensor:
    """Features (N, D) of uint8 (N, H, W, C)."""
    parts = [network(pictures[k : k + BATCH])["pooled"] for k in range(0, len(pictures), BATCH)]
    return torch.cat(parts) if parts else torch.zeros(0, network.dim)


def nearest_captions(asked: Sequence[str], known: Sequence[str]) -> list[int]:
    """For each caption the place of the known one that shares most words with it: shared words over all words of
    both (Jaccard), the first where several are alike."""
    bags = [_words(text) for text in known]
    found = []
    for text in asked:
        words = _words(text)
        found.append(max(range(len(bags)), key=lambda k: len(words & bags[k]) / max(1, len(words | bags[k]))))
    return found


def _words(text: str) -> frozenset[str]:
    return frozenset("".join(c if c.isalnum() else " " for c in text.lower()).split())


# --- inside an evaluation ---------------------------------------------------------------------------------------


class Search:
    """Looks for the pictures of held-out captions while samples pass by.

    data: the reference. trained_on: the pictures that the model learned from; None: the reference's own training rows,
    and then only its held-out rows count, while of another reference all rows do. Memory does not grow with the number
    of samples: features of the first `MOST` that count are kept.
    """

    def __init__(self, data: RealPictures, network: FeatureNetwork, trained_on: RealPictures | None = None) -> None:
        self.data = data
        self.network = EfficientNetLite0(network.device, SIDE) if isinstance(network, EfficientNetLite0) else network
        self.training = (data, data.train) if trained_on is None else (trained_on, np.arange(len(trained_on)))
        fresh = data.held_out if trained_on is None else np.concatenate([data.held_out, data.train])
        trained_texts = self.training[0].texts or []
        learned = {trained_texts[row] for row in self.training[1]} if trained_texts else set()
        self.rows = {text: row for text, row in _rows_by_text(data, fresh).items() if text not in learned}
        self._asked: list[str] = []
        self._features: list[Tensor] = []

    def watching(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; on their way the features of those that count are kept."""
        for pictures, conditions in batches:
            texts = [] if conditions.get("text") is None else [str(text) for text in conditions["text"]]
            places = [k for k, text in enumerate(texts) if text in self.rows][: MOST - len(self._asked)]
            if places:
                self._asked += [texts[k] for k in places]
                self._features.append(pooled(pictures[places], self.network))
            yield pictures, conditions

    def found(self) -> tuple[Retrieved, Retrieved | None] | None:
        """How the samples fared, and how recall would; None where fewer than two held-out captions were asked for.

        The gallery is the pictures of the captions asked for, filled up with others to `GALLERY`.
        """
        asked, features = self._gathered()
        captions = list(dict.fromkeys(asked))[:GALLERY]
        if len(captions) < 2:
            return None
        wanted = len(captions)
        others = _rows_by_text(self.data, np.concatenate([self.data.held_out, self.data.train]))
        rows = {text: self.rows[text] for text in captions} | {t: r for t, r in others.items() if t not in captions}
        gallery = pooled(self.data.uint8(list(rows.values())[:GALLERY]), self.network)
        number = {text: k for k, text in enumerate(captions)}
        kept = [k for k, text in enumerate(asked) if text in number]
        own = np.array([number[asked[k]] for k in kept], dtype=np.int64)
        return ranked(features[kept], own, gallery), self._recall(captions, gallery, wanted)

    def _recall(self, captions: list[str], gallery: Tensor, wanted: int) -> Retrieved | None:
        pictures, rows = self.training
        texts = pictures.texts
        if texts is None:
            return None
        nearest = rows[nearest_captions(captions, [texts[row] for row in rows])]
        return ranked(pooled(pictures.uint8(nearest), self.network), np.arange(wanted), gallery)

    def _gathered(self) -> tuple[list[str], Tensor]:
        """Those of all processes."""
        mine = (self._asked, torch.cat(self._features) if self._features else torch.zeros(0, self.network.dim))
        parts = processes.gathered(mine)
        return [text for texts, _ in parts for text in texts], torch.cat([features for _, features in parts])


def _rows_by_text(data: RealPictures, rows: npt.NDArray[np.int64]) -> dict[str, int]:
    """The first of these rows for each caption."""
    texts = data.texts or []
    found: dict[str, int] = {}
    for row in rows:
        found.setdefault(texts[row], int(row))
    return found
