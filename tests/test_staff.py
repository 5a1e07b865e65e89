"""Strata, verification ratios, budgets and the choice of rows: by property, by hand and against a literal reference."""

import json
import math
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from selection.method.staff import (
    Strata,
    allocate_budgets,
    choose_lowest,
    choose_staff,
    coreset_size,
    draw_verification_samples,
    min_max_normalise,
    random_keys,
    smallest_first,
    stratify,
    verification_ratio,
)
from selection.run.errors import UserError
from selection.scores.folder import Scores
from selection.scores.verification import Settings, read_verification, verify, write_verification

by_property = settings(max_examples=100, deadline=None)
both_modes = pytest.mark.parametrize("mode", ["paper", "released"])
modes = st.sampled_from(["paper", "released"])


@st.composite
def score_arrays(draw, max_size=150) -> np.ndarray:
    """Ties, constants, long tails, and integers, which a scaling by 2 and small shifts leave exact."""
    size = draw(st.integers(1, max_size))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["constant", "ties", "integers", "lognormal", "one outlier"]))
    if kind == "constant":
        return np.full(size, draw(st.sampled_from([0.0, 0.1, 7.0, 1e-9])))
    if kind == "ties":
        return rng.integers(0, 4, size).astype(np.float64)
    if kind == "integers":
        return rng.integers(0, 1000, size).astype(np.float64)
    scores = rng.lognormal(sigma=2, size=size)
    if kind == "one outlier":
        scores[rng.integers(size)] *= 1e12
    return scores


@dataclass
class Case:
    """One call of choose_staff, with the rate as an exact fraction beside it."""

    scores: np.ndarray
    strata: Strata
    ratios: list[float | None]
    exact_rate: Fraction
    mode: str
    seed: int

    @property
    def m(self) -> int:
        return math.floor(self.exact_rate * len(self.scores))

    def choose(self):
        return choose_staff(self.scores, self.strata, self.ratios, float(self.exact_rate), self.mode, self.seed)


@st.composite
def cases(draw) -> Case:
    scores = draw(score_arrays())
    percent = draw(st.integers(math.ceil(100 / len(scores)), 100))
    mode, seed = draw(modes), draw(st.integers(0, 10))
    strata = stratify(scores, draw(st.integers(1, 60)), draw(st.sampled_from([0.0, 0.1, 0.3, 0.9])))
    draws = draw_verification_samples(strata, draw(st.integers(1, 20)), mode, seed)
    rng = np.random.default_rng(seed)
    ratios = [float(rng.lognormal(sigma=3)) if len(rows) else None for rows in draws]
    return Case(scores, strata, ratios, Fraction(percent, 100), mode, seed)


def choose_random(num_rows: int, rate: float, seed: int):
    return choose_lowest(random_keys(num_rows, seed), coreset_size(rate, num_rows))


def in_stratum(rows: np.ndarray, strata: Strata, i: int) -> list[int]:
    return np.intersect1d(rows, strata.members[i]).tolist()


# Coreset size


@by_property
@given(st.integers(1, 10_000), st.integers(1, 10**6))
def test_coreset_size_is_the_floor_of_the_decimal_product(numerator, num_rows):
    exact = math.floor(Fraction(numerator, 10_000) * num_rows)
    assume(exact >= 1)
    assert coreset_size(numerator / 10_000, num_rows) == exact


def test_coreset_size_where_floats_fall_short():
    assert math.floor(0.29 * 100) == 28
    assert coreset_size(0.29, 100) == 29


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0000001, 1.5, math.nan, math.inf, -math.inf])
def test_rate_outside_0_to_1_is_refused(rate):
    with pytest.raises(UserError, match="outside"):
        coreset_size(rate, 100)


def test_rate_that_keeps_no_row_is_refused_and_the_least_one_is_named():
    with pytest.raises(UserError, match=r"0\.01 or more"):
        coreset_size(0.009, 100)


# Strata


@by_property
@given(score_arrays(), st.integers(1, 60), st.sampled_from([0.0, 0.1, 0.3, 0.9]))
def test_strata_and_hardest_part_the_rows_by_equal_widths(scores, num_strata, cutoff):
    strata = stratify(scores, num_strata, cutoff)
    assert sorted(np.concatenate([*strata.members, strata.hardest])) == list(range(len(scores)))
    assert len(strata.hardest) == math.floor(Fraction(str(cutoff)) * len(scores))
    kept = scores[np.concatenate(strata.members)]
    assert np.all(scores[strata.hardest] >= kept.max())
    assert 1 <= len(strata.members) <= num_strata
    assert 0 not in strata.sizes
    span = kept.max() - kept.min()
    rounding = 1e-9 * kept.max()
    for rows, (low, high) in zip(strata.members, strata.score_ranges, strict=True):
        assert np.all(np.diff(rows) > 0)
        assert low - rounding <= scores[rows].min() and scores[rows].max() <= high + rounding
        assert abs((high - low) - span / num_strata) <= rounding
    highs_and_lows = zip(strata.members[:-1], strata.members[1:], strict=True)
    assert all(scores[easier].max() <= scores[harder].min() for easier, harder in highs_and_lows)


def reference_strata(scores: list[int], num_strata: int, cutoff: Fraction) -> list[list[int]]:
    """Step 3 word by word, in fractions."""
    easiest_first = sorted(range(len(scores)), key=lambda row: (scores[row], row))
    kept = sorted(easiest_first[: len(scores) - math.floor(cutoff * len(scores))])
    low, high = min(scores[row] for row in kept), max(scores[row] for row in kept)
    if low == high:
        return [kept]
    width = Fraction(high - low, num_strata)
    strata = [[] for _ in range(num_strata)]
    for row in kept:
        strata[min(math.floor((scores[row] - low) / width), num_strata - 1)].append(row)
    return [rows for rows in strata if rows]


@by_property
@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=80),
    st.sampled_from([1, 2, 4, 8, 16, 64]),  # powers of two: floats put a score on an edge where fractions do
    st.sampled_from(["0", "0.1", "0.29", "0.5"]),
)
def test_strata_are_those_of_the_reference(scores, num_strata, cutoff):
    strata = stratify(np.array(scores, dtype=np.float64), num_strata, float(cutoff))
    assert [rows.tolist() for rows in strata.members] == reference_strata(scores, num_strata, Fraction(cutoff))


def test_strata_by_hand():
    # ⌊0.25 · 8⌋ = 2 rows go: row 7 (score 90) and, of the three with 8, the latest (row 5). The rest spans 0 to 8:
    # K = 4 strata are 2 wide, [0, 2), [2, 4), [4, 6), [6, 8]; [4, 6) is empty and vanishes.
    strata = stratify(np.array([8.0, 0.0, 2.0, 8.0, 1.0, 8.0, 3.0, 90.0]), 4, 0.25)
    assert [rows.tolist() for rows in strata.members] == [[1, 4], [2, 6], [0, 3]]
    assert strata.score_ranges == [(0.0, 2.0), (2.0, 4.0), (6.0, 8.0)]
    assert strata.hardest.tolist() == [5, 7]
    assert smallest_first(strata.sizes) == [0, 1, 2]


# Draws for verification


@by_property
@given(score_arrays(), st.integers(1, 60), st.integers(1, 20), modes)
def test_at_most_b_v_rows_of_each_stratum_are_drawn(scores, num_strata, verify_per_stratum, mode):
    strata = stratify(scores, num_strata, 0.1)
    draws = draw_verification_samples(strata, verify_per_stratum, mode, seed=0)
    assert sum(map(len, draws)) <= num_strata * verify_per_stratum
    for drawn, rows in zip(draws, strata.members, strict=True):
        assert np.all(np.diff(drawn) > 0) and np.isin(drawn, rows).all()
        small_and_released = mode == "released" and len(rows) <= verify_per_stratum
        assert len(drawn) == (0 if small_and_released else min(verify_per_stratum, len(rows)))


def test_every_row_of_a_stratum_is_drawn_about_equally_often():
    strata = Strata([np.arange(20)], [(0.0, 1.0)], np.arange(0))
    draws = [draw_verification_samples(strata, 5, "paper", seed)[0] for seed in range(400)]
    counts = np.bincount(np.concatenate(draws), minlength=20)  # 100 expected, standard deviation below 9
    assert counts.min() > 60 and counts.max() < 140


@both_modes
def test_draws_repeat_under_a_seed_and_change_with_it(mode):
    strata = stratify(np.random.default_rng(0).lognormal(size=1000), 10, 0.1)
    first, again, other = (np.concatenate(draw_verification_samples(strata, 5, mode, seed)) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


def test_draws_and_choice_in_a_stratum_do_not_depend_on_the_other_strata():
    scores = np.arange(160.0)
    one = Strata([np.arange(20), np.arange(20, 60)], [(0.0, 1.0)] * 2, np.arange(60, 160))
    other = Strata(
        [np.arange(20), np.arange(100, 140)], [(0.0, 1.0)] * 2, np.setdiff1d(np.arange(20, 160), np.arange(100, 140))
    )
    draws = [draw_verification_samples(strata, 10, "paper", seed=3)[0].tolist() for strata in (one, other)]
    assert draws[0] == draws[1]
    chosen = [choose_staff(scores, strata, [1.0, 1.0], 0.1, "paper", seed=3) for strata in (one, other)]
    assert [choice.budgets for choice in chosen] == [[8, 8], [8, 8]]
    assert in_stratum(chosen[0].rows, one, 0) == in_stratum(chosen[1].rows, other, 0)


def test_a_row_that_changes_its_stratum_leaves_all_other_draws_as_they_were():
    one = Strata([np.arange(40), np.arange(40, 80)], [(0.0, 1.0)] * 2, np.arange(0))
    other = Strata([np.delete(np.arange(40), 7), np.append(7, np.arange(40, 80))], [(0.0, 1.0)] * 2, np.arange(0))
    for seed in range(5):
        draws = [np.concatenate(draw_verification_samples(strata, 10, "paper", seed)) for strata in (one, other)]
        assert len(np.intersect1d(*draws)) >= 18  # row 7 may take the place of one row and free the place of another
        chosen = [choose_staff(np.arange(80.0), strata, [1.0, 1.0], 0.5, "paper", seed).rows for strata in (one, other)]
        assert len(np.intersect1d(*chosen)) >= 38


# Budgets

extreme_ratios = st.sampled_from([None, 0.0, 5e-324, 1e-300, 1e-9, 0.5, 1.0, 3.0, 1e9, 1e300, 1e308])


@by_property
@given(st.lists(st.tuples(st.integers(1, 60), extreme_ratios), min_size=1, max_size=12), st.integers(0, 800), modes)
def test_budgets_exceed_neither_m_nor_their_stratum(strata, m, mode):
    sizes, ratios = map(list, zip(*strata, strict=True))
    budgets = allocate_budgets(sizes, ratios, m, mode)
    assert sum(budgets) <= m
    assert all(0 <= budget <= size for budget, size in zip(budgets, sizes, strict=True))


def reference_budgets(sizes: list[int], ratios: list[Fraction | None], m: int, mode: str) -> list[int]:
    """Step 5 word by word, in fractions."""
    left = sorted(range(len(sizes)), key=lambda i: sizes[i])
    budgets, taken = [0] * len(sizes), 0
    while left:
        i = left[0]
        if mode == "paper":
            share = (m - taken) * ratios[i] / len(left)
        elif ratios[i] is None or not any(ratios[j] for j in left):  # Σ V = 0 defines no share: an equal one
            share = Fraction(m - taken, len(left))
        else:
            share = (m - taken) * ratios[i] / sum(ratios[j] for j in left if ratios[j] is not None)
        budgets[i] = min(sizes[i], math.floor(share), m - taken)
        taken += budgets[i]
        left.remove(i)
    return budgets


@settings(by_property, max_examples=300)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.one_of(st.none(), st.integers(0, 40))), min_size=1, max_size=12),
    st.integers(0, 800),
    modes,
)
def test_budgets_are_those_of_the_reference(strata, m, mode):
    sizes = [size for size, _ in strata]
    tenths = [5 if tenth is None and mode == "paper" else tenth for _, tenth in strata]  # published: all verified
    exact = [None if tenth is None else Fraction(tenth, 10) for tenth in tenths]
    floats = [None if tenth is None else tenth / 10 for tenth in tenths]
    assert allocate_budgets(sizes, floats, m, mode) == reference_budgets(sizes, exact, m, mode)


def test_published_budget_by_hand_unused_budget_flows_to_later_strata():
    # Smallest first: ⌊30 · 1/3⌋ = 10, but the stratum holds 2. Left: 28. ⌊28 · 1/2⌋ = 14, then ⌊14 · 1/1⌋ = 14.
    assert allocate_budgets([50, 2, 50], [1.0, 1.0, 1.0], 30, "paper") == [14, 2, 14]


def test_published_budget_by_hand_overshoot_is_cut():
    # ⌊12 · 2/3⌋ = 8, the stratum holds 5. Left: 7. ⌊7 · 3/2⌋ = 10 is more than 7: cut to 7. Nothing is left.
    assert allocate_budgets([5, 20, 30], [2.0, 3.0, 1.0], 12, "paper") == [5, 7, 0]


def test_published_budget_by_hand_follows_the_scale_of_v():
    # ⌊20 · 0.5/2⌋ = 5, then ⌊15 · 0.5/1⌋ = 7; 8 of 20 are left to the random fill. With V = 1: 10, then 10.
    assert allocate_budgets([40, 40], [0.5, 0.5], 20, "paper") == [5, 7]
    assert allocate_budgets([40, 40], [1.0, 1.0], 20, "paper") == [10, 10]


def test_of_equally_large_strata_the_easier_comes_first():
    # ⌊10 · 1/2⌋ = 5, then ⌊5 · 2/1⌋ = 10, cut to 5. The other way round it would be 1 and 9.
    assert allocate_budgets([9, 9], [1.0, 2.0], 10, "paper") == [5, 5]


def test_released_budget_by_hand_unverified_gets_an_equal_share_and_the_rest_weighs_v():
    # The unverified stratum of 10 first: ⌊30/3⌋ = 10. Left: 20. ⌊20 · 1/(1 + 3)⌋ = 5, then ⌊15 · 3/3⌋ = 15.
    assert allocate_budgets([50, 10, 40], [3.0, None, 1.0], 30, "released") == [15, 10, 5]


def test_released_budget_by_hand_unused_budget_flows_to_later_strata():
    # ⌊30 · 4/(4 + 1 + 1)⌋ = 20, the stratum holds 12. Left: 18. ⌊18 · 1/2⌋ = 9, then ⌊9 · 1/1⌋ = 9.
    assert allocate_budgets([12, 20, 30], [4.0, 1.0, 1.0], 30, "released") == [12, 9, 9]


def test_whole_shares_stay_whole():
    assert math.floor(10 * (0.7 / sum([0.7] * 5))) == 1  # floats fall short of 2
    assert allocate_budgets([9] * 5, [0.7] * 5, 10, "released") == [2] * 5


@by_property
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=12), st.integers(0, 400))
def test_released_budgets_do_not_depend_on_the_scale_of_v(strata, m):
    sizes, ratios = map(list, zip(*strata, strict=True))
    scaled = [ratio * 2.0**-20 for ratio in ratios]
    assert allocate_budgets(sizes, scaled, m, "released") == allocate_budgets(sizes, ratios, m, "released")


# The choice of rows


@by_property
@given(cases())
def test_the_choice_is_exactly_m_distinct_rows_and_adds_up(case):
    choice = case.choose()
    assert len(choice.rows) == case.m
    assert np.all(np.diff(choice.rows) > 0) and choice.rows[0] >= 0 and choice.rows[-1] < len(case.scores)
    assert sum(choice.budgets) + choice.from_hardest == case.m
    assert choice.budgets == [len(in_stratum(choice.rows, case.strata, i)) for i in range(len(case.strata.sizes))]
    before_fill = [budget - filled for budget, filled in zip(choice.budgets, choice.filled, strict=True)]
    assert before_fill == allocate_budgets(case.strata.sizes, case.ratios, case.m, case.mode)


@by_property
@given(cases())
def test_the_hardest_come_back_only_beyond_what_the_strata_hold_easiest_first(case):
    choice = case.choose()
    assert choice.from_hardest == max(0, case.m - sum(case.strata.sizes))
    back = np.intersect1d(choice.rows, case.strata.hardest)
    assert back.tolist() == sorted(case.strata.hardest[: choice.from_hardest])


@by_property
@given(cases())
def test_released_takes_the_highest_of_each_stratum_before_the_fill(case):
    case.mode = "released"
    chosen = set(case.choose().rows.tolist())
    budgets = allocate_budgets(case.strata.sizes, case.ratios, case.m, case.mode)
    for rows, budget in zip(case.strata.members, budgets, strict=True):
        highest = sorted(rows.tolist(), key=lambda row: (-case.scores[row], row))[:budget]
        assert chosen.issuperset(highest)


@by_property
@given(cases())
def test_the_same_seed_gives_the_same_choice(case):
    first, again = case.choose(), case.choose()
    assert first.rows.tobytes() == again.rows.tobytes()
    assert (first.budgets, first.filled, first.from_hardest) == (again.budgets, again.filled, again.from_hardest)


def test_another_seed_gives_another_choice():
    scores = np.random.default_rng(0).lognormal(size=1000)
    strata = stratify(scores, 10, 0.1)
    ratios = [1.0] * len(strata.members)
    first, other = (choose_staff(scores, strata, ratios, 0.2, "paper", seed) for seed in (1, 2))
    assert first.budgets == other.budgets
    assert first.rows.tolist() != other.rows.tolist()


@pytest.mark.parametrize("ratio", [1.0, 0.0], ids=["within strata", "all of it fill"])
def test_published_choice_takes_every_row_of_a_stratum_about_equally_often(ratio):
    scores = np.repeat([0.0, 1.0, 9.0], [20, 20, 10])
    strata = stratify(scores, 2, 0.2)
    chosen = [choose_staff(scores, strata, [ratio] * 2, 0.2, "paper", seed).rows for seed in range(400)]
    counts = np.bincount(np.concatenate(chosen), minlength=50)  # 100 expected in the strata, deviation below 9
    assert counts[:40].min() > 60 and counts[:40].max() < 140
    assert counts[40:].sum() == 0


@by_property
@given(st.lists(st.integers(0, 500), min_size=10, max_size=100), modes, st.integers(1, 60))
def test_scaling_and_shifting_the_speculative_scores_changes_nothing(scores, mode, num_strata):
    settings_ = Settings(mode, num_strata, 3, 0.1, seed=0)
    target = Scores(np.arange(len(scores)), {"effort": np.arange(len(scores)) % 7.0}, None, None, None, "target")

    def cut(speculative):
        ratios = [record.verification_ratio for record in verify(speculative, target, settings_)]
        strata = stratify(speculative, num_strata, 0.1)
        return ratios, choose_staff(speculative, strata, ratios, 0.3, mode, 0).rows.tolist()

    plain = np.array(scores, dtype=np.float64)
    assert cut(plain) == cut(2 * plain + 8)  # exact in floats: integers, and a power of two


@by_property
@given(st.integers(1, 100), st.integers(100, 300), st.integers(0, 5))
def test_random_is_m_distinct_rows_and_repeats_under_its_seed(percent, num_rows, seed):
    rows = choose_random(num_rows, percent / 100, seed).rows
    assert len(rows) == math.floor(Fraction(percent, 100) * num_rows)
    assert np.all(np.diff(rows) > 0) and rows[0] >= 0 and rows[-1] < num_rows
    assert rows.tobytes() == choose_random(num_rows, percent / 100, seed).rows.tobytes()


def test_random_changes_with_its_seed_and_takes_every_row_about_equally_often():
    counts = np.bincount(np.concatenate([choose_random(20, 0.25, seed).rows for seed in range(400)]), minlength=20)
    assert counts.min() > 60 and counts.max() < 140  # 100 expected, standard deviation below 9


# Verification ratios


def target_scores(*effort: float) -> Scores:
    """Target scores of the first rows."""
    return Scores(np.arange(len(effort)), {"effort": np.array(effort, dtype=np.float64)}, None, None, None, "target")


# ⌊0.2 · 7⌋ = 1 row is dropped, row 6. Two strata, 5 wide: rows 0, 1, 2 and rows 3, 4, 5.
# Normalised over D (0 to 20): 0, 0.1, 0.2 and 0.3, 0.4, 0.5; the strata's sums are 0.3 and 1.2.
SPECULATIVE = np.array([0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 20.0])
SETTINGS = Settings("paper", num_strata=2, verify_per_stratum=3, hardest_cutoff=0.2, seed=0)


def test_ratios_by_hand_where_the_target_scored_all_rows():
    # Over D (10 to 110): 0.1, 0, 0.5 and 0.2, 0.4, 0.3; sums 0.6 and 0.9. V = 0.6/0.3 and 0.9/1.2.
    records = verify(SPECULATIVE, target_scores(20, 10, 60, 30, 50, 40, 110), SETTINGS)
    assert [record.verified for record in records] == [[0, 1, 2], [3, 4, 5]]
    assert [record.speculative_sum for record in records] == pytest.approx([0.3, 1.2])
    assert [record.target_sum for record in records] == pytest.approx([0.6, 0.9])
    assert [record.verification_ratio for record in records] == pytest.approx([2.0, 0.75])


def test_ratios_by_hand_where_the_target_scored_the_drawn_rows():
    # Row 6 has no target score. The others' small scores are 0 to 0.5, so 20 to 70 is brought there: the target's
    # normalised scores are 0.1, 0, 0.5 and 0.2, 0.4, 0.3; sums 0.6 and 0.9.
    records = verify(SPECULATIVE, target_scores(30, 20, 70, 40, 60, 50), SETTINGS)
    assert [record.target_sum for record in records] == pytest.approx([0.6, 0.9])
    assert [record.verification_ratio for record in records] == pytest.approx([2.0, 0.75])


def test_a_small_stratum_of_the_released_mode_has_no_ratio():
    records = verify(SPECULATIVE, target_scores(20, 10, 60, 30, 50, 40, 110), replace(SETTINGS, mode="released"))
    assert [record.verified for record in records] == [[], []]
    assert [record.verification_ratio for record in records] == [None, None]
    assert [record.speculative_sum for record in records] == [None, None]


def test_a_drawn_row_without_target_score_is_named():
    with pytest.raises(UserError, match="row 5 "):
        verify(SPECULATIVE, target_scores(20, 10, 60, 30, 50), SETTINGS)


@by_property
@given(score_arrays(), st.integers(1, 60), st.integers(1, 20), modes)
def test_two_models_that_agree_have_ratio_1_everywhere(scores, num_strata, verify_per_stratum, mode):
    settings = Settings(mode, num_strata, verify_per_stratum, 0.1, seed=0)
    records = verify(scores, target_scores(*scores), settings)
    assert {record.verification_ratio for record in records if record.verified} <= {1.0}
    drawn = np.array(sorted(row for record in records for row in record.verified), dtype=int)
    if 0 < len(drawn) < len(scores):
        sampled = Scores(drawn, {"effort": 3 * scores[drawn] + 7}, None, None, None, "target")
        ratios = [r.verification_ratio for r in verify(scores, sampled, settings) if r.verified]
        # Rounding: sums of normalised scores near 0 have few digits left.
        sums = [r.speculative_sum for r in records if r.verified]
        assert all(abs(v - 1) * total < 1e-6 for v, total in zip(ratios, sums, strict=True))
    assert mode == "released" or all(record.verified for record in records)


def test_normalisation_is_by_the_reference_and_all_ones_where_it_is_constant():
    assert min_max_normalise(np.array([1.0, 3.0]), reference=np.array([1.0, 2.0, 5.0])).tolist() == [0.0, 0.5]
    assert min_max_normalise(np.array([4.0, 4.0]), reference=np.array([4.0, 4.0])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("smallest", [0.0, 1e-30, 1e-320])
def test_the_ratio_is_a_number_however_small_the_speculative_sum(smallest):
    assert math.isfinite(verification_ratio(np.array([1.0]), np.array([smallest])))
    assert verification_ratio(np.array([0.0]), np.array([smallest])) in (0.0, 1.0)


# The record of a verification


def scores_of(fingerprint):
    return Scores(np.arange(len(SPECULATIVE)), {"effort": SPECULATIVE}, None, fingerprint, len(SPECULATIVE), "scores")


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "verification.json"
    records = verify(SPECULATIVE, target_scores(20, 10, 60, 30, 50, 40, 110), SETTINGS)
    write_verification(path, SETTINGS, scores_of("fingerprint"), records)
    return path, records


def test_a_verification_is_read_as_it_was_written(stored):
    path, records = stored
    assert read_verification(path, SETTINGS, scores_of("fingerprint")) == (records, None)
    assert json.loads(path.read_text())["verified_samples"] == 6


@pytest.mark.parametrize(
    "change",
    [{"mode": "released"}, {"num_strata": 3}, {"verify_per_stratum": 4}, {"hardest_cutoff": 0.3}, {"seed": 1}],
    ids=lambda change: next(iter(change)),
)
def test_a_verification_under_other_settings_is_refused_by_key(stored, change):
    with pytest.raises(UserError, match=next(iter(change))):
        read_verification(stored[0], replace(SETTINGS, **change), scores_of("fingerprint"))


def test_a_verification_from_other_scores_is_refused(stored):
    other = replace(scores_of("fingerprint"), columns={"effort": SPECULATIVE[::-1]})
    with pytest.raises(UserError, match="speculative_scores_sha256"):
        read_verification(stored[0], SETTINGS, other)


@pytest.mark.parametrize("text", ["{}", "[]", "7", '{"settings": {}, "data_fingerprint": null, "strata": [{}]}'])
def test_a_file_that_is_no_verification_is_refused(tmp_path, text):
    path = tmp_path / "verification.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"verification\.json is damaged"):
        read_verification(path, SETTINGS, scores_of(None))
