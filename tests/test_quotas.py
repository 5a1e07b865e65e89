"""Quotas of data sets: shares of a coreset, the choice inside each data set, and what the coreset file says."""

import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from conftest import baseline_by_rate, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from selection.method.baselines import columns_of, moderate_order
from selection.method.quotas import Quotas, choose_by_rule, shares
from selection.method.staff import (
    RANDOM,
    Strata,
    allocate_budgets,
    choose_staff,
    choose_within_strata,
    coreset_size,
    random_ranks,
    stratify,
)
from selection.rows.split import row_id, training_split
from selection.run.config import Selection, load_experiment
from selection.run.errors import UserError
from selection.run.products import read_json
from selection.scores.coresets import quotas_of
from selection.scores.folder import Scores

by_property = settings(max_examples=60, deadline=None)
METHODS = ["random", "length", "grand", "el2n", "ccs", "moderate", "entropy", "staff", "staff released"]


@st.composite
def quota_cases(draw) -> tuple[Quotas, float]:
    """Data sets of any sizes, quotas that can be met and that cannot, and a rate."""
    sizes = draw(st.lists(st.integers(0, 60), min_size=2, max_size=5).filter(any))
    tenths = [draw(st.integers(0, 10)) for _ in sizes]
    while sum(tenths) > 10:
        tenths[tenths.index(max(tenths))] -= 1
    if draw(st.booleans()) and all(tenths):
        tenths[-1] += 10 - sum(tenths)
    quotas = [tenth / 10 if tenth else None for tenth in tenths]
    if None not in quotas and sum(tenths) < 10:
        quotas[draw(st.integers(0, len(sizes) - 1))] = None
    data_set = np.repeat(np.arange(len(sizes)), sizes)
    np.random.default_rng(draw(st.integers(0, 99))).shuffle(data_set)
    rate = draw(st.integers(math.ceil(100 / len(data_set)), 100)) / 100
    return Quotas([f"set{i}" for i in range(len(sizes))], quotas, sizes, data_set), rate


@by_property
@given(quota_cases())
def test_shares_sum_to_m_and_are_the_floors_of_the_quotas(case):
    quotas, rate = case
    m, sizes = coreset_size(rate, len(quotas.data_set)), quotas.num_rows
    wanted = {j: math.floor(Fraction(str(quota)) * m) for j, quota in enumerate(quotas.quotas) if quota}
    free = [j for j in range(len(sizes)) if j not in wanted]
    rest, room = m - sum(wanted.values()), sum(sizes[j] for j in free)
    if over := [j for j, count in wanted.items() if count > sizes[j]]:
        said = f"asks for {wanted[over[0]]} rows of data set set{over[0]}.* {sizes[over[0]]} to"
        with pytest.raises(ValueError, match=said):
            shares(quotas, m)
    elif free and rest > room:
        with pytest.raises(ValueError, match=f"leave {rest} rows of a coreset of {m} to .* with {room} to choose from"):
            shares(quotas, m)
    else:
        got = shares(quotas, m)
        assert sum(count for _, count in got) == m
        assert sorted(j for together, _ in got for j in together) == list(range(len(sizes)))
        for together, count in got:
            assert count <= sum(sizes[j] for j in together)
            floor = rest if together == free else wanted[together[0]]
            assert count == floor if free else count >= floor


def test_rows_that_the_floors_leave_over_go_to_the_largest_fractions():
    def of(quotas: list[float], sizes: list[int], m: int) -> list[int]:
        got = shares(Quotas(["a", "b", "c"], quotas, sizes, np.repeat([0, 1, 2], sizes)), m)
        assert [together for together, _ in got] == [[0], [1], [2]]
        return [count for _, count in got]

    assert of([0.25, 0.5, 0.25], [10, 10, 10], 7) == [2, 3, 2]
    assert of([0.2, 0.3, 0.5], [10, 10, 10], 11) == [2, 3, 6]
    assert of([0.1, 0.29, 0.61], [1, 3, 26], 13) == [1, 3, 9]  # the second has no more to give than its floor


def columns_for(method: str, num_rows: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    every = {
        "n_response_tokens": rng.integers(1, 20, num_rows).astype(float),
        "hidden_state": rng.normal(size=(num_rows, 3)).astype(np.float32),
    }
    return {name: every.get(name, rng.integers(0, 30, num_rows) / 7) for name in columns_of(method, "published")}


def strata_of(num_rows: int, seed: int) -> tuple[np.ndarray, Strata, list[float]]:
    """Scores, strata and verification ratios."""
    scores = np.random.default_rng(seed).integers(0, 30, num_rows) / 7
    strata = stratify(scores, 4, 0.1)
    return scores, strata, [0.5 + i / 3 for i in range(len(strata.members))]


def rule_of(method: str, num_rows: int, seed: int, quotas: Quotas | None):
    """The method's coreset by rate."""
    if not method.startswith("staff"):
        selection = Selection(num_strata=4, seed=seed)
        return baseline_by_rate(method, columns_for(method, num_rows, seed), num_rows, selection, quotas)
    scores, strata, ratios = strata_of(num_rows, seed)
    mode = "released" if "released" in method else "paper"

    def rule(m: int, within):
        return choose_staff(scores, strata.within(within), ratios, m, mode, seed)

    return lambda rate: choose_by_rule(rule, rate, num_rows, quotas)


@pytest.mark.parametrize("method", METHODS)
@by_property
@given(quota_cases(), st.integers(0, 3))
def test_a_coreset_with_quotas_takes_of_each_data_set_its_share(method, case, seed):
    quotas, rate = case
    num_rows = len(quotas.data_set)
    m, choose = coreset_size(rate, num_rows), rule_of(method, num_rows, seed, quotas)
    try:
        wanted = shares(quotas, m) if any(quotas.quotas) else [(list(range(len(quotas.names))), m)]
    except ValueError as error:
        with pytest.raises(ValueError) as refusal:
            choose(rate)
        assert str(refusal.value) == str(error)
        return
    choice = choose(rate)
    assert len(choice.rows) == m and (np.diff(choice.rows) > 0).all()
    for together, count in wanted:
        assert np.isin(quotas.data_set[choice.rows], together).sum() == count
    counts = np.bincount(quotas.data_set[choice.rows], minlength=len(quotas.names)).tolist()
    assert [entry["chosen"] for entry in quotas.record(choice.rows)] == counts
    if choice.budgets:
        assert sum(choice.budgets) + choice.from_hardest == m
        assert np.isin(choice.fill, choice.rows).all() and len(choice.fill) == sum(choice.filled)
    # Without quotas data sets change nothing.
    plain, other = (
        rule_of(method, num_rows, seed, each)(rate)
        for each in (None, Quotas(quotas.names, [None] * len(quotas.names), quotas.num_rows, quotas.data_set))
    )
    assert plain.rows.tolist() == other.rows.tolist()
    assert (plain.budgets, plain.filled) == (other.budgets, other.filled)
    # A method that is one order over all rows takes each data set's first.
    orders = {
        "random": lambda: np.argsort(random_ranks(num_rows, seed, RANDOM)),
        "grand": lambda: np.argsort(-columns_for(method, num_rows, seed)["effort"], kind="stable"),
        "moderate": lambda: moderate_order(columns_for(method, num_rows, seed)["hidden_state"]),
    }
    if method in orders:
        order = orders[method]()
        first = [order[np.isin(quotas.data_set[order], together)][:count] for together, count in wanted]
        assert choice.rows.tolist() == sorted(np.concatenate(first).tolist())


@pytest.mark.parametrize("mode", ["paper", "released"])
@by_property
@given(st.integers(0, 30), st.integers(2, 10))
def test_staff_inside_a_data_set_is_staff_on_its_rows_of_the_strata(mode, seed, tenths):
    """Against a literal Algorithm 1 on the strata's rows of each data set."""
    rate, num_rows = tenths / 25, 80
    data_set = np.random.default_rng(seed).integers(0, 2, num_rows)
    quotas = Quotas(["a", "b"], [0.3, None], np.bincount(data_set, minlength=2).tolist(), data_set)
    scores, strata, ratios = strata_of(num_rows, seed)
    choice = rule_of("staff" if mode == "paper" else "staff released", num_rows, seed, quotas)(rate)
    m = coreset_size(rate, num_rows)
    first, budgets = math.floor(Fraction(3, 10) * m), np.zeros(len(strata.members), dtype=int)
    for number, size in ((0, first), (1, m - first)):
        inside = [rows[data_set[rows] == number] for rows in strata.members]
        full = [i for i, rows in enumerate(inside) if len(rows)]  # empty strata vanish
        hardest = strata.hardest[data_set[strata.hardest] == number]
        here = Strata([inside[i] for i in full], [strata.score_ranges[i] for i in full], hardest)
        given = allocate_budgets(here.sizes, [ratios[i] for i in full], size, mode)
        part = choose_within_strata(scores, here, given, size, mode, seed)
        assert np.array_equal(part.rows, choice.rows[data_set[choice.rows] == number])
        budgets[full] += part.budgets
    assert choice.budgets == budgets.tolist()


# In a run


@pytest.fixture
def two_sets(make_experiment, rows, tmp_path):
    """A configuration of data sets a (7 rows) and late (23 rows, quota 0.75), and whether each training row is of a."""
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in (("a", rows[:7]), ("b", rows[7:]))]
    config = make_experiment([], dataset=[{"path": paths[0]}, {"path": paths[1], "name": "late", "quota": 0.75}])
    of_a = {row_id(row) for row in rows[:7]}
    return config, [each in of_a for each in training_split(load_experiment(config)).ids]


def test_which_data_set_a_row_is_of(two_sets, make_experiment, rows, tmp_path):
    config, in_a = two_sets

    def of(experiment, left_out: tuple[int, ...] = (), num_rows: int = 24) -> Quotas | None:
        index = np.array([i for i in range(num_rows) if i not in left_out])
        return quotas_of(experiment, Scores(index, {}, None, None, 24, "scores", np.array(left_out, dtype=int)))

    experiment = load_experiment(config)
    quotas, without = of(experiment), of(experiment, (3,))  # a row that scoring left out
    assert quotas.data_set.tolist() == [0 if each else 1 for each in in_a]
    assert without.data_set.tolist() == np.delete(quotas.data_set, 3).tolist()
    assert without.num_rows == quotas.num_rows == [sum(in_a), 24 - sum(in_a)]
    with pytest.raises(UserError, match="scores has 23 rows, the training split 24"):
        of(experiment, num_rows=23)
    one = load_experiment(make_experiment(rows, "one", output_dir=str(tmp_path / "one")))
    assert of(one) is None and of(None) is None


def test_the_coreset_file_says_what_each_data_set_gave(stage, two_sets, make_experiment, rows, tmp_path):
    config, in_a = two_sets
    scores = tmp_path / "scores.csv"
    effort = np.random.default_rng(0).lognormal(size=24)
    pa.csv.write_csv(pa.table({"index": np.arange(24), "effort": effort}), scores)

    def cut(config, *arguments) -> tuple[int, str, str]:
        return stage("selection.coreset", config, "--scores", scores, "--target_scores", scores, *arguments)

    assert cut(config, "--method", "staff", "grand", "random", "--rate", 0.4)[0] == 0
    for method in ("staff", "grand", "random"):
        record = read_json(tmp_path / "run" / "coresets" / f"{method}-0.4.json")
        assert record["size"] == len(record["indices"]) == 9
        from_a = sum(in_a[i] for i in record["indices"])
        assert record["data_sets"] == [
            {"name": "a", "rows": sum(in_a), "chosen": from_a, "quota": None},
            {"name": "late", "rows": 24 - sum(in_a), "chosen": 9 - from_a, "quota": 0.75},
        ]
        assert from_a == 3  # 9 − ⌊0.75 · 9⌋
    code, _, said = cut(config, "--method", "grand", "--rate", 1.0)
    few = f"leave 6 rows of a coreset of 24 to data set a, with {sum(in_a)} to choose from"
    assert code == 2 and (few if sum(in_a) < 6 else "asks for 18 rows of data set late, which has 17") in said
    assert not (tmp_path / "run" / "coresets" / "grand-1.json").exists()
    one = make_experiment(rows, "one", output_dir=str(tmp_path / "one"))
    training_split(load_experiment(one))
    assert cut(one, "--method", "grand", "--rate", 0.4)[0] == 0
    assert "data_sets" not in read_json(tmp_path / "one" / "coresets" / "grand-0.4.json")
