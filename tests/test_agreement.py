"""Agreement of two sets of scores: against literal versions, by property, and through the script."""

import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from selection.method.staff import stratify
from selection.report.agreement import agreement, correlation_interval, partial_spearman, spearman
from selection.run.errors import UserError
from selection.scores.folder import read_scores

RATES = [0.8, 0.25, 0.05]
COLUMNS = ["effort", "n_response_tokens"]


@pytest.fixture
def scores(tmp_path):
    """A function that writes scores to a new file and reads them."""
    numbers = itertools.count()

    def scores(effort, index=None, ending="csv", **columns):
        path = tmp_path / f"{next(numbers)}.{ending}"
        index = np.arange(len(effort)) if index is None else index
        table = pd.DataFrame({"index": index, "effort": np.asarray(effort, dtype=float)} | columns)
        table.to_parquet(path) if ending == "parquet" else table.to_csv(path, index=False)
        return read_scores(path, ["effort", *(name for name in columns if name != "id")])

    return scores


def agree(a, b, rates=RATES, num_strata=5, hardest_cutoff=0.1, seed=3):
    return agreement(a, b, rates, num_strata, hardest_cutoff, seed)


def literal_ranks(values) -> np.ndarray:
    """1 + how many are smaller + half of the others that are equal."""
    return np.array([1 + sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values])


def literal_partial(a, b, given) -> float:
    line = np.stack([np.ones(len(a)), literal_ranks(given)], 1)
    left = [(r := literal_ranks(x)) - line @ np.linalg.lstsq(line, r, rcond=None)[0] for x in (a, b)]
    return float(np.corrcoef(*left)[0, 1])


three_arrays = (st.just(1) | st.integers(5, 40)).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 12), min_size=n, max_size=n).map(np.array)] * 3)
)


@pytest.mark.parametrize(("r", "n"), [(0.0, 12), (0.4, 30), (0.9, 200)])
def test_the_interval_of_a_correlation_holds_that_of_the_population_in_about_95_of_100_samples(r, n):
    rng = np.random.default_rng(0)
    plain = partial = 0
    for _ in range(500):
        x, y = rng.multivariate_normal([0, 0], [[1, r], [r, 1]], n).T
        length, spearmans = rng.normal(size=n), 6 / np.pi * np.arcsin(r / 2)
        low, high = correlation_interval(spearman(x, y), n)
        plain += low <= spearmans <= high
        low, high = correlation_interval(partial_spearman(x, y, length), n, given=1)
        partial += low <= spearmans <= high
    assert 0.92 <= plain / 500 <= 0.975 and 0.92 <= partial / 500 <= 0.975
    assert np.isnan(correlation_interval(r, 9)).all() and np.isnan(correlation_interval(np.nan, 99)).all()
    assert correlation_interval(1.0, 10) == pytest.approx((1, 1))


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


def test_strata_and_overlaps_are_the_literal_ones(scores):
    seed, n = 2, 60
    rng = np.random.default_rng(seed)
    efforts = [rng.integers(0, 9, n).astype(float)]  # ties
    efforts.append(efforts[0] + rng.lognormal(size=n))
    result = agree(scores(efforts[0]), scores(efforts[1], ending="parquet"), seed=seed)
    strata = [stratify(effort, 5, 0.1) for effort in efforts]
    groups = [{row: i for i, rows in enumerate(each.members) for row in rows} for each in strata]
    same = [[g.get(i) == g.get(j) for i, j in itertools.combinations(range(n), 2)] for g in groups]
    assert result.rand_index == pytest.approx(np.mean([x == y for x, y in zip(*same, strict=True)]), abs=1e-12)
    assert result.spearman == spearman(*efforts) and result.partial_spearman is None
    for overlap, rate in zip(result.overlaps, RATES, strict=True):
        m = math.floor(rate * n)
        top = [set(sorted(range(n), key=lambda i: (-effort[i], i))[:m]) for effort in efforts]
        assert [overlap.rate, overlap.m, overlap.highest] == [rate, m, len(set.intersection(*top)) / m]


def test_scores_agree_wholly_with_themselves_rescaled_and_with_unrelated_ones_as_chance_gives(scores):
    effort = np.random.default_rng(0).lognormal(size=200)
    result = agree(scores(effort, n_response_tokens=np.arange(200) % 7), scores(4 * effort))
    found = [result.rand_index, result.adjusted_rand_index, result.spearman, result.partial_spearman]
    assert result.num_rows == 200 and found == pytest.approx([1] * 4)
    assert all((o.highest, o.staff) == (1, 1) and o.staff_by_chance < 0.95 for o in result.overlaps)

    a, b = (scores(each) for each in np.random.default_rng(1).uniform(size=(2, 4000)))
    result = agree(a, b, num_strata=20)
    assert abs(result.spearman) < 0.06 and abs(result.adjusted_rand_index) < 0.02
    for o in result.overlaps:
        assert [o.highest, o.staff] == pytest.approx([o.rate, o.staff_by_chance], abs=4 / math.sqrt(o.m))
    # One seed is all that coresets of one stratum share.
    result = agree(a, b, num_strata=1, hardest_cutoff=0.0)
    assert all(o.staff == o.staff_by_chance == 1 for o in result.overlaps)


def test_only_common_rows_count_in_their_own_order(scores):
    rng = np.random.default_rng(2)
    efforts, tokens = rng.lognormal(size=(2, 50)), rng.integers(1, 30, 50)
    in_a, in_b = rng.permutation(50)[:40], rng.permutation(50)[:45]
    common = np.intersect1d(in_a, in_b)
    a, b = (scores(e[at], at, n_response_tokens=tokens[at]) for e, at in zip(efforts, (in_a, in_b), strict=True))
    cut, back = agree(a, b), agree(b, a)
    alone = scores(efforts[0][common], common), scores(efforts[1][common], common, n_response_tokens=tokens[common])
    assert cut == agree(*alone) and cut.num_rows == len(common)
    assert (back.spearman, back.partial_spearman) == (cut.spearman, cut.partial_spearman)
    assert cut.partial_spearman == partial_spearman(*efforts[:, common], tokens[common])


def test_a_disagreement_about_tokens_ids_or_rows_is_refused(scores):
    effort = np.arange(4.0)
    a = scores(effort, n_response_tokens=[5, 6, 7, 8], id=["a", "b", "c", "d"])
    tokens = scores(effort, n_response_tokens=[5, 6, 9, 8])
    for other, said in (
        (tokens, r"row 2 has n_response_tokens 7 in .*0\.csv and 9 in .*1\.csv"),
        (scores(effort, id=["a", "x", "c", "d"]), r"row 1 has id b in .*0\.csv and x in"),
        (scores(effort, np.arange(4, 8)), "no row in common"),
        (a, r"rate 0\.05 of 4 rows keeps none"),
    ):
        with pytest.raises(UserError, match=said):
            agree(a, other)


def test_the_script_reads_folders_and_files(finished_run, scores):
    small, target = (read_scores(p, COLUMNS) for p in (finished_run.small_scores, finished_run.target_scores))
    other = scores(np.random.default_rng(3).lognormal(size=30))
    options = ["--rate", 0.5, 0.1, "--num_strata", 4, "--hardest_cutoff", 0.2]
    for b, path in ((target, finished_run.target_scores), (other, other.source)):
        done = run_script("scripts/agreement.py", finished_run.small_scores, path, *options)
        found = agreement(small, b, [0.5, 0.1], 4, 0.2, 42)
        lines = [line.split() for line in done.stdout.splitlines()]
        figures = (found.spearman, found.partial_spearman, found.rand_index, found.adjusted_rand_index)
        assert [line[-1] for line in lines[:5]] == [str(len(b.index)), *(f"{value:.4f}" for value in figures)]
        for line, o in zip(lines[-2:], found.overlaps, strict=True):
            assert line[1:] == [f"{o.m}", *(f"{x:.3f}" for x in (o.highest, o.rate, o.staff, o.staff_by_chance))]
    with pytest.raises(UserError, match=r"different data \(fingerprints differ\)"):
        agree(small, replace(target, fingerprint="other"))
