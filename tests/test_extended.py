"""What mode extended adds to the published method: adaptive verification and length control."""

import functools
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from test_processes import together

from scripts.paper import adaptive_verification as adaptive_script
from scripts.paper.cells import cells_of, experiment_arguments, jobs_of, load
from scripts.paper.intervals import ratio_interval
from selection import coreset, verify
from selection.method import adaptive
from selection.method.adaptive import START, budget_widths, first_counts, moves, next_counts, resampled_ratios
from selection.method.effort import EffortScorer
from selection.method.length_control import length_residual
from selection.method.staff import allocate_budgets, choose_staff, draw_verification_samples, min_max_normalise
from selection.rows.split import training_split
from selection.run.config import Selection, load_experiment, validated
from selection.run.errors import UserError
from selection.run.ledger import SPECULATIVE_SCORES, VERIFICATION, read_ledger
from selection.scores.folder import Scores, read_scores
from selection.scores.identity import score_identity
from selection.scores.scoring import _of_leader, score_rows
from selection.scores.verification import Settings, adaptive_draws, cut_strata, length_controlled, stratified_score
from selection.scores.verification import verify as ratios_of

by_property = settings(max_examples=40, deadline=None)
ADAPTIVE = Settings("extended", 10, 8, 0.1, seed=3, verify="adaptive", rates=[0.1, 0.3])


def scores_of(effort, tokens=None) -> Scores:
    columns = {"effort": np.asarray(effort, dtype=float)}
    columns |= {} if tokens is None else {"n_response_tokens": np.asarray(tokens)}
    return Scores(np.arange(len(effort)), columns, None, None, None, "scores")


def two_models(num_rows: int, seed: int = 0, noise: float = 0.5) -> tuple[np.ndarray, Scores]:
    """Log-normal scores of the small model, and the target's: a power of them with noise."""
    rng = np.random.default_rng(seed)
    small = rng.lognormal(sigma=0.6, size=num_rows)
    return small, scores_of(3 * small**1.3 * rng.lognormal(sigma=noise, size=num_rows))


# The mode


@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize("change", [{"verify": "adaptive"}, {"length_control": "residual"}], ids=str)
def test_additions_are_refused_in_the_two_published_modes(mode, change):
    (key,) = change
    with pytest.raises(UserError, match=rf"{key}.*give selection\.mode extended") as error:
        validated(Selection(), {"mode": mode, **change})
    assert "\n" not in str(error.value)
    assert getattr(validated(Selection(), {"mode": "extended", **change}), key) == change[key]


def test_extended_without_additions_is_the_published_method_bit_for_bit(tmp_path, monkeypatch):
    small, target = two_models(300)
    for name, scores in (("small", small), ("target", target.effort)):
        lines = "".join(f"{row},{score!r},5\n" for row, score in enumerate(scores.tolist()))
        (tmp_path / f"{name}.csv").write_text("index,effort,n_response_tokens\n" + lines)
    given = ["--scores", tmp_path / "small.csv", "--target_scores", tmp_path / "target.csv", "--rate", 0.1, 0.5]
    for mode in ("paper", "extended"):
        command = [*given, "--mode", mode, "--method", "staff", "length", "--out", tmp_path / mode]
        monkeypatch.setattr(sys, "argv", ["coreset.py", *map(str, command)])
        coreset.main()
    for name in ("staff-0.1", "staff-0.5", "length-0.1", "length-0.5"):
        paper, extended = (json.loads((tmp_path / m / f"{name}.json").read_text()) for m in ("paper", "extended"))
        assert extended["mode"] == "extended"
        assert {key: extended[key] for key in paper if key != "mode"} == {k: v for k, v in paper.items() if k != "mode"}
    record = json.loads((tmp_path / "extended" / "staff-0.5.json").read_text())
    assert (record["verify"], record["length_control"], record["stratified_by"]) == ("sampled", "none", "effort")


def test_settings_come_back_from_their_record_and_published_records_have_no_new_keys():
    every = Selection(mode="extended", verify="adaptive", length_control="residual")
    for selection in (Selection(), Selection(mode="released"), every):
        settings_ = Settings.of(selection)
        again = Settings.from_record(json.loads(json.dumps(settings_.record)), Path("record.json"))
        assert again.record == settings_.record
    assert set(Settings.of(Selection()).record) == {
        "mode", "num_strata", "verify_per_stratum", "hardest_cutoff", "seed",
    }  # fmt: skip
    assert Settings.of(every).record["rates"] == every.rates
    assert Settings.of(every).rules == "paper" and Settings.of(Selection(mode="released")).rules == "released"
    assert every.baseline_variant == "published" and not every.verify_all


# Adaptive verification


def rounds_of(small, target, settings_) -> list[list[np.ndarray]]:
    return list(adaptive_draws(small, settings_, cut_strata(small, settings_), None, lambda: target))


def test_rounds_grow_by_prefixes_of_the_same_order_and_end_at_the_limit():
    small, target = two_models(400, noise=1.0)
    strata, made = cut_strata(small, ADAPTIVE), rounds_of(small, target, ADAPTIVE)
    assert [len(rows) for rows in made[0]] == [min(size, START) for size in strata.sizes]
    assert len(made) > 1 and sum(map(len, made[-1])) <= 10 * 8
    for before, after in itertools.pairwise(made):
        added = [len(b) - len(a) for a, b in zip(before, after, strict=True)]
        assert min(added) >= 0 and 0 < sum(added) <= len(strata.members)
        assert all(len(b) <= 2 * len(a) for a, b in zip(before, after, strict=True))
    for fixed, rows in zip(draw_verification_samples(strata, 5, "paper", ADAPTIVE.seed), made[-1], strict=True):
        assert set(fixed) <= set(rows)  # START is 5
    assert [[rows.tolist() for rows in each] for each in rounds_of(small, target, ADAPTIVE)] == [
        [rows.tolist() for rows in each] for each in made
    ]


def test_what_the_target_has_scored_besides_decides_nothing():
    small, target = two_models(400, noise=1.0)
    last = rounds_of(small, target, ADAPTIVE)[-1]
    alone = target.only(np.sort(np.concatenate(last)))
    assert ratios_of(small, alone, ADAPTIVE) == ratios_of(small, target, ADAPTIVE)
    assert [r.verified for r in ratios_of(small, target, ADAPTIVE)] == [rows.tolist() for rows in last]
    with pytest.raises(UserError, match="drawn for verification and has no score"):
        ratios_of(small, target.only(alone.index[:-1]), ADAPTIVE)


def test_rows_that_scoring_left_out_are_drawn_and_count_for_nothing():
    small, target = two_models(400, noise=1.0)
    out = rounds_of(small, target, ADAPTIVE)[0][2][:2]
    kept = np.setdiff1d(np.arange(400), out)
    without = replace(target.only(kept), left_out=np.sort(out))
    record = ratios_of(small, without, ADAPTIVE)[2]
    assert not set(out) & set(record.verified) and len(record.verified) >= START - 2


def test_models_that_agree_are_settled_at_once_and_strata_drawn_whole_too():
    small, _ = two_models(400)
    assert len(rounds_of(small, scores_of(2 * small), ADAPTIVE)) == 1
    few = np.arange(1.0, 31.0)
    whole = replace(ADAPTIVE, verify_per_stratum=30)
    target = scores_of(np.random.default_rng(0).random(30))
    assert sum(map(len, rounds_of(few, target, whole)[-1])) <= 27


def test_draws_go_to_the_stratum_whose_ratio_is_uncertain_and_not_to_one_taken_whole():
    rng = np.random.default_rng(0)
    ours = [np.full(5, 0.5) for _ in range(4)]
    theirs = [0.5 + spread * rng.standard_normal(5) for spread in (0.2, 0.01, 0.2, 0.01)]
    sizes = [6, 400, 500, 600]  # the first is taken whole at any V near 1
    pairs = list(zip(ours, theirs, strict=True))
    after = next_counts([5] * 4, pairs, sizes, 1000, [200], seed=0)
    assert after[0] == 5 and after[2] == max(after) > 5
    by_v = next_counts([5] * 4, pairs, sizes, 1000, [200], 0, widths=adaptive_script.ratio_widths)
    assert by_v[2] > 5 and by_v[1] == 5
    assert next_counts([5] * 4, pairs, sizes, 20, [200], seed=0) is None  # the limit is spent
    assert sum(next_counts([5] * 4, pairs, sizes, 22, [200], seed=0)) == 22


def test_the_replicates_are_of_the_distribution_that_the_interval_is_of(monkeypatch):
    monkeypatch.setattr(adaptive, "RESAMPLES", 20_000)
    rng = np.random.default_rng(1)
    ours, theirs = rng.uniform(0.4, 0.6, 40), rng.uniform(0.3, 0.7, 40)
    for n in (5, 30, 40):
        found = resampled_ratios([n], [(ours[:n], theirs[:n])], [40], 0)
        assert np.quantile(found, [0.025, 0.975]) == pytest.approx(ratio_interval(theirs[:n], ours[:n], 40), rel=0.02)
    assert np.ptp(found) == 0
    assert np.isfinite(resampled_ratios([2], [(ours[:2], theirs[:2])], [40], 0)).all()
    assert np.ptp(resampled_ratios([1], [(ours[:1], theirs[:1])], [40], 0)) == 0


@by_property
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 200))
def test_moves_and_widths_are_those_of_the_budgets_themselves(seed, num_strata, m):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 60, num_strata).tolist()
    m = min(m, sum(sizes))
    ratios, other = rng.lognormal(size=(2, num_strata))
    ours, theirs = (allocate_budgets(sizes, v.tolist(), m, "paper") for v in (ratios, other))
    gained = sum(max(0, a - b) for a, b in zip(theirs, ours, strict=True)) + max(0, sum(ours) - sum(theirs))
    assert moves(sizes, ratios.tolist(), np.array([ratios, other]), m) == pytest.approx([0, gained / m])
    low, high = np.minimum(ratios, other), np.maximum(ratios, other)
    widths = budget_widths(sizes, ratios.tolist(), low, high, m)
    for i in range(num_strata):
        ends = [allocate_budgets(sizes, [*ratios[:i], v, *ratios[i + 1 :]], m, "paper")[i] for v in (low[i], high[i])]
        assert abs(widths[i] - (ends[1] - ends[0])) <= 1 + 1e-9  # budgets are rounded down


def test_at_real_size_noisy_strata_get_more_and_the_end_is_before_the_limit(monkeypatch):
    """N and K of the paper's BioInstruct. A check of behaviour, no evidence for real scores."""
    rng = np.random.default_rng(5)
    small = np.minimum(rng.lognormal(sigma=0.5, size=22_504), 4.0)
    noisy = small > np.quantile(small, 0.5)
    target = scores_of(small * np.exp(np.where(noisy, 1.0, 0.02) * rng.standard_normal(len(small))))
    at_size = Settings("extended", 50, 40, 0.1, seed=1, verify="adaptive", rates=[0.1])
    strata = cut_strata(small, at_size)
    assert sum(map(len, rounds_of(small, target, at_size)[-1])) < 50 * 40
    monkeypatch.setattr("selection.scores.verification.next_counts", functools.partial(next_counts, settled=0))
    made = rounds_of(small, target, replace(at_size, verify_per_stratum=10))
    assert sum(map(len, made[-1])) == 50 * 10
    large = [i for i, rows in enumerate(strata.members) if len(rows) > 40]
    drawn = {side: [len(made[-1][i]) for i in large if noisy[strata.members[i]].mean() == side] for side in (0, 1)}
    assert len(drawn[0]) > 5 and np.mean(drawn[1]) > 1.5 * np.mean(drawn[0])
    assert first_counts(strata.sizes, 2) == [min(2, size) for size in strata.sizes]


@pytest.fixture
def scored(make_experiment, rows, tmp_path):
    """A function from overrides to an experiment with the small model's scores of 24 rows, as it is, in strata of 3."""

    def make(*more: str):
        overrides = [
            f"output_dir={json.dumps(str(tmp_path / 'run'))}", "small_training.num_train_epochs=0",
            "selection.mode=extended", "selection.num_strata=3", "selection.verify_per_stratum=7",
            "selection.self_test=0", "selection.hardest_cutoff=0", *more,
        ]  # fmt: skip
        path = make_experiment(rows)
        experiment = load_experiment(path, overrides)
        split = training_split(experiment)
        score_rows(
            experiment, split, experiment.small_model, None, np.arange(24), experiment.small_scores, SPECULATIVE_SCORES
        )
        return experiment, ["--config_path", str(path), *(part for each in overrides for part in ("--set", each))]

    return make


def call(stage, options, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage", *options])
    stage.main()


def test_a_resumed_adaptive_run_equals_an_unbroken_one(scored, monkeypatch, tmp_path):
    models, score, batches = [], EffortScorer.score, []
    monkeypatch.setattr("selection.method.adaptive.START", 2)
    monkeypatch.setattr("selection.scores.verification.next_counts", functools.partial(next_counts, settled=0))
    monkeypatch.setattr(
        "selection.scores.scoring._load_scorer", counted(models, "selection.scores.scoring._load_scorer")
    )
    found = {}
    for name, stops_at in (("unbroken", None), ("resumed", 8)):
        folder = f"output_dir={json.dumps(str(tmp_path / name))}"
        experiment, options = scored(folder, "selection.verify=adaptive", "selection.tokens_per_batch=200")
        models.clear()
        if stops_at:
            batches.clear()

            def interrupted(self, *batch, at=stops_at):
                batches.append(batch)
                if len(batches) == at:
                    raise KeyboardInterrupt
                return score(self, *batch)

            monkeypatch.setattr(EffortScorer, "score", interrupted)
            with pytest.raises(KeyboardInterrupt):
                call(verify, options, monkeypatch)
            monkeypatch.setattr(EffortScorer, "score", score)
        call(verify, options, monkeypatch)
        found[name] = read_scores(experiment.target_scores), json.loads(experiment.verification.read_text())
        assert len(models) == 1 + bool(stops_at)  # once for all rounds
    (unbroken, said), (resumed, again) = found.values()
    assert resumed.effort.tobytes() == unbroken.effort.tobytes() and resumed.index.tolist() == unbroken.index.tolist()
    assert again == said
    assert said["verify"] == "adaptive" and len(said["rounds"]) > 2
    assert said["rounds"][-1] == [len(stratum["verified"]) for stratum in said["strata"]]
    assert sum(said["rounds"][-1]) == said["verified_samples"] == len(unbroken.index) <= 21
    paid = [cost for cost in read_ledger(tmp_path / "unbroken") if cost.stage == VERIFICATION]
    assert [cost.samples for cost in paid] == [len(unbroken.index)]  # one entry counts all rounds
    call(coreset, options, monkeypatch)
    record = json.loads((tmp_path / "resumed" / "coresets" / "staff-0.5.json").read_text())
    assert (record["mode"], record["verify"], record["rates"]) == ("extended", "adaptive", [0.5])
    with pytest.raises(UserError, match="verify: stored"):
        call(coreset, [*options, "--set", "selection.verify=sampled"], monkeypatch)


def counted(calls: list, name: str):
    module, _, function = name.rpartition(".")
    real = getattr(sys.modules[module], function)

    def counting(*arguments):
        calls.append(arguments)
        return real(*arguments)

    return counting


def test_scores_of_paper_and_extended_are_the_same_scores(scored):
    experiment, _ = scored()
    split = training_split(experiment)
    identities = []
    for mode in ("paper", "extended", "released"):
        experiment.selection = Selection(mode=mode, precision="fp32")
        identities.append(score_identity(experiment, split, experiment.small_model, None))
    assert identities[0] == identities[1] != identities[2]


def test_every_process_gets_the_rounds_of_the_leader():
    def work(group):
        asked = iter([np.array([1, 2]), np.array([1, 2, 5])] if group.leads else [])
        return [rows.tolist() for rows in _of_leader(asked)]

    assert together(2, work) == [[[1, 2], [1, 2, 5]]] * 2


# Length control


@st.composite
def scores_by_length(draw) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    tokens = rng.integers(1, 200, draw(st.integers(12, 200)))
    scores = tokens ** draw(st.sampled_from([-1.0, -0.5, 0.0, 0.7])) * rng.lognormal(sigma=0.5, size=len(tokens))
    scores[rng.random(len(scores)) < draw(st.sampled_from([0.0, 0.1]))] = 0
    return scores, tokens


@by_property
@given(scores_by_length(), st.sampled_from([1e-6, 0.3, 1e5]))
def test_logarithms_of_residuals_and_lengths_are_uncorrelated_whatever_the_unit(case, unit):
    scores, tokens = case
    if (scores > 0).sum() < 10:
        return
    left, positive = length_residual(scores, tokens), scores > 0
    assert np.array_equal(left > 0, positive) and np.isfinite(left).all()
    lengths = np.log(tokens[positive])
    assert abs(np.cov(lengths, np.log(left[positive]))[0, 1]) < 1e-9
    assert length_residual(unit * scores, tokens) == pytest.approx(left, rel=1e-9)
    fit = np.polyfit(lengths, np.log(scores[positive]), 1)  # the formula, literally
    assert left[positive] == pytest.approx(scores[positive] / np.exp(np.polyval(fit, lengths)), rel=1e-6)


def test_ranks_no_longer_follow_length():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 300, 2000)
    scores = tokens**-0.8 * rng.lognormal(sigma=0.3, size=2000)
    assert spearmanr(scores, tokens).statistic < -0.8
    assert abs(spearmanr(length_residual(scores, tokens), tokens).statistic) < 0.05


def test_without_an_effect_of_length_the_strata_stay_as_they_are():
    scores = np.repeat(np.random.default_rng(0).lognormal(size=100), 2)
    tokens = np.tile([10, 40], 100)  # each score once at each length
    paper = Settings("paper", 10, 3, 0.1, 0)
    before, after = (cut_strata(s, paper) for s in (scores, length_residual(scores, tokens)))
    assert [rows.tolist() for rows in before.members] == [rows.tolist() for rows in after.members]
    one_length = length_residual(scores, np.full(200, 7))
    assert one_length / scores == pytest.approx(np.full(200, one_length[0] / scores[0]))


def test_a_fit_of_too_few_scores_and_a_row_without_response_are_refused():
    with pytest.raises(UserError, match="9 scores above 0"):
        length_residual(np.array([1.0] * 9 + [0.0] * 5), np.arange(1, 15))
    with pytest.raises(UserError, match="row 2 has no response token"):
        length_controlled(scores_of(np.ones(12), [3, 3, 0] + [4] * 9))


def test_each_model_is_controlled_by_its_own_fit_over_the_rows_it_has_scored():
    rng = np.random.default_rng(2)
    tokens, core = rng.integers(5, 300, 400), rng.lognormal(sigma=0.5, size=400)
    small, target = scores_of(core * tokens**-0.5, tokens), scores_of(9 * core * tokens**-1.5, tokens)
    control = Settings("extended", 10, 8, 0.1, seed=3, length_control="residual")
    speculative = stratified_score(small, control).effort
    exact = [r.verification_ratio for r in ratios_of(speculative, target, control)]
    assert exact == pytest.approx([1.0] * len(exact), abs=1e-6)  # nothing but length tells the models apart
    raw = [r.verification_ratio for r in ratios_of(small.effort, target, replace(control, length_control="none"))]
    assert max(np.abs(np.array(raw) - 1)) > 0.1
    both = replace(ADAPTIVE, length_control="residual")
    sampled = [r.verification_ratio for r in ratios_of(speculative, target, both)]
    some = target.only(
        np.sort(np.concatenate(draw_verification_samples(cut_strata(speculative, control), 8, "paper", 3)))
    )
    own_fit = [r.verification_ratio for r in ratios_of(speculative, some, control)]
    for v in (sampled, own_fit):
        assert np.abs(np.array(v) - 1).mean() < np.abs(np.array(raw) - 1).mean() / 3
    # The fit is over all rows that the target has scored, the drawn ones alone where it has scored no others.
    drawn = [r.verified for r in ratios_of(speculative, some, control)]
    rows = np.concatenate(drawn)
    left = length_residual(target.effort[rows], tokens[rows])
    ends = min_max_normalise(speculative[rows], speculative)
    by_hand = ends.min() + (ends.max() - ends.min()) * min_max_normalise(left, left)
    first = len(drawn[0])
    assert own_fit[0] == pytest.approx(by_hand[:first].sum() / ends[:first].sum())


def test_length_control_in_the_stages(scored, monkeypatch, tmp_path):
    experiment, options = scored("selection.length_control=residual")
    call(verify, options, monkeypatch)
    call(coreset, options, monkeypatch)
    record = json.loads((tmp_path / "run" / "coresets" / "staff-0.5.json").read_text())
    assert record["stratified_by"] == "length residual of effort" and record["length_control"] == "residual"
    raw = read_scores(experiment.small_scores, ("effort", "n_response_tokens"))
    speculative = length_residual(raw.effort, raw.columns["n_response_tokens"])
    strata = cut_strata(speculative, Settings.of(experiment.selection))
    assert [tuple(s["score_range"]) for s in record["strata"]] == strata.score_ranges
    ratios = [s["verification_ratio"] for s in record["strata"]]
    assert record["indices"] == choose_staff(speculative, strata, ratios, 0.5, "paper", 42).rows.tolist()
    with pytest.raises(UserError, match=r"give selection\.mode extended with it"):
        call(coreset, [*options, "--mode", "paper"], monkeypatch)


def test_a_grid_holds_staff_and_staff_with_length_control(tmp_path):
    from selection.run.config import load_grid

    grid = load_grid(REPOSITORY / "configs" / "reproduce" / "smollm2_cpu.yaml")
    own = [cell for cell in cells_of(grid) if cell.variant and cell.seed == 1]
    assert [cell.tuned for cell in own] == ["staff-0.1", "staff-0.3"] and len(
        {str(cell) for cell in cells_of(grid)}
    ) == 30
    arguments = experiment_arguments(grid, tmp_path, "go_biology", 1, "staff_length")
    experiment, plain = load(arguments), load(experiment_arguments(grid, tmp_path, "go_biology", 1))
    assert experiment.folder.name == "go_biology-seed-1-staff_length" and plain.folder.name == "go_biology-seed-1"
    assert (experiment.selection.length_control, plain.selection.length_control) == ("residual", "none")
    assert "staff_length" not in plain.selection.methods and experiment.selection.methods == ["staff"]
    small, *rest = jobs_of("go_biology", 1, own, experiment, arguments, 400)
    assert [command[0].rsplit("/")[-1] for command in small.commands][-2:] == ["verify.py", "coreset.py"]
    assert small.name == "go_biology, seed 1, staff_length, speculative selection"
    assert [(job.needs, job.cell) for job in rest] == [(small.name, cell) for cell in own]
