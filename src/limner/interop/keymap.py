"""Strict renaming of weights: the engine under every importer and exporter.

A table is a list of rules from names in one format to names in another. `{x}` in a name stands for one part between
dots, `{i}`, `{j}`, `{k}` for integers, and `{i-1}` for an integer one less than i, so that `input_blocks.{i}.0` can
become `down.{i-1}.0`. A rule may join several weights into one or split one into several, and may carry a `Change`,
which is explicit about permutations and has an inverse. Every source weight is used exactly once or named by an
allow-list, every target is given exactly once and has the right shape; anything else is an error that names the
weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from limner.errors import LimnerError

Weights = Mapping[str, Tensor]
Shapes = Mapping[str, Sequence[int]]


class Change(NamedTuple):
    """A reversible change of the weights of one rule: sources -> targets, and back."""

    forward: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    backward: Callable[[Sequence[Tensor]], Sequence[Tensor]]

    def then(self, other: Change) -> Change:
        return Change(
            lambda parts: other.forward(self.forward(parts)), lambda parts: self.backward(other.backward(parts))
        )


@dataclass(frozen=True)
class Rule:
    """`sources` become `targets`, changed by `change` where there is one."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    change: Change | None = None

    def under(self, source: str, target: str) -> Rule:
        """The same rule with a prefix before the names on each side."""
        return Rule(tuple(source + s for s in self.sources), tuple(target + t for t in self.targets), self.change)

    def reversed(self) -> Rule:
        """The rule that undoes this one."""
        change = self.change and Change(self.change.backward, self.change.forward)
        return Rule(self.targets, self.sources, change)


def rule(source: str | tuple[str, ...], target: str | tuple[str, ...], change: Change | None = None) -> Rule:
    """A rule for all the parameters of a layer (`weight`, `bias`): the names get `.{p}` at their end."""
    sources = (source,) if isinstance(source, str) else source
    targets = (target,) if isinstance(target, str) else target
    return Rule(tuple(f"{s}.{{p}}" for s in sources), tuple(f"{t}.{{p}}" for t in targets), change)


def under(source: str, target: str, rules: Iterable[Rule]) -> list[Rule]:
    """A table with a prefix before the names on each side."""
    return [one.under(source, target) for one in rules]


def reverse(rules: Iterable[Rule]) -> list[Rule]:
    """The table that undoes a table: an exporter from an importer."""
    return [one.reversed() for one in rules]


# --- changes ----------------------------------------------------------------------------------------------------


def per_weight(forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Change:
    """A change that treats every weight of the rule alike."""
    return Change(lambda parts: [forward(x) for x in parts], lambda parts: [backward(x) for x in parts])


def pointwise(dims: int) -> Change:
    """A convolution of kernel 1 over `dims` dimensions (O, I, 1, ...) becomes a linear layer (O, I)."""
    return per_weight(
        lambda x: x.flatten(1) if x.ndim == 2 + dims else x,
        lambda x: x.reshape(*x.shape, *(1,) * dims) if x.ndim == 2 else x,
    )


def joined(parts: int) -> Change:
    """`parts` equal weights become one, along their rows: Q, K and V in one matrix."""
    return Change(lambda xs: [torch.cat(list(xs))], lambda xs: list(xs[0].chunk(parts)))


TRANSPOSED = per_weight(lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1))


def heads_inside(heads_of: Callable[[int], int]) -> Change:
    """Rows ordered (head, q/k/v, channel), as in guided-diffusion's legacy attention, become (q/k/v, head, channel).

    `heads_of` gives the number of heads from the number of channels, a third of the rows.
    """

    def forward(x: Tensor) -> Tensor:
        heads = heads_of(len(x) // 3)
        return x.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)

    def backward(x: Tensor) -> Tensor:
        heads = heads_of(len(x) // 3)
        return x.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)

    return per_weight(forward, backward)


# --- the engine ---------------------------------------------------------------------------------------------------


class Converted(Mapping[str, Tensor]):
    """Weights under their new names, each made when it is asked for: a conversion holds one in memory at a time.

    shapes: of all of them, by name. Weights that are only renamed are not copied. as_float32: floating-point weights
    come out in float32 (many checkpoints are saved in half precision).
    """

    def __init__(self, weights: Weights, made: Mapping[str, _Made], *, as_float32: bool = False) -> None:
        self._weights, self._made, self._as_float32 = weights, made, as_float32
        self.shapes = {name: one.shape for name, one in made.items()}

    def __getitem__(self, name: str) -> Tensor:
        made = self._made[name]
        values = [self._weights[part] for part in made.parts]
        value = values[0] if made.change is None else made.change.forward(values)[made.place]
        return value.float() if self._as_float32 and value.is_floating_point() else value

    def __contains__(self, name: object) -> bool:
        return name in self._made

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


class _Made(NamedTuple):
    """How one weight is made: number `place` of what `change` makes of the source weights `parts`."""

    parts: Sequence[str]
    change: Change | None
    place: int
    shape: tuple[int, ...]


def convert(weights: Weights, rules: Sequence[Rule], targets: Shapes | None, *, where: str,
            ignore: Sequence[str] = (), as_float32: bool = False) -> Converted:  # fmt: skip
    """Apply a table: checked here, as a whole; carried out weight by weight, when each is asked for.

    weights: the source. targets: name -> shape of every weight wanted; None: whatever the table gives. ignore: names,
    or patterns with `*`, of source weights that may go unused. Raises LimnerError, naming the weight, when a source
    weight is unknown or used twice, a target is missing, given twice or unknown, or a shape differs.
    """
    used: dict[str, Rule] = {}
    result: dict[str, _Made] = {}
    shapes = {name: torch.empty_like(weight, device="meta") for name, weight in weights.items()}
    for one in rules:
        for parts, fields in _occurrences(one, weights, where):
            for name in parts:
                if name in used:
                    raise LimnerError(f"{where}: weight '{name}' is claimed by two rules")
                used[name] = one
            values = _changed(one, [shapes[name] for name in parts], parts[0], where)
            for index, (target, value) in enumerate(zip(one.targets, values, strict=True)):
                name, made = _fill(target, fields), _Made(parts, one.change, index, tuple(value.shape))
                _accept(name, made, targets, result, where)
    _check_leftovers([name for name in weights if name not in used], ignore, where)
    missing = [name for name in targets or () if name not in result]
    if missing:
        raise LimnerError(f"{where}: weight '{_source_of(missing[0], rules)}' is missing{_more(missing)}")
    return Converted(weights, result, as_float32=as_float32)


def _changed(applied: Rule, values: Sequence[Tensor], name: str, where: str) -> Sequence[Tensor]:
    if applied.change is None:
        return values
    try:
        return applied.change.forward(values)
    except RuntimeError:
        shape = tuple(values[0].shape)
        raise LimnerError(f"{where}: weight '{name}' has the shape {shape}, which doesn't fit its place") from None


def _accept(name: str, made: _Made, targets: Shapes | None, result: dict[str, _Made], where: str) -> None:
    source = made.parts[0]
    if targets is not None and name not in targets:
        raise LimnerError(f"{where}: weight '{source}' has no place in the network that the settings describe")
    if name in result:
        raise LimnerError(f"{where}: weight '{source}' would be loaded to a place that is already taken")
    if targets is not None and made.shape != tuple(targets[name]):
        right = tuple(targets[name])
        raise LimnerError(f"{where}: weight '{source}' gives the shape {made.shape}, the network has {right}")
    result[name] = made


def _check_leftovers(left: list[str], ignore: Sequence[str], where: str) -> None:
    unknown = [name for name in left if not any(fnmatchcase(name, pattern) for pattern in ignore)]
    if unknown:
        raise LimnerError(f"{where}: weight '{unknown[0]}' is unknown{_more(unknown)}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


# --- names with fields -------------------------------------------------------------------------------------------

_FIELD = re.compile(r"\{(\w+?)([+-]\d+)?\}")
_INTEGERS = ("i", "j", "k")


@lru_cache(maxsize=4096)
def _pattern(name: str) -> tuple[re.Pattern[str], tuple[tuple[str, int], ...]]:
    """A name with fields as a regular expression, and the field and offset of each of its groups."""
    expression, fields, end = "", [], 0
    for field in _FIELD.finditer(name):
        expression += re.escape(name[end : field.start()]) + (r"(\d{1,6})" if field[1] in _INTEGERS else r"([^.]+)")
        fields.append((field[1], int(field[2] or 0)))
        end = field.end()
    return re.compile(expression + re.escape(name[end:])), tuple(fields)


def _match(pattern: str, name: str) -> dict[str, str] | None:
    expression, fields = _pattern(pattern)
    found = expression.fullmatch(name)
    if found is None:
        return None
    return {
        field: str(int(text) - offset) if field in _INTEGERS else text
        for (field, offset), text in zip(fields, found.groups(), strict=True)
    }


def _fill(pattern: str, fields: Mapping[str, str]) -> str:
    return _FIELD.sub(lambda m: str(int(fields[m[1]]) + int(m[2])) if m[2] else fields[m[1]], pattern)


def _occurrences(applied: Rule, weights: Weights, where: str) -> Iterable[tuple[list[str], dict[str, str]]]:
    """Every set of source weights that a rule applies to, with what its fields stand for."""
    for name in weights:
        fields = _match(applied.sources[0], name)
        if fields is None:
            continue
        parts = [_fill(source, fields) for source in applied.sources]
        absent = next((part for part in parts if part not in weights), None)
        if absent is not None:
            raise LimnerError(f"{where}: weight '{absent}' is missing")
        yield parts, fields


def _source_of(target: str, rules: Sequence[Rule]) -> str:
    """What the file should have called a target: for error messages."""
    for one in rules:
        for pattern in one.targets:
            fields = _match(pattern, target)
            if fields is not None:
                return _fill(one.sources[0], fields)
    return target
