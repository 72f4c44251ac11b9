"""Which noise levels a sampler visits: a path of N + 1 knots from noisy to clean, and the spacings that choose them.

Discrete spacings are sets of DDPM steps i in 0..T-1, for T = 10 and N = 5:

| spacing | steps i | as in |
| --- | --- | --- |
| leading | 0 2 4 6 8 | diffusers' "leading" with steps_offset 0 |
| leading+1 | 1 3 5 7 9, then ends at alpha-bar of step 0 instead of the clean image | CompVis' DDIM "uniform" |
| trailing | 1 3 5 7 9 | diffusers' "trailing"; Lin et al. 2024, Table 2 |
| linspace | 0 2 4 7 9 | diffusers' DDIM "linspace" |
| "5", "3,2" | evenly within each of the equal sections, both ends of a section included | guided-diffusion |
| "ddim5" | 0 2 4 6 8: the integer stride that gives exactly N steps, or an error | guided-diffusion |
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import overload

import numpy as np
import torch
from torch import Tensor

from limner.core.types import Knot
from limner.errors import LimnerError, suggest

LOG_SNR_SPACINGS = ("log_snr", "karras")
STEP_SPACINGS = ("leading", "leading+1", "trailing", "linspace")
SPACINGS = (*LOG_SNR_SPACINGS, *STEP_SPACINGS)

_SECTIONS = re.compile(r"\d+(,\d+)*")
_DDIM = re.compile(r"ddim(\d+)")
_RHO = 7.0  # Karras et al. 2022, eq. 5


@dataclass(frozen=True)
class Path(Sequence[Knot]):
    """N + 1 knots from noisy (knot 0) to clean (knot N). A sampler calls its denoiser at knots 0..N-1."""

    knots: tuple[Knot, ...]

    @property
    def steps(self) -> int:
        """N, the number of sampler steps."""
        return len(self.knots) - 1

    def __len__(self) -> int:
        return len(self.knots)

    @overload
    def __getitem__(self, index: int) -> Knot: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Knot, ...]: ...
    def __getitem__(self, index: int | slice) -> Knot | tuple[Knot, ...]:
        return self.knots[index]

    def pairs(self) -> Iterator[tuple[Knot, Knot]]:
        """(here, there) of each step, in sampling order."""
        return pairwise(self.knots)

    def index_of(self, t: Tensor) -> Tensor:
        """The index of the knot nearest to each t (B,), among those where a denoiser is called: (B,) int on the CPU."""
        knots = torch.tensor([knot.t for knot in self.knots[:-1]], dtype=torch.float64)
        return (t.detach().to("cpu", torch.float64)[:, None] - knots).abs().argmin(dim=1)

    def truncate(self, t_start: float) -> Path:
        """The part of the path with t <= t_start (SDEdit, Meng et al. 2022): noise the image to the level of its
        knot 0, then sample. LimnerError if no step is left."""
        kept = tuple(knot for knot in self.knots if knot.t <= t_start + 1e-9)
        if len(kept) < 2:
            raise LimnerError(
                f"start at t = {t_start:g}: no step of the path is left; its last step starts at t = {self[-2].t:g}"
            )
        return Path(kept)


def is_respacing(spacing: str) -> bool:
    """Whether the spacing is one of guided-diffusion's strings ("25", "10,15,20", "ddim25"), which hold N."""
    return bool(_SECTIONS.fullmatch(spacing) or _DDIM.fullmatch(spacing))


def check(spacing: str, steps: int, total: int | None) -> None:
    """LimnerError unless the spacing is known and 1 <= steps <= total (None: no upper bound)."""
    if is_respacing(spacing):
        return
    if spacing not in SPACINGS:
        raise LimnerError(f"unknown spacing '{spacing}'{suggest(spacing, [*SPACINGS, '25', '10,15,20', 'ddim25'])}")
    if steps < 1:
        raise LimnerError(f"sampling steps: {steps}, should be at least 1")
    if total is not None and steps > total:
        raise LimnerError(f"sampling steps: {steps}, more than the {total} steps of the schedule")


def step_indices(total: int, steps: int, spacing: str) -> list[int]:
    """DDPM steps of a discrete spacing, ascending, out of 0..total-1. `steps` is not used by respacing strings.

    "leading+1" may have more steps than asked: CompVis strides by floor(T / N), so 7 of 1000 gives 8. A step T,
    at which CompVis stops with an index error, is left out.
    """
    if match := _DDIM.fullmatch(spacing):
        return _ddim_stride(total, int(match[1]))
    if _SECTIONS.fullmatch(spacing):
        return _sections(total, [int(count) for count in spacing.split(",")])
    stride = total // steps
    if spacing == "leading":
        return [k * stride for k in range(steps)]
    if spacing == "leading+1":
        return [i + 1 for i in range(0, total, stride) if i + 1 < total]
    if spacing == "trailing":
        return [round(total - k * (total / steps)) - 1 for k in reversed(range(steps))]
    return [int(i) for i in np.linspace(0, total - 1, steps).round()] if steps > 1 else [total - 1]


def _ddim_stride(total: int, count: int) -> list[int]:
    possible = {len(range(0, total, stride)): stride for stride in range(total - 1, 0, -1)}
    if count not in possible:
        near = " or ".join(f"ddim{c}" for c in sorted(sorted(possible, key=lambda c: abs(c - count))[:2]))
        raise LimnerError(f"spacing 'ddim{count}': no integer stride takes {count} of {total} steps; {near} would do")
    return list(range(0, total, possible[count]))


def _sections(total: int, counts: list[int]) -> list[int]:
    """guided-diffusion's space_timesteps: equal sections, the first ones longer by one where they do not divide."""
    taken: set[int] = set()
    start = 0
    for number, count in enumerate(counts):
        size = total // len(counts) + (number < total % len(counts))
        if not 1 <= count <= size:
            raise LimnerError(f"spacing '{','.join(map(str, counts))}': {count} steps of a section of {size}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            taken.add(start + round(position))
            position += stride  # summed as the peer sums, for the same rounding
        start += size
    return sorted(taken)


def log_snr_grid(low: float, high: float, count: int, spacing: str) -> list[float]:
    """`count` log-SNRs from low to high: uniform ("log_snr"), or with sigma / alpha uniform to the power 1/7
    ("karras", Karras et al. 2022, eq. 5)."""
    fraction = np.linspace(0, 1, count)
    if spacing == "log_snr":
        return (low + fraction * (high - low)).tolist()
    ends = np.exp(-np.array([low, high]) / 2) ** (1 / _RHO)
    return (-2 * _RHO * np.log(ends[0] + fraction * (ends[1] - ends[0]))).tolist()
