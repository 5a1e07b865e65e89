"""Several targets on one run's speculative scores: nothing is made twice, the choice is the same, the cost shared."""

from conftest import everything_in

from selection.run import ledger
from selection.run.config import load_experiment
from selection.run.ledger import read_ledger, selection_costs, sharing_runs, summarise
from selection.run.products import read_json, read_sealed, write_sealed

STAGES = ("finetune.finetune", "selection.effort_score", "selection.verify", "selection.coreset")
UNTUNED = {"num_train_epochs": 0}


def test_a_second_target_on_the_first_ones_scores_chooses_what_its_own_would_and_they_share_the_cost(
    make_experiment, rows, stage, other_target, tmp_path
):
    selection = {"rates": [0.5, 0.25], "num_strata": 4, "verify_per_stratum": 2, "precision": "fp32", "self_test": 0}
    first = make_experiment(rows, selection=selection)
    keys = {"selection": selection, "target_model": other_target, "output_dir": str(tmp_path / "second")}
    second = make_experiment(rows, "second", **keys, speculative_run=str(tmp_path / "run"))
    alone = make_experiment(rows, "alone", **keys | {"output_dir": str(tmp_path / "alone")})
    lender, borrower, own = map(load_experiment, (first, second, alone))

    assert all(stage(name, first)[0] == 0 for name in STAGES)
    before, whole = everything_in(lender.folder), selection_costs(lender, "staff")
    for name in STAGES[:3]:  # tuned otherwise than this one asks for
        code, _, err = stage(name, second, "--set", "training.max_steps=1")
        assert code == 2 and "small was made otherwise (keys.max_steps: stored null, now 1)" in err
    assert everything_in(lender.folder) == before
    said = [stage(name, second) for name in STAGES]
    assert [code for code, *_ in said] == [0, 0, 0, 0], said
    for (_, _, err), made in zip(said, ("small", "scores/small"), strict=False):
        assert f"reusing {lender.folder / made}" in err and not (borrower.folder / made).exists()
    assert {cost.stage for cost in read_ledger(borrower.folder)} == {ledger.VERIFICATION, ledger.CORESETS}
    after = everything_in(lender.folder)
    assert set(after) - set(before) == {str(lender.folder / "shared_by.json")} and before.items() <= after.items()

    assert all(stage(name, alone)[0] == 0 for name in STAGES)
    for name in ("staff-0.5.json", "staff-0.25.json"):
        borrowed, alone_, lent = (read_json(each.coresets / name) for each in (borrower, own, lender))
        assert borrowed == alone_ and borrowed["strata"] != lent["strata"]  # the other target judges otherwise

    # Once a run, however often its stage is called.
    assert stage("selection.verify", second)[0] == 0
    assert read_sealed(lender.folder / "shared_by.json") == {"runs": [str(borrower.folder)]}
    assert (sharing_runs(lender), sharing_runs(borrower), sharing_runs(own)) == (2, 2, 1)
    half = {c.stage: (c.seconds / 2, c.tokens / 2) for c in whole if c.stage in ledger.SPECULATIVE_STAGES}
    assert set(half) == {ledger.SPECULATIVE_TUNING, ledger.SPECULATIVE_SCORES}
    for each in (lender, borrower):
        paid = {c.stage: (c.seconds, c.tokens) for c in selection_costs(each, "staff") if c.stage in half}
        assert paid == half
    summary, (code, out, _) = summarise(borrower), stage("scripts.costs", second)
    assert code == 0 and f"({2 * half[ledger.SPECULATIVE_SCORES][0]:.1f} s, shared by 2 runs)" in out
    assert f"shared by the coresets of 2 rates: {summary.selection_total / 2:.1f} s each" in out
    # Tuning on everything is foreseen from what the other run's tuning took.
    assert summary.full_tuning_seconds is not None and "small model" in summary.full_tuning_basis

    # A run of other rules, which verifies nothing, shares too.
    changes = ("--set", "selection.methods=[clusters]", "--set", f"output_dir={tmp_path / 'third'}")
    assert stage("selection.effort_score", second, *changes)[0] == 2  # the lender has no hidden states
    assert stage("selection.effort_score", second, *changes[2:], "--set", "selection.methods=[random]")[0] == 0
    assert sharing_runs(lender) == 3


def test_a_run_that_differs_or_is_not_finished_is_refused_with_one_line(make_experiment, rows, stage, tmp_path):
    first = make_experiment(rows, small_training=UNTUNED)
    lender = load_experiment(first)
    assert not load_experiment(make_experiment(rows, "own", speculative_run=str(tmp_path / "run"))).borrows

    def refusal(script: str = "selection.verify", data: list[dict] = rows, name: str = "second", **changes) -> str:
        keys = {"small_training": UNTUNED, "speculative_run": str(lender.folder)} | changes
        second = make_experiment(data, name, output_dir=str(tmp_path / name), **keys)
        code, _, err = stage(script, second)
        errors = [line for line in err.splitlines() if line.startswith("error:")]
        assert (code, len(errors)) == (2, 1) and not (lender.folder / "shared_by.json").exists()
        return errors[0]

    assert "has no data/split.json: run finetune.py and effort_score.py with its own" in refusal()
    assert stage("selection.effort_score", first)[0] == 0
    before, selection = everything_in(lender.folder), {"rates": [0.5], "precision": "fp32"}
    for said, changes in {
        "(dataset_sha256: stored": {"data": rows[1:], "name": "other-data"},
        "(split_seed: stored 42, now 7)": {"name": "other-split", "split_seed": 7},
        "(cutoff_len: stored 256, now 200)": {"cutoff_len": 200},
        "(phi.seed: stored 42, now 1)": {"selection": selection | {"seed": 1}},
        'now ["entropy"]': {"selection": selection | {"columns": ["entropy"]}},
        "has no small: run": {"script": "finetune.finetune", "small_training": {}},
    }.items():
        assert said in refusal(**changes)
    assert everything_in(lender.folder) == before

    # Scores in the making: a part is missing, or the plan says that it is not done.
    part = next(lender.small_scores.glob("part-*"))
    part.rename(tmp_path / part.name)
    assert "has not scored every row" in refusal()
    (tmp_path / part.name).rename(part)
    write_sealed(lender.small_scores / "plan.json", {"parts": []})
    assert "has not scored every row" in refusal("selection.effort_score")
    (lender.folder / "scores" / "link").symlink_to(tmp_path / "elsewhere")
    assert "leads out of the run folder" in refusal()
