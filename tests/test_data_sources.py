"""Every form in which data comes gives the same rows: pictures, labels, captions, splits."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from limner.config import DataConfig
from limner.data.catalog import find, open_source
from limner.data.dataset import Dataset, conditions_in, prepare
from limner.data.sources import Place
from pictures import class_folder, class_label, encode, metadata_folder, parquet, picture, pixels, tar, write


def read(source: Path | str, *wants: str, **settings: object) -> Dataset:
    return prepare(DataConfig.model_validate({"source": str(source), **settings}), set(wants))


def shown(dataset: Dataset) -> list[list[int]]:
    """All pictures as lists, to compare with `pixels(seed)`."""
    return [image.ravel().tolist() for image in dataset.uint8(range(len(dataset)))]


def expected(*seeds: int) -> list[list[int]]:
    return [pixels(seed).ravel().tolist() for seed in seeds]


def test_a_folder_by_class_has_the_folders_as_labels(tmp_path: Path) -> None:
    data = read(class_folder(tmp_path / "pets", ("dog", "cat"), each=2), "label")
    assert data.class_names == ("cat", "dog")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert shown(data) == expected(100, 101, 0, 1)


def test_a_class_folder_may_have_folders_inside(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "indoors" / "a.png", 1)
    picture(tmp_path / "dog" / "a.png", 2)
    data = read(tmp_path, "label")
    assert data.labels is not None
    assert (data.class_names, data.labels.tolist()) == (("cat", "dog"), [0, 1])


def test_a_flat_folder_has_pictures_alone(tmp_path: Path) -> None:
    for k in range(3):
        picture(tmp_path / f"{k}.png", k)
    data = read(tmp_path)
    assert shown(data) == expected(0, 1, 2)
    assert data.labels is None
    assert data.class_names is None
    assert set(data.batch([0])) == {"image", "row", "mirror"}


def test_hidden_files_and_other_files_are_passed_over(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0)
    for name in ("._a.png", ".DS_Store", "Thumbs.db", "notes.txt", "__MACOSX/a.png", ".git/b.png"):
        write(tmp_path / name, "no picture")
    assert shown(read(tmp_path)) == expected(0)


def test_a_link_back_to_the_folder_is_followed_once(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert shown(read(tmp_path)) == expected(0)


def test_metadata_lines_give_captions_and_labels(tmp_path: Path) -> None:
    rows = [{"text": "a cat", "label": "cat"}, {"text": "a dog", "label": "dog"}, {"text": "", "label": "cat"}]
    data = read(metadata_folder(tmp_path, rows), "label", "text")
    assert data.texts == ["a cat", "a dog", ""]
    assert data.labels is not None
    assert (data.labels.tolist(), data.class_names) == ([0, 1, 0], ("cat", "dog"))
    assert data.batch([1])["text"] == ["a dog"]


def test_metadata_order_is_the_order_of_rows(tmp_path: Path) -> None:
    rows = [{"file_name": "2.png", "text": "two"}, {"file_name": "0.png", "text": "zero"}]
    data = read(metadata_folder(tmp_path, rows, pictures=3), "text")
    assert shown(data) == expected(2, 0)
    assert data.texts == ["two", "zero"]
    assert any("1 pictures" in note for note in data.notes)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv_metadata_with_quotes_and_whole_numbers(tmp_path: Path, newline: str) -> None:
    picture(tmp_path / "a.png", 0)
    picture(tmp_path / "b.png", 1)
    lines = ["file_name,caption,label", 'a.png,"one, with ""quotes""",1', "b.png,two,0", ""]
    write(tmp_path / "metadata.csv", b"\xef\xbb\xbf" + newline.join(lines).encode())
    data = read(tmp_path, "label", "text")
    assert data.texts == ['one, with "quotes"', "two"]
    assert data.labels is not None
    assert (data.labels.tolist(), data.class_names) == ([1, 0], ("0", "1"))


def test_csv_labels_with_leading_zeros_are_names(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0)
    picture(tmp_path / "b.png", 1)
    write(tmp_path / "metadata.csv", "file_name,label\na.png,007\nb.png,12\n")
    assert read(tmp_path, "label").class_names == ("007", "12")


def test_parquet_metadata_beside_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0)
    picture(tmp_path / "b.png", 1)
    parquet(tmp_path / "metadata.parquet", {"file_name": ["b.png", "a.png"], "text": ["b", "a"]})
    data = read(tmp_path, "text")
    assert (shown(data), data.texts) == (expected(1, 0), ["b", "a"])


def test_class_folders_with_captions_have_both(tmp_path: Path) -> None:
    class_folder(tmp_path, each=1)
    lines = [{"file_name": "cat/0.png", "text": "one"}, {"file_name": "dog/0.png", "text": "two"}]
    write(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, lines)))
    data = read(tmp_path, "label", "text")
    assert data.labels is not None
    assert (data.labels.tolist(), data.texts) == ([0, 1], ["one", "two"])


def test_folders_named_like_splits_are_splits(tmp_path: Path) -> None:
    class_folder(tmp_path / "train", each=2)
    class_folder(tmp_path / "val", each=1)
    assert list(find(str(tmp_path)).splits) == ["train", "validation"]
    data = read(tmp_path, "label")
    assert (len(data), data.class_names) == (4, ("cat", "dog"))
    assert any("split 'train'" in note and "validation" in note for note in data.notes)
    assert len(read(tmp_path, "label", split="val")) == 2


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    assert read(class_folder(tmp_path, ("bus", "train"), each=1), "label").class_names == ("bus", "train")


def test_metadata_in_each_split_or_above_them(tmp_path: Path) -> None:
    metadata_folder(tmp_path / "each" / "train", [{"text": "a"}, {"text": "b"}])
    metadata_folder(tmp_path / "each" / "test", [{"text": "c"}])
    assert read(tmp_path / "each", "text").texts == ["a", "b"]
    assert read(tmp_path / "each", "text", split="test").texts == ["c"]
    above = tmp_path / "above"
    lines = []
    for split in ("train", "test"):
        picture(above / split / "0.png", 0)
        lines.append(json.dumps({"file_name": f"{split}/0.png", "text": split}))
    write(above / "metadata.jsonl", "\n".join(lines))
    assert read(above, "text", split="test").texts == ["test"]


def test_parquet_with_class_names(tmp_path: Path) -> None:
    features = {"image": {"_type": "Image"}, "label": class_label("plane", "car", "bird")}
    images = [encode(pixels(seed)) for seed in range(3)]
    path = parquet(tmp_path / "x.parquet", {"image": images, "label": [2, 0, 2]}, features)
    data = read(path, "label")
    assert data.labels is not None
    assert (data.labels.tolist(), data.class_names) == ([2, 0, 2], ("plane", "car", "bird"))
    assert shown(data) == expected(0, 1, 2)


def test_parquet_of_plain_bytes_without_metadata(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [encode(pixels(seed)) for seed in range(2)]
    table = pa.table({"id": [7, 8], "jpg": images, "caption": pa.array(["x", "y"]).dictionary_encode()})
    pq.write_table(table, tmp_path / "x.parquet")
    data = read(tmp_path / "x.parquet", "text")
    assert (shown(data), data.texts) == (expected(0, 1), ["x", "y"])


def test_parquet_may_name_files_beside_it(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png", 5)
    parquet(tmp_path / "x.parquet", {"picture": ["images/a.png"]})
    assert shown(read(tmp_path / "x.parquet", image_column="picture")) == expected(5)


def test_a_folder_of_parquet_shards_by_split(tmp_path: Path) -> None:
    for shard, seeds in enumerate([(0, 1), (2,)]):
        images = [encode(pixels(seed)) for seed in seeds]
        parquet(tmp_path / "data" / f"train-0000{shard}-of-00002.parquet", {"image": images})
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", {"image": [encode(pixels(9))]})
    picture(tmp_path / "assets" / "banner.png", 50)
    data = read(tmp_path)
    assert shown(data) == expected(0, 1, 2)
    assert any("1 pictures beside" in note for note in data.notes)
    assert shown(read(tmp_path, split="test")) == expected(9)


def test_places_in_parquet_shards_count_from_the_start_of_each(tmp_path: Path) -> None:
    for shard in range(2):
        parquet(tmp_path / f"train-{shard}.parquet", {"image": [encode(pixels(0))] * 3}, row_group_size=2)
    source = open_source(str(tmp_path))
    assert source.place(2) == Place(str(tmp_path / "train-0.parquet"), row=2)
    assert source.place(3) == Place(str(tmp_path / "train-1.parquet"), row=0)


def test_webdataset_tars(tmp_path: Path) -> None:
    members = {
        "a/000.png": encode(pixels(0)),
        "a/000.txt": "first\n",
        "a/000.cls": "1",
        "a/001.png": encode(pixels(1)),
        "a/001.txt": "second",
        "a/001.cls": "0",
    }
    tar(tmp_path / "train-000.tar", members)
    tar(tmp_path / "test-000.tar", {"9.png": encode(pixels(9)), "9.txt": "ninth", "9.cls": "0"})
    data = read(tmp_path, "label", "text")
    assert data.labels is not None
    assert (shown(data), data.texts, data.labels.tolist()) == (expected(0, 1), ["first", "second"], [1, 0])
    assert read(tmp_path / "test-000.tar", "text").texts == ["ninth"]


def test_webdataset_json_and_mixed_formats(tmp_path: Path) -> None:
    about = json.dumps({"caption": "from json", "label": "cat"})
    members = {"0.webp": encode(pixels(0), "WEBP", lossless=True), "0.json": about}
    members |= {"1.png": encode(pixels(1)), "1.seg.png": encode(pixels(7)), "1.json": about}
    data = read(tar(tmp_path / "x.tar", members), "text", "label")
    assert (shown(data), data.texts, data.class_names) == (expected(0, 1), ["from json"] * 2, ("cat",))
    assert open_source(str(tmp_path / "x.tar")).columns["seg.png"].kind == "image"


def test_members_with_hostile_names_stay_in_the_tar(tmp_path: Path) -> None:
    path = tar(tmp_path / "in" / "x.tar", {"../../evil.png": encode(pixels(0)), "/abs.png": encode(pixels(1))})
    assert shown(read(path)) == expected(0, 1)
    assert {file.name for file in tmp_path.rglob("*")} == {"in", "x.tar"}


def test_one_picture_is_a_data_set_of_one(tmp_path: Path) -> None:
    picture(tmp_path / "b.png", 3)
    assert shown(read(picture(tmp_path / "a.png", 4))) == expected(4)


def test_a_metadata_file_stands_for_its_folder(tmp_path: Path) -> None:
    metadata_folder(tmp_path, [{"text": "x"}])
    assert read(tmp_path / "metadata.jsonl", "text").texts == ["x"]


def test_a_folder_saved_by_datasets(tmp_path: Path) -> None:
    import datasets

    rows = {"image": [Image.fromarray(pixels(seed)) for seed in range(3)], "label": [1, 0, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    saved = datasets.Dataset.from_dict(rows, features=features)
    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": saved, "test": saved.select([2])}).save_to_disk(str(tmp_path / "saved"))
    data = read(tmp_path / "saved", "label")
    assert data.labels is not None
    assert (shown(data), data.labels.tolist(), data.class_names) == (expected(0, 1, 2), [1, 0, 1], ("no", "yes"))
    assert shown(read(tmp_path / "saved", split="test")) == expected(2)


def test_json_by_way_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    rows = [{"img": f"{seed}.png", "label": name} for seed, name in enumerate(("cat", "dog"))]
    for row, seed in zip(rows, range(2), strict=True):
        picture(tmp_path / str(row["img"]), seed)
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    data = read(path, "label", image_column="img")
    assert (shown(data), data.class_names) == (expected(0, 1), ("cat", "dog"))


@pytest.mark.parametrize("named", ["hub:someone/pictures", "hf://datasets/someone/pictures", "someone/pictures"])
def test_a_hub_name_is_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    rows = {"img": [{"bytes": encode(pixels(seed)), "path": None} for seed in range(2)], "text": ["a", "b"]}
    features = datasets.Features({"img": datasets.Image(), "text": datasets.Value("string")})
    asked = []

    def load(name: str, configuration: str | None, split: str) -> datasets.Dataset:
        asked.append((name, configuration, split))
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: None)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, configuration: ["test", "train"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    data = read(named, "text")
    assert (shown(data), data.texts) == (expected(0, 1), ["a", "b"])
    assert asked == [("someone/pictures", None, "train")]


def test_which_conditions_the_data_can_give(tmp_path: Path) -> None:
    class_folder(tmp_path / "labelled")
    metadata_folder(tmp_path / "captioned", [{"anything": "a caption"}])
    assert conditions_in(DataConfig.model_validate({"source": str(tmp_path / "labelled")})) == {"label"}
    assert conditions_in(DataConfig.model_validate({"source": str(tmp_path / "captioned")})) == {"text"}


def test_named_columns_win_over_guesses(tmp_path: Path) -> None:
    images = [encode(pixels(seed)) for seed in range(4)]
    columns = {"image": images[:2], "other": images[2:], "label": [0, 1], "breed": ["pug", "lab"], "text": ["a", "b"]}
    path = parquet(tmp_path / "x.parquet", columns)
    data = read(path, "label", "text", image_column="other", label_column="breed", text_column="breed")
    assert (shown(data), data.class_names, data.texts) == (expected(2, 3), ("lab", "pug"), ["pug", "lab"])


def test_a_class_column_may_serve_as_captions(tmp_path: Path) -> None:
    features = {"image": {"_type": "Image"}, "label": class_label("a plane", "a car")}
    path = parquet(tmp_path / "x.parquet", {"image": [encode(pixels(0))] * 2, "label": [1, 0]}, features)
    assert read(path, "text", text_column="label").texts == ["a car", "a plane"]


def test_labels_follow_the_classes_of_an_earlier_run(tmp_path: Path) -> None:
    config = DataConfig.model_validate({"source": str(class_folder(tmp_path, ("cat", "dog"), each=1))})
    data = prepare(config, {"label"}, classes=("zebra", "dog", "cat"))
    assert data.labels is not None
    assert (data.labels.tolist(), data.class_names) == ([2, 1], ("zebra", "dog", "cat"))


def test_booleans_and_whole_floats_are_labels(tmp_path: Path) -> None:
    images = [encode(pixels(0))] * 2
    flags = read(parquet(tmp_path / "a.parquet", {"image": images, "label": [True, False]}), "label")
    floats = read(parquet(tmp_path / "b.parquet", {"image": images, "label": [1.0, 0.0]}), "label")
    assert flags.class_names == ("false", "true")
    assert floats.labels is not None
    assert floats.labels.tolist() == [1, 0]


def test_importing_the_data_package_leaves_datasets_alone() -> None:
    import subprocess
    import sys

    code = "import sys, limner.data.dataset, limner.data.check as _; print({'datasets', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_pictures_are_read_lazily_and_in_order(tmp_path: Path) -> None:
    source = open_source(str(class_folder(tmp_path, each=2)))
    first = next(source.pictures("image"))
    data = first.read() if not isinstance(first, bytes) else first  # type: ignore[union-attr]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels(0))
