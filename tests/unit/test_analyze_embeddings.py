"""The two numbers of figure 2 on sets whose separation is known, and the map."""

import numpy as np
import pytest

from megatron_ext.analysis.embedding_report import (
    embedding_panels,
    embedding_table,
    measure_embeddings,
)
from megatron_ext.analysis.embeddings import separation
from megatron_ext.analysis.figures import render

H = 24


def cloud(seed, *, count=150, shift=0.0):
    rng = np.random.default_rng(seed)
    # Dimensions of very different size, as a model's are.
    return ((rng.normal(size=(count, H)) + shift) * np.logspace(-1, 2, H)).astype(np.float32)


def test_sets_apart():
    found = separation(cloud(1), cloud(2, shift=2.0), seed=1)
    assert found.accuracy == 1.0
    assert found.overlap < 0.01


def test_sets_of_one_distribution():
    """Also with sizes of 1 to 4, where guessing the larger set is right in 80%."""
    for sizes in ((150, 150), (60, 240)):
        found = separation(cloud(1, count=sizes[0]), cloud(2, count=sizes[1]), seed=1)
        # Of 150 samples a set, the deviation of the accuracy is 4%.
        assert found.accuracy == pytest.approx(0.5, abs=0.12)
        assert found.overlap == pytest.approx(1.0, abs=0.12)


def test_the_same_set_twice_is_chance():
    """Without folds that keep twins together, each twin has its opposite answer in the training part."""
    found = separation(cloud(1), cloud(1), seed=1)
    assert found.accuracy == pytest.approx(0.5, abs=0.02)
    assert found.overlap > 1


def test_half_a_shift_is_in_between():
    small, large = (separation(cloud(1), cloud(2, shift=s), seed=1) for s in (0.2, 0.6))
    assert 0.6 < small.accuracy < large.accuracy <= 1.0
    assert 1.0 > small.overlap > large.overlap > 0.0


def test_overlap_is_naive():
    first, second = cloud(1, count=40), cloud(2, count=25, shift=0.4)
    points = np.concatenate((first, second)).astype(float)
    points = (points - points.mean(0)) / points.std(0)
    labels = np.array([0] * 40 + [1] * 25)
    ratios = {0: [], 1: []}
    for i, point in enumerate(points):
        order = [j for j in np.argsort(((points - point) ** 2).sum(1)) if j != i]
        share = np.mean(labels[order[:10]] != labels[i])
        ratios[labels[i]].append(share / ((labels != labels[i]).sum() / 64))
    expected = np.mean([np.mean(part) for part in ratios.values()])
    assert separation(first, second, seed=1).overlap == pytest.approx(expected)


def test_report_of_three_sets():
    sets = {"a": cloud(1, count=40), "b": cloud(2, count=40, shift=3.0), "c": cloud(3, count=30)}
    report = {"model": {"label": "base"}} | measure_embeddings(sets, seed=1)
    assert [pair["sets"] for pair in report["pairs"]] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert {name: len(points) for name, points in report["map"].items()} == {
        name: len(points) for name, points in sets.items()
    }
    # On the map, a point's nearest one is of its own side: b, or a and c.
    points = np.concatenate([report["map"][name] for name in sets])
    side = np.array([0] * 40 + [1] * 40 + [0] * 30)
    distance = ((points[:, None] - points[None]) ** 2).sum(-1) + 1e9 * np.eye(len(points))
    assert (side[distance.argmin(1)] == side).mean() > 0.98
    assert report["map"] == measure_embeddings(sets, seed=1)["map"]
    assert "a | b" in embedding_table(report)
    assert render(embedding_panels(report)).startswith(b"\x89PNG")
