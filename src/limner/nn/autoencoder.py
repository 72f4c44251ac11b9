"""The first stage of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, section 3.1): an encoder and a decoder
with a latent between them that is regularised by a small KL term or by a codebook.

It expresses CompVis's and diffusers' autoencoders exactly; what their checkpoints force is a constructor argument or
a concatenation at import. Shapes: x (B, C, H, W) in [-1, 1]; z (B, c, H/f, W/f).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limner.errors import LimnerError
from limner.nn.attention import SelfAttention
from limner.nn.layers import Downsample, ResBlock, Upsample
from limner.nn.norm import GroupNorm
from limner.nn.quantizer import Quantised, VectorQuantizer
from limner.nn.tiling import tiled
from limner.nn.tiny import TinyDecoder, TinyEncoder
from limner.nn.unet import Level, run_stages

Middle = Literal["attention", "none"]
LOG_VARIANCE_RANGE = (-30.0, 20.0)
FIRST_LOG_VARIANCE = -6.0
"""Where a new encoder starts: at 0, noise as large as the latents hides them for the first thousands of pictures."""


@dataclass(frozen=True)
class Posterior:
    """q(z | x): a diagonal Gaussian, or the single point `mean` where log_variance is None (VQ). All (B, c, h, w)."""

    mean: Tensor
    log_variance: Tensor | None = None

    @property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.log_variance is None else torch.exp(0.5 * self.log_variance)

    def sample(self, rng: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """One draw, with standard normal `noise` where it is given; otherwise the noise is drawn on the generator's
        device, so that it doesn't depend on the model's."""
        if self.log_variance is None:
            return self.mean
        if noise is None:
            noise = torch.randn(self.mean.shape, generator=rng, device=rng.device if rng else self.mean.device)
        return torch.addcmul(self.mean, self.std, noise.to(self.mean))

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) in nats, summed over the latent: (B,)."""
        if self.log_variance is None:
            return self.mean.new_zeros(len(self.mean))
        each = self.mean.square() + self.log_variance.exp() - 1 - self.log_variance
        return 0.5 * each.sum(dim=(1, 2, 3))


@dataclass(frozen=True)
class Reconstruction:
    """One training pass: the picture made from the picture, and what its losses need."""

    image: Tensor
    posterior: Posterior
    quantised: Quantised | None


@dataclass(frozen=True)
class Bricks:
    """Makes the blocks of encoder and decoder: what they all share is said once."""

    groups: int
    eps: float
    dropout: float
    convolve: bool

    def residual(self, channels: int, out: int) -> ResBlock:
        return ResBlock(channels, out, dropout=self.dropout, groups=self.groups, eps=self.eps)

    def attention(self, channels: int) -> SelfAttention:
        return SelfAttention(channels, heads=1, groups=self.groups, eps=self.eps)

    def level(self, channels: int, level: Level, blocks: int) -> list[nn.Module]:
        """`blocks` residual blocks, each followed by attention where the level asks for it."""
        bricks: list[nn.Module] = []
        for i in range(blocks):
            bricks.append(self.residual(level.channels if i else channels, level.channels))
            bricks += [self.attention(level.channels)] if level.attention else []
        return bricks

    def middle(self, channels: int, kind: Middle) -> nn.Sequential:
        between = [self.attention(channels)] if kind == "attention" else []
        return nn.Sequential(self.residual(channels, channels), *between, self.residual(channels, channels))


class Encoder(nn.Module):
    """(B, channels, H, W) -> (B, out_channels, H/f, W/f), f = patch x 2^(levels - 1)."""

    def __init__(self, channels: int, out_channels: int, levels: Sequence[Level], bricks: Bricks, *,
                 middle: Middle, patch: int = 1, stem_channels: int | None = None) -> None:  # fmt: skip
        super().__init__()
        self.patch = patch
        width = stem_channels or levels[0].channels
        self.stem = nn.Conv2d(channels * patch**2, width, 3, padding=1)
        self.down = nn.ModuleList()
        for i, level in enumerate(levels):
            blocks = bricks.level(width, level, level.blocks)
            width = level.channels
            if i + 1 < len(levels):
                blocks.append(Downsample(width, bricks.convolve, asymmetric=True))
            self.down.append(nn.Sequential(*blocks))
        self.middle = bricks.middle(width, middle)
        self.norm = GroupNorm(width, bricks.groups, bricks.eps)
        self.out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor, rematerialise: bool = False) -> Tensor:
        x = self.stem(x if self.patch == 1 else F.pixel_unshuffle(x, self.patch))
        for stage in (*self.down, self.middle):
            x = run_stages(stage, x, rematerialise=rematerialise)
        return self.out(self.norm(x, silu=True))


class Decoder(nn.Module):
    """(B, in_channels, H/f, W/f) -> (B, channels, H, W). `up` runs from the coarsest level to the finest, with one
    residual block a level more than the encoder."""

    def __init__(self, channels: int, in_channels: int, levels: Sequence[Level], bricks: Bricks, *,
                 middle: Middle, patch: int = 1) -> None:  # fmt: skip
        super().__init__()
        self.patch = patch
        width = levels[-1].channels
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.middle = bricks.middle(width, middle)
        self.up = nn.ModuleList()
        for i, level in reversed(list(enumerate(levels))):
            blocks = bricks.level(width, level, level.blocks + 1)
            width = level.channels
            if i:
                blocks.append(Upsample(width, bricks.convolve))
            self.up.append(nn.Sequential(*blocks))
        self.norm = GroupNorm(width, bricks.groups, bricks.eps)
        self.out = nn.Conv2d(width, channels * patch**2, 3, padding=1)

    def forward(self, z: Tensor, rematerialise: bool = False) -> Tensor:
        x = self.stem(z)
        for stage in (self.middle, *self.up):
            x = run_stages(stage, x, rematerialise=rematerialise)
        x = self.out(self.norm(x, silu=True))
        return x if self.patch == 1 else F.pixel_shuffle(x, self.patch)


class Autoencoder(nn.Module):
    """Encoder, regularised latent, decoder.

    channels: of the picture. latent_channels: c. quantizer: the codebook of a VQ autoencoder; without it the latent
    is a diagonal Gaussian, or a point where blocks are tiny (`nn/tiny.py`). z_channels: between the networks and the
    1x1 convolutions, where it isn't c. stem_channels: width before the first level, where it isn't the level's. The
    decoder may be another one than the encoder's mirror, smaller and faster: decoder_levels, decoder_patch,
    decoder_middle. The rest is as in `limner.config.AutoencoderConfig`.

    The buffers `latent_mean` and `latent_std` (c,) are measured after training; `normalise` brings latents to zero
    mean and unit variance by channel, and diffusion sees only such latents.

    Raises LimnerError when encoder and decoder don't have the same f.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        channels: int,
        levels: Sequence[Level],
        latent_channels: int = 4,
        *,
        quantizer: VectorQuantizer | None = None,
        patch: int = 1,
        middle: Middle = "attention",
        blocks: Literal["residual", "tiny"] = "residual",
        decoder_levels: Sequence[Level] | None = None,
        decoder_patch: int | None = None,
        decoder_middle: Middle | None = None,
        z_channels: int | None = None,
        stem_channels: int | None = None,
        quant_conv: bool = True,
        resample: Literal["conv", "pool"] = "conv",
        norm_groups: int = 32,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        decoder_levels, decoder_patch = decoder_levels or levels, decoder_patch or patch
        z_channels = z_channels or latent_channels
        self.channels, self.latent_channels = channels, latent_channels
        self.factor = patch * 2 ** (len(levels) - 1)
        self.gradient_checkpointing = gradient_checkpointing
        decoder_factor = decoder_patch * 2 ** (len(decoder_levels) - 1)
        if decoder_factor != self.factor:
            raise LimnerError(f"autoencoder: the encoder shrinks by {self.factor}, but decoder_levels and "
                              f"decoder_patch enlarge by {decoder_factor}; they should be the same")  # fmt: skip
        if not quant_conv and z_channels != latent_channels:
            raise LimnerError(f"autoencoder: z_channels {z_channels} without quant_conv should be {latent_channels}")
        moments = 1 if quantizer or blocks == "tiny" else 2
        if blocks == "tiny":
            tiny = _tiny_width(levels, decoder_levels, plain=patch == decoder_patch == 1 and not quant_conv)
            self.encoder = TinyEncoder(channels, latent_channels, tiny, [level.blocks for level in levels])
            self.decoder = TinyDecoder(channels, latent_channels, tiny, [level.blocks for level in decoder_levels])
        else:
            bricks = Bricks(norm_groups, norm_eps, dropout, convolve=resample == "conv")
            self.encoder = Encoder(channels, moments * z_channels, levels, bricks, middle=middle, patch=patch,
                                   stem_channels=stem_channels)  # fmt: skip
            self.decoder = Decoder(channels, z_channels, decoder_levels, bricks, middle=decoder_middle or middle,
                                   patch=decoder_patch)  # fmt: skip
        project = partial(nn.Conv2d, kernel_size=1)
        self.quant_conv = project(moments * z_channels, moments * latent_channels) if quant_conv else nn.Identity()
        self.post_quant_conv = project(latent_channels, z_channels) if quant_conv else nn.Identity()
        self.point = moments == 1
        if isinstance(self.encoder, Encoder) and quantizer is None:
            last = self.quant_conv if isinstance(self.quant_conv, nn.Conv2d) else self.encoder.out
            assert last.bias is not None
            nn.init.constant_(last.bias[latent_channels:], FIRST_LOG_VARIANCE)
        self.quantizer = quantizer
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))
        self._frozen = False

    def freeze(self) -> Autoencoder:
        """For good in evaluation mode and out of training: the first stage of a diffusion model."""
        self._frozen = True
        return self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Autoencoder:
        return super().train(mode and not self._frozen)

    def forward(self, x: Tensor, rng: torch.Generator | None = None, noise: Tensor | None = None,
                warp: Callable[[Tensor], Tensor] | None = None) -> Reconstruction:  # fmt: skip
        """Encode, draw or quantise, decode: the training pass. Raises LimnerError as `encode` does.

        rng: for the draw, where `noise` (B, c, h, w) isn't given, and for restarts of the codebook. warp: applied to
        the latent before it is quantised or decoded (equivariance regularisation).
        """
        posterior = self.encode(x)
        z = posterior.sample(rng, noise)
        z = z if warp is None else warp(z)
        if self.quantizer is None:
            return Reconstruction(self._decode(z), posterior, None)
        quantised = self.quantizer(z, rng)
        return Reconstruction(self._decode(quantised.z), posterior, quantised)

    def encode(self, x: Tensor, tile: int | None = None) -> Posterior:
        """q(z | x), z as the networks make it (not normalised); for VQ the latent before quantisation.

        tile: side in pixels of overlapping tiles for large pictures. Raises LimnerError for another number of
        channels, or a size that f doesn't divide (says which would do).
        """
        self._check_image(x)
        if tile is None or max(x.shape[2:]) <= tile:
            return self._posterior(self._moments(x))
        cells = self._cells(tile)
        return self._posterior(tiled(self._moments, x, cells, cells // 4, shrink=self.factor))

    def decode(self, z: Tensor, tile: int | None = None) -> Tensor:
        """The picture of a latent (not normalised), about in [-1, 1]; VQ quantises first, in each tile alike.

        Raises LimnerError when z has another number of channels.
        """
        if z.ndim != 4 or z.shape[1] != self.latent_channels:
            raise LimnerError(f"latent: shape {tuple(z.shape)} should be (B, {self.latent_channels}, h, w)")
        if self.quantizer is not None:
            z, _ = self.quantizer.quantise(z)
        if tile is None or max(z.shape[2:]) * self.factor <= tile:
            return self._decode(z)
        cells = self._cells(tile)
        return tiled(self._decode, z, cells, cells // 4, grow=self.factor)

    def normalise(self, z: Tensor) -> Tensor:
        """Zero mean, unit variance by channel: what diffusion sees."""
        return (z - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def denormalise(self, z: Tensor) -> Tensor:
        """The inverse of `normalise`: what `decode` takes."""
        return torch.addcmul(self.latent_mean[:, None, None], z, self.latent_std[:, None, None])

    def sizes_near(self, height: int, width: int) -> str:
        """The nearest sizes that f divides, for error messages: `60x64 or 64x64`."""
        below = [max(side // self.factor, 1) * self.factor for side in (height, width)]
        above = [-(-side // self.factor) * self.factor for side in (height, width)]
        return " or ".join(dict.fromkeys(f"{h}x{w}" for h, w in (below, above)))

    def _check_image(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise LimnerError(f"image: shape {tuple(x.shape)} should be (B, {self.channels}, H, W)")
        height, width = x.shape[2:]
        if height % self.factor or width % self.factor:
            raise LimnerError(f"image: {height}x{width} is not a multiple of the autoencoder's f = {self.factor}; "
                              f"{self.sizes_near(height, width)} would do")  # fmt: skip

    def _cells(self, tile: int) -> int:
        if tile < 4 * self.factor or tile % self.factor:
            raise LimnerError(f"tile: {tile} should be a multiple of {self.factor}, at least {4 * self.factor}")
        return tile // self.factor

    def _moments(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # a third faster on a CPU
        return self.quant_conv(self.encoder(x, self.gradient_checkpointing and self.training))

    def _posterior(self, moments: Tensor) -> Posterior:
        if self.quantizer is not None:
            return Posterior(self.quantizer.prepare(moments.movedim(1, -1)).movedim(-1, 1))
        if self.point:
            return Posterior(moments.float())
        mean, log_variance = moments.float().chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))

    def _decode(self, z: Tensor) -> Tensor:
        z = z.contiguous(memory_format=torch.channels_last)
        return self.decoder(self.post_quant_conv(z), self.gradient_checkpointing and self.training)


def _tiny_width(levels: Sequence[Level], decoder_levels: Sequence[Level], *, plain: bool) -> int:
    """The one width of a tiny autoencoder. Raises LimnerError where there are several, or what it doesn't have."""
    widths = {level.channels for level in (*levels, *decoder_levels)}
    if len(widths) > 1 or not plain or any(level.attention for level in (*levels, *decoder_levels)):
        raise LimnerError("autoencoder: blocks tiny should have levels of one width, without attention, patches and "
                          "quant_conv")  # fmt: skip
    return widths.pop()
