"""Quotas of data sets: shares of a coreset, the choice inside each data set, and what the coreset file says."""

import math
import re
from fractions import Fraction
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from conftest import baseline_by_rate, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from selection.method.baselines import columns_of
from selection.method.quotas import Quotas, choose_by_rule, shares
from selection.method.staff import Strata, choose_staff, coreset_size, stratify
from selection.rows.split import row_id, training_split
from selection.run.config import Selection, load_experiment
from selection.run.errors import UserError
from selection.run.products import read_json
from selection.scores.coresets import quotas_of
from selection.scores.folder import Scores

by_property = settings(max_examples=60, deadline=None)


@st.composite
def quota_cases(draw) -> tuple[Quotas, float]:
    """Data sets of any sizes, quotas that can be met and that cannot, and a rate."""
    sizes = draw(st.lists(st.integers(0, 60), min_size=2, max_size=5).filter(any))
    tenths = [draw(st.integers(0, 10)) for _ in sizes]
    while sum(tenths) > 10:
        tenths[tenths.index(max(tenths))] -= 1
    if sum(tenths) < 10 and all(tenths):  # quotas of all data sets sum up to 1
        tenths[-1] = 10 - sum(tenths[:-1]) if draw(st.booleans()) else 0
    data_set = np.random.default_rng(draw(st.integers(0, 99))).permutation(np.repeat(np.arange(len(sizes)), sizes))
    rate = draw(st.integers(math.ceil(100 / len(data_set)), 100)) / 100
    quotas = [tenth / 10 if tenth else None for tenth in tenths]
    return Quotas([f"set{i}" for i in range(len(sizes))], quotas, sizes, data_set), rate


@by_property
@given(quota_cases())
def test_shares_sum_to_m_and_are_the_floors_of_the_quotas(case):
    quotas, rate = case
    m, sizes = coreset_size(rate, len(quotas.data_set)), quotas.num_rows
    wanted = {j: math.floor(Fraction(str(quota)) * m) for j, quota in enumerate(quotas.quotas) if quota}
    free = [j for j in range(len(sizes)) if j not in wanted]
    rest, room = m - sum(wanted.values()), sum(sizes[j] for j in free)
    if any(count > sizes[j] for j, count in wanted.items()) or (free and rest > room):
        with pytest.raises(ValueError, match=r"asks for \d+ rows of data set set|of a coreset of .* to choose from"):
            shares(quotas, m)
        return
    got = shares(quotas, m)
    assert sum(count for _, count in got) == m
    assert sorted(j for together, _ in got for j in together) == list(range(len(sizes)))
    for together, count in got:
        assert count <= sum(sizes[j] for j in together)
        floor = rest if together == free else wanted[together[0]]
        assert count == floor if free else count >= floor


def test_rows_that_the_floors_leave_over_go_to_the_largest_fractions():
    scarce = [0.1, 0.29, 0.61], [1, 3, 26], 13, [1, 3, 9]  # the second has no more to give than its floor
    for quotas, sizes, m, expected in (([0.2, 0.3, 0.5], [10, 10, 10], 11, [2, 3, 6]), scarce):
        got = shares(Quotas(["a", "b", "c"], quotas, sizes, np.repeat([0, 1, 2], sizes)), m)
        assert got == [([j], count) for j, count in enumerate(expected)]


def strata_of(num_rows: int, seed: int) -> tuple[np.ndarray, Strata, list[float]]:
    scores = np.random.default_rng(seed).integers(1, 30, num_rows) / 7
    strata = stratify(scores, 4, 0.1)
    return scores, strata, [0.5 + i / 3 for i in range(len(strata.members))]


def rule_of(method: str, num_rows: int, seed: int, quotas: Quotas | None):
    """The method's coreset by rate."""
    scores, strata, ratios = strata_of(num_rows, seed)
    if method in ("paper", "released"):  # STAFF

        def rule(m: int, within):
            return choose_staff(scores, strata.within(within), ratios, m, method, seed)

        return lambda rate: choose_by_rule(rule, coreset_size(rate, num_rows), quotas)
    columns = {name: scores for name in columns_of(method, "published")}
    if method == "moderate":
        columns = {"hidden_state": np.random.default_rng(seed).normal(size=(num_rows, 3))}
    return baseline_by_rate(method, columns, num_rows, Selection(num_strata=4, seed=seed), quotas)


@pytest.mark.parametrize("method", ["random", "length", "grand", "moderate", "paper", "released"])
@by_property
@given(quota_cases(), st.integers(0, 3))
def test_a_coreset_with_quotas_takes_of_each_data_set_its_share(method, case, seed):
    quotas, rate = case
    num_rows = len(quotas.data_set)
    m, choose = coreset_size(rate, num_rows), rule_of(method, num_rows, seed, quotas)
    try:
        wanted = shares(quotas, m) if any(quotas.quotas) else [(list(range(len(quotas.names))), m)]
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            choose(rate)
        return
    choice = choose(rate)
    assert len(choice.rows) == m and (np.diff(choice.rows) > 0).all()
    for together, count in wanted:
        assert np.isin(quotas.data_set[choice.rows], together).sum() == count
    counts = np.bincount(quotas.data_set[choice.rows], minlength=len(quotas.names)).tolist()
    assert [entry["chosen"] for entry in quotas.record(choice.rows)] == counts
    assert not choice.budgets or sum(choice.budgets) + choice.from_hardest == m
    if method == "grand":  # one order over all rows: of each data set the first are taken
        order = np.argsort(-strata_of(num_rows, seed)[0], kind="stable")
        first = [order[np.isin(quotas.data_set[order], together)][:count] for together, count in wanted]
        assert choice.rows.tolist() == sorted(np.concatenate(first).tolist())


@pytest.mark.parametrize("mode", ["paper", "released"])
@by_property
@given(st.integers(0, 30), st.integers(2, 10))
def test_staff_inside_a_data_set_is_staff_on_its_rows_of_the_strata(mode, seed, tenths):
    rate, num_rows = tenths / 25, 80
    data_set = np.random.default_rng(seed).integers(0, 2, num_rows)
    quotas = Quotas(["a", "b"], [0.3, None], np.bincount(data_set, minlength=2).tolist(), data_set)
    scores, strata, ratios = strata_of(num_rows, seed)
    choice, m = rule_of(mode, num_rows, seed, quotas)(rate), coreset_size(rate, num_rows)
    first, budgets = math.floor(Fraction(3, 10) * m), np.zeros(len(strata.members), dtype=int)
    for number, size in ((0, first), (1, m - first)):
        inside = [rows[data_set[rows] == number] for rows in strata.members]
        full = [i for i, rows in enumerate(inside) if len(rows)]  # empty strata vanish
        hardest = strata.hardest[data_set[strata.hardest] == number]
        here = Strata([inside[i] for i in full], [strata.score_ranges[i] for i in full], hardest)
        part = choose_staff(scores, here, [ratios[i] for i in full], size, mode, seed)
        assert np.array_equal(part.rows, choice.rows[data_set[choice.rows] == number])
        budgets[full] += part.budgets
    assert choice.budgets == budgets.tolist()


@pytest.fixture
def two_sets(make_experiment, rows, tmp_path):
    """A configuration of data sets a and late (quota 0.75), and whether each training row is of a."""
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in (("a", rows[:7]), ("b", rows[7:]))]
    config = make_experiment([], dataset=[{"path": paths[0]}, {"path": paths[1], "name": "late", "quota": 0.75}])
    of_a = {row_id(row) for row in rows[:7]}
    return config, [each in of_a for each in training_split(load_experiment(config)).ids]


def test_which_data_set_a_row_is_of(two_sets):
    experiment, in_a = load_experiment(two_sets[0]), two_sets[1]

    def of(experiment, num_rows: int, *left_out: int) -> Quotas | None:
        index, gone = np.setdiff1d(np.arange(num_rows), left_out), np.array(left_out, dtype=int)
        return quotas_of(experiment, Scores(index, {}, None, None, 24, "scores", gone))

    quotas, without = of(experiment, 24), of(experiment, 24, 3)  # a row that scoring left out
    assert quotas.data_set.tolist() == [0 if each else 1 for each in in_a]
    assert without.data_set.tolist() == np.delete(quotas.data_set, 3).tolist()
    assert without.num_rows == quotas.num_rows == [sum(in_a), 24 - sum(in_a)]
    with pytest.raises(UserError, match="scores has 23 rows, the training split 24"):
        of(experiment, 23)
    assert of(None, 24) is None


def test_the_coreset_file_says_what_each_data_set_gave(stage, two_sets, tmp_path):
    (config, in_a), scores = two_sets, tmp_path / "scores.csv"
    pa.csv.write_csv(pa.table({"index": np.arange(24), "effort": np.random.default_rng(0).lognormal(size=24)}), scores)

    cut = partial(stage, "selection.coreset", config, "--scores", scores, "--target_scores", scores)
    assert cut("--method", "staff", "random", "--rate", 0.4)[0] == 0
    for method in ("staff", "random"):
        record = read_json(tmp_path / "run" / "coresets" / f"{method}-0.4.json")
        assert record["size"] == len(record["indices"]) == 9
        assert sum(in_a[i] for i in record["indices"]) == 3  # 9 − ⌊0.75 · 9⌋
        assert record["data_sets"] == [
            {"name": "a", "rows": sum(in_a), "chosen": 3, "quota": None},
            {"name": "late", "rows": 24 - sum(in_a), "chosen": 6, "quota": 0.75},
        ]
    code, _, said = cut("--method", "grand", "--rate", 1.0)
    assert code == 2 and re.search("of a coreset of 24 to data set a, with|asks for 18 rows of data set late", said)
