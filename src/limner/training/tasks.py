"""The two stages that learn from noised pictures: the diffusion model, and the classifier that guides it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner import build
from limner.config import RunConfig, UNetConfig
from limner.core.denoiser import network_time, per_image
from limner.core.losses import DiffusionLoss, LossTerms, stratified_times
from limner.errors import LimnerError
from limner.generator import Generator
from limner.training.alignment import Alignment
from limner.training.draws import Part, Source
from limner.training.share import ALONE, Share
from limner.training.task import Losses, Means, Task, by_band, to_device, total

HELD_OUT_BATCH = 64
HELD_OUT_SEED = 0
PREVIEW_SEED = 0
Logs = Callable[[Mapping[str, Any], Part, Tensor], Mapping[str, Tensor]]
EARLIEST = 1e-3
"""Where log-uniform times begin."""
CONTINUOUS_STEPS = 1000
"""Steps of the variational bound where the schedule is continuous."""


class DiffusionTask(Task):
    """Learns to undo noise: x_t = alpha x0 + sigma eps, each condition left out at random by itself.

    model: network and conditioner. data: where the previews' conditions come from.
    """

    def __init__(self, model: build.Model, config: RunConfig, data: Source) -> None:
        self.model = model
        self.config = config
        self.modules = {"model": model}
        self.networks = (model.network,)
        self.hidden = hidden_weights(model)
        self.loss = _loss(config)
        self.alignment = None
        if config.training.align:
            assert isinstance(config.model, UNetConfig)
            self.alignment = Alignment(model.network, config.model.levels[-1].channels, data)
            self.modules["aligner"] = self.alignment.projector
        self._preview, self._captions = preview_options(config, data)

    def losses(self, batch: Mapping[str, Any], rng: torch.Generator, progress: float) -> Losses:
        """The (weighted, with a learned variance hybrid) loss, and the same by noise band."""
        part: Part = batch["part"]
        seed = self.config.training.seed
        t = drawn_times(part, self.config)
        terms = self._terms(self.model, batch, part, seed, t, self._dropped(part))
        logs = {"loss": terms.loss.detach().mean(), **by_band("loss", terms.loss, t)}
        if terms.vb is not None:
            logs["vlb"] = terms.vb.detach().mean()
        if self.alignment is None:
            return Losses({"model": terms.loss.mean()}, logs)
        apart, projector = self.alignment.objectives(batch["row"], batch["mirror"])
        objectives = {"model": terms.loss.mean() + self.config.training.align * apart, "aligner": projector}
        return Losses(objectives, {**logs, "align": projector.detach()})

    def _terms(self, model: build.Model, batch: Mapping[str, Any], part: Part, seed: int, t: Tensor,
               drop: Mapping[str, Tensor]) -> LossTerms:  # fmt: skip
        x0 = encoded(batch, self.config)
        eps = part.noise(seed, tuple(x0.shape[1:]), x0.device)
        cond = self.config.conditions_in(batch)
        return self.loss(lambda x, time, _: model(x, time, cond, drop), x0, eps, t)

    def _dropped(self, part: Part) -> dict[str, Tensor]:
        """Rows (B,) that see the null condition instead, for each condition by itself."""
        seed = self.config.training.seed
        return {
            section.kind: part.of(torch.rand(part.total, generator=part.generator(seed, f"drop {section.kind}")))
            < section.dropout
            for section in self.config.conditions
        }

    def held_out(self, average: nn.Module, data: Source, share: Share = ALONE) -> dict[str, float]:
        """`held_out_loss`, and the same by noise band; the same rows, times and noise each time, nothing dropped."""
        assert isinstance(average, build.Model)

        def logs(batch: Mapping[str, Any], part: Part, t: Tensor) -> dict[str, Tensor]:
            loss = self._terms(average, batch, part, HELD_OUT_SEED, t, {}).loss
            return {"loss": total(loss), **by_band("loss", loss, t)}

        return held_out_means(data, average, share, logs)

    def preview(self, average: nn.Module, share: Share = ALONE) -> tuple[npt.NDArray[np.uint8], list[str]]:
        """Samples of the averaged model by the recipe's sampling defaults, always from the same noise."""
        assert isinstance(average, build.Model)
        options = {"num": len(self._captions), "seed": PREVIEW_SEED, "output": "array", **self._preview}
        generator = Generator(self.config, average, device=next(average.parameters()).device)
        drawn = share.together(len(self._captions),
                               lambda part: torch.from_numpy(generator.sample(part=part, **options)))  # fmt: skip
        return drawn.numpy(), self._captions


class ClassifierTask(Task):
    """Learns p(y | x_t, t) of noised pictures (Dhariwal & Nichol 2021, section 4.1); the noise is that of the diffusion
    run which it is to guide, by the same schedule."""

    best_is = "held_out_loss"

    def __init__(self, model: build.Model, config: RunConfig) -> None:
        if not config.classes:
            raise LimnerError("classes: a classifier needs labelled data; this data has no labels")
        self.model = model
        self.config = config
        self.modules = {"model": model}
        self.networks = (model.network,)
        self.hidden = hidden_weights(model)
        self.patience = config.training.patience
        self.schedule = build.schedule(config)

    def losses(self, batch: Mapping[str, Any], rng: torch.Generator, progress: float) -> Losses:
        """Cross-entropy with label smoothing; accuracy and loss by noise band."""
        part: Part = batch["part"]
        seed = self.config.training.seed
        t = drawn_times(part, self.config)
        loss, logs = self._terms(self.model, batch, part, seed, t, self.config.label_smoothing)
        return Losses({"model": loss.mean()}, {"loss": total(loss), **logs, **by_band("loss", loss, t)})

    def _terms(self, model: build.Model, batch: Mapping[str, Any], part: Part, seed: int, t: Tensor,
               smoothing: float) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Cross-entropy (B,), and the sums and counts of right answers."""
        x0 = encoded(batch, self.config)
        eps = part.noise(seed, tuple(x0.shape[1:]), x0.device)
        x_t = per_image(self.schedule.alpha(t), x0) * x0 + per_image(self.schedule.sigma(t), x0) * eps
        time = network_time(t, len(x0), self.schedule, self.config.process.time_input).to(x0.device)
        logits, label = model.network(x_t, time).float(), batch["label"]
        loss = F.cross_entropy(logits, label, reduction="none", label_smoothing=smoothing)
        ranks = (logits > logits.gather(1, label[:, None])).sum(1)
        logs = {}
        for name, within in (("accuracy", 1), ("accuracy_top5", 5)):
            if within < logits.shape[1]:
                right = (ranks < within).float()
                logs |= {name: total(right), **by_band(name, right, t)}
        return loss, logs

    def held_out(self, average: nn.Module, data: Source, share: Share = ALONE) -> dict[str, float]:
        """`held_out_loss` without label smoothing, and accuracies, overall and by noise band."""
        assert isinstance(average, build.Model)

        def logs(batch: Mapping[str, Any], part: Part, t: Tensor) -> dict[str, Tensor]:
            loss, right = self._terms(average, batch, part, HELD_OUT_SEED, t, 0.0)
            return {"loss": total(loss), **by_band("loss", loss, t), **right}

        return held_out_means(data, average, share, logs)

    def preview(self, average: nn.Module, share: Share = ALONE) -> tuple[npt.NDArray[np.uint8], list[str]]:
        """None: a classifier draws nothing."""
        return np.empty((0, 1, 1, 1), np.uint8), []


def encoded(batch: Mapping[str, Any], config: RunConfig) -> Tensor:
    """What the network works on, (B, C, H, W): the picture, or the latent that the batch holds."""
    x0: Tensor = batch["latent"] if config.space.kind == "latent" else batch["image"]
    return x0.contiguous(memory_format=torch.channels_last)


def drawn_times(part: Part, config: RunConfig) -> Tensor:
    """Times (B,) float64 of these rows, one in each stratum over the whole step; `log_uniform`: uniform in log t."""
    kind, generator = config.training.times, part.generator(config.training.seed, "times")
    if kind == "log_uniform":
        return EARLIEST ** (1.0 - part.of(stratified_times(part.total, generator)))
    return part.of(stratified_times(part.total, generator, kind))


def held_out_means(data: Source, module: nn.Module, share: Share, logs: Logs) -> dict[str, float]:
    """Averages over the held-out rows of `logs(batch on the module's device, which rows, times)`, sums and counts by
    name, as `held_out_<name>`. Times are spread evenly over all rows."""
    device = next(module.parameters()).device
    rows, means = data.held_out, Means()
    whole = Part(0, 0, len(rows), len(rows))
    t = stratified_times(len(rows), whole.generator(HELD_OUT_SEED, "held out"))
    for number, counts in share.turns(-(-len(rows) // HELD_OUT_BATCH)):
        start = number * HELD_OUT_BATCH
        part = Part(0, start, min(start + HELD_OUT_BATCH, len(rows)), len(rows))
        found = logs(to_device(data.batch(rows[part.start : part.stop]), device), part, part.of(t))
        means.add({f"held_out_{name}": pair * counts for name, pair in found.items()})
    means.share(share.add_up)
    return means.read()


def hidden_weights(model: build.Model) -> list[str]:
    """The matrices and kernels between the network's stem and its last layer, which Muon may train; the projections of
    the time and label embedding (`emb`) are AdamW's, as embeddings are."""
    names = [name for name, parameter in model.network.named_parameters() if parameter.ndim >= 2]
    return [
        f"network.{name}" for name in names if name.split(".")[0] in ("down", "middle", "up") and ".emb." not in name
    ]


def preview_options(config: RunConfig, data: Source) -> tuple[dict[str, Any], list[str]]:
    """What `Generator.sample` is asked for in a preview, and the captions: the classes in rotation, or the conditions
    of the first held-out rows, as `data.batch` gives them."""
    count, kinds = config.training.previews, [section.kind for section in config.conditions]
    if not kinds:
        return {"guidance": 1.0}, [""] * count
    if kinds == ["label"]:
        names = config.classes or ()
        return {}, [names[number % len(names)] for number in range(count)]
    rows = np.concatenate([data.held_out, data.train])[:count]
    asked = config.conditions_in(data.batch(rows))
    label_names = [(config.classes or ())[k] for k in asked["label"].tolist()] if "label" in asked else [""] * len(rows)
    return {"conditions": asked}, list(asked.get("text", label_names))


def _loss(config: RunConfig) -> DiffusionLoss:
    process, schedule = config.process, build.schedule(config)
    steps = schedule.steps or CONTINUOUS_STEPS
    return DiffusionLoss(
        schedule,
        process.prediction,
        process.weighting.kind,
        process.weighting.gamma,
        process.weighting.bias,
        process.time_input,
        schedule.path(steps, "trailing") if process.learned_variance else None,
        process.vlb_weight,
    )
