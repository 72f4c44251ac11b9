"""The stage that learns to compress: reconstruction, perceptual, regularising and, late and by choice, adversarial
terms (Rombach et al. 2022, arXiv:2112.10752, section 3.1 and appendix G; Esser et al. 2021, arXiv:2012.09841)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from limner import build
from limner.config import AutoencoderConfig, AutoencoderLoss, KLConfig, RunConfig
from limner.errors import LimnerError
from limner.nn.autoencoder import Autoencoder, Reconstruction
from limner.nn.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_hinge,
    generator_hinge,
    r1_penalty,
)
from limner.nn.perceptual import perceptual_distance, psnr, ssim
from limner.nn.quantizer import perplexity
from limner.training.draws import Part, Source
from limner.training.preview import to_uint8
from limner.training.share import ALONE, Share
from limner.training.task import Losses, Means, Task, total

BATCH = 32
HELD_OUT_ROWS = 512
LATENT_ROWS = 1024
SSIM_SIDE = 11
SHRINKS = (0.5, 0.75, 1.0)

_log = logging.getLogger(__name__)


class AutoencoderTask(Task):
    """Learns to give back the picture through a small latent.

    model: holds the autoencoder and nothing else. data: where the previews' pictures come from. The discriminator is
    a module of its own, only where `autoencoder_loss.adversarial` isn't 0.
    """

    def __init__(self, model: build.Model, config: RunConfig, data: Source) -> None:
        self.model, self.config, self.loss = model, config, config.autoencoder_loss
        autoencoder = autoencoder_of(model)
        self.modules = {"model": model}
        if self.loss.adversarial:
            self.modules["discriminator"] = Adversary(autoencoder.channels, self.loss)
        one_shape_one_pass = not self.loss.adversarial and not self.loss.equivariance
        self.networks = (autoencoder.encoder, autoencoder.decoder) if one_shape_one_pass else ()
        self.hidden = [f"autoencoder.{name}" for name, weight in autoencoder.named_parameters()
                       if weight.ndim >= 2 and name.split(".")[1] in ("down", "middle", "up")]  # fmt: skip
        self.perceptual = perceptual_distance(self.loss.perceptual_network) if self.loss.perceptual else None
        self._shown = data.uint8(data.held_out[: config.training.previews])

    def losses(self, batch: Mapping[str, Any], rng: torch.Generator, progress: float) -> Losses:
        """Every term is logged as it stands before its weight; `adaptive_weight` is the adversarial one's."""
        x, part = batch["image"], batch["part"]
        autoencoder = autoencoder_of(self.model)
        warp = self._warp(part, x, autoencoder.factor)
        shape = (autoencoder.latent_channels, *(side // autoencoder.factor for side in x.shape[2:]))
        made = autoencoder(x, rng, part.noise(self.config.training.seed, shape, x.device), warp)
        target = x if warp is None else warp.picture(x)
        error = F.l1_loss if self.loss.pixel == "l1" else F.mse_loss
        logs = {"pixel": error(made.image.float(), target)}
        reconstruction = logs["pixel"]
        if self.perceptual is not None:
            logs["perceptual"] = self.perceptual.to(x.device)(target, made.image).mean()
            reconstruction = reconstruction + self.loss.perceptual * logs["perceptual"]
        objective = reconstruction + self._regulariser(made, target, logs)
        objectives = {"model": objective}
        adversary = self.modules.get("discriminator")
        if isinstance(adversary, Adversary):
            last_layer = autoencoder.decoder.out.weight
            verdict = adversary(target, made.image, reconstruction, last_layer, part.images)
            if verdict is not None:
                objectives = {"model": objective + verdict.for_model, "discriminator": verdict.for_discriminator}
                logs |= verdict.logs
        return Losses(objectives, {"loss": objectives["model"].detach()} | {n: t.detach() for n, t in logs.items()})

    def _regulariser(self, made: Reconstruction, target: Tensor, logs: dict[str, Tensor]) -> Tensor:
        """KL is weighted against the error summed over a picture, as in Rombach et al. 2022, hence the division."""
        if made.quantised is not None:
            logs |= {"codebook": made.quantised.loss, "perplexity": made.quantised.perplexity}
            return made.quantised.loss
        logs["kl"] = made.posterior.kl().mean()
        section = self.config.model
        assert isinstance(section, AutoencoderConfig)
        assert isinstance(section.regulariser, KLConfig)
        return section.regulariser.weight * logs["kl"] / target[0].numel()

    def _warp(self, part: Part, x: Tensor, factor: int) -> Warp | None:
        """The same for a whole step, whatever its parts."""
        chance, shrink, turns = torch.rand(3, generator=part.generator(self.config.training.seed, "warp")).tolist()
        if chance >= self.loss.equivariance:
            return None
        share = SHRINKS[int(shrink * len(SHRINKS))]
        return Warp((round(x.shape[2] // factor * share), round(x.shape[3] // factor * share)), factor, int(turns * 4))

    @torch.no_grad()
    def held_out(self, average: nn.Module, data: Source, share: Share = ALONE) -> dict[str, float]:
        """PSNR (dB), SSIM and perceptual distance of held-out pictures, with the latent's mode, and the perplexity of
        a codebook over all of them. Also measures the latents' mean and standard deviation anew, so that whatever is
        published after this is ready for diffusion."""
        autoencoder = autoencoder_of(average)
        measure_latents(autoencoder, data, share)
        live = autoencoder_of(self.model)
        live.latent_mean.copy_(autoencoder.latent_mean)
        live.latent_std.copy_(autoencoder.latent_std)
        means, quantizer, device = Means(), autoencoder.quantizer, autoencoder.latent_mean.device
        used = torch.zeros(0 if quantizer is None else quantizer.codes, device=device)
        for x, counts in pictures(data, data.held_out[:HELD_OUT_ROWS], device, share):
            z = autoencoder.encode(x).mode()
            measured = self.compare(x, autoencoder.decode(z).float().clamp(-1, 1))
            means.add({f"held_out_{name}": total(values) * counts for name, values in measured.items()})
            if quantizer is not None:
                used += torch.bincount(quantizer.quantise(z)[1].flatten(), minlength=quantizer.codes) * counts
        means.share(share.add_up)
        if quantizer is None:
            return means.read()
        return means.read() | {"held_out_perplexity": perplexity(share.add_up(used)).item()}

    def compare(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """PSNR, SSIM where the pictures are large enough for it, and perceptual distance, each (B,), in float32."""
        with torch.autocast(x.device.type, enabled=False):
            measured = {"psnr": psnr(x, y)}
            if min(x.shape[2:]) >= SSIM_SIDE:
                measured["ssim"] = ssim(x, y)
            if self.perceptual is not None:
                measured["perceptual"] = self.perceptual.to(x.device)(x, y)
        return measured

    @torch.no_grad()
    def preview(self, average: nn.Module, share: Share = ALONE) -> tuple[npt.NDArray[np.uint8], list[str]]:
        """Held-out pictures, each beside its reconstruction, with the PSNR below: one pass, which isn't shared."""
        if not len(self._shown):
            return self._shown, []
        autoencoder = autoencoder_of(average)
        x = as_images(self._shown, autoencoder.latent_mean.device)
        y = autoencoder.decode(autoencoder.encode(x).mode()).float().clamp(-1, 1)
        pairs = np.concatenate([self._shown, to_uint8(y)], axis=2)
        return pairs, [f"{value:.1f} dB" for value in psnr(x, y).tolist()]


@dataclass(frozen=True)
class Warp:
    """A latent shrunk to `cells` (height, width) and turned by quarters, and a picture treated alike: a decoder that
    maps one to the other has a latent that is smooth (Kouzelis et al. 2025, arXiv:2502.09509, eq. 5)."""

    cells: tuple[int, int]
    factor: int
    turns: int

    def __call__(self, z: Tensor) -> Tensor:
        return self._warped(z, self.cells)

    def picture(self, x: Tensor) -> Tensor:
        return self._warped(x, (self.cells[0] * self.factor, self.cells[1] * self.factor))

    def _warped(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        shrunk = F.interpolate(x.float(), size, mode="bicubic", antialias=True)
        return torch.rot90(shrunk, self.turns, (2, 3)).contiguous()


@dataclass(frozen=True)
class Verdict:
    """What the adversarial stage adds to either side's objective."""

    for_model: Tensor
    for_discriminator: Tensor
    logs: dict[str, Tensor]


class Adversary(nn.Module):
    """The patch discriminator and its part in the loss. It rests until `adversarial_from` images have been seen; then
    it learns at once, while its weight in the autoencoder's loss rises from zero over `adversarial_warmup` images.

    Should anything in it stop being finite it is left out for good (the buffer `off`, which checkpoints keep).
    """

    off: Tensor

    def __init__(self, channels: int, loss: AutoencoderLoss) -> None:
        super().__init__()
        self.loss = loss
        self.network = PatchDiscriminator(channels, loss.discriminator_channels, loss.discriminator_layers)
        self.register_buffer("off", torch.zeros((), dtype=torch.bool))

    def forward(self, real: Tensor, fake: Tensor, reconstruction: Tensor, last_layer: Tensor,
                images: int) -> Verdict | None:  # fmt: skip
        """real, fake: (B, C, H, W). reconstruction: the loss that the adversarial one is balanced against at
        `last_layer`. None: it isn't its time, or it is off."""
        if images < self.loss.adversarial_from or self.off:
            return None
        with torch.autocast(real.device.type, enabled=False):
            verdict = self._verdict(real.float(), fake.float(), reconstruction, last_layer, images)
        if not _everywhere(torch.stack([verdict.for_model, verdict.for_discriminator]).isfinite().all()):
            self.off.fill_(True)
            _log.warning("the adversarial stage is not finite at %d images; training goes on without it", images)
            return None
        return verdict

    def _verdict(self, real: Tensor, fake: Tensor, reconstruction: Tensor, last_layer: Tensor,
                 images: int) -> Verdict:  # fmt: skip
        real = real.detach().requires_grad_(self.loss.r1 > 0)
        on_real, on_fake = self.network(real), self.network(fake.detach())
        hinge = discriminator_hinge(on_real, on_fake)
        objective = hinge
        if self.loss.r1:
            objective = objective + self.loss.r1 * r1_penalty(on_real, real)
        if self.loss.lecam:
            objective = objective + self.loss.lecam * self.network.lecam(on_real, on_fake)
        fooled = generator_hinge(self.network(fake))
        balance = adaptive_weight(reconstruction, fooled, last_layer, self.loss.adaptive_max)
        logs = {
            "adversarial": fooled,
            "adaptive_weight": balance,
            "discriminator": hinge,
            "logits_real": on_real.mean(),
            "logits_fake": on_fake.mean(),
        }
        weight = self.loss.adversarial * self._rise(images) * balance
        return Verdict(weight * fooled, objective, logs)

    def _rise(self, images: int) -> float:
        """0 where the stage begins, 1 from the end of its warm-up."""
        since = images - self.loss.adversarial_from
        return 1.0 if since >= self.loss.adversarial_warmup else since / self.loss.adversarial_warmup


def autoencoder_of(model: nn.Module) -> Autoencoder:
    """The autoencoder inside a model. Raises LimnerError where it has none."""
    found = getattr(model, "autoencoder", None)
    if not isinstance(found, Autoencoder):
        raise LimnerError("this model works on pixels; it has no autoencoder")
    return found


def as_images(pixels: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    """uint8 (B, H, W, C) as images (B, C, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def pictures(data: Source, rows: npt.NDArray[np.int64], device: torch.device,
             share: Share) -> Iterator[tuple[Tensor, bool]]:  # fmt: skip
    """This process's share of the pictures of these rows, un-augmented, in batches of images; whether they count."""
    for number, counts in share.turns(-(-len(rows) // BATCH)):
        yield as_images(data.uint8(rows[number * BATCH : (number + 1) * BATCH]), device), counts


@torch.no_grad()
def measure_latents(autoencoder: Autoencoder, data: Source, share: Share = ALONE, rows: int = LATENT_ROWS) -> None:
    """Set `latent_mean` and `latent_std` to those of the latents of up to `rows` training pictures."""
    device = autoencoder.latent_mean.device
    sums = torch.zeros(3, autoencoder.latent_channels, dtype=torch.float64, device=device)
    for x, counts in pictures(data, data.train[:rows], device, share):
        posterior = autoencoder.encode(x)
        mean, variance = posterior.mean.double(), posterior.std.double().square()
        parts = [part.sum((0, 2, 3)) for part in (mean, mean.square() + variance, torch.ones_like(mean))]
        sums += torch.stack(parts) * counts
    added = share.add_up(sums)
    mean, square = added[:2] / added[2].clamp_min(1)
    autoencoder.latent_mean.copy_(mean)
    autoencoder.latent_std.copy_((square - mean.square()).clamp_min(1e-12).sqrt())


def _everywhere(flag: Tensor) -> bool:
    """Whether it holds on every process, so that all of them do the same."""
    if dist.is_available() and dist.is_initialized():
        flag = flag.to(torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)
