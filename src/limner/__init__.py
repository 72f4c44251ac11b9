"""Limner trains and samples conditional diffusion models.

import limner
generator = limner.load("runs/emoji")
generator.sample(label="Food & Drink", num=16, guidance=3.0)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from limner.errors import LimnerError

__version__ = "0.1.0"

if TYPE_CHECKING:
    from limner.api import convert as convert
    from limner.api import evaluate as evaluate
    from limner.api import load as load
    from limner.api import reconstruct as reconstruct
    from limner.api import train as train
    from limner.generator import Generator as Generator
    from limner.guide import NoisyClassifier as NoisyClassifier

_HOMES = {
    "convert": "api",
    "evaluate": "api",
    "load": "api",
    "reconstruct": "api",
    "train": "api",
    "Generator": "generator",
    "NoisyClassifier": "guide",
}


def __getattr__(name: str) -> Any:
    """Torch and the rest are imported when they are first used: `limner --help` must not wait for them."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"limner.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'limner' has no attribute '{name}'")


__all__ = [
    "Generator",
    "LimnerError",
    "NoisyClassifier",
    "__version__",
    "convert",
    "evaluate",
    "load",
    "reconstruct",
    "train",
]
