"""Hostile and damaged checkpoints: refused in one line, with nothing run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from limner.errors import LimnerError
from limner.interop import safe


class Command:
    """Runs a shell command when it is unpickled by anything careless."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def refusal(path: Path) -> str:
    with pytest.raises(LimnerError) as caught:
        safe.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def named(tmp_path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, tmp_path / "model.pt", **options)
    return tmp_path / "model.pt"


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "before 1.6"])
def test_plain_weights_are_read(tmp_path: Path, zipped: bool) -> None:
    weights = OrderedDict(a=torch.randn(3), b=torch.ones(2, dtype=torch.float16))
    path = named(tmp_path, weights, _use_new_zipfile_serialization=zipped)
    found = safe.read(path).weights
    assert torch.equal(found["a"], weights["a"])
    assert found["b"].dtype == torch.float16


def test_safetensors_are_read_whatever_the_name(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0)}, tmp_path / "model.ckpt")
    assert torch.equal(safe.read(tmp_path / "model.ckpt").weights["a"], torch.arange(3.0))


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "before 1.6"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_command_is_named_and_not_run(tmp_path: Path, zipped: bool, protocol: int) -> None:
    value = {"w": torch.ones(1), "x": Command(f"touch {tmp_path / 'ran'}")}
    path = named(tmp_path, value, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    assert "names 'posix.system'" in refusal(path)
    assert not (tmp_path / "ran").exists()


def test_a_plain_pickle_that_calls_is_named_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Command(f"touch {tmp_path / 'ran'}")))
    assert "'posix.system'" in refusal(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["builtins\neval", "builtins\nbytearray", "__builtin__\neval", "torch\nload"])
def test_names_that_no_weights_need_are_refused(tmp_path: Path, name: str) -> None:
    code = b"\x80\x02c" + name.encode() + b"\nX\x01\x00\x00\x00a\x85R."
    (tmp_path / "model.pt").write_bytes(code)
    assert f"names '{name.replace(chr(10), '.')}'" in refusal(tmp_path / "model.pt")


def archive_naming(path: Path, name: str) -> None:
    """A checkpoint that holds `{name(): 1}` beside its weights, as Lightning keeps its callbacks' classes."""
    torch.save({"state_dict": {"w": torch.ones(2)}, "callbacks": {"CLASS": 1}}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    module, _, attribute = name.rpartition(".")
    spelled = b"X\x05\x00\x00\x00CLASS"
    for entry, content in entries.items():
        if entry.endswith("data.pkl"):
            assert spelled in content
            entries[entry] = content.replace(spelled, f"c{module}\n{attribute}\n".encode())
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)


def test_lightning_callbacks_are_inert(tmp_path: Path) -> None:
    archive_naming(tmp_path / "model.ckpt", "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    found = safe.read(tmp_path / "model.ckpt")
    assert torch.equal(found.weights["w"], torch.ones(2))
    (callback,) = found.other["callbacks"]
    assert callback is safe.Inert
    archive_naming(tmp_path / "other.ckpt", "somebody.callbacks.Backdoor")
    assert "names 'somebody.callbacks.Backdoor'" in refusal(tmp_path / "other.ckpt")


def test_an_inert_stand_in_does_nothing() -> None:
    thing = safe.Inert(1, two=2)
    thing.__setstate__({"a": 1})
    assert vars(thing) == {}


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    source = named(tmp_path, {"w": torch.zeros(10)})
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry) if entry.endswith("pkl") else bytes(1 << 24))
    assert bomb.stat().st_size < 1 << 20
    assert "is compressed" in refusal(bomb)


def test_other_archives_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "no PyTorch checkpoint" in refusal(tmp_path / "a.pt")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1, 1)), tmp_path / "b.pt")
    assert "TorchScript" in refusal(tmp_path / "b.pt")


def test_a_weight_that_claims_more_than_is_stored_is_refused(tmp_path: Path) -> None:
    path = named(tmp_path, {"w": torch.zeros(1).expand(1 << 40)})
    assert "'w' claims 1,099,511,627,776 values" in refusal(path)


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, torch.ones(1)], ids=["list", "no tensors", "tensor"])
def test_files_without_named_weights_are_refused(tmp_path: Path, value: Any) -> None:
    assert "weights" in refusal(named(tmp_path, value))


def test_files_of_k_diffusion_and_edm2_are_told(tmp_path: Path) -> None:
    """The one keeps its weights under names of its own, the other a class with its source, which to load is to run."""
    theirs = {
        "config": {"model": {"type": "image_v1"}},
        "model": {"a": torch.ones(1)},
        "model_ema": {"a": torch.ones(1)},
    }
    assert "those under model, model_ema are of a project that isn't read" in refusal(named(tmp_path, theirs))

    class Reconstructed:
        def __reduce__(self) -> tuple[Any, tuple[dict[str, str]]]:
            return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, ({"module_src": "1 / 0"},)

    def reconstruct(meta: dict[str, str]) -> None:
        raise AssertionError(meta)

    reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = reconstruct  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
        patched.setitem(sys.modules, "torch_utils.persistence", module)
        (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({"ema": Reconstructed()}))
        assert "names 'torch_utils.persistence._reconstruct_persistent_obj'" in refusal(tmp_path / "edm2.pkl")


def test_an_optimizer_is_named_as_such(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = tmp_path / "opt001000.pt"
    torch.save(optimizer.state_dict(), path)
    assert "an optimizer's state, not a model" in refusal(path)


def test_what_is_not_there_or_not_weights_is_said(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent.pt")
    (tmp_path / "empty.pt").touch()
    assert "neither safetensors nor a PyTorch checkpoint" in refusal(tmp_path / "empty.pt")
    (tmp_path / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "Git LFS pointer" in refusal(tmp_path / "lfs.pt")


def test_absurd_safetensors_headers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    assert "4,611,686,018,427,387,904 bytes" in refusal(path)
    path.write_bytes(struct.pack("<Q", 9) + b"{nothing}")
    assert "truncated or damaged" in refusal(path)


def checkpoints() -> list[bytes]:
    stream = io.BytesIO()
    torch.save({"w": torch.arange(100.0)}, stream)
    old = io.BytesIO()
    torch.save({"w": torch.arange(100.0)}, old, _use_new_zipfile_serialization=False)
    return [save({"w": torch.arange(100.0)}), stream.getvalue(), old.getvalue()]


CHECKPOINTS = checkpoints()


@given(which=st.sampled_from(range(3)), cut=st.floats(0, 0.999))
@settings(max_examples=60, deadline=None)
def test_truncated_files_are_refused_in_one_line(tmp_path_factory: Any, which: int, cut: float) -> None:
    path = tmp_path_factory.mktemp("cut") / "model"
    content = CHECKPOINTS[which]
    path.write_bytes(content[: int(len(content) * cut)])
    refusal(path)


@given(which=st.sampled_from(range(3)), place=st.floats(0, 0.999), byte=st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_is_refused_in_one_line_or_harmless(
    tmp_path_factory: Any, which: int, place: float, byte: int
) -> None:
    path = tmp_path_factory.mktemp("changed") / "model"
    content = bytearray(CHECKPOINTS[which])
    content[int(len(content) * place)] = byte
    path.write_bytes(content)
    said = ""
    try:
        found = safe.read(path).weights
    except LimnerError as error:
        found, said = {}, str(error)
    assert "\n" not in said
    assert all(x.numel() <= 200 for x in found.values())


def test_nan_is_warned_of_once() -> None:
    weights = {"fine": torch.ones(2), "bad": torch.tensor([1.0, float("nan")]), "worse": torch.tensor([float("inf")])}
    with pytest.warns(UserWarning, match=r"m\.pt: NaN or infinity in 2 weights, first 'bad'"):
        safe.warn_of_nan(weights, "m.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        safe.warn_of_nan({"fine": torch.ones(2), "count": torch.ones(1, dtype=torch.int64)}, "m.pt")
