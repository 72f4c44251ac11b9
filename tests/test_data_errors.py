"""Bad data: each a LimnerError of one line that says what, where, and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from limner.config import DataConfig
from limner.data.dataset import prepare
from limner.errors import LimnerError
from pictures import class_folder, class_label, encode, metadata_folder, parquet, picture, pixels, tar, write


def refusal(source: Path | str, *wants: str, classes: tuple[str, ...] | None = None, **settings: object) -> str:
    config = DataConfig.model_validate({"source": str(source), **settings})
    with pytest.raises(LimnerError) as caught:
        prepare(config, set(wants), classes=classes)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_no_source() -> None:
    with pytest.raises(LimnerError, match=r"data\.source is not set"):
        prepare(DataConfig.model_validate({}))


def test_no_such_path(tmp_path: Path) -> None:
    for name in ("nope", "nope.parquet", "nope/deeper/still", "nope.tar"):
        assert refusal(tmp_path / name) == f"{tmp_path / name}: no such file or folder"
    assert refusal("a\0\nb") == r"a\x00\nb: no such file or folder"


def test_no_such_path_nor_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*args: object, **options: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    assert refusal("nope") == "nope: no such file or folder"
    text = refusal("someone/nope")
    assert text.startswith("someone/nope: no such file or folder, and Hugging Face's hub cannot be asked")
    assert "HF_HUB_OFFLINE=1" in text
    (tmp_path / "data").mkdir()
    assert refusal("data/nope") == "data/nope: no such file or folder"


def test_an_empty_folder_and_one_without_pictures(tmp_path: Path) -> None:
    assert "holds no pictures" in refusal(tmp_path)
    write(tmp_path / "readme.txt", "hello")
    assert "such as readme.txt" in refusal(tmp_path)


def test_a_file_that_is_no_data_set(tmp_path: Path) -> None:
    assert "is neither a picture nor a data set" in refusal(write(tmp_path / "notes.txt", "hello"))
    assert "unpack it" in refusal(write(tmp_path / "x.tar.gz", "hello"))
    assert "unpack it" in refusal(write(tmp_path / "x.zip", "hello"))


def test_a_file_that_is_no_picture(tmp_path: Path) -> None:
    class_folder(tmp_path)
    bad = write(tmp_path / "dog" / "1.png", "this is text")
    assert refusal(tmp_path) == f"{bad}: is not a picture that can be read"


def test_a_truncated_picture(tmp_path: Path) -> None:
    class_folder(tmp_path)
    whole = encode(pixels(0, (64, 64)))
    bad = write(tmp_path / "dog" / "1.png", whole[:3000])
    assert refusal(tmp_path, size=8).startswith(f"{bad}: is a damaged picture (")
    write(bad, b"")
    assert refusal(tmp_path, size=8) == f"{bad}: is empty"


def test_a_bad_picture_in_parquet_is_named_by_its_row(tmp_path: Path) -> None:
    images = [encode(pixels(0)), encode(pixels(1)), encode(pixels(2))[:50]]
    parquet(tmp_path / "train-0.parquet", {"image": images[:2]})
    second = parquet(tmp_path / "train-1.parquet", {"image": [images[0], images[2]]})
    assert refusal(tmp_path).startswith(f"{second} row 1: is a damaged picture")


def test_a_row_without_a_picture(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", {"image": [encode(pixels(0)), None]})
    assert refusal(path) == f"{path} row 1: has no picture"
    named = tar(tmp_path / "x.tar", {"0.png": encode(pixels(0)), "0.txt": "a", "1.txt": "b"})
    assert refusal(named) == f"{named} member 1: has no picture"


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret.png", "a/../../secret.png"])
def test_paths_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "secret.png", 0)
    inside = tmp_path / "in"
    path = parquet(inside / "x.parquet", {"picture": [name]})
    assert refusal(path, image_column="picture") == f"{path} row 0: '{name}' points outside the folder"
    folder = metadata_folder(tmp_path / "meta", [{"file_name": name}])
    assert refusal(folder) == f"{folder / 'metadata.jsonl'} line 1: file_name '{name}' points outside the folder"


def test_a_missing_column_and_the_nearest(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", {"image": [encode(pixels(0))], "caption": ["a"], "kind": [1.5]})
    assert refusal(path, "text", text_column="captoin").endswith("no column 'captoin'; did you mean 'caption'?")
    assert "no label column among image, caption, kind" in refusal(path, "label")
    assert "data.image_column: column 'kind' holds numbers" in refusal(path, image_column="kind")
    assert "data.text_column: column 'image' holds pictures" in refusal(path, "text", text_column="image")


def test_no_picture_column_or_several(tmp_path: Path) -> None:
    none = parquet(tmp_path / "none.parquet", {"a": [1], "b": ["x"]})
    assert "no picture column among the columns (a, b)" in refusal(none)
    two = parquet(tmp_path / "two.parquet", {"before": [encode(pixels(0))], "after": [encode(pixels(1))]})
    assert "several picture columns (before, after); set data.image_column" in refusal(two)


def test_a_label_missing_in_one_line(tmp_path: Path) -> None:
    folder = metadata_folder(tmp_path, [{"label": "cat"}, {"label": "dog"}, {}, {"label": "cat"}])
    assert refusal(folder, "label") == f"{folder / 'metadata.jsonl'} line 3: has no label in column 'label'"
    write(folder / "metadata.jsonl", "")
    (folder / "metadata.jsonl").unlink()
    table = write(folder / "metadata.csv", "file_name,label\n0.png,cat\n\n1.png,\n")
    assert refusal(folder, "label") == f"{table} line 4: has no label in column 'label'"


def test_a_picture_outside_the_class_folders_has_no_label(tmp_path: Path) -> None:
    loose = picture(class_folder(tmp_path) / "loose.png", 0)
    assert refusal(tmp_path, "label") == f"{loose}: has no label in column 'label'"


def test_a_caption_missing_in_one_line(tmp_path: Path) -> None:
    folder = metadata_folder(tmp_path, [{"text": "a"}, {"text": None}])
    assert refusal(folder, "text") == f"{folder / 'metadata.jsonl'} line 2: has no caption in column 'text'"


def test_captions_that_are_not_text(tmp_path: Path) -> None:
    folder = metadata_folder(tmp_path, [{"text": b"a\\ud800".decode("unicode_escape")}])
    assert "which is no Unicode" in refusal(folder, "text")
    mixed = metadata_folder(tmp_path / "mixed", [{"text": "a"}, {"text": 5}])
    assert "data.text_column: column 'text' holds" in refusal(mixed, "text", text_column="text")


def test_labels_of_two_kinds(tmp_path: Path) -> None:
    folder = metadata_folder(tmp_path, [{"label": "cat"}, {"label": 3}])
    assert "column 'label' holds values of another kind" in refusal(folder, "label", label_column="label")
    half = parquet(tmp_path / "x.parquet", {"image": [encode(pixels(0))] * 2, "label": [1.0, 1.5]})
    assert refusal(half, "label") == f"{half} row 1: label 1.5 should be a class number"


def test_labels_out_of_range(tmp_path: Path) -> None:
    images = [encode(pixels(0))] * 2
    features = {"image": {"_type": "Image"}, "label": class_label("cat", "dog")}
    path = parquet(tmp_path / "x.parquet", {"image": images, "label": [1, 2]}, features)
    assert refusal(path, "label").startswith(f"{path} row 1: label '2' is none of the 2 classes")
    unlabelled = parquet(tmp_path / "y.parquet", {"image": images, "label": [1, -1]}, features)
    assert refusal(unlabelled, "label") == f"{unlabelled} row 1: has no label in column 'label'"
    huge = parquet(tmp_path / "z.parquet", {"image": images, "label": [1, 123456]})
    assert "label 123456 with 2 different labels; class numbers should count from 0" in refusal(huge, "label")


def test_a_class_that_the_earlier_run_did_not_have(tmp_path: Path) -> None:
    text = refusal(class_folder(tmp_path, ("cat", "dog")), "label", classes=("cat", "dot"))
    assert text == f"{tmp_path / 'dog' / '0.png'}: label 'dog' is none of the 2 classes; did you mean 'dot'?"


def test_mixed_sizes_say_what_to_set(tmp_path: Path) -> None:
    first = picture(tmp_path / "a.png", 0, (8, 8))
    second = picture(tmp_path / "b.png", 1, (6, 12))
    text = refusal(tmp_path)
    assert f"8x8 is {first}" in text
    assert f"12x6 is {second}" in text
    assert text.endswith("set data.size, such as data.size=6")
    assert len(prepare(DataConfig.model_validate({"source": str(tmp_path), "size": 6}))) == 2


def test_metadata_that_names_no_file(tmp_path: Path) -> None:
    folder = metadata_folder(tmp_path, [{}, {"file_name": "0.jpg"}, {"file_name": "elsewhere/zebra.png"}], pictures=1)
    table = folder / "metadata.jsonl"
    assert refusal(folder) == f"{table} line 2: file_name '0.jpg' does not exist; did you mean '0.png'?"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"file_name": "0.png"}\n{"file_name": ', "line 2: is not JSON (Expecting value at column 15)"),
        ('[{"file_name": "0.png"}]', 'line 1: should be an object such as {"file_name": "a.png"}, is a list'),
        ('\n\n{"filename": "0.png"}', "line 3: has no 'file_name'; did you mean 'filename'?"),
        ('{"file_name": 5}', "line 1: 'file_name' should be the path of a picture, is 5"),
        ('{"file_name": "0\\u0000.png"}', r"line 1: file_name '0\x00.png' does not exist"),
        ("[" * 100_000, "line 1: is not JSON that can be read"),
        (b'{"file_name": "0.png"}\n\xff\xfe', "line 2: is not UTF-8; save the file as UTF-8"),
    ],
)
def test_bad_json_lines(tmp_path: Path, lines: str | bytes, message: str) -> None:
    picture(tmp_path / "0.png", 0)
    table = write(tmp_path / "metadata.jsonl", lines)
    assert refusal(tmp_path).startswith(f"{table} {message}")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("file,text\n0.png,a\n", "line 1: the header has no column 'file_name'; did you mean 'file'?"),
        ("file_name,text\n0.png,a,b\n", "line 2: has 3 fields, the header 2"),
        ('file_name,text\n0.png,"two\nlines"\nx.png,b\n', "line 4: file_name 'x.png' does not exist"),
        ("file_name,text\n0.png," + "a" * 200_000 + "\n", "line 2: is not CSV (field larger than field limit"),
    ],
)
def test_bad_csv_lines(tmp_path: Path, lines: str, message: str) -> None:
    picture(tmp_path / "0.png", 0)
    table = write(tmp_path / "metadata.csv", lines)
    assert refusal(tmp_path).startswith(f"{table} {message}")


def test_two_metadata_files_in_one_folder(tmp_path: Path) -> None:
    metadata_folder(tmp_path, [{}])
    write(tmp_path / "metadata.csv", "file_name\n0.png\n")
    assert "metadata.jsonl: stands beside metadata.csv; keep one of them" in refusal(tmp_path)


def test_an_unknown_split(tmp_path: Path) -> None:
    class_folder(tmp_path / "train")
    class_folder(tmp_path / "test")
    assert refusal(tmp_path, split="tets") == f"{tmp_path}: has no split 'tets'; did you mean 'test'?"


def test_several_splits_and_no_train(tmp_path: Path) -> None:
    class_folder(tmp_path / "val")
    class_folder(tmp_path / "test")
    assert "has splits test, validation and no 'train'; choose one with data.split" in refusal(tmp_path)


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", "PAR1 not really")
    assert refusal(path).startswith(f"{path}: is not a Parquet file that can be read")
    other = parquet(tmp_path / "d" / "train-0.parquet", {"image": [encode(pixels(0))]})
    second = parquet(tmp_path / "d" / "train-1.parquet", {"picture": [encode(pixels(0))]})
    assert refusal(tmp_path / "d") == f"{second}: its columns differ from those of {other.name}"


def test_damage_within_parquet_is_named(tmp_path: Path) -> None:
    images = [encode(pixels(seed, (64, 64))) for seed in range(4)]
    path = parquet(tmp_path / "x.parquet", {"image": images}, row_group_size=2)
    data = bytearray(path.read_bytes())
    data[4:4000] = b"\xff" * 3996
    path.write_bytes(bytes(data))
    text = refusal(path)
    assert text.startswith(f"{path} row 0: column 'image' cannot be read (")


def test_no_rows(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0)
    write(tmp_path / "metadata.jsonl", "\n")
    assert refusal(tmp_path) == f"{tmp_path}: split 'train' has no rows"


def test_a_truncated_tar(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", {f"{k}.png": encode(pixels(k, (32, 32))) for k in range(3)})
    whole = path.read_bytes()
    path.write_bytes(whole[:6000])
    assert refusal(path) == f"{path} member 1.png: is cut off: the tar file is truncated"
    write(path, "not a tar")
    assert refusal(path).startswith(f"{path}: is not a tar file that can be read to its end")


def test_a_bad_caption_member(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", {"0.png": encode(pixels(0)), "0.json": "[1]"})
    assert refusal(path) == f"{path} member 0: its .json should be an object"


def test_a_picture_that_is_a_bomb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = picture(tmp_path / "a.png", 0, (12, 12))
    assert refusal(tmp_path) == f"{path}: has 12x12 pixels; more than 100 are refused"
    assert not recwarn.list


def test_names_with_odd_characters_stay_in_one_line(tmp_path: Path) -> None:
    write(tmp_path / "a\nb\x1b[31m.png", "no picture")
    assert refusal(tmp_path).startswith(rf"{tmp_path}/a\nb\x1b[31m.png: is not a picture")


def test_the_hub_is_asked_with_a_time_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    limits: list[float] = []

    def slow(self: object, name: str, timeout: float) -> None:
        limits.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", slow)
    assert "timed out" in refusal("hub:someone/nope")
    assert limits == [10]


def test_a_link_to_nothing(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0)
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    assert refusal(tmp_path) == f"{tmp_path / 'b.png'}: cannot be read (No such file or directory)"
