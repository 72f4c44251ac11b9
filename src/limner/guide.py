"""What steers a sampler by a gradient: a noisy classifier, or any log p(y | x_t) that torch can differentiate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from limner import build
from limner.config import RunConfig
from limner.core.denoiser import network_time
from limner.core.types import LogProb
from limner.errors import LimnerError, suggest
from limner.hardware import autocast, best_device
from limner.settings import Settings

Labels = int | str | Sequence[int | str] | Tensor | npt.NDArray[np.integer[Any]]


def label_numbers(labels: Labels, classes: Sequence[str]) -> Tensor:
    """Class numbers (N,) int64 of names or numbers, one or many. Raises LimnerError with the nearest names."""
    if isinstance(labels, int | str):
        labels = [labels]
    each = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else labels
    return torch.tensor([_label_number(label, classes) for label in each], dtype=torch.int64)


def _label_number(label: int | str, classes: Sequence[str]) -> int:
    if isinstance(label, str):
        if label in classes:
            return classes.index(label)
        folded = [name.casefold() for name in classes]
        if folded.count(label.casefold()) == 1:
            return folded.index(label.casefold())
        if not label.lstrip("-").isdigit():
            raise LimnerError(f"label '{label}': there is no such class{suggest(label, classes)}")
    number = int(label)
    if not 0 <= number < len(classes):
        raise LimnerError(f"label {number}: there are {len(classes)} classes, numbered 0 to {len(classes) - 1}")
    return number


@dataclass
class Loaded:
    """Networks ready for use.

    config: their recipe. digest: of the weights. notes: what an importer has to tell of how it read them. int8: whether
    they compute in 8 bits, see `nn/int8.py`; LimnerError where they can't.
    """

    config: RunConfig
    model: build.Model
    digest: str = ""
    device: torch.device = field(default_factory=best_device)
    notes: tuple[str, ...] = ()
    int8: bool = False

    def __post_init__(self) -> None:
        build.ready(self.model, self.device, int8=self.int8)
        self.schedule = build.schedule(self.config)


@dataclass
class NoisyClassifier(Loaded):
    """p(y | x_t, t), trained on noisy images: what `limner.load` gives for a classifier's run or checkpoint."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels, in order."""
        return tuple(self.config.classes or ())

    def logits(self, x_t: Tensor, step: Tensor) -> Tensor:
        """(B, K) at x_t (B, C, H, W) and DDPM steps (B,) int; differentiable by x_t."""
        return self.model.network(x_t.to(self.device), build.step_time(step, self.config).to(self.device))

    def log_prob(self, x_t: Tensor, step: Tensor, label: Labels) -> Tensor:
        """log p(label | x_t) (B,) at DDPM steps (B,) int; differentiable by x_t."""
        return _picked(self.logits(x_t, step), label_numbers(label, self.classes))

    def log_prob_at(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """The same in continuous time t, a scalar or (B,), and with class numbers (B,): what a sampler calls."""
        time = network_time(t, len(x_t), self.schedule, self.config.process.time_input).to(self.device)
        with autocast(self.config.training.precision, self.device):
            return _picked(self.model.network(x_t, time), label)

    def fitted(self, diffusion: RunConfig) -> NoisyClassifier:
        """Itself, or with the diffusion model's schedule where its own isn't known."""
        if self.config.process.schedule_known:
            return self
        update = {"schedule": diffusion.process.schedule, "schedule_known": True}
        process = self.config.process.model_copy(update=update)
        return replace(self, config=self.config.model_copy(update={"process": process}))

    def refuse_unfit(self, diffusion: RunConfig) -> None:
        """Raises LimnerError unless it was trained for this diffusion model: schedule, space, size, classes."""
        own = self.config
        pairs = [
            ("space", own.space.kind, diffusion.space.kind),
            ("picture size", list(build.space_shape(own)), list(build.space_shape(diffusion))),
            ("schedule", _schedule_of(own), _schedule_of(diffusion)),
        ]
        if diffusion.classes and any(section.kind == "label" for section in diffusion.conditions):
            pairs.append(("classes", list(own.classes or ()), list(diffusion.classes)))
        for name, mine, theirs in pairs:
            if mine != theirs:
                raise LimnerError(f"classifier: its {name} is {_short(mine)}, the diffusion model's is "
                                  f"{_short(theirs)}; train one with --task classifier --for RUN")  # fmt: skip


def _schedule_of(config: RunConfig) -> dict[str, Any]:
    return config.process.schedule.model_dump()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _picked(logits: Tensor, label: Tensor) -> Tensor:
    return F.log_softmax(logits.float(), dim=1).gather(1, label.to(logits.device)[:, None])[:, 0]


@dataclass(frozen=True)
class Guide:
    """What steers N pictures: log p(y | x_t), with y, where it is a classifier's label, bound in row by row.

    classifier: any (x_t, t) -> (B,), or a `NoisyClassifier`, with labels (N,) then.
    """

    classifier: Any
    labels: Tensor | None = None

    def log_prob(self, rows: slice, device: torch.device) -> LogProb:
        """(x_t, t) -> (B,) for the pictures `rows`."""
        if self.labels is None:
            return self.classifier
        bound = self.labels[rows].to(device)
        return lambda x, t: self.classifier.log_prob_at(x, t, bound)

    def named(self, rows: slice) -> list[dict[str, Any]] | None:
        """The labels of these pictures as facts, None for a guide without labels."""
        if self.labels is None:
            return None
        classes = self.classifier.classes
        return [{"label": k, "label_name": classes[k]} for k in self.labels[rows].tolist()]

    @staticmethod
    def towards(classifier: Any, label: Labels | None, model_label: Tensor | None, num: int, settings: Settings,
                diffusion: RunConfig) -> Guide | None:  # fmt: skip
        """The guide of N pictures towards `label`, else the diffusion model's own (N,), else its classes in rotation.

        None where there is no classifier. Raises LimnerError for one that doesn't fit the diffusion model.
        """
        if classifier is None:
            return None
        if not isinstance(classifier, NoisyClassifier):
            if not callable(classifier):
                raise LimnerError(f"classifier: a {type(classifier).__name__}; should be a noisy classifier from "
                                  "limner.load, or log_prob(x_t, t) -> (B,)")  # fmt: skip
            return Guide(classifier)
        classifier = classifier.fitted(diffusion)
        classifier.refuse_unfit(diffusion)
        if label is None:
            numbers = torch.arange(len(classifier.classes)) if model_label is None else model_label
        else:
            numbers = label_numbers(label, classifier.classes)
        return Guide(classifier, numbers[torch.arange(num) % len(numbers)])
