"""Mode extended: the published method with length control, other budgets, and other rows."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, run_main
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scripts.paper.cells import cells_of, load, stage_arguments
from selection.method import extended
from selection.method.length_control import length_residual
from selection.method.staff import choose_staff, min_max_normalise
from selection.report.annotated import annotated
from selection.rows.split import training_split
from selection.run.config import Selection, load_experiment, load_grid, validated
from selection.run.errors import UserError
from selection.run.ledger import SPECULATIVE_SCORES
from selection.scores.folder import Scores, read_scores
from selection.scores.identity import score_identity
from selection.scores.pool import without
from selection.scores.scoring import score_rows
from selection.scores.verification import (
    Settings,
    cut_strata,
    draw,
    read_verification,
    stratified_score,
    verify,
    write_verification,
)

CONTROL = Settings("extended", 10, 8, 0.1, seed=3, length_control="residual")


def scores_of(effort, tokens) -> Scores:
    columns = {"effort": np.asarray(effort, dtype=float), "n_response_tokens": np.asarray(tokens)}
    return Scores(np.arange(len(effort)), columns, None, None, None, "scores")


def test_additions_are_refused_in_the_two_published_modes_and_adaptive_verification_in_all():
    assert validated(Selection(), {"mode": "extended", "length_control": "residual"}).length_control == "residual"
    for mode in ("paper", "released"):
        with pytest.raises(UserError, match=r"length_control.*give selection\.mode extended"):
            validated(Selection(), {"mode": mode, "length_control": "residual"})
        with pytest.raises(UserError, match=r"budgets.*give selection\.mode extended"):
            validated(Selection(), {"mode": mode, "budgets": "size"})
    with pytest.raises(UserError, match=r"^[^\n]*verify: [^\n]*verification was removed[^\n]*NOTES\.md[^\n]*$"):
        validated(Selection(), {"mode": "extended", "verify": "adaptive"})


def test_extended_without_additions_is_the_published_method_bit_for_bit(tmp_path):
    small, target = np.random.default_rng(0).lognormal(sigma=0.6, size=(2, 300))
    for name, scores in (("small", small), ("target", small * target)):
        table = pd.DataFrame({"index": range(300), "effort": scores, "n_response_tokens": 5})
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    options = ["--scores", tmp_path / "small.csv", "--target_scores", tmp_path / "target.csv", "--rate", 0.5]
    for mode in ("paper", "extended"):
        run_main("selection.coreset", *options, "--mode", mode, "--out", tmp_path / mode)
    paper, extended = (json.loads((tmp_path / mode / "staff-0.5.json").read_text()) for mode in ("paper", "extended"))
    assert {key: extended[key] for key in paper} == paper | {"mode": "extended"}
    assert (extended["verify"], extended["length_control"], extended["stratified_by"]) == ("sampled", "none", "effort")


def test_settings_come_back_from_their_record_and_published_records_have_no_new_keys():
    for selection in (Selection(mode="released"), Selection(mode="extended", length_control="residual")):
        record = Settings.of(selection).record
        earlier = record | {"rates": None}  # a key that coresets of mode extended once had
        assert Settings.from_record(json.loads(json.dumps(earlier)), Path("record.json")).record == record
    assert list(Settings.of(Selection()).record) == [*Settings.__dataclass_fields__][:5]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(12, 200), st.sampled_from([-1.0, -0.5, 0.0, 0.7]), st.booleans())
def test_the_residual_is_the_literal_fits_whatever_the_unit(seed, num_rows, power, zeros):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 200, num_rows)
    scores = tokens**power * rng.lognormal(sigma=0.5, size=num_rows)
    scores[rng.random(num_rows) < 0.1 * zeros] = 0
    positive = scores > 0
    assume(positive.sum() >= 10)
    left = length_residual(scores, tokens)
    assert np.array_equal(left > 0, positive) and np.isfinite(left).all()
    assert length_residual(1e-6 * scores, tokens) == pytest.approx(left, rel=1e-9)
    lengths = np.log(tokens[positive])
    fit = np.polyfit(lengths, np.log(scores[positive]), 1)
    assert left[positive] == pytest.approx(scores[positive] / np.exp(np.polyval(fit, lengths)), rel=1e-6)
    ratio = length_residual(scores, np.full(num_rows, 7))[positive] / scores[positive]
    assert np.allclose(ratio, ratio[0])  # equal lengths explain nothing


def test_a_fit_of_too_few_scores_and_a_row_without_response_are_refused():
    few, empty = scores_of([1.0] * 9 + [0.0] * 5, np.arange(1, 15)), scores_of(np.ones(12), [3, 3, 0] + [4] * 9)
    for scores, said in ((few, "9 scores above 0"), (empty, "row 2 has no response token")):
        with pytest.raises(UserError, match=said):
            stratified_score(scores, CONTROL)


def test_each_model_is_controlled_by_its_own_fit_over_the_rows_it_has_scored():
    rng = np.random.default_rng(2)
    tokens, core = rng.integers(5, 300, 400), rng.lognormal(sigma=0.5, size=400)
    small, target = scores_of(core * tokens**-0.5, tokens), scores_of(9 * core * tokens**-1.5, tokens)
    speculative = stratified_score(small, CONTROL).effort
    # Nothing but length tells the models apart.
    assert [record.verification_ratio for record in verify(speculative, target, CONTROL)] == pytest.approx([1] * 10)
    draws = draw(cut_strata(speculative, CONTROL), CONTROL)
    rows, first = np.concatenate(draws), len(draws[0])
    own_fit = verify(speculative, target.only(np.sort(rows)), CONTROL)[0].verification_ratio
    left = length_residual(target.effort[rows], tokens[rows])
    ends = min_max_normalise(speculative[rows], speculative)
    by_hand = ends.min() + (ends.max() - ends.min()) * min_max_normalise(left, left)
    assert own_fit == pytest.approx(by_hand[:first].sum() / ends[:first].sum())


def test_a_verification_by_another_cut_of_the_hardest_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    scores = scores_of(rng.random(60), rng.integers(5, 50, 60))
    scores.columns.update({name: rng.random(60) for name in ("loss_untuned", "loss_without_prompt")})
    by_effort = Settings("extended", 4, 3, 0.1, seed=3)
    for stored, now in itertools.permutations((by_effort, replace(by_effort, hardest_by="ifd"))):
        records = verify(scores.effort, scores, stored, cut_strata(scores.effort, stored, scores.columns))
        write_verification(tmp_path / "verification.json", stored, scores, records)
        assert read_verification(tmp_path / "verification.json", replace(stored, budgets="size"), scores)[0] == records
        with pytest.raises(UserError, match="hardest_by: stored"):
            read_verification(tmp_path / "verification.json", now, scores)


def test_suspects_do_not_count_as_rows_that_the_target_has_scored():
    """80 of 100 rows scored and 30 left out: 50 or so of the 70 others, no complete scores of a target."""
    rng = np.random.default_rng(0)
    scores, kept = scores_of(rng.random(100), np.full(100, 5)), np.arange(30, 100)
    rules, suspects = Settings("paper", 4, 3, 0.1, seed=3), {"copy": list(range(30))}
    small, target = without(scores, suspects), scores_of(rng.lognormal(size=100), np.full(100, 5))
    drawn = small.index[np.concatenate(draw(cut_strata(small.effort, rules), rules))]
    others = rng.permutation(np.setdiff1d(np.arange(100), drawn))[: 80 - len(drawn)]
    target = target.only(np.union1d(drawn, others))
    alone = verify(small.effort, target.only(np.intersect1d(target.index, kept)), rules, index=small.index)
    assert verify(small.effort, without(target, suspects), rules, index=small.index) == alone


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.floats(0, 5)), min_size=1, max_size=8), st.integers(1, 150))
def test_proportional_budgets_fill_and_never_differ_from_the_share_by_more_than_rounding(strata, m):
    sizes, weights = map(list, zip(*strata, strict=True))
    budgets = extended.proportional_budgets(sizes, weights, m)
    assert sum(budgets) == min(m, sum(sizes)) and all(0 <= b <= size for b, size in zip(budgets, sizes, strict=True))
    for (b, size, weight), (c, _, other) in itertools.permutations(zip(budgets, sizes, weights, strict=True), 2):
        if b < size and other > 1e-6:  # room was left: it has its share, measured by any stratum that was given one
            assert b + 1 >= (c - 1) * weight / other * (1 - 1e-6)
    assert extended.proportional_budgets([10, 20, 30], [10, 20, 30], 6) == [1, 2, 3]


def test_calibrated_ratios_are_one_where_the_target_knows_what_the_small_model_does_or_nothing():
    rng = np.random.default_rng(0)
    ours = [rng.random(10) * 0.1 + low for low in (0.1, 0.3, 0.5, 0.7)]
    counts, sums = np.array([10, 10, 10, 10, 0]), np.array([*map(np.sum, ours), np.nan])
    linear = np.array([*(np.sum(0.2 + 0.5 * each) for each in ours), np.nan])
    assert extended.calibrated_ratios(counts, sums, linear)[:4] == pytest.approx([1] * 4)
    found = [
        extended.calibrated_ratios(counts, sums, np.array([*rng.random((4, 10)).sum(1), np.nan])) for _ in range(500)
    ]
    assert np.mean(found, 0)[:4] == pytest.approx([1] * 4, abs=0.02) and np.isnan(found[0][4])
    higher = linear * [1, 1.5, 1, 1, 1]  # what the target alone sees is left
    assert extended.calibrated_ratios(counts, sums, higher)[:4].argmax() == 1


def test_rows_nearest_to_centres_stand_for_different_clusters():
    rng = np.random.default_rng(1)
    centres = 10 * rng.normal(size=(5, 4))
    features = centres[np.arange(100) % 5] + rng.normal(size=(100, 4))
    rows = np.flatnonzero(np.arange(100) % 7 != 0)
    taken = extended.nearest_to_centres(features, seed=3)(rows, 5)
    assert sorted(taken % 5) == list(range(5)) and np.isin(taken, rows).all()
    for row in taken:
        own = rows[rows % 5 == row % 5]
        distances = np.linalg.norm(features[own] - features[own].mean(0), axis=1)
        assert row == own[distances.argmin()]
    same = extended.nearest_to_centres(np.ones((9, 2)), seed=3)(np.arange(9), 4)
    assert len(set(same)) == 4


@pytest.mark.parametrize(
    "keys",
    [{"budgets": "size"}, {"budgets": "neyman", "hardest_by": "loss_difference"}, {"budgets": "calibrated"},
     {"within_stratum": "nearest", "hardest_by": "ifd"}],
)  # fmt: skip
def test_additions_in_the_stages(make_experiment, rows, tmp_path, keys):
    """Each is recorded, and the coreset is cut again from its record, row by row with reasons."""
    settings = {"mode": "extended", "num_strata": 3, "verify_per_stratum": 4, "rates": [0.5], "self_test": 0}
    settings |= {"precision": "fp32", "hardest_cutoff": 0.2, **keys}
    path = make_experiment(rows, small_training={"num_train_epochs": 0}, selection=settings)
    for stage in ("effort_score", "verify", "coreset"):
        run_main(f"selection.{stage}", "--config_path", path)
    experiment, coreset = load_experiment(path), tmp_path / "run" / "coresets" / "staff-0.5.json"
    record = json.loads(coreset.read_text())
    assert keys.items() <= record.items() and len(record["indices"]) == 12
    table = annotated(experiment, coreset).to_pandas()
    assert table.chosen.sum() == 12 and table.reason.str.startswith("chosen").sum() == 12
    scores = read_scores(experiment.small_scores, Settings.of(experiment.selection).columns)
    if "hardest_by" in keys:
        explained = scores.columns["loss_without_prompt"] - scores.columns["loss_untuned"]
        explained *= scores.columns["n_response_tokens"] if keys["hardest_by"] == "loss_difference" else 1
        dropped = table[table.split == "train"].set_index("index").stratum.isna()
        assert set(dropped[dropped].index) == set(np.argsort(explained)[: int(0.2 * len(explained))])
    if keys.get("budgets") == "size":
        sizes, budgets = zip(*((s["size"], s["budget"]) for s in record["strata"]), strict=True)
        assert list(budgets) == extended.proportional_budgets(sizes, sizes, 12)


def test_length_control_in_the_stages(make_experiment, rows, tmp_path):
    settings = {"mode": "extended", "length_control": "residual", "num_strata": 3, "verify_per_stratum": 7}
    settings |= {"rates": [0.5], "self_test": 0, "hardest_cutoff": 0, "precision": "fp32"}
    path = make_experiment(rows, small_training={"num_train_epochs": 0}, selection=settings)
    experiment, options = load_experiment(path), ["--config_path", path]
    split, every = training_split(experiment), np.arange(24)
    score_rows(experiment, split, experiment.small_model, None, every, experiment.small_scores, SPECULATIVE_SCORES)
    run_main("selection.verify", *options)
    run_main("selection.coreset", *options)
    record = json.loads((tmp_path / "run" / "coresets" / "staff-0.5.json").read_text())
    assert record["stratified_by"] == "length residual of effort" and record["length_control"] == "residual"
    raw = read_scores(experiment.small_scores, ("effort", "n_response_tokens"))
    speculative = length_residual(raw.effort, raw.columns["n_response_tokens"])
    strata = cut_strata(speculative, Settings.of(experiment.selection))
    assert [tuple(s["score_range"]) for s in record["strata"]] == strata.score_ranges
    ratios = [s["verification_ratio"] for s in record["strata"]]
    assert record["indices"] == choose_staff(speculative, strata, ratios, 12, "paper", 42).rows.tolist()

    identities = []  # the scores of paper and extended are the same scores
    for mode in ("paper", "extended", "released"):
        experiment.selection = Selection(mode=mode, precision="fp32")
        identities.append(score_identity(experiment, split, experiment.small_model, None))
    assert identities[0] == identities[1] != identities[2]


def test_a_grid_holds_staff_and_staff_with_length_control(tmp_path):
    grid = load_grid(REPOSITORY / "configs" / "reproduce" / "smollm2_cpu.yaml")
    own = [cell for cell in cells_of(grid) if cell.method == "staff_length" and cell.seed == 1]
    arguments = stage_arguments(grid, tmp_path, own[0])
    experiment, plain = load(arguments), load(stage_arguments(grid, tmp_path, replace(own[0], method="staff")))
    assert experiment.folder.name == "go_biology-seed-1-staff_length" and plain.folder.name == "go_biology-seed-1"
    assert (experiment.selection.length_control, plain.selection.length_control) == ("residual", "none")
