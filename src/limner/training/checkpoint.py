"""Checkpoints that survive anything: a directory each, written beside, fsynced, renamed; digests verified on reading.

    run/checkpoints/images-001048576/
      model.safetensors       weights in training       (a file more for each further module of the task)
      ema.safetensors         their average, which is what `run/model.safetensors` holds
      optimizer.safetensors   moments by parameter name
      state.json              images, seconds, digests of the other files and of itself

With `training.shard` on several processes the tensors lie in `pieces/`, a safetensors file or more of each process; any
number of processes reads either form.

A directory under its final name is whole: a process killed at any moment leaves the earlier ones and, at most, a
`.partial-` directory that the next one clears away. All chance in training follows from the seed and the images seen
(`draws.py`), so no generator's state is kept.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limner import config as configuration
from limner.config import RunConfig
from limner.errors import LimnerError
from limner.training import sharded

_log = logging.getLogger(__name__)

STATE = "state.json"
PIECES = "pieces"
FORMAT = 1
_PARTIAL = ".partial-"
_NAME = re.compile(r"images-(\d+)")
_SPARE_BYTES = 1_000_000

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """One that was verified. state: what `Checkpoints.save` was given, besides what it adds."""

    path: Path
    images: int
    state: Mapping[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `name`.safetensors. Raises LimnerError when the checkpoint has no such file."""
        if self.pieces is not None:
            found = sharded.read_whole(self.pieces, f"{name}:")
            if found:
                return found
        file = self.path / f"{name}.safetensors"
        if not file.is_file():
            raise LimnerError(f"{self.path}: holds no {file.name}; it was written by another kind of task")
        return load_file(file)

    @property
    def pieces(self) -> Path | None:
        """Where tensors lie in the pieces of several processes, named `name:tensor`; None where they lie whole."""
        folder = self.path / PIECES
        return folder if folder.is_dir() else None


class Checkpoints:
    """The checkpoints of one run; keeps the newest `keep_last` and the best by held-out loss."""

    def __init__(self, run: Path, keep_last: int = 2) -> None:
        self.run = run
        self.directory = run / "checkpoints"
        self.keep_last = keep_last

    def save(self, images: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> Checkpoint:
        """Write a checkpoint, then let go of those that are no longer wanted.

        tensors: by file name, without `.safetensors`. state: JSON; `held_out`, a number or None, ranks it.
        Raises LimnerError when the disk is full or cannot be written; the earlier checkpoints stay as they were.
        """
        with self._writing(images) as partial:
            self._clear(partial, sum(_bytes(content) for content in tensors.values()))
            for name, content in tensors.items():
                _write_tensors(partial / f"{name}.safetensors", content)
            saved = self._seal(partial, images, state)
        self._retain(saved)
        return saved

    def save_pieces(self, images: int, tensors: Tensors, state: Mapping[str, Any], writers: Any,
                    wait: Callable[[], None]) -> None:  # fmt: skip
        """As `save`, of tensors that are cut over processes, by the names of `Checkpoint.pieces`. Every process of the
        group `writers` calls it; its first one makes the directory and seals it. wait(): until every process has come
        there."""
        main = torch.distributed.get_rank(writers) == 0
        with self._writing(images) as partial:
            if main:
                self._clear(partial, _bytes(tensors))
            wait()
            sharded.write(partial / PIECES, tensors, writers)
            wait()
            if main:
                for file in (partial / PIECES).iterdir():
                    _sync(file)
                self._retain(self._seal(partial, images, state))

    @contextmanager
    def _writing(self, images: int) -> Iterator[Path]:
        """Where to write a checkpoint. What goes wrong in the block is told in one line, and leaves nothing there."""
        final = self._final(images)
        partial = self.directory / f"{_PARTIAL}{final.name}"
        try:
            yield partial
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._failure(final, error) from error

    def _final(self, images: int) -> Path:
        return self.directory / f"images-{images:09d}"

    def _clear(self, partial: Path, needed: int) -> None:
        """Make room for a checkpoint of so many bytes."""
        self.directory.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        _need_space(self.directory, needed)
        partial.mkdir()

    def _seal(self, partial: Path, images: int, state: Mapping[str, Any]) -> Checkpoint:
        """Write down what the files are, and give the directory its name."""
        final = self._final(images)
        found = sorted(file for file in partial.rglob("*") if file.is_file())
        files = {file.relative_to(partial).as_posix(): _fingerprint(file) for file in found}
        whole = {"format": FORMAT, "images": images, **state, "files": files}
        whole["digest"] = _digest(whole)
        _write_text(partial / STATE, json.dumps(whole, indent=1))
        for folder in (partial, *(path for path in partial.iterdir() if path.is_dir())):
            _sync(folder)
        if final.exists():  # reached again after a resume from an earlier one
            self._drop(final)
        partial.rename(final)
        _sync(self.directory)
        return Checkpoint(final, images, whole)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; a damaged one is passed over with a warning. None: there is none.

        Raises LimnerError when there are checkpoints and all of them are damaged.
        """
        found = self._found()
        for images, path in reversed(found):
            damage = _damage(path)
            if damage is None:
                return Checkpoint(path, images, _read_state(path))
            _log.warning("%s: damaged (%s); using the one before it", path, damage)
        if found:
            raise LimnerError(f"{self.directory}: every checkpoint is damaged; start another run with --out")
        return None

    def best(self, *, verified: bool = False) -> Checkpoint | None:
        """The checkpoint with the lowest held-out figure, or None where none has one. verified: of those that are
        whole."""
        ranked = []
        for images, path in self._found():
            try:
                state = _read_state(path)
            except (OSError, ValueError, RecursionError):
                continue
            if isinstance(state, dict) and isinstance(state.get("held_out"), (int, float)):
                ranked.append((state["held_out"], -images, Checkpoint(path, images, state)))
        found = (checkpoint for *_, checkpoint in sorted(ranked, key=lambda entry: entry[:2]))
        return next((each for each in found if not verified or _damage(each.path) is None), None)

    def newest(self) -> Path | None:
        """The newest checkpoint's directory, unverified."""
        found = self._found()
        return found[-1][1] if found else None

    def begin(self, config: RunConfig, also: Callable[[], None] = lambda: None) -> None:
        """Make the run's directory and write its recipe, and `also` what else. Raises LimnerError where that can't be
        done."""
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            _replace(self.run / "config.yaml", lambda path: configuration.dump(config, path))
            also()
        except OSError as error:
            raise self._failure(self.run, error) from error

    def publish(self, average: Tensors, config: RunConfig) -> None:
        """Make `average` the run's model, and `config` its recipe; each file changes in one move."""
        try:
            _replace(self.run / "config.yaml", lambda path: configuration.dump(config, path))
            _replace(self.run / "model.safetensors", lambda path: _write_tensors(path, average))
            _sync(self.run)
        except (OSError, SafetensorError) as error:
            raise self._failure(self.run / "model.safetensors", error) from error

    def _found(self) -> list[tuple[int, Path]]:
        if not self.directory.is_dir():
            return []
        named = [(_NAME.fullmatch(path.name), path) for path in self.directory.iterdir()]
        return sorted((int(match[1]), path) for match, path in named if match)

    def _retain(self, saved: Checkpoint) -> None:
        """Keeps `saved`, the ones before it up to `keep_last`, and the best. What lies beyond `saved` on the clock was
        damaged or belongs to a training that was wound back."""
        best = self.best()
        earlier = [path for images, path in self._found() if images <= saved.images]
        kept = {saved.path, *earlier[-self.keep_last :]} | ({best.path} if best is not None else set())
        for _, path in self._found():
            if path not in kept:
                self._drop(path)
        for left in self.directory.glob(f"{_PARTIAL}*"):
            _remove(left)

    def _drop(self, path: Path) -> None:
        """Take a checkpoint away under a name that is never read, so that no half of it is ever seen."""
        doomed = path.with_name(f"{_PARTIAL}old-{path.name}")
        _remove(doomed)
        path.rename(doomed)
        _remove(doomed)

    def _failure(self, path: Path, error: Exception) -> LimnerError:
        whole = [found.name for _, found in self._found()]
        kept = f"{whole[-1]} is whole" if whole else "there is no earlier one"
        if _is_full(error):
            reason = str(error) if isinstance(error, _NoSpace) else "the disk is full"
            return LimnerError(f"{path}: {reason}; {kept}; free some space and go on with --resume")
        words = " ".join(str(error).split())
        return LimnerError(f"{path}: cannot be written ({words}); {kept}")


class _NoSpace(OSError):
    """Found out before writing."""


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _need_space(directory: Path, needed: int) -> None:
    needed += _SPARE_BYTES
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise _NoSpace(errno.ENOSPC, f"the disk is full: {needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB free")


def _is_full(error: Exception) -> bool:
    return (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "os error 28" in str(error)


def _write_tensors(path: Path, tensors: Tensors) -> None:
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(dict(_without_aliases(plain)), path, metadata={"format": "pt"})
    _sync(path)


def _without_aliases(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Copies of tensors that share memory with an earlier one (tied weights), which safetensors refuses."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        alias = tensor.numel() > 0 and tensor.data_ptr() in seen
        seen.add(tensor.data_ptr())
        yield name, tensor.clone() if alias else tensor


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _replace(path: Path, write: Any) -> None:
    """Write beside `path`, then take its place."""
    beside = path.with_name(f"{_PARTIAL}{path.name}")
    try:
        write(beside)
        _sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Onto the disk. A directory cannot be opened on Windows, where a rename is durable anyway."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _digest(state: Mapping[str, Any]) -> str:
    """Of all that a state says, besides this."""
    rest = {key: value for key, value in state.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        state = _read_state(path)
        if state.get("format") != FORMAT:
            return f"format {state.get('format')}, this Limner reads {FORMAT}"
        if state["digest"] != _digest(state):
            return f"{STATE} is not what was written"
        for name, recorded in state["files"].items():
            if _fingerprint(path / name) != recorded:
                return f"{name} is not what was written"
    except OSError as error:
        return f"{Path(error.filename).name if error.filename else STATE}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{STATE} is not what was written"
    return None


# --- putting a checkpoint back --------------------------------------------------------------------------------------


def read_model(run: Path) -> dict[str, Tensor]:
    """The weights that a run has published. Raises LimnerError for a missing or damaged file."""
    file = run / "model.safetensors"
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise LimnerError(f"{file}: is missing or damaged ({' '.join(str(error).split())})") from None


def load_weights(module: nn.Module, tensors: Tensors, where: str,
                 advice: str = "resume with the run's own recipe") -> None:  # fmt: skip
    """Put weights into a module. Raises LimnerError, ending in `advice`, that names the first which is missing, unknown
    or of another shape."""
    own = module.state_dict()
    for name in [*own, *tensors]:
        if name not in own or name not in tensors:
            whose = "is not in the checkpoint" if name in own else "is unknown to this recipe's model"
            raise LimnerError(f"{where}: weight '{name}' {whose}; {advice}")
        if own[name].shape != tensors[name].shape:
            raise LimnerError(
                f"{where}: weight '{name}' is {list(tensors[name].shape)} in the checkpoint and "
                f"{list(own[name].shape)} in this recipe's model; {advice}"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            sharded.fill(tensor, tensors[name])


_FREE_TO_CHANGE = ("provenance", "sampling", "training", "label_smoothing", "data.source", "data.split",
                   "data.workers", "words",
                   "process.weighting", "process.vlb_weight", "space.share", "space.source",
                   "space.training", "distillation.teacher", "distillation.images",
                   "distillation.budget_s")  # fmt: skip
_FIXED_ALL_THE_SAME = ("training.optimizer", "training.ema")


def same_run(stored: RunConfig, given: RunConfig, where: str) -> None:
    """Refuse to resume with another recipe. Raises LimnerError naming the first key that differs; budgets, learning
    rates, intervals, sampling defaults and where the data lies may change."""
    old, new = (dict(_leaves(recipe.model_dump(mode="json"))) for recipe in (stored, given))
    for key in [*old, *(k for k in new if k not in old)]:
        free = any(key == name or key.startswith(f"{name}.") for name in _FREE_TO_CHANGE)
        fixed = any(key == name or key.startswith(f"{name}.") for name in _FIXED_ALL_THE_SAME)
        if (fixed or not free) and old.get(key) != new.get(key):
            raise LimnerError(
                f"{where}: {key} is {old.get(key, 'absent')} in the run and {new.get(key, 'absent')} in the recipe "
                "given; resume with the run's own recipe, or start another run with --out"
            )


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    children: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(node, dict):
        children = iter(node.items())
    elif isinstance(node, list):
        children = iter(enumerate(node))
    else:
        yield path, node
    for key, value in children:
        yield from _leaves(value, f"{path}.{key}" if path else str(key))
