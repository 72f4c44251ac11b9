"""The one training loop. Its clock is the images seen; it knows nothing of what it trains (see `task.py`).

read the next batch -> losses -> gradients -> average over processes -> clip -> optimizer -> moving average
now and then: a line of metrics, held-out figures, previews, a checkpoint
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from rich.console import Console
from torch import Tensor

from limner import config as configuration
from limner.config import RunConfig
from limner.errors import LimnerError
from limner.hardware import autocast
from limner.training import environment, lora, preview
from limner.training.background import Background, copied
from limner.training.checkpoint import Checkpoint, Checkpoints, load_weights, same_run
from limner.training.clock import Clock, learning_rate
from limner.training.devices import (
    Compiled,
    agree_every,
    average_over_processes,
    sum_over_processes,
    together,
    tune,
    wait_for_processes,
    wants_compile,
)
from limner.training.draws import Batches, Source, seed_of
from limner.training.ema import EMA
from limner.training.optimizers import Optimizer
from limner.training.progress import Display, MetricsFile, duration, remembers
from limner.training.sharded import flat, gathered, read_into, staged
from limner.training.share import Share
from limner.training.signals import StopRequest
from limner.training.spikes import Spikes
from limner.training.startup import accelerator_for, claim, sharding_for
from limner.training.stream import order_of
from limner.training.task import Means, Task, to_device

EXIT_STOPPED = 75
"""The exit code for a run that a signal stopped and `--resume` continues (EX_TEMPFAIL)."""


@dataclass(frozen=True)
class TrainResult:
    """run: its directory, with `model.safetensors` ready to sample. images, seconds: over all sittings.
    figures: the last line of metrics. stopped: the signal that ended this sitting early, SIGTERM or SIGINT, or None;
    the command line then exits with 75."""

    run: Path
    images: int
    seconds: float
    figures: Mapping[str, Any]
    stopped: str | None = None


def train(
    task: Task,
    data: Source,
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    started_at: float | None = None,
    spent_s: float = 0.0,
    console: Console | None = None,
) -> TrainResult:
    """Train until the budget in images or seconds is spent, and leave a run in `out`.

    The same call works in one process and under torchrun or `accelerate launch`: `training.batch` is that of the
    whole step, whatever the number of processes, and the result is the same up to the order of sums.

    resume: go on from the newest whole checkpoint, or start where there is none yet. started_at: `time.monotonic()`
    when the budget began to run, for a caller that has read the data before; default: now. spent_s: of the budget, by
    stages before this one; a checkpoint that is taken up knows better.
    Raises LimnerError: no budget, `out` holds a run (without `resume`) or another recipe's run (with), the disk is
    full, too many bad steps in a row.
    """
    out, settings = Path(out), config.training
    claim(out, resume)
    accelerator = accelerator_for(config, out)
    clock = Clock(
        0, settings.images, settings.budget_s, spent_s, time.monotonic() if started_at is None else started_at
    )
    with StopRequest() as stop, Display(config.task, console, silent=not accelerator.is_main_process) as display:
        training = Training(task, data, config, out, clock, accelerator, display)
        batches = Batches(data, settings.seed, settings.batch, settings.accumulate, accelerator.process_index,
                          accelerator.num_processes, training.order)  # fmt: skip
        with training.writer:
            training.open(resume)
            reason = training.agree(stop)
            if reason is None:
                for batch in batches.stream(clock.images, ahead=training.device.type != "cpu"):
                    training.step(batch)
                    reason = training.agree(stop)
                    if reason is not None:
                        break
                    training.report()
            return training.finish(reason, stop.name)


class Training:
    """The state of a training under way, and what is done with it."""

    def __init__(self, task: Task, data: Source, config: RunConfig, out: Path, clock: Clock, accelerator: Accelerator,
                 display: Display) -> None:  # fmt: skip
        self.task, self.data, self.config, self.settings = task, data, config, config.training
        self.out, self.clock, self.accelerator, self.display = out, clock, accelerator, display
        self.order = order_of(data, config, out, accelerator.process_index, accelerator.num_processes,
                              display.say)  # fmt: skip
        self.place: Any = None
        self.device, self.main = accelerator.device, accelerator.is_main_process
        self.share = Share(accelerator.process_index, accelerator.num_processes, self.add_up)
        tune(self.device, self.settings.deterministic)
        self.sharding = sharding_for(config, accelerator)
        self.ema = self.place_networks()
        self.optimizers = {
            name: Optimizer(module, self.settings, task.hidden if name == "model" else ())
            for name, module in task.modules.items()
        }
        compiles = self.sharding is None and wants_compile(self.settings, self.device)
        self.compiled = Compiled(task.networks, compiles, display.say)
        self.checkpoints = Checkpoints(out, self.settings.keep_last)
        self.writer = Background()
        self.metrics = MetricsFile(out / "metrics.jsonl")
        self.data_statistics = preview.data_statistics(data) if self.main else {}
        self.means = Means()
        self.skipped = torch.zeros((), device=self.device)
        self.bad_in_a_row = torch.zeros((), device=self.device)
        self.spikes = Spikes(self.device)
        self.steps = self.sitting_steps = self.logged_images = 0
        self.elapsed_s = clock.elapsed_s
        self.logged_at = self.sitting_began = self.elapsed_s
        self.progress_at_start = self.lr_share = 0.0
        self.figures: dict[str, Any] = {}
        self.judged: dict[str, Any] = {}
        self.judged_at = self.elapsed_s
        self.held_out: tuple[int, float | None] = (-1, None)  # at how many images, and the figure that ranks
        self.best: float | None = None
        self.rounds_since_best = 0

    def place_networks(self) -> EMA:
        """The networks on the device, alike on all processes, or cut over them; and their average."""
        if self.sharding is not None:  # it moves one block after the other: the whole may not fit on the device
            model = self.task.modules["model"].train()
            ema = EMA(model, self.settings.ema.relative_std)
            frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
            for module in (model, ema.module):
                whole = frozen if module is model else {p for p in module.parameters() if p in frozen}
                self.sharding.cut(module, whole)
                module.to(self.device)
            ema.pair(model)
            return ema
        for module in self.task.modules.values():
            module.train().to(device=self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            broadcast([tensor.detach() for tensor in (*module.parameters(), *module.buffers())])
        return EMA(self.task.modules["model"], self.settings.ema.relative_std)

    # --- a step -----------------------------------------------------------------------------------------------------

    def step(self, batches: list[dict[str, Any]]) -> None:
        """One update of the weights, from this process's micro-batches. Asks the device for nothing."""
        progress = self.clock.progress(self.elapsed_s)
        self.lr_share = learning_rate(self.clock.images + self.settings.batch, progress, self.settings)
        with nullcontext() if self.sharding is None else together(self.accelerator):
            objectives = self.compiled.attempt(lambda: self.gradients(batches, progress))
        bad = torch.zeros((), dtype=torch.bool, device=self.device)
        for name, objective in objectives.items():
            bad |= self.update(name, objective)
        self.spikes.see(objectives["model"])
        self.skipped += bad
        self.bad_in_a_row = torch.where(bad, self.bad_in_a_row + 1, 0)
        self.steps += 1
        self.sitting_steps += 1
        self.clock.images += self.settings.batch
        if self.steps % self.settings.ema.every == 0:
            self.ema.update(self.clock.images, self.settings.batch * self.settings.ema.every)
        if self.steps % self.settings.nan_patience == 0:
            self.check_numbers()

    def gradients(self, batches: list[dict[str, Any]], progress: float) -> dict[str, Tensor]:
        """The gradients of all micro-batches, added up, in the parameters; returns the mean objectives."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        means, totals, share = Means(), {}, 1.0 / len(batches)
        process, images, seed = self.accelerator.process_index, self.clock.images, self.settings.seed
        torch.manual_seed(seed_of(seed, images, f"network, process {process}"))
        for number, batch in enumerate(batches):
            rng = torch.Generator().manual_seed(seed_of(seed, images, f"losses, process {process}, part {number}"))
            with autocast(self.settings.precision, self.device):
                losses = self.task.losses(to_device(batch, self.device), rng, progress)
            left = len(losses.objectives)
            for name, objective in losses.objectives.items():
                left -= 1
                # what is gathered for a cut network's forward pass are other tensors than its parameters
                own = self.optimizers[name].parameters if self.sharding is None else None
                torch.autograd.backward(objective * share, inputs=own, retain_graph=left > 0)
                totals[name] = totals.get(name, 0) + objective.detach() * share
            means.add(losses.logs, share)
        self.means.merge(means)
        return totals

    def update(self, name: str, objective: Tensor) -> Tensor:
        """Average over processes, clip, and step; a bad step leaves the weights alone. Returns whether it was bad."""
        optimizer = self.optimizers[name]
        gradients = optimizer.gradients()
        if self.sharding is not None:
            average_over_processes(self.accelerator, [objective])
            norm = self.sharding.norm(gradients)
        else:
            average_over_processes(self.accelerator, [*gradients, objective])
            norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        bad = ~torch.isfinite(norm + objective)
        optimizer.step(self.lr_share, divisor=(norm / self.settings.clip).clamp_min(1.0), bad=bad)
        self.means.add({"grad_norm" if name == "model" else f"grad_norm_{name}": norm})
        return bad

    def check_numbers(self) -> None:
        """Raises LimnerError after too many bad steps in a row."""
        if int(self.bad_in_a_row) < self.settings.nan_patience:
            return
        self.writer.wait()
        last = self.checkpoints.newest()
        good = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
        raise LimnerError(
            f"{self.out}: {int(self.bad_in_a_row)} steps in a row gave NaN or infinite gradients, at "
            f"{self.clock.images} images; {good}; lower training.lr and go on with --resume"
        )

    # --- now and then -----------------------------------------------------------------------------------------------

    def agree(self, stop: StopRequest) -> str | None:
        """Why to end now, None to go on: "signal", "patience" or "budget". All processes come to the same answer; the
        seconds are those of the main one."""
        impatient = self.task.patience > 0 and self.rounds_since_best >= self.task.patience
        own = [self.clock.elapsed_s if self.main else 0.0, float(stop.name is not None), float(impatient)]
        if self.accelerator.num_processes > 1:
            if self.sitting_steps % agree_every(self.device):
                return None
            own = self.share.add_up(torch.tensor(own, dtype=torch.float64)).tolist()
        self.elapsed_s = own[0]
        reasons = {"signal": own[1] > 0, "patience": own[2] > 0, "budget": self.clock.progress(self.elapsed_s) >= 1}
        return next((reason for reason, holds in reasons.items() if holds), None)

    def report(self) -> None:
        """What is due after this step. All processes judge the model; the main one writes, and the others wait for it
        in the next step."""
        due = {
            name: self.clock.passed(getattr(self.settings, f"{name}_every"), self.settings.batch)
            for name in ("log", "held_out", "preview", "checkpoint")
        }
        telling = due["log"] or due["held_out"] or due["preview"]
        if telling:
            self.share_means()
        if telling or due["checkpoint"]:
            self.share_place()
        self.writer.check()
        improved = self.judge(held_out=due["held_out"], pictures=due["preview"])
        if not self.takes_part:
            return
        if telling:
            self.log()
        if due["checkpoint"] or (improved and self.task.best_is is not None):
            self.save()
        self.show()

    @property
    def takes_part(self) -> bool:
        """Whether this process logs and saves: the main one, or each where a network is cut over all."""
        return self.main or self.sharding is not None

    def share_means(self) -> None:
        """Logs of all processes, added up; each of them takes part, and the main one keeps the result."""
        self.means.share(self.share.add_up)
        if not self.main:
            self.means = Means()

    def share_place(self) -> None:
        """Where the data's order is; each process knows its own part of a stream."""
        self.place = self.order.place(self.clock.images, self.share.add_up)

    def add_up(self, own: Tensor) -> Tensor:
        """The sum of every process's tensor, for each of them, where the tensor is."""
        if self.accelerator.num_processes == 1:
            return own
        return sum_over_processes(self.accelerator, own.to(self.device)).to(own.device)

    def judge(self, *, held_out: bool, pictures: bool) -> bool:
        """Held-out figures and previews where they are due, by all processes. Returns whether the held-out figure is
        the best so far."""
        self.judged, self.judged_at = {}, self.clock.elapsed_s
        with torch.no_grad(), autocast(self.settings.precision, self.device):
            if held_out:
                self.judged |= self.task.held_out(self.ema.module, self.data, self.share)
                self.held_out = (self.clock.images, self.judged.get(self.task.best_is or "held_out_loss"))
            if pictures:
                self.judged |= self.draw()
        return held_out and self.rank()

    def log(self) -> None:
        """A line of metrics, with what was judged."""
        images, seconds = self.clock.images, self.judged_at
        rate = (images - self.logged_images) / max(seconds - self.logged_at, 1e-9)
        line: dict[str, Any] = {"images": images, "seconds": round(seconds, 2), **self.means.read()}
        line |= {"lr": self.lr_share * self.settings.lr, "images_per_s": round(rate, 2), "skipped": int(self.skipped)}
        line |= {"spikes": self.spikes.count}
        line |= {} if self.order.corrupt is None else {"corrupt": self.order.corrupt}
        line |= self.judged
        if self.main:
            self.metrics.write(line)
        self.accelerator.log({k: v for k, v in line.items() if isinstance(v, (int, float))}, step=images)
        self.figures = line
        self.logged_images, self.logged_at = images, self.clock.elapsed_s

    def draw(self) -> dict[str, Any]:
        """Previews as a PNG grid; their channel means and deviations, beside the data's."""
        pictures, captions = self.task.preview(self.ema.module, self.share)
        if not len(pictures) or not self.main:
            return {}
        preview.save(self.out / "previews" / f"images-{self.clock.images:09d}.png", pictures, captions)
        mean, std = preview.channel_statistics(pictures)
        return {"preview_mean": mean, "preview_std": std, **self.data_statistics}

    def rank(self) -> bool:
        """Whether the held-out figure just taken is the best so far; counts the rounds since that one."""
        figure = self.held_out[1]
        if figure is None or (self.best is not None and figure >= self.best):
            self.rounds_since_best += 1
            return False
        self.best, self.rounds_since_best = figure, 0
        return True

    def show(self) -> None:
        """Progress, and the time left at this sitting's pace."""
        now = self.clock.elapsed_s
        progress = self.clock.progress(now)
        if self.sitting_steps == 1:  # compiling, if anything, is over
            self.sitting_began, self.progress_at_start = now, progress
        gained = progress - self.progress_at_start
        left = (now - self.sitting_began) * (1.0 - progress) / gained if gained > 0 else None
        shown = {"loss": self.figures.get("loss"), "images/s": self.figures.get("images_per_s")}
        self.display.update(progress, self.clock.images, left, {k: v for k, v in shown.items() if v is not None})

    # --- from disk and to it ----------------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint, and the run's model, from a copy of what they hold, so that training can go on."""
        self.writer.wait()
        tensors = self.tensors()
        at, figure = self.held_out
        state = {
            "task": self.config.task,
            "seconds": self.clock.elapsed_s,
            "seed": self.settings.seed,
            "data": self.data.digest,
            "place": self.place,
            "skipped": int(self.skipped),
            "spikes": self.spikes.state.tolist(),
            "held_out": figure if at == self.clock.images else None,
            "best": self.best,
            "rounds_since_best": self.rounds_since_best,
            "threads": torch.get_num_threads(),
            "versions": {name: importlib.metadata.version(name) for name in ("limner", "torch")},
        }
        images, behind = self.clock.images, self.settings.background
        if self.sharding is None:
            work = partial(self.write, images, copied(tensors) if behind else tensors, state)
        else:
            pieces = staged(flat(tensors)) if behind else flat(tensors)
            average = gathered(tensors["ema"], keep=self.main)
            work = partial(self.write_pieces, self.sharding.writers, images, pieces, state, average)
        self.writer.run(work) if behind else work()

    def write(self, images: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Put a checkpoint and the run's model on the disk; asks for nothing that training changes."""
        self.checkpoints.save(images, tensors, state)
        self.publish(tensors["ema"])

    def write_pieces(self, writers: Any, images: int, pieces: Mapping[str, Tensor], state: Mapping[str, Any],
                     average: Mapping[str, Tensor]) -> None:  # fmt: skip
        """The same of what is cut over processes, each of which calls it; the whole `average` is the main one's."""
        wait = partial(wait_for_processes, self.accelerator, writers)
        self.checkpoints.save_pieces(images, pieces, state, writers, wait)
        self.publish(average)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint holds, live, by file."""
        slots = {
            f"{name}.{slot}": tensor
            for name, optimizer in self.optimizers.items()
            for slot, tensor in optimizer.slots()
        }
        modules = {name: module.state_dict() for name, module in self.task.modules.items()}
        return {"ema": self.ema.module.state_dict(), **modules, "optimizer": slots}

    def publish(self, average: Mapping[str, Tensor] | None = None) -> None:
        """The run's model: the average, or that of the best checkpoint where the task has a best; adapters added in."""
        best = self.checkpoints.best(verified=True) if self.task.best_is else None
        if best is not None:
            average = best.tensors("ema")
        average = gathered(self.ema.module.state_dict(), keep=self.main) if average is None else average
        if self.main:
            self.checkpoints.publish(lora.merged(average), self.config)

    def open(self, resume: bool) -> None:
        """Take the directory: go on with the run that it holds, or begin one."""
        if resume:
            self.restore()
        wait_for_processes(self.accelerator)
        if self.main:
            about = partial(environment.record, self.out, self.clock.images, self.device, self.share.processes)
            self.checkpoints.begin(self.config, about)
            self.metrics.rewind(self.clock.images)

    def restore(self) -> None:
        """Take up the newest whole checkpoint, and say what was restored. Every process reads it by itself."""
        recipe = self.out / "config.yaml"
        if recipe.is_file():
            same_run(configuration.load(recipe), self.config, str(self.out))
        found = self.checkpoints.latest()
        if found is None:
            self.display.say(f"{self.out}: no checkpoint yet, starting from the beginning")
            return
        self.take(found)
        if found.state["data"] != self.data.digest:
            self.display.say(f"{self.out}: the data differ from those that this run has seen before")
        self.display.say(
            f"{found.path}: restored model, average and optimizer at {found.images:,} images, "
            f"{duration(self.clock.spent_s)} of training"
        )

    def take(self, found: Checkpoint) -> None:
        """Put a checkpoint's weights, moments and counts in place."""
        if self.sharding is not None and found.pieces is not None:
            read_into(found.pieces, flat(self.tensors()))
        else:
            self.fill(found)
        state = found.state
        self.clock.images = self.logged_images = found.images
        self.clock.spent_s = state["seconds"]
        self.order.restore(found.images, state.get("place"))
        self.skipped.fill_(state["skipped"])
        self.spikes.state = torch.tensor(state.get("spikes", [0.0] * 3), device=self.device)
        self.held_out = (found.images, state["held_out"]) if state["held_out"] is not None else (-1, None)
        self.best, self.rounds_since_best = state["best"], state["rounds_since_best"]
        self.elapsed_s = self.logged_at = self.sitting_began = self.clock.elapsed_s
        self.progress_at_start = self.clock.progress(self.elapsed_s)
        self.steps = found.images // self.settings.batch

    def fill(self, found: Checkpoint) -> None:
        """Put a checkpoint's weights and moments in place, one file after the other."""
        for name, module in self.task.modules.items():
            load_weights(module, found.tensors(name), str(found.path))
        load_weights(self.ema.module, found.tensors("ema"), str(found.path))
        moments = found.tensors("optimizer")
        for name, optimizer in self.optimizers.items():
            prefix = f"{name}."
            optimizer.load_state_dict({k.removeprefix(prefix): v for k, v in moments.items() if k.startswith(prefix)})

    def finish(self, reason: str | None, signal_name: str | None) -> TrainResult:
        """The last figures and pictures, unless there is a hurry, and the last checkpoint."""
        hurry = reason == "signal"
        if not self.clock.images and not hurry:
            raise LimnerError(f"{self.out}: the budget was spent before the first step; give a longer --budget")
        self.share_means()
        self.share_place()
        judge = bool(self.sitting_steps) and not hurry
        self.judge(held_out=judge, pictures=judge)
        if self.takes_part and self.sitting_steps:
            self.log()
            self.save()
        elif self.takes_part and self.clock.images:
            self.publish()
        self.writer.wait()
        for tracker in self.accelerator.trackers:  # `end_training` would also take away the process group
            tracker.finish()
        wait_for_processes(self.accelerator)
        self.compiled.undo()
        seconds = self.clock.elapsed_s
        if not self.task.best_is and (warning := remembers(self.out, self.held_out[1], self.best)):
            self.display.say(warning)
        words = {"signal": f"stopped by {signal_name}; go on with --resume", "patience": "ended early: no better since"}
        self.display.say(
            f"{self.out}: {self.clock.images:,} images in {duration(seconds)}, {words.get(reason or '', 'done')}"
        )
        return TrainResult(self.out, self.clock.images, seconds, self.figures, signal_name if hurry else None)
