"""`limner reconstruct`: figures, pictures, files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from limner.cli.program import run
from tiny_cli import Workshop, pictures

RECIPE = """\
task: autoencoder
data: {size: [8, 8], held_out: 0.2}
model: {kind: autoencoder, norm_groups: 4, levels: [{channels: 8}, {channels: 8}], middle: none}
training: {batch: 8, warmup_images: 8, compile: "off", precision: fp32, previews: 3, log_every: 8}
autoencoder_loss: {perceptual: 0.0}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMNER_CACHE", str(home / "cache"))
        recipe = home / "autoencoder.yaml"
        recipe.write_text(RECIPE)
        data = pictures(home / "data")
        assert run(["train", str(data), "--preset", str(recipe), "--out", str(home / "run"), "--images", "16"]) == 0
    return home


def test_figures_pairs_and_files(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["reconstruct", str(made / "run"), str(made / "data")]
    assert run([*asked, "--out", str(tmp_path / "pairs.png"), "--csv", str(tmp_path / "f.csv"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"PSNR", "rFD-efficientnet-lite0", "encode", "decode"} <= set(facts["figures"])
    assert facts["samples"]["n"] == 24
    assert facts["autoencoder"]["f"] == 2
    assert (tmp_path / "pairs.png").stat().st_size > 1000
    assert "PSNR" in (tmp_path / "f.csv").read_text()
    assert run([*asked, "--out", str(tmp_path / "all.npz"), "--num", "5"]) == 0
    assert np.load(tmp_path / "all.npz")["x"].shape == (5, 8, 8, 3)
    assert "rFD-efficientnet-lite0 ↓" in capsys.readouterr().out
    assert run(["reconstruct", str(made / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"]["source"].endswith(", held out")


def test_what_it_cannot_reconstruct(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shop = Workshop(tmp_path / "shop", monkeypatch)
    grid = tmp_path / "there.png"
    grid.write_bytes(b"mine")
    for asked, line in (
        ([str(shop.run)], "has no autoencoder"),
        ([str(tmp_path / "none")], "no such file or directory"),
        ([str(made / "run"), str(tmp_path / "none")], "none"),
        ([str(made / "run"), "--out", str(grid)], "exists already"),
        ([str(made / "run"), "--features", "lite"], "features 'lite'"),
    ):
        capsys.readouterr()
        assert run(["reconstruct", *asked]) == 2
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1
    assert grid.read_bytes() == b"mine"
