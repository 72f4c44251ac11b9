"""One pass over pictures: streaming sums of everything, and a random part kept for what needs single features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from limner.errors import LimnerError
from limner.evaluation import processes
from limner.evaluation.features import FeatureNetwork, as_rgb
from limner.evaluation.metrics import ColourSums, Moments, ScoreSums

Batch = tuple[npt.NDArray[np.uint8], Mapping[str, Any]]
"""uint8 (B, H, W, C) and conditions by modality: `label` (B,), `text` list of B."""

KEEP = 10_000
"""Pictures whose features are kept for neighbours, kernels and classes: the cap of all quadratic work."""
SHEET = 64
"""Pictures kept as pictures, for reports."""
BATCH = 32
"""Pictures a pass of the feature network: what a CPU's caches hold."""


class Reservoir:
    """A uniformly random part of a stream, at most `keep` items, in stream order. Two of the same seed agree: the
    smaller one holds a part of the larger one."""

    def __init__(self, keep: int, seed: int = 0) -> None:
        self.keep = keep
        self._generator = np.random.default_rng(seed)
        self._parts: dict[str, list[npt.NDArray[Any]]] = {}
        self._held = 0

    def update(self, columns: Mapping[str, npt.NDArray[Any]]) -> None:
        """Add a batch: arrays of equal length by name; every batch has the same names."""
        count = len(next(iter(columns.values())))
        priority = self._generator.random(count)
        for name, values in {**columns, "_priority": priority}.items():
            self._parts.setdefault(name, []).append(values)
        self._held += count
        if self._held > 2 * self.keep:
            self._prune()

    def merge(self, other: Reservoir) -> None:
        """Add what another process has kept; its items come after these."""
        for name, parts in other._parts.items():
            self._parts.setdefault(name, []).extend(parts)
        self._held += other._held
        self._prune()

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """What was kept, by name."""
        self._prune()
        return {name: parts[0] for name, parts in self._parts.items() if not name.startswith("_")}

    def _prune(self) -> None:
        if not self._parts:
            return
        for name, parts in self._parts.items():
            self._parts[name] = [np.concatenate(parts)] if len(parts) > 1 else parts
        if self._held <= self.keep:
            return
        chosen = np.sort(np.argsort(self._parts["_priority"][0], kind="stable")[: self.keep])
        self._parts = {name: [parts[0][chosen]] for name, parts in self._parts.items()}
        self._held = len(chosen)


@dataclass
class Collected:
    """Everything that the figures need of one set of pictures."""

    seed: int = 0
    keep: int = KEEP
    size: tuple[int, int] = (0, 0)
    channels: int = 0
    columns: frozenset[str] = frozenset()
    pooled: Moments = field(default_factory=Moments)
    spatial: Moments = field(default_factory=Moments)
    scores: ScoreSums = field(default_factory=ScoreSums)
    colours: ColourSums = field(default_factory=ColourSums)
    kept: Reservoir = field(init=False)
    sheet: Reservoir = field(init=False)

    def __post_init__(self) -> None:
        self.kept = Reservoir(self.keep, self.seed)
        self.sheet = Reservoir(min(SHEET, self.keep), self.seed)

    @property
    def n(self) -> int:
        """Pictures seen."""
        return self.pooled.n

    def add(
        self,
        pictures: npt.NDArray[np.uint8],
        conditions: Mapping[str, Any],
        network: FeatureNetwork,
        judge: FeatureNetwork | None = None,
    ) -> None:
        """Add a batch. `judge`: a second network, whose `logits` name the class of each picture."""
        self._check(pictures)
        found = network(pictures)
        self.pooled.update(found["pooled"])
        if "spatial" in found:
            self.spatial.update(found["spatial"])
        if "logits" in found:
            self.scores.update(found["logits"])
        self.colours.update(as_rgb(pictures).permute(0, 2, 3, 1).numpy())
        columns: dict[str, npt.NDArray[Any]] = {"pooled": found["pooled"].half().numpy()}
        columns["row"] = np.arange(self.n - len(pictures), self.n)
        if conditions.get("label") is not None:
            columns["label"] = np.asarray(conditions["label"], dtype=np.int64)
        if conditions.get("text") is not None:
            columns["text"] = np.asarray(conditions["text"], dtype=object)
        if judge is not None:
            columns["judged"] = judge(pictures)["logits"].argmax(1).numpy()
        self._check_columns(columns)
        self.kept.update(columns)
        self.sheet.update(columns | {"picture": pictures})

    def merge(self, other: Collected) -> None:
        """Add what another process has collected."""
        mine, theirs = ((c.size, c.channels, c.columns) for c in (self, other))
        if self.n and other.n and mine != theirs:
            raise LimnerError(f"samples: {theirs} in one process and {mine} in another; they should be alike")
        self.size, self.channels, self.columns = theirs if other.n else mine
        for name in ("pooled", "spatial", "scores", "colours", "kept", "sheet"):
            getattr(self, name).merge(getattr(other, name))

    def _check_columns(self, columns: Mapping[str, Any]) -> None:
        self.columns = self.columns or frozenset(columns)
        for name in sorted(self.columns ^ columns.keys()):
            here, before = ("no", "have") if name in self.columns else ("a", "have none")
            where = self.n - len(columns["row"])
            raise LimnerError(f"samples: picture {where} has {here} {name}, though those before it {before}")

    def _check(self, pictures: npt.NDArray[np.uint8]) -> None:
        size, channels = (pictures.shape[1], pictures.shape[2]), pictures.shape[3]
        if not self.n:
            self.size, self.channels = size, channels
        elif (size, channels) != (self.size, self.channels):
            raise LimnerError(
                f"samples: picture {self.n} is {_shape(size, channels)}, those before it are "
                f"{_shape(self.size, self.channels)}; all should be of one size"
            )


def collect(
    batches: Iterable[Batch],
    network: FeatureNetwork,
    *,
    keep: int = KEEP,
    seed: int = 0,
    num: int | None = None,
    judge: FeatureNetwork | None = None,
    progress: Callable[[int], None] | None = None,
    alone: bool = False,
) -> Collected:
    """Run the network over pictures, at most `num`; memory does not grow with their number.

    `progress(done)` is called after each batch. Under torch.distributed every process gives its own pictures, and
    all get the sums of all, unless this one works `alone`. Raises LimnerError: no pictures, pictures of several sizes.
    """
    found = Collected(seed=seed, keep=keep)
    for pictures, conditions in rebatched(batches, num):
        found.add(pictures, conditions, network, judge)
        if progress is not None:
            progress(found.n)
    found = found if alone else gathered(found)
    if not found.n:
        raise LimnerError("samples: there are no pictures")
    return found


def gathered(found: Collected) -> Collected:
    """The sums over all processes of torch.distributed, in rank order; itself when there is one."""
    first, *others = processes.gathered(found)
    for part in others:
        first.merge(part)
    return first


def rebatched(batches: Iterable[Batch], num: int | None) -> Iterator[Batch]:
    """The same pictures, at most BATCH at a time, at most `num` in all."""
    left = num
    for pictures, conditions in batches:
        for start in range(0, len(pictures), BATCH):
            stop = (
                min(start + BATCH, len(pictures)) if left is None else min(start + BATCH, len(pictures), start + left)
            )
            part = slice(start, stop)
            yield pictures[part], {name: _cut(values, part) for name, values in conditions.items()}
            if left is not None:
                left -= stop - start
                if left == 0:
                    return


def _cut(values: Sequence[Any] | None, part: slice) -> Any:
    return None if values is None else values[part]


def _shape(size: tuple[int, int], channels: int) -> str:
    return f"{size[0]}x{size[1]} with {channels} channel{'s' if channels > 1 else ''}"
