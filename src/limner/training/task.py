"""What a stage of training is. The loop knows nothing of what it trains beyond this."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from limner.training.draws import Source
from limner.training.share import ALONE, Share

BANDS = 4
"""Losses are told apart by noise: t in quarters of [0, 1]."""


@dataclass(frozen=True)
class Losses:
    """objectives: a scalar by module name; its backward reaches that module's parameters alone.

    logs: scalars, averaged over the interval; or (2,) tensors of a sum and a count, whose quotient is told. They stay
    on the device until the interval ends.
    """

    objectives: Mapping[str, Tensor]
    logs: Mapping[str, Tensor] = field(default_factory=dict)


class Task(ABC):
    """One stage: its modules, their losses, and how they are judged.

    modules: the first is "model"; it has the moving average and becomes `model.safetensors`. Each has its own
    optimizer. A module can be named in `modules` and yet have no objective in a step: then it rests.
    networks: what torch.compile may compile, each called with tensors of one shape.
    hidden: names in "model" of the weights that Muon may train.
    best_is: a name in what `held_out` returns; the lowest value marks the best checkpoint, which becomes the run's
    model, and `patience` held-out rounds without a better one end the training. None: the last is the best.
    """

    modules: dict[str, nn.Module]
    networks: Sequence[nn.Module] = ()
    hidden: Collection[str] = ()
    best_is: str | None = None
    patience: int = 0

    @abstractmethod
    def losses(self, batch: Mapping[str, Any], rng: torch.Generator, progress: float) -> Losses:
        """The losses of one micro-batch, on the device. `batch["part"]` says which rows it holds; `rng` depends on
        (seed, images seen, process, micro-batch); progress is the share of the budget that is spent, 0 to 1."""

    @abstractmethod
    def held_out(self, average: nn.Module, data: Source, share: Share = ALONE) -> dict[str, float]:
        """Figures of the averaged model on the held-out rows, the same rows and noise each time. Every process calls
        it, with its share of the work, and is given the figures of all."""

    @abstractmethod
    def preview(self, average: nn.Module, share: Share = ALONE) -> tuple[npt.NDArray[np.uint8], list[str]]:
        """Pictures (N, H, W, C) by the averaged model, from fixed noise and conditions, and their captions; N may
        be 0. Processes as in `held_out`."""


def band_names(name: str) -> list[str]:
    """`loss_t0.00_0.25`, ..., `loss_t0.75_1.00`."""
    edges = [band / BANDS for band in range(BANDS + 1)]
    return [f"{name}_t{low:.2f}_{high:.2f}" for low, high in itertools.pairwise(edges)]


def by_band(name: str, values: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Sum and count of per-row `values` (B,) in each band of t (B,), for `Losses.logs`."""
    band = (t.to(values.device) * BANDS).long().clamp(0, BANDS - 1)
    chosen = (band == torch.arange(BANDS, device=values.device)[:, None]).float()
    pairs = torch.stack([chosen @ values.detach().float(), chosen.sum(1)], dim=1)
    return dict(zip(band_names(name), pairs.unbind(), strict=True))


def total(values: Tensor) -> Tensor:
    """Sum and count of per-row `values` (B,), for `Losses.logs`."""
    sum_ = values.detach().float().sum()
    return torch.stack([sum_, torch.full_like(sum_, len(values))])


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on the device, but for the numbers of its rows: the host alone asks for them and
    would have to wait for a GPU."""
    tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k != "row"}
    return {**batch, **{k: v.to(device, non_blocking=True) for k, v in tensors.items()}}


class Means:
    """Averages of logs, kept on the device. What isn't finite is left out: bad steps are counted elsewhere."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, logs: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Take in logs; `share` is the weight of a scalar, 1 / micro-batches."""
        for name, value in logs.items():
            pair = value.detach().float()
            pair = torch.stack([pair, torch.ones_like(pair)]) * share if pair.ndim == 0 else pair
            pair = torch.where(torch.isfinite(pair).all(), pair, 0.0)
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def merge(self, other: Means) -> None:
        """Take in another's sums."""
        for name, pair in other._sums.items():
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def share(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Take in the sums of all processes, which have logged the same names in the same order."""
        if self._sums:
            self._sums = dict(zip(self._sums, add_up(torch.stack(list(self._sums.values()))).unbind(), strict=True))

    def read(self) -> dict[str, float]:
        """The averages so far, in one transfer, and start anew; a band that no row fell into is left out."""
        if not self._sums:
            return {}
        pairs = torch.stack(list(self._sums.values())).tolist()
        means = {name: total / count for name, (total, count) in zip(self._sums, pairs, strict=True) if count}
        self._sums = {}
        return means
