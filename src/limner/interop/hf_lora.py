"""Low-rank adapters in the form that diffusers loads, by the tables of `hf_keys`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from limner import config as c
from limner.errors import LimnerError
from limner.interop import hf_keys, hf_settings
from limner.interop.keymap import convert, reverse

FILE = "pytorch_lora_weights.safetensors"
"""What diffusers looks for in a folder."""
LOADS = "UNet2DConditionModel"
"""The one U-Net of diffusers that loads adapters."""


def weights(config: c.RunConfig, pairs: Mapping[str, tuple[Tensor, Tensor]], where: str) -> dict[str, Tensor]:
    """Adapters (A, B) by the layer's name in `nn.unet.UNet` become `unet.*.lora_A.weight` and `.lora_B.weight`.

    Where Q, K and V are one layer here and several there, B is split among them, and each has the same A. Raises
    LimnerError where diffusers has no such network, or loads no adapters into it.
    """
    kind, _ = hf_settings.unet(config)
    if kind != LOADS:
        raise LimnerError(f"diffusers loads no adapters into {kind}")
    assert isinstance(config.model, c.UNetConfig)
    rules = reverse(hf_keys.unet(config.model, old=False))
    found: dict[str, Tensor] = {}
    for name, (down, up) in pairs.items():
        for target, part in convert({f"{name}.weight": up}, rules, None, where=where).items():
            stem = f"unet.{target.removesuffix('.weight')}"
            found |= {f"{stem}.lora_A.weight": down.clone(), f"{stem}.lora_B.weight": part.contiguous()}
    return found
