"""Wrong input of every kind: one line on stderr that says what is wrong and what would be right, and exit code 2."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from limner.cli.program import run
from limner.errors import LimnerError
from tiny_cli import Workshop, pictures, program


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        yield Workshop(tmp_path_factory.mktemp("shop"), patch)


class Refusal:
    """Checks that a command was refused: code 2, one line with these words, nothing on stdout."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        capsys.readouterr()

    def __call__(self, code: int, *words: str) -> None:
        captured = self._capsys.readouterr()
        assert code == 2, captured.err
        assert captured.out == ""
        assert captured.err.startswith("limner: ")
        assert captured.err.count("\n") == 1, captured.err
        for word in words:
            assert word in captured.err


@pytest.fixture
def refused(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(capsys)


def test_no_such_path(shop: Workshop, tmp_path: Path, refused: Refusal) -> None:
    refused(shop.train(tmp_path / "run", data=tmp_path / "nowhere"), "nowhere", "no such file or folder")
    refused(run(["sample", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x.png")]), "nowhere", "no such")
    refused(run(["check", str(tmp_path / "nowhere")]), "nowhere", "no such")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_picture(shop: Workshop, tmp_path: Path, refused: Refusal) -> None:
    data = pictures(tmp_path / "data", each=2)
    (data / "cat/notes.png").write_text("these are my notes")
    refused(shop.train(tmp_path / "run", data=data), "cat/notes.png", "not a picture")
    refused(shop.train(tmp_path / "run", data=shop.recipe), "tiny.yaml", "neither a picture nor a data set")
    assert not (tmp_path / "run").exists()


def test_a_truncated_png(shop: Workshop, tmp_path: Path, refused: Refusal) -> None:
    data = pictures(tmp_path / "data", each=2)
    whole = (data / "dog/1.png").read_bytes()
    (data / "dog/1.png").write_bytes(whole[: len(whole) // 2])
    refused(shop.train(tmp_path / "run", data=data), "dog/1.png")
    assert not (tmp_path / "run").exists()


def test_check_lists_what_is_wrong_and_exits_2(
    shop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = pictures(tmp_path / "data", each=2)
    (data / "dog/1.png").write_bytes(b"\x89PNG")
    assert run(["check", str(data)]) == 2
    captured = capsys.readouterr()
    assert "corrupt: " in captured.out
    assert "dog/1.png" in captured.out
    assert captured.err == ""


def test_a_label_that_does_not_exist(shop: Workshop, tmp_path: Path, refused: Refusal) -> None:
    out = str(tmp_path / "x.png")
    refused(shop.sample("--label", "catt", "--out", out), "'catt'", "did you mean 'cat'?")
    refused(shop.sample("--label", "zebra", "--out", out), "known: cat, dog, fish")
    refused(shop.sample("--label", "3", "--out", out), "0 to 2")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_config_key(shop: Workshop, tmp_path: Path, refused: Refusal) -> None:
    refused(shop.train(tmp_path / "run", "--set", "training.bach=4"), "'training.bach'", "did you mean 'batch'?")
    refused(shop.train(tmp_path / "run", "--set", "training.batch"), "KEY=VALUE")
    refused(shop.train(tmp_path / "run", "--set", "training.batch=four"), "training.batch")
    assert not (tmp_path / "run").exists()


def test_an_unknown_preset_and_a_missing_or_wrong_budget(shop: Workshop, tmp_path: Path, refused: Refusal) -> None:
    asked = ["train", str(shop.data), "--out", str(tmp_path / "run")]
    refused(run([*asked, "--preset", "emojj", "--budget", "1m"]), "'emojj'", "did you mean 'emoji' or")
    refused(run(asked), "20m")
    refused(run([*asked, "--budget", "soon"]), "'soon'", "1h30m")
    refused(run([*asked, "--images", "lots"]), "'lots'", "500k")
    refused(run(["train", "--out", str(tmp_path / "run"), "--images", "8"]), "no data")


def test_a_run_directory_with_no_model(shop: Workshop, tmp_path: Path, refused: Refusal) -> None:
    refused(run(["sample", str(tmp_path), "--out", str(tmp_path / "x.png")]), "neither a run", "config.yaml")
    shutil.copy(shop.run / "config.yaml", tmp_path)
    refused(run(["sample", str(tmp_path), "--out", str(tmp_path / "x.png")]), "no model yet", "model.safetensors")


def test_a_corrupt_safetensors(shop: Workshop, tmp_path: Path, refused: Refusal) -> None:
    damaged = tmp_path / "run"
    shutil.copytree(shop.run, damaged)
    whole = (shop.run / "model.safetensors").read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2], b"\xff" * 64 + whole):
        (damaged / "model.safetensors").write_bytes(content)
        refused(run(["sample", str(damaged), "--out", str(tmp_path / "x.png")]), "model.safetensors", "damaged")


def test_weights_of_another_recipe(shop: Workshop, tmp_path: Path, refused: Refusal) -> None:
    mixed = tmp_path / "run"
    shutil.copytree(shop.run, mixed)
    text = (mixed / "config.yaml").read_text()
    (mixed / "config.yaml").write_text(text.replace("- channels: 8", "- channels: 12", 1))
    refused(run(["sample", str(mixed), "--out", str(tmp_path / "x.png")]), "don't belong together")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--steps", "0"], "--steps"),
        (["--num", "0"], "--num"),
        (["--batch", "0"], "--batch"),
        (["--sampler", "dpm"], "did you mean 'ddpm'?"),
        (["--spacing", "leeding"], "leeding"),
        (["--guidance", "nan"], "guidance"),
        (["--guidance=-1"], "guidance"),
        (["--interval", "0.5"], "LO,HI"),
        (["--interval", "0.8,0.2"], "interval"),
        (["--rescale", "2"], "rescale"),
        (["--eta", "0.5", "--sampler", "heun"], "eta"),
        (["--text", "a cat"], "it has label"),
        (["--classifier-scale", "2"], "needs a classifier"),
        (["--text-file", "/no/such/file"], "/no/such/file"),
    ],
)
def test_settings_out_of_range(shop: Workshop, tmp_path: Path, refused: Refusal, options: list[str], word: str) -> None:
    refused(shop.sample("--out", str(tmp_path / "x.png"), *options), word)
    assert list(tmp_path.iterdir()) == []


def test_a_diffusion_run_is_no_classifier(shop: Workshop, tmp_path: Path, refused: Refusal) -> None:
    asked = ["--classifier", str(shop.run), "--out", str(tmp_path / "x.png")]
    refused(shop.sample(*asked), "classifier")


def test_a_classifier_draws_nothing(shop: Workshop, tmp_path: Path, refused: Refusal) -> None:
    guide = tmp_path / "guide"
    asked = ["train", str(shop.data), "--task", "classifier", "--for", str(shop.run), "--out", str(guide)]
    small = "model={kind: classifier, norm_groups: 4, head_dim: 8, levels: [{channels: 8}, {channels: 8}]}"
    assert run([*asked, "--images", "8", "--set", small, "--set", "training={batch: 8, compile: off}"]) == 0
    Refusal(refused._capsys)(run(["sample", str(guide), "--out", str(tmp_path / "x.png")]), "a classifier", "draws")


def test_a_classifier_needs_its_diffusion_run(shop: Workshop, tmp_path: Path, refused: Refusal) -> None:
    asked = ["train", str(shop.data), "--task", "classifier", "--images", "8", "--out", str(tmp_path / "guide")]
    refused(run(asked), "--for RUN")
    refused(run([*asked, "--for", str(tmp_path / "nowhere")]), "nowhere")
    refused(shop.train(tmp_path / "run", "--for", str(shop.run)), "--task classifier")


def test_another_run_is_in_the_way(shop: Workshop, tmp_path: Path, refused: Refusal) -> None:
    before = (shop.run / "model.safetensors").read_bytes()
    refused(shop.train(shop.run), "holds a run already", "--resume")
    refused(shop.train(shop.recipe), "is a file")
    assert (shop.run / "model.safetensors").read_bytes() == before


def test_resume_with_another_architecture(shop: Workshop, refused: Refusal) -> None:
    before = (shop.run / "model.safetensors").read_bytes()
    code = shop.train(shop.run, "--resume", "--set", "model.levels.0.channels=16", images=32)
    refused(code, "model.levels.0.channels", "16", "resume with the run's own recipe")
    assert (shop.run / "model.safetensors").read_bytes() == before


def test_samples_are_not_overwritten(shop: Workshop, tmp_path: Path, refused: Refusal) -> None:
    (tmp_path / "x.png").write_text("mine")
    refused(shop.sample("--out", str(tmp_path / "x.png")), "exists already", "--overwrite")
    assert (tmp_path / "x.png").read_text() == "mine"
    refused(shop.sample("--out", str(tmp_path / "x.jpg")), ".jpg")


def test_places_that_cannot_be_written(shop: Workshop, tmp_path: Path, refused: Refusal) -> None:
    (tmp_path / "file").write_text("")
    refused(shop.sample("--out", str(tmp_path / "file/x.png")), "file/x.png")
    refused(shop.train(tmp_path / "file/run"), "file")


def test_a_full_disk_during_a_checkpoint_keeps_the_earlier_one(shop: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(shop.run, out)
    before = (out / "model.safetensors").read_bytes()
    # A limit on the size of a file stands for the disk's: the write fails half-way with an OSError.
    size = len(before) // 2
    asked = ["train", "--resume", "--out", str(out), "--images", "24", "--set", "training.checkpoint_every=8"]
    code = "import resource\nfrom limner.cli import main\n" \
           f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\nmain({asked})"  # fmt: skip
    result = program(code=code)
    assert result.returncode == 2, result.stderr
    told = [line for line in result.stderr.splitlines() if line.startswith("limner: ")]
    assert len(told) == 1
    assert "cannot be written" in told[0]
    assert "Traceback" not in result.stderr
    assert (out / "model.safetensors").read_bytes() == before
    assert run(["sample", str(out), "--num", "1", "--out", str(tmp_path / "x.png")]) == 0
    assert run(["train", "--resume", "--out", str(out), "--images", "24"]) == 0


def test_an_error_stays_on_its_line() -> None:
    assert str(LimnerError("no such key 'a\nb\x1b'")) == "no such key 'a\\nb\\x1b'"
