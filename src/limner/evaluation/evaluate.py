"""Measure samples against real pictures: files, arrays or a stream in, a report out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from limner import __version__
from limner.errors import LimnerError
from limner.evaluation import metrics, neighbours, probe
from limner.evaluation import reference as references
from limner.evaluation.collect import KEEP, collect, rebatched
from limner.evaluation.features import FeatureNetwork, network
from limner.evaluation.figures import Subject, measure, sheet, warnings_of
from limner.evaluation.processes import in_turn
from limner.evaluation.real import RealPictures, open_real
from limner.evaluation.report import Report
from limner.evaluation.retrieval import Search
from limner.evaluation.samples import in_classes, open_samples

Progress = Callable[[str, int], None]
"""Told what is being done ("reference", "samples", "figures") and how many pictures are done."""


def evaluate(
    samples: Any,
    reference: Any,
    *,
    features: str | FeatureNetwork = "efficientnet-lite0",
    num: int | None = None,
    settings: Mapping[str, Any] | None = None,
    judge: FeatureNetwork | None = None,
    trained_on: Any = None,
    keep: int = KEEP,
    pictures: int = 24,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Compare samples with real pictures.

    samples: what `open_samples` takes: an `.npz`, folder, `.tar`, array, data set, or an iterable of batches (uint8
    (B, H, W, C), {"label": ..., "text": ...}), of which nothing is kept but `keep` feature vectors and a few pictures.
    reference: what `open_real` takes: a data set, a DataConfig, a path; or statistics kept from an earlier run. Its
    statistics are cached by the digest of data, resizing and network. num: at most that many samples. settings: how the
    samples were made (sampler, steps, guidance, seed), beside what their files say. judge: one's own classifier
    (`features.network("trained:RUN", classifier=...)`). trained_on: the data that the model learned from, where the
    reference is another; then all the reference's captions are searched for, and else those of its held-out rows.
    pictures: shown in the report. seed: of the evaluation's draws.

    Under torch.distributed the processes share the samples of a path, and of anything else every process gives its own;
    all get the same report. Raises LimnerError: no
    pictures or one, several sizes, NaN, classes that the reference has not, a reference of another size.
    """
    net = network(features) if isinstance(features, str) else features
    tell = progress or (lambda stage, done: None)
    opened = open_samples(samples)
    data, real = _reference(reference, net, opened.size, tell)
    batches = rebatched(in_classes(opened.batches, real.class_names), num)
    if isinstance(samples, str | Path):
        batches = in_turn(batches)
    search = None
    if data is not None and data.texts is not None:
        search = Search(data, net, None if trained_on is None else open_real(trained_on, opened.size))
        batches = search.watching(batches)
    found = collect(batches, net, keep=keep, num=num, seed=seed, judge=judge, progress=lambda n: tell("samples", n))
    if found.n < 2:
        raise LimnerError(f"samples: {found.n} picture is too few; a comparison needs at least 2")
    tell("figures", 0)
    subject = Subject(found, real, data, net, judge, found.kept.columns(), None if search is None else search.found())
    about = {
        "samples": {"source": opened.name, "n": found.n, "size": f"{found.size[1]}x{found.size[0]}"},
        "settings": {**opened.settings, **(settings or {})},
        "features": net.recipe(found.size),
        "reference": {"source": _name(reference), "digest": real.facts["digest"], "n": real.pooled.n or None},
        "evaluation": {"seed": seed, "kept": len(subject.features), "limner": __version__},
    }
    measured = {figure.name: figure for figure in measure(subject)}
    return Report(measured, about, tuple(warnings_of(subject)), sheet(subject, pictures))


def quick(
    samples: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64] | None,
    data: RealPictures,
    n: int | None = None,
    *,
    features: str = "efficientnet-lite0",
    neighbours_of: int = 2_000,
) -> dict[str, float]:
    """The few figures that tuning needs, from arrays: Fréchet distance, score, precision, recall, density, coverage,
    and with labels the class accuracy by a probe, and precision and recall within the class that was asked for, by
    the scores of a probe that was fitted to the other half of the real pictures.

    samples: uint8 (N, H, W, C). labels: (N,), the class asked for. data: the real pictures, of which the first `n`
    training rows are used (default: all, at most 50,000; their statistics are cached). Precision and its kin look at
    `neighbours_of` pictures of each side.
    """
    net = network(features)
    real = references.of_dataset(data, net, num=n)
    found = collect([(samples, {} if labels is None else {"label": np.asarray(labels)})], net)
    kept = found.kept.columns()
    distance = metrics.frechet_distance(found.pooled.gaussian(), real.pooled)
    report: dict[str, Any] = {"n": found.n, f"FD-{net.name}": distance}
    report[f"IS-{net.name}"] = found.scores.estimate().value
    near = neighbours.neighbourhoods(real.features[:neighbours_of], kept["pooled"][:neighbours_of])
    report |= {"precision": float(near.precise.mean()), "recall": float(near.recalled.mean())}
    report |= {"density": float(near.density.mean()), "coverage": float(near.covered.mean())}
    if labels is not None and real.labels is not None and real.class_names is not None:
        judge = probe.fit(real.features, real.labels, len(real.class_names))
        report["class_accuracy"] = float((judge.classify(kept["pooled"]) == kept["label"]).mean())
        report["probe_accuracy_on_real"] = judge.accuracy
        report |= _within_classes(real, kept["pooled"], kept["label"])
    return report


def _within_classes(
    real: references.Reference, features: metrics.Array, asked: npt.NDArray[np.int64]
) -> dict[str, float]:
    """Precision and recall by class, of scores: features made for other pictures hardly tell one's own classes apart.
    The probe is fitted to one half of the real pictures, and the samples are compared with the other."""
    assert real.labels is not None
    assert real.class_names is not None
    half, rest = np.array_split(np.random.default_rng(0).permutation(len(real.features)), 2)
    if len(half) < probe.LEAST or len(np.unique(real.labels[half])) < 2:
        return {}
    judge = probe.fit(real.features[half], real.labels[half], len(real.class_names))
    precise, recalled = neighbours.within_classes(
        judge.scores(real.features[rest]), real.labels[rest], judge.scores(features), asked
    )
    return {"class_precision": float(precise.mean()), "class_recall": float(recalled.mean())}


def _reference(
    reference: Any, net: FeatureNetwork, size: tuple[int, int], tell: Progress
) -> tuple[RealPictures | None, references.Reference]:
    if isinstance(reference, str | Path) and references.is_statistics(reference):
        return None, references.of_statistics(reference, net, size)
    data = open_real(reference, size)
    return data, references.of_dataset(data, net, progress=lambda n: tell("reference", n))


def _name(reference: Any) -> str:
    source = getattr(reference, "source", reference)
    return str(source) if isinstance(source, str | Path) else type(reference).__name__
