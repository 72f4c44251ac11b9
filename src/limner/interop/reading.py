"""Tell whose checkpoint a file or folder is, and read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limner.errors import LimnerError
from limner.interop import adm, adm_shapes, compvis, safe
from limner.interop.imported import Imported

OTHERS = (
    ("network.", "the weights of a Limner run; give the run's directory"),
    ("down_blocks.", "a U-Net out of a diffusers folder; give the folder that holds model_index.json"),
    ("encoder.down_blocks.", "an autoencoder out of a diffusers folder; give the folder that holds model_index.json"),
    ("module.", "a model wrapped for several processes; save `model.module.state_dict()` instead"),
)
"""What weights starting with these names are, where they aren't what can be read."""


def read(path: str | Path, *, flags: Mapping[str, Any] | str | Path | None = None,
         config: str | Path | None = None) -> Imported:  # fmt: skip
    """Read a checkpoint of another project; nothing in it is ever run.

    path: guided-diffusion's `.pt`, or CompVis' `.ckpt` or safetensors. flags: of guided-diffusion, see
    `adm_flags.parse`; the published models need none. config: the YAML of CompVis. Raises LimnerError, in one line,
    for a file that is damaged, hostile, of another kind, or that needs flags or a config.
    """
    path = Path(path)
    if path.is_dir():
        raise LimnerError(f"{path}: a folder; give the checkpoint in it (.pt, .ckpt or .safetensors)")
    content = safe.read(path)
    if adm_shapes.is_adm(content.weights):
        if config is not None:
            raise LimnerError(f"{path}: a guided-diffusion checkpoint has flags, not a config; give --flags")
        return adm.read(content.weights, path, flags)
    if compvis.is_compvis(content.weights):
        if flags is not None:
            raise LimnerError(f"{path}: a CompVis checkpoint has a config, not flags; give --config")
        return compvis.read(content, path, config)
    first = next(iter(content.weights))
    for start, what in OTHERS:
        if any(name.startswith(start) for name in content.weights):
            raise LimnerError(f"{path}: {what}")
    raise LimnerError(
        f"{path}: weights of an unknown kind, such as '{first}'; guided-diffusion's and CompVis' are read"
    )
