"""Training that begins with a trained model: a run, or a checkpoint of another project.

Whatever the two have in common is kept, to the bit: the network, conditioners of the same shapes, the rows of classes
of the same name, the null row. What is new begins with fresh weights. What cannot be taken over is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from limner import build
from limner import config as c
from limner.errors import LimnerError
from limner.nn.words import words_of
from limner.training import lora
from limner.training.checkpoint import Checkpoints

LEARNING_RATE = 1e-4
"""Of fine-tuning, where neither a preset nor the user says."""
NETWORK, MODALITIES = "network.", "conditioner.modalities."
FEW_WORDS = 5000
"""Up to so many words of captions, other words are read as the nearest of them."""
STEM = "network.stem.weight"
SPATIAL = (c.ImageCondition, c.MaskCondition, c.SemanticMapCondition)
CLASSES = {"label": "table.weight", "boxes": "table.weight", "semantic_map": "rescale.weight"}
"""The weight of a conditioner that has a row for each class; that of semantic maps has a column."""


@dataclass(frozen=True)
class Initial:
    """A trained model to begin with. weights: by name, as `build.model(config)` has them. where, digest: of the run or
    file that it came from."""

    config: c.RunConfig
    weights: Mapping[str, Tensor]
    where: str
    digest: str = ""


@dataclass
class Taken:
    """What became of a trained model's weights, in words. fresh: weights that are not, or not all, taken from it."""

    kept: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)

    @property
    def lines(self) -> tuple[str, ...]:
        """A line for each thing kept, new or dropped."""
        words = {"kept": self.kept, "new": self.new, "dropped": self.dropped}
        return tuple(f"{word} {line}" for word, lines in words.items() for line in lines)


# --- the recipe ---------------------------------------------------------------------------------------------------


def raw_recipe(initial: Initial) -> dict[str, Any]:
    """The recipe to train a model on: whatever makes it is its own; columns and classes are for the new data to tell,
    and training has its defaults, at the learning rate of fine-tuning."""
    if initial.config.distillation is not None:
        raise LimnerError(f"{initial.where}: was distilled, and would forget it; train its teacher on, and distil that")
    stored = initial.config.model_dump(mode="json")
    # held_out as well: on the same pictures, what was held out stays so
    data = {name: stored["data"][name] for name in ("size", "channels", "ground", "crop", "flip", "held_out")}
    conditions = [{k: v for k, v in section.items() if k not in ("classes", "void")} for section in
                  stored["conditions"]]  # fmt: skip
    return {
        **stored,
        "data": data,
        "classes": None,
        "words": None,
        "conditions": conditions,
        "training": {"lr": LEARNING_RATE},
    }


def begin(model: build.Model, recipe: c.RunConfig, initial: Initial | None, out: Path, texts: Sequence[str] | None,
          console: Console | None = None) -> c.RunConfig:  # fmt: skip
    """Make a fresh model ready to train: weights taken over, vocabularies learnt, LoRA put in. Says what was kept, and
    returns the recipe with that in its provenance; nothing is written.

    initial: None: from nothing, or from the checkpoint that `out` holds, which goes before. texts: the captions that
    train. Raises LimnerError where a shape cannot be taken over, or the model to begin with isn't given.
    """
    resumed = Checkpoints(out).newest() is not None
    if initial is None and not resumed and recipe.training.init is not None:
        raise LimnerError(f"{out}: has no checkpoint yet; give what it begins with again: "
                          f"--init {recipe.training.init}")  # fmt: skip
    if initial is None and not resumed and recipe.training.lora is not None:
        raise LimnerError("training.lora: adapts a trained model; name it with --init RUN")
    taken = None if initial is None or resumed else take(model, recipe, initial)
    if model.conditioner is not None and texts is not None:
        if _learns(taken):
            model.conditioner.learn({"text": texts})
        known = _words(recipe, texts, None if _learns(taken) else initial) if not resumed else _stored_words(out)
        recipe = recipe.model_copy(update={"words": known})
    if taken is not None and initial is not None:
        recipe = _told(recipe, initial, taken)
        for line in taken.lines if is_main_process() else ():
            say(f"{initial.where}: {line}", console)
    if recipe.training.lora is not None:
        lora.attach(model, recipe.training.lora, recipe.training.lora_whole)
    return recipe


def is_main_process() -> bool:
    """Whether this is the process that speaks and writes, before accelerate is asked."""
    return int(os.environ.get("RANK", 0)) == 0


def say(line: str, console: Console | None = None) -> None:
    """A line on standard error."""
    (console or Console(stderr=True)).print(line, markup=False, highlight=False, soft_wrap=True)


def _words(recipe: c.RunConfig, texts: Sequence[str], before: Initial | None) -> str | None:
    """The words that a text encoder learns, with those that it knew before; None where they are a language's, or the
    encoder knows one, as a taken over one does of which no words are told."""
    if not any(isinstance(s, c.TextCondition) and isinstance(s.encoder, c.BPEText) for s in recipe.conditions):
        return None
    if before is not None and before.config.words is None:
        return None
    found = words_of(texts) | set((before.config.words or "").split() if before is not None else ())
    return " ".join(sorted(found)) if len(found) <= FEW_WORDS else None


def _stored_words(out: Path) -> str | None:
    """Those of a run that goes on."""
    stored = out / "config.yaml"
    return c.load(stored).words if stored.is_file() else None


def _learns(taken: Taken | None) -> bool:
    """Whether the captions are to be learnt from: not where an encoder was taken over with its vocabulary."""
    return taken is None or any(name.startswith(f"{MODALITIES}text.") for name in taken.fresh)


def _told(recipe: c.RunConfig, initial: Initial, taken: Taken) -> c.RunConfig:
    facts = {"from": initial.where, "sha256": initial.digest, "kept": taken.kept, "new": taken.new,
             "dropped": taken.dropped}  # fmt: skip
    training: dict[str, Any] = {"init": initial.where}
    if recipe.training.lora is not None:
        training["lora_whole"] = tuple(dict.fromkeys([*recipe.training.lora_whole, *taken.fresh]))
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=training),
                                     "provenance": {**recipe.provenance, "init": facts}})  # fmt: skip


# --- the weights --------------------------------------------------------------------------------------------------


def take(model: build.Model, recipe: c.RunConfig, initial: Initial) -> Taken:
    """Put a trained model's weights into the fresh `model` of `recipe`, as far as they go.

    Of a model of latents the autoencoder is no part of this. Raises LimnerError, in one line, for a shape that cannot
    be taken over: pictures of other channels, another network, a classifier head of another picture size.
    """
    _refuse_another_kind(recipe, initial)
    taking = _Taking(model, recipe, initial)
    with torch.no_grad():
        if recipe.task == "autoencoder":
            taking.network("autoencoder.")
        else:
            taking.network(NETWORK)
            taking.conditions()
    if isinstance(recipe.space, c.LatentSpace):
        which = "" if recipe.space.source == initial.where else f"; {recipe.space.source or 'a new one'} instead"
        (taking.found.dropped if which else taking.found.kept).append(f"autoencoder{which}")
    return taking.found


def _refuse_another_kind(recipe: c.RunConfig, initial: Initial) -> None:
    found, where = initial.config, initial.where
    if recipe.task != found.task:
        raise LimnerError(f"{where}: was trained for the task {found.task}, the recipe's is {recipe.task}")
    if recipe.space.kind != found.space.kind:
        kinds = {"latent": "latents", "pixels": "pixels"}
        raise LimnerError(f"{where}: works on {kinds[found.space.kind]}, the recipe on {kinds[recipe.space.kind]}; "
                          "leave out --preset and --autoencoder to train it as it is")  # fmt: skip
    if recipe.data.channels != found.data.channels:
        raise LimnerError(f"{where}: its pictures have {found.data.channels} channels, the recipe's "
                          f"{recipe.data.channels}; set data.channels={found.data.channels}")  # fmt: skip
    if recipe.task != "autoencoder" and build.space_shape(recipe)[0] != build.space_shape(found)[0]:
        raise LimnerError(f"{where}: its latents have {build.space_shape(found)[0]} channels, those of "
                          f"{_source(recipe)} {build.space_shape(recipe)[0]}")  # fmt: skip


def _source(recipe: c.RunConfig) -> str:
    source = recipe.space.source if isinstance(recipe.space, c.LatentSpace) else None
    return source or "the recipe's autoencoder"


class _Taking:
    """A model, and the one that it is made of, part by part."""

    def __init__(self, model: build.Model, recipe: c.RunConfig, initial: Initial) -> None:
        self.model, self.recipe, self.initial = model, recipe, initial
        self.own, self.given = model.state_dict(), initial.weights
        self.trained = {name for name, _ in model.named_parameters()}
        self.found = Taken()

    def network(self, prefix: str) -> None:
        """All weights below `prefix`, of which only a few may differ: those that conditions and classes decide."""
        names = [name for name in self.own if name.startswith(prefix)]
        strange = [name for name in self.given if name.startswith(prefix) and name not in self.own]
        head = names[-2:] if self.recipe.task == "classifier" else []
        classes, before = (self.initial.config.classes or (), self.recipe.classes or ()), len(self.found.new)
        for name in names:
            if name not in self.given:
                raise self.refused(f"has no weight '{name}', which the recipe's network needs")
            if name in head:
                self.rows(name, 0, *classes)
            elif name == STEM:
                self.stem()
            elif self.own[name].shape == self.given[name].shape:
                self.own[name].copy_(self.given[name])
            elif name.endswith("cross_attention.kv.weight") and len(self.own[name]) == len(self.given[name]):
                self.found.fresh.append(name)
            else:
                self.refuse_shape(name)
        if strange:
            raise self.refused(f"weight '{strange[0]}' has no place in the recipe's network")
        crossing = [name for name in self.found.fresh if name.endswith("kv.weight")]
        if crossing:
            width = self.own[crossing[0]].shape[1]
            self.found.new.append(f"keys and values of cross-attention ({len(crossing)}), for tokens {width} wide")
        if head:
            self.tell_classes("classes", *classes)
        rest = " but for what is new" if len(self.found.new) > before else ""
        self.found.kept.insert(0, f"{prefix.removesuffix('.')}{rest}")

    def stem(self) -> None:
        """The first layer sees x and what is concatenated to it: the channels of x, and of conditions that both models
        have, are kept; those of a new condition begin at zero, so that at first it changes nothing."""
        mine, theirs = _layout(self.recipe), _layout(self.initial.config)
        own, given = self.own[STEM], self.given[STEM]
        if (len(own), *own.shape[2:]) != (len(given), *given.shape[2:]):
            self.refuse_shape(STEM)
        if own.shape[1] * sum(theirs.values()) != given.shape[1] * sum(mine.values()):
            self.refuse_shape(STEM)
        patch = own.shape[1] // sum(mine.values())
        starts, start = {}, 0
        for kind, channels in theirs.items():
            starts[kind], start = start, start + channels * patch
        own.zero_()
        start = 0
        for kind, channels in mine.items():
            wide = channels * patch
            if theirs.get(kind) == channels:
                own[:, start : start + wide] = given[:, starts[kind] : starts[kind] + wide]
            else:
                self.found.new.append(f"channels of the network's first layer for {kind}, at zero")
                self.found.fresh.append(STEM)
            start += wide

    def conditions(self) -> None:
        """The conditioners of both models, modality by modality."""
        before = {section.kind: section for section in self.initial.config.conditions}
        for section in self.recipe.conditions:
            self.modality(section, before.pop(section.kind, None))
        self.found.dropped += [f"conditions.{kind}" for kind in before]

    def modality(self, section: c.ConditionConfig, before: c.ConditionConfig | None) -> None:
        name = f"conditions.{section.kind}"
        prefix = f"{MODALITIES}{section.kind}."
        own = [n for n in self.own if n.startswith(prefix)]
        given = {n for n in self.given if n.startswith(prefix)}
        table = prefix + CLASSES.get(section.kind, "")
        table = table if table in own else ""  # boxes as tokens have rows for numbers, whatever their names
        why = ""
        if before is None:
            why = "with fresh weights"
        elif _encoder(section) != _encoder(before) or set(own) != given or not self.alike(own, table):
            why = "with fresh weights: it is another than the checkpoint's"
        if why:
            self.found.new.append(f"{name}, {why}")
            self.found.fresh += [n for n in own if n in self.trained]
            return
        for n in own:
            if n != table:
                self.own[n].copy_(self.given[n])
        if not table:
            self.found.kept.append(name)
            return
        old, new = _classes(before, self.initial.config), _classes(section, self.recipe)
        extra = self.rows(table, int(section.kind == "semantic_map"), old, new)
        self.tell_classes(name, old, new, "the null row" if extra and section.kind == "label" else "")

    def alike(self, names: Sequence[str], table: str) -> bool:
        """Whether weights have the same shapes in both models, but for the number of classes in `table`."""
        dim = int(table.endswith("rescale.weight"))
        shapes = [(list(self.own[n].shape), list(self.given[n].shape), n == table) for n in names]
        for mine, theirs, by_class in shapes:
            if by_class:
                mine[dim] = theirs[dim] = 0
            if mine != theirs:
                return False
        return True

    def rows(self, name: str, dim: int, old: Sequence[str], new: Sequence[str]) -> int:
        """Rows (columns for dim 1) of classes of the same name; and whatever stands behind those of the classes, the
        null row or that of an empty layout, where both models have it. Returns how many of the latter there are."""
        own, given = self.own[name], self.given[name]
        if own.shape[:dim] + own.shape[dim + 1 :] != given.shape[:dim] + given.shape[dim + 1 :]:
            self.refuse_shape(name)
        places = {label: place for place, label in enumerate(old)}
        pairs = [(place, places[label]) for place, label in enumerate(new) if label in places]
        extra = min(own.shape[dim] - len(new), given.shape[dim] - len(old))
        pairs += [(len(new) + k, len(old) + k) for k in range(extra)]
        if pairs:
            mine, theirs = torch.tensor(pairs).T
            own.index_copy_(dim, mine, given.index_select(dim, theirs).to(own.dtype))
        if len(pairs) < own.shape[dim]:
            self.found.fresh.append(name)
        return extra

    def tell_classes(self, name: str, old: Sequence[str], new: Sequence[str], also: str = "") -> None:
        """Say which classes are kept, `also` with them, which are new, and which dropped."""
        kept = [*_some([label for label in new if label in set(old)]), *([also] if also else [])]
        if kept:
            self.found.kept.append(f"{name}: {' and '.join(kept)}")
        self.found.new += [f"{name}: {said}" for said in _some([label for label in new if label not in set(old)])]
        self.found.dropped += [f"{name}: {said}" for said in _some([label for label in old if label not in set(new)])]

    def refuse_shape(self, name: str) -> None:
        own, given = list(self.own[name].shape), list(self.given[name].shape)
        if name == "network.head.position":
            size = list(self.initial.config.data.size or ())
            raise LimnerError(f"{self.initial.where}: a classifier that pools by attention is tied to the size of its "
                              f"pictures; set data.size={size}")  # fmt: skip
        raise self.refused(f"weight '{name}' is {given}, in the recipe's network {own}")

    def refused(self, what: str) -> LimnerError:
        return LimnerError(f"{self.initial.where}: {what}; leave out --preset and --set model... to take its network")


def _layout(config: c.RunConfig) -> dict[str, int]:
    """Channels that the first layer sees, in order: those of x, then of each condition that lies on it."""
    layout = {"x": config.data.channels if config.task == "autoencoder" else build.space_shape(config)[0]}
    with torch.device("meta"):
        for section in config.conditions:
            if isinstance(section, SPATIAL) or getattr(section, "drawn", False):
                layout[section.kind] = int(build.modality(section, config, 1).spatial_channels)  # type: ignore[arg-type]
    return layout


def _classes(section: c.ConditionConfig | None, config: c.RunConfig) -> Sequence[str]:
    return (config.classes if isinstance(section, c.LabelCondition) else getattr(section, "classes", None)) or ()


def _encoder(section: c.ConditionConfig) -> str | None:
    """The pretrained encoder of a section, whose weights are no part of the model."""
    encoder = getattr(section, "encoder", None)
    return encoder.name if isinstance(encoder, c.PretrainedText) else None


def _some(labels: Sequence[str]) -> list[str]:
    """How many classes and the first of their names, or nothing where there are none."""
    if not labels:
        return []
    more = f" and {len(labels) - 6} more" if len(labels) > 6 else ""
    return [f"{len(labels)} class{'es' if len(labels) > 1 else ''} ({', '.join(labels[:6])}{more})"]
