"""Representation alignment: the middle of the U-Net also learns what a pretrained network sees in the clean picture.

REPA (Yu et al. 2025, arXiv:2410.06940, equation 8). A denoiser has to find out by itself what is in a noisy picture
before it can draw; told by features of the clean one, it finds out sooner. At sampling nothing of this is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.data.stream import StreamDataset
from limner.errors import LimnerError
from limner.nn.lite0 import LITE0_CHANNELS, see_lite0

STRIDE = 16
SIDES = (64, 128)
"""Least and most pixels that the feature network sees along a side; between them, as many as its map needs to have the
places of the middle."""
HIDDEN = 256
MEASURED = 512
"""Pictures from which the features' mean and spread are taken."""
AT_ONCE = 64
MOST_BYTES = 2 * 2**30


class Alignment:
    """1 - cos between what `projector` makes of the middle's output and the features of the clean picture, each channel
    of which has mean 0 and spread 1 over the data; averaged over places and pictures.

    network: a U-Net, watched from now on. channels: of its middle. data: a `Dataset` whose rows are always seen alike
    but for mirroring; a mirrored picture's features are taken to be the mirrored features. They are computed once for
    each row and kept, up to `MOST_BYTES`; where they would be more, each time. Raises LimnerError for streams and for
    random crops.
    """

    def __init__(self, network: Any, channels: int, data: Any) -> None:
        if isinstance(data, StreamDataset) or data.pixels.has_margins:
            raise LimnerError("training.align: needs whole pictures that can be had by row, so neither data.stream nor "
                              "random crops; leave it out by training.align=0")  # fmt: skip
        self.data, self.device, self.size = data, torch.device("cpu"), (0, 0)
        self.projector = nn.Sequential(
            nn.Conv2d(channels, HIDDEN, 1), nn.SiLU(), nn.Conv2d(HIDDEN, HIDDEN, 1), nn.SiLU(),
            nn.Conv2d(HIDDEN, LITE0_CHANNELS, 1),
        )  # fmt: skip
        self.seen: list[Tensor] = []
        self.kept: Tensor | None = None
        self.known = np.zeros(len(data), dtype=bool)
        self.mean = self.spread = torch.zeros(())
        seen = self.seen  # not self: a copy of the network, as the average is one, must not copy all this

        def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if module.training:
                seen[:] = [output]

        network.middle.register_forward_hook(watch)

    def objectives(self, rows: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        """Of the pass just made over these rows (B,): for the network, and for the projector alone."""
        (hidden,) = self.seen
        self.seen.clear()
        self.device = hidden.device
        target = self._targets(rows.numpy(), hidden.shape[2:]).to(hidden.device)
        target = torch.where(mirrored[:, None, None, None], target.flip(3), target)
        return self._apart(hidden, target), self._apart(hidden.detach(), target)

    def _apart(self, hidden: Tensor, target: Tensor) -> Tensor:
        told = F.normalize(self.projector(hidden).float(), dim=1)
        return 1 - (told * target).sum(1).mean()

    def _targets(self, rows: npt.NDArray[np.int64], size: torch.Size) -> Tensor:
        """Features (B, C, h, w) of unit length at each place."""
        if self.size != tuple(size):
            self._begin(size)
        return F.normalize((self._features(rows).float() - self.mean) / self.spread, dim=1)

    def _begin(self, size: torch.Size) -> None:
        self.size = (size[0], size[1])
        shape = (len(self.data), LITE0_CHANNELS, *size)
        self.kept = torch.zeros(shape, dtype=torch.float16) if 2 * math.prod(shape) <= MOST_BYTES else None
        self.known[:] = False
        some = self._features(self.data.train[:: max(1, len(self.data.train) // MEASURED)]).float()
        self.mean = some.mean((0, 2, 3))[:, None, None]
        self.spread = some.std((0, 2, 3))[:, None, None].clamp_min(1e-3)

    def _features(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """(B, C, h, w) on the CPU; seen the first time that they are asked for, where they are kept."""
        if self.kept is None:
            return torch.cat([self._see(part) for part in _parts(rows)])
        for part in _parts(rows[~self.known[rows]]):
            self.kept[torch.from_numpy(part)] = self._see(part)
            self.known[part] = True
        return self.kept[torch.from_numpy(rows)]

    def _see(self, rows: npt.NDArray[np.int64]) -> Tensor:
        pictures = torch.from_numpy(self.data.uint8(rows)).permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1
        height, width = (min(max(STRIDE * places, SIDES[0]), SIDES[1]) for places in self.size)
        features = see_lite0(F.interpolate(pictures, (height, width), mode="bilinear", antialias=True))
        return F.adaptive_avg_pool2d(features, self.size).half().cpu()


def _parts(rows: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    for start in range(0, len(rows), AT_ONCE):
        yield rows[start : start + AT_ONCE]
