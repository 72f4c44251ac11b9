"""Tell whose checkpoint a file or folder is, and read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limner.errors import LimnerError
from limner.interop import adm, adm_shapes, compvis, hf, safe
from limner.interop.imported import Imported

OTHERS = (
    ("network.", "the weights of a Limner run; give the run's directory"),
    ("module.", "a model wrapped for several processes; save `model.module.state_dict()` instead"),
)
"""What weights starting with these names are, where they aren't what can be read."""


HF_NAMES = ("down_blocks.", "encoder.down_blocks.")
"""What weights of diffusers' U-Nets and autoencoders start with."""


def read(path: str | Path, *, flags: Mapping[str, Any] | str | Path | None = None,
         config: str | Path | None = None) -> Imported:  # fmt: skip
    """Read a checkpoint of another project; nothing in it is ever run.

    path: guided-diffusion's `.pt`, CompVis' `.ckpt` or safetensors, or a folder of diffusers, or a safetensors file in
    one. flags: of guided-diffusion, see `adm_flags.parse`; the published models need none. config: the YAML of CompVis.
    Raises LimnerError, in one line, for a file that is damaged, hostile, of another kind, or that needs flags or a
    config.
    """
    path = Path(path)
    if path.is_dir():
        if not hf.is_folder(path):
            raise LimnerError(f"{path}: neither a run (config.yaml) nor a folder of diffusers; give the checkpoint in "
                              "it (.pt, .ckpt or .safetensors)")  # fmt: skip
        _needs_neither(path, flags, config)
        return hf.read(path)
    content = safe.read(path)
    if any(name.startswith(HF_NAMES) for name in content.weights):
        _needs_neither(path, flags, config)
        return hf.read(path)
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


def _needs_neither(path: Path, flags: Any, config: Any) -> None:
    if flags is not None or config is not None:
        raise LimnerError(f"{path}: diffusers', which needs neither --flags nor --config")
