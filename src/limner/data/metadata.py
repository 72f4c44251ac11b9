"""`metadata.jsonl`, `.csv` or `.parquet`: a row for each picture, named by its `file_name`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limner.data.sources import Place, Problem, Tell
from limner.data.text import reason
from limner.errors import suggest

FILE_NAME = "file_name"


@dataclass(frozen=True)
class Record:
    """What one line says of one picture. `file_name` is relative to the metadata's folder and not yet checked."""

    place: Place
    file_name: str
    values: dict[str, Any]


def read_metadata(path: Path, tell: Tell) -> list[Record]:
    """All usable lines of a metadata file; the others go to `tell`, with their line."""
    try:
        data = path.read_bytes()
    except OSError as error:
        tell(Problem(Place(str(path)), f"cannot be read ({reason(error)})"))
        return []
    if path.suffix == ".parquet":
        rows = _parquet_rows(path, data, tell)
    else:
        text = _text(path, data, tell)
        rows = _json_rows(path, text, tell) if path.suffix == ".jsonl" else _csv_rows(path, text, tell)
    return [record for place, row in rows if (record := _record(place, row, tell)) is not None]


def _record(place: Place, row: dict[str, Any], tell: Tell) -> Record | None:
    values = {key: value for key, value in row.items() if key != FILE_NAME}
    name = row.get(FILE_NAME)
    if isinstance(name, str) and name:
        return Record(place, name, values)
    if name is None:
        tell(Problem(place, f"has no '{FILE_NAME}'{suggest(FILE_NAME, values)}"))
    else:
        tell(Problem(place, f"'{FILE_NAME}' should be the path of a picture, is {name!r:.60}"))
    return None


def _text(path: Path, data: bytes, tell: Tell) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        tell(Problem(Place(str(path), line=line), "is not UTF-8; save the file as UTF-8"))
        return data.decode("utf-8-sig", "replace")


def _json_rows(path: Path, text: str, tell: Tell) -> Iterator[tuple[Place, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = Place(str(path), line=number)
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            tell(Problem(place, f"is not JSON ({error.msg} at column {error.colno})"))
        except (ValueError, RecursionError) as error:
            tell(Problem(place, f"is not JSON that can be read ({reason(error)})"))
        else:
            if isinstance(row, dict):
                yield place, row
            else:
                tell(Problem(place, f'should be an object such as {{"file_name": "a.png"}}, is a {type(row).__name__}'))


def _csv_rows(path: Path, text: str, tell: Tell) -> Iterator[tuple[Place, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""))
    header: list[str] | None = None
    rows: list[tuple[Place, list[str]]] = []
    while True:
        start = reader.line_num + 1
        place = Place(str(path), line=start)
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            tell(Problem(place, f"is not CSV ({reason(error)})"))
            continue
        if not cells:
            continue
        if header is None:
            header = cells
            if FILE_NAME not in header:
                tell(Problem(place, f"the header has no column '{FILE_NAME}'{suggest(FILE_NAME, header)}"))
                return
        elif len(cells) != len(header):
            tell(Problem(place, f"has {len(cells)} fields, the header {len(header)}"))
        else:
            rows.append((place, cells))
    if header is not None:
        numeric = [_all_integers([cells[i] for _, cells in rows]) for i in range(len(header))]
        for place, cells in rows:
            yield (
                place,
                {
                    name: _cell(cell, integer and name != FILE_NAME)
                    for name, cell, integer in zip(header, cells, numeric, strict=True)
                },
            )


def _cell(text: str, integer: bool) -> str | int | None:
    if integer:
        return int(text) if text else None
    return text


def _all_integers(cells: list[str]) -> bool:
    """Whether a CSV column holds whole numbers; `007` is a name."""
    filled = [cell for cell in cells if cell]
    return bool(filled) and all(
        cell.isascii() and cell.lstrip("-").isdigit() and len(cell) < 18 and str(int(cell)) == cell for cell in filled
    )


def _parquet_rows(path: Path, data: bytes, tell: Tell) -> Iterator[tuple[Place, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(io.BytesIO(data)).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        tell(Problem(Place(str(path)), f"is not a Parquet file that can be read ({reason(error)})"))
        return
    for number, row in enumerate(rows):
        yield Place(str(path), row=number), row
