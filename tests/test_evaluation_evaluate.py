"""The whole evaluation: what it says of good and bad samples, what it warns of, and what it remembers."""

from __future__ import annotations

import csv
import io
import json
import tracemalloc

import numpy as np
import pytest
import torch

from evaluation_doubles import NAMES, Tiny, measure_half, pictures
from limner.errors import LimnerError
from limner.evaluation import collect as collecting
from limner.evaluation import features, page, plots, reference
from limner.evaluation.evaluate import evaluate, quick
from limner.evaluation.real import ArrayPictures
from limner.evaluation.report import Figure, Report, sweep_csv, sweep_table

X, Y = pictures(240)
REAL_X, REAL_Y = pictures(300, seed=1)
REAL = ArrayPictures(REAL_X, REAL_Y)


def measured(samples=X, labels=Y, real=REAL, **options):
    return evaluate(iter([(samples, {} if labels is None else {"label": labels})]), real, features=Tiny(), **options)


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference.cache, "entry", _uncached)
        return measured(settings={"sampler": "ddim", "steps": 20, "guidance": 1.5, "seed": 7})


def _uncached(kind, key, build):
    import tempfile
    from pathlib import Path

    directory = Path(tempfile.mkdtemp())
    build(directory)
    return directory


# --- figures ----------------------------------------------------------------------------------------------------


def test_every_figure_is_there_and_named_by_its_network(report):
    assert set(report.figures) == {
        *(f"{name}-tiny" for name in "FD FD-infinity sFD KID IS precision recall density coverage".split()),
        *("nearest_training-tiny", "close_to_training-tiny", "class_accuracy", "colour_shift"),
    }
    for figure in report.figures.values():
        assert figure.n == 240
        assert figure.low is None or figure.low <= figure.value <= figure.high
    assert report["class_accuracy"].title.startswith("class_accuracy (probe 1.00 on real")


def test_real_pictures_score_well_and_noise_badly(report):
    noise = np.random.default_rng(0).integers(0, 256, X.shape, dtype=np.uint8)
    bad = measured(noise)
    for name, better in (("FD", -1), ("sFD", -1), ("KID", -1), ("IS", 1), ("recall", 1), ("coverage", 1)):
        assert better * report[name].value > better * bad[name].value
    assert report["class_accuracy"].value > 0.98
    assert bad["class_accuracy"].value < 0.5
    assert report["precision"].value > 0.8
    assert report["colour_shift"].value < 5 < bad["colour_shift"].value


def test_noise_raises_the_distance_step_by_step():
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 1, (240, 2, 2, 3)).repeat(4, 1).repeat(4, 2)
    levels = [(X + level * noise).clip(0, 255).astype(np.uint8) for level in (0, 10, 30, 80)]
    values = [measured(x)["FD"].value for x in levels]
    assert values == sorted(values)
    assert values[-1] > 2 * values[0]


def test_a_set_against_itself():
    real = ArrayPictures(X, Y)
    report = measured(real.uint8(real.train), None, real)
    assert report["FD"].value == pytest.approx(0, abs=1e-6)
    assert report["sFD"].value == pytest.approx(0, abs=1e-6)
    assert report["precision"].value == report["recall"].value == report["coverage"].value == 1
    assert report["colour_shift"].value == 0


def test_copies_of_training_pictures_are_seen(report):
    rows = REAL.train[:240]
    copied = measured(REAL.uint8(rows), REAL_Y[rows])
    assert copied["close_to_training"].value == 1
    assert copied["nearest_training"].value == pytest.approx(0, abs=1e-3)
    assert report["close_to_training"].value < 0.1
    assert copied.sheet is not None
    np.testing.assert_array_equal(copied.sheet.pictures, copied.sheet.nearest)


def test_wrong_classes_are_seen_by_class():
    asked = Y.copy()
    asked[Y == 0] = 1
    found = measured(X, asked)["class_accuracy"]
    assert found.value == pytest.approx(2 / 3, abs=0.02)
    assert found.details["by_class"]["1"] == pytest.approx(0.5, abs=0.02)
    assert found.details["probe_accuracy_on_real"] > 0.98


def test_a_classifier_of_ones_own_judges_beside_the_probe():
    judge = features.network("trained:runs/c", classifier=lambda x: x.mean(dim=(2, 3)))
    found = measured(judge=judge)["class_accuracy-trained:runs/c"]
    assert found.value > 0.98
    assert found.title == "class_accuracy (trained:runs/c 1.00 on real)"
    blind = features.network("trained:blind", classifier=lambda x: torch.eye(3)[torch.zeros(len(x), dtype=torch.long)])
    found = measured(judge=blind)["class_accuracy-trained:blind"]
    assert found.value == pytest.approx(1 / 3)
    assert "trained:blind 0." in found.title


def test_the_names_of_inception_are_its_own(monkeypatch):
    network = Tiny()
    network.name = "inception"
    named = evaluate(X, REAL, features=network).figures
    assert {"FID", "sFID", "IS"} <= set(named)
    assert not [name for name in named if "FID" in name and name not in ("FID", "sFID")]


def test_efficientnet_on_a_few_pictures():
    x, y = pictures(32, size=32)
    real_x, real_y = pictures(32, seed=1, size=32)
    real = ArrayPictures(real_x, real_y)
    report = evaluate(iter([(x, {"label": y})]), real)
    assert report["class_accuracy"].value > 0.7
    assert "efficientnet-lite0, 32x32 resized to 128x128 bicubic antialiased" in report.about["features"]
    assert "32 samples are fewer than the 1,280 dimensions of efficientnet-lite0" in report.warnings[0]
    assert "compare KID instead" in report.warnings[0]
    figures = quick(x, y, real)
    assert figures["FD-efficientnet-lite0"] == pytest.approx(report["FD"].value)
    assert figures["class_accuracy"] == report["class_accuracy"].value
    assert figures["class_precision"] > 0.5
    assert quick(x, 1 - y, real)["class_precision"] < figures["class_precision"] - 0.2, "asked for the other class"
    few = quick(x, y, ArrayPictures(real_x[:12], real_y[:12]))
    assert "class_accuracy" in few
    assert "class_precision" not in few
    noise = np.random.default_rng(0).integers(0, 256, x.shape, dtype=np.uint8)
    assert quick(noise, None, real)["FD-efficientnet-lite0"] > 1.3 * figures["FD-efficientnet-lite0"]


# --- what may be left out, and what is refused ------------------------------------------------------------------


def test_without_labels_or_with_few_pictures():
    assert "class_accuracy" not in measured(labels=None).figures
    unlabelled = evaluate(iter([(X, {"label": Y + 40})]), ArrayPictures(REAL_X), features=Tiny())
    assert "class_accuracy" not in unlabelled.figures
    few = measured(X[:5], Y[:5])
    assert "fewer than 10 pictures on a side" in " ".join(few.warnings)
    assert not [name for name in few.figures if name.startswith(("KID", "precision"))]
    assert few["FD"].n == 5


@pytest.mark.parametrize(
    ("samples", "real", "message"),
    [
        (X[:1], REAL, "samples: 1 picture is too few"),
        (X, ArrayPictures(REAL_X[:2]), "reference: 1 picture is too few"),
        (X.repeat(2, 1), REAL, "its pictures are 8x8, the samples 8x16"),
        (iter([(X, {"label": Y + 1})]), REAL, "label 3, the reference has 3 classes"),
        (iter([(X[:40], {}), (X[:40].repeat(2, 1), {})]), REAL, "picture 40 is 16x8 with 3 channels"),
        (iter([(X[:40], {"label": Y[:40]}), (X[:40], {})]), REAL, "has no label, though those before it have"),
    ],
)
def test_what_cannot_be_measured(samples, real, message):
    with pytest.raises(LimnerError, match=message) as error:
        evaluate(samples, real, features=Tiny())
    assert "\n" not in str(error.value)


def test_num_and_keep_bound_the_work():
    report = measured(num=100, keep=50)
    assert report["FD"].n == 100
    assert report["KID"].n == 50
    assert "a random 50 of the 100 samples" in " ".join(report.warnings)
    drawn = []

    def draw():
        for k in range(100):
            drawn.append(k)
            yield X[:10], {"label": Y[:10]}

    evaluate(draw(), REAL, features=Tiny(), num=35)
    assert len(drawn) == 4


def test_progress_is_told():
    told = []
    measured(progress=lambda stage, done: told.append((stage, done)))
    assert [stage for stage, _ in told if stage] == sorted(
        [s for s, _ in told], key=["reference", "samples", "figures"].index
    )
    assert ("samples", 240) in told


# --- collecting -------------------------------------------------------------------------------------------------


def test_batches_make_no_difference():
    whole = collecting.collect([(X, {"label": Y})], Tiny(), keep=30)
    parts = collecting.collect([(X[k : k + 7], {"label": Y[k : k + 7]}) for k in range(0, 240, 7)], Tiny(), keep=30)
    torch.testing.assert_close(whole.pooled.gaussian().covariance, parts.pooled.gaussian().covariance)
    assert len(whole.kept.columns()["label"]) == len(parts.kept.columns()["label"]) == 30


def test_what_is_kept_is_random_and_its_pictures_are_among_it():
    reservoir = collecting.Reservoir(100, seed=1)
    for start in range(0, 3000, 50):
        reservoir.update({"k": np.arange(start, start + 50)})
    kept = reservoir.columns()["k"]
    assert len(kept) == len(set(kept)) == 100
    assert (np.diff(kept) > 0).all()
    assert abs(kept.mean() - 1500) < 300
    found = collecting.collect([(X, {"label": Y})], Tiny(), keep=100)
    rows, shown = found.kept.columns()["row"], found.sheet.columns()
    assert set(shown["row"]) <= set(rows)
    np.testing.assert_array_equal(shown["picture"], X[shown["row"]])


def test_two_halves_merged_are_the_whole():
    whole = collecting.collect([(X, {"label": Y})], Tiny())
    halves = [collecting.collect([(X[s], {"label": Y[s]})], Tiny()) for s in (slice(0, 100), slice(100, 240))]
    halves[0].merge(halves[1])
    torch.testing.assert_close(halves[0].pooled.gaussian().covariance, whole.pooled.gaussian().covariance)
    np.testing.assert_array_equal(halves[0].kept.columns()["label"], Y)
    np.testing.assert_array_equal(halves[0].kept.columns()["pooled"], whole.kept.columns()["pooled"])
    np.testing.assert_allclose(halves[0].scores.scores(), whole.scores.scores())
    assert halves[0].colours.mean == pytest.approx(whole.colours.mean)
    empty = collecting.Collected()
    empty.merge(whole)
    assert empty.n == 240
    assert empty.size == (8, 8)


def test_memory_does_not_grow_with_the_number_of_pictures():
    def peak(batches):
        tracemalloc.start()
        collecting.collect(((X, {"label": Y}) for _ in range(batches)), Tiny(), keep=100)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(2)
    assert peak(40) < 1.3 * peak(8)


def test_two_processes_measure_what_one_does(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(measure_half, (port, 240, str(tmp_path)), nprocs=2)
    whole = collecting.collect([(X, {"label": Y})], Tiny()).pooled.gaussian().covariance
    for rank in (0, 1):
        np.testing.assert_allclose(np.load(tmp_path / f"{rank}.npy"), whole, rtol=1e-10)


# --- the reference's statistics ---------------------------------------------------------------------------------


class Counting(Tiny):
    calls = 0

    def features(self, x):
        Counting.calls += 1
        return super().features(x)


def test_statistics_are_worked_out_once_per_data_and_recipe():
    network = Counting()
    first = reference.of_dataset(REAL, network)
    calls = Counting.calls
    again = reference.of_dataset(REAL, network)
    assert Counting.calls == calls
    assert torch.equal(first.pooled.covariance, again.pooled.covariance)
    np.testing.assert_array_equal(again.labels, REAL_Y[REAL.train])
    other = ArrayPictures(REAL_X[::-1].copy(), REAL_Y)
    for data, num in ((other, None), (REAL, 100)):
        reference.of_dataset(data, network, num=num)
        assert Counting.calls > calls
        calls = Counting.calls
    network.recipe = lambda size: "another resizing"  # type: ignore[method-assign]
    reference.of_dataset(REAL, network)
    assert Counting.calls > calls


def test_kept_statistics_stand_for_the_reference(tmp_path, report):
    reference.save(reference.of_dataset(REAL, Tiny()), tmp_path)
    for path in (tmp_path, tmp_path / "reference.safetensors"):
        found = evaluate(iter([(X, {"label": Y})]), path, features=Tiny())
        assert found["FD"].value == pytest.approx(report["FD"].value)
        assert found["class_accuracy"].value == report["class_accuracy"].value
        assert found.sheet is not None
        assert found.sheet.nearest is None
    with pytest.raises(LimnerError, match="made with tiny, 8x8 as it is"):
        evaluate(X, tmp_path, features=features.network("trained:x", classifier=lambda x: x.mean(dim=(2, 3))))
    (tmp_path / "reference.safetensors").write_bytes(b"nothing")
    with pytest.raises(LimnerError, match="not reference statistics that Limner wrote"):
        evaluate(X, tmp_path, features=Tiny())


def test_published_moments_give_a_distance_alone(tmp_path):
    network = Tiny()
    moments = reference.of_dataset(REAL, network).pooled
    np.savez(tmp_path / "stats.npz", mu=moments.mean.numpy(), sigma=moments.covariance.numpy())
    with pytest.raises(LimnerError, match="go with --features inception"):
        evaluate(X, tmp_path / "stats.npz", features=network)
    network.name = "inception"
    found = evaluate(X, tmp_path / "stats.npz", features=network)
    assert found["FID"].value == pytest.approx(measured()["FD"].value)
    assert set(found.figures) == {"FID", "FD-infinity-inception", "IS"}


# --- the report -------------------------------------------------------------------------------------------------


def test_everything_that_a_figure_depends_on_is_in_json_and_csv(report, tmp_path):
    report.to_json(tmp_path / "deep" / "report.json")
    read = json.loads((tmp_path / "deep" / "report.json").read_text())
    assert read["settings"] == {"sampler": "ddim", "steps": 20, "guidance": 1.5, "seed": 7}
    assert read["samples"]["n"] == 240
    assert read["reference"]["digest"] == REAL.digest
    assert read["features"] == "tiny, 8x8 as it is, " + Tiny().precision
    assert read["figures"]["FD-tiny"]["value"] == pytest.approx(report["FD"].value)
    rows = list(csv.DictReader(io.StringIO(report.to_csv(tmp_path / "report.csv"))))
    assert {row["name"] for row in rows} == set(report.figures)
    assert rows[0]["settings_guidance"] == "1.5"
    assert rows[0]["reference_digest"] == REAL.digest


def test_numbers_that_are_none_are_null():
    text = Report({"a": Figure("a", float("nan"), 1.0, float("inf"))}, {"features": "x"}).to_json()
    assert json.loads(text)["figures"]["a"]["value"] is None
    assert json.loads(text)["figures"]["a"]["high"] is None


def test_lines_and_lookup(report):
    text = "\n".join(report.lines())
    assert "settings: sampler ddim, steps 20, guidance 1.5, seed 7" in text
    assert "class_accuracy (probe 1.00 on real) ↑" in text
    with pytest.raises(LimnerError, match="there is no figure 'FID'; there are FD-tiny"):
        report["FID"]


def test_a_page_holds_everything(report, tmp_path):
    text = page.write(report, tmp_path / "new" / "report.html").read_text()
    assert text.count("<img ") == 2 * 24
    assert "http" not in text.replace("http-equiv", "")
    assert REAL.digest in text
    assert "nearest real picture" in text
    odd = Report(report.figures, {**report.about, "samples": {"source": "<script>", "n": 1}})
    assert "<script>" not in page.html(odd)
    with pytest.raises(LimnerError, match="cannot be written"):
        page.write(report, tmp_path / "new" / "report.html" / "below.html")


def test_a_sweep_is_a_table_and_a_plot(report, tmp_path):
    other = measured(X // 2)
    sweep = {3.0: other, 1.0: report}
    header, rows = sweep_table(sweep)
    assert header[0] == "scale"
    assert "FD-tiny ↓" in header
    assert [row[0] for row in rows] == ["3", "1"]
    png, svg = plots.trade_off(sweep, tmp_path / "plots" / "sweep.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()
    assert svg.read_bytes() == plots.rendered(sweep, "svg")
    text = page.html(sweep)
    assert text.index("<h2>guidance 1</h2>") < text.index("<h2>guidance 3</h2>")
    assert len(list(csv.DictReader(io.StringIO(sweep_csv(sweep))))) == len(report.figures) + len(other.figures)
    assert NAMES
