"""Precision, recall, density, coverage, retrieval and the probe against their definitions, pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from limner.errors import LimnerError
from limner.evaluation import neighbours, probe


def points(n, dim, seed=0, mean=0.0):
    return np.random.default_rng(seed).normal(mean, 1, (n, dim)).astype(np.float32)


def by_definition(real, samples, k, k_density):
    """Kynkäänniemi et al. 2019, eq. 1 and 2, and Naeem et al. 2020, eq. 3 and 4, one pair at a time."""

    def radius(x, k):
        return [sorted(np.linalg.norm(x - p, axis=1))[k] for p in x]

    def inside(p, x, radii):
        return [np.linalg.norm(p - centre) <= r for centre, r in zip(x, radii, strict=True)]

    precise = [any(inside(p, real, radius(real, k))) for p in samples]
    recalled = [any(inside(p, samples, radius(samples, k))) for p in real]
    wide = radius(real, k_density)
    balls = np.array([inside(p, real, wide) for p in samples])
    return precise, recalled, balls.sum(1) / k_density, balls.any(0)


@pytest.mark.parametrize(("k", "k_density"), [(3, 5), (2, 2), (5, 1)])
def test_neighbourhoods_by_definition(monkeypatch, k, k_density):
    monkeypatch.setattr(neighbours, "BLOCK", 16)
    real, samples = np.concatenate([points(36, 3), points(4, 3, 9, mean=7)]), points(30, 3, 1, mean=0.8)
    found = neighbours.neighbourhoods(real, samples, k=k, k_density=k_density)
    precise, recalled, density, covered = by_definition(real.astype(float), samples.astype(float), k, k_density)
    np.testing.assert_array_equal(found.precise, precise)
    np.testing.assert_array_equal(found.recalled, recalled)
    np.testing.assert_allclose(found.density, density)
    np.testing.assert_array_equal(found.covered, covered)
    assert 0 < found.precise.mean() < 1
    assert 0 < found.recalled.mean() < 1


def test_a_mode_that_is_lost_lowers_recall_and_not_precision():
    real = np.concatenate([points(60, 4), points(60, 4, 1, mean=20)])
    found = neighbours.neighbourhoods(real, points(60, 4, 2))
    assert found.precise.mean() > 0.8
    assert found.recalled.mean() < 0.55
    assert found.covered.mean() < 0.55


def test_far_pictures_lower_precision_and_not_recall():
    samples = np.concatenate([points(60, 4, 2), points(60, 4, 3, mean=30)])
    found = neighbours.neighbourhoods(points(80, 4), samples)
    assert found.recalled.mean() > 0.8
    assert found.precise.mean() < 0.55


def test_a_picture_of_the_wrong_class_is_not_precise():
    """Two classes far apart: samples of the one, asked for as either."""
    real, labels = np.concatenate([points(40, 3), points(40, 3, 1, mean=20)]), np.repeat([0, 1], 40)
    samples, asked = points(20, 3, 2, mean=0.2), np.arange(20) % 2
    precise, recalled = neighbours.within_classes(real, labels, samples, asked)
    assert neighbours.neighbourhoods(real, samples).precise.mean() > 0.8
    assert precise[asked == 0].mean() > 0.8
    assert not precise[asked == 1].any()
    alone = neighbours.neighbourhoods(real[:40], samples[asked == 0], k=3, k_density=3)
    np.testing.assert_array_equal(precise[asked == 0], alone.precise)
    np.testing.assert_array_equal(recalled[:40], alone.recalled)
    few = neighbours.within_classes(real, labels, samples[:3], asked[:3])
    assert not few[0].any()
    assert not few[1].any()


def test_large_offsets_do_not_blur_small_distances():
    """In float32, x x - 2 x y + y y of far-off points would lose every digit of their distance."""
    base = points(50, 8) + 3000
    distance, row = neighbours.nearest(base[:9] + 0.01, base)
    np.testing.assert_array_equal(row, np.arange(9))
    np.testing.assert_allclose(distance, 0.01 * np.sqrt(8), rtol=0.05)


def test_nearest_neighbours_by_definition(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 8)
    queries, base = points(20, 5), points(30, 5, 1)
    pairs = np.linalg.norm(queries[:, None] - base[None], axis=2)
    distance, row = neighbours.nearest(queries, base)
    np.testing.assert_array_equal(row, pairs.argmin(1))
    np.testing.assert_allclose(distance, pairs.min(1), rtol=1e-4)
    among = np.linalg.norm(base[:, None] - base[None], axis=2) + 1e9 * np.eye(30)
    np.testing.assert_allclose(neighbours.nearest_of_rows(base, 20), among.min(1)[:20], rtol=1e-4)


def test_perfect_pictures_are_retrieved_first():
    gallery = points(50, 6) + 5
    own = np.array([7, 3, 49, 7])
    np.testing.assert_array_equal(neighbours.retrieval_ranks(gallery[own], gallery, own), 1)


def test_retrieval_ranks_by_definition_and_chance():
    gallery, queries = points(40, 6) + 5, points(60, 6, 1) + 5
    own = np.arange(60) % 40
    ranks = neighbours.retrieval_ranks(queries, gallery, own)
    g, q = gallery - gallery.mean(0), queries - gallery.mean(0)
    cosine = (q @ g.T) / np.linalg.norm(g, axis=1) / np.linalg.norm(q, axis=1)[:, None]
    expected = [1 + (cosine[k] > cosine[k, own[k]]).sum() for k in range(60)]
    np.testing.assert_array_equal(ranks, expected)
    assert 14 < ranks.mean() < 27


def test_one_picture_for_every_caption_earns_nothing():
    """Ties count against: a constant gallery ranks last."""
    gallery = np.concatenate([np.ones((5, 3)), -np.ones((5, 3))])
    assert (neighbours.retrieval_ranks(gallery[:5], gallery, np.arange(5)) == 5).all()


def test_the_probe_learns_classes_and_says_how_well():
    labels = np.arange(300) % 3
    real = points(300, 10) + 4 * np.eye(3, 10)[labels]
    judge = probe.fit(torch.from_numpy(real), labels, 3)
    assert judge.accuracy > 0.95
    assert judge.tested == 60
    fresh = points(90, 10, 5) + 4 * np.eye(3, 10)[labels[:90]]
    assert (judge.classify(fresh) == labels[:90]).mean() > 0.95


def test_the_probe_is_no_better_than_chance_on_noise():
    labels = np.random.default_rng(3).integers(0, 4, 400)
    assert probe.fit(points(400, 30), labels, 4).accuracy < 0.45


def test_a_class_without_pictures_is_allowed_and_too_few_pictures_are_not():
    labels = np.arange(60) % 2
    assert probe.fit(points(60, 4) + 3 * labels[:, None], labels, 5).accuracy > 0.8
    for few in (labels[:6], np.zeros(60, dtype=np.int64)):
        with pytest.raises(LimnerError, match="too few for a probe"):
            probe.fit(points(len(few), 4), few, 2)
