"""What the nearest neighbours in feature space tell: precision, recall, density, coverage, memorisation, retrieval.

Features are (N, D); distances are Euclidean, worked out in blocks in float32 around the reference's mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from limner.evaluation.metrics import Array

BLOCK = 1024


@dataclass(frozen=True)
class Neighbourhoods:
    """Verdicts by picture.

    precise: (samples,) bool: the sample lies in the ball of some real picture to its k-th real neighbour.
    recalled: (real,) bool: the real picture lies in the ball of some sample (both: Kynkäänniemi et al. 2019).
    density: (samples,): in how many real balls it lies, over k. covered: (real,) bool: its ball holds a sample (both:
    Naeem et al. 2020, eq. 3).
    """

    precise: npt.NDArray[np.bool_]
    recalled: npt.NDArray[np.bool_]
    density: npt.NDArray[np.float64]
    covered: npt.NDArray[np.bool_]


def neighbourhoods(real: Array, samples: Array, *, k: int = 3, k_density: int = 5) -> Neighbourhoods:
    """Precision and recall with k neighbours (arXiv:1904.06991, eq. 2), density and coverage with k_density
    (arXiv:2002.09797). Both sets need more than k_density pictures. The precision is `precise.mean()`, and so on."""
    x, y = _centred(real, samples)
    near_x = smallest(x, x, max(k, k_density), skip_self=True)
    radius_x, radius_density = near_x[:, k - 1], near_x[:, k_density - 1]
    radius_y = smallest(y, y, k, skip_self=True)[:, k - 1]
    precise, density = torch.zeros(len(y), dtype=torch.bool), torch.zeros(len(y), dtype=torch.float64)
    recalled, covered = [], []
    for start in range(0, len(x), BLOCK):
        rows = slice(start, start + BLOCK)
        distance = squared_distances(x[rows], y)
        inside = distance <= radius_density[rows, None]
        precise |= (distance <= radius_x[rows, None]).any(0)
        density += inside.sum(0) / k_density
        recalled.append((distance <= radius_y).any(1))
        covered.append(inside.any(1))
    return Neighbourhoods(precise.numpy(), torch.cat(recalled).numpy(), density.numpy(), torch.cat(covered).numpy())


def within_classes(
    real: Array, real_labels: npt.NDArray[np.int64], samples: Array, asked: npt.NDArray[np.int64], *, k: int = 3
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """`precise` (M,) and `recalled` (N,) among the pictures of one class at a time: a sample of the wrong class is not
    precise, however good. real_labels (N,), asked (M,): classes.

    A class with no more than k pictures on either side has False throughout."""
    precise, recalled = np.zeros(len(samples), bool), np.zeros(len(real), bool)
    for label in np.unique(asked):
        mine, theirs = np.flatnonzero(asked == label), np.flatnonzero(real_labels == label)
        if min(len(mine), len(theirs)) > k:
            near = neighbourhoods(real[theirs], samples[mine], k=k, k_density=k)
            precise[mine], recalled[theirs] = near.precise, near.recalled
    return precise, recalled


def nearest(queries: Array, base: Array) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Distance (N,) and row (N,) of each query's nearest neighbour in `base`."""
    y, x = _centred(base, queries)
    found = [squared_distances(x[k : k + BLOCK], y).min(1) for k in range(0, len(x), BLOCK)]
    return torch.cat([f.values for f in found]).sqrt().numpy(), torch.cat([f.indices for f in found]).numpy()


def nearest_of_rows(base: Array, count: int) -> npt.NDArray[np.float32]:
    """Distance of each of the first `count` rows to the nearest other row."""
    y, _ = _centred(base, base[:0])
    return smallest(y[:count], y, 1, skip_self=True)[:, 0].sqrt().numpy()


def retrieval_ranks(queries: Array, gallery: Array, own: Array) -> npt.NDArray[np.int64]:
    """Rank, from 1, of row `own[i]` of the gallery among all its rows by cosine with query i, both around the gallery's
    mean. Ties count against the query. Chance is uniform on 1..len(gallery)."""
    base = torch.as_tensor(gallery).double()
    mean = base.mean(0)
    base = torch.nn.functional.normalize(base - mean, dim=1)
    asked = torch.nn.functional.normalize(torch.as_tensor(queries).double() - mean, dim=1)
    cosine = asked @ base.T
    mine = cosine.gather(1, torch.as_tensor(own).long()[:, None])
    return (cosine >= mine).sum(1).numpy()


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(N, M) squared Euclidean distances, never negative."""
    product = torch.addmm(y.square().sum(1).expand(len(x), -1), x, y.T, alpha=-2)
    return product.add_(x.square().sum(1, keepdim=True)).clamp_min_(0)


def smallest(x: Tensor, y: Tensor, count: int, *, skip_self: bool = False) -> Tensor:
    """The `count` smallest squared distances of each x to y, ascending; with `skip_self`, row i of x is row i of y
    and no neighbour of itself."""
    found = []
    for start in range(0, len(x), BLOCK):
        d = squared_distances(x[start : start + BLOCK], y)
        if skip_self:
            d[torch.arange(len(d)), start + torch.arange(len(d))] = torch.inf
        found.append(d.topk(count, dim=1, largest=False).values)
    return torch.cat(found)


def _centred(base: Array, other: Array) -> tuple[Tensor, Tensor]:
    """Both in float32 around the base's mean: smaller numbers, less cancellation."""
    x, y = (torch.as_tensor(z).detach().to("cpu", torch.float32, copy=True) for z in (base, other))
    mean = x.mean(0)
    return x.sub_(mean), y.sub_(mean)
