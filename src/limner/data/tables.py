"""Parquet, as Hugging Face writes it: pictures as {bytes, path} or plain bytes, class names in the metadata."""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.data.sources import Absent, Column, Encoded, Kind, Place, Problem, Source, Tell, encoded, stat_digest
from limner.data.text import reason
from limner.errors import LimnerError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 256


@dataclass
class ParquetSource(Source):
    """The rows of Parquet files, one file after the other; `ends` are the row numbers at which they end."""

    files: list[Path] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def place(self, row: int) -> Place:
        index = bisect.bisect_right(self.ends, row)
        return Place(str(self.files[index]), row=row - (self.ends[index - 1] if index else 0))

    def pictures(self, column: str) -> Iterator[Encoded]:
        """Row after row; the rest of a file that is damaged within is Absent, and the next file goes on."""
        start = 0
        for path, end in zip(self.files, self.ends, strict=True):
            row = start
            try:
                for values in _read(path, column):
                    for value in values.to_pylist():
                        yield encoded(value, path.parent)
                        row += 1
            except LimnerError as error:
                yield from (Absent(str(error).removeprefix(f"{path}: ")) for _ in range(row, end))
            start = end

    def values(self, column: str) -> list[Any]:
        return [value for path in self.files for values in _read(path, column) for value in values.to_pylist()]

    def fingerprint(self) -> str:
        return stat_digest(self.files)


def parquet_splits(name: str, groups: dict[str, list[Path]], tell: Tell) -> dict[str, Callable[[], Source]]:
    """A source for each group of Parquet files."""
    return {split: partial(_source, name, split, files, tell) for split, files in groups.items()}


def _source(name: str, split: str, files: list[Path], tell: Tell) -> ParquetSource:
    """Files that cannot be read, or have other columns than the first, are told and left out."""
    import pyarrow as pa

    columns: dict[str, Column] = {}
    source = ParquetSource(name, split, columns)
    for path in files:
        try:
            with open_parquet(path) as parquet:
                schema, count = parquet.schema_arrow, parquet.metadata.num_rows
        except (pa.ArrowException, OSError, ValueError) as error:
            tell(Problem(Place(str(path)), f"is not a Parquet file that can be read ({reason(error)})"))
            continue
        if columns and set(schema.names) != set(columns):
            tell(Problem(Place(str(path)), f"its columns differ from those of {source.files[0].name}"))
            continue
        if not columns:
            columns.update(arrow_columns(schema))
        source.files.append(path)
        source.ends.append(len(source) + count)
    return source


def _read(path: Path, column: str) -> Iterator[pa.Array]:
    """A column of a file, a few hundred rows at a time. Raises LimnerError."""
    import pyarrow as pa

    try:
        with open_parquet(path) as file:
            for batch in file.iter_batches(_BATCH, columns=[column]):
                yield batch.column(0)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise LimnerError(f"{path}: column '{column}' cannot be read ({reason(error)})") from None


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(path)


def arrow_columns(schema: pa.Schema) -> dict[str, Column]:
    """Columns with their kinds, by the Arrow types and the features that `datasets` writes into the metadata."""
    try:
        raw = (schema.metadata or {}).get(b"huggingface", b"{}")
        features = json.loads(raw)["info"]["features"]
    except (ValueError, KeyError, TypeError):
        features = {}
    columns = {}
    for name in schema.names:
        feature = features.get(name) if isinstance(features, dict) else None
        columns[name] = _column(name, schema.field(name).type, feature if isinstance(feature, dict) else {})
    return columns


def _column(name: str, arrow_type: pa.DataType, feature: dict[str, Any]) -> Column:
    if feature.get("_type") == "Image":
        return Column(name, "image")
    if feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list):
        return Column(name, "class", tuple(str(name) for name in feature["names"]))
    return Column(name, _kind(arrow_type))


def _kind(arrow_type: pa.DataType) -> Kind:
    import pyarrow.types as types

    if types.is_struct(arrow_type):
        inside = {arrow_type.field(i).name for i in range(arrow_type.num_fields)}
        return "image" if "bytes" in inside and inside <= {"bytes", "path"} else "other"
    if types.is_dictionary(arrow_type):
        return _kind(arrow_type.value_type)
    if types.is_binary(arrow_type) or types.is_large_binary(arrow_type):
        return "image"
    if types.is_string(arrow_type) or types.is_large_string(arrow_type):
        return "text"
    if types.is_integer(arrow_type) or types.is_boolean(arrow_type):
        return "integer"
    return "number" if types.is_floating(arrow_type) else "other"
