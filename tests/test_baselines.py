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
from selection.method.staff import coreset_size, floor_share
from selection.run.config import Selection

METHODS = ["random", "length", "grand", "el2n", "ccs", "d2", "moderate", "entropy"]
few_values = st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0, 7.0, 40.0]), min_size=1, max_size=60)
score_lists = st.one_of(few_values, st.lists(st.floats(0.001, 1e3), min_size=1, max_size=60))
by_property = settings(max_examples=50, deadline=None)


def make_columns(num_rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
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


def literal_budgets(values: list[float], num_strata: int, cutoff_count: int, m: int) -> list[tuple[list, int]]:
    """CCS, word by word: drop the hardest, equal widths, equal budgets, smallest stratum first: (rows, budget)."""
    hardest = sorted(range(len(values)), key=lambda row: (values[row], row))[len(values) - cutoff_count :]
    kept = [row for row in range(len(values)) if row not in hardest]
    low, high = min(values[row] for row in kept), max(values[row] for row in kept)
    edges = np.linspace(low, high, num_strata + 1)[1:-1] if high > low else []
    strata = [[row for row in kept if sum(values[row] >= edge for edge in edges) == i] for i in range(len(edges) + 1)]
    left, remaining, budgets = sorted(filter(None, strata), key=len), m, []
    while left:
        rows = left.pop(0)
        budgets.append((rows, min(len(rows), remaining // (len(left) + 1))))
        remaining -= budgets[-1][1]
    return budgets


@pytest.mark.parametrize(("method", "variant"), [("ccs", "published"), ("ccs", "released"), ("length", "published")])
@by_property
@given(values=score_lists, num_strata=st.integers(1, 12), percent=st.integers(1, 100))
def test_ccs_and_length_take_from_every_stratum_what_the_literal_rule_takes(
    method, variant, values, num_strata, percent
):
    m, selection = floor_share(percent / 100, len(values)), Selection(num_strata=num_strata, variant=variant)
    assume(m)
    columns = {columns_of(method, variant)[0]: np.array(values)}
    chosen = set(baseline_by_rate(method, columns, len(values), selection)(percent / 100).rows.tolist())
    assert len(chosen) == m
    scores = [1 / value for value in values] if method == "length" else values
    budgets = literal_budgets(scores, num_strata, len(values) // 10 if variant == "published" else 0, m)
    filled = m - sum(budget for _, budget in budgets)  # more than 0 where a stratum is too small for what was left
    more = [len(chosen & set(rows)) - budget for rows, budget in budgets]
    assert min(more) >= 0 and (filled or not any(more))


@pytest.mark.parametrize(("method", "rate"), [("ccs", 0.5), ("d2", 0.9)])
def test_published_ccs_and_d2_never_take_the_hardest_tenth_and_released_ones_do(method, rate):
    columns = make_columns(300)
    columns["el2n_released"] = columns["el2n"]
    hardest = np.argsort(columns["el2n"])[-30:]
    for variant in ("published", "released"):
        chosen = baseline_by_rate(method, columns, 300, Selection(variant=variant))(rate).rows
        assert np.isin(hardest, chosen).any() == (variant == "released")


def test_released_length_takes_the_shortest_responses_of_a_stratum():
    tokens, selection = np.arange(10.0, 30.0), Selection(mode="released", num_strata=1, hardest_cutoff=0.0)
    assert baseline_by_rate("length", {"n_response_tokens": tokens}, 20, selection)(0.2).rows.tolist() == [0, 1, 2, 3]


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
def test_every_method_chooses_m_distinct_rows_repeats_and_shares_nothing_between_rates(method, mode):
    columns, selection = make_columns(97), Selection(mode=mode, num_strata=7, seed=5)
    rule, again = (baseline_by_rate(method, columns, 97, selection) for _ in range(2))
    for rate in (0.05, 0.3, 0.95, 1.0):
        rows = rule(rate).rows
        assert rows.tolist() == sorted(set(rows.tolist())) and len(rows) == coreset_size(rate, 97)
    assert again(0.05).rows.tolist() == rule(0.05).rows.tolist()
    other = baseline_by_rate(method, columns, 97, selection.model_copy(update={"seed": 6}))(0.3).rows.tolist()
    draws = method in ("random", "ccs") or (method, mode) == ("length", "paper")
    assert (other != again(0.3).rows.tolist()) == draws


def test_the_variant_follows_the_mode_unless_it_is_given():
    for method in ("el2n", "ccs", "d2"):
        variants = [Selection(mode=mode).baseline_variant for mode in ("paper", "released")]
        assert [columns_of(method, variant)[0] for variant in variants] == ["el2n", "el2n_released"]
    assert Selection(mode="paper", variant="released").baseline_variant == "released"


# Through coreset.py


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
        assert written["indices"] == rule(0.2).rows.tolist()
        assert written["seed"] == 3
        assert written.get("variant") == ("published" if method in ("el2n", "ccs", "d2") else None)


def test_features_from_a_file_take_the_place_of_the_column_and_must_fit(cut, tmp_path):
    path, both = tmp_path / "features.npy", ["d2", "moderate"]
    np.save(path, make_columns(60)["hidden_state"])
    _, column = cut(both)
    _, file = cut(both, ["--features", path], "other", hidden_state=None)
    for name in ("d2-0.2.json", "moderate-0.2.json"):
        assert (column / name).read_bytes() == (file / name).read_bytes()
    assert_one_line_error(cut(both, out="none", hidden_state=None)[0], "scores.parquet has no column hidden_state")
    wild = np.zeros((60, 4))
    wild[17, 2] = np.nan
    refused = {"59 rows, the scores have 60": wild[1:], "no two-dimensional array": wild[0], "features of row 17": wild}
    for why, features in refused.items():
        np.save(path, features)
        assert_one_line_error(cut(["moderate"], ["--features", path], "none")[0], why)
    assert_one_line_error(cut(["length"], ["--features", path], "none")[0], "--features is read by --method d2 and mod")


def test_scores_that_are_no_numbers_and_rows_without_response_are_refused_by_row(cut):
    el2n, tokens = make_columns(60)["el2n"], make_columns(60)["n_response_tokens"]
    el2n[8], tokens[9] = np.inf, 0
    assert_one_line_error(cut(["ccs"], el2n=el2n)[0], "row 8 has el2n inf")
    assert_one_line_error(cut(["length"], n_response_tokens=tokens)[0], "row 9 has no response token")
