"""The models that a studio has: runs and checkpoints, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from limner import api, zoo
from limner.errors import LimnerError, suggest
from limner.generator import Generator
from limner.guide import NoisyClassifier


@dataclass(frozen=True)
class Shelf:
    """generators: what draws, by name. paths: where each was read. guides: of a generator by name, the classifier that
    was trained for it. runs: directories to watch, by name; a run that has no weights yet is here alone."""

    generators: Mapping[str, Generator]
    paths: Mapping[str, str] = field(default_factory=dict)
    guides: Mapping[str, NoisyClassifier] = field(default_factory=dict)
    runs: Mapping[str, Path] = field(default_factory=dict)

    def named(self, model: str | None) -> str:
        """The name of a model, of the first for None. Raises LimnerError with the nearest names."""
        name = next(iter(self.generators), "") if model is None else model
        if name not in self.generators:
            raise LimnerError(f"model '{name}': there is none such here{suggest(name, self.generators)}")
        return name

    @staticmethod
    def open(paths: Sequence[str | Path]) -> Shelf:
        """Load what the paths name; a run without weights is kept to be watched. Raises LimnerError."""
        if not paths:
            raise LimnerError("no run: name at least one to draw with or to watch")
        names = _names([Path(path) for path in paths])
        generators: dict[str, Generator] = {}
        classifiers: list[NoisyClassifier] = []
        runs: dict[str, Path] = {}
        for name, path in zip(names, (zoo.located(path) for path in paths), strict=True):
            if (path / "config.yaml").is_file():
                runs[name] = path
                if not (path / "model.safetensors").is_file():
                    continue
            loaded = api.load(path)
            if isinstance(loaded, NoisyClassifier):
                classifiers.append(loaded)
            elif loaded.config.task == "diffusion":
                generators[name] = loaded
        where = {name: str(path) for name, path in zip(names, paths, strict=True)}
        return Shelf(generators, where, dict(_matches(generators, classifiers)), runs)


def _matches(generators: Mapping[str, Generator],
             classifiers: Iterable[NoisyClassifier]) -> Iterable[tuple[str, NoisyClassifier]]:  # fmt: skip
    """Each classifier with every generator that it fits. Raises LimnerError for one that fits none."""
    for classifier in classifiers:
        refusal: LimnerError | None = None
        fits = False
        for name, generator in generators.items():
            try:
                classifier.fitted(generator.config).refuse_unfit(generator.config)
                fits = True
                yield name, classifier
            except LimnerError as error:
                refusal = error
        if not fits:
            raise refusal or LimnerError("a classifier alone draws nothing; name a diffusion run beside it")


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as tell them apart."""
    absolute = [path.absolute() for path in paths]
    if len(set(absolute)) < len(absolute):
        raise LimnerError("a run is named twice")
    names = []
    for path in absolute:
        length = 1
        while sum(other.parts[-length:] == path.parts[-length:] for other in absolute) > 1:
            length += 1
        names.append("/".join(path.parts[-length:]).lstrip("/"))
    return names
