"""Batches, augmentation, the split and the cache."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from limner.config import DataConfig
from limner.data import cache, transforms
from limner.data.dataset import Dataset, prepare, split_rows
from limner.errors import LimnerError
from limner.native import cache_root
from pictures import class_folder, encode, metadata_folder, parquet, picture, pixels, write


def read(source: Path, *wants: str, **settings: object) -> Dataset:
    return prepare(DataConfig.model_validate({"source": str(source), **settings}), set(wants))


def entries() -> list[Path]:
    home = cache_root() / "pixels"
    return sorted(path for path in home.iterdir() if path.is_dir()) if home.exists() else []


def test_a_batch_is_float_channels_first_in_minus_one_to_one(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture_bytes = encode(np.stack([ramp, ramp[::-1], np.full_like(ramp, 255)], axis=-1))
    data = read(write(tmp_path / "a.png", picture_bytes))
    image = data.batch([0, 0])["image"]
    assert (image.dtype, image.shape, image.is_contiguous()) == (torch.float32, (2, 3, 16, 16), True)
    expected = torch.arange(256, dtype=torch.float64).reshape(16, 16) / 127.5 - 1
    torch.testing.assert_close(image[1, 0].double(), expected, atol=1e-7, rtol=0)
    assert (image.min(), image.max()) == (-1, 1)
    back = ((image + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(back, data.uint8([0, 0]))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_size_and_number_of_channels(tmp_path: Path, channels: int) -> None:
    data = read(class_folder(tmp_path), "label", size=(6, 10), channels=channels)
    assert (data.size, data.channels, len(data)) == ((6, 10), channels, 6)
    batch = data.batch(np.array([5, 0]))
    assert batch["image"].shape == (2, channels, 6, 10)
    assert (batch["label"].dtype, batch["label"].tolist()) == (torch.int64, [1, 0])
    assert data.uint8([1]).shape == (1, 6, 10, channels)


def test_without_a_generator_nothing_is_flipped(tmp_path: Path) -> None:
    data = read(picture(tmp_path / "a.png", 0), flip=True)
    for _ in range(20):
        np.testing.assert_array_equal(data.uint8([0])[0], pixels(0))
        torch.testing.assert_close(data.batch([0])["image"], data.batch([0], None)["image"])


def test_flips_mirror_half_of_the_pictures(tmp_path: Path) -> None:
    data = read(picture(tmp_path / "a.png", 0), flip=True)
    plain = data.batch([0])["image"][0]
    batch = data.batch([0] * 400, np.random.default_rng(1))["image"]
    flipped = (batch == plain.flip(-1)).flatten(1).all(1)
    assert ((batch == plain).flatten(1).all(1) | flipped).all()
    assert 150 < int(flipped.sum()) < 250


def test_the_same_generator_gives_the_same_batch(tmp_path: Path) -> None:
    data = read(class_folder(tmp_path), flip=True)
    first, second = (data.batch(range(6), np.random.default_rng(5))["image"] for _ in range(2))
    assert torch.equal(first, second)


def test_no_flip_unless_asked(tmp_path: Path) -> None:
    data = read(picture(tmp_path / "a.png", 0))
    batch = data.batch([0] * 50, np.random.default_rng(0))["image"]
    assert torch.equal(batch, data.batch([0] * 50)["image"])


@pytest.mark.parametrize(
    ("caption", "may_flip"),
    [
        ("a cat", True),
        ("a left arrow", False),
        ("backhand index pointing RIGHT", False),
        ("facing leftwards", False),
        ("anticlockwise arrows button", False),
        ("a bright cleft", True),
        ("western grey kangaroo", True),
    ],
)
def test_a_caption_that_names_a_side_is_not_mirrored(tmp_path: Path, caption: str, may_flip: bool) -> None:
    folder = metadata_folder(tmp_path, [{"text": caption}])
    rows, rng = [0] * 64, np.random.default_rng(0)
    data = read(folder, "text", flip=True)
    changed = not torch.equal(data.batch(rows, rng)["image"], data.batch(rows)["image"])
    assert changed == may_flip
    uncaptioned = read(folder, flip=True)
    assert not torch.equal(uncaptioned.batch(rows, rng)["image"], uncaptioned.batch(rows)["image"])


def test_random_crops_reach_every_part_and_the_centre_is_the_default(tmp_path: Path) -> None:
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[...] = np.arange(12, dtype=np.uint8)[None, :, None] * 10
    write(tmp_path / "wide.png", encode(wide))
    write(tmp_path / "tall.png", encode(wide.transpose(1, 0, 2).copy()))
    data = read(tmp_path, size=(4, 4), crop="random")
    assert data.size == (4, 4)
    np.testing.assert_array_equal(data.uint8([1])[0], wide[:, 4:8])
    np.testing.assert_array_equal(data.uint8([0])[0], wide[:, 4:8].transpose(1, 0, 2))
    batch = data.batch([1] * 300, np.random.default_rng(0))["image"]
    starts = ((batch[:, 0, 0, 0] + 1) * 127.5 / 10).round().int()
    assert set(starts.tolist()) == set(range(9))
    for image, start in zip(batch[:20], starts[:20].tolist(), strict=True):
        expected = torch.from_numpy(wide[:, start : start + 4]).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(image, expected)


def test_random_crops_flip_too(tmp_path: Path) -> None:
    data = read(picture(tmp_path / "a.png", 0, (8, 16)), size=8, crop="random", flip=True)
    assert data.batch([0] * 8, np.random.default_rng(0))["image"].shape == (8, 3, 8, 8)


def test_the_split_depends_on_the_number_of_rows_alone(tmp_path: Path) -> None:
    first, second = read(class_folder(tmp_path / "a", each=10)), read(class_folder(tmp_path / "b", ("x", "y"), 10))
    np.testing.assert_array_equal(first.held_out, second.held_out)
    assert sorted([*first.train, *first.held_out]) == list(range(20))


@pytest.mark.parametrize(
    ("rows", "share", "held_out"),
    [
        (50_000, 0.02, 1000),
        (1_000_000, 0.02, 2048),
        (10, 0.02, 1),
        (1, 0.5, 0),
        (2, 1.0, 1),
        (100, 0.0, 0),
        (50, 0.02, 1),
    ],
)
def test_how_many_rows_are_held_out(rows: int, share: float, held_out: int) -> None:
    train, kept = split_rows(rows, share)
    assert (len(train), len(kept)) == (rows - held_out, held_out)
    assert len({*train[:5000].tolist(), *kept.tolist()}) == min(rows - held_out, 5000) + held_out


def test_a_small_part_of_the_held_out_rows_is_a_fair_sample() -> None:
    _, held_out = split_rows(50_000, 0.02)
    assert abs(held_out[:100].mean() - 25_000) < 5_000


def test_iterating_gives_pictures_and_conditions_in_batches(tmp_path: Path) -> None:
    data = read(metadata_folder(tmp_path, [{"text": f"t{k}", "label": k % 2} for k in range(5)]), "label", "text")
    batches = list(data.iterate(batch=2))
    assert [len(images) for images, _ in batches] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate([images for images, _ in batches]), data.uint8(range(5)))
    assert [text for _, conditions in batches for text in conditions["text"]] == data.texts
    ((images, conditions),) = data.iterate([3, 1])
    np.testing.assert_array_equal(images, data.uint8([3, 1]))
    assert conditions["label"].tolist() == [1, 1]


def test_progress_ends_at_the_number_of_rows(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    images = [encode(pixels(0))] * 150
    path = parquet(tmp_path / "x.parquet", {"image": images})
    prepare(DataConfig.model_validate({"source": str(path)}), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(64, 150), (128, 150), (150, 150)]


# --- the cache ----------------------------------------------------------------------------------------------------


def test_pictures_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folder(tmp_path)
    decodes: list[int] = []
    decode = transforms.decoded
    monkeypatch.setattr(transforms, "decoded", lambda *args: decodes.append(1) or decode(*args))
    first, second = read(tmp_path, "label"), read(tmp_path)
    assert len(decodes) == 6
    np.testing.assert_array_equal(first.uint8(range(6)), second.uint8(range(6)))


@pytest.mark.parametrize("setting", [{"size": 4}, {"channels": 1}, {"ground": "black"}, {"size": 8, "crop": "random"}])
def test_other_settings_are_another_entry(tmp_path: Path, setting: dict[str, object]) -> None:
    class_folder(tmp_path)
    read(tmp_path)
    read(tmp_path, **setting)
    assert len(entries()) == 2


def test_flip_and_split_need_no_other_entry(tmp_path: Path) -> None:
    class_folder(tmp_path)
    read(tmp_path)
    read(tmp_path, flip=True, held_out=0.5)
    assert len(entries()) == 1


def test_changed_data_is_read_again(tmp_path: Path) -> None:
    class_folder(tmp_path)
    before = read(tmp_path, "label")
    picture(tmp_path / "cat" / "0.png", 77, (8, 8))
    os.utime(tmp_path / "cat" / "0.png", (1, 1))  # another time even where the clock is coarse
    after = read(tmp_path, "label")
    np.testing.assert_array_equal(after.uint8([0])[0], pixels(77))
    assert after.digest != before.digest


def test_the_digest_names_the_contents_not_the_files(tmp_path: Path) -> None:
    one = read(class_folder(tmp_path / "one"), "label")
    two = read(class_folder(tmp_path / "two"), "label")
    assert one.digest == two.digest
    assert read(class_folder(tmp_path / "three", ("cat", "pug")), "label").digest != one.digest
    assert read(tmp_path / "one").digest != one.digest
    assert read(tmp_path / "one", "label", size=4).digest != one.digest


@pytest.mark.parametrize("damage", ["cut", "flip a bit", "remove a file", "remove the seal", "empty the seal", "junk"])
def test_a_damaged_entry_is_built_again(tmp_path: Path, damage: str) -> None:
    class_folder(tmp_path)
    read(tmp_path)
    (entry,) = entries()
    data = (entry / "pixels.u8").read_bytes()
    if damage == "cut":
        (entry / "pixels.u8").write_bytes(data[:-1])
    elif damage == "flip a bit":
        (entry / "pixels.u8").write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif damage == "remove a file":
        (entry / "shapes.npy").unlink()
    elif damage == "remove the seal":
        (entry / "seal.json").unlink()
    elif damage == "empty the seal":
        (entry / "seal.json").write_text("{}")
    else:
        (entry / "seal.json").write_bytes(b"\xff\x00 junk")
    assert not cache.intact(entry)
    np.testing.assert_array_equal(read(tmp_path).uint8([0])[0], pixels(0))
    assert cache.intact(entry)


def test_a_file_where_the_entry_should_be_is_replaced(tmp_path: Path) -> None:
    class_folder(tmp_path)
    read(tmp_path)
    (entry,) = entries()
    for file in entry.iterdir():
        file.unlink()
    entry.rmdir()
    entry.write_text("not a folder")
    np.testing.assert_array_equal(read(tmp_path).uint8([0])[0], pixels(0))


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    class_folder(tmp_path)
    write(tmp_path / "dog" / "9.png", "no picture")
    with pytest.raises(LimnerError):
        read(tmp_path)
    assert not entries()
    (tmp_path / "dog" / "9.png").unlink()
    assert len(read(tmp_path)) == 6


def test_a_builder_that_is_killed_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    class_folder(tmp_path)
    code = (
        "import os, signal, sys\n"
        "from limner.config import DataConfig\n"
        "from limner.data.dataset import prepare\n"
        "prepare(DataConfig(source=sys.argv[1]), progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    leftovers = entries()
    assert leftovers
    assert not any(cache.intact(path) for path in leftovers)
    data = read(tmp_path)
    np.testing.assert_array_equal(data.uint8([0])[0], pixels(0))
    assert len(entries()) == 1


def _build_slowly(root: str, log: str) -> None:
    def build(directory: Path) -> None:
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(0.2)
        (directory / "value").write_text("right")

    assert (cache.entry("things", "key", build) / "value").read_text() == "right"


def test_of_many_builders_one_builds(tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_build_slowly, args=(str(tmp_path), str(log))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert log.read_text() == "built\n"


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folder(tmp_path / "data")
    write(tmp_path / "file", "x")
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path / "file"))
    with pytest.raises(LimnerError, match=r"the cache cannot be written .*; set LIMNER_CACHE") as caught:
        read(tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    def build(directory: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(LimnerError, match="No space left on device"):
        cache.entry("things", "key", build)


def test_the_seal_covers_every_file(tmp_path: Path) -> None:
    entry = cache.entry("things", "key", lambda directory: (directory / "a").touch())
    assert json.loads((entry / "seal.json").read_text())["a"] == [0, 0]
