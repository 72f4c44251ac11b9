"""Folders as diffusers and transformers save them: JSON beside safetensors, read without either of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from limner.errors import LimnerError, suggest
from limner.interop import safe

CONFIG = "config.json"
INDEX = "model_index.json"
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
VARIANTS = ("", ".fp32", ".fp16", ".non_ema")
MAX_JSON = 64 * 2**20
"""Bytes: tokenizers are a few million, and no file of settings is larger than this."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises LimnerError when the file is missing, too large, damaged or something else."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise LimnerError(f"{path}: {path.stat().st_size:,} bytes of settings; at most {MAX_JSON:,} are read")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LimnerError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise LimnerError(f"{path}: not valid JSON ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(raw, dict):
        raise LimnerError(f"{path}: should be an object of names and values, is a {type(raw).__name__}")
    return raw


def read_weights(folder: Path, name: str | None = None) -> dict[str, Tensor]:
    """All weights of a component, of one file or of several that an index names. name: of the file, where it is known.

    Raises LimnerError where there are none, or they are damaged or hostile (see `safe.read`).
    """
    if name is not None:
        return safe.read(folder / name).weights
    for end in (".safetensors", ".bin"):
        for stem in STEMS:
            for variant in VARIANTS:
                for index in (f"{stem}{end}.index{variant}.json", f"{stem}{variant}{end}.index.json"):
                    if (folder / index).is_file():
                        return _sharded(folder / index)
                if (folder / f"{stem}{variant}{end}").is_file():
                    return safe.read(folder / f"{stem}{variant}{end}").weights
    raise LimnerError(f"{folder}: holds no weights (such as {STEMS[0]}.safetensors)")


def _sharded(index: Path) -> dict[str, Tensor]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise LimnerError(f"{index}: weight_map: should say for each weight which file holds it")
    found: dict[str, Tensor] = {}
    for file in dict.fromkeys(names.values()):
        if Path(file).name != file or "\\" in file or not file.endswith((".safetensors", ".bin")):
            raise LimnerError(f"{index}: names '{file}', which is no weights file of this folder; refused")
        for name, weight in safe.read(index.parent / file).weights.items():
            if name in found:
                raise LimnerError(f"{index}: weight '{name}' is in two files")
            found[name] = weight
    missing = next((name for name in names if name not in found), None)
    if missing is not None:
        raise LimnerError(f"{index}: weight '{missing}' isn't in the file that should hold it")
    return found


@dataclass(frozen=True)
class Component:
    """One network or scheduler of a folder: its class, its settings, and where they are from."""

    kind: str
    settings: Mapping[str, Any]
    folder: Path
    file: str = CONFIG
    weights_name: str | None = None

    @staticmethod
    def read(folder: Path, file: str = CONFIG, weights_name: str | None = None) -> Component:
        raw = read_json(folder / file)
        architectures = raw.get("architectures")
        kind = raw.get("_class_name") or (architectures[0] if isinstance(architectures, list) and architectures else "")
        return Component(str(kind), raw, folder, file, weights_name)

    @property
    def where(self) -> str:
        return str(self.folder / self.file)

    def weights(self) -> dict[str, Tensor]:
        return read_weights(self.folder, self.weights_name)

    def complete(self, defaults: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        """All settings of a class, defaults for those left out.

        fixed: settings that Limner has for these values alone. Raises LimnerError for others, and for unknown ones.
        """
        given = {name: value for name, value in self.settings.items() if not name.startswith("_")}
        for name in given:
            if name not in defaults and name not in fixed:
                raise LimnerError(f"{self.where}: {name}: unknown setting{suggest(name, [*defaults, *fixed])}")
        for name, values in fixed.items():
            value = given.get(name, values[0])
            if (tuple(value) if isinstance(value, list) else value) not in values:
                raise LimnerError(f"{self.where}: {name}: {str(value)[:60]} has no counterpart; {_among(values)} has")
        return {**defaults, **{name: value for name, value in given.items() if name in defaults}}


def _among(values: tuple[Any, ...]) -> str:
    return " or ".join(str(value) for value in values)
