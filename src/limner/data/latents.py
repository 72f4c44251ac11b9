"""Pictures as latents: each encoded once, then read from memory-mapped safetensors.

A cache is a directory `latents/<key>` of shards. The key names the encoder's weights and the pictures, so a cache of
another autoencoder is never mistaken for this one. Kept are mean and, for a KL autoencoder, standard deviation, of the
picture and, where the recipe flips, of its mirror image, so that training still draws a fresh latent each time.

dataset = with_latents(prepare(config), autoencoder)
batch = dataset.batch(dataset.train[:16], np.random.default_rng(0))     # latent, label
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.numpy import save_file

from limner.data.dataset import Dataset, Rows
from limner.data.pixels import Progress
from limner.data.sources import Problem
from limner.data.stream import StreamDataset, refuse_many
from limner.errors import LimnerError
from limner.native import cache_root
from limner.nn.autoencoder import Autoencoder

SHARD_BYTES = 1 << 26
BATCH = 32
_VERSION = 1
_KIND = "limner latents"

Arrays = dict[str, npt.NDArray[np.float16]]


@dataclass(frozen=True, kw_only=True)
class LatentDataset(Dataset):
    """A data set whose batches hold `latent` where `Dataset`'s hold `image`. `shift` and `scale` (c, 1, 1) bring
    latents to zero mean and unit variance; `uint8` still gives the pictures."""

    shards: tuple[Arrays, ...]
    rows_per_shard: int
    shift: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]

    def batch(self, rows: Rows, generator: np.random.Generator | None = None) -> dict[str, Any]:
        """`latent` float32 (B, c, h, w), normalised, `row` int64 (B,), `mirror` bool (B,), and a value by condition.

        With a generator a latent of each row's distribution is drawn, mirrored where the recipe and the conditions
        allow; without, it is the mean of the picture as it is.
        """
        chosen = np.asarray(rows, dtype=np.int64)
        view = self._view(chosen, generator)
        mirrored = np.zeros(len(chosen), dtype=bool) if view.mirror is None else view.mirror
        latent = self._take("mean", chosen, mirrored)
        if generator is not None and "std" in self.shards[0]:
            latent += self._take("std", chosen, mirrored) * _noise(generator.random(len(chosen)), latent.shape[1:])
        latent = (latent - self.shift) / self.scale
        return {"latent": torch.from_numpy(latent), **view.told(chosen)} | {
            name: c.take(chosen, view) for name, c in self.conditions.items()
        }

    def _take(self, name: str, rows: npt.NDArray[np.int64], mirrored: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
        taken = np.empty((len(rows), *self.shards[0][name].shape[1:]), dtype=np.float32)
        for place, (row, mirror) in enumerate(zip(rows.tolist(), mirrored.tolist(), strict=True)):
            shard = self.shards[row // self.rows_per_shard]
            taken[place] = shard[f"mirrored_{name}" if mirror else name][row % self.rows_per_shard]
        return taken


def with_latents(dataset: Dataset, autoencoder: Autoencoder, *, directory: Path | None = None,
                 progress: Progress | None = None) -> LatentDataset:  # fmt: skip
    """The same data set in the latents of `autoencoder`, encoding what isn't cached yet.

    Any number of processes share the work, whoever started them: each takes shards that none has in hand, and what was
    stopped goes on at the shard where it was. Corrupt rows of a stream are left out, and added to its `corrupt`.
    directory: a cache of one's own instead of the one that the key names. `progress(done, rows)`.
    Raises LimnerError: `directory` holds the latents of another autoencoder or of other pictures; f doesn't divide
    the pictures; random crops (a latent has one crop); latents that aren't finite; more than one corrupt row in a
    hundred; a full disk.
    """
    if dataset.pixels.has_margins:
        raise LimnerError("data.crop: random crops can't be cached as latents; it should be center")
    key = cache_key(dataset, autoencoder)
    home = directory or cache_root() / "latents" / key
    height, width = (side // autoencoder.factor for side in dataset.size)
    kinds = (1 if autoencoder.quantizer else 2) * (2 if dataset.flip else 1)
    rows_per_shard = max(1, SHARD_BYTES // (2 * kinds * autoencoder.latent_channels * height * width))
    spans = [range(i, min(i + rows_per_shard, len(dataset))) for i in range(0, len(dataset), rows_per_shard)]
    try:
        home.mkdir(parents=True, exist_ok=True)
        taken = []
        for index in _in_turn(len(spans)):
            try:
                with FileLock(home / f"{index:05d}.lock", timeout=0):
                    _fill(home, index, key, dataset, autoencoder, spans[index], progress)
            except Timeout:  # another process has it in hand, and may yet be lost
                taken.append(index)
        for index in taken:
            with FileLock(home / f"{index:05d}.lock"):
                _fill(home, index, key, dataset, autoencoder, spans[index], progress)
    except (OSError, SafetensorError) as error:
        words = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise LimnerError(
            f"{home}: the latents cannot be written ({words}); set LIMNER_CACHE to another folder"
        ) from None
    shards = [_arrays(home / f"{index:05d}.safetensors") for index in range(len(spans))]
    if isinstance(dataset, StreamDataset):
        dataset = _known(dataset, [metadata for metadata, _ in shards])
    return LatentDataset(
        **{field.name: getattr(dataset, field.name) for field in fields(Dataset)},
        shards=tuple(arrays for _, arrays in shards),
        rows_per_shard=rows_per_shard,
        shift=autoencoder.latent_mean.float().cpu().numpy()[:, None, None],
        scale=autoencoder.latent_std.float().cpu().numpy()[:, None, None],
    )


def cache_key(dataset: Dataset, autoencoder: Autoencoder) -> str:
    """Names what the latents depend on: the pixels, whether they are flipped, the encoder's structure and weights; of a
    stream also what lies on the pixels, since a row is left out for it."""
    overlays = [pixels.digest for pixels in dataset.overlays] if isinstance(dataset, StreamDataset) else []
    about = " ".join([str(_VERSION), dataset.pixels.digest, *overlays, str(dataset.flip)])
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    normalised = autoencoder.quantizer is not None and autoencoder.quantizer.normalised
    digest.update(f"{autoencoder.factor} {normalised} {autoencoder.encoder} {autoencoder.quant_conv}".encode())
    for part in (autoencoder.encoder, autoencoder.quant_conv):
        for name, tensor in part.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _noise(uniform: npt.NDArray[np.float64], shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Standard normal noise (B, *shape), each row's from its own number in [0, 1): it doesn't depend on the batch."""
    seeds = (uniform * 2**53).astype(np.int64).tolist()
    return np.stack([np.random.Generator(np.random.Philox(seed)).standard_normal(shape, np.float32) for seed in seeds])


def _in_turn(count: int) -> Iterator[int]:
    """Every shard's number: first the share of this process of a torchrun, then all others, which by then are mostly
    there."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    yield from range(rank, count, processes)
    yield from (index for index in range(count) if index % processes != rank)


def _fill(home: Path, index: int, key: str, dataset: Dataset, autoencoder: Autoencoder, span: range,
          progress: Progress | None) -> None:  # fmt: skip
    """Encode the rows of a shard, unless it is whole. Its lock is held, so that what lies beside it has no owner."""
    path = home / f"{index:05d}.safetensors"
    if is_whole(path, key, span):
        return
    for left in home.glob(f".{path.name}-*"):
        left.unlink(missing_ok=True)
    corrupt: dict[int, Problem] = {}
    arrays = _encode(dataset, autoencoder, span, corrupt, progress)
    listed = json.dumps({row: problem.what for row, problem in corrupt.items()})
    _write(path, {"kind": _KIND, "key": key} | ({"corrupt": listed} if corrupt else {}), arrays)


def _known(dataset: StreamDataset, shards: Sequence[dict[str, str]]) -> StreamDataset:
    """The data set without the rows that whoever encoded them found corrupt, by the shards' metadata."""
    source = dataset.pixels.source
    for metadata in shards:
        for row, what in _corrupt(metadata).items():
            dataset.corrupt.setdefault(row, Problem(source.picture_place(row), what))
    for problem in list(dataset.corrupt.values())[-1:]:
        refuse_many(len(dataset.corrupt), len(dataset), problem)
    train = dataset.train[~np.isin(dataset.train, list(dataset.corrupt))]
    return replace(dataset, train=train)


def _pictures(dataset: Dataset, rows: npt.NDArray[np.int64], corrupt: dict[int, Problem]) -> npt.NDArray[np.uint8]:
    """uint8 (B, H, W, C); those of corrupt rows are black, and told in `corrupt`."""
    if not isinstance(dataset, StreamDataset):
        return dataset.uint8(rows)
    found = dataset.looked(rows)
    corrupt |= found
    for row, problem in found.items():
        dataset.corrupt.setdefault(row, problem)
        refuse_many(len(dataset.corrupt), len(dataset), problem)
    sound = ~np.isin(rows, list(found))
    pictures = np.zeros((len(rows), *dataset.size, dataset.channels), dtype=np.uint8)
    pictures[sound] = dataset.uint8(rows[sound])
    return pictures


@torch.no_grad()
def _encode(dataset: Dataset, autoencoder: Autoencoder, span: range, corrupt: dict[int, Problem],
            progress: Progress | None) -> Arrays:  # fmt: skip
    autoencoder.eval()
    pieces: dict[str, list[npt.NDArray[np.float16]]] = {}
    for start in range(span.start, span.stop, BATCH):
        rows = np.arange(start, min(start + BATCH, span.stop))
        pixels = torch.from_numpy(_pictures(dataset, rows, corrupt)).permute(0, 3, 1, 2)
        for prefix, seen in (("", pixels), ("mirrored_", pixels.flip(3)))[: 1 + dataset.flip]:
            posterior = autoencoder.encode(seen.to(autoencoder.latent_mean.device).float() / 127.5 - 1)
            parts = {"mean": posterior.mean} | ({} if posterior.log_variance is None else {"std": posterior.std})
            for name, values in parts.items():
                half = values.half()
                if not half.isfinite().all():
                    raise LimnerError(f"the autoencoder: its latents of rows {rows[0]} to {rows[-1]} are not finite; "
                                      "train it anew or take an earlier checkpoint")  # fmt: skip
                pieces.setdefault(prefix + name, []).append(half.cpu().numpy())
        if progress is not None:
            progress(int(rows[-1]) + 1, len(dataset))
    # safetensors writes memory as it lies, and convolutions may leave it channels last
    return {name: np.ascontiguousarray(np.concatenate(values)) for name, values in pieces.items()}


def _write(path: Path, metadata: dict[str, str], arrays: Arrays) -> None:
    """Beside, onto the disk, then under its name: a shard that can be seen is whole."""
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        save_file(arrays, beside, metadata=metadata)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def is_whole(path: Path, key: str, span: range) -> bool:
    """Whether a shard is there and holds these rows. Raises LimnerError when it is another cache's."""
    try:
        metadata, arrays = _arrays(path)
        _corrupt(metadata)
        kind, own, rows = metadata.get("kind"), metadata.get("key"), {len(array) for array in arrays.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    if kind != _KIND or own != key:
        raise LimnerError(f"{path.parent}: holds latents of another autoencoder or of other pictures; "
                          "name another folder, or remove it")  # fmt: skip
    return rows == {len(span)}


def _corrupt(metadata: dict[str, str]) -> dict[int, str]:
    """The rows of a stream that a shard holds nothing of, and why."""
    return {int(row): str(what) for row, what in json.loads(metadata.get("corrupt", "{}")).items()}


def _arrays(path: Path) -> tuple[dict[str, str], Arrays]:
    """Metadata and memory-mapped arrays of a safetensors file: 8 bytes of length, a JSON header, the data.

    Raises ValueError, KeyError, TypeError, AttributeError or RecursionError for a damaged file.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:  # or a damaged length would take all memory
            raise ValueError("cut short")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length))
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        arrays[name] = data[begin:end].view(np.float16).reshape(entry["shape"])
    return metadata, arrays
