"""Samples from every form they come in, and one line for each thing that can be wrong with them."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation_doubles import NAMES, pictures
from limner.errors import LimnerError
from limner.evaluation import arrays
from limner.evaluation.real import ArrayPictures, open_real
from limner.evaluation.samples import in_classes, open_samples
from limner.outputs import Picture, writer

X, Y = pictures(9)
RECIPE = {"sampler": "ddim", "steps": 10, "guidance": 2.5, "seed": 3}


def read(source):
    """Everything of some samples: pictures, conditions, settings."""
    found = open_samples(source)
    batches = list(found.batches)
    names = batches[0][1].keys()
    conditions = {name: [v for _, c in batches for v in np.asarray(c[name]).tolist()] for name in names}
    return np.concatenate([x for x, _ in batches]), conditions, found


def written(path, labels=True, texts=True):
    """What `limner sample --out` writes."""
    facts = [{} for _ in X]
    for fact, label in zip(facts, Y.tolist(), strict=True):
        fact.update({"label": label, "label_name": NAMES[label]} if labels else {})
        fact.update({"text": f"a {NAMES[label]} square"} if texts else {})
    with writer(path, num=len(X), recipe=RECIPE) as out:
        out.add([Picture(k, X[k], facts[k]) for k in range(len(X))])
    return path


@pytest.mark.parametrize("name", ["out", "out.tar"])
def test_what_limner_writes_is_read_with_its_settings(tmp_path, name):
    x, conditions, found = read(written(tmp_path / name))
    np.testing.assert_array_equal(x, X)
    assert conditions["label"] == Y.tolist()
    assert conditions["label_name"] == [NAMES[k] for k in Y]
    assert conditions["text"][2] == "a blue square"
    assert RECIPE.items() <= found.settings.items()
    assert not {"index", "label", "text", "file_name"} & found.settings.keys()
    assert found.size == (8, 8)


def test_npz_as_limner_writes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "READ", 4)
    x, conditions, _ = read(written(tmp_path / "out.npz"))
    np.testing.assert_array_equal(x, X)
    assert conditions["label"] == Y.tolist()
    assert conditions["text"][1] == "a green square"
    assert [len(batch) for batch, _ in open_samples(tmp_path / "out.npz").batches] == [4, 4, 1]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_as_guided_diffusion_writes_it(tmp_path, save):
    save(tmp_path / "samples.npz", X, Y)
    x, conditions, _ = read(tmp_path / "samples.npz")
    np.testing.assert_array_equal(x, X)
    assert conditions["label"] == Y.tolist()


def test_a_folder_by_class(tmp_path):
    for k, label in enumerate(Y):
        (tmp_path / NAMES[label]).mkdir(exist_ok=True)
        Image.fromarray(X[k]).save(tmp_path / NAMES[label] / f"{k}.png")
    x, conditions, _ = read(tmp_path)
    assert len(x) == 9
    assert sorted(conditions["label_name"]) == sorted(NAMES[k] for k in Y)


def test_arrays_tensors_data_sets_and_streams():
    x = read(X)[0]
    np.testing.assert_array_equal(x, X)
    floats = torch.from_numpy(X).permute(0, 3, 1, 2).float() / 127.5 - 1
    np.testing.assert_array_equal(read(floats)[0], X)
    np.testing.assert_array_equal(read(floats.bfloat16())[0].shape, X.shape)
    np.testing.assert_array_equal(read(ArrayPictures(X, Y))[0], X)
    x, conditions, _ = read((X[k : k + 2], {"label": torch.from_numpy(Y[k : k + 2])}) for k in range(0, 8, 2))
    np.testing.assert_array_equal(x, X[:8])
    assert conditions["label"] == Y[:8].tolist()


def test_a_stream_is_not_read_ahead():
    drawn = []

    def draw():
        for k in range(100):
            drawn.append(k)
            yield X, {}

    open_samples(draw())
    assert drawn == [0]


# --- what can be wrong ------------------------------------------------------------------------------------------


def fails(source, message):
    with pytest.raises(LimnerError, match=message) as error:
        read(source)
    assert "\n" not in str(error.value)


def test_nothing_there(tmp_path):
    fails(tmp_path / "missing", "no such file")
    fails(tmp_path / "missing.npz", "no such file")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "holds no pictures")
    fails(X[:0], "holds no pictures")
    fails(iter([]), "holds no pictures")
    fails(7, "int, should be a path")


def test_pictures_of_several_sizes(tmp_path):
    for name, size in (("a", 8), ("b", 9)):
        Image.new("RGB", (size, 8)).save(tmp_path / f"{name}.png")
    fails(tmp_path, r"b\.png: is 9x8, those before it are 8x8; samples should be of one size")


def test_a_damaged_picture_is_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    fails(tmp_path, r"b\.png: is")


def test_labels_for_some(tmp_path):
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    lines = [{"file_name": "a.png", "label": "1"}, {"file_name": "b.png"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)).replace("label", "text"))
    fails(tmp_path, "line 2: has no text, though others have")
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    fails(tmp_path, "line 2: has no label in column 'label'")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_named_by_picture(value):
    floats = np.zeros((5, 3, 8, 8), np.float32)
    floats[3, 1, 2, 2] = value
    fails(floats, "picture 3 holds NaN or infinity")
    fails(iter([(floats[:2], {}), (floats[2:], {})]), "picture 3 holds NaN")


def test_other_arrays():
    fails(np.full((2, 3, 8, 8), 200.0), "from 200 to 200, should be within -1 to 1")
    fails(np.zeros((2, 8, 8, 3), np.int64), "should be uint8")
    fails(np.zeros((8, 8, 3), np.uint8), r"uint8 \(8, 8, 3\), should be")
    fails(iter([X]), "should be pairs of pictures and conditions")


def test_an_npz_without_x(tmp_path):
    np.savez(tmp_path / "a.npz", images=X)
    fails(tmp_path / "a.npz", "has no array 'x' but images; x should be the pictures")


def test_an_npz_with_a_pickle(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object))
    fails(tmp_path / "a.npz", "pickled objects, which are never loaded")
    np.savez(tmp_path / "b.npz", x=X, y=np.array([None] * len(X), dtype=object))
    fails(tmp_path / "b.npz", "array 'y' holds pickled objects")


def test_npz_files_that_are_none(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK nothing of the kind")
    fails(tmp_path / "a.npz", "is no .npz archive")
    np.savez(tmp_path / "b.npz", x=X, y=Y[:4])
    fails(tmp_path / "b.npz", "4 values of label for 9 pictures")
    np.savez(tmp_path / "c.npz", x=np.full((3, 3, 8, 8), np.nan, np.float32))
    fails(tmp_path / "c.npz", "picture 0 holds NaN")
    np.savez(tmp_path / "d.npz", x=np.asfortranarray(X))
    fails(tmp_path / "d.npz", "Fortran order")


def test_an_npz_cut_short(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, X)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", buffer.getvalue()[:-50])
    fails(tmp_path / "a.npz", "is cut short or damaged")


# --- classes ----------------------------------------------------------------------------------------------------


def labels(conditions, names):
    (_, found), *_ = in_classes([(X, conditions)], names)
    return found.get("label")


def test_classes_go_by_name_where_names_are_known():
    called = [NAMES[k] for k in Y]
    np.testing.assert_array_equal(labels({"label": Y, "label_name": called}, NAMES), Y)
    np.testing.assert_array_equal(labels({"label": Y, "label_name": called}, NAMES[::-1]), 2 - Y)
    np.testing.assert_array_equal(labels({"label": Y, "label_name": called}, ("0", "1", "2")), Y)
    np.testing.assert_array_equal(labels({"label": Y}, NAMES), Y)
    assert labels({"label": Y}, None) is None
    assert labels({"text": ["a"] * 9}, NAMES) is None


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"label_name": ["gren"] * 9}, "class 'gren' is none of the reference's; did you mean 'green'"),
        ({"label": Y + 5}, "label 5, the reference has 3 classes"),
        ({"label": Y - 1}, "label -1, the reference has 3 classes"),
    ],
)
def test_classes_that_the_reference_has_not(conditions, message):
    with pytest.raises(LimnerError, match=message):
        labels(conditions, NAMES)


# --- the reference ----------------------------------------------------------------------------------------------


def test_references_from_files_and_arrays(tmp_path):
    by_path = open_real(str(written(tmp_path / "out")), (8, 8))
    assert len(by_path) == 9
    assert by_path.texts is not None
    np.testing.assert_array_equal(by_path.uint8([0, 5]), X[[0, 5]])
    assert open_real(str(tmp_path / "out"), (16, 4)).size == (16, 4)  # resized as the samples are
    by_npz = open_real(written(tmp_path / "out.npz"), (8, 8))
    assert by_npz.class_names == ("0", "1", "2")
    assert by_npz.texts is not None
    np.testing.assert_array_equal(by_npz.uint8([3]), X[3:4])
    other = X.copy()
    other[0, 0, 0, 0] ^= 1
    assert len({ArrayPictures(X).digest, ArrayPictures(other).digest, ArrayPictures(X, Y).digest}) == 3


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (X[:1], "1 picture is too few"),
        (np.zeros((3, 16, 16, 3), np.uint8), "its pictures are 16x16, the samples 8x8"),
    ],
)
def test_references_that_do_not_fit(reference, message):
    with pytest.raises(LimnerError, match=message):
        open_real(reference, (8, 8))
