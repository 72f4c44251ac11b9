"""Which files of a folder lie on other pictures: semantic maps and masks beside their pictures, by name.

| where | such as |
| --- | --- |
| in a parallel folder | `images/a.jpg` and `semantic_maps/a.png`, with a folder for each split above or below |
| beside it, its role before the suffix | `a.jpg` and `a.map.png`, `a.mask.png` |
| beside it, the same stem | `a.jpg` and `a.png`, where that is a single-channel PNG: a semantic map |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from limner.data.transforms import PictureError, opened

MAP, MASK = "semantic_map", "mask"
_ROLES = {
    MAP: ("semantic_map", "semantic_maps", "map", "maps", "seg", "segmentation", "segmentations", "annotations"),
    MASK: ("mask", "masks"),
}
_ROLE_OF = {word: role for role, words in _ROLES.items() for word in words}
_PICTURES = ("image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "jpegimages")


@dataclass
class Pairs:
    """pictures: the files that remain. overlays: by role and picture, the file that lies on it."""

    pictures: list[str]
    overlays: dict[str, dict[str, str]] = field(default_factory=dict)

    def columns(self, files: list[str]) -> dict[str, list[str | None]]:
        """The files on these pictures, row by row, for each role that any of them has."""
        found = {role: [known.get(file) for file in files] for role, known in self.overlays.items()}
        return {role: column for role, column in found.items() if any(column)}


def paired(root: Path, files: list[str]) -> Pairs:
    """Tell pictures from what lies on them. A file that could be a map or a mask and has no picture is a picture."""
    pairs = Pairs(files)
    for rule in (_by_folder, _by_word):
        _take(pairs, rule)
    count = Counter(file.rpartition(".")[0] for file in pairs.pictures)
    _take(pairs, lambda file: _by_stem(root, file, count))
    return pairs


Rule = Callable[[str], tuple[str | None, str]]
"""The role of a file (None: a picture) and the key that it shares with its picture."""


def _take(pairs: Pairs, rule: Rule) -> None:
    roles = {file: rule(file) for file in pairs.pictures}
    keys = {key: file for file, (role, key) in roles.items() if role is None}
    taken = set()
    for file, (role, key) in roles.items():
        if role is not None and key in keys:
            pairs.overlays.setdefault(role, {})[keys[key]] = file
            taken.add(file)
    pairs.pictures = [file for file in pairs.pictures if file not in taken]


def _by_folder(file: str) -> tuple[str | None, str]:
    path = PurePosixPath(file)
    folders = [part.lower() for part in path.parts[:-1]]
    role = next((_ROLE_OF[part] for part in folders if part in _ROLE_OF), None)
    left = [part for part in folders if part not in _ROLE_OF and part not in _PICTURES]
    return role, "/".join([*left, path.stem])


def _by_word(file: str) -> tuple[str | None, str]:
    stem = str(PurePosixPath(file).with_suffix(""))
    before, _, word = stem.rpartition(".")
    role = _ROLE_OF.get(word.lower())
    return role, before if role else stem


def _by_stem(root: Path, file: str, count: Counter[str]) -> tuple[str | None, str]:
    stem, _, suffix = file.rpartition(".")
    lies = suffix.lower() == "png" and count[stem] == 2 and _is_single_channel(root / file)
    return MAP if lies else None, stem


def _is_single_channel(path: Path) -> bool:
    try:
        return opened(path.read_bytes()).mode in ("L", "P", "1")
    except (OSError, PictureError):
        return False
