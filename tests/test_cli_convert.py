"""Other projects' checkpoints by the commands: converted, or straight into `sample`, and the same pictures."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from limner.cli.program import run
from limner.interop import safe

ADM = Path(__file__).parent / "fixtures/adm_cosine"
FLAGS = ["--flags", str(ADM / "flags.json")]


def draw(source: Path, out: Path, *more: str) -> np.ndarray:
    assert run(["sample", str(source), "--num", "2", "--steps", "2", "--out", str(out), *more]) == 0
    with np.load(out) as data:
        return data["x"]


def test_a_converted_checkpoint_draws_what_the_checkpoint_itself_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(ADM / "model.pt"), str(tmp_path / "run"), *FLAGS, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["task"] == "diffusion"
    assert facts["parameters"] > 100_000
    converted = draw(tmp_path / "run", tmp_path / "a.npz")
    straight = draw(ADM / "model.pt", tmp_path / "b.npz", *FLAGS)
    assert np.array_equal(converted, straight)
    assert converted.std() > 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([str(ADM / "model.pt"), "RUN"], "--flags"),
        ([str(ADM / "flags.json"), "RUN", *FLAGS], "flags.json"),
        ([str(ADM / "nowhere.pt"), "RUN", *FLAGS], "no such file"),
        ([str(ADM / "model.pt"), "FULL", *FLAGS], "holds something already"),
        ([str(ADM / "model.pt"), "RUN", "--flags", "--image_sise 32"], "image_size"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine")
    places = {"RUN": str(tmp_path / "run"), "FULL": str(tmp_path / "full")}
    assert run(["convert", *(places.get(argument, argument) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("limner: ")
    assert captured.err.count("\n") == 1
    assert word in captured.err
    assert not (tmp_path / "run").exists()


# --- hostile and damaged checkpoints --------------------------------------------------------------------------------


class Command:
    """Leaves a file behind when it is unpickled by anything careless."""

    def __init__(self, left: Path) -> None:
        self.left = left

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.left}",)


def weights() -> dict[str, torch.Tensor]:
    return dict(safe.read(ADM / "model.pt").weights)


def calls_a_shell(folder: Path) -> Path:
    torch.save({**weights(), "x": Command(folder / "ran")}, folder / "model.pt")
    return folder / "model.pt"


def plain_pickle_that_calls(folder: Path) -> Path:
    (folder / "model.pt").write_bytes(pickle.dumps(Command(folder / "ran")))
    return folder / "model.pt"


def pickle_that_asks_for_a_terabyte(folder: Path) -> Path:
    (folder / "model.pt").write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.")
    return folder / "model.pt"


def pickle_that_doubles(folder: Path) -> Path:
    """Lists of lists, thirty deep, each naming the one before twice: a thousand million to whoever walks them."""
    nested: list[Any] = ["lol"]
    for _ in range(30):
        nested = [nested, nested]
    torch.save({"nested": nested}, folder / "model.pt")
    return folder / "model.pt"


def zip_bomb(folder: Path) -> Path:
    torch.save({"w": torch.zeros(1_000_000)}, folder / "plain.pt")
    new = folder / "model.pt"
    with zipfile.ZipFile(folder / "plain.pt") as old, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in old.namelist():
            packed.writestr(entry, old.read(entry))
    return new


def truncated(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(save(weights())[:-1000])
    return folder / "model.safetensors"


def absurd_header(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    return folder / "model.safetensors"


def mismatched_shapes(folder: Path) -> Path:
    save_file(weights() | {"out.2.bias": torch.zeros(5)}, folder / "model.safetensors")
    return folder / "model.safetensors"


def index_that_leaves_its_folder(folder: Path) -> Path:
    save_file({"conv_in.bias": torch.zeros(4)}, folder / "outside.safetensors")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    index = {"weight_map": {"conv_in.bias": "../outside.safetensors"}}
    (folder / "model" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model"


HOSTILE = {
    calls_a_shell: "posix.system",
    plain_pickle_that_calls: "posix.system",
    pickle_that_asks_for_a_terabyte: "truncated or damaged",
    pickle_that_doubles: "no weights",
    zip_bomb: "compressed",
    truncated: "truncated",
    absurd_header: "header",
    mismatched_shapes: "out.2.bias",
    index_that_leaves_its_folder: "../outside.safetensors",
}


@pytest.mark.parametrize("made", HOSTILE, ids=lambda made: made.__name__)
def test_a_hostile_checkpoint_is_one_line_with_nothing_run_or_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made: Callable[[Path], Path]
) -> None:
    source, out = made(tmp_path), tmp_path / "out"
    flags = FLAGS if made is mismatched_shapes else []
    before = set(tmp_path.rglob("*"))
    for asked in (
        ["convert", str(source), str(out)],
        ["train", str(tmp_path), "--init", str(source), "--out", str(out)],
    ):
        assert run([*asked, *flags]) == 2
        said = capsys.readouterr().err
        assert said.startswith("limner: ")
        assert said.count("\n") == 1
        assert HOSTILE[made] in said
    assert set(tmp_path.rglob("*")) == before


def test_weights_that_are_not_finite_are_converted_with_a_warning(tmp_path: Path) -> None:
    save_file(weights() | {"out.2.bias": torch.full((3,), float("nan"))}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"NaN or infinity in 1 weights"):
        assert run(["convert", str(tmp_path / "model.safetensors"), str(tmp_path / "out"), *FLAGS]) == 0
