"""Recipes read, overridden and written; what is wrong with one, in one line."""

from __future__ import annotations

import reprlib
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from limner.config.run import RunConfig
from limner.errors import LimnerError, suggest

MOST_VALUES = 100_000
"""In a recipe, aliases written out."""


def parse(raw: dict[str, Any], where: str) -> RunConfig:
    """Validate a recipe. Raises LimnerError naming the file, the key and what would be right."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise LimnerError(f"{where}: {_explain(error, raw)}") from None


def load(path: str | Path) -> RunConfig:
    """Read `config.yaml`. Raises LimnerError when it is missing or wrong."""
    return parse(read_yaml(path), str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping; LimnerError when the file is missing, is not YAML, or is something else."""
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise LimnerError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none is a ValueError
        raise LimnerError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not _fits(raw):
        raise LimnerError(f"{path}: its aliases stand for more than {MOST_VALUES:,} values")
    if not isinstance(raw, dict):
        raise LimnerError(f"{path}: should be a mapping of keys to values, is a {type(raw).__name__}")
    return raw


def _fits(raw: Any) -> bool:
    """Whether a few anchors and aliases don't stand for more than memory holds, or for themselves."""
    left, waiting = MOST_VALUES, [raw]
    while waiting and left:
        node, left = waiting.pop(), left - 1
        if isinstance(node, dict | list):
            waiting.extend(islice(node.values() if isinstance(node, dict) else node, left + 1))
    return not waiting


def dump(config: RunConfig, path: str | Path) -> None:
    """Write the recipe as YAML."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
    Path(path).write_text(text, encoding="utf-8")


def override(raw: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Apply `a.b.0.c=value` settings (values in YAML) to a copy of a recipe. Raises LimnerError on bad syntax."""
    result = yaml.safe_load(yaml.safe_dump(raw))
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise LimnerError(f"--set {setting}: should be KEY=VALUE, such as training.batch=32")
        *parents, leaf = name.split(".")
        node: Any = result
        for key in parents:
            if isinstance(node, list):
                node = node[_index(node, key, setting)]
                continue
            if not isinstance(node, dict):
                raise LimnerError(f"--set {setting}: '{key}' has nothing below it")
            node = node.setdefault(key, {})
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise LimnerError(f"--set {setting}: '{text[:80]}' is not a YAML value") from None
        if not _fits(value):
            raise LimnerError(f"--set {setting[:80]}: its aliases stand for more than {MOST_VALUES:,} values")
        if isinstance(node, list):
            node[_index(node, leaf, setting)] = value
        elif isinstance(node, dict):
            node[leaf] = value
        else:
            raise LimnerError(f"--set {setting}: '{leaf}' cannot be set there")
    return result


def _index(node: list[Any], key: str, setting: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise LimnerError(f"--set {setting}: '{key}' should be an index below {len(node)}")
    return int(key)


def _explain(error: ValidationError, raw: dict[str, Any]) -> str:
    """The first validation error in one line, with the nearest known key for an unknown one."""
    first = error.errors()[0]
    place = [part for part in first["loc"] if part not in _UNION_TAGS]
    name = ".".join(str(part) for part in place) or "recipe"
    if first["type"] == "extra_forbidden":
        return f"unknown key '{name}'{suggest(str(place[-1]), _siblings(first['loc']))}"
    return f"{name}: {first['msg'].removeprefix('Value error, ')} (is {_BRIEF.repr(first['input'])})"[:400]


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 200

_UNION_TAGS = frozenset(
    "linear scaled_linear discrete_cosine table cosine rectified_flow unet classifier autoencoder kl vq "
    "label text image bpe words pretrained pixels latent".split()
)


def _siblings(loc: tuple[int | str, ...]) -> list[str]:
    """Names allowed where an unknown key stood, found by walking the models along `loc`."""
    models: list[type[BaseModel]] = [RunConfig]
    for part in loc[:-1]:
        following: list[type[BaseModel]] = []
        for model in models:
            if part in model.model_fields:
                following += _sections(model.model_fields[part].annotation)
            elif part in _UNION_TAGS and model.model_fields.get("kind") is not None:
                following += [model] if model.model_fields["kind"].default == part else []
            elif isinstance(part, int):
                following.append(model)
        models = following or models
    return [name for model in models for name in model.model_fields]


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in getattr(annotation, "__args__", ()) for found in _sections(inner)]
