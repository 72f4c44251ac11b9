"""Text-image retrieval: by arrays, inside an evaluation on held-out rows, and what recall alone would reach."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation_doubles import Tiny, pictures
from limner.errors import LimnerError
from limner.evaluation import retrieval
from limner.evaluation.evaluate import evaluate
from limner.evaluation.features import SIDE, EfficientNetLite0
from limner.evaluation.real import ArrayPictures

REAL, _ = pictures(300, seed=1)
TEXTS = [f"a picture of thing {k}" for k in range(300)]
DATA = ArrayPictures(REAL, None, TEXTS)
HELD_OUT = DATA.held_out


def measured(rows, asked, data=DATA, **options):
    return evaluate(iter([(REAL[rows], {"text": asked})]), data, features=Tiny(), **options)


# --- by arrays --------------------------------------------------------------------------------------------------


def test_real_pictures_find_themselves_and_others_do_not():
    asked = TEXTS[:40]
    perfect = retrieval.retrieve(REAL[:40], asked, REAL[:200], TEXTS[:200], network=Tiny())
    assert (perfect.ranks == 1).all()
    assert perfect.within(1) == (1, 1, 1)
    assert perfect.chance(5) == 5 / 200
    swapped = retrieval.retrieve(REAL[:40], asked[::-1], REAL[:200], TEXTS[:200], network=Tiny())
    assert swapped.within(1).high < 0.2
    assert swapped.within(1).value <= swapped.within(5).value


def test_the_protocol_is_efficientnet_at_224():
    own = EfficientNetLite0(side=SIDE)
    found = retrieval.retrieve(REAL[:3], TEXTS[:3], REAL[:6], TEXTS[:6])
    assert found.among == 6
    gallery, samples = (retrieval.pooled(x, own).double().numpy() for x in (REAL[:6], REAL[:3]))
    centred, asked = gallery - gallery.mean(0), samples - gallery.mean(0)
    norms = np.linalg.norm(asked, axis=1)[:, None] * np.linalg.norm(centred, axis=1)
    cosine = asked @ centred.T / norms
    np.testing.assert_array_equal(found.ranks, [1 + (row > row[k] + 1e-9).sum() for k, row in enumerate(cosine)])


def test_the_interval_is_over_captions():
    ranks = np.array([1, 1, 1, 1, 9, 9, 9, 9])
    by_caption = retrieval.Retrieved(ranks, np.array([0, 0, 0, 0, 1, 1, 1, 1]), 10).within(1)
    assert (by_caption.value, by_caption.low, by_caption.high) == (0.5, 0, 1)
    by_sample = retrieval.Retrieved(ranks, np.arange(8), 10).within(1)
    assert 0 < by_sample.low < 0.5 < by_sample.high < 1


@pytest.mark.parametrize(
    ("asked", "captions", "message"),
    [
        (["a", "b"], ["a", "b"], "2 captions for 1 samples"),
        (["a"], ["a"], "1 captions for 2 real pictures"),
        (["a"], ["a", "a"], "two real pictures are called 'a'"),
        (["cat"], ["cats", "dog"], "no real picture is called 'cat'; did you mean 'cats'"),
    ],
)
def test_wrong_input(asked, captions, message):
    with pytest.raises(LimnerError, match=message) as error:
        retrieval.retrieve(REAL[:1], asked, REAL[:2], captions, network=Tiny())
    assert "\n" not in str(error.value)


def test_the_nearest_caption_shares_most_words():
    known = ["man in manual wheelchair: light skin tone", "red heart", "man running: dark skin tone", "heart"]
    asked = ["man in manual wheelchair: dark skin tone", "Heart", "unrelated words"]
    assert retrieval.nearest_captions(asked, known) == [0, 3, 0]


# --- in an evaluation -------------------------------------------------------------------------------------------


def test_held_out_captions_alone_are_searched_for():
    found = measured(np.arange(300), TEXTS)
    assert found["retrieval"].value == found["retrieval_top5"].value == 1
    assert found["retrieval"].n == len(HELD_OUT)
    assert "first among 200 real ones; chance 0.005" in found["retrieval"].notes
    assert found.sheet is not None
    assert set(found.sheet.captions) <= set(TEXTS)
    others = measured(HELD_OUT[::-1], [TEXTS[row] for row in HELD_OUT])
    assert others["retrieval"].value < 0.4
    trained = measured(DATA.train[:60], [TEXTS[row] for row in DATA.train[:60]])
    assert not [name for name in trained.figures if name.startswith("retrieval")]
    assert "no two of the samples' captions are held-out" in " ".join(trained.warnings)


def test_of_another_reference_all_captions_that_were_not_learned_count():
    fresh = ArrayPictures(REAL[:100], None, TEXTS[:100])
    learned = ArrayPictures(REAL[90:], None, TEXTS[90:])
    found = measured(np.arange(100), TEXTS[:100], fresh, trained_on=learned)
    assert found["retrieval"].n == 90
    assert "among 100 real ones" in found["retrieval"].notes


def test_recall_is_told_beside():
    texts = [f"thing w{k // 2} x{k // 2} tone t{k % 2}" for k in range(300)]  # each has a twin of the same picture
    twins = REAL[np.arange(300) // 2]
    data = ArrayPictures(twins, None, texts)
    found = evaluate(iter([(twins, {"text": texts})]), data, features=Tiny())
    assert found["retrieval_by_recall_top5"].value > 0.8
    alone = measured(np.arange(300), TEXTS)
    assert alone["retrieval_by_recall"].value < 0.4
    assert alone["retrieval_by_recall"].better == ""


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(retrieval, "MOST", 7)
    batches = ((REAL[HELD_OUT], {"text": np.array([TEXTS[row] for row in HELD_OUT])}) for _ in range(30))
    assert evaluate(batches, DATA, features=Tiny())["retrieval"].n == 7
    few = (REAL[HELD_OUT], {"text": [TEXTS[row] for row in HELD_OUT]})
    assert evaluate(iter([few]), DATA, features=Tiny(), num=4)["retrieval"].n == 4
