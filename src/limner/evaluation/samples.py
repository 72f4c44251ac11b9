"""Where samples come from: a file, a folder, an array, a data set, or whatever draws them; always as batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from limner.config import DataConfig
from limner.data import transforms
from limner.data.catalog import open_source
from limner.data.pixels import fetch, in_parallel
from limner.data.roles import TEXT_NAMES, image_role, label_role, read_labels
from limner.data.sources import Encoded, Source
from limner.errors import LimnerError, suggest
from limner.evaluation.arrays import READ, as_uint8, npz_batches
from limner.evaluation.collect import Batch

_OF_EACH = {"file_name", "index", "label", "label_name", *TEXT_NAMES}
_ANY_COLUMNS = DataConfig.model_validate({})


@dataclass
class Samples:
    """Batches of pictures and their conditions, to be read once.

    size: (H, W). name: where they come from. settings: how they were made (sampler, steps, guidance, seed), as far as
    the files say.
    """

    batches: Iterator[Batch]
    size: tuple[int, int]
    name: str
    settings: dict[str, Any] = field(default_factory=dict)


def open_samples(source: Any) -> Samples:
    """Samples from

    - a path: an `.npz` (`x` uint8 (N, H, W, C), and `y`, `text`), a folder of pictures (by class, or with labels and
      captions in `metadata.jsonl`), a WebDataset `.tar`, Parquet;
    - an array: uint8 (N, H, W, C), or float (N, C, H, W) in [-1, 1];
    - a data set of `limner.data`;
    - an iterable of batches (array, conditions by modality): nothing of it is kept.

    Raises LimnerError: no pictures, pictures of several sizes, NaN, a file that is none of these.
    """
    if isinstance(source, str | Path):
        is_npz = str(source).lower().endswith(".npz")
        found = Samples(npz_batches(Path(source)), (0, 0), str(source)) if is_npz else _from_files(str(source))
    elif isinstance(source, np.ndarray | Tensor):
        found = Samples(iter([(as_uint8(source, "samples"), {})]), (0, 0), "array")
    elif callable(getattr(source, "iterate", None)):
        found = Samples(_named(source), (0, 0), f"data set {source.digest[:12]}")
    elif isinstance(source, Iterable):
        found = Samples(_checked(source), (0, 0), "drawn")
    else:
        raise LimnerError(f"samples: {type(source).__name__}, should be a path, an array or batches of pictures")
    first = next((batch for batch in found.batches if len(batch[0])), None)
    if first is None:
        raise LimnerError(f"samples: {found.name} holds no pictures")
    found.batches = itertools.chain([first], found.batches)
    found.size = (first[0].shape[1], first[0].shape[2])
    return found


def _checked(batches: Iterable[Any]) -> Iterator[Batch]:
    count = 0
    for batch in batches:
        if not (isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[1], Mapping)):
            raise LimnerError(f"samples: a {type(batch).__name__}, should be pairs of pictures and conditions")
        pictures = as_uint8(batch[0], "samples", count)
        count += len(pictures)
        yield pictures, batch[1]


def _named(data: Any) -> Iterator[Batch]:
    """A data set's batches, with class names beside class numbers."""
    names = data.class_names
    for pictures, conditions in data.iterate(None, READ):
        extra = {}
        if names is not None and conditions.get("label") is not None:
            extra["label_name"] = [names[int(number)] for number in conditions["label"]]
        yield pictures, {**conditions, **extra}


# --- pictures in files ------------------------------------------------------------------------------------------


def _from_files(path: str) -> Samples:
    source = open_source(path)
    return Samples(_decoded(source, _columns(source)), (0, 0), path, _constants(source))


def _columns(source: Source) -> dict[str, list[Any]]:
    """What is known of each picture, by modality."""
    columns: dict[str, list[Any]] = {}
    label = label_role(source, _ANY_COLUMNS)
    if label is not None and any(value is not None for value in source.values(label)):
        numbers, names = read_labels(source, label)
        if source.columns[label].kind == "integer":
            columns["label"] = numbers.tolist()
        else:
            columns["label_name"] = [names[number] for number in numbers]
    if "label_name" in source.columns:
        columns["label_name"] = source.values("label_name")
    texts = [name for name in TEXT_NAMES if name in source.columns and name != label]
    if texts:
        columns["text"] = source.values(texts[0])
    columns = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    for name, values in columns.items():
        if None in values:
            row = values.index(None)
            raise LimnerError(f"{source.place(row)}: has no {name}, though others have; all or none should")
    return columns


def _constants(source: Source) -> dict[str, Any]:
    """Columns that say the same of every picture: the settings that made them."""
    found = {}
    for name, column in source.columns.items():
        if column.kind in ("text", "integer", "number") and name not in _OF_EACH:
            values = source.values(name)
            if values and values[0] is not None and all(value == values[0] for value in values):
                found[name] = values[0]
    return found


def _decoded(source: Source, columns: Mapping[str, list[Any]]) -> Iterator[Batch]:
    decode = transforms.Recipe(channels=3)

    def work(encoded: Encoded) -> npt.NDArray[np.uint8] | transforms.PictureError:
        try:
            return decode(fetch(encoded))
        except transforms.PictureError as error:
            return error

    pictures: list[npt.NDArray[np.uint8]] = []
    shape = None
    start = 0
    with transforms.quiet():
        for row, pixels in enumerate(in_parallel(work, source.pictures(image_role(source, _ANY_COLUMNS)))):
            if isinstance(pixels, transforms.PictureError):
                raise LimnerError(f"{source.picture_place(row)}: {pixels}")
            shape = shape or pixels.shape
            if pixels.shape != shape:
                raise LimnerError(
                    f"{source.picture_place(row)}: is {pixels.shape[2]}x{pixels.shape[1]}, those before it are "
                    f"{shape[2]}x{shape[1]}; samples should be of one size"
                )
            pictures.append(pixels)
            if len(pictures) == READ:
                yield _stacked(pictures, columns, start)
                start, pictures = row + 1, []
    if pictures:
        yield _stacked(pictures, columns, start)


def _stacked(pictures: list[npt.NDArray[np.uint8]], columns: Mapping[str, list[Any]], start: int) -> Batch:
    rows = slice(start, start + len(pictures))
    return np.stack(pictures).transpose(0, 2, 3, 1), {name: values[rows] for name, values in columns.items()}


# --- classes ----------------------------------------------------------------------------------------------------


def in_classes(batches: Iterable[Batch], names: tuple[str, ...] | None) -> Iterator[Batch]:
    """The same batches with `label` as numbers of the reference's classes, by name where names are known.

    Without reference classes labels are left out. Raises LimnerError for a class that the reference has not.
    """
    numbers = {name: number for number, name in enumerate(names or ())}
    by_number = all(name.isdigit() for name in numbers)
    for pictures, conditions in batches:
        rest = {key: value for key, value in conditions.items() if key not in ("label", "label_name")}
        labels = conditions.get("label")
        called = conditions.get("label_name")
        if names is None or (labels is None and called is None):
            yield pictures, rest
            continue
        if called is not None and not (by_number and labels is not None):
            unknown = next((str(name) for name in called if str(name) not in numbers), None)
            if unknown is not None:
                raise LimnerError(f"samples: class '{unknown}' is none of the reference's{suggest(unknown, numbers)}")
            labels = [numbers[str(name)] for name in called]
        rest["label"] = np.asarray(labels, dtype=np.int64)
        outside = rest["label"][(rest["label"] < 0) | (rest["label"] >= len(numbers))]
        if len(outside):
            raise LimnerError(f"samples: label {outside[0]}, the reference has {len(numbers)} classes (from 0)")
        yield pictures, rest
