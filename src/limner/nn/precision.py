"""Whether networks compute in bf16: where the hardware multiplies in it, unless float32 is the faster way.

On a CPU that can be: the loops in C are for float32, and autocast has to round weights and activations first. So it is
measured, once on each kind of processor, and kept: runs there compute alike ever after.
"""

from __future__ import annotations

import contextlib
import time
from functools import lru_cache
from typing import Literal

import torch
from torch import nn

from limner import native
from limner.hardware import multiplies_bf16
from limner.nn import winograd
from limner.nn.norm import GroupNorm

Precision = Literal["auto", "bf16", "fp32"]
CHANNELS, SIDE, PICTURES = 64, 16, 16
ROUNDS = 7


def uses_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether networks run under bf16 autocast; `auto` says yes where that is the faster way."""
    if precision != "auto":
        return precision == "bf16"
    if not multiplies_bf16(device):
        return False
    return device.type != "cpu" or bf16_is_faster()


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bf16 autocast as `uses_bf16` decides, else nothing."""
    if not uses_bf16(precision, device):
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


@lru_cache
def bf16_is_faster() -> bool:
    """On this CPU, which multiplies in it."""
    if not winograd.available():
        return True
    return native.remembered(f"bf16-torch-{torch.__version__}", winograd.SOURCE, measured_bf16_is_faster)


def measured_bf16_is_faster() -> bool:
    """By the quickest of several steps of training a norm and a convolution, in turns; leaves PyTorch's state alone."""
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        network = nn.ModuleList([GroupNorm(CHANNELS), winograd.Conv3x3(CHANNELS, CHANNELS)])
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        x = torch.randn(PICTURES, CHANNELS, SIDE, SIDE).to(memory_format=torch.channels_last).requires_grad_()
        seconds = {True: float("inf"), False: float("inf")}
        for _ in range(ROUNDS):
            for bf16 in seconds:
                began = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    y = network[1](network[0](x, silu=True))
                y.float().square().mean().backward()
                seconds[bf16] = min(seconds[bf16], time.perf_counter() - began)
    return seconds[True] < seconds[False]
