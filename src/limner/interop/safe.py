"""Reading weights that somebody else wrote, without running anything that is in the file.

Safetensors hold no code. PyTorch's files are pickles: they are scanned before they are opened, every name outside an
allow-list is refused, and `torch.load(weights_only=True)` reads the rest. Classes that trainers leave in their files
beside the weights (Lightning's callbacks, OmegaConf's settings, NumPy scalars) are read as an inert stand-in.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from limner.errors import LimnerError

TENSOR_GLOBALS = (
    "collections.OrderedDict",
    "torch.*Storage",
    "torch.storage.*Storage",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.nn.parameter.Parameter",
    "torch.Size",
    "torch.device",
    "_codecs.encode",
)
"""What tensors, dictionaries and optimizer states are made of; torch's own allow-list has them too."""

INERT_GLOBALS = (
    "pytorch_lightning.*",
    "lightning.*",
    "lightning_fabric.*",
    "omegaconf.*",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "argparse.Namespace",
    "collections.defaultdict",
    "typing.Any",
    "builtins.list",
    "builtins.dict",
    "builtins.int",
    "builtins.float",
    "builtins.str",
)
"""What trainers leave beside the weights. Never imported: `Inert` stands for each."""

MAX_HEADER = 100 * 2**20
"""Bytes of a safetensors header; the format's own limit."""


class Inert:
    """Stands for a class that a checkpoint names. Takes anything, keeps nothing, does nothing."""

    def __new__(cls, *_args: Any, **_settings: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_settings: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


@dataclass(frozen=True)
class Content:
    """A checkpoint file: its weights by name, and whatever else stands beside them (step, epoch, ...)."""

    weights: dict[str, Tensor]
    other: Mapping[str, Any] = field(default_factory=dict)


def read(path: Path) -> Content:
    """Read a checkpoint, told by its first bytes and not by its name. Weights are mapped from the file, not copied.

    Raises LimnerError, in one line, for a file that is missing, damaged, of another kind, an optimizer's state, or
    that names anything outside the allow-lists.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise LimnerError(f"{path}: cannot be read ({error.strerror or error})") from None
    if start.startswith(b"PK\x03\x04"):
        return _split(_read_torch(path, _check_zip(path)), path)
    if start[8:9] == b"{":
        return Content(_read_safetensors(path))
    if start.startswith(b"\x80"):
        return _split(_read_torch(path, _check_legacy(path)), path)
    if start.startswith(b"version https://git-lfs"):
        raise LimnerError(f"{path}: a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    raise LimnerError(f"{path}: neither safetensors nor a PyTorch checkpoint (empty, truncated, or something else)")


def warn_of_nan(weights: Mapping[str, Tensor], where: str) -> None:
    """One warning that counts the weights with NaN or infinity and names the first."""
    bad = [name for name, x in weights.items() if x.is_floating_point() and x.numel() and not _is_finite(x)]
    if bad:
        warnings.warn(f"{where}: NaN or infinity in {len(bad)} weights, first '{bad[0]}'; pictures will be wrong",
                      stacklevel=3)  # fmt: skip


def _is_finite(x: Tensor) -> bool:
    """By the smallest and the largest, which are NaN where any is: nothing of the size of x is made."""
    return all(bool(torch.isfinite(end)) for end in x.aminmax())


# --- safetensors --------------------------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        (header,) = struct.unpack("<Q", stream.read(8))
    if header > min(size - 8, MAX_HEADER):
        raise LimnerError(f"{path}: its header should be {header:,} bytes, the file has {size:,}: truncated or damaged")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise LimnerError(f"{path}: truncated or damaged safetensors ({_line(error)})") from None


# --- PyTorch ------------------------------------------------------------------------------------------------------


def _check_zip(path: Path) -> list[str]:
    """What the pickle in a PyTorch archive would import. Refuses archives that PyTorch doesn't write."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any("/code/" in e.filename for e in entries):
                raise LimnerError(f"{path}: a TorchScript program, not a checkpoint; refused, since it holds code")
            packed = next((e for e in entries if e.compress_type != zipfile.ZIP_STORED), None)
            if packed is not None:
                raise LimnerError(f"{path}: '{packed.filename}' is compressed, which PyTorch never does; refused")
            if sum(e.file_size for e in entries) > path.stat().st_size:
                raise LimnerError(f"{path}: its parts add up to more than the file; refused")
            pickles = [e for e in entries if e.filename.split("/")[-1] == "data.pkl"]
            if len(pickles) != 1:
                raise LimnerError(f"{path}: a zip file, but no PyTorch checkpoint (it should hold one data.pkl)")
            with archive.open(pickles[0]) as stream:
                return list(_imports(stream, path))
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, struct.error) as error:
        raise LimnerError(f"{path}: truncated or damaged ({_line(error)})") from None


LEGACY_PICKLES = 5
"""A file from before PyTorch 1.6: magic number, version, system, object, storage keys; then the numbers."""


def _check_legacy(path: Path) -> list[str]:
    with path.open("rb") as stream:
        return [name for _ in range(LEGACY_PICKLES) for name in _imports(stream, path)]


def _imports(stream: Any, path: Path) -> Iterator[str]:
    """Every `module.name` that a pickle refers to, read without running it; refused where it isn't allowed."""
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if isinstance(argument, str):
                strings = [*strings[-1:], argument]
            if opcode.name in ("GLOBAL", "INST"):
                name = str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                name = ".".join(strings)
            else:
                continue
            if not _among(name, TENSOR_GLOBALS) and not _among(name, INERT_GLOBALS):
                raise LimnerError(f"{path}: names '{name}', which no weights need; refused, and nothing of it was run")
            yield name
    except (ValueError, UnicodeDecodeError, IndexError, MemoryError) as error:  # memory: for a length that it claims
        raise LimnerError(f"{path}: truncated or damaged ({_line(error)})") from None


def _among(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _read_torch(path: Path, imports: list[str]) -> Any:
    stand_ins: list[Any] = [(Inert, name) for name in set(imports) if _among(name, INERT_GLOBALS)]
    archive = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError,
            IndexError, AssertionError, OSError, OverflowError, MemoryError, struct.error) as error:  # fmt: skip
        raise LimnerError(f"{path}: truncated or damaged ({_line(error)})") from None


def _split(loaded: Any, path: Path) -> Content:
    """Weights apart from the rest; they are the whole file, or under `state_dict`."""
    if not isinstance(loaded, Mapping):
        raise LimnerError(f"{path}: holds a {type(loaded).__name__}, not weights by name")
    if "param_groups" in loaded and "state" in loaded:
        raise LimnerError(f"{path}: an optimizer's state, not a model; give the model*.pt or ema_*.pt saved beside it")
    nested = loaded.get("state_dict")
    source = nested if isinstance(nested, Mapping) else loaded
    weights = {str(name): x.detach() for name, x in source.items() if isinstance(x, Tensor)}
    if not weights:
        within = [str(name) for name, inner in loaded.items() if isinstance(inner, Mapping) and _has_tensors(inner)]
        said = f"; those under {', '.join(within[:3])} are of a project that isn't read" if within else ""
        raise LimnerError(f"{path}: holds no weights by name{said}")
    for name, x in weights.items():
        if x.layout != torch.strided or x.is_quantized or x.is_meta:
            raise LimnerError(f"{path}: weight '{name}' is sparse, quantised or empty; only plain weights are read")
        if x.numel() * x.element_size() > x.untyped_storage().nbytes():
            raise LimnerError(f"{path}: weight '{name}' claims {x.numel():,} values, more than the file stores")
    return Content(weights, {str(k): v for k, v in loaded.items() if k != "state_dict" and not isinstance(v, Tensor)})


def _has_tensors(inner: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in inner.values())


def _line(error: Exception) -> str:
    """The first sentence of an error, on one line."""
    text = " ".join(str(error).split()).split(". ")[0]
    return text[:160] or type(error).__name__
