"""Several targets on one run's speculative scores: nothing is made twice, the choice is the same, the cost shared."""

import shutil

import pytest
import torch
from conftest import everything_in
from transformers import LlamaConfig, LlamaForCausalLM

from selection.run.config import load_experiment
from selection.run.ledger import (
    CORESETS,
    SPECULATIVE_SCORES,
    SPECULATIVE_STAGES,
    SPECULATIVE_TUNING,
    VERIFICATION,
    format_summary,
    ledger_path,
    read_ledger,
    selection_costs,
    sharing_runs,
    summarise,
)
from selection.run.products import read_json, read_sealed, write_sealed

STAGES = ("finetune.finetune", "selection.effort_score", "selection.verify", "selection.coreset")
UNTUNED = {"num_train_epochs": 0}


@pytest.fixture
def other_target(tiny_model, tmp_path) -> str:
    """The tiny model with other random weights."""
    folder = tmp_path / "other-target"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "made_from*", "checksums*"))
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
    return str(folder)


def test_a_second_target_on_the_first_ones_scores_chooses_what_its_own_would_and_they_share_the_cost(
    make_experiment, rows, stage, other_target, tmp_path
):
    keys = {"selection": {"rates": [0.5, 0.25], "num_strata": 4, "verify_per_stratum": 2, "precision": "fp32"}}
    first = make_experiment(rows, **keys)
    keys |= {"target_model": other_target, "target_training": {"num_train_epochs": 2}}
    second = make_experiment(
        rows, "second", **keys, output_dir=str(tmp_path / "second"), speculative_run=str(tmp_path / "run")
    )
    alone = make_experiment(rows, "alone", **keys, output_dir=str(tmp_path / "alone"))
    lender, borrower, own = map(load_experiment, (first, second, alone))

    assert all(stage(name, first)[0] == 0 for name in STAGES)
    before, whole = everything_in(lender.folder), selection_costs(lender, "staff")
    assert format_summary(summarise(lender)).count("shared by") == 1  # its two rates'
    for name in STAGES[:3]:  # tuned otherwise than this one asks for
        code, _, err = stage(name, second, "--set", "training.max_steps=1")
        assert code == 2 and "small was made otherwise (keys.max_steps: stored null, now 1)" in err
    assert everything_in(lender.folder) == before and not ledger_path(borrower.folder).exists()
    said = [stage(name, second) for name in STAGES]
    assert [code for code, *_ in said] == [0, 0, 0, 0], said
    for (_, _, out), stage_name, folder in zip(said, SPECULATIVE_STAGES[1:], ("small", "scores/small"), strict=False):
        assert f"{stage_name}: reusing {lender.folder / folder}" in out
    assert not (borrower.folder / "small").exists() and not (borrower.folder / "scores" / "small").exists()
    assert {cost.stage for cost in read_ledger(borrower.folder)} == {VERIFICATION, CORESETS}
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
    shares = [selection_costs(each, "staff") for each in (lender, borrower)]
    for figure in ("seconds", "tokens", "samples"):
        paid = [
            {cost.stage: getattr(cost, figure) for cost in costs if cost.stage in SPECULATIVE_STAGES}
            for costs in (whole, *shares)
        ]
        assert set(paid[0]) == {SPECULATIVE_TUNING, SPECULATIVE_SCORES}
        assert paid[1] == paid[2]
        assert {key: paid[1][key] + paid[2][key] for key in paid[1]} == pytest.approx(paid[0])
    rest = [cost for cost in shares[1] if cost.stage not in SPECULATIVE_STAGES]
    assert rest == [c for c in read_ledger(borrower.folder) if c.stage == VERIFICATION or c.what == "staff"]

    summary = summarise(borrower)
    code, out, _ = stage("scripts.costs", second)
    assert code == 0
    assert f"({sum(c.seconds for c in whole if c.stage == SPECULATIVE_SCORES):.1f} s, shared by 2 runs)" in out
    assert f"shared by the coresets of 2 rates: {summary.selection_total / 2:.1f} s each" in out
    assert [cost.stage for cost in selection_costs(borrower, "random")] == [CORESETS]  # pays for nothing of it
    # Tuning on everything is foreseen from what the other run's tuning took.
    assert summary.full_tuning_seconds is not None and "small model" in summary.full_tuning_basis


def test_a_run_that_differs_or_is_not_finished_is_refused_with_one_line(
    make_experiment, rows, stage, tmp_path, monkeypatch
):
    first = make_experiment(rows, small_training=UNTUNED)
    lender = load_experiment(first)

    def refusal(script: str = "selection.verify", data: list[dict] = rows, name: str = "second", **changes) -> str:
        keys = {"small_training": UNTUNED, "speculative_run": str(lender.folder)} | changes
        second = make_experiment(data, name, output_dir=str(tmp_path / name), **keys)
        code, _, err = stage(script, second)
        assert code == 2
        errors = [line for line in err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert not (lender.folder / "shared_by.json").exists()
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
    parts = sorted(lender.small_scores.glob("part-*"))
    for part in parts:
        part.rename(tmp_path / part.name)
        assert "has not scored every row" in refusal()
    for part in parts:
        (tmp_path / part.name).rename(part)
    write_sealed(lender.small_scores / "plan.json", {"parts": []})
    assert "has not scored every row" in refusal("selection.effort_score")


def test_a_link_out_of_the_other_run_is_refused_and_naming_its_own_folder_is_naming_none(
    make_experiment, rows, stage, tmp_path
):
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "shared_by.json").symlink_to(tmp_path / "elsewhere")
    second = make_experiment(rows, speculative_run=str(tmp_path / "strange"))
    code, _, err = stage("selection.verify", second)
    assert code == 2 and "leads out of the run folder" in err
    experiment = load_experiment(make_experiment(rows, speculative_run=str(tmp_path / "run")))
    assert not experiment.borrows and experiment.tuned_small == tmp_path / "run" / "small"
