"""From a path or a name to a `Source`: what form the data has, which splits there are, which one is read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath

from limner.data import folders, hub, tables, tars
from limner.data.listing import METADATA, Listing, walk
from limner.data.sources import Place, Problem, Source, Tell, refuse
from limner.data.splits import choose_split, group_by_split, grouped, split_of
from limner.data.stream_files import expand, is_pattern, is_url
from limner.data.text import printable, reason
from limner.data.transforms import EXTENSIONS, PictureError, opened
from limner.errors import LimnerError

_HUB_PREFIXES = ("hf://datasets/", "hub:")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
_PACKED = (".zip", ".7z", ".rar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_UNPACK = "is a packed archive, which cannot be read at random; unpack it and give the folder"


@dataclass(frozen=True)
class Catalog:
    """A data set by its splits; a split is read when it is opened."""

    name: str
    splits: dict[str, Callable[[], Source]]
    notes: tuple[str, ...] = ()

    def open(self, split: str | None = None) -> Source:
        """The source of a split; by default the only one, or `train`. Raises LimnerError when that is no choice."""
        chosen, note = choose_split(self.name, tuple(self.splits), split)
        source = self.splits[chosen]()
        source.notes[:0] = [*self.notes, *note]
        return source


def open_source(source: str, split: str | None = None, tell: Tell = refuse) -> Source:
    """The rows of a split. Problems of single rows or files go to `tell`.

    Raises LimnerError when there is nothing to read.
    """
    return find(source, tell).open(split)


def find(source: str, tell: Tell = refuse) -> Catalog:
    """What `source` is: a folder (by class, flat, with metadata; of Parquet or tar files; saved by `datasets`), a
    Parquet file, a WebDataset tar, a picture, a data set on Hugging Face's hub as `owner/name[:configuration]`, or tar
    or Parquet files by pattern (`shards/{0000..0009}.tar`) or address (`s3://bucket/folder`).

    Raises LimnerError when it is none of these, or empty.
    """
    for prefix in _HUB_PREFIXES:
        if source.startswith(prefix):
            return Catalog(source, hub.hub_splits(source.removeprefix(prefix)))
    if is_url(source):
        return _files(source, tell)
    try:
        path = Path(source).expanduser()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise LimnerError(f"{printable(source)}: is not a path ({reason(error)})") from None
    if exists:
        return _folder(path, tell) if path.is_dir() else _file(path, tell)
    if is_pattern(source):
        return _files(str(path), tell)
    if _HUB_NAME.fullmatch(source) and not path.parent.exists() and path.suffix not in (".parquet", ".tar"):
        return Catalog(source, hub.hub_splits(source, missing_here=True))
    raise LimnerError(f"{printable(source)}: no such file or folder")


def _files(pattern: str, tell: Tell) -> Catalog:
    """Tar or Parquet files that a pattern or an address stands for."""
    try:
        files = expand(pattern)
    except OSError as error:
        raise LimnerError(f"{printable(pattern)}: cannot be read ({reason(error)})") from None
    packed = {file.name.lower().endswith(".parquet") for file in files}
    if len(packed) > 1:
        raise LimnerError(f"{printable(pattern)}: stands for tar and Parquet files; it should be one sort")
    splits = tables.parquet_splits if packed.pop() else tars.tar_splits
    common = len(os.path.commonpath([str(file.parent).replace("://", ":") for file in files]))
    names = (str(file).replace("://", ":")[common:].lstrip("/") for file in files)
    groups = grouped((split_of(PurePath(name)), file) for name, file in zip(names, files, strict=True))
    return Catalog(pattern, splits(pattern, groups, tell))


def _file(path: Path, tell: Tell) -> Catalog:
    name = str(path)
    if path.name in METADATA:
        return _folder(path.parent, tell)
    if path.name.lower().endswith(_PACKED):
        raise LimnerError(f"{name}: {_UNPACK}")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return Catalog(name, tables.parquet_splits(name, {"train": [path]}, tell))
    if suffix == ".tar":
        return Catalog(name, tars.tar_splits(name, {"train": [path]}, tell))
    if suffix in hub.BUILDERS:
        return Catalog(name, hub.file_splits(path))
    if suffix not in EXTENSIONS:
        _refuse_unless_picture(path)
    return Catalog(name, folders.folder_splits(Listing(path.parent, pictures=[path.name]), tell))


def _refuse_unless_picture(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            opened(file.read())
    except PictureError:
        raise LimnerError(
            f"{path}: is neither a picture nor a data set; give a folder, Parquet, WebDataset tar or hub name"
        ) from None
    except OSError as error:
        raise LimnerError(f"{path}: cannot be read ({reason(error)})") from None


def _folder(root: Path, tell: Tell) -> Catalog:
    """Metadata beats Parquet beats tars beats loose pictures: a data set on the hub often has a few in its README."""
    name = str(root)
    if hub.is_saved(root):
        return Catalog(name, hub.saved_splits(root))
    listing = walk(root, tell)
    notes = [f"folder '{empty}' is empty" for empty in listing.empty]
    if not listing.metadata:
        for files, kind, splits in (
            (listing.parquet, "Parquet files", tables.parquet_splits),
            (listing.tars, "tar files", tars.tar_splits),
        ):
            if files:
                if listing.pictures:
                    notes.append(f"reading the {kind}; {len(listing.pictures)} pictures beside them are left out")
                return Catalog(name, splits(name, group_by_split(root, files), tell), tuple(notes))
    if listing.pictures or listing.metadata:
        return Catalog(name, folders.folder_splits(listing, tell), tuple(notes))
    if any(Path(file).suffix.lower() in hub.BUILDERS for file in listing.others):
        return Catalog(name, hub.hub_splits(name), tuple(notes))
    for file in listing.others:
        if file.lower().endswith(_PACKED):
            tell(Problem(Place(str(root / file)), _UNPACK))
    found = f"; it has {len(listing.others)} other files, such as {listing.others[0]}" if listing.others else ""
    raise LimnerError(f"{name}: holds no pictures, Parquet files or WebDataset tars{found}")
