"""The patch discriminator that sharpens an autoencoder (Isola et al. 2017, arXiv:1611.07004; Esser et al. 2021,
arXiv:2012.09841), its hinge losses and its regularisers. Logits are (B, 1, h, w), one verdict a patch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ANCHOR_DECAY = 0.99
GROUPS = 32


class PatchDiscriminator(nn.Module):
    """Picture (B, C, H, W) -> logits, positive for real: `layers` strided 4x4 convolutions and two unstrided.

    A verdict sees 16, 34, 70 pixels square at 1, 2, 3 layers. Group norm stands where the original has batch norm,
    so that a verdict doesn't depend on the batch: PyTorch's own, since a gradient penalty differentiates twice. The
    buffers `real_anchor` and `fake_anchor` are LeCam's.
    """

    real_anchor: Tensor
    fake_anchor: Tensor

    def __init__(self, channels: int = 3, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            before, after = width * min(2 ** (i - 1), 8), width * min(2**i, 8)
            stride = 2 if i < layers else 1
            blocks += [
                nn.Conv2d(before, after, 4, stride, 1, bias=False),
                nn.GroupNorm(math.gcd(GROUPS, after), after),
                nn.LeakyReLU(0.2),
            ]
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(width * min(2**layers, 8), 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
        self.register_buffer("real_anchor", torch.zeros(()))
        self.register_buffer("fake_anchor", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def lecam(self, real: Tensor, fake: Tensor) -> Tensor:
        """Keeps verdicts near the moving average of the other side's (Tseng et al. 2021, arXiv:2104.03310, eq. 7).

        real, fake: logits of a batch. In training mode also moves the averages.
        """
        if self.training:
            self.real_anchor.lerp_(real.detach().mean().float(), 1 - ANCHOR_DECAY)
            self.fake_anchor.lerp_(fake.detach().mean().float(), 1 - ANCHOR_DECAY)
        return (real - self.fake_anchor).square().mean() + (fake - self.real_anchor).square().mean()


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """max(0, 1 - D(x)) and max(0, 1 + D(x')), halved (Lim & Ye 2017, arXiv:1705.02894): a scalar, 1 at D = 0."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_hinge(fake: Tensor) -> Tensor:
    """-D(x'): what the autoencoder lowers."""
    return -fake.mean()


def r1_penalty(logits: Tensor, real: Tensor) -> Tensor:
    """|grad_x D(x)|^2 / 2 at real pictures (Mescheder et al. 2018, arXiv:1801.04406, eq. 9), mean over the batch.

    real: (B, C, H, W), with requires_grad, from which `logits` were computed.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return 0.5 * gradient.square().sum(dim=(1, 2, 3)).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, largest: float) -> Tensor:
    """|grad L_rec| / |grad L_adv| at the decoder's last layer, at most `largest` (Esser et al. 2021, eq. 7)."""
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
        for loss in (reconstruction, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, largest).detach()
