"""Whatever else the library `datasets` reads: names on Hugging Face's hub, folders it saved, Arrow, JSON, CSV."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.data.sources import Absent, Column, Encoded, FileSpan, Place, Source, encoded
from limner.data.splits import in_order
from limner.data.tables import arrow_columns
from limner.data.text import reason
from limner.errors import LimnerError

if TYPE_CHECKING:
    import datasets

BUILDERS = {".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}
"""The builder of `datasets` for each suffix that Limner does not read by itself."""

_PROBE_S = 10
_BATCH = 256


@dataclass
class HubSource(Source):
    """A map-style data set of the library `datasets`. `folder` is what relative paths start from."""

    rows: datasets.Dataset
    folder: Path

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, row: int) -> Place:
        return Place(self.name, row=row)

    def pictures(self, column: str) -> Iterator[Encoded]:
        for batch in self.rows.select_columns([column]).with_format(None).iter(_BATCH):
            for value in batch[column]:  # type: ignore[index]
                yield self._encoded(value)

    def values(self, column: str) -> list[Any]:
        return list(self.rows.with_format(None)[column])

    def fingerprint(self) -> str:
        return str(self.rows._fingerprint)

    def _encoded(self, value: Any) -> Encoded:
        """As `encoded`, but absolute paths are allowed: `datasets` points into its own cache."""
        if isinstance(value, dict) and value.get("bytes") is None and isinstance(value.get("path"), str):
            path = Path(value["path"])
            return FileSpan(path) if path.is_absolute() else encoded(value["path"], self.folder)
        return Absent() if value is None else encoded(value, self.folder)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def saved_splits(folder: Path) -> dict[str, Callable[[], Source]]:
    """The splits of a folder that `save_to_disk` wrote."""
    import datasets

    loaded = _asked(str(folder), lambda: datasets.load_from_disk(str(folder)))
    return _splits(str(folder), loaded, folder)


def file_splits(path: Path) -> dict[str, Callable[[], Source]]:
    """A file that a builder of `datasets` reads."""
    import datasets

    builder = BUILDERS[path.suffix.lower()]
    loaded = _asked(str(path), lambda: datasets.load_dataset(builder, data_files=str(path)))
    return _splits(str(path), loaded, path.parent)


def hub_splits(name: str, *, missing_here: bool = False) -> dict[str, Callable[[], Source]]:
    """A name on the hub (`owner/name[:configuration]`), or a folder that `datasets` understands.

    `missing_here`: the name was looked for as a path first, which the message then says. Raises LimnerError.
    """
    import datasets

    if Path(name).is_dir():
        loaded = _asked(name, lambda: datasets.load_dataset(name))
        return _splits(name, loaded, Path(name))
    repository, _, configuration = name.partition(":")
    _probe(repository, "no such file or folder, and " if missing_here else "")
    splits = _asked(name, lambda: datasets.get_dataset_split_names(repository, configuration or None))

    def load(split: str) -> Source:
        loaded = _asked(name, lambda: datasets.load_dataset(repository, configuration or None, split=split))
        return _source(name, split, loaded, Path())

    return in_order({str(split): partial(load, str(split)) for split in splits})


def _probe(name: str, before: str) -> None:
    """Fail within seconds, where `datasets` would try for half a minute."""
    import datasets.config
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if datasets.config.HF_HUB_OFFLINE:
        return
    try:
        HfApi().dataset_info(name, timeout=_PROBE_S)
    except RepositoryNotFoundError:
        raise LimnerError(f"{name}: {before}no data set of that name on Hugging Face's hub") from None
    except Exception as error:  # the HTTP client's own exceptions have no common base that is stable
        raise LimnerError(
            f"{name}: {before}Hugging Face's hub cannot be asked ({reason(error)}); "
            f"HF_HUB_OFFLINE=1 uses what was downloaded before"
        ) from None


def _asked(name: str, load: Callable[[], Any]) -> Any:
    """What `datasets` answers. Its builders raise exceptions of many kinds; each becomes one line."""
    try:
        return load()
    except Exception as error:
        cause = error.__cause__ or error
        raise LimnerError(f"{name}: `datasets` cannot read it ({reason(cause)})") from None


def _splits(name: str, loaded: Any, folder: Path) -> dict[str, Callable[[], Source]]:
    rows = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    return in_order({str(split): partial(_source, name, str(split), part, folder) for split, part in rows.items()})


def _source(name: str, split: str, rows: Any, folder: Path) -> HubSource:
    import datasets

    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    columns: dict[str, Column] = arrow_columns(rows.features.arrow_schema)
    return HubSource(name, split, columns, rows=rows, folder=folder)
