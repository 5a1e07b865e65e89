"""D2 Pruning: neighbours and order against slow literal versions, whatever the features, and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selection.method.d2 import _float32_table, _nearest_distinct, d2_order, nearest_neighbours
from selection.run.errors import UserError

by_property = settings(max_examples=150, deadline=None)
variants = st.sampled_from(["published", "released"])
both_variants = pytest.mark.parametrize("variant", ["published", "released"])


@st.composite
def feature_arrays(draw, max_rows=60) -> np.ndarray:
    """Ties, equal rows, common offsets that leave float32 few digits, rows closer than float32 can tell, any scale."""
    num_rows, dimension = draw(st.integers(1, max_rows)), draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["integers", "binary", "constant", "normal", "offset", "close", "outlier", "wild"]))
    features = rng.standard_normal((num_rows, dimension))
    if kind == "integers":
        features = rng.integers(-3, 4, (num_rows, dimension)).astype(np.float64)
    if kind == "binary":
        features = rng.integers(0, 2, (num_rows, dimension)).astype(np.float64)
    if kind == "constant":
        features[:] = features[0]
    if kind == "offset":
        features += 1e4
    if kind == "close":  # two heaps
        features = rng.integers(0, 2, (num_rows, 1)) + 1e-9 * features
    if kind == "outlier":
        features[rng.integers(num_rows)] *= 1e8
    if kind == "wild":
        features *= 10.0 ** rng.integers(-30, 30, (num_rows, 1))
    if draw(st.booleans()):  # equal rows
        features = features[rng.integers(num_rows, size=num_rows)]
    features *= draw(st.sampled_from([1.0, 1.0, 1e-30, 1e30, 1e-160, 1e-300, 1e80]))
    dtype = draw(st.sampled_from([np.float64, np.float64, np.float32]))
    largest = np.abs(features).max()
    return features.astype(dtype) if largest < 1e38 else features


@st.composite
def cases(draw) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N,) and features (N, d)."""
    features = draw(feature_arrays(max_rows=40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["constant", "zero", "ties", "lognormal", "below the floor", "both signs"]))
    if kind == "constant":
        return np.full(len(features), 0.7), features
    if kind == "zero":
        return np.zeros(len(features)), features
    if kind == "ties":
        return rng.integers(0, 4, len(features)).astype(np.float64), features
    if kind == "both signs":
        return rng.standard_normal(len(features)), features
    scores = rng.lognormal(sigma=2, size=len(features))
    return scores * (1e-8 if kind == "below the floor" else 1.0), features


def literal_neighbours(features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    features = features.astype(np.float64)
    near, distances = [], []
    for row, x in enumerate(features):
        distance = np.sqrt(((features - x) ** 2).sum(-1))
        order = [other for other in np.argsort(distance, kind="stable").tolist() if other != row][:k]
        near.append(order)
        distances.append(distance[order])
    return np.array(near).reshape(len(features), -1), np.array(distances).reshape(len(features), -1)


def literal_order(scores: np.ndarray, features: np.ndarray, variant: str, k: int = 5, gamma: float = 0.1) -> list[int]:
    """The rule word by word: sums over neighbours in the order of their rows, a search through all rows each step."""
    edges = [{} for _ in scores]
    for row, (near, distances) in enumerate(zip(*literal_neighbours(features, k), strict=True)):
        for other, distance in zip(near, distances, strict=True):
            edges[row][int(other)] = distance
            if variant == "released":
                edges[int(other)][row] = distance
    values = np.empty(len(scores))
    for row, neighbours in enumerate(edges):
        total = 0.0
        for other in sorted(neighbours):
            carried = max(scores[other], 1e-7) if variant == "released" else scores[other]
            total += np.exp(-neighbours[other]) * carried
        values[row] = scores[row] + total
    order = []
    left = np.ones(len(scores), dtype=bool)
    while left.any():
        row = int(np.argmax(np.where(left, values, -np.inf)))
        order.append(row)
        left[row] = False
        for other, distance in edges[row].items():
            values[other] -= np.exp(-gamma * distance) * values[row]
    return order


def assert_same_neighbours(features: np.ndarray, k: int, **keys: int) -> None:
    near, distances = nearest_neighbours(features, k, **keys)
    expected_near, expected_distances = literal_neighbours(features, k)
    assert near.dtype.kind == "i" and distances.dtype == np.float64
    assert near.shape == distances.shape == (len(features), min(k, len(features) - 1))
    np.testing.assert_array_equal(near, expected_near)
    np.testing.assert_array_equal(distances, expected_distances)


# Neighbours


@settings(by_property, max_examples=400)
@given(feature_arrays(), st.integers(1, 8), st.integers(1, 70))
def test_neighbours_are_the_literal_ones_whatever_the_block(features, k, block_rows):
    assert_same_neighbours(features, k, block_rows=block_rows)


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_k_is_cut_to_the_other_rows(num_rows):
    assert_same_neighbours(np.arange(num_rows, dtype=np.float64)[:, None] ** 2, 5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8])
def test_every_number_type_counts_in_float64(dtype):
    features = (100 * np.random.default_rng(0).uniform(-1, 1, (200, 12))).astype(dtype)
    assert_same_neighbours(features, 5)


def test_clustered_rows_far_from_the_origin():
    rng = np.random.default_rng(0)
    features = 1e4 + rng.standard_normal((20, 48))[rng.integers(20, size=2000)] + rng.standard_normal((2000, 48)) / 4
    features[rng.integers(2000, size=300)] = features[7]
    assert_same_neighbours(features.astype(np.float32), 5)


@pytest.mark.parametrize("spread", [1e-3, 1e-5, 1e-7, 1e-9, 1e-12])
def test_heaps_of_rows_closer_than_float32_can_tell(spread):
    rng = np.random.default_rng(0)
    heaps = rng.standard_normal((4, 64))
    features = heaps[rng.integers(4, size=800)] + spread * rng.standard_normal((800, 64))
    assert_same_neighbours(features, 5, block_rows=100)


def test_a_second_look_in_parts(monkeypatch):
    monkeypatch.setattr("selection.method.d2._COLUMNS_AT_A_TIME", 7)
    rng = np.random.default_rng(0)
    assert_same_neighbours(rng.integers(0, 2, (300, 1)) + 1e-9 * rng.integers(0, 9, (300, 3)), 5)


def test_thousands_of_equal_rows():
    features = np.full((3000, 64), 0.1)
    features[1500:, 3] = 0.7
    near, distances = nearest_neighbours(features, 3)
    for row in (0, 1, 2, 3, 4, 1499):
        assert near[row].tolist() == [other for other in range(4) if other != row][:3]
    for row in (1500, 1503, 2999):
        assert near[row].tolist() == [other for other in range(1500, 1504) if other != row][:3]
    assert not distances.any()


def test_equal_rows_are_compared_once(monkeypatch):
    compared = []

    def record(features, k, block_rows):
        compared.append(len(features))
        return _nearest_distinct(features, k, block_rows)

    monkeypatch.setattr("selection.method.d2._nearest_distinct", record)
    assert_same_neighbours(np.arange(400.0)[:, None] % 30, 5)
    assert compared == [30]


@by_property
@given(feature_arrays())
def test_the_float32_bound_is_never_above_the_distance(features):
    features = features.astype(np.float64)
    distances = np.array([np.sqrt(((features - x) ** 2).sum(-1)) for x in features])
    table, own_part, unit = _float32_table(features)
    left = -2 * table
    left[:, -1] = 1
    bounds = own_part[:, None] + (left @ table.T).astype(np.float64)
    assert np.all(bounds <= (distances / unit) ** 2)


def test_the_float32_bound_is_close_to_the_distance():
    features = 1e4 + np.random.default_rng(0).standard_normal((300, 64))
    table, own_part, unit = _float32_table(features)
    left = -2 * table
    left[:, -1] = 1
    bounds = own_part[:, None] + left @ table.T
    distances = np.array([((features - x) ** 2).sum(-1) for x in features]) / unit**2
    assert np.all(distances - bounds <= 1e-4 * distances.max())


# The order


@settings(by_property, max_examples=300)
@given(cases(), variants, st.integers(1, 8), st.sampled_from([0.1, 0.0, 1.0]))
def test_the_order_is_the_literal_one(case, variant, k, gamma):
    scores, features = case
    order = d2_order(scores, features, variant, k, gamma)
    assert order.tolist() == literal_order(scores, features, variant, k, gamma)


@both_variants
def test_the_order_of_many_rows_is_the_literal_one(variant):
    rng = np.random.default_rng(1)
    features = 3 + 0.1 * rng.standard_normal((3000, 16))
    features[rng.integers(3000, size=200)] = features[5]
    scores = np.round(rng.lognormal(sigma=1, size=3000), 1)
    features = features.astype(np.float32)
    assert d2_order(scores, features, variant).tolist() == literal_order(scores, features, variant)


@both_variants
def test_defaults_are_the_papers(variant):
    rng = np.random.default_rng(2)
    scores, features = rng.uniform(size=100), rng.standard_normal((100, 3))
    order = d2_order(scores, features, variant).tolist()
    assert order == d2_order(scores, features, variant, k=5, gamma=0.1).tolist()
    assert order != d2_order(scores, features, variant, k=4, gamma=0.1).tolist()
    assert order != d2_order(scores, features, variant, k=5, gamma=0.5).tolist()


def test_by_hand_where_the_variants_part():
    # k = 1: 0 → 1, 1 → 0 (distance 1), 2 → 1 (distance 2).
    # Published: 2 + 10/e = 5.68, 10 + 2/e = 10.74, 3 + 10/e² = 4.35. Row 1 takes 9.71 from row 0: −4.04. Then 2, 0.
    # Released: row 1 has the edge to 2 too: 10.74 + 3/e² = 11.14; it takes 10.08 from row 0: −4.40, and 9.12 from
    # row 2: −4.77. Then 0, 2.
    features, scores = np.array([[0.0], [1.0], [3.0]]), np.array([2.0, 10.0, 3.0])
    assert d2_order(scores, features, "published", k=1).tolist() == [1, 2, 0]
    assert d2_order(scores, features, "released", k=1).tolist() == [1, 0, 2]


def test_by_hand_a_value_below_zero_raises_its_neighbours():
    # k = 1 and γ = 0: 0 and 1 are each other's nearest, so are 2 and 3, and 4 → 3. e^−30 carries next to nothing.
    features = np.array([[0.0], [30.0], [1000.0], [1030.0], [1061.0]])
    scores = np.array([9.0, 1.0, -2.0, -5.0, -4.0])
    # 0 (9): row 1 to −8. 2 (−2): row 3 to −5 + 2 = −3. 3 (−3): its nearest, 2, is taken; 4 (−4) would otherwise have
    # come before 3 (−5). Then 4, then 1.
    assert d2_order(scores, features, "published", k=1, gamma=0.0).tolist() == [0, 2, 3, 4, 1]


def test_of_equal_values_the_earlier_row_is_taken():
    features = np.arange(4.0)[:, None] * 1e6  # nothing spreads
    assert d2_order(np.array([1.0, 2.0, 1.0, 2.0]), features, "published").tolist() == [1, 3, 0, 2]


def test_released_edges_carry_at_least_the_floor():
    # Row 0 has a neighbour at distance 0, row 2 one far away; both scores are equal, and zero elsewhere.
    features, scores = np.array([[9.0], [9.0], [0.0], [5.0]]), np.array([0.0, 0.0, 5e-8, 0.0])
    assert d2_order(scores, features, "published", k=1)[0] == 2
    assert d2_order(scores, features, "released", k=1)[0] == 0


@both_variants
def test_no_rows_and_one_row(variant):
    assert d2_order(np.empty(0), np.empty((0, 3)), variant).tolist() == []
    assert d2_order(np.array([0.5]), np.ones((1, 3)), variant).tolist() == [0]


# What is refused


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e140])
def test_numbers_that_cannot_be_squared_are_refused_by_row(number):
    scores, features = np.ones(9), np.arange(18.0).reshape(9, 2)
    wrong = features.copy()
    wrong[[4, 7], 1] = number
    with pytest.raises(UserError, match="row 4 "):
        nearest_neighbours(wrong, 5)
    with pytest.raises(UserError, match="row 4 "):
        d2_order(scores, wrong, "published")
    scores[[6, 8]] = number
    with pytest.raises(UserError, match="row 6 "):
        d2_order(scores, features, "published")


@pytest.mark.parametrize("shape", [(9,), (9, 2, 1), ()])
def test_features_that_are_no_table_are_refused(shape):
    with pytest.raises(UserError, match="features of shape"):
        nearest_neighbours(np.ones(shape), 5)


@pytest.mark.parametrize("shape", [(8,), (10,), (9, 1)])
def test_scores_that_do_not_fit_are_refused(shape):
    with pytest.raises(UserError, match="9 rows of features"):
        d2_order(np.ones(shape), np.ones((9, 2)), "published")


def test_another_variant_and_k_below_1_are_refused():
    with pytest.raises(UserError, match="'paper'"):
        d2_order(np.ones(3), np.ones((3, 2)), "paper")
    with pytest.raises(UserError, match="k is 0"):
        d2_order(np.ones(3), np.ones((3, 2)), "published", k=0)
