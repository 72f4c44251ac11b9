"""Parquet, as Hugging Face writes it: pictures as {bytes, path} or plain bytes, class names in the metadata."""

from __future__ import annotations

import bisect
import itertools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.data.sources import Absent, Column, Encoded, Kind, Place, Problem, ShardSource, Source, Tell, encoded
from limner.data.stream_files import File, open_file
from limner.data.text import reason
from limner.errors import LimnerError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 256
KEPT_BYTES = 1 << 29
"""Encoded row groups that are kept, when pictures are asked for by row."""


@dataclass
class ParquetSource(ShardSource):
    """The rows of Parquet files. groups: by file, the rows of each row group, which is what can be read by itself."""

    groups: list[list[int]] = field(default_factory=list)
    _kept: OrderedDict[tuple[int, int, str], pa.Array | None] = field(default_factory=OrderedDict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

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

    def runs(self) -> list[int]:
        return list(itertools.accumulate(rows for groups in self.groups for rows in groups if rows))

    def picture(self, column: str, row: int) -> Encoded:
        """From its row group, of which the last ones are kept."""
        file = bisect.bisect_right(self.ends, row)
        first = self.ends[file - 1] if file else 0
        ends = list(itertools.accumulate(self.groups[file], initial=first))
        group = bisect.bisect_right(ends, row) - 1
        values = self._group(file, group, column)
        return Absent("its row group is damaged") if values is None else encoded(
            values[row - ends[group]].as_py(), self.files[file].parent)  # fmt: skip

    def _group(self, file: int, group: int, column: str) -> pa.Array | None:
        """A column of a row group; None where it is damaged."""
        import pyarrow as pa

        key = file, group, column
        with self._lock:
            if key not in self._kept:
                try:
                    with open_parquet(self.files[file]) as parquet:
                        self._kept[key] = parquet.read_row_group(group, columns=[column]).column(0).combine_chunks()
                except (pa.ArrowException, OSError, ValueError) as error:
                    if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the file's
                        raise LimnerError(f"{self.files[file]}: cannot be read ({reason(error)})") from None
                    self._kept[key] = None
                size = sum(kept.nbytes for kept in self._kept.values() if kept is not None)
                while size > KEPT_BYTES and len(self._kept) > 1:
                    _, oldest = self._kept.popitem(last=False)
                    size -= 0 if oldest is None else oldest.nbytes
            self._kept.move_to_end(key)
            return self._kept[key]


def parquet_splits(name: str, groups: dict[str, list[File]], tell: Tell) -> dict[str, Callable[[], Source]]:
    """A source for each group of Parquet files."""
    return {split: partial(_source, name, split, files, tell) for split, files in groups.items()}


def _source(name: str, split: str, files: list[File], tell: Tell) -> ParquetSource:
    """Files that cannot be read, or have other columns than the first, are told and left out."""
    import pyarrow as pa

    columns: dict[str, Column] = {}
    source = ParquetSource(name, split, columns)
    for path in files:
        try:
            with open_parquet(path) as parquet:
                schema, about = parquet.schema_arrow, parquet.metadata
                groups = [about.row_group(index).num_rows for index in range(about.num_row_groups)]
        except (pa.ArrowException, OSError, ValueError) as error:
            tell(Problem(Place(str(path)), f"is not a Parquet file that can be read ({reason(error)})"))
            continue
        if columns and set(schema.names) != set(columns):
            tell(Problem(Place(str(path)), f"its columns differ from those of {source.files[0].name}"))
            continue
        if not columns:
            columns.update(arrow_columns(schema))
        source.files.append(path)
        source.groups.append(groups)
        source.ends.append(len(source) + sum(groups))
    return source


def _read(path: File, column: str) -> Iterator[pa.Array]:
    """A column of a file, a few hundred rows at a time. Raises LimnerError."""
    import pyarrow as pa

    try:
        with open_parquet(path) as file:
            for batch in file.iter_batches(_BATCH, columns=[column]):
                yield batch.column(0)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise LimnerError(f"{path}: column '{column}' cannot be read ({reason(error)})") from None


def open_parquet(path: File) -> Any:
    """A `pyarrow.parquet.ParquetFile`."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(path if isinstance(path, Path) else open_file(path))


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
