"""Folders of pictures: by class, flat, or with metadata; with or without a folder for each split."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from limner.data.listing import Listing
from limner.data.metadata import Record, read_metadata
from limner.data.pairs import paired
from limner.data.roles import LABEL_NAMES
from limner.data.sources import (
    Absent,
    Column,
    Encoded,
    FileSpan,
    Place,
    Problem,
    Source,
    Tell,
    encoded,
    kind_of,
    stat_digest,
    stays_inside,
)
from limner.data.splits import in_order, split_name

IMAGE = "image"
LABEL = "label"


@dataclass
class FolderSource(Source):
    """Pictures as files. `files` are relative to `root`; `places` is where metadata speaks of each, if there is any;
    `overlays` are the files that lie on the pictures, by role."""

    root: Path
    files: list[str]
    places: list[Place] | None = None
    table: dict[str, list[Any]] = field(default_factory=dict)
    overlays: dict[str, list[str | None]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.files)

    def place(self, row: int) -> Place:
        return self.places[row] if self.places is not None else self.picture_place(row)

    def picture_place(self, row: int, column: str | None = None) -> Place:
        file = self.overlays[column][row] if column in self.overlays else None
        return Place(str(self.root / (file or self.files[row])))

    def pictures(self, column: str) -> Iterator[Encoded]:
        if column == IMAGE:
            yield from (FileSpan(self.root / file) for file in self.files)
        elif column in self.overlays:
            for file in self.overlays[column]:
                yield (
                    Absent(f"has no {column.replace('_', ' ')} beside it")
                    if file is None
                    else FileSpan(self.root / file)
                )
        else:  # a metadata column of paths
            for row, value in enumerate(self.table[column]):
                yield encoded(value, Path(self.place(row).file).parent)

    def values(self, column: str) -> list[Any]:
        return self.table[column]

    def fingerprint(self) -> str:
        files = [*self.files, *(file for column in self.overlays.values() for file in column if file)]
        return stat_digest(self.root / file for file in files)


@dataclass(frozen=True)
class _Part:
    """The files of one split, below one or more of the top folders; `depth` is where class folders start."""

    pictures: list[str]
    metadata: list[str]
    depth: int


def folder_splits(listing: Listing, tell: Tell) -> dict[str, Callable[[], Source]]:
    """A source for each split. Top folders are splits when all of them are named like splits, else classes."""
    files = [*listing.pictures, *listing.metadata]
    tops = {file.split("/", 1)[0] for file in files if "/" in file}
    loose = any("/" not in file for file in listing.pictures)
    if loose or not tops or not all(split_name(top) for top in tops):
        part = _Part(listing.pictures, listing.metadata, depth=0)
        return {"train": partial(_source, listing.root, "train", part, tell)}
    splits = {}
    for split in {split_name(top) or "train" for top in tops}:
        inside = {top for top in tops if split_name(top) == split}
        part = _Part(
            pictures=[file for file in listing.pictures if file.split("/", 1)[0] in inside],
            metadata=[file for file in listing.metadata if "/" not in file or file.split("/", 1)[0] in inside],
            depth=1,
        )
        splits[split] = partial(_source, listing.root, split, part, tell)
    return in_order(splits)


def _source(root: Path, split: str, part: _Part, tell: Tell) -> FolderSource:
    pairs = paired(root, part.pictures)
    part = replace(part, pictures=pairs.pictures)
    if part.metadata:
        source = _with_metadata(root, split, part, tell)
    else:
        source = FolderSource(str(root), split, {IMAGE: Column(IMAGE, "image")}, root=root, files=part.pictures)
        _label_by_folder(source, part.depth)
    source.overlays = {role: column for role, column in pairs.columns(source.files).items()
                       if role not in source.columns}  # fmt: skip
    source.columns |= {role: Column(role, "image") for role in source.overlays}
    return source


def _with_metadata(root: Path, split: str, part: _Part, tell: Tell) -> FolderSource:
    """Rows are the lines of the metadata; pictures that no line names are orphans."""
    known = {file.rsplit(".", 1)[0].lower(): file for file in part.pictures}
    pictures = set(part.pictures)
    rows: list[tuple[str, Record]] = []
    for file in _one_each(root, part.metadata, tell):
        folder = PurePosixPath(file).parent
        for record in read_metadata(root / file, tell):
            path = _path(root, folder, record, pictures, known, tell)
            if path is not None and (part.depth == 0 or split_name(path.split("/", 1)[0]) == split):
                rows.append((path, record))
    names = {key: None for _, record in rows for key in record.values if key != IMAGE}
    table = {name: [record.values.get(name) for _, record in rows] for name in names}
    columns = {IMAGE: Column(IMAGE, "image")}
    columns |= {name: Column(name, kind_of(values)) for name, values in table.items()}
    source = FolderSource(
        str(root),
        split,
        columns,
        root=root,
        files=[path for path, _ in rows],
        places=[record.place for _, record in rows],
        table=table,
    )
    named = set(source.files)
    source.orphans += [Place(str(root / file)) for file in part.pictures if file not in named]
    if source.orphans:
        source.notes.append(f"{len(source.orphans)} pictures that no metadata names are left out")
    if not any(name in columns for name in LABEL_NAMES):
        _label_by_folder(source, part.depth)
    return source


def _one_each(root: Path, metadata: list[str], tell: Tell) -> list[str]:
    """At most one metadata file for each folder."""
    chosen: dict[PurePosixPath, str] = {}
    for file in metadata:
        folder = PurePosixPath(file).parent
        if folder in chosen:
            tell(
                Problem(
                    Place(str(root / file)), f"stands beside {PurePosixPath(chosen[folder]).name}; keep one of them"
                )
            )
        else:
            chosen[folder] = file
    return list(chosen.values())


def _path(
    root: Path, folder: PurePosixPath, record: Record, pictures: set[str], known: dict[str, str], tell: Tell
) -> str | None:
    """The path of a record's picture, relative to the root; None, and told, where there is no such file.

    `known`: pictures by path without suffix, in lower case, for what may have been meant.
    """
    if not stays_inside(record.file_name):
        tell(Problem(record.place, f"file_name '{record.file_name}' points outside the folder"))
        return None
    path = (folder / record.file_name).as_posix()
    if path in pictures or _is_file(root / path):
        return path
    near = known.get(path.rsplit(".", 1)[0].lower())
    hint = f"; did you mean '{PurePosixPath(near).relative_to(folder)}'?" if near else ""
    tell(Problem(record.place, f"file_name '{record.file_name}' does not exist{hint}"))
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _label_by_folder(source: FolderSource, depth: int) -> None:
    """Add the column `label` from the names of the folders, where there are two or more."""
    labels: list[str | None] = []
    for file in source.files:
        folders = file.split("/")[depth:-1]
        labels.append(os.fsencode(folders[0]).decode("utf-8", "replace") if folders else None)
    names = tuple(sorted({label for label in labels if label is not None}))
    if len(names) > 1:
        source.columns[LABEL] = Column(LABEL, "class", names)
        source.table[LABEL] = labels
