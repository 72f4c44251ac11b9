"""Autoencoder, latents and diffusion in one run: what each stage leaves, resumes from and refuses."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import limner
from limner.cli.program import run
from limner.data.dataset import prepare
from limner.errors import LimnerError
from limner.generator import Generator
from limner.training.autoencoder import AutoencoderTask
from limner.training.checkpoint import read_model
from pictures import encode, write

CAPTIONS = ("a red tile", "a blue tile")
RECIPE = """\
task: diffusion
data: {size: [8, 8], held_out: 0.1, text_column: text}
space:
  kind: latent
  share: 0.5
  autoencoder: {kind: autoencoder, levels: [{channels: 16}, {channels: 16}], middle: none, norm_groups: 4}
  training: {batch: 8, lr: 4.0e-3, warmup_images: 16, log_every: 64, compile: "off", precision: fp32, previews: 2}
model: {kind: unet, levels: [{channels: 16, cross_attention: 1}], middle: none, norm_groups: 4, head_dim: 8}
conditions: [{kind: text, encoder: {kind: bpe, width: 16, depth: 1, head_dim: 8}}]
training: {batch: 8, lr: 4.0e-3, warmup_images: 16, log_every: 64, compile: "off", precision: fp32, previews: 2}
autoencoder_loss: {perceptual: 0}
sampling: {steps: 8, guidance: 2}
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, red and blue tiles with captions, and `tiny.yaml`."""
    home = tmp_path_factory.mktemp("stages")
    chance, lines = np.random.default_rng(0), []
    for number in range(40):
        tile = chance.integers(0, 60, (8, 8, 3), dtype=np.uint8)
        tile[..., 0 if number % 2 == 0 else 2] += 180
        write(home / "data" / f"{number:02d}.png", encode(tile))
        lines.append(json.dumps({"file_name": f"{number:02d}.png", "text": CAPTIONS[number % 2]}))
    write(home / "data" / "metadata.jsonl", "\n".join(lines))
    write(home / "tiny.yaml", RECIPE)
    return home


@pytest.fixture(autouse=True)
def own_cache(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMNER_CACHE", str(workshop / "cache"))


def train(home: Path, out: Path, *more: str, images: int = 64) -> int:
    asked = ["train", str(home / "data"), "--preset", str(home / "tiny.yaml"), "--out", str(out)]
    return run([*asked, "--images", str(images), *more])


@pytest.fixture(scope="module")
def learnt(workshop: Path) -> Path:
    """A run of both stages that tells the two captions apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMNER_CACHE", str(workshop / "cache"))
        assert train(workshop, workshop / "learnt", images=1600) == 0
    return workshop / "learnt"


def test_a_caption_decides_what_is_drawn(learnt: Path) -> None:
    generator = limner.load(learnt)
    assert isinstance(generator, Generator)
    drawn = generator.sample(text=[*CAPTIONS] * 8, output="array", seed=3).astype(float).mean((1, 2))
    redder = drawn[:, 0] - drawn[:, 2]
    assert redder[0::2].mean() > 60
    assert redder[1::2].mean() < -60


def test_the_run_holds_its_autoencoder(learnt: Path, workshop: Path) -> None:
    inside = {n: t for n, t in read_model(learnt).items() if n.startswith("autoencoder.")}
    first = read_model(learnt / "autoencoder")
    assert inside.keys() == first.keys()
    assert all(inside[name].equal(first[name]) for name in first)
    generator = limner.load(learnt)
    assert isinstance(generator, Generator)
    data = prepare(generator.config.data, {"text"})
    image = data.batch(data.held_out)["image"]
    latent = generator.encode(image)
    assert tuple(latent.shape[1:]) == (4, 4, 4)
    assert (generator.decode(latent) - image).abs().mean() < 0.2
    whole = generator.encode(data.batch(data.train)["image"])
    assert whole.mean().abs() < 0.2
    assert abs(float(whole.std()) - 1) < 0.2


def test_a_stop_in_the_first_stage_is_resumed(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    assert train(workshop, undisturbed) == 0
    losses = AutoencoderTask.losses

    def stopping(self: AutoencoderTask, batch: Any, rng: torch.Generator, progress: float) -> Any:
        if batch["part"].images == 16:
            signal.raise_signal(signal.SIGTERM)
        return losses(self, batch, rng, progress)

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderTask, "losses", stopping)
        assert train(workshop, stopped) == 75
    assert (stopped / "autoencoder" / "checkpoints").is_dir()
    assert not (stopped / "model.safetensors").exists()
    assert run(["train", "--out", str(stopped), "--resume"]) == 0
    one, other = read_model(undisturbed), read_model(stopped)
    assert all(one[name].equal(other[name]) for name in one)


def test_the_first_stage_is_over_once_the_second_has_begun(workshop: Path, tmp_path: Path) -> None:
    """A longer budget has a larger share of it, but what has learned from some latents wouldn't know others."""
    assert train(workshop, tmp_path / "run") == 0
    before = read_model(tmp_path / "run" / "autoencoder")
    assert run(["train", "--out", str(tmp_path / "run"), "--resume", "--images", "160"]) == 0
    after, inside = read_model(tmp_path / "run" / "autoencoder"), read_model(tmp_path / "run")
    assert all(before[name].equal(after[name]) and before[name].equal(inside[name]) for name in before)


def test_a_given_autoencoder_is_taken(learnt: Path, workshop: Path, tmp_path: Path) -> None:
    assert train(workshop, tmp_path / "second", "--autoencoder", str(learnt)) == 0
    inside, first = read_model(tmp_path / "second"), read_model(learnt / "autoencoder")
    assert all(inside[name].equal(first[name]) for name in first)
    assert not (tmp_path / "second" / "autoencoder" / "checkpoints").exists()
    assert run(["train", "--out", str(tmp_path / "second"), "--resume", "--images", "96"]) == 0


def test_a_classifier_of_latents_takes_the_autoencoder_of_its_run(workshop: Path, tmp_path: Path) -> None:
    for number in range(40):
        tile = prepare_tile(workshop, number)
        write(tmp_path / "data" / ("red", "blue")[number % 2] / f"{number}.png", tile)
    recipe = RECIPE.replace("conditions: [{kind: text, encoder: {kind: bpe, width: 16, depth: 1, head_dim: 8}}]",
                            "conditions: [{kind: label}]").replace("cross_attention: 1", "attention: true")  # fmt: skip
    write(tmp_path / "label.yaml", recipe.replace(", text_column: text", ""))
    out, guide = tmp_path / "run", tmp_path / "guide"
    asked = ["train", str(tmp_path / "data"), "--preset", str(tmp_path / "label.yaml"), "--images", "64"]
    assert run([*asked, "--out", str(out)]) == 0
    network = ["--set", "model.levels=[{channels: 32}]", "--set", "model.patch=1", "--set", "training.batch=8"]
    assert (
        run(["train", "--task", "classifier", "--for", str(out), "--out", str(guide), "--images", "64", *network]) == 0
    )
    assert not (guide / "autoencoder" / "checkpoints").exists()
    assert run(["sample", str(out), "--classifier", str(guide), "--num", "2", "--out", str(tmp_path / "x.png")]) == 0


def prepare_tile(home: Path, number: int) -> bytes:
    return (home / "data" / f"{number:02d}.png").read_bytes()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--set", "data.text_column=caption"], "caption"),
        (["--set", "data.size=[9, 9]"], "multiples of 2"),
        (["--set", "data.channels=1", "--autoencoder", "LEARNT"], "channels"),
        (["--autoencoder", "DATA"], "neither a run"),
    ],
)
def test_what_does_not_fit_is_refused(learnt: Path, workshop: Path, tmp_path: Path, more: list[str], words: str,
                                      capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    places = {"LEARNT": str(learnt), "DATA": str(workshop / "data")}
    assert train(workshop, tmp_path / "out", *(places.get(word, word) for word in more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error


def test_an_autoencoder_run_alone_is_no_latent_run(learnt: Path, tmp_path: Path) -> None:
    loaded = limner.load(learnt / "autoencoder")
    assert isinstance(loaded, Generator)
    with pytest.raises(LimnerError, match="autoencoder"):
        loaded.sample(num=1)
