"""What is in a data set, and what is wrong with it, before any training: `limner check DATA`.

Nothing stops it: every picture of every split is decoded, and every problem is listed with its file and line.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from limner.config import DataConfig
from limner.data import transforms
from limner.data.catalog import find
from limner.data.check_conditions import Overlays
from limner.data.pixels import Progress, fetch, in_parallel
from limner.data.roles import MISSING, image_role, label_role, read_labels, read_texts, text_role
from limner.data.sources import Encoded, Place, Problem, ShardSource, Source
from limner.data.stream import MOST_CORRUPT
from limner.data.text import printable
from limner.errors import LimnerError

_SHOWN = 1000


class Duplicate(NamedTuple):
    """Rows with exactly the same pixels; `labels` are their class names, `splits` where they stand."""

    places: list[Place]
    splits: list[str]
    labels: list[str]

    def __str__(self) -> str:
        text = " = ".join(str(place) for place in self.places)
        text += f" (labels {', '.join(self.labels)})" if len(self.labels) > 1 else ""
        return text + (f" (in splits {', '.join(self.splits)})" if len(self.splits) > 1 else "")


@dataclass
class Report:
    """What `check` found. Errors (`errors`, `corrupt`) would stop training; the rest is worth knowing."""

    source: str
    rows: dict[str, int] = field(default_factory=dict)
    """Rows of each split."""
    columns: dict[str, str] = field(default_factory=dict)
    """Kind of each column."""
    roles: dict[str, str | None] = field(default_factory=dict)
    """The column that is the image, the label, the text."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(height, width), as seen after EXIF rotation."""
    modes: Counter[str] = field(default_factory=Counter)
    """Such as `RGB`, `grey`, `grey 16-bit`, `palette with transparency`."""
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Rows of each class, by split."""
    caption_lengths: list[int] = field(default_factory=list)
    """In characters."""
    empty_captions: list[Place] = field(default_factory=list)
    corrupt: list[Problem] = field(default_factory=list)
    """Pictures that cannot be used."""
    errors: list[Problem] = field(default_factory=list)
    """Everything else: metadata, labels, columns."""
    orphans: list[Place] = field(default_factory=list)
    """Pictures that no metadata names."""
    duplicates: list[Duplicate] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    overlays: Overlays = field(default_factory=Overlays)
    """Semantic maps, masks and boxes."""

    @property
    def ok(self) -> bool:
        """Whether training could start."""
        return not self.errors and not self.corrupt and any(self.rows.values())

    def to_json(self) -> dict[str, Any]:
        """Everything, as what `json.dumps` takes."""
        return {
            "source": self.source,
            "ok": self.ok,
            "rows": self.rows,
            "columns": self.columns,
            "roles": self.roles,
            "sizes": _size_summary(self.sizes),
            "modes": dict(self.modes.most_common()),
            "classes": self.classes,
            "captions": _captions(self),
            **self.overlays.to_json(),
            "errors": [_located(problem.place, problem.what) for problem in self.errors],
            "corrupt": [_located(problem.place, problem.what) for problem in self.corrupt],
            "orphans": [str(place) for place in self.orphans],
            "duplicates": [
                {"places": [str(place) for place in same.places], "splits": same.splits, "labels": same.labels}
                for same in self.duplicates
            ],
            "notes": self.notes,
        }

    def lines(self, limit: int = _SHOWN) -> list[str]:
        """The report to read, at most `limit` lines of each sort of problem."""
        total = f"{sum(self.rows.values()):,} rows"
        splits = ", ".join(f"{split} {count:,}" for split, count in self.rows.items())
        return [
            f"{self.source}: {total}" + (f" ({splits})" if len(self.rows) > 1 else ""),
            "columns: " + ", ".join(self._column(name) for name in self.columns),
            *_size_lines(self.sizes),
            *([f"modes: {_counts(dict(self.modes.most_common()))}"] if self.modes else []),
            *(f"classes ({split}, {len(counts)}): {_counts(counts)}" for split, counts in self.classes.items()),
            *_caption_lines(self),
            *self.overlays.lines(),
            *(f"note: {note}" for note in self.notes),
            *_listed("error", self.errors, limit),
            *_listed("corrupt", self.corrupt, limit),
            *_listed("empty caption", self.empty_captions, limit),
            *_listed("no metadata", self.orphans, limit),
            *_listed("same pixels", self.duplicates, limit),
            self._verdict(),
        ]

    def _column(self, name: str) -> str:
        role = next((role for role, column in self.roles.items() if column == name), "not used")
        return f"{printable(name)} ({self.columns[name]}: {role})"

    def _verdict(self) -> str:
        wrong = len(self.errors) + len(self.corrupt)
        odd = len(self.empty_captions) + len(self.orphans) + len(self.duplicates)
        warnings = f"{odd:,} warning{'s' if odd != 1 else ''}"
        if self.ok:
            return f"ok, {warnings}" if odd else "ok"
        return f"not ok: {wrong:,} error{'s' if wrong != 1 else ''}, {warnings}"


def check(
    source: str,
    *,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    map_column: str | None = None,
    mask_column: str | None = None,
    boxes_column: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Look at all rows of a data set (of all its splits, or one) and report what is there and what is wrong.

    Raises LimnerError only when there is nothing to look at: no such path, an empty folder, an unknown split.
    """
    named = {"image_column": image_column, "label_column": label_column, "text_column": text_column,
             "map_column": map_column, "mask_column": mask_column, "boxes_column": boxes_column}  # fmt: skip
    config = DataConfig.model_validate(named)
    report = Report(source)
    catalog = find(source, report.errors.append)
    if split is not None:
        opened = [catalog.open(split)]
    else:
        report.notes += catalog.notes
        opened = [part for load in catalog.splits.values() if (part := _attempt(report, load)) is not None]
    seen: dict[bytes, list[tuple[Source, int]]] = {}
    labels: dict[str, list[str]] = {}
    total, done = sum(len(part) for part in opened), 0
    for part in opened:
        report.rows[part.split] = len(part)
        report.columns |= {column.name: column.kind for column in part.columns.values()}
        report.orphans += part.orphans
        report.notes += part.notes
        image = _read_columns(report, part, config, labels)
        if image is not None:
            shift = done
            tick = None if progress is None else lambda row, shift=shift: progress(shift + row, total)
            _look(report, part, image, seen, tick)
        done += len(part)
    if all(isinstance(part, ShardSource) for part in opened):
        report.notes += _skippable(report)
    report.duplicates += [_duplicate(rows, labels) for rows in seen.values() if len(rows) > 1]
    return report


def _skippable(report: Report) -> list[str]:
    """What a stream would make of the corrupt rows."""
    rows, corrupt = sum(report.rows.values()), len(report.corrupt) + len(report.errors)
    if not corrupt or corrupt > MOST_CORRUPT * rows:
        return []
    return [f"{corrupt:,} of {rows:,} rows ({corrupt / rows:.2%}): data.stream=true skips them, and up to 1%"]


def _attempt(report: Report, work: Callable[[], Any]) -> Any:
    """What `work` returns; None where it raises, which is reported."""
    try:
        return work()
    except LimnerError as error:
        problem = Problem(Place(report.source), str(error).removeprefix(f"{report.source}: "))
        if problem not in report.errors:
            report.errors.append(problem)
        return None


def _read_columns(report: Report, source: Source, config: DataConfig, labels: dict[str, list[str]]) -> str | None:
    """Find the roles, read labels and captions. Returns the picture column."""
    image = _attempt(report, lambda: image_role(source, config))
    label = _attempt(report, lambda: label_role(source, config))
    text = _attempt(report, lambda: text_role(source, config, label))
    report.roles |= {"image": image, "label": label, "text": text}
    if label is not None:
        found = _attempt(report, lambda: read_labels(source, label, report.errors.append))
        if found is not None:
            numbers, names = found
            labels[source.split] = [names[number] if number != MISSING else "none" for number in numbers.tolist()]
            counts = Counter(labels[source.split])
            report.classes[source.split] = {name: counts[name] for name in names}
    if text is not None:
        for row, caption in enumerate(_attempt(report, lambda: read_texts(source, text, report.errors.append)) or ()):
            report.caption_lengths.append(len(caption))
            if not caption.strip():
                report.empty_captions.append(source.place(row))
    if image is not None:
        look = report.overlays.look
        found = _attempt(report, lambda: look(source, config, image, report.errors.append, report.notes.append))
        report.roles |= {role: column for role, column in (found or {}).items() if column is not None}
    return image


class _Look(NamedTuple):
    size: tuple[int, int]
    mode: str
    digest: bytes


def _look(
    report: Report,
    source: Source,
    column: str,
    seen: dict[bytes, list[tuple[Source, int]]],
    tick: Callable[[int], None] | None,
) -> None:
    """Decode every picture."""
    row = 0
    try:
        with transforms.quiet():
            for row, look in enumerate(in_parallel(_examine, source.pictures(column)), 1):
                if isinstance(look, transforms.PictureError):
                    report.corrupt.append(Problem(source.picture_place(row - 1), str(look)))
                else:
                    report.sizes[look.size] += 1
                    report.modes[look.mode] += 1
                    seen.setdefault(look.digest, []).append((source, row - 1))
                if tick is not None and (row % 64 == 0 or row == len(source)):
                    tick(row)
    except LimnerError as error:
        report.errors.append(Problem(Place(source.name), str(error).removeprefix(f"{source.name}: ")))


def _examine(encoded: Encoded) -> _Look | transforms.PictureError:
    try:
        data = fetch(encoded)
        mode = transforms.mode_name(transforms.opened(data))
        pixels = transforms.Recipe(channels=4)(data)
    except transforms.PictureError as error:
        return error
    digest = hashlib.blake2b(pixels.data, digest_size=16, key=repr(pixels.shape).encode()).digest()
    return _Look((pixels.shape[1], pixels.shape[2]), mode, digest)


def _duplicate(rows: list[tuple[Source, int]], labels: dict[str, list[str]]) -> Duplicate:
    names = {labels[source.split][row] for source, row in rows if source.split in labels}
    return Duplicate(
        [source.picture_place(row) for source, row in rows],
        sorted({source.split for source, _ in rows}),
        sorted(names),
    )


def _located(place: Place, what: str) -> dict[str, Any]:
    found = {"file": place.file, "line": place.line, "row": place.row, "member": place.member}
    return {key: value for key, value in found.items() if value is not None} | {"what": what}


def _size_summary(sizes: Counter[tuple[int, int]]) -> dict[str, Any]:
    if not sizes:
        return {}
    heights = [height for (height, _), count in sizes.items() for _ in range(count)]
    widths = [width for (_, width), count in sizes.items() for _ in range(count)]
    aspects = [width / height for height, width in zip(heights, widths, strict=True)]
    return {
        "distinct": len(sizes),
        "most_common": [[*size, count] for size, count in sizes.most_common(5)],
        "height": _spread(heights),
        "width": _spread(widths),
        "aspect": {name: round(value, 4) for name, value in _spread(aspects).items()},
    }


def _spread(values: list[Any]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)}


def _captions(report: Report) -> dict[str, Any]:
    if not report.caption_lengths:
        return {}
    empty = [str(place) for place in report.empty_captions]
    return {"characters": _spread(report.caption_lengths), "empty": empty}


def _size_lines(sizes: Counter[tuple[int, int]]) -> list[str]:
    summary = _size_summary(sizes)
    if not summary:
        return []
    if summary["distinct"] == 1:
        ((height, width),) = sizes
        return [f"size: all {width}x{height} (width x height)"]
    parts = [f"{name} {_range(summary[name])}" for name in ("width", "height", "aspect")]
    return [f"sizes: {', '.join(parts)} (min / median / max), {summary['distinct']:,} sizes; set data.size to train"]


def _caption_lines(report: Report) -> list[str]:
    summary = _captions(report)
    if not summary:
        return []
    return [f"captions: {_range(summary['characters'])} characters (min / median / max), {len(summary['empty'])} empty"]


def _range(spread: dict[str, float]) -> str:
    return " / ".join(f"{spread[name]:g}" for name in ("min", "median", "max"))


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{printable(name)} {count:,}" for name, count in counts.items())


def _listed(kind: str, items: Iterable[object], limit: int) -> list[str]:
    lines = [f"{kind}: {item}" for item in items]
    return lines if len(lines) <= limit else [*lines[:limit], f"{kind}: and {len(lines) - limit:,} more"]
