"""The codebook of a VQ autoencoder (van den Oord et al. 2017, arXiv:1711.00937).

Shapes: z (B, c, H, W) latents; indices (B, H, W) int64; codebook (K, c); N = B H W vectors of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from limner.errors import LimnerError

DISTANCES_AT_ONCE = 1 << 24
SMALLEST_COUNT = 1e-5


@dataclass(frozen=True)
class Quantised:
    """What quantising a batch gives.

    z: (B, c, H, W), the codes, with a gradient that reaches the encoder. indices: (B, H, W).
    loss: scalar, codebook and commitment terms. perplexity: exp of the entropy of this batch's usage, 1 to K.
    """

    z: Tensor
    indices: Tensor
    loss: Tensor
    perplexity: Tensor


def straight_through(z: Tensor, code: Tensor) -> Tensor:
    """The code forward, the identity backward (van den Oord et al. 2017, section 3.2)."""
    return z + (code - z).detach()


def rotated(z: Tensor, code: Tensor) -> Tensor:
    """The code forward; backward the rotation and rescaling that carry z onto its code, taken as constants, so that
    the angle between gradient and code is kept (Fifty et al. 2024, arXiv:2410.06424, eq. 4). z, code: (N, c)."""
    z_hat, code_hat = F.normalize(z, dim=1).detach(), F.normalize(code, dim=1).detach()
    mirror = F.normalize(z_hat + code_hat, dim=1)
    scale = (code.norm(dim=1, keepdim=True) / z.norm(dim=1, keepdim=True).clamp_min(1e-12)).detach()
    turned = z - 2 * mirror * (mirror * z).sum(1, keepdim=True) + 2 * code_hat * (z_hat * z).sum(1, keepdim=True)
    return scale * turned


class VectorQuantizer(nn.Module):
    """Each latent vector becomes the nearest of K codes.

    update: `gradient` learns the codebook by its loss; `ema` keeps it at the moving average of the vectors that
    chose each code (van den Oord et al. 2017, appendix A.1), in the buffers `count` and `total`.
    estimator: how the gradient passes, `straight_through` or `rotation`. normalised: vectors and codes on the unit
    sphere (Yu et al. 2022, arXiv:2110.04627, section 3.2). commitment: beta of eq. 3. A code that no vector chose for
    `restart_after` training batches restarts at a vector of the batch; a new codebook starts that way altogether.
    """

    def __init__(
        self,
        codes: int,
        channels: int,
        *,
        update: Literal["gradient", "ema"] = "ema",
        estimator: Literal["straight_through", "rotation"] = "straight_through",
        normalised: bool = False,
        commitment: float = 0.25,
        ema_decay: float = 0.99,
        restart_after: int = 200,
    ) -> None:
        super().__init__()
        self.codes, self.ema, self.normalised = codes, update == "ema", normalised
        self.estimate = rotated if estimator == "rotation" else straight_through
        self.commitment, self.ema_decay, self.restart_after = commitment, ema_decay, restart_after
        start = torch.empty(codes, channels).uniform_(-1 / codes, 1 / codes)
        self.codebook = nn.Parameter(self.prepare(start), requires_grad=not self.ema)
        self.register_buffer("idle", torch.full((codes,), restart_after))
        if self.ema:
            self.register_buffer("count", torch.ones(codes))
            self.register_buffer("total", self.codebook.detach().clone())

    idle: Tensor
    count: Tensor
    total: Tensor

    def prepare(self, z: Tensor) -> Tensor:
        """Vectors (..., c) as the codebook sees them: on the unit sphere where codes are normalised."""
        return F.normalize(z, dim=-1) if self.normalised else z

    def nearest(self, vectors: Tensor) -> Tensor:
        """Indices (N,) of the codes nearest to vectors (N, c), in float32 whatever the autocast."""
        with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
            codebook = self.prepare(self.codebook.float())
            squares = codebook.square().sum(1)
            pieces = vectors.float().split(max(1, DISTANCES_AT_ONCE // self.codes))
            return torch.cat([torch.addmm(squares, piece, codebook.T, alpha=-2).argmin(1) for piece in pieces])

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (B, c, H, W) of indices (B, H, W). Raises LimnerError for an index beyond the codebook."""
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.codes:
            raise LimnerError(f"indices: codes should be 0 to {self.codes - 1}, found up to {int(indices.max())}")
        return F.embedding(indices, self.prepare(self.codebook)).movedim(-1, 1)

    def quantise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, c, H, W) and indices (B, H, W), with no gradient and no change of state."""
        vectors = self.prepare(z.movedim(1, -1))
        indices = self.nearest(vectors.flatten(0, -2)).view(vectors.shape[:-1])
        return F.embedding(indices, self.prepare(self.codebook)).detach().movedim(-1, 1).to(z.dtype), indices

    def forward(self, z: Tensor, rng: torch.Generator | None = None) -> Quantised:
        """Quantise with gradient; in training mode also update the codebook's state. rng picks restarts."""
        channels_last = z.movedim(1, -1).float()
        vectors = self.prepare(channels_last.flatten(0, -2))
        if self.training:
            self._restart(vectors.detach(), rng)
        indices = self.nearest(vectors)
        code = F.embedding(indices, self.prepare(self.codebook))
        loss = self.commitment * F.mse_loss(vectors, code.detach())
        if not self.ema:
            loss = loss + F.mse_loss(code, vectors.detach())
        used = torch.bincount(indices, minlength=self.codes).to(vectors.dtype)
        output = self.estimate(vectors, code.detach()).view_as(channels_last).movedim(-1, 1)
        if self.training:
            self._update(vectors.detach(), indices, used)
        return Quantised(output, indices.view(channels_last.shape[:-1]), loss, perplexity(used))

    @torch.no_grad()
    def _update(self, vectors: Tensor, indices: Tensor, used: Tensor) -> None:
        """Usage, and for `ema` N_k <- d N_k + (1 - d) n_k, m_k <- d m_k + (1 - d) sum z, e_k = m_k / N_k."""
        used = _summed(used.clone())
        self.idle.copy_(torch.where(used > 0, 0, self.idle + 1))
        if not self.ema:
            return
        sums = _summed(torch.zeros_like(self.total).index_add_(0, indices, vectors))
        self.count.lerp_(used, 1 - self.ema_decay)
        self.total.lerp_(sums, 1 - self.ema_decay)
        alive = self.count[:, None] > SMALLEST_COUNT
        mean = self.total / self.count[:, None].clamp_min(SMALLEST_COUNT)
        self.codebook.copy_(self.prepare(torch.where(alive, mean, self.codebook)))

    @torch.no_grad()
    def _restart(self, vectors: Tensor, rng: torch.Generator | None) -> None:
        """Codes unused for too long take vectors of this batch, without repetition as far as they reach."""
        dead = (self.idle >= self.restart_after).nonzero().squeeze(1)
        if not len(dead):
            return
        order = torch.randperm(len(vectors), generator=rng, device=rng.device if rng else None).to(vectors.device)
        fresh = vectors[order.repeat(-(-len(dead) // len(order)))[: len(dead)]]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(fresh, src=0)
        self.codebook[dead] = fresh.to(self.codebook.dtype)
        self.idle[dead] = 0
        if self.ema:
            self.count[dead] = 1.0
            self.total[dead] = fresh


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of usage counts (K,): K when all are used alike, 1 when one is."""
    share = counts.float() / counts.sum().clamp_min(1)
    return torch.special.entr(share).sum().exp()


def _summed(x: Tensor) -> Tensor:
    """The sum over all processes, where there are several."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x
