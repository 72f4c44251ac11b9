"""Pictures as arrays, in memory and in `.npz` files: read without pickles, checked, in batches."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from limner.errors import LimnerError
from limner.evaluation.collect import Batch

READ = 256
"""Pictures read at a time."""
_OVERSHOOT = 1.5
_ALIASES = {"x": ("x", "arr_0"), "y": ("y", "arr_1")}
"""Names inside an `.npz`: Limner's, and guided-diffusion's."""


def as_uint8(pictures: Any, where: str, first: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 (N, H, W, C) from that, or from float (N, C, H, W) in [-1, 1] (a slight overshoot is clipped).

    `first` is the number of the first picture, for messages. Raises LimnerError for NaN, another range, type, shape.
    """
    array = pictures.detach().cpu().float().numpy() if _is_float_tensor(pictures) else np.asarray(pictures)
    if array.ndim == 4 and array.dtype == np.uint8 and array.shape[3] in (1, 3, 4):
        return array
    if array.ndim != 4 or array.dtype.kind != "f" or array.shape[1] not in (1, 3, 4):
        raise LimnerError(
            f"{where}: {array.dtype} {array.shape}, should be uint8 (number, height, width, channels) or float "
            f"(number, channels, height, width) in [-1, 1]"
        )
    finite = np.isfinite(array).all(axis=(1, 2, 3))
    if not finite.all():
        raise LimnerError(f"{where}: picture {first + int(np.argmin(finite))} holds NaN or infinity")
    if array.size and np.abs(array).max() > _OVERSHOOT:
        low, high = array.min(), array.max()
        raise LimnerError(f"{where}: float pictures from {low:.4g} to {high:.4g}, should be within -1 to 1, or uint8")
    levels = np.rint((array.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(0, 2, 3, 1))


def _is_float_tensor(pictures: Any) -> bool:
    return isinstance(pictures, Tensor) and pictures.is_floating_point()


def npz_batches(path: Path) -> Iterator[Batch]:
    """Pictures and conditions of an `.npz`, READ at a time, so that memory doesn't grow with the file.

    `x` uint8 (N, H, W, C), and where they are there `y` (N,) labels and `text` (N,) captions. Raises LimnerError: no
    such file, no `x`, a pickle, another shape or type.
    """
    arrays = npz_names(path)
    x = npz_member(path, arrays, "x")
    conditions: dict[str, Any] = {}
    for name, of in (("y", "label"), ("text", "text")):
        if any(alias in arrays for alias in _ALIASES.get(name, (name,))):
            conditions[of] = read_npz(path, npz_member(path, arrays, name))
    return _streamed(path, x, conditions)


def npz_names(path: Path) -> list[str]:
    """Names of the arrays in an `.npz`. Raises LimnerError when it is missing or no such archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except FileNotFoundError:
        raise LimnerError(f"{path}: no such file") from None
    except (OSError, zipfile.BadZipFile):
        raise LimnerError(f"{path}: is no .npz archive, or a damaged one") from None


def npz_member(path: Path, names: list[str], name: str) -> str:
    """The array called `name`, or as guided-diffusion calls it. Raises LimnerError when there is none."""
    for alias in _ALIASES.get(name, (name,)):
        if alias in names:
            return alias
    have = ", ".join(names) or "nothing"
    raise LimnerError(f"{path}: has no array '{name}' but {have}; x should be the pictures, uint8 (N, H, W, C)")


def read_npz(path: Path, name: str) -> npt.NDArray[Any]:
    """A whole array of an `.npz`; pickled objects are refused. Raises LimnerError when it cannot be read."""
    return _safely(path, name, lambda member: np.lib.format.read_array(member, allow_pickle=False))


def _streamed(path: Path, name: str, conditions: Mapping[str, npt.NDArray[Any]]) -> Iterator[Batch]:
    shape, dtype = _safely(path, name, _header)
    for of, values in conditions.items():
        if len(values) != shape[0]:
            raise LimnerError(f"{path}: {len(values)} values of {of} for {shape[0]} pictures")
    if len(shape) != 4 or dtype != np.uint8:
        whole = as_uint8(read_npz(path, name), f"{path}: {name}")
        yield whole, conditions
        return
    size = int(np.prod(shape[1:]))
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        _header(member)
        for start in range(0, shape[0], READ):
            count = min(READ, shape[0] - start)
            data = _safe_read(path, member, count * size)
            rows = slice(start, start + count)
            batch = np.frombuffer(bytearray(data), np.uint8).reshape(count, *shape[1:])
            yield as_uint8(batch, f"{path}: {name}"), {of: values[rows] for of, values in conditions.items()}


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded when allow_pickle=False")
    if fortran and len(shape) > 1:
        raise ValueError("arrays in Fortran order are not read; save np.ascontiguousarray(x)")
    return shape, dtype


def _safely(path: Path, name: str, read: Callable[[IO[bytes]], Any]) -> Any:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
            return read(member)
    except (OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise LimnerError(f"{path}: array '{name}' cannot be read ({' '.join(str(error).split())})") from None
    except ValueError as error:
        if "pickle" in str(error):
            raise LimnerError(f"{path}: array '{name}' holds pickled objects, which are never loaded") from None
        raise LimnerError(f"{path}: array '{name}' cannot be read ({' '.join(str(error).split())})") from None


def _safe_read(path: Path, member: IO[bytes], count: int) -> bytes:
    try:
        data = member.read(count)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error):
        data = b""
    if len(data) < count:
        raise LimnerError(f"{path}: is cut short or damaged")
    return data
