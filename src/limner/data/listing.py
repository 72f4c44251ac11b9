"""What files a folder holds, sorted by what they are."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from limner.data.sources import Place, Problem, Tell
from limner.data.text import reason
from limner.data.transforms import EXTENSIONS

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass
class Listing:
    """Files of a folder as paths relative to `root`, with forward slashes, sorted."""

    root: Path
    pictures: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    parquet: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    """Folders with nothing in them."""


def walk(root: Path, tell: Tell) -> Listing:
    """All files below a folder. Hidden ones are passed over, links followed (once), unreadable folders told."""

    def unreadable(error: OSError) -> None:
        tell(Problem(Place(str(error.filename)), f"cannot be read ({reason(error)})"))

    listing = Listing(root)
    by_suffix = {".parquet": listing.parquet, ".tar": listing.tars}
    seen = set()
    for folder, folders, files in os.walk(root, onerror=unreadable, followlinks=True):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        inside = PurePath(os.path.relpath(folder, root))
        if not folders and not files and inside.parts:
            listing.empty.append(inside.as_posix())
        for name in sorted(files):
            if name.startswith(".") or name in ("Thumbs.db", "desktop.ini"):
                continue
            suffix = os.path.splitext(name)[1].lower()
            among = listing.pictures if suffix in EXTENSIONS else by_suffix.get(suffix, listing.others)
            (listing.metadata if name in METADATA else among).append((inside / name).as_posix())
    return listing
