"""Running what the documentation tells people to type: the blocks of a page, and a small world to run them in."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from limner import config
from tiny_cli import pictures
from tiny_studio import text_recipe, write_run

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^( *)```(\w*)(?: +(.*?))?\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
NORUN = re.compile(r'norun="([^"]*)"')
CAPTIONS = ["a red heart", "a blue star", "a green apple", "a dog"]
TINY = ("training.batch=4", "training.previews=1", "training.compile=off", "training.warmup_images=4",
        "training.align=0", "sampling.steps=2")  # fmt: skip
LEVEL = "model.levels=[{channels: 32}]"
LATENT = ("model.levels=[{channels: 32, cross_attention: 1}]", "space.autoencoder.levels=[{channels: 32}]",
          "space.training.images=8", "conditions.0.encoder={kind: bpe, vocabulary: 300, width: 32, depth: 1, "
          "head_dim: 32, length: 12}")  # fmt: skip
IMAGES = 8


@dataclass(frozen=True)
class Block:
    """A fenced block. norun: why it can't be run, or None."""

    page: Path
    line: int
    language: str
    norun: str | None
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The commands of a block of the shell, split as a shell would."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        why = NORUN.search(match[3] or "")
        body = re.sub(f"^{match[1]}", "", match[4], flags=re.MULTILINE)
        yield Block(page, text.count("\n", 0, match.start()) + 1, match[2], why and why[1], body)


# --- less of everything ---------------------------------------------------------------------------------------------


def cheap(command: Sequence[str]) -> list[str]:
    """The arguments of a command of Limner with few pictures and few steps; training is `cheap_train`'s."""
    verb, *rest = command[1:]
    if verb not in ("sample", "evaluate") or "--from" in rest:
        return [verb, *rest]
    rest = [*_without(rest, "--steps"), "--steps", "2"]
    if verb == "sample" and "--num" in rest:
        rest[rest.index("--num") + 1] = "2"
    return [verb, *rest]


def cheap_train(train: Callable[..., Any]) -> Callable[..., Any]:
    """`limner.train` with tiny networks on few pictures. A model that is trained on keeps its network."""

    def trained(data: Any = None, **options: Any) -> Any:
        network = LATENT if options.get("preset") == "emoji-text" else () if options.get("init") else (LEVEL,)
        options |= {"images": IMAGES, "budget": None, "settings": [*options.get("settings", ()), *TINY, *network]}
        return train(data, **options)

    return trained


def cheap_evaluate(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """`limner.evaluate` of few pictures."""
    return lambda *given, **options: evaluate(*given, **{**options, "num": 8})


def _without(arguments: Sequence[str], name: str) -> list[str]:
    """Without an option and its value."""
    places = {k + step for k, word in enumerate(arguments) if word == name for step in (0, 1)}
    return [word for k, word in enumerate(arguments) if k not in places]


# --- the world ------------------------------------------------------------------------------------------------------


def world(folder: Path) -> None:
    """What the pages suppose to be there: folders of pictures, and a small model in place of `emoji`, which takes
    longer to draw than a test may."""
    pictures(folder / "photos", each=4)
    for place in ("captioned", "examples/emoji"):
        captioned(folder / place)
    streets(folder / "streets")
    shutil.copyfile(folder / "streets/semantic_maps/000.png", folder / "map.png")
    (folder / "examples/digits").mkdir()
    for place in ("digits.parquet", "examples/digits/train.parquet"):
        pq.write_table(pq.read_table(ROOT / "examples/digits/train.parquet").slice(0, 60), folder / place)
    write_run(folder / "emoji", text_recipe(), CAPTIONS)


def captioned(folder: Path) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for number in range(8):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number:03d}.png")
        lines.append(f'{{"file_name": "{number:03d}.png", "text": "{CAPTIONS[number % len(CAPTIONS)]}"}}')
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def streets(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("images", "semantic_maps"):
        (folder / name).mkdir(parents=True)
    (folder / "classes.txt").write_text("sky\nroad\ncar\n")
    for number in range(6):
        classes = np.repeat(np.repeat(rng.integers(0, 3, (3, 4), dtype=np.uint8), 8, 0), 8, 1)
        Image.fromarray(classes).save(folder / f"semantic_maps/{number:03d}.png")
        colours = np.array([[80, 120, 220], [90, 90, 90], [200, 30, 30]], np.uint8)[classes]
        Image.fromarray(colours).save(folder / f"images/{number:03d}.png")


def is_recipe(content: Any) -> bool:
    """Whether a YAML block is a recipe of Limner's."""
    return isinstance(content, dict) and "model" in content and set(content) <= set(config.RunConfig.model_fields)
