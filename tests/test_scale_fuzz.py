"""Whatever the bytes of a recipe, a run's weights, a checkpoint or a picture: one line, or success; no hang, and no
memory above a bound."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from limner import api
from limner import config as configuration
from limner.data.transforms import PictureError, Recipe, quiet
from limner.errors import LimnerError
from limner.training.checkpoint import Checkpoints, read_model
from tiny_training import recipe

quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MOST_BYTES = 64_000_000


def attempt(action: Callable[[], Any]) -> None:
    """Success, or a LimnerError of one line."""
    try:
        action()
    except LimnerError as error:
        must_be_one_line(error)


def must_be_one_line(error: LimnerError) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 2000


# --- recipes ----------------------------------------------------------------------------------------------------------

RAW = recipe().model_dump(mode="json")
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)  # fmt: skip
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 10)
)


@quick
@given(text=st.text(max_size=200) | st.binary(max_size=100).map(lambda data: data.decode("latin-1")))
@example(text="[" * 5000)
@example(text="data: 2001-99-99")
@example(text="seed: " + "9" * 5000)
@example(text="a: &a [*a]")
@example(text=LAUGHS)
@example(text="data: {source: " + "{a: " * 900)
@example(text="model: !!python/object/apply:os.system ['false']")
@example(text="? [a, b]\n: c")
@example(text="provenance: &a {b: *a}")
def test_recipes_of_any_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    attempt(lambda: configuration.load(path))


@quick
@given(section=st.sampled_from(sorted(RAW)), key=st.text(max_size=6) | st.sampled_from(sorted(RAW["training"])),
       value=VALUES, inside=st.booleans())  # fmt: skip
def test_recipes_with_a_wrong_value(tmp_path: Path, section: str, key: str, value: Any, inside: bool) -> None:
    raw = json.loads(json.dumps(RAW))
    if inside and isinstance(raw[section], dict):
        raw[section][key] = value
    else:
        raw[section] = value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8", errors="replace")
    attempt(lambda: configuration.load(path))


@quick
@given(setting=st.text(max_size=30) | st.builds("{}={}".format, st.sampled_from(["training.lr", "data", "model.levels.0"
                                                                                ]), st.text(max_size=12)))  # fmt: skip
def test_settings_of_any_text(setting: str) -> None:
    attempt(lambda: configuration.parse(configuration.override(RAW, [setting]), "recipe"))


def test_aliases_that_stand_for_too_much_are_refused_within_memory(tmp_path: Path) -> None:
    """Where a recipe may say anything, too."""
    path = tmp_path / "config.yaml"
    path.write_text(LAUGHS + "provenance: {x: *a9}\n")
    tracemalloc.start()
    try:
        with pytest.raises(LimnerError, match="its aliases stand for more than 100,000 values"):
            configuration.load(path)
        with pytest.raises(LimnerError, match="its aliases stand for more than"):
            configuration.override(RAW, ["provenance={a: &a [*a]}"])
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


# --- weights and checkpoints ------------------------------------------------------------------------------------------

WEIGHTS = save({"network.w": torch.zeros(3, 4), "b": torch.ones(2, dtype=torch.float16)}, {"format": "pt"})


def with_header(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(64)


HEADERS = st.builds(
    lambda dtype, shape, offsets: json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode(),
    st.sampled_from(["F32", "F16", "BF16", "I64", "U8", "F8_E4M3", "X", ""]),
    st.lists(st.integers(-1, 2**63), max_size=3),
    st.lists(st.integers(-1, 2**63), max_size=3),
)


@quick
@given(data=st.binary(max_size=60) | HEADERS.map(with_header)
       | st.builds(with_header, st.binary(max_size=40), st.integers(0, 2**64 - 1))
       | st.builds(lambda at, new: WEIGHTS[:at] + new + WEIGHTS[at + len(new):], st.integers(0, len(WEIGHTS)),
                   st.binary(max_size=8)))  # fmt: skip
def test_safetensors_of_any_bytes(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    attempt(lambda: api.read_tensors(tmp_path / "model.safetensors"))
    attempt(lambda: read_model(tmp_path))


@quick
@given(text=st.text(max_size=60) | VALUES.map(json.dumps))
@example(text="[" * 5000)
@example(text='{"format": 1, "files": [], "digest": ""}')
@example(text='{"format": 1, "files": {"x": 1}, "digest": ""}')
def test_a_checkpoint_of_any_state_is_damaged(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "checkpoints" / "images-000000001"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(LimnerError, match="every checkpoint is damaged"):
        Checkpoints(tmp_path).latest()
    Checkpoints(tmp_path).best()


# --- bombs ------------------------------------------------------------------------------------------------------------


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + chunk(b"IEND", b"")


def tiff() -> bytes:
    """A small file that unpacks to more than may be."""
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(buffer, "TIFF", compression="group4")
    return buffer.getvalue()


ZEROS = zlib.compress(bytes(100_000_000), 9)


@pytest.mark.parametrize(("data", "said"), [
    (lambda: png(60_000, 60_000, chunk(b"IDAT", ZEROS)), "pixels"),
    (lambda: png(2**31 - 1, 2**31 - 1), "pixels"),
    (lambda: png(4, 4, chunk(b"zTXt", b"k\0\0" + ZEROS), chunk(b"IDAT", zlib.compress(bytes(52)))), ""),
    (lambda: png(4, 4, chunk(b"iCCP", b"k\0\0" + ZEROS), chunk(b"IDAT", zlib.compress(bytes(52)))), ""),
    (tiff, "pixels")], ids=["pixels", "more than there are", "text", "profile", "tiff"])  # fmt: skip
def test_bombs_are_refused_within_memory(data: Any, said: str) -> None:
    bomb = data()
    tracemalloc.start()
    try:
        with quiet(), pytest.raises(PictureError, match=said) if said else contextlib.suppress(PictureError):
            Recipe((8, 8))(bomb)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
