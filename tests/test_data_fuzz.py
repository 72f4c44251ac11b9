"""Whatever the bytes: a LimnerError of one line, or success; and `check` always reports."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from limner.config import DataConfig
from limner.data.check import check
from limner.data.dataset import prepare
from limner.data.transforms import PictureError, Recipe, mode_name, opened
from limner.errors import LimnerError
from pictures import encode, parquet, pixels, tar, write

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

SEEDS = {form: encode(pixels(1, (9, 11)), form) for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA")}
SEEDS["ICO"] = encode(pixels(1, (16, 16)), "ICO")
SEEDS["JPEG2000"] = encode(pixels(1, (32, 32)), "JPEG2000")
SEEDS["palette"] = encode(Image.new("P", (9, 9)), transparency=0)
SEEDS["16-bit"] = encode(Image.new("I;16", (9, 9)))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A real picture with some bytes changed, removed or added."""
    data = bytearray(SEEDS[draw(st.sampled_from(sorted(SEEDS)))])
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        edit = draw(st.sampled_from(["set", "cut", "insert", "end"]))
        if edit == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif edit == "cut":
            del data[at : at + draw(st.integers(1, 20))]
        elif edit == "insert":
            data[at:at] = draw(st.binary(max_size=8))
        else:
            del data[at:]
    return bytes(data)


@settings(quick, max_examples=300)
@given(data=damaged() | st.binary(max_size=200), channels=st.sampled_from([1, 3, 4]), margins=st.booleans())
def test_picture_bytes(data: bytes, channels: int, margins: bool) -> None:
    with contextlib.suppress(PictureError):
        mode_name(opened(data))
    try:
        array = Recipe((6, 5), channels, margins=margins)(data)
    except PictureError as error:
        must_be_one_line(error)
    else:
        assert array.shape[0] == channels
        assert margins or array.shape[1:] == (6, 5)


def must_be_one_line(error: LimnerError) -> None:
    assert "\n" not in str(error)


def outcome(source: Path) -> None:
    """Read it with every condition, and check it. Anything but LimnerError fails the test."""
    config = DataConfig.model_validate({"source": str(source), "size": 4})
    for wants in ((), ("label",), ("text",)):
        try:
            data = prepare(config, wants)
        except LimnerError as error:
            must_be_one_line(error)
        else:
            data.batch(data.train[:2])
    try:
        report = check(str(source))
    except LimnerError:
        return
    json.dumps(report.to_json()).encode()
    "\n".join(report.lines()).encode()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
names = st.sampled_from(["0.png", "1.png", "", ".", "..", "/", "0.png/x", "\x00", "sub/0.png"]) | st.text(max_size=5)
rows = st.fixed_dictionaries(
    {}, optional={"file_name": names | values, "label": values, "text": values, "image": values}
)


@quick
@given(table=st.lists(rows, max_size=4), junk=st.text(max_size=20))
@example(table=[{"file_name": "0.png", "label": float("nan"), "text": "\ud800"}], junk="")
@example(table=[{"file_name": "\ud800", "label": 10**400}], junk="")
def test_json_lines(tmp_path: Path, table: list[dict[str, Any]], junk: str) -> None:
    for k in range(2):
        write(tmp_path / f"{k}.png", encode(pixels(k)))
    lines = [json.dumps(row) for row in table]
    write(tmp_path / "metadata.jsonl", "\n".join([*lines, junk]).encode("utf-8", "replace"))
    outcome(tmp_path)


@quick
@given(data=st.binary(max_size=60) | st.text(alphabet='"\n\r,a0.png file_name\0', max_size=60).map(str.encode))
def test_csv_and_json_bytes(tmp_path: Path, data: bytes) -> None:
    for kind, other in (("csv", "jsonl"), ("jsonl", "csv")):
        write(tmp_path / "0.png", encode(pixels(0)))
        (tmp_path / f"metadata.{other}").unlink(missing_ok=True)
        write(tmp_path / f"metadata.{kind}", b"file_name,text,label\n0.png," + data if kind == "csv" else data)
        outcome(tmp_path)


@quick
@given(at=st.integers(0, 4000), new=st.binary(max_size=30), cut=st.booleans())
def test_tar_bytes(tmp_path: Path, at: int, new: bytes, cut: bool) -> None:
    path = tar(tmp_path / "x.tar", {"0.png": encode(pixels(0)), "0.json": '{"text": "a"}', "1.cls": "7"})
    data = path.read_bytes()
    path.write_bytes(data[:at] + new + (b"" if cut else data[at + len(new) :]))
    outcome(path)


@quick
@given(at=st.integers(0, 3000), new=st.binary(min_size=1, max_size=12), cut=st.booleans())
def test_parquet_bytes(tmp_path: Path, at: int, new: bytes, cut: bool) -> None:
    columns = {"image": [encode(pixels(k)) for k in range(3)], "label": [0, 1, 0], "text": ["a", "b", None]}
    path = parquet(tmp_path / "x.parquet", columns)
    data = path.read_bytes()
    at = min(at, len(data))
    path.write_bytes(data[:at] + new + (b"" if cut else data[at + len(new) :]))
    outcome(path)


@quick
@given(cells=st.lists(values, min_size=1, max_size=4))
def test_labels_and_captions_of_any_type(tmp_path: Path, cells: list[Any]) -> None:
    lines = []
    for k, cell in enumerate(cells):
        write(tmp_path / f"{k}.png", encode(pixels(k)))
        lines.append(json.dumps({"file_name": f"{k}.png", "label": cell, "text": cell}))
    write(tmp_path / "metadata.jsonl", "\n".join(lines))
    outcome(tmp_path)


@pytest.mark.parametrize("form", sorted(SEEDS))
def test_every_cut_of_every_format(form: str) -> None:
    """Each prefix of a real picture, which hypothesis would rarely try."""
    data = SEEDS[form]
    for length in range(0, len(data), max(1, len(data) // 40)):
        with contextlib.suppress(PictureError):
            Recipe((4, 4))(data[:length])
    assert Image.open(io.BytesIO(data)).size
