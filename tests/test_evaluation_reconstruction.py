"""What an autoencoder loses, in figures and pictures: runs of autoencoders, latent runs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation_doubles import Tiny
from limner import build
from limner.config import RunConfig
from limner.data.dataset import prepare
from limner.errors import LimnerError
from limner.evaluation.reconstruction import reconstruct
from limner.generator import Generator
from tiny_autoencoder import SIZE, Shapes, recipe

PICTURES = Shapes().uint8(np.arange(24))


def folder(where: Path) -> Path:
    where.mkdir()
    for k, pixels in enumerate(PICTURES):
        Image.fromarray(pixels).save(where / f"{k:02d}.png")
    return where


def generator(kind: str = "kl", source: str = "tiny") -> Generator:
    torch.manual_seed(0)
    config = recipe({"kind": kind, "codes": 16} if kind == "vq" else {"kind": kind})
    config = config.model_copy(update={"data": config.data.model_copy(update={"source": source})})
    return Generator(config, build.model(config), "digest", torch.device("cpu"))


def test_a_faithful_autoencoder_and_a_random_one() -> None:
    found = reconstruct(generator(), PICTURES, features=Tiny())
    assert found["PSNR"].value < 25
    assert found["SSIM"].low < found["SSIM"].value < found["SSIM"].high < 1
    assert found["rFD-tiny"].value > 1
    assert found["perceptual-efficientnet-lite0"].value > 0
    assert found["encode"].value > 0
    assert found["decode"].value > 0
    assert found.about["autoencoder"] == {"run": "digest", "f": 2, "latent": "4x8x8", "values": "3 times fewer"}
    assert found.warnings == ()
    faithful = generator()
    faithful.encode = lambda x, batch: torch.nn.functional.pixel_unshuffle(x, 2)  # type: ignore[method-assign]
    faithful.decode = lambda z, batch: torch.nn.functional.pixel_shuffle(z, 2)  # type: ignore[method-assign]
    exact = reconstruct(faithful, PICTURES, features=Tiny())
    assert exact["PSNR"].value > 100
    assert exact["SSIM"].value == pytest.approx(1)
    assert exact["perceptual-efficientnet-lite0"].value == pytest.approx(0, abs=1e-6)
    assert exact["rFD"].value == pytest.approx(0, abs=1e-6)


def test_figures_do_not_depend_on_the_batch() -> None:
    whole, parts = (reconstruct(generator(), PICTURES, features=Tiny(), batch=batch) for batch in (24, 5))
    for name in ("PSNR", "SSIM", "perceptual-efficientnet-lite0", "rFD"):
        assert whole[name].value == pytest.approx(parts[name].value, rel=0.02)
    assert parts.about["samples"]["n"] == 24


def test_a_codebook_tells_its_perplexity() -> None:
    found = reconstruct(generator("vq"), PICTURES, features=Tiny())
    assert 1 <= found["perplexity"].value <= 16
    assert "of 16 codes" in found["perplexity"].notes


def test_pictures_from_everywhere(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=PICTURES)
    home = folder(tmp_path / "pictures")
    data = prepare(recipe().data.model_copy(update={"source": str(home)}))
    of = [reconstruct(generator(), images, features=Tiny()) for images in (PICTURES, tmp_path / "x.npz", home, data)]
    assert len({round(report["PSNR"].value, 3) for report in of}) == 1
    own = reconstruct(generator(source=str(home)), features=Tiny())
    assert own.about["samples"] == {"source": f"{home}, held out", "n": 1, "size": "16x16"}
    assert "rFD-tiny" not in own.figures


def test_a_latent_run_reconstructs_too() -> None:
    whole = recipe().model_dump(mode="json")
    latent = RunConfig.model_validate({
        "data": whole["data"], "space": {"kind": "latent", "autoencoder": whole["model"]},
        "model": {"kind": "unet", "norm_groups": 4, "head_dim": 8, "levels": [{"channels": 8}]},
    })  # fmt: skip
    made = Generator(latent, build.model(latent), "", torch.device("cpu"))
    assert reconstruct(made, PICTURES, features=Tiny(), num=5)["PSNR"].n == 5


def test_pairs_in_a_grid_and_reconstructions_in_files(tmp_path: Path) -> None:
    reconstruct(generator(), PICTURES, features=Tiny(), batch=10, out=tmp_path / "pairs.png")
    with Image.open(tmp_path / "pairs.png") as sheet:
        assert len(json.loads(sheet.info["limner"])["pictures"]) == 16
        assert sheet.info["limner"].count(" dB") == 16
    found = reconstruct(generator(), PICTURES, features=Tiny(), batch=10, out=tmp_path / "all")
    lines = [json.loads(line) for line in (tmp_path / "all" / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 24
    assert np.mean([line["psnr"] for line in lines]) == pytest.approx(found["PSNR"].value)
    with Image.open(tmp_path / "all" / "000003.png") as picture:
        error = (np.asarray(picture).astype(float) - PICTURES[3]) / 127.5
    assert 10 * np.log10(4 / (error**2).mean()) == pytest.approx(lines[3]["psnr"], abs=1e-3)
    with pytest.raises(LimnerError, match="exists already"):
        reconstruct(generator(), PICTURES, features=Tiny(), out=tmp_path / "pairs.png")


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    reconstruct(generator(), PICTURES, features=Tiny(), batch=10, progress=lambda *at: told.append(at))
    assert told == [(10, 24), (20, 24), (24, 24)]


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "y.npz", y=np.zeros(3))
    for images, message in (
        (tmp_path / "empty", "empty"),
        (tmp_path / "y.npz", "no array 'x'"),
        (tmp_path / "none", "none"),
        (PICTURES[:, :8], "this run's pictures are uint8"),
        (PICTURES[:0], "holds no pictures"),
    ):
        with pytest.raises(LimnerError, match=message) as error:
            reconstruct(generator(), images, features=Tiny())
        assert "\n" not in str(error.value)
    pixels = RunConfig.model_validate({
        "data": {"size": SIZE, "source": "tiny"},
        "model": {"kind": "unet", "norm_groups": 4, "head_dim": 8, "levels": [{"channels": 8}]},
    })  # fmt: skip
    with pytest.raises(LimnerError, match="has no autoencoder"):
        reconstruct(Generator(pixels, build.model(pixels), "", torch.device("cpu")), PICTURES)
