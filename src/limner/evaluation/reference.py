"""What samples are compared with: statistics of real pictures, worked out once per data, network and resizing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from limner.data import cache
from limner.errors import LimnerError
from limner.evaluation.arrays import npz_names, read_npz
from limner.evaluation.collect import Collected, collect
from limner.evaluation.features import FeatureNetwork
from limner.evaluation.metrics import Gaussian
from limner.evaluation.real import RealPictures

KEEP_REFERENCE = 50_000
"""Real pictures used, and whose features are kept (float16), at most: a random part of a larger set."""
VERSION = 1
_ARRAYS, _FACTS = "reference.safetensors", "reference.json"


@dataclass(frozen=True)
class Reference:
    """Statistics of real pictures through one network.

    features: (M, D) float16. rows, labels: (M,), their row and class in the data set (labels None without classes).
    facts: digest, recipe, n, size, channels, class_names, colour_mean, colour_std, score (JSON values).
    """

    pooled: Gaussian
    spatial: Gaussian | None
    features: Tensor
    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | None
    facts: dict[str, Any]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        names = self.facts["class_names"]
        return tuple(names) if names is not None else None


def of_dataset(
    data: RealPictures,
    network: FeatureNetwork,
    *,
    num: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Reference:
    """Statistics of the first `num` training rows (a random order; default: all, at most 50,000), from the cache where
    they are there. Raises LimnerError: no pictures, fewer than two."""
    rows = data.train[: min(num or KEEP_REFERENCE, KEEP_REFERENCE)]
    if len(rows) < 2:
        raise LimnerError(f"reference: {len(rows)} picture is too few; statistics need at least 2")
    recipe = network.recipe(data.size)
    key = json.dumps([VERSION, data.digest, recipe, len(rows)])

    def build(directory: Path) -> None:
        found = collect(data.iterate(rows, 64), network, keep=KEEP_REFERENCE, progress=progress, alone=True)
        save(_finished(found, data, rows, recipe), directory)

    return load(cache.entry("reference", hashlib.blake2b(key.encode(), digest_size=16).hexdigest(), build))


def save(reference: Reference, directory: str | Path) -> None:
    """Write `reference.safetensors` and `reference.json` into a directory that is there."""
    arrays = {"mean": reference.pooled.mean, "covariance": reference.pooled.covariance}
    arrays |= {"features": reference.features, "rows": torch.from_numpy(reference.rows)}
    if reference.spatial is not None:
        arrays |= {"spatial_mean": reference.spatial.mean, "spatial_covariance": reference.spatial.covariance}
    if reference.labels is not None:
        arrays["labels"] = torch.from_numpy(reference.labels)
    save_file({name: value.contiguous() for name, value in arrays.items()}, Path(directory) / _ARRAYS)
    (Path(directory) / _FACTS).write_text(json.dumps(reference.facts, ensure_ascii=False), encoding="utf-8")


def load(directory: str | Path) -> Reference:
    """Read what `save` wrote, given the directory or one of its files. Raises LimnerError when it is not there or not
    that."""
    home = Path(directory)
    home = home.parent if home.name in (_ARRAYS, _FACTS) else home
    try:
        arrays = load_file(home / _ARRAYS)
        facts = json.loads((home / _FACTS).read_text(encoding="utf-8"))
        n, labels = int(facts["n"]), arrays.get("labels")
        spatial = None
        if "spatial_mean" in arrays:
            spatial = Gaussian(arrays["spatial_mean"], arrays["spatial_covariance"], n)
        return Reference(
            pooled=Gaussian(arrays["mean"], arrays["covariance"], n),
            spatial=spatial,
            features=arrays["features"],
            rows=arrays["rows"].numpy(),
            labels=None if labels is None else labels.numpy(),
            facts=facts,
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise LimnerError(f"{directory}: not reference statistics that Limner wrote ({why})") from None


def is_statistics(path: str | Path) -> bool:
    """Whether a path holds statistics that can stand for a reference: what `save` wrote, or an `.npz` of moments."""
    path = Path(path)
    if path.suffix == ".npz" and path.is_file():
        return "mu" in npz_names(path) and "x" not in npz_names(path)
    return path.name in (_ARRAYS, _FACTS) or (path / _ARRAYS).is_file()


def of_statistics(path: str | Path, network: FeatureNetwork, size: tuple[int, int]) -> Reference:
    """Read statistics from a path for which `is_statistics` holds.

    An `.npz` of `mu` and `sigma` (pytorch-fid, guided-diffusion) is of the Inception network and allows a Fréchet
    distance and nothing else. Raises LimnerError when they are of another network, resizing or precision.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return _of_moments(path, network)
    found = load(path)
    if found.facts["recipe"] != network.recipe(size):
        raise LimnerError(f"{path}: made with {found.facts['recipe']}; the samples go through {network.recipe(size)}")
    return found


def _of_moments(path: Path, network: FeatureNetwork) -> Reference:
    mean, covariance = (torch.from_numpy(read_npz(path, name)).double() for name in ("mu", "sigma"))
    if (
        not network.name.startswith("inception")
        or mean.shape != (network.dim,)
        or covariance.shape != (network.dim,) * 2
    ):
        raise LimnerError(
            f"{path}: moments {tuple(mean.shape)} of Inception features; they go with --features inception, whose "
            f"features have 2048 values"
        )
    names = ("recipe", "n", "size", "channels", "class_names", "colour_mean", "colour_std", "score")
    digest = hashlib.blake2b(mean.numpy().tobytes() + covariance.numpy().tobytes(), digest_size=16).hexdigest()
    facts = {"digest": digest, **dict.fromkeys(names)}
    none = np.zeros(0, dtype=np.int64)
    return Reference(Gaussian(mean, covariance, 0), None, torch.zeros(0, network.dim).half(), none, None, facts)


def _finished(found: Collected, data: RealPictures, rows: npt.NDArray[np.int64], recipe: str) -> Reference:
    kept = found.kept.columns()
    names = data.class_names
    facts = {
        "digest": data.digest,
        "recipe": recipe,
        "n": found.n,
        "size": list(found.size),
        "channels": found.channels,
        "class_names": None if names is None else list(names),
        "colour_mean": found.colours.mean,
        "colour_std": found.colours.std,
        "score": found.scores.estimate().value if found.scores.seen else None,
    }
    return Reference(
        pooled=found.pooled.gaussian(),
        spatial=found.spatial.gaussian() if found.spatial.n else None,
        features=torch.from_numpy(kept["pooled"]),
        rows=rows[kept["row"]],
        labels=kept.get("label"),
        facts=facts,
    )
