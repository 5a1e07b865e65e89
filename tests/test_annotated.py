"""What is said of every row of the user's data: from where it comes, what it scored, and why it was chosen or not."""

import importlib
import json
import re
import shutil
import sys

import numpy as np
import pytest

from selection.method.interval import ratio_interval
from selection.method.staff import Choice, min_max_normalise, stratify
from selection.report.annotated import annotated
from selection.rows.split import row_id, rows_of, split_numbers, training_split
from selection.run.config import load_experiment
from selection.run.errors import UserError
from selection.scores.coresets import write_coreset
from selection.scores.folder import ScoreFolder, read_scores
from selection.scores.identity import score_identity, write_experiment
from selection.scores.verification import Settings, cut_strata, draw, verify, write_verification

ROWS = [{"instruction": f"question {i}", "input": "", "output": f"answer {i}"} for i in range(130)]
EFFORT = np.random.default_rng(0).lognormal(size=104)  # of the training split


def write_scores(experiment, folder, split, rows, effort) -> None:
    identity = score_identity(experiment, split, experiment.small_model, None)  # both models are the tiny one
    scores = ScoreFolder(folder, identity, len(split.rows))
    scores.plan(rows, lambda missing: [[missing.tolist()]])
    counts = {"n_prompt_tokens": rows + 2, "n_response_tokens": rows + 1, "loss": effort[rows] / 2}
    ids = np.array(split.ids)[rows]
    scores.write_part([rows.tolist()], {"index": rows, "id": ids, "effort": effort[rows], **counts})
    scores.finish(rows)


@pytest.fixture
def run(make_experiment, monkeypatch):
    """A function that gives an experiment with scores and verification, as the stages leave them, and its coresets."""
    monkeypatch.setattr(sys, "path", sys.path.copy())  # the script changes it
    cut = importlib.import_module("selection.coreset").main

    def make(mode: str = "paper", effort: np.ndarray = EFFORT, **changes):
        keys = {"mode": mode, "num_strata": 6, "verify_per_stratum": 3, "rates": [0.3, 0.95]} | changes
        path = make_experiment(ROWS, selection=keys)
        experiment = load_experiment(path)
        split, settings = training_split(experiment), Settings.of(experiment.selection)
        write_scores(experiment, experiment.small_scores, split, np.arange(len(effort)), effort)
        scores = read_scores(experiment.small_scores, ids=False)
        drawn = scores.index[np.concatenate(draw(cut_strata(scores.effort, settings), settings))]
        write_scores(experiment, experiment.target_scores, split, np.sort(drawn), 3 * effort)
        records = verify(scores.effort, read_scores(experiment.target_scores), settings, index=scores.index)
        write_verification(experiment.verification, settings, scores, records)
        monkeypatch.setattr(sys, "argv", ["coreset.py", "--config_path", str(path)])
        cut()
        return experiment

    return make


def test_every_row_of_the_data_has_its_line_in_its_order(run):
    experiment = run()
    table = annotated(experiment, experiment.coresets / "staff-0.3.json").to_pylist()
    assert [line["row"] for line in table] == list(range(130))
    split = training_split(experiment)
    for line in table:
        if line["split"] == "eval":
            assert line["reason"] == "held out for evaluation" and not line["chosen"] and line["effort"] is None
            continue
        index = line["index"]
        assert split.rows[index] == ROWS[line["row"]]
        assert line["id"] == row_id(ROWS[line["row"]])
        assert (line["effort"], line["loss"]) == (EFFORT[index], EFFORT[index] / 2)
        assert line["n_response_tokens"] == index + 1
        assert line["target_effort"] == (3 * EFFORT[index] if line["verified"] else None)
    assert sorted(line["index"] for line in table if line["split"] == "train") == list(range(104))


def test_the_row_numbers_are_those_of_the_split(run):
    experiment = run()
    for name, numbers in split_numbers(experiment).items():
        assert list(rows_of(experiment, name)) == [ROWS[number] for number in numbers]


@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize("rate", ["0.3", "0.95"])
def test_the_reasons_add_up_to_the_coresets_own_record(run, mode, rate):
    experiment = run(mode)
    path = experiment.coresets / f"staff-{rate}.json"
    coreset, table = json.loads(path.read_text()), annotated(experiment, path).to_pylist()
    chosen = [line for line in table if line["chosen"]]
    assert sorted(line["index"] for line in chosen) == coreset["indices"]
    for record in coreset["strata"]:
        here = [line for line in table if line["stratum"] == record["stratum"]]
        assert len(here) == record["size"]
        assert {line["verification_ratio"] for line in here} == {record["verification_ratio"]}
        assert {line["index"] for line in here if line["verified"]} == set(record["verified"])
        of_here = [line for line in here if line["chosen"]]
        assert len(of_here) == record["budget"]
        assert sum("random fill" in line["reason"] for line in of_here) == record["of_which_random_fill"]
    assert sum("taken back" in line["reason"] for line in chosen) == coreset["from_hardest"]
    hardest = [line for line in table if line["stratum"] is None and line["split"] == "train"]
    assert len(hardest) == 10 and min(line["effort"] for line in hardest) == np.sort(EFFORT)[-10]
    assert all(line["reason"].startswith("chosen") == line["chosen"] for line in table)
    assert all("hardest" in line["reason"] for line in hardest)


def test_rows_without_a_score_say_so(run):
    effort = EFFORT.repeat(1)
    effort[7] = np.nan
    experiment = run(effort=effort)
    table = annotated(experiment, experiment.coresets / "staff-0.95.json").to_pylist()
    (line,) = [line for line in table if line["index"] == 7]
    assert (line["effort"], line["stratum"], line["chosen"]) == (None, None, False)
    assert line["reason"] == "left out: its loss or score is not finite"
    assert sum("left out" in line["reason"] for line in table) == 1
    assert sum(line["chosen"] for line in table) == 97  # ⌊0.95 · 103⌋


def test_other_coresets_have_their_method_for_a_reason(run):
    experiment = run(methods=["random"])
    table = annotated(experiment, experiment.coresets / "random-0.3.json").to_pylist()
    assert {line["reason"] for line in table} == {
        "chosen by random", "not chosen by random", "held out for evaluation",
    }  # fmt: skip
    assert all(line["stratum"] is None for line in table)


def test_a_coreset_of_other_scores_or_data_is_refused(run, tmp_path):
    experiment = run()
    path = experiment.coresets / "staff-0.3.json"
    scores, record = read_scores(experiment.small_scores), json.loads(path.read_text())
    rows = np.array(record["indices"])
    rows[0] = next(row for row in range(104) if row not in rows)
    choice = Choice(np.sort(rows))
    about = {name: record[name] for name in (*Settings.of(experiment.selection).record, "strata")}
    other = write_coreset(tmp_path, "staff", 0.3, choice, scores, about)
    with pytest.raises(UserError, match="cut from other scores than"):
        annotated(experiment, other)
    path.write_text(path.read_text().replace(record["data_fingerprint"], "0" * 64))
    with pytest.raises(UserError, match="chosen from other data"):
        annotated(experiment, path)


@pytest.mark.parametrize(
    "change", [{"strata": [1, 2]}, {"rate": "x"}, {"rate": None}, {"num_strata": 0}, {"seed": None}, {"indices": "x"}]
)
def test_a_coreset_file_that_says_nonsense_is_refused(run, change):
    experiment = run()
    path = experiment.coresets / "staff-0.3.json"
    record = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))
    with pytest.raises(UserError, match=re.escape(str(path))):
        annotated(experiment, path)


def test_without_the_scores_the_chosen_rows_are_known_still(run):
    experiment = run()
    shutil.rmtree(experiment.small_scores)
    table = annotated(experiment, experiment.coresets / "staff-0.3.json").to_pylist()
    assert sum(line["chosen"] for line in table) == 31 and {line["effort"] for line in table} == {None}


def test_the_experiment_keeps_its_exact_configuration(run):
    experiment = run()
    assert not experiment.record.exists()  # cutting a coreset, or reading the data, is no reason to write it
    write_experiment(experiment)
    assert experiment.record.read_text().startswith("# suite ")
    assert load_experiment(experiment.record) == experiment
    written = experiment.record.stat().st_mtime_ns
    write_experiment(experiment)
    assert experiment.record.stat().st_mtime_ns == written
    write_experiment(load_experiment(experiment.record, ["selection.num_strata=7"]))
    assert load_experiment(experiment.record).selection.num_strata == 7


def simulated_strata(rng, skew):
    """(speculative, target) normalised scores of all rows of a stratum, as a run cuts them: lognormal scores of
    σ = `skew`, two models that agree not at all to closely, few rows in few strata to many in many."""
    for agreement in (0, 0.5, 0.9):
        for num_rows, num_strata in ((200, 10), (1000, 20), (4000, 20)):
            noise = rng.standard_normal((2, num_rows))
            other = agreement * noise[0] + np.sqrt(1 - agreement**2) * noise[1]
            scores = (np.exp(skew * each) for each in (noise[0], other))
            ours, theirs = (min_max_normalise(each, reference=each) for each in scores)
            for rows in stratify(ours, num_strata, 0.1).members:
                yield ours[rows], theirs[rows]


def coverage(rng, n, skews):
    hits = []
    for skew in skews:
        for _ in range(6):
            for ours, theirs in simulated_strata(rng, skew):
                if len(ours) <= n:
                    continue
                for _ in range(4):
                    drawn = rng.permutation(len(ours))[:n]
                    low, high = ratio_interval(theirs[drawn], ours[drawn], len(ours))
                    hits.append(low <= theirs.sum() / ours.sum() <= high)
    assert len(hits) > 1500
    return np.mean(hits)


@pytest.mark.parametrize("n", [5, 10, 20, 40])
def test_the_interval_of_v_holds_its_level(n):
    rng = np.random.default_rng(n)
    assert 0.93 <= coverage(rng, n, (0.3, 0.6)) <= 0.97
    assert 0.90 <= coverage(rng, n, (1.0,)) <= 0.95  # as the docstring says


def test_the_interval_of_v_is_known_from_five_rows_on_and_nothing_where_all_are_verified():
    rng = np.random.default_rng(0)
    ours, theirs = rng.uniform(0.5, 1, 40), rng.uniform(0.5, 1, 40)
    for n in (0, 1, 2, 4):
        assert np.isnan(ratio_interval(theirs[:n], ours[:n], 40)).all()
    for n in (1, 2, 4, 40):
        assert ratio_interval(theirs[:n], ours[:n], n) == pytest.approx([theirs[:n].sum() / ours[:n].sum()] * 2)
    assert np.isnan(ratio_interval(np.eye(6)[0], ours[:6], 40)).all()  # without that sample the ratio is 0
    assert ratio_interval(2 * ours, ours, 90) == pytest.approx((2, 2))
    assert ratio_interval(theirs, ours / 1e12, 90) == pytest.approx(np.multiply(ratio_interval(theirs, ours, 90), 1e12))
    low, high = ratio_interval(theirs, ours, 41)
    assert high - low < 0.25 * np.ptp(ratio_interval(theirs, ours, 10**6))
