"""What an autoencoder loses: pictures through it and back, compared one by one and as a set.

made = reconstruct(limner.load("runs/autoencoder"), "photos")
made["PSNR"].value, made["rFD"].value
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from limner import __version__, build
from limner.data.dataset import Dataset, prepare
from limner.errors import LimnerError
from limner.evaluation import metrics
from limner.evaluation.arrays import npz_batches
from limner.evaluation.collect import BATCH, KEEP
from limner.evaluation.features import FeatureNetwork, network
from limner.evaluation.report import Figure, Report
from limner.generator import Generator, to_uint8
from limner.nn.perceptual import perceptual_distance, psnr, ssim
from limner.nn.quantizer import perplexity
from limner.outputs import Picture, writer

SSIM_SIDE, PERCEPTUAL_SIDE = 11, 16
"""Pixels a side from which on these can be measured."""
SHOWN = 16
"""Pairs of original and reconstruction in a `.png`."""
Keep = Callable[[int, npt.NDArray[np.uint8], npt.NDArray[np.uint8], npt.NDArray[np.float64]], None]
"""Writes a batch: number of its first picture, originals and reconstructions uint8 (B, H, W, C), PSNR (B,) in dB."""


def reconstruct(
    generator: Generator,
    images: Any = None,
    *,
    num: int | None = None,
    features: str | FeatureNetwork = "efficientnet-lite0",
    batch: int = BATCH,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Encode pictures and decode them again.

    generator: of an autoencoder's run, or of one that draws in latents. images: a path, an `.npz`, uint8 (N, H, W, C),
    a data set; default: the run's own held-out pictures. num: at most so many. out: a `.png`, which shows the first
    originals with their reconstructions beside them; or a directory, `.npz` or `.tar` for all reconstructions.

    Figures, each with its 95% interval: PSNR (dB), SSIM (from 11 pixels a side), the perceptual distance that
    autoencoders are trained with (from 16), rFD (the Fréchet distance of reconstructions to their originals, from two
    pictures on, in `features`; rFID for Inception's), images a second of encoder and decoder, a codebook's perplexity.
    Raises LimnerError: the run has no autoencoder, no pictures, pictures of another size or number of channels.
    """
    if not isinstance(generator, Generator) or generator.model.autoencoder is None:
        raise LimnerError("reconstruct: this run works on pixels and has no autoencoder; name one of --task "
                          "autoencoder, or of a latent model")  # fmt: skip
    net = network(features) if isinstance(features, str) else features
    total, batches, source = _pictures(generator, images, num, batch)
    trip = _RoundTrip(generator, net, batch)
    with _written(out, total, {"source": source, "digest": generator.digest}, overwrite) as keep:
        for x in batches:
            keep(trip.n, x, *trip.add(x))
            if progress is not None:
                progress(trip.n, total)
        return trip.report(source)


@contextlib.contextmanager
def _written(out: str | Path | None, total: int, recipe: dict[str, Any], overwrite: bool) -> Iterator[Keep]:
    """Where reconstructions go; nowhere without `out`."""
    if out is None:
        yield lambda first, x, y, db: None
        return
    pairs = Path(out).suffix.lower() == ".png" and not Path(out).is_dir()
    most = min(total, SHOWN) if pairs else total

    def keep(first: int, x: npt.NDArray[np.uint8], y: npt.NDArray[np.uint8], db: npt.NDArray[np.float64]) -> None:
        shown = np.concatenate([x, y], axis=2) if pairs else y
        sink.add([
            Picture(first + k, shown[k], {"psnr": float(db[k])} | ({"text": f"{db[k]:.1f} dB"} if pairs else {}))
            for k in range(min(len(x), most - first))
        ])  # fmt: skip

    with writer(out, num=most, recipe=recipe, overwrite=overwrite) as sink:
        yield keep


class _RoundTrip:
    """Sums over batches of originals and reconstructions."""

    def __init__(self, generator: Generator, net: FeatureNetwork, batch: int) -> None:
        self.generator, self.net, self.batch = generator, net, batch
        self.perceptual = perceptual_distance(generator.config.autoencoder_loss.perceptual_network)
        self.values: dict[str, list[npt.NDArray[np.float64]]] = {}
        self.real, self.made = metrics.Moments(), metrics.Moments()
        self.kept: list[Tensor] = []
        self.codes: Tensor | None = None
        self.seconds, self.timed, self.n = {"encode": 0.0, "decode": 0.0}, 0, 0
        self.shape = (0, 0, 0)

    def add(self, pictures: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
        """A batch there and back: uint8 as it was, and the PSNR (dB) of each."""
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        if not self.n:  # the first pass of a network also sets it up, and is not timed
            self.generator.decode(self.generator.encode(x, self.batch), self.batch)
        began = time.perf_counter()
        z = self.generator.encode(x, self.batch)
        between = time.perf_counter()
        y = self.generator.decode(z, self.batch)
        self.seconds["decode"] += time.perf_counter() - between
        self.seconds["encode"] += between - began
        levels = to_uint8(y)
        y = torch.from_numpy(levels).permute(0, 3, 1, 2).float() / 127.5 - 1  # what a file would hold
        found = {"PSNR": psnr(x, y)}
        if min(x.shape[2:]) >= SSIM_SIDE:
            found["SSIM"] = ssim(x, y)
        if min(x.shape[2:]) >= PERCEPTUAL_SIDE:
            found["perceptual"] = self.perceptual(x, y)
        for name, value in found.items():
            self.values.setdefault(name, []).append(value.double().numpy())
        self.real.update(self.net(pictures)["pooled"])
        made = self.net(levels)["pooled"]
        self.made.update(made)
        if self.n < KEEP:
            self.kept.append(made.half())
        self._count_codes(z)
        self.n, self.shape = self.n + len(x), (z.shape[1], z.shape[2], z.shape[3])
        return levels, self.values["PSNR"][-1]

    @torch.no_grad()
    def _count_codes(self, z: Tensor) -> None:
        autoencoder = self.generator.model.autoencoder
        if autoencoder is None or autoencoder.quantizer is None:
            return
        codes = autoencoder.quantizer.quantise(autoencoder.denormalise(z.to(self.generator.device)))[1].flatten().cpu()
        counts = torch.bincount(codes, minlength=autoencoder.quantizer.codes)
        self.codes = counts if self.codes is None else self.codes + counts

    def report(self, source: str) -> Report:
        """Everything as figures. Raises LimnerError where there was no picture."""
        if not self.n:
            raise LimnerError(f"{source}: holds no pictures")
        figures, loss = [], self.generator.config.autoencoder_loss.perceptual_network
        means = {name: metrics.bootstrap_mean(np.concatenate(values)) for name, values in self.values.items()}
        figures.append(Figure("PSNR", *means["PSNR"], self.n, "higher", "dB, mean over pictures"))
        if "SSIM" in means:
            figures.append(Figure("SSIM", *means["SSIM"], self.n, "higher", "11x11 Gaussian window"))
        if "perceptual" in means:
            figures.append(Figure(f"perceptual-{loss}", *means["perceptual"], self.n, "lower", "0 for equal pictures"))
        warnings = []
        if self.n > 1:
            found = metrics.frechet_interval(self.made.gaussian(), self.real.gaussian(), torch.cat(self.kept))
            name = "rFID" if self.net.name.startswith("inception") else f"rFD-{self.net.name}"
            figures.append(Figure(name, *found, self.n, "lower", "reconstructions against their originals"))
            if self.n < self.net.dim:
                warnings.append(f"{self.n:,} pictures are fewer than {self.net.dim:,} feature dimensions; "
                                f"compare {name} at the same number alone")  # fmt: skip
        if self.codes is not None:
            note = f"of {len(self.codes):,} codes, {int((self.codes > 0).sum()):,} used"
            figures.append(Figure("perplexity", float(perplexity(self.codes)), n=self.n, better="higher", notes=note))
        for name, seconds in self.seconds.items():
            note = f"images a second, {self.batch} at a time on {self.generator.device.type}, {_threads()}"
            figures.append(Figure(name, self.n / max(seconds, 1e-9), n=self.n, better="higher", notes=note))
        return Report({figure.name: figure for figure in figures}, self._about(source), tuple(warnings))

    def _about(self, source: str) -> dict[str, Any]:
        config, (height, width) = self.generator.config, self.generator.config.data.size or (0, 0)
        values = config.data.channels * height * width
        return {
            "samples": {"source": source, "n": self.n, "size": f"{width}x{height}"},
            "autoencoder": {
                "run": self.generator.digest,
                "f": height // self.shape[1],
                "latent": "x".join(map(str, self.shape)),
                "values": f"{values / np.prod(self.shape):.3g} times fewer",
            },
            "features": self.net.recipe((height, width)),
            "evaluation": {"limner": __version__},
        }


def _threads() -> str:
    number = torch.get_num_threads()
    return f"{number} thread" + ("s" if number > 1 else "")


def _pictures(generator: Generator, images: Any, num: int | None,
              batch: int) -> tuple[int, Iterator[npt.NDArray[np.uint8]], str]:  # fmt: skip
    """How many pictures, the pictures uint8 (B, H, W, C) batch by batch, and where they come from."""
    section = generator.config.data
    if isinstance(images, str | Path) and str(images).lower().endswith(".npz"):
        whole = np.concatenate([x for x, _ in npz_batches(Path(images))])
        return _of_array(generator, whole, num, batch, str(images))
    if isinstance(images, np.ndarray):
        return _of_array(generator, images, num, batch, "array")
    if isinstance(images, Dataset):
        data, where = images, f"data set {images.digest[:12]}"
    else:
        changed = {"flip": False, "crop": "center"} | ({} if images is None else {"source": str(images), "split": None})
        data, where = prepare(section.model_copy(update=changed)), str(images or section.source)
    rows = data.held_out if images is None and len(data.held_out) else np.arange(len(data))
    rows = rows[:num]
    parts = (data.uint8(rows[k : k + batch]) for k in range(0, len(rows), batch))
    return len(rows), parts, where + (", held out" if images is None and len(data.held_out) else "")


def _of_array(generator: Generator, pictures: npt.NDArray[np.uint8], num: int | None, batch: int,
              where: str) -> tuple[int, Iterator[npt.NDArray[np.uint8]], str]:  # fmt: skip
    build.space_shape(generator.config)
    wanted = (*(generator.config.data.size or ()), generator.config.data.channels)
    if pictures.dtype != np.uint8 or pictures.shape[1:] != wanted:
        raise LimnerError(f"{where}: {pictures.dtype} {pictures.shape}, this run's pictures are uint8 (N, "
                          f"{', '.join(map(str, wanted))})")  # fmt: skip
    chosen = pictures[:num]
    return len(chosen), (chosen[k : k + batch] for k in range(0, len(chosen), batch)), where
