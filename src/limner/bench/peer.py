"""One network twice: diffusers' own, and Limner's with the same weights; and a training step and a guided picture by
each, with what its own documentation advises for speed.

diffusers' training step is that of its script for unconditional training, with labels; its guided picture is 50 steps
of DDIM, the conditional and the unconditional half in one batch.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from limner import build, interop
from limner.bench.rounds import Contender
from limner.config import RunConfig
from limner.core.guidance import classifier_free, interval
from limner.core.samplers import dpmpp_2m
from limner.errors import LimnerError
from limner.hardware import autocast
from limner.nn import int8
from limner.nn.conditioners import Embedded
from limner.nn.int8 import quantised
from limner.training.clock import Clock
from limner.training.loop import Training, accelerator_for
from limner.training.progress import Display
from limner.training.tasks import DiffusionTask

CLASSES, NULL = 11, 10
SIZE, GUIDANCE = 32, 3.0
PEER_STEPS, OWN_STEPS = 50, 10
INTERVAL = (0.1, 0.9)
NETWORK = {
    "sample_size": SIZE, "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
    "block_out_channels": (32, 64, 64, 64), "num_class_embeds": CLASSES,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
}  # fmt: skip
"""Of the size that is usual for small pictures: 2.2 million parameters."""
INT8 = "limner int8"
"""The contender that computes in 8 bits."""


def installed() -> bool:
    """Whether there is a peer to be compared with."""
    try:
        import diffusers  # noqa: F401
    except ImportError:
        return False
    return True


def has_int8(device: torch.device) -> bool:
    """Whether networks can be had in 8 bits there."""
    return device.type == "cpu" and int8.available()


@dataclass
class Pair:
    """The same weights in both libraries, on one device."""

    peer: Any
    own: build.Model
    config: RunConfig
    device: torch.device

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.peer.parameters())

    def flops(self, batch: int = 1) -> int:
        """Floating-point operations of one call, a product and a sum being two."""
        from torch.utils.flop_counter import FlopCounterMode

        x, time, label = _inputs(batch, self.device)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.own.raw(x, time, self.own.embed({"label": label}, batch))
        return counter.get_total_flops()

    def int8_error(self) -> float | None:
        """Distance of the 8-bit network's output from the exact one's over its norm; None where there is none."""
        if not has_int8(self.device):
            return None
        x, time, label = _inputs(4, self.device)
        tau = self.own.embed({"label": label}, 4)
        with torch.no_grad():
            exact, near = (net(x, time, tau.vector) for net in (self.own.network, quantised(self.own.network)))
        return float((near - exact).norm() / exact.norm())

    def difference(self) -> float:
        """Largest difference between both outputs over the largest output, in float32."""
        x, time, label = _inputs(4, self.device)
        with torch.no_grad():
            theirs = self.peer(x, time, class_labels=label).sample
            ours = self.own.raw(x, time, self.own.embed({"label": label}, 4))
        return float((theirs - ours).abs().max() / theirs.abs().max())


def pair(device: torch.device) -> Pair:
    """Fresh random weights in both. Raises LimnerError where the outputs differ: then there's nothing to compare."""
    import diffusers

    torch.manual_seed(0)
    peer: Any = diffusers.UNet2DModel(**NETWORK)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        found = interop.read(Path(folder))
    own = build.model(found.config)
    own.load_state_dict(found.state)
    made = Pair(peer.to(device), own.to(device), found.config, device)
    if (worst := made.difference()) > 1e-4:
        raise LimnerError(f"the two networks differ by {worst:.1e}; with equal weights they should agree to 1e-4")
    return made


# --- sampling ---------------------------------------------------------------------------------------------------------


def calls(pair: Pair, batch: int) -> dict[str, Contender]:
    """One call of the network on `batch` pictures; for the peer as it is, and by its advice for speed. Limner's as
    it is, and in 8 bits where the device has them (`INT8`)."""
    x, time, label = _inputs(batch, pair.device)
    build.ready(pair.own, pair.device)
    plain, tuned = (
        copy.deepcopy(pair.peer).eval(),
        copy.deepcopy(pair.peer).eval().to(memory_format=torch.channels_last),
    )
    half = copy.deepcopy(pair.peer).eval().to(torch.bfloat16, memory_format=torch.channels_last)
    fast_x = x.contiguous(memory_format=torch.channels_last)
    tau = pair.own.embed({"label": label}, batch)

    @torch.no_grad()
    def own() -> Tensor:
        with autocast("auto", pair.device):
            return pair.own.raw(fast_x, time, tau)

    @torch.no_grad()
    def autocast_peer() -> Tensor:
        with torch.autocast(pair.device.type, torch.bfloat16):
            return tuned(fast_x, time, class_labels=label).sample

    @torch.no_grad()
    def plain_peer() -> Tensor:
        return plain(x, time, class_labels=label).sample

    @torch.no_grad()
    def half_peer() -> Tensor:
        return half(fast_x.bfloat16(), time, class_labels=label).sample

    made: dict[str, Contender] = {"limner": own}
    if has_int8(pair.device):
        near = quantised(pair.own.network)

        @torch.no_grad()
        def own_int8() -> Tensor:
            with autocast("auto", pair.device):
                return near(fast_x, time, tau.vector)

        made[INT8] = own_int8
    return {**made, "diffusers fp32": plain_peer, "diffusers bf16 autocast, channels_last": autocast_peer,
            "diffusers bf16 weights, channels_last": half_peer}  # fmt: skip


def guided(pair: Pair, batch: int) -> dict[str, Contender]:
    """`batch` guided pictures from noise: the peer's usual 50 steps of DDIM, and Limner's recommended 10 steps of
    DPM++ 2M with guidance in an interval."""
    import diffusers

    build.ready(pair.own, pair.device)
    x, _, label = _inputs(batch, pair.device)
    null = torch.full_like(label, NULL)
    peer = copy.deepcopy(pair.peer).eval().to(memory_format=torch.channels_last)
    scheduler: Any = diffusers.DDIMScheduler(clip_sample=True)
    path = build.schedule(pair.config).path(OWN_STEPS, "log_snr")

    @torch.no_grad()
    def theirs() -> Tensor:
        scheduler.set_timesteps(PEER_STEPS)
        z, both = x, torch.cat([null, label])
        with torch.autocast(pair.device.type, torch.bfloat16):
            for step in scheduler.timesteps:
                eps = peer(torch.cat([z, z]), step, class_labels=both).sample
                without, with_label = eps.chunk(2)
                z = scheduler.step(without + GUIDANCE * (with_label - without), step, z).prev_sample
        return z

    @torch.no_grad()
    def own(model: build.Model = pair.own) -> Tensor:
        with autocast("auto", pair.device):
            tau, nothing = (model.embed({"label": y}, batch) for y in (label, null))
            plain = build.denoiser(model, pair.config)
            both = classifier_free(plain, GUIDANCE, null=nothing, join=Embedded.cat)
            return dpmpp_2m(interval(both, plain, *INTERVAL), x, path, cond=tau)

    made: dict[str, Contender] = {"limner": own}
    if has_int8(pair.device):
        made[INT8] = partial(own, build.Model(quantised(pair.own.network), pair.own.conditioner))
    return {**made, "diffusers": theirs}


# --- training ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def steps(pair: Pair, batch: int) -> Iterator[dict[str, Contender]]:
    """One training step on `batch` pictures: Limner's by its own loop, moving average included; the peer's by its
    script's, as it is and with the mixed precision and memory format that it advises."""
    with tempfile.TemporaryDirectory() as folder, Display("bench", silent=True) as display:
        own = _own_step(pair, batch, Path(folder), display)
        yield {
            "limner": own,
            "diffusers fp32": _peer_step(copy.deepcopy(pair.peer), batch, pair.device, mixed=False),
            "diffusers bf16 autocast, channels_last": _peer_step(
                copy.deepcopy(pair.peer).to(memory_format=torch.channels_last), batch, pair.device, mixed=True
            ),
        }


class Noise:
    """Random pictures with labels, in the shape of the loop's data."""

    train, held_out, digest = np.arange(512), np.arange(0), "noise"

    def __init__(self) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (512, 3, SIZE, SIZE), dtype=np.uint8)

    def batch(self, rows: npt.NDArray[np.int64], generator: np.random.Generator | None = None) -> dict[str, Any]:
        image = torch.from_numpy(self.pixels[rows]).float() / 127.5 - 1
        return {"image": image, "label": torch.from_numpy(rows % NULL)}

    def uint8(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return self.pixels[rows].transpose(0, 2, 3, 1)


def _own_step(pair: Pair, batch: int, folder: Path, display: Display) -> Contender:
    from limner.training.draws import Batches

    settings = {"batch": batch, "images": 10**9, "compile": "off", "precision": "auto"}  # as presets have it
    training = pair.config.training.model_copy(update=settings)
    config = pair.config.model_copy(update={"training": training})
    data, model = Noise(), copy.deepcopy(pair.own).requires_grad_(True)
    accelerator = accelerator_for(config, folder)
    task = DiffusionTask(model, config, data)
    loop = Training(task, data, config, folder, Clock(0, 10**9, None, 0.0, 0.0), accelerator, display)
    stream = Batches(data, 0, batch).stream(0, ahead=pair.device.type != "cpu")
    return lambda: loop.step(next(stream))


def _peer_step(model: Any, batch: int, device: torch.device, *, mixed: bool) -> Contender:
    import diffusers
    from diffusers.training_utils import EMAModel

    model.train()
    data = Noise()
    scheduler: Any = diffusers.DDPMScheduler()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, betas=(0.95, 0.999), weight_decay=1e-6, fused=mixed)
    average = EMAModel(model.parameters(), use_ema_warmup=True)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 500))
    chance = np.random.default_rng(0)

    def step() -> None:
        drawn = data.batch(chance.integers(0, 512, batch))
        image, label = drawn["image"].to(device), drawn["label"].to(device)
        noise = torch.randn_like(image)
        times = torch.randint(0, 1000, (batch,), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            made = model(scheduler.add_noise(image, noise, times), times, class_labels=label).sample
            loss = F.mse_loss(made.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        average.step(model.parameters())

    return step


def _inputs(batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Noise (B, 3, 32, 32), DDPM steps (B,) and labels (B,), the same each time."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, SIZE, SIZE, generator=generator)
    return x.to(device), torch.linspace(0, 999, batch).round().to(device), (torch.arange(batch) % NULL).to(device)


def memory_growth(which: str, batch: int) -> int:
    """Bytes by which three training steps raise the peak of this process, which should be fresh."""
    made = pair(torch.device("cpu"))
    with steps(made, batch) as contenders:
        before = _peak()
        for _ in range(3):
            contenders[which]()
        return _peak() - before


def _peak() -> int:
    """Bytes that this process has had at most. On Linux from /proc: `ru_maxrss` begins with what the parent had."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
