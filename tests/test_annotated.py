"""What is said of every row of the user's data: from where it comes, what it scored, and why it was chosen or not."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest
from conftest import scored_run

from selection.method.interval import ratio_interval
from selection.method.staff import min_max_normalise, stratify
from selection.report.annotated import annotated
from selection.rows.split import row_id, rows_of, split_numbers, training_split
from selection.run.errors import UserError
from selection.scores.coresets import write_coreset
from selection.scores.folder import read_scores
from selection.scores.verification import Settings

ROWS = [{"instruction": f"question {i}", "input": "", "output": f"answer {i}"} for i in range(130)]
EFFORT = np.random.default_rng(0).lognormal(size=104)  # of the training split


@pytest.fixture
def run(tmp_path):
    """A function that gives a run with coresets of rates 0.3 and 0.95."""
    settings = {"num_strata": 6, "verify_per_stratum": 3, "rates": [0.3, 0.95]}
    return lambda effort=EFFORT, **changes: scored_run(tmp_path, ROWS, effort, **settings | changes)


def lines(experiment, name: str) -> list[dict]:
    return annotated(experiment, experiment.coresets / f"{name}.json").to_pylist()


def test_every_row_of_the_data_has_its_line_in_its_order(run):
    experiment = run()
    table, split = lines(experiment, "staff-0.3"), training_split(experiment)
    assert [line["row"] for line in table] == list(range(130))
    for line in table:
        if line["split"] == "eval":
            assert line["reason"] == "held out for evaluation" and not line["chosen"] and line["effort"] is None
        else:
            index = line["index"]
            assert split.rows[index] == ROWS[line["row"]] and line["id"] == row_id(ROWS[line["row"]])
            assert (line["effort"], line["n_response_tokens"]) == (EFFORT[index], index + 1)
            assert line["target_effort"] == (3 * EFFORT[index] if line["verified"] else None)
    assert sorted(line["index"] for line in table if line["split"] == "train") == list(range(104))
    for name, numbers in split_numbers(experiment).items():
        assert list(rows_of(experiment, name)) == [ROWS[number] for number in numbers]


@pytest.mark.parametrize(("mode", "rate"), [("paper", "0.3"), ("paper", "0.95"), ("released", "0.3")])
def test_the_reasons_add_up_to_the_coresets_own_record(run, mode, rate):
    experiment = run(mode=mode)
    coreset = json.loads((experiment.coresets / f"staff-{rate}.json").read_text())
    table = lines(experiment, f"staff-{rate}")
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


def test_other_coresets_have_their_method_for_a_reason_and_need_no_scores(run):
    experiment = run(methods=["random"])
    for scored in (True, False):
        table = lines(experiment, "random-0.3")
        reasons = {"chosen by random", "not chosen by random", "held out for evaluation"}
        assert {line["reason"] for line in table} == reasons and {line["stratum"] for line in table} == {None}
        assert sum(line["chosen"] for line in table) == 31 and any(line["effort"] for line in table) == scored
        shutil.rmtree(experiment.small_scores, ignore_errors=True)


def test_a_coreset_of_other_scores_or_data_or_of_nonsense_is_refused(run, tmp_path):
    experiment = run()
    path = experiment.coresets / "staff-0.3.json"
    scores, record = read_scores(experiment.small_scores), json.loads(path.read_text())
    rows = np.array(record["indices"])
    rows = np.sort([next(row for row in range(104) if row not in rows), *rows[1:]])
    about = {name: record[name] for name in (*Settings.of(experiment.selection).record, "strata")}
    other = write_coreset(tmp_path, "staff", 0.3, rows, [scores.ids[row] for row in rows], scores, about)
    with pytest.raises(UserError, match="cut from other scores than"):
        annotated(experiment, other)
    wrong = [{"strata": [1, 2]}, {"rate": "x"}, {"num_strata": 0}, {"indices": "x"}, {"data_fingerprint": "0" * 64}]
    absent = [{key: value for key, value in record.items() if key != name} for name in ("rate", "strata", "seed")]
    for changed in [*absent, *(record | change for change in wrong)]:
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=re.escape(str(path))):
            annotated(experiment, path)


@pytest.mark.parametrize(("n", "skew", "least"), [(5, 0.6, 0.93), (20, 0.3, 0.93), (20, 1.0, 0.90)])
def test_the_interval_of_v_holds_its_level(n, skew, least):
    """Lognormal scores of two models that agree not at all to closely, few rows in few strata to many in many."""
    rng, hits = np.random.default_rng(n), []
    cases = itertools.product((0, 0.5, 0.9), ((200, 10), (1000, 20), (4000, 20)))
    for agreement, (num_rows, num_strata) in list(cases) * 6:
        noise = rng.standard_normal((2, num_rows))
        noise[1] = agreement * noise[0] + np.sqrt(1 - agreement**2) * noise[1]
        ours, theirs = (min_max_normalise(each, reference=each) for each in np.exp(skew * noise))
        for rows in stratify(ours, num_strata, 0.1).members:
            for _ in range(4 if len(rows) > n else 0):
                drawn = rng.permutation(rows)[:n]
                low, high = ratio_interval(theirs[drawn], ours[drawn], len(rows))
                hits.append(low <= theirs[rows].sum() / ours[rows].sum() <= high)
    assert len(hits) > 1500 and least <= np.mean(hits) <= 0.97


def test_the_interval_of_v_is_known_from_five_rows_on_and_nothing_where_all_are_verified():
    ours, theirs = np.random.default_rng(0).uniform(0.5, 1, (2, 40))
    for n in (0, 1, 2, 4):
        assert np.isnan(ratio_interval(theirs[:n], ours[:n], 40)).all()
    for n in (1, 2, 4, 40):
        assert ratio_interval(theirs[:n], ours[:n], n) == pytest.approx([theirs[:n].sum() / ours[:n].sum()] * 2)
    assert np.isnan(ratio_interval(np.eye(6)[0], ours[:6], 40)).all()  # without that sample the ratio is 0
    assert ratio_interval(theirs, ours / 1e12, 90) == pytest.approx(np.multiply(ratio_interval(theirs, ours, 90), 1e12))
    assert np.ptp(ratio_interval(theirs, ours, 41)) < 0.25 * np.ptp(ratio_interval(theirs, ours, 10**6))
