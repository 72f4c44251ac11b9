"""What the shapes of a guided-diffusion checkpoint tell of its network, so that flags need not be trusted."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from limner.config import Level
from limner.errors import LimnerError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Structure:
    """A network read off its weights.

    width: channels of the time sinusoids, the peer's `num_channels`. layouts: the levels; a classifier that resamples
    by residual blocks can often be cut into levels in several ways, all of which are here. out_channels: None for a
    classifier. classes: rows of the label embedding, or of the classifier's head. pool_pixels: places that attention
    pooling is tied to.
    """

    width: int
    in_channels: int
    out_channels: int | None
    layouts: tuple[tuple[Level, ...], ...]
    resample: Literal["block", "conv", "pool"]
    scale_shift: bool
    classes: int | None
    pool: Literal["attention", "adaptive", "spatial", "spatial_v2"] | None = None
    pool_pixels: int | None = None

    @property
    def is_classifier(self) -> bool:
        return self.pool is not None

    @property
    def is_upsampler(self) -> bool:
        """An upsampler sees the noisy picture and the enlarged one: twice 1, 3 or 4 channels."""
        return not self.is_classifier and self.in_channels in (2, 6, 8)

    @property
    def channels(self) -> int:
        """Of the picture."""
        return self.in_channels // 2 if self.is_upsampler else self.in_channels

    @property
    def learns_variance(self) -> bool:
        return self.out_channels == 2 * self.channels


@dataclass(frozen=True)
class Stage:
    """One entry of `input_blocks` or `output_blocks`."""

    channels: int | None
    changes_channels: bool
    attention: bool
    resamples: Literal["block", "conv"] | None


def is_adm(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of guided-diffusion's (or improved-diffusion's) U-Net or classifier."""
    return "input_blocks.0.0.weight" in weights and "time_embed.0.weight" in weights


def structure(weights: Mapping[str, Tensor], where: str) -> Structure:
    """Read a network off its weights. Raises LimnerError naming the weight that is missing or out of place."""
    shapes = {name: tuple(x.shape) for name, x in weights.items()}
    down = _stages(shapes, "input_blocks")
    up = _stages(shapes, "output_blocks")
    first = "input_blocks.1.0"
    rows = _shape(shapes, f"{first}.emb_layers.1.weight", 2, where)[0]
    channels = _shape(shapes, f"{first}.in_layers.2.weight", 4, where)[0]
    stem = _shape(shapes, "input_blocks.0.0.weight", 4, where)
    pool = None if up else _pool(shapes, where)
    head = {"attention": "out.2.c_proj", "adaptive": "out.3", "spatial": "out.2", "spatial_v2": "out.3"}
    classes = _rows(shapes, f"{head[pool]}.weight" if pool else "label_emb.weight")
    position = shapes.get("out.2.positional_embedding")
    layouts, resample = _layouts(down, up, where)
    return Structure(
        width=_shape(shapes, "time_embed.0.weight", 2, where)[1],
        in_channels=stem[1],
        out_channels=None if pool else _shape(shapes, "out.2.weight", 4, where)[0],
        layouts=layouts,
        resample=resample,
        scale_shift=rows == 2 * channels,
        classes=classes,
        pool=pool,
        pool_pixels=position[-1] - 1 if position else None,
    )


def _shape(shapes: Shapes, name: str, dims: int, where: str) -> tuple[int, ...]:
    if name not in shapes:
        raise LimnerError(f"{where}: weight '{name}' is missing")
    if len(shapes[name]) != dims:
        raise LimnerError(f"{where}: weight '{name}' has the shape {shapes[name]}; it should have {dims} dimensions")
    return shapes[name]


def _rows(shapes: Shapes, name: str) -> int | None:
    return shapes[name][0] if shapes.get(name) else None


def _pool(shapes: Shapes, where: str) -> Literal["attention", "adaptive", "spatial", "spatial_v2"]:
    if "out.2.qkv_proj.weight" in shapes:
        return "attention"
    if len(shapes.get("out.3.weight", ())) == 4:
        return "adaptive"
    if len(shapes.get("out.0.weight", ())) == 2:
        return "spatial_v2" if "out.1.weight" in shapes else "spatial"
    raise LimnerError(f"{where}: neither a diffusion model ('output_blocks') nor a classifier ('out.2.qkv_proj')")


_MODULE = re.compile(r"(input_blocks|output_blocks)\.(\d{1,4})\.(\d)\.(.+)")


def _stages(shapes: Shapes, part: str) -> list[Stage]:
    found: dict[int, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, shape in shapes.items():
        match = _MODULE.fullmatch(name)
        if match and match[1] == part:
            found[int(match[2])][f"{match[3]}.{match[4]}"] = shape
    return [_stage(found[i]) for i in range(max(found, default=-1) + 1)]


def _stage(modules: Mapping[str, tuple[int, ...]]) -> Stage:
    later = [name for name in modules if not name.startswith("0.")]
    convolved = any(name.endswith((".op.weight", ".conv.weight")) for name in modules)
    return Stage(
        channels=_rows(modules, "0.in_layers.2.weight"),
        changes_channels="0.skip_connection.weight" in modules,
        attention="1.qkv.weight" in modules,
        resamples="conv" if convolved else "block" if any(".in_layers." in name for name in later) else None,
    )


Layouts = tuple[tuple[Level, ...], ...]


def _layouts(down: list[Stage], up: list[Stage], where: str) -> tuple[Layouts, Literal["block", "conv", "pool"]]:
    """The ways to cut the stages into levels, and how levels are joined.

    Convolutions and gaps (pooling has no weights) show where the way down halves; residual blocks that halve look
    like any other there, but on the way up they are the second of their stage. A classifier has no way up.
    """
    body = down[1:]
    if any(stage.resamples == "conv" for stage in body):
        cuts = [i for i, stage in enumerate(body) if stage.resamples == "conv"]
        found, resample = [_cut(body, cuts)], "conv"
    elif any(stage.channels is None for stage in body):
        cuts = [i for i, stage in enumerate(body) if stage.channels is None]
        found, resample = [_cut(body, cuts)], "pool"
    elif up:
        found, resample = [_cut(body, _cuts_from_above(up))], "block"
    else:
        even = [n for n in range(1, len(body) + 1) if len(down) % (n + 1) == 0]
        found, resample = [_cut(body, list(range(n, len(body), n + 1))) for n in even], "block"
    layouts = tuple(layout for layout in found if layout is not None)
    if not layouts:
        raise LimnerError(f"{where}: its blocks don't form levels as guided-diffusion's do")
    return layouts, resample


def _cuts_from_above(up: list[Stage]) -> list[int]:
    """Where the way down halves, told by the way up: a level has one block more on the way up."""
    counts, blocks = [], 0
    for stage in up:
        blocks += 1
        if stage.resamples:
            counts.append(blocks - 1)
            blocks = 0
    counts.append(blocks - 1)
    cuts, position = [], -1
    for count in reversed(counts[1:]):
        position += count + 1
        cuts.append(position)
    return cuts


def _cut(body: list[Stage], cuts: list[int]) -> tuple[Level, ...] | None:
    """Levels between the cuts, or None where that can't be: a level is uniform, and halving keeps the channels."""
    levels, start = [], 0
    for end in [*cuts, len(body)]:
        stages = body[start:end]
        uniform = len({(stage.channels, stage.attention) for stage in stages}) == 1
        halving = body[end] if end < len(body) else None
        if not uniform or any(stage.changes_channels for stage in stages[1:]):
            return None
        if halving and (halving.attention or halving.changes_channels):
            return None
        channels = stages[0].channels
        if channels is None or (halving and halving.channels not in (None, channels)):
            return None
        attention = stages[0].attention
        levels.append(Level(channels=channels, blocks=len(stages), attention=attention, cross_attention=0))
        start = end + 1
    return tuple(levels)
