"""From one format to another on the disk, holding one weight in memory at a time; all of it or nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from limner import config as c
from limner.errors import LimnerError, suggest
from limner.interop import hf_out, safe
from limner.interop.imported import Imported, shapes
from limner.interop.reading import read
from limner.interop.writing import Tell, new_folder, write_weights

Format = Literal["limner", "diffusers"]
FORMATS = ("limner", "diffusers")


@dataclass(frozen=True)
class Conversion:
    """What was written. parameters: numbers in all weights, those of a tokenizer not among them. notes: what the user
    should know, a line each."""

    config: c.RunConfig
    parameters: int
    notes: tuple[str, ...]


def convert(source: Path, out: Path, *, to: Format = "limner", flags: Mapping[str, Any] | str | Path | None = None,
            config: str | Path | None = None, licence: str | None = None,
            tell: Tell | None = None) -> Conversion:  # fmt: skip
    """Write `source`, a run or a checkpoint of another project, into the new or empty directory `out`.

    to: limner (a run) or diffusers (a folder). flags, config: see `reading.read`. licence: for the model card. tell:
    told how many weights are written, of how many. Raises LimnerError, and then leaves nothing of `out`.
    """
    if to not in FORMATS:
        raise LimnerError(f"--to {to}: there is no such format{suggest(to, FORMATS)}")
    if not source.exists():
        raise LimnerError(f"{source}: there is no such file or directory")
    run = source if is_run(source) else None
    if run is not None and to == "limner":
        raise LimnerError(f"{source}: is a run already; --to diffusers makes a folder for diffusers of it")
    found = read_run(run) if run is not None else read(source, flags=flags, config=config)
    notes = found.notes
    with new_folder(out) as folder:
        if to == "limner":
            c.dump(found.config, folder / "config.yaml")
            write_weights(folder / "model.safetensors", found.state, tell)
        else:
            written = hf_out.plan(found.config, found.state, str(source))
            hf_out.write(written, found.config, folder, run=run, name=out.name, licence=licence, tell=tell)
            notes += tuple(f"{out}: {note}" for note in written.notes)
    return Conversion(found.config, parameters(found), notes)


def is_run(path: Path) -> bool:
    """Whether a path is a run's directory."""
    return (path / "config.yaml").is_file()


def read_run(run: Path) -> Imported:
    """The recipe and weights of a run, mapped from the file. Raises LimnerError for whatever is missing or damaged."""
    recipe = c.load(run / "config.yaml")
    file = run / "model.safetensors"
    if not file.is_file():
        raise LimnerError(f"{run}: holds no model yet (model.safetensors); train it first")
    weights = safe.read(file).weights
    wanted = shapes(recipe)
    for name in [*wanted, *weights]:
        if name not in wanted or name not in weights or tuple(weights[name].shape) != wanted[name]:
            raise LimnerError(f"{file}: weight '{name}' doesn't fit config.yaml; they don't belong together")
    return Imported(recipe, weights)


def parameters(found: Imported) -> int:
    """The numbers in all weights of a model, those of buffers not among them."""
    return sum(weight.numel() for weight in found.state.values() if weight.is_floating_point())
