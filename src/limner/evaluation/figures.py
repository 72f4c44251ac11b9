"""From what was collected to figures: each says what it rests on, and what it must not be compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from limner.evaluation import metrics, neighbours, probe
from limner.evaluation.collect import Collected
from limner.evaluation.features import FeatureNetwork
from limner.evaluation.metrics import Estimate
from limner.evaluation.real import RealPictures
from limner.evaluation.reference import Reference
from limner.evaluation.report import Better, Figure, Sheet
from limner.evaluation.retrieval import Retrieved

K, K_DENSITY = 3, 5
"""Neighbours of precision and recall, and of density and coverage, as in the papers."""
NEAREST = 2_000
"""Samples whose nearest training picture is sought, and real ones for comparison."""
CLOSE = 0.01
"""A sample is close to a training picture when it is nearer than all but this share of real pictures are."""


@dataclass
class Subject:
    """Everything that figures are made of. kept: the columns of the samples whose features were kept. retrieved: how
    the samples and recall fared at text-image retrieval, None where no captions were searched for."""

    found: Collected
    real: Reference
    data: RealPictures | None
    network: FeatureNetwork
    judge: FeatureNetwork | None
    kept: dict[str, npt.NDArray[Any]]
    retrieved: tuple[Retrieved, Retrieved | None] | None = None

    @property
    def name(self) -> str:
        return self.network.name

    @property
    def features(self) -> npt.NDArray[np.float16]:
        """Of the kept samples, (M, D)."""
        return self.kept["pooled"]

    @property
    def real_features(self) -> torch.Tensor:
        """As many real ones as quadratic work is done with, (<= keep, D)."""
        return self.real.features[: self.found.keep]


def measure(subject: Subject) -> list[Figure]:
    """All figures that the samples and the reference allow, in the order in which they are read."""
    return [figure for family in FAMILIES for figure in family(subject)]


def warnings_of(subject: Subject) -> list[str]:
    """What a reader of the figures must be told."""
    found, dim, texts = subject.found, subject.network.dim, []
    if found.n < dim:
        texts.append(
            f"{found.n:,} samples are fewer than the {dim:,} dimensions of {subject.name}: the Fréchet distance is "
            f"mostly its bias; compare KID instead"
        )
    if 0 < subject.real.pooled.n < dim:
        texts.append(f"the reference's {subject.real.pooled.n:,} pictures are fewer than {dim:,} feature dimensions")
    if found.n < 2 * K_DENSITY or len(subject.real.features) < 2 * K_DENSITY:
        texts.append(f"fewer than {2 * K_DENSITY} pictures on a side: no precision, recall, density, coverage, KID")
    if "text" in found.columns and subject.data is not None and subject.retrieved is None:
        texts.append("no two of the samples' captions are held-out captions of the reference: no text-image retrieval")
    if found.n > found.keep:
        texts.append(f"neighbours, KID and classes rest on a random {found.keep:,} of the {found.n:,} samples")
    return texts


def sheet(subject: Subject, count: int) -> Sheet:
    """The first kept pictures with what was asked for and the nearest training picture of each."""
    columns = {name: values[:count] for name, values in subject.found.sheet.columns().items()}
    pictures, names = columns["picture"], subject.real.class_names
    captions = [""] * len(pictures)
    if "text" in columns:
        captions = [str(text) for text in columns["text"]]
    elif "label" in columns and names is not None:
        captions = [names[label] for label in columns["label"]]
    if subject.data is None or not len(subject.real.features):
        return Sheet(pictures, captions)
    distances, rows = neighbours.nearest(columns["pooled"], subject.real.features)
    return Sheet(pictures, captions, subject.data.uint8(subject.real.rows[rows]), distances)


# --- families of figures ----------------------------------------------------------------------------------------


def distances(s: Subject) -> Iterator[Figure]:
    """Fréchet distances, the extrapolated one, and the kernel distance."""
    a, b, n = s.found.pooled.gaussian(), s.real.pooled, s.found.n
    against = f"against {b.n:,} real" if b.n else "against given moments"
    yield _figure(_named(s, "FID", "FD"), metrics.frechet_interval(a, b, s.features), n, "lower", against)
    if len(s.features) >= 2 * s.network.dim:
        value = metrics.fd_infinity(s.features, b)
        note = f"extrapolated from {len(s.features) // 2:,} to {len(s.features):,} samples, {against}"
        yield Figure(f"FD-infinity-{s.name}", value, n=len(s.features), better="lower", notes=note)
    if s.real.spatial is not None and s.found.spatial.n:
        value = metrics.frechet_distance(s.found.spatial.gaussian(), s.real.spatial)
        dim = len(s.real.spatial.mean)
        yield Figure(_named(s, "sFID", "sFD"), value, n=n, better="lower", notes=f"{dim:,} spatial features, {against}")
    if _enough(s):
        note = f"against {len(s.real_features):,} real, unbiased, all pairs"
        yield _figure(f"KID-{s.name}", metrics.kid(s.features, s.real_features), len(s.features), "lower", note)


def scores(s: Subject) -> Iterator[Figure]:
    """The Inception-style score."""
    if s.found.scores.seen:
        real = s.real.facts["score"]
        note = f"{s.found.scores.splits} splits" + ("" if real is None else f"; real pictures {real:.4g}")
        yield _figure(_named(s, "IS", "IS"), s.found.scores.estimate(), s.found.n, "higher", note)


def manifolds(s: Subject) -> Iterator[Figure]:
    """Precision, recall, density, coverage."""
    if not _enough(s):
        return
    near = neighbours.neighbourhoods(s.real_features, s.features, k=K, k_density=K_DENSITY)
    n, against = len(s.features), f"{len(s.real_features):,} real"
    of = f"k = {K}, against {against}"
    yield _figure(f"precision-{s.name}", metrics.share(near.precise), n, "higher", of)
    yield _figure(f"recall-{s.name}", metrics.share(near.recalled), n, "higher", of)
    of = f"k = {K_DENSITY}, against {against}"
    yield _figure(f"density-{s.name}", metrics.bootstrap_mean(near.density), n, "higher", of)
    yield _figure(f"coverage-{s.name}", metrics.share(near.covered), n, "higher", of)


def classes(s: Subject) -> Iterator[Figure]:
    """Whether pictures show the class that was asked for: by one's own classifier, and by a probe."""
    asked, names = s.kept.get("label"), s.real.class_names
    if asked is None or names is None:
        return
    if s.judge is not None:
        accuracy = _judge_on_real(s)
        on_real = "" if accuracy is None else f" {accuracy:.2f} on real"
        yield _accuracy(f"class_accuracy-{s.judge.name}", f"{s.judge.name}{on_real}", s.kept["judged"], asked, names)
    labels = s.real.labels
    if labels is not None and len(labels) >= probe.LEAST and len(np.unique(labels)) > 1:
        judge = probe.fit(s.real.features, labels, len(names))
        title = f"probe {judge.accuracy:.2f} on real"
        figure = _accuracy("class_accuracy", title, judge.classify(s.features), asked, names)
        figure.details["probe_accuracy_on_real"] = judge.accuracy
        yield figure


def memory(s: Subject) -> Iterator[Figure]:
    """How near samples lie to training pictures, beside how near training pictures lie to one another."""
    base = s.real.features
    if len(base) < 2:
        return
    near, _ = neighbours.nearest(s.features[:NEAREST], base)
    among = neighbours.nearest_of_rows(base, min(NEAREST, len(base)))
    name, n = s.name, len(near)
    note = f"median, to {len(base):,} training pictures; real ones among themselves {np.median(among):.4g}"
    yield _figure(f"nearest_training-{name}", metrics.bootstrap_median(near), n, "", note)
    limit = float(np.quantile(among, CLOSE))
    note = f"share nearer to a training picture than {1 - CLOSE:.0%} of real ones are to another"
    yield _figure(f"close_to_training-{name}", metrics.share(near < limit), n, "lower", note)


def retrieval(s: Subject) -> Iterator[Figure]:
    """Whether a caption's own real picture is the one most like the sample, and how far recall alone would come."""
    if s.retrieved is None:
        return
    for found, name, who in zip(
        s.retrieved,
        ("retrieval", "retrieval_by_recall"),
        ("its own picture", "from the training picture with the nearest caption: its own"),
        strict=True,
    ):
        if found is None:
            continue
        for first, suffix, place in ((1, "", "first"), (5, "_top5", "in the first five")):
            note = f"{who} {place} among {found.among} real ones; chance {found.chance(first):.3g}"
            note += f", median rank {np.median(found.ranks):.4g}" if first == 1 else ""
            better: Better = "higher" if name == "retrieval" else ""
            yield _figure(f"{name}{suffix}-{s.name}", found.within(first), len(found.ranks), better, note)


def colours(s: Subject) -> Iterator[Figure]:
    """The largest shift of a channel's mean, which tells a colour cast."""
    real, mean = s.real.facts["colour_mean"], s.found.colours.mean
    if real is None:
        return
    value = max(abs(a - b) for a, b in zip(mean, real, strict=True))
    shown = [" ".join(f"{v:.1f}" for v in values) for values in (mean, real)]
    note = f"of 255, largest of the channels; R G B {shown[0]}, real {shown[1]}"
    details = {"mean": mean, "std": s.found.colours.std, "real_mean": real, "real_std": s.real.facts["colour_std"]}
    yield Figure("colour_shift", value, n=s.found.n, better="lower", notes=note, details=details)


FAMILIES: tuple[Callable[[Subject], Iterator[Figure]], ...] = (
    *(distances, scores, manifolds, classes, retrieval, memory, colours),
)


def _named(s: Subject, of_inception: str, otherwise: str) -> str:
    """Inception's figures alone may bear the names that are defined by it."""
    return of_inception if s.name.startswith("inception") else f"{otherwise}-{s.name}"


def _figure(name: str, estimate: Estimate, n: int, better: Better, notes: str) -> Figure:
    low, high = (None if np.isnan(v) else v for v in (estimate.low, estimate.high))
    return Figure(name, estimate.value, low, high, n, better, notes)


def _accuracy(name: str, title: str, said: npt.NDArray[Any], asked: npt.NDArray[Any], names: tuple[str, ...]) -> Figure:
    right = said == asked
    estimate = metrics.share(right)
    by_class = {names[k]: float(right[asked == k].mean()) for k in np.unique(asked)}
    note = f"chance {1 / len(names):.3g}"
    title = f"class_accuracy ({title})"
    return Figure(name, *estimate, len(asked), "higher", note, title, {"by_class": by_class})


def _judge_on_real(s: Subject) -> float | None:
    """The judge's accuracy on real held-out pictures."""
    if s.data is None or s.data.labels is None or s.judge is None:
        return None
    rows = s.data.held_out if len(s.data.held_out) else s.data.train[:NEAREST]
    right = [
        (s.judge(pictures)["logits"].argmax(1).numpy() == np.asarray(conditions["label"])).mean() * len(pictures)
        for pictures, conditions in s.data.iterate(rows, 64)
    ]
    return float(sum(right) / len(rows))


def _enough(s: Subject) -> bool:
    return min(len(s.features), len(s.real_features)) >= 2 * K_DENSITY
