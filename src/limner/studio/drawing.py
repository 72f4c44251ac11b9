"""Several requests as one batch: drawn together, each picture as if it were drawn alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from limner.core.noise import initial_noise, step_noise
from limner.core.types import OnStep
from limner.errors import LimnerError
from limner.generator import Generator, to_uint8
from limner.guide import NoisyClassifier
from limner.outputs import Picture
from limner.redraw import further_facts
from limner.studio.jobs import Request


class StepNoises(Sequence[Tensor]):
    """The noise of each step for pictures of several seeds, drawn when it is asked for: item k is (B, C, H, W).

    There is noise beyond the last step too: a sampler that goes back and forth takes more than one a step.
    """

    def __init__(self, requests: Sequence[Request], shape: tuple[int, ...], steps: int) -> None:
        self._parts = [step_noise(request.seed, request.numbers, shape) for request in requests]
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    @overload
    def __getitem__(self, step: int) -> Tensor: ...
    @overload
    def __getitem__(self, step: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, step: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(step, slice):
            return [self[k] for k in range(*step.indices(self._steps))]
        return torch.cat([part(step) for part in self._parts])


def draw(generator: Generator, requests: Sequence[Request], guide: NoisyClassifier | None = None,
         on_step: OnStep | None = None) -> list[list[Picture]]:  # fmt: skip
    """The pictures of each request; all requests have one `key`. Raises LimnerError, and whatever `on_step` raises."""
    num = sum(request.num for request in requests)
    settings = requests[0].settings
    shape = generator.shape_for(requests[0].size, guide if requests[0].classifier else None)
    first = torch.cat([initial_noise(r.seed, r.numbers, shape) for r in requests])
    noises = StepNoises(requests, shape, generator.schedule.path(settings.steps, settings.spacing).steps)
    stream = generator.stream(
        num=num,
        batch=num,
        initial_noise=first,
        step_noise=noises,
        on_step=on_step,
        **joined([request.conditions for request in requests]),
        **options_of(requests[0], guide),
    )
    (drawn,) = stream
    pixels = to_uint8(generator.finished(drawn))
    found, start = [], 0
    for request in requests:
        told = [further_facts(request.conditions, row) for row in range(request.num)]
        found.append([Picture(number, pixels[start + k], {**drawn.facts[start + k], **told[k]})
                      for k, number in enumerate(request.numbers)])  # fmt: skip
        start += request.num
    return found


def options_of(request: Request, guide: NoisyClassifier | None) -> dict[str, Any]:
    """The settings of a request as keywords of `Generator.stream`, with the classifier where it acts."""
    settings: dict[str, Any] = {field.name: getattr(request.settings, field.name) for field in fields(request.settings)}
    if request.classifier:
        settings["classifier"] = guide
    further = {"strength": request.strength, "size": request.size}
    return settings | {name: value for name, value in further.items() if value is not None}


def check(generator: Generator, request: Request, guide: NoisyClassifier | None) -> None:
    """Raises LimnerError for whatever doesn't fit the model; draws nothing."""
    generator.stream(num=request.num, **request.conditions, **options_of(request, guide))


def expanded(values: Any, num: int) -> Any:
    """A condition of one or many pictures as one value for each of `num`, in rotation. Raises LimnerError for none."""
    if isinstance(values, str | int | float) or not hasattr(values, "__len__"):
        return [values] * num
    if len(values) == 0:
        raise LimnerError("conditions: an empty list; one value, or one for each picture, would do")
    rows = [k % len(values) for k in range(num)]
    return values[rows] if isinstance(values, Tensor | np.ndarray) else [values[row] for row in rows]


def joined(conditions: Sequence[Any]) -> dict[str, Any]:
    """The conditions of several requests as those of one batch, by option."""
    return {name: _joined([each[name] for each in conditions]) for name in conditions[0]}


def _joined(parts: Sequence[Any]) -> Any:
    joiners: dict[type, Callable[[Any], Any]] = {Tensor: torch.cat, np.ndarray: np.concatenate}
    for kind, join in joiners.items():
        if isinstance(parts[0], kind):
            return join(parts)
    return [value for part in parts for value in part]
