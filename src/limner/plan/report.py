"""A plan as one JSON object and as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from limner.config import LabelCondition, RunConfig
from limner.errors import LimnerError
from limner.plan.counting import Counts, count
from limner.plan.devices import Cluster
from limner.plan.estimate import STRATEGIES, Estimate, estimate

DEFAULT_IMAGES = 1_000_000
DEFAULT_CLASSES = 1000


@dataclass(frozen=True)
class Plan:
    """Everything that `limner plan` tells. drawing_flops: of one picture with the recipe's sampling settings."""

    name: str
    where: Cluster
    batch: int
    images: int
    bf16: bool
    counts: Counts
    drawing_flops: float
    estimates: tuple[Estimate, ...]

    def facts(self) -> dict[str, Any]:
        """For JSON: bytes, FLOP, seconds, days."""
        return {
            "recipe": self.name,
            "devices": {"number": self.where.number, **asdict(self.where.device)},
            "batch": self.batch,
            "images": self.images,
            "precision": "bf16" if self.bf16 else "fp32",
            **asdict(self.counts),
            "drawing_flops": self.drawing_flops,
            "strategies": [each.facts() for each in self.estimates],
        }

    def lines(self) -> list[str]:
        """Markdown."""
        return [*_heading(self), "", *_parameters(self.counts), "", *_arithmetic(self), "", *_strategies(self)]


def plan(config: RunConfig, where: Cluster, name: str, *, classes: int = DEFAULT_CLASSES) -> Plan:
    """Plan a recipe's training. classes: how many, where that is left to the data.

    Raises LimnerError for a recipe that can't be built, or a batch that the devices don't divide.
    """
    config = with_classes(config, classes)
    training = config.training
    if training.batch % where.number:
        below = max(1, training.batch // where.number) * where.number
        near = f"{below} or {below + where.number}"
        raise LimnerError(f"batch {training.batch}: should be a multiple of the {where.number} devices, such as {near}")
    bf16 = training.precision != "fp32"
    counts = count(config, bf16=bf16)
    images = training.images or DEFAULT_IMAGES
    estimates = tuple(
        estimate(counts, strategy, where, batch=training.batch, images=images, bf16=bf16)
        for strategy in STRATEGIES
        if where.number > 1 or not strategy.sharded
    )
    return Plan(name, where, training.batch, images, bf16, counts, _drawing(config, counts), estimates)


def with_classes(config: RunConfig, number: int) -> RunConfig:
    """The recipe with numbers for the names of classes that it leaves to the data."""
    names = tuple(str(index) for index in range(number))
    sections = tuple(
        section.model_copy(update={"classes": names})
        if not isinstance(section, LabelCondition)
        and getattr(section, "classes", names) is None
        and not getattr(section, "names", ())  # tokens have numbers already
        else section
        for section in config.conditions
    )
    return config.model_copy(update={"classes": config.classes or names, "conditions": sections})


def _drawing(config: RunConfig, counts: Counts) -> float:
    """One picture: its conditions, the network at every step, both twice where it is guided, then the decoder."""
    sampling, image = config.sampling, counts.image
    told = config.distillation is not None and config.distillation.guidance is not None
    twice = 2 if config.conditions and sampling.guidance != 1.0 and not told else 1
    calls = sampling.steps * (2 if sampling.sampler == "heun" else 1)
    network = image.forward_flops - image.condition_flops
    return twice * (calls * network + image.condition_flops) + counts.decode_flops


# --- for people -----------------------------------------------------------------------------------------------------


def _heading(plan: Plan) -> list[str]:
    device, number = plan.where.device, plan.where.number
    peak = device.bf16 if plan.bf16 else device.fp32
    precision = "bf16" if plan.bf16 else "fp32"
    wire = "" if number == 1 else f", {plan.where.wire_name} {plan.where.wire / device.moved / 1e9:,.4g} GB/s each way"
    return [
        f"{plan.name} on {number} x {device.name}: {plan.images:,} pictures, {plan.batch:,} a step "
        f"({plan.batch // number:,} a device), {precision}",
        f"Assumed: {device.reached:.0%} of {peak / 1e12:,.4g} TFLOP/s, {device.moved:.0%} of bandwidths: memory "
        f"{device.bandwidth / 1e9:,.5g} GB/s{wire}",
    ]


def _parameters(counts: Counts) -> list[str]:
    rows = [(name, f"{number / 1e6:,.1f} M") for name, number in counts.parameters.items()]
    return _table(("part", "parameters"), [*rows, ("trained", f"{counts.trained / 1e6:,.1f} M")])


def _arithmetic(plan: Plan) -> list[str]:
    image, counts = plan.counts.image, plan.counts
    figures = {
        "a picture forward": image.forward_flops,
        "a picture in training": image.forward_flops + image.backward_flops,
        "the same, with gradient checkpointing": 2 * image.forward_flops + image.backward_flops,
        "encoding a picture, once": counts.encode_flops,
        "drawing a picture": plan.drawing_flops,
    }
    return _table(("arithmetic", "GFLOP"), [(name, f"{flops / 1e9:,.1f}") for name, flops in figures.items() if flops])


def _strategies(plan: Plan) -> Iterator[str]:
    rows = []
    for each in plan.estimates:
        held = [f"{each.memory.get(name, 0.0) / 1e9:.1f}" for name in ("weights", "gradients", "moments", "average")]
        others = sum(size for name, size in each.memory.items() if name in ("bf16 copies", "buckets", "gathered"))
        if each.days is None or each.unfused_days is None:
            time, bound, micro = "-", "doesn't fit", "-"
        else:
            time = _days(each.days) if each.days == each.unfused_days else _days(each.days, each.unfused_days)
            bound = f"{each.bound} {each.seconds[each.bound] / sum(each.seconds.values()):.0%}"
            micro = str(each.micro_batch) + (f" x {each.accumulate}" if each.accumulate > 1 else "")
        activations = f"{each.memory['activations'] / 1e9:.1f}"
        name = each.strategy.name if plan.where.number > 1 else each.strategy.name.replace("DDP", "one device")
        rows.append((name, micro, *held, f"{others / 1e9:.1f}", activations,
                     f"{each.total / 1e9:.1f}", time, bound))  # fmt: skip
    yield from _table(
        ("GB a device", "pictures", "weights", "gradients", "moments", "average", "copies", "activations", "all",
         "days", "bound by"), rows)  # fmt: skip
    yield ""
    yield f"A device holds {plan.where.device.memory / 1e9:,.4g} GB."
    if plan.where.device.compiles:
        yield "Days: where torch.compile fuses all that it can, to where it fuses nothing."
    if plan.images == DEFAULT_IMAGES:
        yield "The recipe's budget is in seconds, or none: days are for a million pictures; see --images."


def _days(*figures: float) -> str:
    return " - ".join(f"{figure:,.3g}" for figure in figures)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown, its columns aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [head, *rows]]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return ["| " + " | ".join(line) + " |" for line in ruled]
