"""The baselines on stored scores, against slow, literal versions of their rules."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import assert_one_line_error, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from selection.method.baselines import baseline, columns_of, moderate_order
from selection.method.staff import coreset_size
from selection.run.config import Selection

METHODS = ["random", "length", "grand", "el2n", "ccs", "d2", "moderate", "entropy"]
few_values = st.integers(1, 60).flatmap(
    lambda n: st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0, 7.0, 40.0]), min_size=n, max_size=n)
)
any_values = st.lists(st.floats(0.001, 1e3), min_size=1, max_size=60)
score_lists = st.one_of(few_values, any_values)


def make_columns(num_rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "effort": rng.lognormal(size=num_rows),
        "el2n": rng.lognormal(size=num_rows),
        "el2n_released": rng.lognormal(size=num_rows),
        "entropy": rng.lognormal(size=num_rows),
        "n_response_tokens": rng.integers(1, 90, num_rows).astype(float),
        "hidden_state": rng.normal(size=(num_rows, 6)).astype(np.float32),
    }


def literal_highest(values: list[float], m: int) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < m:
        best = max(value for row, value in enumerate(values) if row not in chosen)
        chosen.append(next(row for row, value in enumerate(values) if value == best and row not in chosen))
    return sorted(chosen)


def literal_stratum_counts(values: list[float], num_strata: int, cutoff_count: int, m: int) -> list[tuple[list, int]]:
    """CCS, word by word: drop the hardest, equal widths, equal budgets, smallest stratum first: (rows, budget)."""
    hardest = sorted(range(len(values)), key=lambda row: (values[row], row))[len(values) - cutoff_count :]
    kept = [row for row in range(len(values)) if row not in hardest]
    low, high = min(values[row] for row in kept), max(values[row] for row in kept)
    num_strata = num_strata if high > low else 1
    edges = np.linspace(low, high, num_strata + 1)[1:-1]
    strata = [[row for row in kept if sum(values[row] >= edge for edge in edges) == i] for i in range(num_strata)]
    strata = [rows for rows in strata if rows]
    left, remaining, budgets = sorted(strata, key=len), m, []
    while left:
        rows = left.pop(0)
        budget = min(len(rows), remaining // (len(left) + 1))
        budgets.append((rows, budget))
        remaining -= budget
    return budgets


@pytest.mark.parametrize("method", ["grand", "el2n", "entropy"])
@settings(max_examples=40, deadline=None)
@given(values=score_lists, percent=st.integers(1, 100))
def test_the_highest_scores_are_those_of_the_literal_rule(method, values, percent):
    rate = percent / 100
    if math.floor(rate * len(values)) == 0:
        return
    (column,) = columns_of(method, "published")
    rule = baseline(method, {column: np.array(values)}, len(values), Selection())
    assert rule(rate).rows.tolist() == literal_highest(values, coreset_size(rate, len(values)))


@pytest.mark.parametrize("variant", ["published", "released"])
@settings(max_examples=60, deadline=None)
@given(values=score_lists, num_strata=st.integers(1, 12), percent=st.integers(1, 100))
def test_ccs_takes_from_every_stratum_what_the_literal_rule_takes(variant, values, num_strata, percent):
    rate = percent / 100
    if math.floor(rate * len(values)) == 0:
        return
    m, selection = coreset_size(rate, len(values)), Selection(num_strata=num_strata, variant=variant)
    column = "el2n" if variant == "published" else "el2n_released"
    chosen = set(baseline("ccs", {column: np.array(values)}, len(values), selection)(rate).rows.tolist())
    assert len(chosen) == m
    cutoff_count = len(values) // 10 if variant == "published" else 0
    budgets = literal_stratum_counts(values, num_strata, cutoff_count, m)
    if sum(budget for _, budget in budgets) == m:  # no stratum too small to use what was left at the end
        assert [len(chosen & set(rows)) for rows, _ in budgets] == [budget for _, budget in budgets]
    else:
        assert all(len(chosen & set(rows)) >= budget for rows, budget in budgets)


def test_published_ccs_never_takes_the_hardest_tenth_and_released_does():
    columns = make_columns(300)
    for variant, column in (("published", "el2n"), ("released", "el2n_released")):
        hardest = set(np.argsort(columns[column])[-30:].tolist())
        chosen = set(baseline("ccs", columns, 300, Selection(variant=variant))(0.5).rows.tolist())
        assert bool(chosen & hardest) == (variant == "released")


def test_ccs_draws_at_random_inside_a_stratum():
    columns, counts = {"el2n": np.ones(40)}, np.zeros(40)
    for seed in range(300):
        counts[baseline("ccs", columns, 40, Selection(seed=seed))(0.5).rows] += 1
    assert counts[36:].sum() == 0  # the hardest ⌊0.1 · 40⌋, the last ones of equals
    assert counts[:36].min() > 110 and counts[:36].max() < 220  # 167 expected, standard deviation 8.6


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=60), st.integers(1, 12), st.integers(1, 100))
def test_length_is_ccs_on_the_reciprocal_of_the_response_tokens(tokens, num_strata, percent):
    rate, selection = percent / 100, Selection(num_strata=num_strata)
    if math.floor(rate * len(tokens)) == 0:
        return
    length = baseline("length", {"n_response_tokens": np.array(tokens, float)}, len(tokens), selection)(rate)
    ccs = baseline("ccs", {"el2n": 1 / np.array(tokens)}, len(tokens), selection)(rate)
    assert length.rows.tolist() == ccs.rows.tolist()


def test_released_length_takes_the_shortest_responses_of_a_stratum():
    tokens = np.repeat([10.0, 20.0], 50) + np.tile(np.arange(50) / 1000, 2)
    selection = Selection(mode="released", num_strata=2, hardest_cutoff=0.0)
    chosen = baseline("length", {"n_response_tokens": tokens}, 100, selection)(0.2).rows
    assert chosen.tolist() == [*range(10), *range(50, 60)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-4, 4), min_size=3, max_size=3), min_size=1, max_size=40))
def test_moderate_is_the_literal_rule(features):
    prototype = [sorted(column) for column in zip(*features, strict=True)]
    middle = (len(features) - 1) / 2
    prototype = [(c[math.floor(middle)] + c[math.ceil(middle)]) / 2 for c in prototype]
    distances = [math.sqrt(sum((a - b) ** 2 for a, b in zip(row, prototype, strict=True))) for row in features]
    ranked = sorted(distances)
    median = (ranked[math.floor(middle)] + ranked[math.ceil(middle)]) / 2
    away = [abs(distance - median) for distance in distances]
    order = moderate_order(np.array(features, dtype=np.float32))
    assert sorted(order.tolist()) == list(range(len(features)))
    assert [away[row] for row in order] == pytest.approx(sorted(away), abs=1e-9)


def test_published_d2_drops_the_hardest_tenth_and_released_does_not():
    columns = make_columns(100)
    hardest = np.argsort(columns["el2n"])[-10:]
    assert not np.isin(hardest, baseline("d2", columns, 100, Selection())(0.9).rows).any()
    released = {**columns, "el2n_released": columns["el2n"]}
    assert np.isin(hardest, baseline("d2", released, 100, Selection(variant="released"))(0.9).rows).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["paper", "released"])
def test_every_method_chooses_m_distinct_rows_repeats_and_shares_nothing_between_rates(method, mode):
    columns, selection = make_columns(97), Selection(mode=mode, num_strata=7, seed=5)
    rule, again = (baseline(method, columns, 97, selection) for _ in range(2))
    for rate in (0.05, 0.3, 0.95, 1.0):
        rows = rule(rate).rows
        assert rows.tolist() == sorted(set(rows.tolist())) and len(rows) == coreset_size(rate, 97)
        assert rows.tolist() == again(rate).rows.tolist()
    assert rule(0.05).rows.tolist() == baseline(method, columns, 97, selection)(0.05).rows.tolist()


@pytest.mark.parametrize("method", ["random", "length", "ccs"])
def test_a_seed_changes_random_choices(method):
    first, other = (baseline(method, make_columns(97), 97, Selection(seed=seed))(0.3).rows for seed in (1, 2))
    assert first.tolist() != other.tolist()


def test_the_variant_follows_the_mode_unless_it_is_given():
    variants = [Selection(mode=mode).baseline_variant for mode in ("paper", "released")]
    assert variants == ["published", "released"]
    assert Selection(mode="paper", variant="released").baseline_variant == "released"
    for method in ("el2n", "ccs", "d2"):
        assert [columns_of(method, variant)[0] for variant in variants] == ["el2n", "el2n_released"]


# Through coreset.py


def write_table(path, num_rows=60, **changes) -> None:
    columns = make_columns(num_rows) | {"hidden_state": list(make_columns(num_rows)["hidden_state"])} | changes
    table = {"index": np.arange(num_rows)} | {k: v for k, v in columns.items() if v is not None}
    pyarrow.parquet.write_table(pa.table(table), path)


def test_coreset_cuts_every_method_from_one_file(tmp_path):
    write_table(tmp_path / "scores.parquet")
    arguments = ["--scores", tmp_path / "scores.parquet", "--rate", 0.1, 0.3, "--num_strata", 6, "--seed", 3]
    run_script("selection/coreset.py", *arguments, "--method", *METHODS, "--out", tmp_path / "out")
    columns, selection = make_columns(60), Selection(num_strata=6, seed=3)
    for method in METHODS:
        for rate in (0.1, 0.3):
            written = json.loads((tmp_path / "out" / f"{method}-{rate}.json").read_text())
            assert written["indices"] == baseline(method, columns, 60, selection)(rate).rows.tolist()
            assert written["seed"] == 3
            assert written.get("variant") == ("published" if method in ("el2n", "ccs", "d2") else None)


def test_features_from_a_file_take_the_place_of_the_column(tmp_path):
    write_table(tmp_path / "all.parquet")
    write_table(tmp_path / "without.parquet", hidden_state=None)
    np.save(tmp_path / "features.npy", make_columns(60)["hidden_state"])
    common = ["--rate", 0.2, "--method", "d2", "moderate"]
    run_script("selection/coreset.py", *common, "--scores", tmp_path / "all.parquet", "--out", tmp_path / "one")
    features = ["--features", tmp_path / "features.npy"]
    without = ["--scores", tmp_path / "without.parquet", "--out", tmp_path / "other"]
    run_script("selection/coreset.py", *common, *without, *features)
    for name in ("d2-0.2.json", "moderate-0.2.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    missing = run_script("selection/coreset.py", *common, *without, check=False)
    assert_one_line_error(missing, "without.parquet has no column hidden_state")


def refused_features(tmp_path, array) -> object:
    write_table(tmp_path / "scores.parquet")
    np.save(tmp_path / "features.npy", array)
    arguments = ["--scores", tmp_path / "scores.parquet", "--rate", 0.2, "--method", "moderate"]
    arguments += ["--features", tmp_path / "features.npy", "--out", tmp_path / "out"]
    done = run_script("selection/coreset.py", *arguments, check=False)
    assert not (tmp_path / "out").exists()
    return done


def test_features_that_do_not_fit_are_refused(tmp_path):
    assert_one_line_error(refused_features(tmp_path, np.zeros((59, 4))), "59 rows, the scores have 60")
    assert_one_line_error(refused_features(tmp_path, np.zeros(60)), "no two-dimensional array")
    bad = np.zeros((60, 4))
    bad[17, 2] = np.nan
    assert_one_line_error(refused_features(tmp_path, bad), "features of row 17 are not finite")


def test_scores_that_are_no_numbers_are_refused_by_column_and_row(tmp_path):
    el2n = make_columns(60)["el2n"]
    el2n[8] = np.inf
    write_table(tmp_path / "scores.parquet", el2n=el2n)
    arguments = ["--scores", tmp_path / "scores.parquet", "--rate", 0.2, "--method", "ccs", "--out", tmp_path / "out"]
    done = run_script("selection/coreset.py", *arguments, check=False)
    assert_one_line_error(done, "row 8 has el2n inf")


def test_a_row_without_response_tokens_and_features_nobody_reads_are_refused(tmp_path):
    tokens = make_columns(60)["n_response_tokens"]
    tokens[9] = 0
    write_table(tmp_path / "scores.parquet", n_response_tokens=tokens)
    arguments = [
        "--scores",
        tmp_path / "scores.parquet",
        "--rate",
        0.2,
        "--method",
        "length",
        "--out",
        tmp_path / "out",
    ]
    done = run_script("selection/coreset.py", *arguments, check=False)
    assert_one_line_error(done, "row 9 has no response token")
    done = run_script("selection/coreset.py", *arguments, "--features", "F.npy", check=False)
    assert_one_line_error(done, "--features is read by --method d2 and moderate alone")
