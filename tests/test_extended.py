"""Mode extended: the published method with length control."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from scripts.paper.cells import cells_of, jobs_of, load, stage_arguments
from selection import coreset, verify
from selection.method.length_control import length_residual
from selection.method.staff import choose_staff, draw_verification_samples, min_max_normalise
from selection.rows.split import training_split
from selection.run.config import Selection, load_experiment, load_grid, validated
from selection.run.errors import UserError
from selection.run.ledger import SPECULATIVE_SCORES
from selection.scores.folder import Scores, read_scores
from selection.scores.identity import score_identity
from selection.scores.scoring import score_rows
from selection.scores.verification import Settings, cut_strata, stratified_score
from selection.scores.verification import verify as verified

CONTROL = Settings("extended", 10, 8, 0.1, seed=3, length_control="residual")


def scores_of(effort, tokens) -> Scores:
    columns = {"effort": np.asarray(effort, dtype=float), "n_response_tokens": np.asarray(tokens)}
    return Scores(np.arange(len(effort)), columns, None, None, None, "scores")


def call(stage, options, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage", *map(str, options)])
    stage.main()


def test_length_control_is_refused_in_the_two_published_modes_and_adaptive_verification_in_all():
    assert validated(Selection(), {"mode": "extended", "length_control": "residual"}).length_control == "residual"
    for mode in ("paper", "released", "extended"):
        if mode != "extended":
            with pytest.raises(UserError, match=r"length_control.*give selection\.mode extended"):
                validated(Selection(), {"mode": mode, "length_control": "residual"})
        with pytest.raises(UserError, match=r"^[^\n]*verify: [^\n]*verification was removed[^\n]*NOTES\.md[^\n]*$"):
            validated(Selection(), {"mode": mode, "verify": "adaptive"})


def test_extended_without_additions_is_the_published_method_bit_for_bit(tmp_path, monkeypatch):
    small, target = np.random.default_rng(0).lognormal(sigma=0.6, size=(2, 300))
    for name, scores in (("small", small), ("target", small * target)):
        lines = "".join(f"{row},{score!r},5\n" for row, score in enumerate(scores.tolist()))
        (tmp_path / f"{name}.csv").write_text("index,effort,n_response_tokens\n" + lines)
    given = ["--scores", tmp_path / "small.csv", "--target_scores", tmp_path / "target.csv", "--rate", 0.1, 0.5]
    for mode in ("paper", "extended"):
        options = [*given, "--mode", mode, "--method", "staff", "length", "--out", tmp_path / mode]
        call(coreset, options, monkeypatch)
    for name in ("staff-0.1", "staff-0.5", "length-0.1", "length-0.5"):
        paper, extended = (json.loads((tmp_path / m / f"{name}.json").read_text()) for m in ("paper", "extended"))
        assert extended.pop("mode") == "extended" and paper.pop("mode") == "paper"
        assert {key: extended[key] for key in paper} == paper
    record = json.loads((tmp_path / "extended" / "staff-0.5.json").read_text())
    assert (record["verify"], record["length_control"], record["stratified_by"]) == ("sampled", "none", "effort")


def test_settings_come_back_from_their_record_and_published_records_have_no_new_keys():
    extended = Selection(mode="extended", length_control="residual")
    for selection, rules in ((Selection(), "paper"), (Selection(mode="released"), "released"), (extended, "paper")):
        record = Settings.of(selection).record
        earlier = record | {"rates": None}  # a key that coresets of mode extended once had
        assert Settings.from_record(json.loads(json.dumps(earlier)), Path("record.json")).record == record
        assert Settings.of(selection).rules == rules
    assert list(Settings.of(Selection()).record) == [*Settings.__dataclass_fields__][:5]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(12, 200), st.sampled_from([-1.0, -0.5, 0.0, 0.7]), st.booleans())
def test_logarithms_of_residuals_and_lengths_are_uncorrelated_whatever_the_unit(seed, num_rows, power, zeros):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 200, num_rows)
    scores = tokens**power * rng.lognormal(sigma=0.5, size=num_rows)
    scores[rng.random(num_rows) < 0.1 * zeros] = 0
    positive = scores > 0
    assume(positive.sum() >= 10)
    left = length_residual(scores, tokens)
    assert np.array_equal(left > 0, positive) and np.isfinite(left).all()
    lengths = np.log(tokens[positive])
    assert abs(np.cov(lengths, np.log(left[positive]))[0, 1]) < 1e-9
    for unit in (1e-6, 1e5):
        assert length_residual(unit * scores, tokens) == pytest.approx(left, rel=1e-9)
    fit = np.polyfit(lengths, np.log(scores[positive]), 1)  # the formula, literally
    assert left[positive] == pytest.approx(scores[positive] / np.exp(np.polyval(fit, lengths)), rel=1e-6)


def test_ranks_no_longer_follow_length_and_equal_lengths_change_nothing():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 300, 2000)
    scores = tokens**-0.8 * rng.lognormal(sigma=0.3, size=2000)
    assert spearmanr(scores, tokens).statistic < -0.8
    assert abs(spearmanr(length_residual(scores, tokens), tokens).statistic) < 0.05
    ratio = length_residual(scores, np.full(2000, 7)) / scores
    assert ratio == pytest.approx(np.full(2000, ratio[0]))


def test_a_fit_of_too_few_scores_and_a_row_without_response_are_refused():
    with pytest.raises(UserError, match="9 scores above 0"):
        stratified_score(scores_of([1.0] * 9 + [0.0] * 5, np.arange(1, 15)), CONTROL)
    with pytest.raises(UserError, match="row 2 has no response token"):
        stratified_score(scores_of(np.ones(12), [3, 3, 0] + [4] * 9), CONTROL)


def test_each_model_is_controlled_by_its_own_fit_over_the_rows_it_has_scored():
    rng = np.random.default_rng(2)
    tokens, core = rng.integers(5, 300, 400), rng.lognormal(sigma=0.5, size=400)
    small, target = scores_of(core * tokens**-0.5, tokens), scores_of(9 * core * tokens**-1.5, tokens)
    speculative = stratified_score(small, CONTROL).effort

    def ratios(speculative, target, settings=CONTROL):
        return np.array([record.verification_ratio for record in verified(speculative, target, settings)])

    assert ratios(speculative, target) == pytest.approx(1, abs=1e-6)  # nothing but length tells the models apart
    raw = ratios(small.effort, target, replace(CONTROL, length_control="none"))
    draws = draw_verification_samples(cut_strata(speculative, CONTROL), 8, "paper", 3)
    own_fit = ratios(speculative, target.only(np.sort(np.concatenate(draws))))
    assert np.abs(own_fit - 1).mean() < np.abs(raw - 1).mean() / 3
    rows = np.concatenate(draws)  # where the target has scored no other rows, the fit is over these
    left = length_residual(target.effort[rows], tokens[rows])
    ends = min_max_normalise(speculative[rows], speculative)
    by_hand = ends.min() + (ends.max() - ends.min()) * min_max_normalise(left, left)
    first = len(draws[0])
    assert own_fit[0] == pytest.approx(by_hand[:first].sum() / ends[:first].sum())


def test_length_control_in_the_stages(make_experiment, rows, tmp_path, monkeypatch):
    settings = {"mode": "extended", "length_control": "residual", "num_strata": 3, "verify_per_stratum": 7}
    settings |= {"rates": [0.5], "self_test": 0, "hardest_cutoff": 0, "precision": "fp32"}
    path = make_experiment(rows, small_training={"num_train_epochs": 0}, selection=settings)
    experiment, options = load_experiment(path), ["--config_path", path]
    split, every = training_split(experiment), np.arange(24)
    score_rows(experiment, split, experiment.small_model, None, every, experiment.small_scores, SPECULATIVE_SCORES)
    call(verify, options, monkeypatch)
    call(coreset, options, monkeypatch)
    record = json.loads((tmp_path / "run" / "coresets" / "staff-0.5.json").read_text())
    assert record["stratified_by"] == "length residual of effort" and record["length_control"] == "residual"
    raw = read_scores(experiment.small_scores, ("effort", "n_response_tokens"))
    speculative = length_residual(raw.effort, raw.columns["n_response_tokens"])
    strata = cut_strata(speculative, Settings.of(experiment.selection))
    assert [tuple(s["score_range"]) for s in record["strata"]] == strata.score_ranges
    ratios = [s["verification_ratio"] for s in record["strata"]]
    assert record["indices"] == choose_staff(speculative, strata, ratios, 12, "paper", 42).rows.tolist()
    with pytest.raises(UserError, match=r"give selection\.mode extended with it"):
        call(coreset, [*options, "--mode", "paper"], monkeypatch)

    identities = []  # the scores of paper and extended are the same scores
    for mode in ("paper", "extended", "released"):
        experiment.selection = Selection(mode=mode, precision="fp32")
        identities.append(score_identity(experiment, split, experiment.small_model, None))
    assert identities[0] == identities[1] != identities[2]


def test_a_grid_holds_staff_and_staff_with_length_control(tmp_path):
    grid = load_grid(REPOSITORY / "configs" / "reproduce" / "smollm2_cpu.yaml")
    own = [cell for cell in cells_of(grid) if cell.method == "staff_length" and cell.seed == 1]
    assert [cell.tuned for cell in own] == ["staff-0.1", "staff-0.3"] and len(set(map(str, cells_of(grid)))) == 30
    arguments = stage_arguments(grid, tmp_path, own[0])
    experiment, plain = load(arguments), load(stage_arguments(grid, tmp_path, replace(own[0], method="staff")))
    assert experiment.folder.name == "go_biology-seed-1-staff_length" and plain.folder.name == "go_biology-seed-1"
    assert (experiment.selection.length_control, plain.selection.length_control) == ("residual", "none")
    assert "staff_length" not in plain.selection.methods and experiment.selection.methods == ["staff"]
    small, *rest = jobs_of(own, arguments)
    assert small.name == "go_biology-seed-1-staff_length small"
    assert [(job.needs, job.cell) for job in rest] == [(small.name, cell) for cell in own]
