"""What an importer returns, and the last steps that all importers share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from limner import build
from limner.config import AutoencoderConfig, RunConfig, VQConfig
from limner.interop.keymap import Rule, Weights, convert
from limner.interop.safe import warn_of_nan


@dataclass(frozen=True)
class Imported:
    """A foreign checkpoint in Limner's terms.

    config: its recipe. state: the weights for `build.model(config)`, by name, float32, each made when it is asked for.
    notes: what the user should know of how it was read, a line each.
    """

    config: RunConfig
    state: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


def shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a recipe's model; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(x.shape) for name, x in build.model(config).state_dict().items()}


def normalisation(config: AutoencoderConfig, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """The weights of an autoencoder that no other project's file has: what brings its latents to zero mean and unit
    variance, both (c,), and for a codebook the count of idle batches."""
    given = {"autoencoder.latent_mean": mean.float(), "autoencoder.latent_std": std.float()}
    if isinstance(config.regulariser, VQConfig):
        given["autoencoder.quantizer.idle"] = torch.zeros(config.regulariser.codes, dtype=torch.int64)
    return given


def imported(config: RunConfig, weights: Weights, rules: Sequence[Rule], where: str, *, ignore: Sequence[str] = (),
             given: Mapping[str, Tensor] | None = None, notes: Sequence[str] = ()) -> Imported:  # fmt: skip
    """Rename the weights for a recipe, strictly, and make them float32. Warns of NaN; raises LimnerError.

    given: weights that the source says in another way than by a weight of its own.
    """
    given = given or {}
    targets = {name: shape for name, shape in shapes(config).items() if name not in given}
    state = Joined(convert(weights, rules, targets, where=where, ignore=ignore, as_float32=True), given)
    warn_of_nan(state, where)
    return Imported(config, state, tuple(notes))


class Joined(Mapping[str, Tensor]):
    """Several mappings of different names as one."""

    def __init__(self, *parts: Mapping[str, Tensor]) -> None:
        self._parts = parts

    def __getitem__(self, name: str) -> Tensor:
        for part in self._parts:
            if name in part:
                return part[name]
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return any(name in part for part in self._parts)

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self._parts)

    def __len__(self) -> int:
        return sum(map(len, self._parts))


class Below(Mapping[str, Tensor]):
    """What stands below a prefix, by the rest of its name, `without` some; each weight is made when it is asked for."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str, without: Collection[str] = ()) -> None:
        below = {name.removeprefix(prefix): name for name in state if name.startswith(prefix)}
        self._state, self._names = state, {name: whole for name, whole in below.items() if name not in without}

    def __getitem__(self, name: str) -> Tensor:
        return self._state[self._names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
