"""Rules of the small model's price against slow literal versions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selection.method import rules


def some(seed: int, n: int = 60):
    rng = np.random.default_rng(seed)
    return rng, rng.integers(0, 5, n), rng.random(n), (rng.random(n) < 0.7 if seed % 2 else None)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 1))
def test_equal_parts_and_proportions_are_the_literal_ones(seed, share):
    _, cluster, keys, within = some(seed)
    rows = [r for r in range(60) if within is None or within[r]]
    m = max(1, int(share * len(rows)))
    members = {c: sorted((r for r in rows if cluster[r] == c), key=lambda r: keys[r]) for c in set(cluster[rows])}

    literal, rest = [], m
    by_size = sorted(members.values(), key=lambda part: (len(part), min(part)))
    for left, part in zip(range(len(by_size), 0, -1), by_size, strict=True):
        taken = part[: min(len(part), rest // left)]
        literal, rest = literal + taken, rest - len(taken)
    found = rules.in_equal_parts(cluster, keys)(m, within)
    assert found.rows.tolist() == sorted(literal) and len(literal) == m

    found = rules.in_proportion(cluster, keys)(m, within).rows.tolist()
    assert len(found) == m
    for part in members.values():
        count = sum(r in found for r in part)
        assert math.floor(m * len(part) / len(rows) + 1e-9) <= count <= math.ceil(m * len(part) / len(rows) - 1e-9)
        assert sorted(r for r in found if r in part) == sorted(part[:count])


def test_scores_are_the_formulas_of_their_papers():
    without, untuned, tuned = (
        np.array([2.0, 2.0, 2.0, 1.0]),
        np.array([1.0, 1.9, 2.5, 1.2]),
        np.array([0.5, 1.8, 1.0, 1.0]),
    )
    # IFD: 0.37, 0.90, 1.65, 1.22: the highest below 1, then those above, the nearest to 1 first.
    assert np.argsort(-rules.ifd(untuned, without)).tolist() == [1, 0, 3, 2]
    assert rules.davir(untuned, tuned) == pytest.approx([0.5, 0.1 / 1.9, 0.6, 0.2 / 1.2])
    assert rules.by_score(rules.middle(np.array([5.0, 1.0, 3.0, 9.0, 2.0])))(1, None).rows.tolist() == [2]
    assert rules.by_score(rules.middle(np.array([5.0, 1.0, 3.0, 9.0, 2.0])))(3, None).rows.tolist() == [0, 2, 4]


def test_s2l_and_coverage_take_from_every_cluster():
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0, 0], [10, 0, 0], [0, 10, 0]])
    cluster = np.repeat([0, 1, 2], [60, 30, 10])
    features = centres[cluster] + rng.normal(scale=0.1, size=(100, 3))
    for rule, counts in (
        (rules.s2l(features, 3, 1), [10, 10, 10]),
        (rules.coverage(features, 3, 1), [18, 9, 3]),
        (rules.learning_percentage(np.full(100, 2.0), np.linspace(1, 3, 100), features, 3, 1), [18, 9, 3]),
    ):
        assert np.bincount(cluster[rule(30, None).rows]).tolist() == counts
    assert rules.s2l(features, 3, 1)(30, None).rows.tolist() == rules.s2l(features, 3, 1)(30, None).rows.tolist()
    nearest = rules.coverage(features, 3, 1)(30, None).rows
    distance = np.linalg.norm(features - np.array([features[cluster == c].mean(0) for c in cluster]), axis=1)
    assert all(
        distance[nearest[cluster[nearest] == c]].max() <= np.sort(distance[cluster == c])[n - 1] + 1e-9
        for c, n in enumerate([18, 9, 3])
    )
    # Lowest learning percentage: the loss grew most.
    assert rules.learning_percentage(np.full(100, 2.0), np.linspace(3, 1, 100), features, 3, 1)(30, None).rows[0] == 0


def test_rds_takes_in_turns_what_is_nearest_to_the_dev_rows():
    rng = np.random.default_rng(1)
    pool, dev = rng.normal(size=(40, 4)), rng.normal(size=(3, 4))
    likeness = (dev / np.linalg.norm(dev, axis=1)[:, None]) @ (pool / np.linalg.norm(pool, axis=1)[:, None]).T
    literal, turn = [], 0
    while len(literal) < 11:
        literal.append(max((r for r in range(40) if r not in literal), key=lambda r: likeness[turn % 3, r]))
        turn += 1
    assert rules.rds(pool, dev)(11, None).rows.tolist() == sorted(literal)
    within = np.arange(40) % 2 == 0
    assert (rules.rds(pool, dev)(20, within).rows == np.arange(0, 40, 2)).all()
