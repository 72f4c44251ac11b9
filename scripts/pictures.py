"""The pictures of the pages on methods, into docs/images/methods: python scripts/pictures.py [NAME...], else all.

The autoencoders of one picture are trained here, in a minute or two each on one core; all else is drawn by the models
that come with Limner.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image

import limner
from limner.data.dataset import prepare
from limner.generator import Generator, to_uint8
from limner.outputs import grid, png
from limner.studio.insight import attention, overlaid, word_maps

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "images" / "methods"
DIGITS = [str(k) for k in range(10)]
CAPTIONS = [
    "red heart",
    "green apple",
    "cat face",
    "guitar",
    "rocket",
    "blue circle",
    "grinning face",
    "hot beverage",
]
SCALES = (1.0, 2.0, 3.0, 5.0, 8.0)
CLASSIFIER_SCALES = (0.0, 1.0, 3.0, 10.0)
SPOKEN = ("red heart", "woman shrugging dark skin tone", "blue book")
AUTOENCODER = ["data.size=16", "data.channels=1", "data.held_out=0.1", "training.compile=off", "training.batch=8",
               "model.levels=[{channels: 32}, {channels: 64}]", "model.latent_channels=4"]  # fmt: skip


def save(name: str, pictures: Sequence[np.ndarray], columns: int, captions: Sequence[str] | None = None) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.png").write_bytes(png(grid(list(pictures), captions, columns=columns)))
    print(OUT / f"{name}.png")


def generator(name: str) -> Generator:
    loaded = limner.load(name)
    assert isinstance(loaded, Generator)
    return loaded


def alike(model: Generator, rows: int) -> torch.Tensor:
    """The noise of picture 0, for all of `rows` pictures."""
    one = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(4))
    return one.expand(rows, -1, -1, -1).clone()


def digits(_: str) -> None:
    """Every class in turn, nothing picked out."""
    drawn = generator("digits").sample(num=40, seed=0, output="array")
    save("digits", drawn, 10)


def adagn(_: str) -> None:
    """One noise: under ten labels, on the way from a 3 to an 8, under no label."""
    model = generator("digits")
    noise = alike(model, 10)
    labels = model.sample(label=DIGITS, initial_noise=noise, output="array")
    ends = model.embed(label=["3", "8"])
    way = type(ends).lerp(ends[:1], ends[1:], torch.linspace(0, 1, 10))
    between = model.sample(tau=way, initial_noise=noise, output="array")
    nothing = model.sample(tau=model.embed(10), initial_noise=noise, guidance=1.0, output="array")
    save("adagn", [*labels, *between, *nothing], 10)


def classifier_guidance(_: str) -> None:
    """No label for the model; a classifier steers it to 0 .. 9, more strongly from row to row."""
    model, guide = generator("digits"), limner.load("digits-classifier")
    noise = torch.randn(10, *model.shape, generator=torch.Generator().manual_seed(1))
    pictures: list[np.ndarray] = []
    for scale in CLASSIFIER_SCALES:
        steered: dict[str, Any] = {"classifier": guide, "classifier_label": DIGITS} if scale else {}
        drawn = model.sample(tau=model.embed(10), initial_noise=noise, guidance=1.0, classifier_scale=scale,
                             sampler="ddim", steps=50, output="array", **steered)  # fmt: skip
        pictures += list(drawn)
    save("classifier-guidance", pictures, 10)


def classifier_free_guidance(text_model: str) -> None:
    """The same noise in a column, a scale in a row."""
    model = generator(text_model)
    rows = [model.sample(text=CAPTIONS, seed=0, guidance=scale, output="array") for scale in SCALES]
    captions = [""] * len(CAPTIONS) * (len(SCALES) - 1) + CAPTIONS
    save("classifier-free-guidance", [each for row in rows for each in row], len(CAPTIONS), captions)


def autoencoders(_: str) -> None:
    """Held-out digits, the channels of their latents, and what comes back, by KL and by VQ."""
    pictures: list[np.ndarray] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, regulariser in (("kl", "{kind: kl}"), ("vq", "{kind: vq, codes: 64}")):
            settings = [*AUTOENCODER, f"model.regulariser={regulariser}"]
            run = limner.train(ROOT / "examples/digits/train.parquet", task="autoencoder", out=Path(folder) / name,
                               images=4000, settings=settings).run  # fmt: skip
            model = generator(str(run))
            data = prepare(model.config.data)
            real = data.uint8(data.held_out[:4])
            x = torch.from_numpy(real).permute(0, 3, 1, 2) / 127.5 - 1
            z = model.encode(x)
            own = model.model.autoencoder
            if own is not None and own.quantizer is not None:
                z = own.normalise(own.quantizer.quantise(own.denormalise(z))[0])
            back = to_uint8(model.decode(z))
            for row in range(len(real)):
                channels = [enlarged(to_uint8(z[row, k][None, None] / 2)[0]) for k in range(z.shape[1])]
                pictures += [real[row], *channels, back[row]]
    save("autoencoders", pictures, 12)


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """A channel of a latent at the size of its picture."""
    return np.asarray(Image.fromarray(pixels[..., 0]).resize((16, 16), Image.Resampling.NEAREST))[..., None]


def cross_attention(text_model: str) -> None:
    """A picture, then where each word of its caption acted."""
    model = generator(text_model)
    longest = max(len(caption.split()) for caption in SPOKEN)
    pictures, captions = [], []
    for caption in SPOKEN:
        with attention(model.model.network, model.shape[1:]) as watched:
            (picture,) = model.sample(text=caption, num=1, output="array")
        words = word_maps(model, caption, watched)
        blank = np.full_like(picture, 255)
        pictures += [picture, *(overlaid(picture, where) for _, where in words), *[blank] * (longest - len(words))]
        captions += [caption, *(word for word, _ in words), *[""] * (longest - len(words))]
    save("cross-attention", pictures, 1 + longest, captions)


def sampling(_: str) -> None:
    """Fréchet distance against the number of steps, a curve for each solver."""
    from limner.experiments import sampling as experiment

    solvers = ("ddim", "dpmpp_2m")
    with tempfile.TemporaryDirectory() as folder:
        facts = experiment.run(["digits"], None, folder, num=200, samplers=solvers, steps=(3, 5, 10, 20))
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for solver in solvers:
        cells = [cell for cell in facts["cells"] if cell["sampler"] == solver]
        found = [cell["figures"]["FD-efficientnet-lite0"] for cell in cells]
        values = [figure["value"] for figure in found]
        spread = [[f["value"] - f["low"] for f in found], [f["high"] - f["value"] for f in found]]
        axes.errorbar([cell["steps"] for cell in cells], values, spread, marker="o", capsize=3, label=solver)
        print(solver, [cell["steps"] for cell in cells], values)
    axes.set(xlabel="steps: calls of the network", ylabel="FD-efficientnet-lite0, 200 samples")
    axes.legend()
    figure.savefig(OUT / "sampling.png", dpi=120)
    print(OUT / "sampling.png")


PICTURES = {f.__name__: f for f in (digits, adagn, classifier_guidance, classifier_free_guidance, autoencoders,
                                    cross_attention, sampling)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *PICTURES], default=[])
    parser.add_argument("--text-model", default="emoji")
    asked = parser.parse_args()
    for name in asked.names or PICTURES:
        PICTURES[name](asked.text_model)


if __name__ == "__main__":
    main()
