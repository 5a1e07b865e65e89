"""The baselines on stored scores, against slow, literal versions of their rules."""

import json
import math
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import assert_one_line_error, baseline_by_rate, run_script
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from selection.method.baselines import columns_of, moderate_order
from selection.method.d2 import d2_order, nearest_neighbours
from selection.method.staff import choose_staff, coreset_size, floor_share, stratify
from selection.run.config import Selection

METHODS = ["random", "length", "grand", "el2n", "ccs", "d2", "moderate", "entropy"]
few_values = st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0, 7.0, 40.0]), min_size=1, max_size=60)
score_lists = st.one_of(few_values, st.lists(st.floats(0.001, 1e3), min_size=1, max_size=60))
by_property = settings(max_examples=50, deadline=None)


def make_columns(num_rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    columns = {name: rng.lognormal(size=num_rows) for name in ("effort", "el2n", "el2n_released", "entropy")}
    return columns | {
        "n_response_tokens": rng.integers(1, 90, num_rows).astype(float),
        "hidden_state": rng.normal(size=(num_rows, 6)).astype(np.float32),
    }


@pytest.mark.parametrize("method", ["grand", "el2n", "entropy"])
@by_property
@given(values=score_lists, percent=st.integers(1, 100))
def test_the_highest_scores_are_chosen_of_equal_ones_the_earlier(method, values, percent):
    m = floor_share(percent / 100, len(values))
    assume(m)
    (column,) = columns_of(method, "published")
    rows = baseline_by_rate(method, {column: np.array(values)}, len(values), Selection())(percent / 100).rows
    assert rows.tolist() == sorted(sorted(range(len(values)), key=lambda row: (-values[row], row))[:m])


@pytest.mark.parametrize(("method", "variant"), [("ccs", "published"), ("ccs", "released"), ("length", "published")])
@by_property
@given(values=score_lists, num_strata=st.integers(1, 12), percent=st.integers(1, 100))
def test_ccs_and_length_are_staff_with_the_same_ratio_everywhere(method, variant, values, num_strata, percent):
    m, selection = floor_share(percent / 100, len(values)), Selection(num_strata=num_strata, variant=variant, seed=3)
    assume(m)
    columns = {columns_of(method, variant)[0]: np.array(values)}
    rows = baseline_by_rate(method, columns, len(values), selection)(percent / 100).rows
    scores = 1 / np.array(values) if method == "length" else np.array(values)
    strata = stratify(scores, num_strata, 0.1 if variant == "published" else 0.0)
    assert rows.tolist() == choose_staff(scores, strata, [1.0] * len(strata.members), m, "paper", 3).rows.tolist()


@pytest.mark.parametrize(("method", "rate"), [("ccs", 0.5), ("d2", 0.9)])
def test_published_ccs_and_d2_never_take_the_hardest_tenth_released_ones_do_and_length_the_shortest(method, rate):
    columns = make_columns(300)
    columns["el2n_released"] = columns["el2n"]
    hardest = np.argsort(columns["el2n"])[-30:]
    for variant in ("published", "released"):
        chosen = baseline_by_rate(method, columns, 300, Selection(variant=variant))(rate).rows
        assert np.isin(hardest, chosen).any() == (variant == "released")
    tokens, selection = np.arange(10.0, 30.0), Selection(mode="released", num_strata=1, hardest_cutoff=0.0)
    shortest = baseline_by_rate("length", {"n_response_tokens": tokens}, 20, selection)(0.2)
    assert shortest.rows.tolist() == [0, 1, 2, 3]


@by_property
@given(st.lists(st.lists(st.integers(-4, 4), min_size=3, max_size=3), min_size=1, max_size=40))
def test_moderate_is_the_literal_rule(features):
    prototype = [median(column) for column in zip(*features, strict=True)]
    distances = [math.dist(row, prototype) for row in features]
    away = [abs(distance - median(distances)) for distance in distances]
    order = moderate_order(np.array(features, dtype=np.float32))
    assert sorted(order.tolist()) == list(range(len(features)))
    assert [away[row] for row in order] == pytest.approx(sorted(away), abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["paper", "released"])
def test_every_method_chooses_m_distinct_rows_and_repeats(method, mode):
    columns, selection = make_columns(97), Selection(mode=mode, num_strata=7, seed=5)
    rule, again = (baseline_by_rate(method, columns, 97, selection) for _ in range(2))
    for rate in (0.05, 0.3, 1.0):
        rows = rule(rate).rows
        assert rows.tolist() == sorted(set(rows.tolist())) and len(rows) == coreset_size(rate, 97)
    other = baseline_by_rate(method, columns, 97, selection.model_copy(update={"seed": 6}))(0.3).rows.tolist()
    draws = method in ("random", "ccs") or (method, mode) == ("length", "paper")
    assert (other != rule(0.3).rows.tolist()) == draws and again(0.3).rows.tolist() == rule(0.3).rows.tolist()


@pytest.fixture
def cut(tmp_path):
    """A function that calls coreset.py on a table of scores at rate 0.2; gives what became of it and its folder."""

    def call(methods, more=(), out="out", **changes):
        columns = make_columns(60) | {"hidden_state": list(make_columns(60)["hidden_state"])} | changes
        table = {"index": np.arange(60)} | {k: v for k, v in columns.items() if v is not None}
        pyarrow.parquet.write_table(pa.table(table), tmp_path / "scores.parquet")
        arguments = ["--scores", tmp_path / "scores.parquet", "--rate", 0.2, "--method", *methods, *more]
        done = run_script("selection/coreset.py", *arguments, "--out", tmp_path / out, check=False)
        assert (tmp_path / out).exists() == (done.returncode == 0)
        return done, tmp_path / out

    return call


def test_coreset_cuts_every_method_from_one_file(cut):
    done, out = cut(METHODS, ["--num_strata", 6, "--seed", 3])
    assert done.returncode == 0, done.stderr
    for method in METHODS:
        written = json.loads((out / f"{method}-0.2.json").read_text())
        rule = baseline_by_rate(method, make_columns(60), 60, Selection(num_strata=6, seed=3))
        assert (written["indices"], written["seed"]) == (rule(0.2).rows.tolist(), 3)
        assert written.get("variant") == ("published" if method in ("el2n", "ccs", "d2") else None)


def test_features_from_a_file_take_the_place_of_the_column_and_must_fit(cut, tmp_path):
    path, both = tmp_path / "features.npy", ["d2", "moderate"]
    np.save(path, make_columns(60)["hidden_state"])
    _, column = cut(both)
    _, file = cut(both, ["--features", path], "other", hidden_state=None)
    for name in ("d2-0.2.json", "moderate-0.2.json"):
        assert (column / name).read_bytes() == (file / name).read_bytes()
    assert_one_line_error(cut(both, out="none", hidden_state=None)[0], "scores.parquet has no column hidden_state")
    wild = np.full((60, 4), np.nan)
    for why, features in {"59 rows, the scores have 60": wild[1:], "features of row 0": wild}.items():
        np.save(path, features)
        assert_one_line_error(cut(["moderate"], ["--features", path], "none")[0], why)
    assert_one_line_error(cut(["length"], ["--features", path], "none")[0], "--features is read by --method d2 and mod")


def test_scores_that_are_no_numbers_and_rows_without_response_are_refused_by_row(cut):
    numbers = np.append(np.ones(59), np.inf)
    assert_one_line_error(cut(["ccs"], el2n=numbers)[0], "row 59 has el2n inf")
    assert_one_line_error(cut(["length"], n_response_tokens=1 / numbers)[0], "row 59 has no response token")


@st.composite
def d2_cases(draw) -> tuple[np.ndarray, np.ndarray]:
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
    carried = np.maximum(scores, 1e-7) if variant == "released" else scores
    values = np.empty(len(scores))
    for row, near in enumerate(edges):
        values[row] = scores[row] + sum(np.exp(-near[other]) * carried[other] for other in sorted(near))
    order, left = [], np.ones(len(scores), dtype=bool)
    while left.any():
        row = int(np.argmax(np.where(left, values, -np.inf)))
        order.append(row)
        left[row] = False
        for other, distance in edges[row].items():
            values[other] -= np.exp(-gamma * distance) * values[row]
    return order


@settings(by_property, max_examples=120)
@given(d2_cases(), st.sampled_from(["published", "released"]), st.integers(1, 8), st.sampled_from([0.1, 0.0, 1.0]))
def test_the_order_is_the_literal_one(case, variant, k, gamma):
    scores, features = case
    for rest in ((k, gamma), ()):  # the paper's by default
        assert d2_order(scores, features, variant, *rest).tolist() == literal_order(scores, features, variant, *rest)
    near, distances = nearest_neighbours(features, k, block_rows=7)
    expected = literal_neighbours(features, k)
    assert near.tolist() == expected[0] and np.array_equal(distances, np.reshape(expected[1], distances.shape))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8])
def test_of_equal_rows_the_distances_are_exact_and_no_row_is_its_own_neighbour(dtype):
    features = np.random.default_rng(0).uniform(-50, 50, (200, 12)).astype(dtype)
    features[50:100] = features[7]
    near, distances = nearest_neighbours(features, 5)
    assert not (near == np.arange(200)[:, None]).any() and all(len(set(row)) == 5 for row in near.tolist())
    np.testing.assert_array_equal(np.sort(distances), np.array(literal_neighbours(features, 5)[1]))


def test_by_hand_where_the_variants_part():
    assert d2_order(np.empty(0), np.empty((0, 3)), "published").tolist() == []
    # k = 1: 0 → 1, 1 → 0 (distance 1), 2 → 1 (distance 2).
    # Published: 2 + 10/e = 5.68, 10 + 2/e = 10.74, 3 + 10/e² = 4.35. Row 1 takes 9.71 from row 0: −4.04. Then 2, 0.
    # Released: row 1 has the edge to 2 too: 11.14. It leaves −4.40 to row 0 and −4.77 to row 2.
    features, scores = np.array([[0.0], [1.0], [3.0]]), np.array([2.0, 10.0, 3.0])
    assert d2_order(scores, features, "published", k=1).tolist() == [1, 2, 0]
    assert d2_order(scores, features, "released", k=1).tolist() == [1, 0, 2]


@pytest.mark.parametrize("number", [np.nan, -np.inf, 1e140])
def test_numbers_that_cannot_be_squared_are_refused_by_row_and_shapes_that_do_not_fit(number):
    scores, features = np.ones(9), np.ones((9, 2))
    wild, odd = features.copy(), scores.copy()
    wild[[4, 7], 1] = odd[[6, 8]] = number
    refused = {"features of row 4 ": (scores, wild), "score of row 6 ": (odd, features)}
    for said, given_arrays in (refused | {r"features of shape \(9,\)": (scores, scores)}).items():
        with pytest.raises(ValueError, match=said):
            d2_order(*given_arrays, "published")
