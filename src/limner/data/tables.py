"""Parquet, as Hugging Face writes it: pictures as {bytes, path} or plain bytes, class names in the metadata."""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.data.sources import Column, Encoded, FileSpan, Kind, Place, Source, Tell, stat_digest
from limner.data.splits import choose_split, split_of
from limner.errors import LimnerError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 256


@dataclass
class ParquetSource(Source):
    """The rows of Parquet files, one file after the other."""

    files: list[Path] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ends = list(accumulate(self.counts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def place(self, row: int) -> Place:
        index = bisect.bisect_right(self._ends, row)
        return Place(str(self.files[index]), row=row - (self._ends[index] - self.counts[index]))

    def pictures(self, column: str) -> Iterator[Encoded]:
        for file, values in self._read(column):
            for value in values.to_pylist():
                yield _encoded(value, file.parent)

    def values(self, column: str) -> list[Any]:
        return [value for _, values in self._read(column) for value in values.to_pylist()]

    def fingerprint(self) -> str:
        return stat_digest(self.files)

    def _read(self, column: str) -> Iterator[tuple[Path, pa.Array]]:
        import pyarrow as pa

        for path in self.files:
            try:
                with open_parquet(path) as file:
                    for batch in file.iter_batches(_BATCH, columns=[column]):
                        yield path, batch.column(0)
            except (pa.ArrowException, OSError) as error:
                raise LimnerError(f"{path}: column '{column}' cannot be read ({_reason(error)})") from None


def parquet_source(path: Path, split: str | None, tell: Tell) -> Source:
    """One Parquet file, or a folder of them, whose names or folders tell the split (`train-00000-of-00002.parquet`)."""
    import pyarrow as pa

    found = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    by_split: dict[str, list[Path]] = {}
    for file in found:
        by_split.setdefault(split_of(file.relative_to(path.parent if path.is_file() else path)), []).append(file)
    chosen, notes = choose_split(str(path), tuple(by_split), split)
    schema: pa.Schema | None = None
    counts = []
    for file in by_split[chosen]:
        try:
            with open_parquet(file) as parquet:
                counts.append(parquet.metadata.num_rows)
                if schema is None:
                    schema = parquet.schema_arrow
                elif parquet.schema_arrow.names != schema.names:
                    raise LimnerError(f"{file}: its columns differ from those of {by_split[chosen][0].name}")
        except (pa.ArrowException, OSError) as error:
            raise LimnerError(f"{file}: is not a Parquet file that can be read ({_reason(error)})") from None
    assert schema is not None
    return ParquetSource(
        name=str(path),
        split=chosen,
        splits=tuple(by_split),
        columns=arrow_columns(schema),
        notes=notes,
        files=by_split[chosen],
        counts=counts,
    )


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


def _encoded(value: Any, folder: Path) -> Encoded:
    if isinstance(value, dict):
        data = value.get("bytes")
        return data if data is not None else _encoded(value.get("path"), folder)
    return FileSpan(folder / value) if isinstance(value, str) else value


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
