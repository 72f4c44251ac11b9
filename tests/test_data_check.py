"""`check` tells what is in a data set and everything that is wrong with it, and never stops at the first problem."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from limner.data.check import Report, check
from limner.errors import LimnerError
from pictures import class_folder, class_label, encode, metadata_folder, parquet, picture, pixels, tar, write


def report_of(source: Path, **options: object) -> Report:
    """The report, which always is JSON and lines."""
    report = check(str(source), **options)  # type: ignore[arg-type]
    assert json.loads(json.dumps(report.to_json()))["ok"] == report.ok
    assert all("\n" not in line for line in report.lines())
    return report


def test_a_good_folder(tmp_path: Path) -> None:
    report = report_of(class_folder(tmp_path, ("cat", "dog"), each=3))
    assert report.ok
    assert report.rows == {"train": 6}
    assert report.roles == {"image": "image", "label": "label", "text": None}
    assert report.columns == {"image": "image", "label": "class"}
    assert report.sizes == {(8, 8): 6}
    assert report.modes == {"RGB": 6}
    assert report.classes == {"train": {"cat": 3, "dog": 3}}
    lines = report.lines()
    assert lines[0] == f"{tmp_path}: 6 rows"
    assert "size: all 8x8 (width x height)" in lines
    assert "classes (train, 2): cat 3, dog 3" in lines
    assert lines[-1] == "ok"


def test_sizes_aspects_and_modes(tmp_path: Path) -> None:
    write(tmp_path / "a.png", encode(pixels(0, (10, 20))))
    write(tmp_path / "b.png", encode(pixels(0, (30, 30), channels=1)))
    write(tmp_path / "c.png", encode(pixels(0, (20, 50), channels=4)))
    write(tmp_path / "d.png", encode(Image.fromarray(np.zeros((10, 10), np.uint16))))
    write(tmp_path / "e.gif", encode(Image.new("P", (10, 10)), "GIF"))
    report = report_of(tmp_path)
    assert report.ok
    assert report.modes == {"RGB": 1, "grey": 1, "RGBA": 1, "grey 16-bit": 1, "palette": 1}
    sizes = report.to_json()["sizes"]
    assert sizes["height"] == {"min": 10, "median": 10, "max": 30}
    assert sizes["width"] == {"min": 10, "median": 20, "max": 50}
    assert sizes["aspect"] == {"min": 1, "median": 1, "max": 2.5}
    assert any("set data.size to train" in line for line in report.lines())


def test_exif_rotation_counts_for_the_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path / "a.jpg", encode(pixels(0, (8, 16)), "JPEG", exif=exif))
    assert report_of(tmp_path).sizes == {(16, 8): 1}


def test_all_corrupt_pictures_are_listed(tmp_path: Path) -> None:
    class_folder(tmp_path, each=4)
    text = write(tmp_path / "cat" / "1.png", "text")
    cut = write(tmp_path / "dog" / "0.png", encode(pixels(0, (64, 64)))[:2000])
    empty = write(tmp_path / "dog" / "2.png", b"")
    report = report_of(tmp_path)
    assert not report.ok
    assert [problem.place.file for problem in report.corrupt] == [str(text), str(cut), str(empty)]
    assert sum(report.sizes.values()) == 5
    lines = report.lines()
    assert f"corrupt: {text}: is not a picture that can be read" in lines
    assert lines[-1] == "not ok: 3 errors, 0 warnings"


def test_corrupt_rows_of_parquet(tmp_path: Path) -> None:
    images = [encode(pixels(0)), b"junk", encode(pixels(1)), None]
    path = parquet(tmp_path / "x.parquet", {"image": images})
    report = report_of(path)
    assert [str(problem.place) for problem in report.corrupt] == [f"{path} row 1", f"{path} row 3"]
    assert report.to_json()["corrupt"][0] == {
        "file": str(path), "row": 1, "what": "is not a picture that can be read"
    }  # fmt: skip


def test_metadata_problems_are_listed_with_their_lines(tmp_path: Path) -> None:
    for k in range(5):
        picture(tmp_path / f"{k}.png", k)
    lines = [
        '{"file_name": "0.png", "text": "a cat", "label": "cat"}',
        '{"file_name": "gone.png", "text": "b", "label": "dog"}',
        "not json",
        '{"file_name": "1.png", "text": "  ", "label": "dog"}',
        '{"file_name": "2.png", "text": "c"}',
        '{"text": "nameless", "label": "cat"}',
        '{"file_name": "3.png", "label": "cat"}',
    ]
    table = write(tmp_path / "metadata.jsonl", "\n".join(lines))
    report = report_of(tmp_path)
    found = {problem.place.line: problem.what for problem in report.errors}
    assert set(found) == {2, 3, 5, 6, 7}
    assert "file_name 'gone.png' does not exist" in found[2]
    assert "is not JSON" in found[3]
    assert "has no label" in found[5]
    assert "has no 'file_name'" in found[6]
    assert "has no caption" in found[7]
    assert str(report.empty_captions[0]) == f"{table} line 4"
    assert [place.file for place in report.orphans] == [str(tmp_path / "4.png")]
    assert report.rows == {"train": 4}
    assert report.classes == {"train": {"cat": 2, "dog": 1}}
    assert f"no metadata: {tmp_path / '4.png'}" in report.lines()


def test_duplicates_by_pixels_with_labels_and_splits(tmp_path: Path) -> None:
    class_folder(tmp_path / "train", ("cat", "dog"), each=2)
    write(tmp_path / "train" / "dog" / "copy.webp", encode(pixels(0), "WEBP", lossless=True))
    picture(tmp_path / "test" / "cat" / "leak.png", 101)
    picture(tmp_path / "test" / "dog" / "fresh.png", 7)
    report = report_of(tmp_path)
    assert report.ok
    first, second = report.duplicates
    assert [Path(place.file).name for place in first.places] == ["0.png", "copy.webp"]
    assert (first.labels, first.splits) == (["cat", "dog"], ["train"])
    assert (second.labels, second.splits) == (["cat", "dog"], ["test", "train"])
    assert str(second).endswith("(labels cat, dog) (in splits test, train)")
    assert report.lines()[-1] == "ok, 2 warnings"


def test_the_same_pixels_in_another_shape_are_no_duplicate(tmp_path: Path) -> None:
    write(tmp_path / "a.png", encode(pixels(0, (4, 8))))
    write(tmp_path / "b.png", encode(pixels(0, (4, 8)).reshape(8, 4, 3)))
    assert report_of(tmp_path).duplicates == []


def test_all_splits_or_one(tmp_path: Path) -> None:
    class_folder(tmp_path / "train", each=2)
    class_folder(tmp_path / "val", each=1)
    assert report_of(tmp_path).rows == {"train": 4, "validation": 2}
    assert report_of(tmp_path, split="validation").rows == {"validation": 2}
    with pytest.raises(LimnerError, match="has no split 'tets'"):
        check(str(tmp_path), split="tets")


def test_splits_without_train_are_all_looked_at(tmp_path: Path) -> None:
    class_folder(tmp_path / "val", each=1)
    class_folder(tmp_path / "test", each=1)
    report = report_of(tmp_path)
    assert report.ok
    assert report.rows == {"test": 2, "validation": 2}


def test_a_missing_column_does_not_stop_it(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", {"image": [encode(pixels(0)), b"junk"], "label": [0, 1]})
    report = report_of(path, text_column="captoin")
    assert not report.ok
    assert "there is no column 'captoin'" in report.errors[0].what
    assert report.classes == {"train": {"0": 1, "1": 1}}
    assert len(report.corrupt) == 1


def test_no_picture_column_still_tells_the_columns(tmp_path: Path) -> None:
    report = report_of(parquet(tmp_path / "x.parquet", {"a": [1, 2], "b": ["x", "y"]}))
    assert not report.ok
    assert report.columns == {"a": "integer", "b": "text"}
    assert "no picture column" in report.errors[0].what


def test_a_damaged_shard_does_not_hide_the_others(tmp_path: Path) -> None:
    parquet(tmp_path / "train-0.parquet", {"image": [encode(pixels(0))]})
    bad = write(tmp_path / "train-1.parquet", "junk")
    parquet(tmp_path / "train-2.parquet", {"image": [encode(pixels(2))]})
    report = report_of(tmp_path)
    assert [problem.place.file for problem in report.errors] == [str(bad)]
    assert report.rows == {"train": 2}


def test_a_truncated_tar_shows_what_stands_before_the_cut(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", {f"{k}.png": encode(pixels(k, (32, 32))) for k in range(3)})
    whole = path.read_bytes()
    path.write_bytes(whole[:6000])
    report = report_of(path)
    assert not report.ok
    assert 1 <= report.rows["train"] < 3


def test_classes_without_rows_are_counted(tmp_path: Path) -> None:
    features = {"image": {"_type": "Image"}, "label": class_label("cat", "dog", "zebra")}
    path = parquet(tmp_path / "x.parquet", {"image": [encode(pixels(k)) for k in range(2)], "label": [0, 0]}, features)
    assert report_of(path).classes == {"train": {"cat": 2, "dog": 0, "zebra": 0}}


def test_empty_class_folders_are_noted(tmp_path: Path) -> None:
    class_folder(tmp_path)
    (tmp_path / "zebra").mkdir()
    assert any("'zebra' is empty" in note for note in report_of(tmp_path).notes)


def test_caption_lengths(tmp_path: Path) -> None:
    report = report_of(metadata_folder(tmp_path, [{"text": "ab"}, {"text": "abcd"}, {"text": ""}]))
    assert report.to_json()["captions"]["characters"] == {"min": 0, "median": 2, "max": 4}
    assert "captions: 0 / 2 / 4 characters (min / median / max), 1 empty" in report.lines()


def test_long_lists_are_cut_where_asked(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", {"image": [b"junk"] * 30})
    lines = report_of(path).lines(limit=5)
    assert len([line for line in lines if line.startswith("corrupt: ")]) == 6
    assert "corrupt: and 25 more" in lines


def test_progress_counts_all_splits(tmp_path: Path) -> None:
    class_folder(tmp_path / "train", each=2)
    class_folder(tmp_path / "test", each=1)
    seen: list[tuple[int, int]] = []
    check(str(tmp_path), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 6), (6, 6)]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(LimnerError, match="no such file or folder"):
        check(str(tmp_path / "nope"))
    with pytest.raises(LimnerError, match="holds no pictures"):
        check(str(tmp_path))
