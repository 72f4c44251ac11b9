"""Inpainting by text as others have it: to x_t are concatenated the mask, 0 and 1 of the nearest pixels, and the latent
of the picture, grey in the hole. Ours come in the other order, so the first layer's weights are reordered."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from limner.build import space_shape
from limner.config import MaskCondition, RunConfig
from limner.interop.keymap import Change, Rule, per_weight

SEEN: dict[str, Any] = {"hole": "grey", "signed": False, "cells": "first"}
"""How the network sees a picture with a hole."""
SECTION: dict[str, Any] = {"kind": "mask", "dropout": 0.0, "null": False, **SEEN}
"""The condition in a recipe."""


def mask_last(latent: int) -> Change:
    """First layers of inputs (x, mask, picture) to those of (x, picture, mask). latent: channels of x."""

    def moved(weight: Tensor, source: int, target: int) -> Tensor:
        if weight.ndim != 4:
            return weight
        order = [k for k in range(2 * latent + 1) if k != source]
        order.insert(target, source)
        return weight[:, order] if weight.shape[1] == len(order) else weight

    return per_weight(lambda x: moved(x, latent, 2 * latent), lambda x: moved(x, 2 * latent, latent))


def order(config: RunConfig) -> Change | None:
    """The same for the U-Net of a recipe, None where it isn't told of a hole."""
    if not any(isinstance(section, MaskCondition) for section in config.conditions):
        return None
    return mask_last(space_shape(config)[0])


def with_stem(rules: Iterable[Rule], change: Change | None) -> list[Rule]:
    """A table in which `change` is made to the weights of the network's first layer."""
    return [replace(one, change=change) if one.targets == ("stem.{p}",) else one for one in rules]


def scaled(latent: int, gain: float) -> Change:
    """First layers of inputs (x, picture, mask), whose picture is multiplied by `gain`, to those where it isn't."""
    each = torch.ones(2 * latent + 1, 1, 1)
    each[latent : 2 * latent] = gain
    return per_weight(lambda x: x * each.to(x) if x.ndim == 4 else x, lambda x: x / each.to(x) if x.ndim == 4 else x)
