"""The latent cache: what a batch holds, what it is keyed by, what is refused."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from limner.config import DataConfig
from limner.data import latents
from limner.data.dataset import Dataset, prepare
from limner.data.latents import cache_key, with_latents
from limner.errors import LimnerError
from limner.nn.autoencoder import Autoencoder
from limner.nn.quantizer import VectorQuantizer
from limner.nn.unet import Level

COUNT = 12


@pytest.fixture(autouse=True)
def cache_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latents, "BATCH", 2)
    monkeypatch.setattr(latents, "SHARD_BYTES", 5000)


def dataset(folder: Path, flip: bool = True, seed: int = 0, **settings: object) -> Dataset:
    """Twelve noisy pictures of two classes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        path = folder / "pictures" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return prepared(folder, flip, **settings)


def prepared(folder: Path, flip: bool = True, **settings: object) -> Dataset:
    """The pictures that are in ``folder`` already."""
    config = DataConfig.model_validate({"source": str(folder / "pictures"), "flip": flip, "size": 16} | settings)
    return prepare(config, {"label"})


def autoencoder(vq: bool = False, seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    quantizer = VectorQuantizer(8, 3) if vq else None
    made = Autoencoder(3, [Level(8), Level(8)], 3, quantizer=quantizer, norm_groups=4)
    made.latent_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
    made.latent_std.copy_(torch.tensor([0.5, 1.0, 2.0]))
    return made


def test_without_a_generator_a_batch_holds_the_normalised_mean(tmp_path: Path) -> None:
    data, coder = dataset(tmp_path), autoencoder()
    cached = with_latents(data, coder)
    assert len(cached.shards) > 2
    rows = np.array([7, 0, 11, 3])
    batch, plain = cached.batch(rows), data.batch(rows)
    with torch.no_grad():
        expected = coder.normalise(coder.encode(plain["image"]).mode())
    torch.testing.assert_close(batch["latent"], expected, atol=3e-3, rtol=3e-3)
    assert torch.equal(batch["label"], plain["label"])
    assert set(batch) == {"latent", "label", "row", "mirror"}
    assert batch["row"].tolist() == rows.tolist()
    assert not batch["mirror"].any()
    assert (cached.digest, cached.class_names, cached.size) == (data.digest, data.class_names, data.size)
    assert np.array_equal(cached.uint8(rows), data.uint8(rows))


@pytest.mark.parametrize("vq", [False, True])
def test_with_a_generator_the_draw_has_the_posterior_and_its_mirror(tmp_path: Path, vq: bool) -> None:
    data, coder = dataset(tmp_path), autoencoder(vq)
    cached = with_latents(data, coder)
    rows = np.full(400, 4)
    drawn = cached.batch(rows, np.random.default_rng(0))["latent"]
    image = data.batch(rows[:1])["image"]
    with torch.no_grad():
        sides = [coder.encode(seen) for seen in (image, image.flip(3))]
    means = [coder.normalise(side.mean) for side in sides]
    nearer = ((drawn - means[1]).square().sum((1, 2, 3)) < (drawn - means[0]).square().sum((1, 2, 3))).float()
    if vq:
        assert 0.35 < nearer.mean() < 0.65
        assert torch.minimum(*((drawn - mean).abs().amax((1, 2, 3)) for mean in means)).max() < 5e-3
    mean = drawn.mean(0)
    torch.testing.assert_close(mean, 0.5 * (means[0] + means[1])[0], atol=0.35, rtol=0)
    spread = torch.stack([side.std[0] / coder.latent_std[:, None, None] for side in sides]).square().mean(0)
    spread = spread + (0.5 * (means[0] - means[1])[0]).square()
    torch.testing.assert_close(drawn.var(0), spread, atol=0.3, rtol=0.3)


def test_a_row_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    """Draws are one number a row, which is what the training loop needs to split a step."""
    cached = with_latents(dataset(tmp_path, flip=False), autoencoder())

    class Fixed(np.random.Generator):
        def random(self, size: int) -> np.ndarray:  # type: ignore[override]
            return np.linspace(0.1, 0.9, 4)[:size]

    generator = Fixed(np.random.Philox(0))
    whole, part = (cached.batch(np.arange(n), generator)["latent"] for n in (4, 2))
    assert torch.equal(whole[:2], part)


def test_encoded_once(tmp_path: Path) -> None:
    data, coder = dataset(tmp_path), autoencoder()
    told: list[tuple[int, int]] = []
    with_latents(data, coder, progress=lambda done, rows: told.append((done, rows)))
    assert told[-1] == (COUNT, COUNT)
    told.clear()
    with_latents(data, coder, progress=lambda done, rows: told.append((done, rows)))
    assert not told


def test_a_damaged_shard_alone_is_encoded_again(tmp_path: Path) -> None:
    data, coder = dataset(tmp_path), autoencoder()
    home = tmp_path / "mine"
    before = with_latents(data, coder, directory=home).batch(np.arange(COUNT))["latent"]
    shard = sorted(home.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    told: list[int] = []
    after = with_latents(data, coder, directory=home, progress=lambda done, rows: told.append(done))
    assert torch.equal(after.batch(np.arange(COUNT))["latent"], before)
    assert 0 < len(told) <= 2


def test_the_key_names_encoder_and_pixels_but_not_decoder_or_statistics(tmp_path: Path) -> None:
    data, coder = dataset(tmp_path), autoencoder()
    key = cache_key(data, coder)
    with torch.no_grad():
        coder.latent_mean.add_(1)
        coder.decoder.out.weight.add_(1)
    assert cache_key(data, coder) == key
    coders = (coder, autoencoder(seed=1), autoencoder(vq=True))
    others = (dataset(tmp_path, flip=False), dataset(tmp_path / "other", seed=1))
    keys = {*(cache_key(data, each) for each in coders), *(cache_key(other, coder) for other in others)}
    assert len(keys) == 5


def test_a_stale_cache_is_refused(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    with_latents(data, autoencoder(), directory=tmp_path / "mine")
    with pytest.raises(LimnerError, match="another autoencoder or of other pictures"):
        with_latents(data, autoencoder(seed=1), directory=tmp_path / "mine")


def test_bad_inputs_are_said(tmp_path: Path) -> None:
    data, coder = dataset(tmp_path), autoencoder()
    with torch.no_grad():
        coder.encoder.out.bias.fill_(float("nan"))
    with pytest.raises(LimnerError, match="not finite"):
        with_latents(data, coder)
    with pytest.raises(LimnerError, match="not a multiple"):
        with_latents(dataset(tmp_path, size=15), autoencoder())
    with pytest.raises(LimnerError, match="should be center"):
        with_latents(dataset(tmp_path, size=(8, 16), crop="random"), autoencoder())
    (tmp_path / "file").write_text("")
    with pytest.raises(LimnerError, match="cannot be written"):
        with_latents(data, autoencoder(), directory=tmp_path / "file")


def _encode_share(folder: Path, rank: int) -> None:
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LIMNER_CACHE": str(folder / "cache")}
    latents.SHARD_BYTES = 5000
    torch.set_num_threads(1)
    with_latents(prepared(folder), autoencoder(), directory=folder / "shared")


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_encode_share, args=(tmp_path, rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    told: list[int] = []
    cached = with_latents(data, autoencoder(), directory=tmp_path / "shared", progress=lambda d, n: told.append(d))
    alone = with_latents(data, autoencoder())
    assert not told
    torch.testing.assert_close(cached.batch(np.arange(COUNT))["latent"], alone.batch(np.arange(COUNT))["latent"],
                               atol=2e-3, rtol=2e-3)  # fmt: skip
