"""Strata, verification ratios, budgets and the choice of rows: by property, by hand and against a literal reference."""

import json
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_size import score_arrays

from selection.method.staff import (
    Strata,
    allocate_budgets,
    choose_staff,
    coreset_size,
    draw_verification_samples,
    min_max_normalise,
    stratify,
    verification_ratio,
)
from selection.run.errors import UserError
from selection.scores.folder import Scores
from selection.scores.verification import Settings, read_verification, verify, write_verification

by_property = settings(max_examples=100, deadline=None)
modes = st.sampled_from(["paper", "released"])
cutoffs = st.sampled_from([0.0, 0.1, 0.3, 0.9])


@by_property
@given(st.integers(1, 10_000), st.integers(1, 10**6))
def test_coreset_size_is_the_floor_of_the_decimal_product_or_refused(numerator, num_rows):
    rate, exact = numerator / 10_000, math.floor(Fraction(numerator, 10_000) * num_rows)
    if exact:
        assert coreset_size(rate, num_rows) == exact
    for wrong, said in ((rate, "keeps none: give a rate of"), (-rate, "outside"), (1 + rate, "outside")):
        if said == "outside" or not exact:
            with pytest.raises(ValueError, match=said):
                coreset_size(wrong, num_rows)


@by_property
@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=80),
    st.sampled_from([1, 2, 4, 8, 16, 64]),  # powers of two: floats put a score on an edge where fractions do
    st.sampled_from(["0", "0.1", "0.29", "0.5", "0.9"]),
)
def test_strata_are_those_of_the_literal_rule_in_fractions(scores, num_strata, cutoff):
    strata = stratify(np.array(scores, dtype=np.float64), num_strata, float(cutoff))
    easiest_first = sorted(range(len(scores)), key=lambda row: (scores[row], row))
    num_kept = len(scores) - math.floor(Fraction(cutoff) * len(scores))
    assert strata.hardest.tolist() == easiest_first[num_kept:]
    kept = sorted(easiest_first[:num_kept])
    low, high = min(scores[row] for row in kept), max(scores[row] for row in kept)
    width = Fraction(high - low, num_strata) or 1
    members = [[] for _ in range(num_strata)]
    for row in kept:
        members[min(math.floor((scores[row] - low) / width), num_strata - 1)].append(row)
    assert [rows.tolist() for rows in strata.members] == [rows for rows in members if rows]
    if high > low:
        edges = [(low + i * width, low + (i + 1) * width) for i, rows in enumerate(members) if rows]
        assert strata.score_ranges == [(float(a), float(b)) for a, b in edges]


def test_a_row_that_changes_its_stratum_leaves_all_other_draws_as_they_were():
    cut, none = np.split(np.arange(80), [40]), np.arange(0)
    one, other = (Strata(rows, [(0.0, 1.0)] * 2, none) for rows in (cut, [np.delete(cut[0], 7), np.append(7, cut[1])]))
    for seed in range(5):
        draws = [np.concatenate(draw_verification_samples(strata, 10, "paper", seed)) for strata in (one, other)]
        assert len(np.intersect1d(*draws)) >= 18  # row 7 may take the place of one row and free the place of another


def reference_budgets(sizes: list[int], ratios: list[Fraction | None], m: int, mode: str) -> list[int]:
    """Word by word, in fractions."""
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
    exact, floats = ([None if tenth is None else kind(tenth) / 10 for tenth in tenths] for kind in (Fraction, float))
    budgets = allocate_budgets(sizes, floats, m, mode)
    assert budgets == reference_budgets(sizes, exact, m, mode)
    wild = allocate_budgets(sizes, [tenth and 10.0 ** (15 * tenth - 300) for tenth in tenths], m, mode)
    assert sum(wild) <= m and all(0 <= budget <= size for budget, size in zip(wild, sizes, strict=True))
    if mode == "released":  # the scale of V does not matter
        assert allocate_budgets(sizes, [v and v * 2.0**-20 for v in floats], m, mode) == budgets


def test_budgets_by_hand():
    # Smallest first: ⌊30 · 1/3⌋ = 10, but the stratum holds 2. Left: 28. ⌊28 · 1/2⌋ = 14, then ⌊14 · 1/1⌋ = 14.
    assert allocate_budgets([50, 2, 50], [1.0, 1.0, 1.0], 30, "paper") == [14, 2, 14]
    # The unverified stratum of 10 first: ⌊30/3⌋ = 10. Left: 20. ⌊20 · 1/(1 + 3)⌋ = 5, then ⌊15 · 3/3⌋ = 15.
    assert allocate_budgets([50, 10, 40], [3.0, None, 1.0], 30, "released") == [15, 10, 5]
    assert allocate_budgets([9] * 5, [0.7] * 5, 10, "released") == [2] * 5  # 10 · 0.7/Σ is below 2 in floats


@by_property
@given(score_arrays(), st.integers(1, 60), cutoffs, st.integers(1, 20), modes, st.integers(0, 10))
def test_draws_repeat_in_their_strata_and_equal_models_have_ratio_1(scores, num_strata, cutoff, b_v, mode, seed):
    strata = stratify(scores, num_strata, cutoff)
    draws, again = (draw_verification_samples(strata, b_v, mode, seed) for _ in range(2))
    for drawn, rows, other in zip(draws, strata.members, again, strict=True):
        assert np.all(np.diff(drawn) > 0) and np.isin(drawn, rows).all() and np.array_equal(drawn, other)
        assert len(drawn) == (0 if mode == "released" and len(rows) <= b_v else min(b_v, len(rows)))
    records = verify(scores, target_scores(*scores), Settings(mode, num_strata, b_v, cutoff, seed))
    assert {record.verification_ratio for record in records if record.verified} <= {1.0}


def test_draws_choice_and_fill_take_every_row_about_equally_often():
    scores = np.repeat([0.0, 1.0, 9.0], [20, 20, 10])
    strata = stratify(scores, 2, 0.2)
    for draw in (
        lambda seed: np.concatenate(draw_verification_samples(strata, 5, "paper", seed)),
        lambda seed: choose_staff(scores, strata, [1.0] * 2, 10, "paper", seed).rows,
        lambda seed: choose_staff(scores, strata, [0.0] * 2, 10, "paper", seed).rows,  # all of the fill
    ):
        rows = np.concatenate([draw(seed) for seed in range(400)])
        counts = np.bincount(rows, minlength=50)  # 100 expected in the strata, deviation below 9
        assert counts[:40].min() > 60 and counts[:40].max() < 140 and counts[40:].sum() == 0


@by_property
@given(st.lists(st.integers(0, 500), min_size=10, max_size=100), modes, st.integers(1, 60))
def test_scaling_and_shifting_the_speculative_scores_changes_nothing(scores, mode, num_strata):
    plain, target = np.array(scores, dtype=np.float64), target_scores(*(np.arange(len(scores)) % 7))
    found = []
    for speculative in (plain, 2 * plain + 8):  # exact in floats: integers, and a power of two
        records = verify(speculative, target, Settings(mode, num_strata, 3, 0.1, seed=0))
        strata, ratios = stratify(speculative, num_strata, 0.1), [record.verification_ratio for record in records]
        found.append((ratios, choose_staff(speculative, strata, ratios, len(scores) // 3, mode, 0).rows.tolist()))
    assert found[0] == found[1]


def target_scores(*effort: float) -> Scores:
    return Scores(np.arange(len(effort)), {"effort": np.array(effort, dtype=np.float64)}, None, None, None, "target")


# ⌊0.2 · 7⌋ = 1 row is dropped, row 6. Two strata, 5 wide: rows 0, 1, 2 and rows 3, 4, 5.
# Normalised over D (0 to 20): 0, 0.1, 0.2 and 0.3, 0.4, 0.5; the strata's sums are 0.3 and 1.2.
SPECULATIVE = np.array([0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 20.0])
SETTINGS = Settings("paper", num_strata=2, verify_per_stratum=3, hardest_cutoff=0.2, seed=0)


def test_ratios_by_hand():
    # All rows; over D (10 to 110): 0.1, 0, 0.5 and 0.2, 0.4, 0.3. Of the drawn rows alone: the others' small scores are
    # 0 to 0.5, and 20 to 70 is brought there.
    for effort in ((20, 10, 60, 30, 50, 40, 110), (30, 20, 70, 40, 60, 50)):
        records = verify(SPECULATIVE, target_scores(*effort), SETTINGS)
        assert [record.verified for record in records] == [[0, 1, 2], [3, 4, 5]]
        assert [record.speculative_sum for record in records] == pytest.approx([0.3, 1.2])
        assert [record.target_sum for record in records] == pytest.approx([0.6, 0.9])
        assert [record.verification_ratio for record in records] == pytest.approx([0.6 / 0.3, 0.9 / 1.2])
    assert verification_ratio(np.array([1.0]), np.array([0.0])) == 1  # where nothing differs
    assert min_max_normalise(np.array([4.0, 4.0]), reference=np.array([4.0, 4.0])).tolist() == [1.0, 1.0]
    # A small stratum of the released mode has no ratio; a missing target score is named.
    records = verify(SPECULATIVE, target_scores(20, 10, 60, 30, 50, 40, 110), replace(SETTINGS, mode="released"))
    assert [(r.verified, r.verification_ratio, r.speculative_sum) for r in records] == [([], None, None)] * 2
    with pytest.raises(UserError, match="row 5 "):
        verify(SPECULATIVE, target_scores(20, 10, 60, 30, 50), SETTINGS)


def test_a_verification_is_read_as_it_was_written_and_refused_by_what_differs(tmp_path):
    path, records = tmp_path / "verification.json", verify(SPECULATIVE, target_scores(*range(7)), SETTINGS)
    scores, others = (Scores(np.arange(7), {"effort": e}, None, "x", 7, "") for e in (SPECULATIVE, SPECULATIVE[::-1]))
    write_verification(path, SETTINGS, scores, records)
    assert read_verification(path, SETTINGS, scores) == (records, None)
    assert json.loads(path.read_text())["verified_samples"] == 6
    changes = {"mode": "released", "num_strata": 3, "verify_per_stratum": 4, "hardest_cutoff": 0.3, "seed": 1}
    for key, value in changes.items():
        with pytest.raises(UserError, match=key):
            read_verification(path, replace(SETTINGS, **{key: value}), scores)
    with pytest.raises(UserError, match="speculative_scores_sha256"):
        read_verification(path, SETTINGS, others)
    for text in ("{}", "[]", '{"data_fingerprint": null, "strata": [{}]}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"verification\.json is damaged"):
            read_verification(path, SETTINGS, scores)
