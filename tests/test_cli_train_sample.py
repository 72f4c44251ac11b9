"""Labelled pictures in, the pictures that were asked for out, by the commands alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from limner.cli.program import run
from limner.outputs import read_recipe
from tiny_cli import CLASSES, Workshop


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        yield Workshop(tmp_path_factory.mktemp("shop"), patch)


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as data:
        return dict(data)


def test_train_prints_every_number_as_json(shop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shop.train(tmp_path / "run", "--json", "--seed", "5") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["run"] == str(tmp_path / "run")
    assert facts["images"] == 16
    assert facts["stopped"] is None
    assert facts["loss"] > 0
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert facts["held_out_loss"] == last["held_out_loss"]
    assert "seed: 5" in (tmp_path / "run/config.yaml").read_text()


def test_settings_reach_the_recipe(shop: Workshop, tmp_path: Path) -> None:
    assert shop.train(tmp_path / "run", "--set", "training.batch=4", "--set", "model.levels.0.channels=12") == 0
    text = (tmp_path / "run/config.yaml").read_text()
    assert "batch: 4" in text
    assert "channels: 12" in text


def test_resume_goes_on_and_needs_nothing_but_the_run(
    shop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shop.train(tmp_path / "run", "--resume") == 0
    assert "16 images" in capsys.readouterr().err
    assert shop.train(tmp_path / "run", "--resume", "--json", images=32) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 32


def test_labels_in_rotation_without_label(shop: Workshop, tmp_path: Path) -> None:
    assert shop.sample("--num", "7", "--out", str(tmp_path / "s.npz")) == 0
    data = arrays(tmp_path / "s.npz")
    assert data["x"].shape == (7, 8, 8, 3)
    assert data["x"].dtype == np.uint8
    assert data["y"].tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("asked", "labels"),
    [
        (["--label", "dog"], [1, 1, 1, 1]),
        (["--label", "2"], [2, 2, 2, 2]),
        (["--label", "dog,0"], [1, 0, 1, 0]),
        (["--label", "dog", "--label", "fish,cat"], [1, 2, 0, 1]),
    ],
)
def test_labels_by_name_number_and_list(shop: Workshop, tmp_path: Path, asked: list[str], labels: list[int]) -> None:
    assert shop.sample("--num", "4", *asked, "--out", str(tmp_path / "s.npz")) == 0
    assert arrays(tmp_path / "s.npz")["y"].tolist() == labels


def test_all_outputs_hold_the_same_pictures(shop: Workshop, tmp_path: Path) -> None:
    for name in ("grid.png", "s.npz", "s.tar", "folder"):
        assert shop.sample("--num", "5", "--seed", "3", "--out", str(tmp_path / name)) == 0
    x = arrays(tmp_path / "s.npz")["x"]
    with tarfile.open(tmp_path / "s.tar") as tar:
        for number in range(5):
            with Image.open(tmp_path / f"folder/{number:06d}.png") as image:
                assert np.array_equal(np.asarray(image), x[number])
            with Image.open(tar.extractfile(f"{number:06d}.png")) as image:  # type: ignore[arg-type]
                assert np.array_equal(np.asarray(image), x[number])
    # Enlarged eight times into cells of 64 pixels, 6 pixels apart.
    with Image.open(tmp_path / "grid.png") as image:
        first = np.asarray(image)[6 : 6 + 64, 6 : 6 + 64]
    assert np.array_equal(first, x[0].repeat(8, 0).repeat(8, 1))


def test_a_picture_says_how_to_make_it_again(shop: Workshop, tmp_path: Path) -> None:
    asked = ["--num", "5", "--seed", "3", "--steps", "3", "--sampler", "ddim", "--guidance", "1.5"]
    assert shop.sample(*asked, "--out", str(tmp_path / "all")) == 0
    recipe = read_recipe(tmp_path / "all/000004.png")
    assert recipe is not None
    assert recipe["run"] == str(shop.run)
    assert len(recipe["digest"]) == 12
    shown = {"seed": 3, "steps": 3, "sampler": "ddim", "guidance": 1.5, "index": 4, "label": 1, "label_name": "dog"}
    assert recipe | shown == recipe
    lines = [json.loads(line) for line in (tmp_path / "all/metadata.jsonl").read_text().splitlines()]
    assert [line["label_name"] for line in lines] == [CLASSES[k % 3] for k in range(5)]
    assert lines[4] == {"file_name": "000004.png", **recipe}


def test_the_batch_size_changes_nothing(shop: Workshop, tmp_path: Path) -> None:
    asked = ["--num", "6", "--sampler", "ddpm", "--steps", "3"]
    for batch in ("1", "4", "6"):
        assert shop.sample(*asked, "--batch", batch, "--out", str(tmp_path / f"{batch}.npz")) == 0
    x = {batch: arrays(tmp_path / f"{batch}.npz")["x"] for batch in ("1", "4", "6")}
    assert np.array_equal(x["1"], x["4"])
    assert np.array_equal(x["4"], x["6"])
    assert shop.sample(*asked, "--seed", "1", "--out", str(tmp_path / "other.npz")) == 0
    assert not np.array_equal(arrays(tmp_path / "other.npz")["x"], x["4"])


@pytest.mark.parametrize(
    "option",
    [
        ["--guidance", "4"],
        ["--guidance", "4", "--interval", "0.2,0.6"],
        ["--guidance", "4", "--rescale", "0.7"],
        ["--sampler", "heun"],
        ["--steps", "5"],
        ["--spacing", "trailing"],
        ["--sampler", "ddim", "--eta", "1"],
        ["--label", "fish"],
    ],
)
def test_every_option_reaches_the_pictures(shop: Workshop, tmp_path: Path, option: list[str]) -> None:
    assert shop.sample("--num", "2", "--steps", "4", "--out", str(tmp_path / "plain.npz")) == 0
    assert shop.sample("--num", "2", "--steps", "4", *option, "--out", str(tmp_path / "other.npz")) == 0
    assert not np.array_equal(arrays(tmp_path / "plain.npz")["x"], arrays(tmp_path / "other.npz")["x"])


def test_sample_prints_every_number_as_json(shop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shop.sample("--num", "3", "--out", str(tmp_path / "s.npz"), "--json") == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert captured.err == ""
    assert facts["num"] == 3
    assert facts["images_per_s"] == pytest.approx(3 / facts["seconds"])
    assert facts["steps"] == 2


def test_a_classifier_steers_a_model_without_labels(shop: Workshop, tmp_path: Path) -> None:
    uncond, guide = tmp_path / "uncond", tmp_path / "guide"
    assert shop.train(uncond, "--set", "conditions=[]", "--set", "sampling.guidance=1") == 0
    small = ["--set", "model={kind: classifier, norm_groups: 4, head_dim: 8, levels: [{channels: 8}, {channels: 8}]}"]
    small += ["--set", "training={batch: 8, compile: off}"]
    assert shop.train(guide, "--task", "classifier", "--for", str(uncond), "--set", "conditions=[]", *small) == 0
    for name, scale in (("off", "0"), ("on", "50")):
        asked = ["sample", str(uncond), "--classifier", str(guide), "--classifier-scale", scale, "--label", "dog"]
        assert run([*asked, "--num", "2", "--out", str(tmp_path / f"{name}.npz")]) == 0
    on, off = arrays(tmp_path / "on.npz"), arrays(tmp_path / "off.npz")
    assert on["y"].tolist() == [1, 1]
    assert not np.array_equal(on["x"], off["x"])


def test_sigterm_saves_and_resume_goes_on(shop: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "run"
    asked = ["train", str(shop.data), "--preset", str(shop.recipe), "--out", str(out), "--images", "100M"]
    command = [sys.executable, "-m", "limner", *asked]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as training:
        while not (out / "metrics.jsonl").exists() and training.poll() is None:
            time.sleep(0.05)
        training.send_signal(signal.SIGTERM)
        errors = training.communicate()[1]
    assert training.returncode == 75, errors
    assert "go on with --resume" in errors
    saved = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["images"]
    assert shop.train(out, "--resume", images=saved + 8) == 0
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["images"] == saved + 8
