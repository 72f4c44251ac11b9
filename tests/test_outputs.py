"""Writers: what they write can be read back by others' tools, and what was there before is safe."""

from __future__ import annotations

import errno
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from limner import outputs
from limner.errors import LimnerError
from limner.outputs import Picture, grid, png, read_recipe, writer

RECIPE = {"run": "abc", "seed": 3, "sampler": "ddim"}


def pictures(num: int = 5, channels: int = 3) -> list[Picture]:
    rng = np.random.default_rng(0)
    return [
        Picture(
            index,
            rng.integers(0, 256, (8, 6, channels), dtype=np.uint8),
            {"label": index % 2, "label_name": ["cat", "dög"][index % 2], "text": f"number {index}"},
        )
        for index in range(num)
    ]


def write(path: Path | str, items: list[Picture], **options: object) -> None:
    with writer(path, num=len(items), recipe=RECIPE, **options) as out:  # type: ignore[arg-type]
        out.add(items[:2])
        out.add(items[2:])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_directory_holds_the_exact_pixels_and_a_line_for_each_picture(tmp_path: Path, channels: int) -> None:
    items = pictures(channels=channels)
    write(tmp_path / "out", items)
    lines = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").read_text("utf-8").splitlines()]
    assert [line["file_name"] for line in lines] == [f"{i:06d}.png" for i in range(5)]
    assert lines[1] == {"file_name": "000001.png", **RECIPE, "index": 1, "label": 1, "label_name": "dög",
                        "text": "number 1"}  # fmt: skip
    for item in items:
        with Image.open(tmp_path / f"out/{item.index:06d}.png") as image:
            assert np.array_equal(np.asarray(image).reshape(item.pixels.shape), item.pixels)
    assert read_recipe(tmp_path / "out/000001.png") == {k: v for k, v in lines[1].items() if k != "file_name"}


def test_npz_has_x_and_the_conditions_without_pickle(tmp_path: Path) -> None:
    items = pictures()
    write(tmp_path / "s.npz", items)
    with np.load(tmp_path / "s.npz", allow_pickle=False) as data:
        assert set(data) == {"x", "y", "text"}
        assert data["x"].dtype == np.uint8
        assert np.array_equal(data["x"], np.stack([item.pixels for item in items]))
        assert data["y"].dtype == np.int64
        assert data["y"].tolist() == [0, 1, 0, 1, 0]
        assert data["text"][4] == "number 4"


def test_npz_of_an_unconditional_model_has_x_alone(tmp_path: Path) -> None:
    write(tmp_path / "s.npz", [Picture(p.index, p.pixels) for p in pictures()])
    with np.load(tmp_path / "s.npz") as data:
        assert set(data) == {"x"}


def test_npz_with_too_few_pictures_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="6 pictures were announced, 5 came"), writer(tmp_path / "s.npz", num=6) as out:
        out.add(pictures())
    assert list(tmp_path.iterdir()) == []


def test_tar_is_a_webdataset(tmp_path: Path) -> None:
    items = pictures()
    write(tmp_path / "s.tar", items)
    with tarfile.open(tmp_path / "s.tar") as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert set(content) == {f"{i:06d}.{suffix}" for i in range(5) for suffix in ("png", "json", "cls", "txt")}
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content["000002.png"]))), items[2].pixels)
    assert json.loads(content["000001.json"])["label_name"] == "dög"
    assert content["000001.cls"] == b"1"
    assert content["000003.txt"] == b"number 3"


def test_grid_file_knows_every_picture_in_it(tmp_path: Path) -> None:
    write(tmp_path / "grid.png", pictures())
    recipe = read_recipe(tmp_path / "grid.png")
    assert recipe is not None
    assert recipe["seed"] == 3
    assert [p["label"] for p in recipe["pictures"]] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("name", ["s.npz", "s.tar", "s.png"])
def test_the_same_pictures_give_the_same_bytes(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write(tmp_path / "a" / name, pictures())
    write(tmp_path / "b" / name, pictures())
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_grid_enlarges_small_pictures_by_whole_pixels_and_writes_captions() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[:16] = (255, 0, 0)
    plain = grid([image] * 4)
    assert plain.shape == (2 * (64 + 6) + 6, 2 * (64 + 6) + 6, 3)
    assert np.array_equal(plain[6:38, 6:70], np.broadcast_to([255, 0, 0], (32, 64, 3)))
    captioned = grid([image] * 4, ["a cat"] * 4)
    assert captioned.shape[0] > plain.shape[0]
    below = captioned[6 + 64 : 6 + 64 + 14, 6:70]
    assert (below < 128).any()
    assert not np.array_equal(captioned, grid([image] * 4, ["a dog"] * 4))


def test_grid_puts_rotating_labels_in_columns() -> None:
    image = np.zeros((64, 64, 1), np.uint8)
    sheet = grid([image] * 9, ["a", "b", "c"] * 3)
    assert sheet.shape[1] == 3 * 70 + 6
    assert grid([image] * 6, ["a", "b", "c"] * 2).shape[1] == 3 * 70 + 6
    assert grid([image] * 3, ["a", "b", "c"]).shape[1] == 2 * 70 + 6


def test_grid_shows_transparency_on_white() -> None:
    sheet = grid([np.zeros((64, 64, 4), np.uint8)])
    assert (sheet == 255).all()


def test_long_captions_stay_in_their_cell() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    sheet = grid([image] * 2, ["donaudampfschifffahrtsgesellschaftskapitän of " + "words " * 40, ""], columns=2)
    assert (sheet[6 + 64 :, 76:] == 255).all()
    assert (sheet[6 + 64 :, :6] == 255).all()


def test_a_grid_of_too_many_is_refused_after_the_first_batch(tmp_path: Path) -> None:
    with pytest.raises(LimnerError, match=r"too many.*directory"), writer(tmp_path / "g.png", num=10**8) as out:
        out.add(pictures())


@pytest.mark.parametrize("name", ["s.png", "s.npz", "s.tar", "folder"])
def test_what_is_there_is_kept_unless_overwrite(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(path, pictures(2))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(LimnerError, match=r"exists already.*--overwrite"):
        write(path, pictures(3))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    write(path, pictures(1), overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} != before
    assert not (path / "000001.png").exists()


def test_a_directory_with_other_files_is_never_deleted(tmp_path: Path) -> None:
    write(tmp_path / "out", pictures(2))
    (tmp_path / "out/thesis.tex").write_text("years of work")
    with pytest.raises(LimnerError, match="holds more than samples"):
        write(tmp_path / "out", pictures(2), overwrite=True)
    assert (tmp_path / "out/thesis.tex").read_text() == "years of work"


def test_an_empty_directory_is_filled_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(".", pictures(3))
    assert sorted(p.name for p in Path().iterdir()) == ["000000.png", "000001.png", "000002.png", "metadata.jsonl"]


@pytest.mark.parametrize("name", ["s.png", "s.npz", "s.tar", "folder"])
def test_a_failure_leaves_nothing_behind_and_the_old_output_in_place(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, pictures(1))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def fail() -> None:
        with writer(tmp_path / name, num=9, overwrite=True) as out:
            out.add(pictures(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_full_disk_is_one_line_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(pixels: np.ndarray, facts: object = None) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(outputs, "png", full)
    with pytest.raises(LimnerError, match=r"folder: cannot be written \(No space left on device\)"):
        write(tmp_path / "folder", pictures(3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["s.jpg", "s.zip", "S.GIF"])
def test_formats_that_are_not_written_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(LimnerError, match=r"\.png grid, an \.npz, a \.tar or a directory"):
        write(tmp_path / name, pictures(1))


def test_a_number_in_a_directory_name_is_no_format(tmp_path: Path) -> None:
    write(tmp_path / "guidance-1.5", pictures(1))
    write(f"{tmp_path}/looks.png/", pictures(1))
    assert (tmp_path / "guidance-1.5/metadata.jsonl").is_file()
    assert (tmp_path / "looks.png/metadata.jsonl").is_file()


def test_a_file_where_a_directory_should_go(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(LimnerError, match="is a file"):
        write(tmp_path / "out", pictures(1), overwrite=True)
    with pytest.raises(LimnerError, match="cannot be written"):
        write(tmp_path / "out/below.npz", pictures(1))
    assert (tmp_path / "out").read_text() == "mine"


def test_other_peoples_pngs_have_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(np.zeros((4, 4, 3), np.uint8)))
    assert read_recipe(tmp_path / "x.png") is None
