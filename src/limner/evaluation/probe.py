"""A linear classifier on top of a feature network, for those who have no classifier of their own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from limner.errors import LimnerError
from limner.evaluation.metrics import Array

RIDGES = (100.0, 1_000.0, 10_000.0)
HELD_OUT = 0.2
LEAST = 10
"""Real pictures that a probe needs."""


@dataclass(frozen=True)
class Probe:
    """Least-squares classification of standardised features (ridge regression on one-hot classes).

    accuracy: share of right answers on the real pictures that were held out of the fit, `tested` of them.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    accuracy: float
    tested: int

    def scores(self, features: Array) -> Tensor:
        """How much each feature vector (N, D) is of each class, (N, classes) double: about its indicator, 0 to 1, less
        the mean."""
        x = (torch.as_tensor(features).float() - self.mean) / self.scale
        return x.double() @ self.weight

    def classify(self, features: Array) -> npt.NDArray[np.int64]:
        """The class of each feature vector (N, D)."""
        return self.scores(features).argmax(1).numpy()


def fit(features: Array, labels: npt.NDArray[np.int64], classes: int, *, seed: int = 0) -> Probe:
    """Fit on real features (N, D) and labels (N,) in [0, classes); a fifth is held out to choose the ridge and to say
    how good the probe is. Raises LimnerError with fewer than 10 pictures or a single class."""
    if len(labels) < LEAST or len(np.unique(labels)) < 2:
        raise LimnerError(
            f"reference: {len(labels)} pictures of {len(np.unique(labels))} classes are too few for a probe"
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    held = max(2, round(HELD_OUT * len(labels)))
    test, train = order[:held], order[held:]
    x, known = torch.as_tensor(features), torch.from_numpy(labels)
    fitted, tested = x[train].float(), x[test].float()
    mean, scale = fitted.mean(0), fitted.std(0) + 1e-6
    fitted, tested = fitted.sub_(mean).div_(scale), tested.sub_(mean).div_(scale)
    gram = (fitted.T @ fitted).double()
    sums = torch.zeros(classes, x.shape[1]).index_add_(0, known[train], fitted)
    share = torch.bincount(known[train], minlength=classes).float() / len(train)
    cross = (sums - share[:, None] * fitted.sum(0)).T.double()
    best = (-1.0, gram)
    for ridge in RIDGES:
        weight = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=torch.float64), cross)
        right = float(((tested.double() @ weight).argmax(1) == known[test]).double().mean())
        best = max(best, (right, weight), key=lambda pair: pair[0])
    return Probe(mean, scale, best[1], best[0], held)
