"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): W x + B A x, of which B and A alone are trained.

By peft, on the projections of the network's attention. What a run publishes has B A added to W, so that drawing needs
nothing of this.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from limner import build
from limner.errors import LimnerError
from limner.nn.attention import CrossAttention, SelfAttention

BASE, DOWN, UP = ".base_layer.", ".lora_A.default.", ".lora_B.default."


def attach(model: build.Model, rank: int, whole: Collection[str] = ()) -> None:
    """Put adapters of this rank on every projection of attention in the network; all else is frozen but the weights
    `whole`, by name. At first they change nothing. Raises LimnerError without peft, or without attention."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise LimnerError("training.lora: needs peft; pip install 'limner[lora]'") from None
    targets = [name for name in projections(model.network) if f"network.{name}.weight" not in whole]
    if not targets:
        raise LimnerError("training.lora: this network has no attention to adapt; train it whole")
    model.requires_grad_(False)
    with warnings.catch_warnings(action="ignore"):
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), model.network)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in whole or is_adapter(name))


def projections(network: nn.Module) -> list[str]:
    """Names of the linear layers inside attention: Q, K, V and the one behind."""
    return [
        f"{name}.{child}"
        for name, module in network.named_modules()
        if isinstance(module, SelfAttention | CrossAttention)
        for child, layer in module.named_children()
        if isinstance(layer, nn.Linear)
    ]


def is_adapter(name: str) -> bool:
    """Whether a weight is A or B of an adapter."""
    return DOWN in name or UP in name


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights with its adapters added in, by the names of a model without; others stay as they are."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if is_adapter(name):
            continue
        if BASE not in name:
            found[name] = weight
            continue
        stem, _, kind = name.rpartition(BASE)
        adapted = kind == "weight"
        found[f"{stem}.{kind}"] = weight + update(weights, stem).to(weight) if adapted else weight
    return found


def update(weights: Mapping[str, Tensor], stem: str) -> Tensor:
    """B A of one layer."""
    return weights[f"{stem}{UP}weight"].float() @ weights[f"{stem}{DOWN}weight"].float()


def pairs(weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of every adapted layer of the network, by the layer's name in the network."""
    stems = [name.removesuffix(f"{DOWN}weight") for name in weights if name.endswith(f"{DOWN}weight")]
    return {s.removeprefix("network."): (weights[f"{s}{DOWN}weight"], weights[f"{s}{UP}weight"]) for s in stems}
