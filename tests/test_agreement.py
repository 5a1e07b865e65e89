"""Agreement of two sets of scores: against literal versions, by property, and through the script."""

import itertools
import math
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from conftest import assert_one_line_error, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from selection.method.staff import choose_staff, stratify
from selection.report.agreement import agreement, format_agreement, partial_spearman, spearman
from selection.run.errors import UserError
from selection.scores.folder import ScoreFolder, read_scores

RATES = [0.8, 0.25, 0.05]


def write(path, columns: dict):
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    write_table = pa.csv.write_csv if path.suffix == ".csv" else pa.parquet.write_table
    write_table(table, path)
    return path


def scores(path, index, effort, more=("n_response_tokens",), **columns):
    path = write(path, {"index": index, "effort": np.asarray(effort, dtype=np.float64)} | columns)
    return read_scores(path, ["effort", *(name for name in more if name in columns)])


def folder(path, efforts, fingerprint: str, tokens: int = 5):
    rows = np.arange(len(efforts))
    store = ScoreFolder(path, {"data_fingerprint": fingerprint}, len(rows))
    (part,) = store.plan(rows, lambda missing: [[missing.tolist()]])
    columns = {"id": [f"id{row}" for row in rows], "n_prompt_tokens": rows, "n_response_tokens": rows % 3 + tokens}
    store.write_part(part, columns | {"index": rows, "loss": rows / 2, "effort": np.asarray(efforts)})
    store.finish(rows)
    return path


def agree(a, b, rates=RATES, num_strata=5, hardest_cutoff=0.1, seed=3):
    return agreement(a, b, rates, num_strata, hardest_cutoff, seed)


# Rank correlation


def literal_ranks(values) -> np.ndarray:
    """1 + how many are smaller + half of the others that are equal."""
    return np.array([1 + sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values])


def literal_partial(a, b, given) -> float:
    line = np.stack([np.ones(len(a)), literal_ranks(given)], 1)
    left = [(r := literal_ranks(x)) - line @ np.linalg.lstsq(line, r, rcond=None)[0] for x in (a, b)]
    return float(np.corrcoef(*left)[0, 1])


three_arrays = st.integers(5, 40).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 12), min_size=n, max_size=n).map(np.array)] * 3)
)


@settings(max_examples=100, deadline=None)
@given(three_arrays)
def test_rank_correlations_are_the_literal_ones(arrays):
    a, b, held = arrays
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, partial = spearman(a, b), partial_spearman(a, b, held)
    constant = {name: len(set(x.tolist())) == 1 for name, x in (("a", a), ("b", b), ("held", held))}
    assert math.isnan(plain) == (constant["a"] or constant["b"])
    if not math.isnan(plain):
        assert plain == pytest.approx(np.corrcoef(literal_ranks(a), literal_ranks(b))[0, 1], abs=1e-9)
    explained = [abs(spearman(x, held)) > 1 - 1e-9 for x in (a, b)]
    assert math.isnan(partial) == (any(constant.values()) or any(explained))
    if not math.isnan(partial):
        assert partial == pytest.approx(literal_partial(a, b, held), abs=1e-7)
        assert partial_spearman(b, a, held) == pytest.approx(partial, abs=1e-12)


def test_what_only_length_ties_together_is_independent_at_fixed_length():
    rng = np.random.default_rng(0)
    length = rng.permutation(5000)
    a, b = (length + rng.normal(scale=1000, size=5000) for _ in range(2))
    assert spearman(a, b) > 0.6
    assert abs(partial_spearman(a, b, length)) < 0.1
    assert partial_spearman(a, a + rng.normal(scale=10, size=5000), length) > 0.9


@pytest.mark.parametrize("n", [1, 6])
def test_constant_arrays_have_no_correlation(n):
    flat, steps = np.full(n, 0.1), np.arange(n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(spearman(flat, steps))
        assert math.isnan(spearman(steps, flat))
        for arrays in itertools.product([flat, steps], repeat=3):
            if any(x is flat for x in arrays):
                assert math.isnan(partial_spearman(*arrays))
        assert math.isnan(partial_spearman(steps, steps[::-1] ** 2, steps))  # all explained


# Strata and coresets


def literal_groups(effort, num_strata, hardest_cutoff) -> list:
    strata = stratify(effort, num_strata, hardest_cutoff)
    names = {row: i for i, rows in enumerate(strata.members) for row in rows.tolist()}
    return [names.get(row, "hardest") for row in range(len(effort))]


@pytest.mark.parametrize("seed", range(3))
def test_strata_and_overlaps_are_the_literal_ones(tmp_path, seed):
    rng = np.random.default_rng(seed)
    n = 60
    a_effort = rng.integers(0, 9, n).astype(float)  # ties
    b_effort = a_effort + rng.lognormal(size=n)
    a, b = scores(tmp_path / "a.csv", np.arange(n), a_effort), scores(tmp_path / "b.parquet", np.arange(n), b_effort)
    result = agree(a, b, seed=seed)

    groups = [literal_groups(effort, 5, 0.1) for effort in (a_effort, b_effort)]
    same = [[g[i] == g[j] for i, j in itertools.combinations(range(n), 2)] for g in groups]
    pairs = len(same[0])
    both = sum(x and y for x, y in zip(*same, strict=True))
    in_a, in_b = map(sum, same)
    rand = sum(x == y for x, y in zip(*same, strict=True)) / pairs
    expected = in_a * in_b / pairs
    assert result.rand_index == pytest.approx(rand, abs=1e-12)
    assert result.adjusted_rand_index == pytest.approx((both - expected) / ((in_a + in_b) / 2 - expected), abs=1e-12)
    assert result.spearman == spearman(a_effort, b_effort)
    assert result.partial_spearman is None and "unknown" in format_agreement(result)

    for overlap, rate in zip(result.overlaps, RATES, strict=True):
        m = math.floor(rate * n)
        top_a, top_b = (set(sorted(range(n), key=lambda i: (-effort[i], i))[:m]) for effort in (a_effort, b_effort))
        chosen = []
        for effort in (a_effort, b_effort):
            strata = stratify(effort, 5, 0.1)
            chosen.append(set(choose_staff(effort, strata, [None] * len(strata.members), m, "paper", seed).rows))
        assert (overlap.rate, overlap.m) == (rate, m)
        assert overlap.highest == len(top_a & top_b) / m
        assert overlap.staff == len(chosen[0] & chosen[1]) / m


def test_scores_agree_wholly_with_themselves_on_another_scale(tmp_path):
    effort = np.random.default_rng(0).lognormal(size=200)
    a = scores(tmp_path / "a.csv", np.arange(200), effort, n_response_tokens=np.arange(200) % 7)
    b = scores(tmp_path / "b.csv", np.arange(200), 4 * effort)
    result = agree(a, b)
    assert (result.num_rows, result.rand_index, result.adjusted_rand_index) == (200, 1, 1)
    assert result.spearman == pytest.approx(1) and result.partial_spearman == pytest.approx(1)
    assert [(o.highest, o.staff) for o in result.overlaps] == [(1, 1)] * len(RATES)
    assert all(o.staff_by_chance < 0.95 for o in result.overlaps)


def test_unrelated_scores_share_what_chance_gives(tmp_path):
    rng = np.random.default_rng(1)
    a, b = (scores(tmp_path / f"{i}.csv", np.arange(4000), rng.uniform(size=4000)) for i in range(2))
    result = agree(a, b, num_strata=20)
    assert abs(result.spearman) < 0.06 and abs(result.adjusted_rand_index) < 0.02
    for overlap in result.overlaps:
        tolerance = 4 / math.sqrt(overlap.m)
        assert overlap.highest == pytest.approx(overlap.rate, abs=tolerance)
        assert overlap.staff == pytest.approx(overlap.staff_by_chance, abs=tolerance)


def test_one_stratum_shows_that_one_seed_is_all_that_is_shared(tmp_path):
    rng = np.random.default_rng(1)
    a, b = (scores(tmp_path / f"{i}.csv", np.arange(300), rng.uniform(size=300)) for i in range(2))
    result = agree(a, b, num_strata=1, hardest_cutoff=0.0)
    assert all(o.staff == o.staff_by_chance == 1 for o in result.overlaps)


# Which rows are compared


def test_only_common_rows_count_in_their_own_order(tmp_path):
    rng = np.random.default_rng(2)
    efforts = rng.lognormal(size=(2, 50))
    tokens = rng.integers(1, 30, 50)
    in_a, in_b = rng.permutation(50)[:40], rng.permutation(50)[:45]
    common = np.intersect1d(in_a, in_b)
    cut = agree(
        scores(tmp_path / "a.csv", in_a, efforts[0][in_a], n_response_tokens=tokens[in_a]),
        scores(tmp_path / "b.csv", in_b, efforts[1][in_b], n_response_tokens=tokens[in_b]),
        rates=[0.5],
    )
    alone = agree(
        scores(tmp_path / "c.csv", common, efforts[0][common]),
        scores(tmp_path / "d.csv", common, efforts[1][common], n_response_tokens=tokens[common]),
        rates=[0.5],
    )
    assert cut == alone
    other_way = agree(*(read_scores(tmp_path / f"{name}.csv", ["effort", "n_response_tokens"]) for name in "ba"), [0.5])
    assert other_way.spearman == cut.spearman and other_way.partial_spearman == cut.partial_spearman
    assert cut.num_rows == len(common)
    assert cut.spearman == spearman(efforts[0][common], efforts[1][common])
    assert cut.partial_spearman == partial_spearman(efforts[0][common], efforts[1][common], tokens[common])


def test_a_disagreement_about_tokens_ids_or_rows_is_refused(tmp_path):
    index, effort = np.arange(4), np.arange(4.0)
    a = scores(tmp_path / "a.csv", index, effort, n_response_tokens=[5, 6, 7, 8], id=["a", "b", "c", "d"])
    tokens = scores(tmp_path / "b.csv", index, effort, n_response_tokens=[5, 6, 9, 8])
    with pytest.raises(UserError, match=r"row 2 has n_response_tokens 7 in .*a\.csv and 9 in .*b\.csv"):
        agree(a, tokens, rates=[0.5])
    with pytest.raises(UserError, match=r"row 1 has id b in .*a\.csv and x in"):
        agree(a, scores(tmp_path / "c.csv", index, effort, id=["a", "x", "c", "d"]), rates=[0.5])
    with pytest.raises(UserError, match="no row in common"):
        agree(a, scores(tmp_path / "d.csv", index + 4, effort), rates=[0.5])
    with pytest.raises(UserError, match=r"rate 0\.1 of 4 rows keeps none"):
        agree(a, a, rates=[0.1])


# The script


def test_the_script_reads_folders_and_files(tmp_path):
    rng = np.random.default_rng(3)
    a_effort, b_effort = rng.lognormal(size=(2, 40))
    a = folder(tmp_path / "a", a_effort, "same")
    b = write(tmp_path / "b.csv", {"index": np.arange(30), "effort": b_effort[:30]})
    done = run_script("scripts/agreement.py", a, b, "--rate", 0.5, 0.1, "--num_strata", 4, "--hardest_cutoff", 0.2)
    lines = done.stdout.splitlines()
    expected = agreement(read_scores(a, ["effort", "n_response_tokens"]), read_scores(b), [0.5, 0.1], 4, 0.2, 42)
    assert lines == format_agreement(expected).splitlines()
    assert lines[0].split() == ["rows", "with", "both", "scores", "30"]
    assert f"{partial_spearman(a_effort[:30], b_effort[:30], np.arange(30) % 3):.4f}" in lines[2]
    assert [line.split()[:2] for line in lines[-2:]] == [["0.5", "15"], ["0.1", "3"]]
    assert done.stderr == ""


def test_the_script_refuses_scores_of_different_data(tmp_path):
    a, b = folder(tmp_path / "a", np.arange(1, 9), "one"), folder(tmp_path / "b", np.arange(1, 9), "other")
    done = run_script("scripts/agreement.py", a, b, check=False)
    assert_one_line_error(done, "different data (fingerprints differ)", str(a), str(b))
    assert done.stdout == ""
    assert_one_line_error(run_script("scripts/agreement.py", a, tmp_path / "none", check=False), "no such file")
