"""D2 Pruning: neighbours and order against slow literal versions, and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selection.method.d2 import d2_order, nearest_neighbours

by_property = settings(max_examples=150, deadline=None)
VARIANTS = ["published", "released"]


@st.composite
def cases(draw) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N,) with ties and of both signs; features (N, d) of any scale, no two distances the same."""
    num_rows, dimension = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    features = rng.standard_normal((num_rows, dimension)) + draw(st.sampled_from([0.0, 100.0]))
    features[rng.integers(num_rows)] *= draw(st.sampled_from([1.0, 1e4]))
    features *= draw(st.sampled_from([1.0, 1.0, 1e-30, 1e30]))
    kinds = [np.full(num_rows, 0.7), np.zeros(num_rows), rng.integers(0, 4, num_rows), rng.standard_normal(num_rows)]
    kinds += [unit * rng.lognormal(sigma=2, size=num_rows) for unit in (1, 1e-8)]  # the last below the edges' floor
    return kinds[draw(st.integers(0, 5))], features.astype(draw(st.sampled_from([np.float64, np.float32])))


def literal_neighbours(features: np.ndarray, k: int) -> tuple[list[list[int]], list[np.ndarray]]:
    features = features.astype(np.float64)
    near, distances = [], []
    for row, x in enumerate(features):
        distance = np.sqrt(((features - x) ** 2).sum(-1))
        near.append([other for other in np.argsort(distance, kind="stable").tolist() if other != row][:k])
        distances.append(distance[near[-1]])
    return near, distances


def literal_order(scores: np.ndarray, features: np.ndarray, variant: str, k: int = 5, gamma: float = 0.1) -> list[int]:
    """The rule word by word: sums over neighbours in the order of their rows, a search through all rows each step."""
    edges = [{} for _ in scores]
    for row, (near, distances) in enumerate(zip(*literal_neighbours(features, k), strict=True)):
        for other, distance in zip(near, distances, strict=True):
            edges[row][other] = distance
            if variant == "released":
                edges[other][row] = distance
    values = np.empty(len(scores))
    for row, neighbours in enumerate(edges):
        total = 0.0
        for other in sorted(neighbours):
            carried = max(scores[other], 1e-7) if variant == "released" else scores[other]
            total += np.exp(-neighbours[other]) * carried
        values[row] = scores[row] + total
    order, left = [], np.ones(len(scores), dtype=bool)
    while left.any():
        row = int(np.argmax(np.where(left, values, -np.inf)))
        order.append(row)
        left[row] = False
        for other, distance in edges[row].items():
            values[other] -= np.exp(-gamma * distance) * values[row]
    return order


@by_property
@given(cases(), st.integers(1, 8), st.sampled_from([7, 512]))
def test_neighbours_and_distances_are_the_literal_ones(case, k, block_rows):
    _, features = case
    near, distances = nearest_neighbours(features, k, block_rows)
    expected_near, expected_distances = literal_neighbours(features, k)
    assert near.shape == distances.shape == (len(features), min(k, len(features) - 1))
    assert near.tolist() == expected_near
    np.testing.assert_array_equal(distances, np.array(expected_distances).reshape(distances.shape))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8])
def test_of_equal_rows_the_distances_are_exact_and_no_row_is_its_own_neighbour(dtype):
    rng = np.random.default_rng(0)
    features = (50 * rng.uniform(-1, 1, (200, 12))).astype(dtype)
    features[50:100] = features[7]
    near, distances = nearest_neighbours(features, 5)
    assert not (near == np.arange(200)[:, None]).any() and all(len(set(row)) == 5 for row in near.tolist())
    np.testing.assert_array_equal(np.sort(distances), np.array(literal_neighbours(features, 5)[1]))


@settings(by_property, max_examples=300)
@given(cases(), st.sampled_from(VARIANTS), st.integers(1, 8), st.sampled_from([0.1, 0.0, 1.0]))
def test_the_order_is_the_literal_one(case, variant, k, gamma):
    scores, features = case
    order = d2_order(scores, features, variant, k, gamma)
    assert order.tolist() == literal_order(scores, features, variant, k, gamma)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_order_of_many_rows_is_the_literal_one_with_the_papers_k_and_gamma(variant):
    rng = np.random.default_rng(1)
    features = (3 + 0.1 * rng.standard_normal((2000, 16))).astype(np.float32)
    scores = np.round(rng.lognormal(sigma=1, size=2000), 1)
    order = d2_order(scores, features, variant).tolist()
    assert order == literal_order(scores, features, variant, k=5, gamma=0.1)
    assert order != d2_order(scores, features, variant, k=4).tolist()
    assert order != d2_order(scores, features, variant, gamma=0.5).tolist()


def test_by_hand_where_the_variants_part():
    assert d2_order(np.empty(0), np.empty((0, 3)), "published").tolist() == []
    # k = 1: 0 → 1, 1 → 0 (distance 1), 2 → 1 (distance 2).
    # Published: 2 + 10/e = 5.68, 10 + 2/e = 10.74, 3 + 10/e² = 4.35. Row 1 takes 9.71 from row 0: −4.04. Then 2, 0.
    # Released: row 1 has the edge to 2 too: 10.74 + 3/e² = 11.14; it takes 10.08 from row 0: −4.40, and 9.12 from
    # row 2: −4.77. Then 0, 2.
    features, scores = np.array([[0.0], [1.0], [3.0]]), np.array([2.0, 10.0, 3.0])
    assert d2_order(scores, features, "published", k=1).tolist() == [1, 2, 0]
    assert d2_order(scores, features, "released", k=1).tolist() == [1, 0, 2]


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e140])
def test_numbers_that_cannot_be_squared_are_refused_by_row_and_shapes_that_do_not_fit(number):
    scores, features = np.ones(9), np.arange(18.0).reshape(9, 2)
    wild = features.copy()
    wild[[4, 7], 1] = number
    with pytest.raises(ValueError, match="features of row 4 "):
        d2_order(scores, wild, "published")
    scores[[6, 8]] = number
    with pytest.raises(ValueError, match="score of row 6 "):
        d2_order(scores, features, "published")
    for shape in ((8,), (10,), (9, 1)):
        with pytest.raises(ValueError, match=r"features of shape \(9, 2\)"):
            d2_order(np.ones(shape), features, "published")
    with pytest.raises(ValueError, match=r"features of shape \(9,\)"):
        d2_order(np.ones(9), np.ones(9), "published")
