"""All of it in one run, and what follows from it."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from limner.bench import machine, own, peer
from limner.bench.rounds import alternate, fastest, ratio
from limner.hardware import best_device

Tell = Callable[[str], None]
Rates = Mapping[str, list[float]]
TRAIN_BATCH, SAMPLE_BATCH, GUIDED_BATCH = 64, 64, 16
BACKWARD = 3
"""A training step costs about three forward passes: one forward, two backward."""


def measure(*, rounds: int = 5, seconds: float = 2.0, tell: Tell | None = None) -> dict[str, Any]:
    """Machine, training, sampling, a guided picture, autoencoder, loading.

    rounds: in each of which every contender is measured once, for about `seconds`. Returns figures by name; `raw` has
    each round's. Ratios are Limner over the faster of diffusers' variants, None where diffusers isn't installed:
    `train_ratio` and `sample_ratio` by the same network, `guided_ratio` by whole pictures. `peak_fraction`: of the
    machine's best product of matrices in bf16 (or fp32 where that is faster), reached in training. `sample_int8_ratio`,
    `guided_int8_ratio`, `int8_error`: of Limner's network in 8 bits, None where the device has none.
    """
    device = best_device()
    raw: dict[str, Rates] = {"machine": alternate(machine.contenders(device), rounds, seconds, tell)}
    figures: dict[str, Any] = {"machine": machine.description(device)}
    best = _median(raw["machine"])
    products = {kind: best[f"matmul {kind}"] * machine.MATMUL_OPERATIONS / 1e9 for kind in ("fp32", "bf16")}
    figures |= {f"matmul_{kind}_gflops": rate for kind, rate in products.items()}
    figures["copy_gb_per_s"] = best["copy"] * 2 * machine.COPIED / 1e9
    ratios = ("train_ratio", "sample_ratio", "sample_int8_ratio", "guided_ratio", "guided_int8_ratio")
    figures |= dict.fromkeys((*ratios, "int8_error", "peak_fraction"))
    if peer.installed():
        figures |= _side_by_side(device, raw, rounds, seconds, max(products.values()), tell)
    raw["autoencoder"] = _pictures(
        alternate(own.autoencoder(device, SAMPLE_BATCH), rounds, seconds, tell), SAMPLE_BATCH
    )
    with own.loading(TRAIN_BATCH) as contenders:
        raw["loading"] = _pictures(alternate(contenders, rounds, seconds, tell), TRAIN_BATCH)
    figures |= {f"{name}_images_per_s": rate for name, rate in _median(raw["autoencoder"]).items()}
    figures["loading_images_per_s"] = _median(raw["loading"])["limner"]
    return {**figures, "raw": raw}


def _side_by_side(device: torch.device, raw: dict[str, Rates], rounds: int, seconds: float, peak_gflops: float,
                  tell: Tell | None) -> dict[str, Any]:  # fmt: skip
    pair = peer.pair(device)
    with peer.steps(pair, TRAIN_BATCH) as contenders:
        raw["training"] = _pictures(alternate(contenders, rounds, seconds, tell), TRAIN_BATCH)
    raw["sampling"] = alternate(peer.calls(pair, SAMPLE_BATCH), rounds, seconds, tell)
    raw["guided"] = _pictures(alternate(peer.guided(pair, GUIDED_BATCH), rounds, seconds, tell), GUIDED_BATCH)
    found: dict[str, Any] = {"parameters": pair.parameters, "flops": pair.flops(), "difference": pair.difference(),
                             "int8_error": pair.int8_error()}  # fmt: skip
    for name, stage in (("train", "training"), ("sample", "sampling"), ("guided", "guided")):
        rival = fastest(raw[stage], "diffusers")
        found |= {f"{name}_ratio": ratio(raw[stage]["limner"], raw[stage][rival]), f"{name}_rival": rival}
        if name != "train":
            near = raw[stage].get(peer.INT8)
            found[f"{name}_int8_ratio"] = None if near is None else ratio(near, raw[stage][rival])
    rate = _median(raw["training"])["limner"]
    found["train_images_per_s"] = rate
    found["sample_calls_per_s"] = _median(raw["sampling"])["limner"]
    found["guided_images_per_s"] = _median(raw["guided"])["limner"]
    found["peak_fraction"] = BACKWARD * found["flops"] * rate / 1e9 / peak_gflops
    if device.type == "cpu":
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
            found["memory_bytes"] = {
                which: fresh.apply(peer.memory_growth, (which, TRAIN_BATCH)) for which in raw["training"]
            }
    return found


def _pictures(rates: Rates, batch: int) -> dict[str, list[float]]:
    return {name: [batch * each for each in values] for name, values in rates.items()}


def _median(rates: Rates) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in rates.items()}
