"""Measure samples against real pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from limner.evaluation import metrics, neighbours, probe, reference
from limner.evaluation.collect import collect
from limner.evaluation.features import network


def quick(
    samples: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64] | None,
    data: reference.RealPictures,
    n: int | None = None,
    *,
    features: str = "efficientnet-lite0",
    neighbours_of: int = 2_000,
) -> dict[str, float]:
    """The few figures that tuning needs, from arrays: Fréchet distance, score, precision, recall, density, coverage,
    and with labels the class accuracy by a probe.

    samples: uint8 (N, H, W, C). labels: (N,), the class asked for. data: the real pictures, of which the first `n`
    training rows are used (default: all, at most 50,000; their statistics are cached). Precision and its kin look at
    `neighbours_of` pictures of each side.
    """
    net = network(features)
    real = reference.of_dataset(data, net, num=n)
    found = collect([(samples, {} if labels is None else {"label": np.asarray(labels)})], net)
    kept = found.kept.columns()
    report: dict[str, Any] = {
        "n": found.n,
        f"FD-{net.name}": metrics.frechet_distance(found.pooled.gaussian(), real.pooled),
    }
    report[f"IS-{net.name}"] = found.scores.estimate().value
    near = neighbours.neighbourhoods(real.features[:neighbours_of], kept["pooled"][:neighbours_of])
    for name in ("precise", "recalled", "density", "covered"):
        title = {"precise": "precision", "recalled": "recall", "covered": "coverage"}.get(name, name)
        report[title] = float(getattr(near, name).mean())
    if labels is not None and real.labels is not None and real.class_names is not None:
        judge = probe.fit(real.features, real.labels, len(real.class_names))
        report["class_accuracy"] = float((judge.classify(kept["pooled"]) == kept["label"]).mean())
        report["probe_accuracy_on_real"] = judge.accuracy
    return report
