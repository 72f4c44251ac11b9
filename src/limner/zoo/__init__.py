"""Models that come with Limner, by name: a run's directory each, `zoo/NAME/`, with a card that says what it is.

The card is `README.md`: YAML between two lines of `---`, then words for people. `scripts/ship.py` makes one of a run.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from limner import config
from limner.config import RunConfig
from limner.errors import LimnerError, suggest

_log = logging.getLogger(__name__)

HOME = Path(__file__).parent
WEIGHTS = "model.safetensors"
CARD = "README.md"
MODEL_FILES = ("config.yaml", "model_index.json", "config.json")
"""One of these is in the directory of a run, or of diffusers' models."""


@dataclass(frozen=True)
class Model:
    """What the card and the recipe of a shipped model say.

    draws: in words. conditions: by modality; a classifier's is what it tells. size: (height, width) of the pictures.
    megabytes: of the weights. figures: name, value, low, high (a 95% interval or None), n and notes of each.
    """

    name: str
    task: str
    draws: str
    conditions: tuple[str, ...]
    size: tuple[int, int]
    megabytes: float
    licence: str
    figures: tuple[Mapping[str, Any], ...]

    def facts(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Two lines for people, and one for each figure."""
        height, width = self.size
        what = f"{self.task}, {width}x{height}, {', '.join(self.conditions) or 'nothing asked'}"
        head = [f"{self.name}: {self.draws}", f"  {what}; {self.megabytes:.1f} MB, {self.licence}"]
        return head + [f"  {_figure(each)}" for each in self.figures]


def names() -> list[str]:
    """The models that come with Limner."""
    return sorted(path.parent.name for path in HOME.glob(f"*/{WEIGHTS}"))


def located(path: str | Path) -> Path:
    """Where a model is: the directory of a shipped model for its bare name, else the path itself.

    A model here of that name goes before. Which of the two is taken is said, once, as a warning, where something here
    has that name; `./NAME` always means what is here.
    """
    name, here = str(path), Path(path)
    if name not in names():
        return here
    if not here.exists():
        return HOME / name
    mine = here.is_file() or any((here / file).is_file() for file in MODEL_FILES)
    _say_which(name, mine)
    return here if mine else HOME / name


def suggestion(path: str | Path) -> str:
    """What to add to a message that there is no such path: the nearest of the shipped models, for a bare name."""
    name = str(path)
    bare = Path(name).name == name and "." not in name
    return f", nor a model of that name{suggest(name, names())}" if bare and names() else ""


def models() -> list[Model]:
    """All that come with Limner, by name. Raises LimnerError for a damaged card or recipe."""
    return [read(HOME / name) for name in names()]


def read(folder: Path) -> Model:
    """What a directory of a run with a card says of itself. Raises LimnerError."""
    recipe = config.load(folder / "config.yaml")
    head = front_matter(folder / CARD)
    return Model(
        name=folder.name,
        task=recipe.task,
        draws=str(head.get("summary", "")),
        conditions=told(recipe),
        size=recipe.data.size or (0, 0),
        megabytes=(folder / WEIGHTS).stat().st_size / 1e6,
        licence=str(head.get("license", "unknown")),
        figures=tuple(head.get("figures", ())),
    )


def told(recipe: RunConfig) -> tuple[str, ...]:
    """The modalities that a model is asked by; labels, for a classifier."""
    return ("label",) if recipe.task == "classifier" else tuple(section.kind for section in recipe.conditions)


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the head of a card. Raises LimnerError where there is none."""
    try:
        parts = card.read_text(encoding="utf-8").split("---\n", 2)
        head = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LimnerError(f"{card}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(head, dict):
        raise LimnerError(f"{card}: should begin with YAML between two lines of ---")
    return head


def _figure(figure: Mapping[str, Any]) -> str:
    between = "" if figure.get("low") is None else f" ({figure['low']:.3g} to {figure['high']:.3g})"
    n = f", n = {figure['n']:,}" if figure.get("n") else ""
    return f"{figure['name']} {figure['value']:.3g}{between}{n}"


@functools.cache
def _say_which(name: str, mine: bool) -> None:
    if mine:
        _log.warning("%s: the model here is taken, not the one of that name that comes with Limner", name)
    else:
        _log.warning("%s: the model that comes with Limner is taken; the folder here, ./%s, holds none", name, name)
