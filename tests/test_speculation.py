"""selection.speculation: each way to come by scores does what it says, is paid for, and changes nothing else."""

import numpy as np
import pytest
from conftest import run_main

from scripts.plan import SPECULATIONS
from selection.method.staff import choose_staff, coreset_size, stratify
from selection.rows.split import rows_of, training_split
from selection.run import ledger
from selection.run.config import load_experiment
from selection.run.errors import UserError
from selection.run.ledger import read_ledger, selection_costs, summarise
from selection.run.products import read_json
from selection.scores.coresets import read_coreset
from selection.scores.folder import read_scores

STAGES = ("finetune.finetune", "selection.effort_score", "selection.verify", "selection.coreset", "scripts.report")
BASE = {"rates": [0.5], "num_strata": 4, "verify_per_stratum": 2, "precision": "fp32"}


@pytest.fixture
def run(make_experiment, rows, other_target, tmp_path):
    """Runs all stages under a `speculation`; gives the experiment."""

    def run(name: str, speculation, **changes):
        selection = BASE | {"mode": "extended", "speculation": speculation}
        keys = {"target_model": other_target, "selection": selection, "small_training": {"num_train_epochs": 2}}
        path = make_experiment(rows, name, **keys | {"output_dir": str(tmp_path / name)} | changes)
        for stage in STAGES:
            run_main(stage, "--config_path", path)
        return load_experiment(path)

    return run


def test_direct_is_the_target_alone_and_needs_no_small_model(run):
    direct = run("direct", "direct", small_model="there/is-none")
    both = run("verified", "untuned", small_model=direct.target_model)  # the same scores, verified as published
    scores, settings = read_scores(direct.small_scores), direct.selection
    target = read_scores(both.target_scores)
    assert np.array_equal(scores.effort[target.index], target.effort) and not direct.tuned_small
    strata = read_json(direct.verification)["strata"]
    assert [s["verification_ratio"] for s in strata] == pytest.approx([1.0] * len(strata), abs=1e-12)
    m = coreset_size(0.5, len(scores.effort))
    ours = stratify(scores.effort, settings.num_strata, settings.hardest_cutoff)
    chosen = choose_staff(scores.effort, ours, [1.0] * len(strata), m, "paper", settings.seed).rows
    coresets = [read_coreset(each.coresets / "staff-0.5.json").indices for each in (direct, both)]
    assert sorted(chosen) == sorted(coresets[0]) == sorted(coresets[1])

    paid = {cost.stage: cost for cost in selection_costs(direct, "staff")}
    stages = {cost.stage for cost in read_ledger(direct.folder)}
    assert set(paid) == {ledger.SPECULATIVE_SCORES, ledger.CORESETS} == stages
    assert paid[ledger.SPECULATIVE_SCORES].what == direct.target_model
    assert not (direct.folder / "scores" / "target").exists()
    assert "the target scores every row itself" in (direct.folder / "report.html").read_text()


def test_a_share_is_what_the_small_model_learns_from_and_scores_are_of_all_rows(run):
    part, whole = run("share", {"share": 0.25, "passes": 2}), run("whole", "published")
    learnt, every = list(rows_of(part, "speculation")), list(training_split(part).rows)
    assert len(learnt) == 6 and [row for row in every if row in learnt] == learnt  # a quarter of 24, in their order
    efforts = [read_scores(each.small_scores).effort for each in (part, whole)]
    assert len(efforts[0]) == len(efforts[1]) == 24 and not np.allclose(*efforts)
    ledgers = map(read_ledger, (part.folder, whole.folder))
    tuning = [next(cost for cost in costs if cost.stage == ledger.SPECULATIVE_TUNING) for costs in ledgers]
    assert [cost.samples for cost in tuning] == [6, 24] and tuning[0].tokens < tuning[1].tokens / 2
    assert summarise(part).full_tuning_seconds > 0
    with pytest.raises(UserError, match=r"small was made otherwise \(rows: "):  # another draw
        run_main("selection.verify", "--config_path", part.record, "--set", "selection.seed=7")


def test_ways_other_than_the_published_are_refused_outside_of_mode_extended_and_wrong_ones_named(make_experiment, rows):
    for value in SPECULATIONS[1:]:
        with pytest.raises(UserError, match=r"selection\.speculation.*give selection\.mode extended"):
            load_experiment(make_experiment(rows), [f"selection.speculation={value}"])
        given = load_experiment(make_experiment(rows), ["selection.mode=extended", f"selection.speculation={value}"])
        kept = make_experiment(rows, **given.model_dump())  # as a run folder keeps it
        assert load_experiment(kept) == given and not (value in ("untuned", "direct") and given.tuned_small)
        again = load_experiment(kept, ["selection.speculation=published"])
        assert again.speculative_training == load_experiment(make_experiment(rows)).small_training
    for value, said in {"tuned": "tuned", "{share: 2}": "share", "{passes: 1}": "share"}.items():
        with pytest.raises(UserError, match=rf"selection\.speculation.*{said}"):
            load_experiment(make_experiment(rows), ["selection.mode=extended", f"selection.speculation={value}"])
    for method in ("davir", "s2l"):
        changes = ["selection.mode=extended", "selection.speculation=untuned", f"selection.methods=[{method}]"]
        with pytest.raises(UserError, match=f"{method} reads what tuning changes"):
            load_experiment(make_experiment(rows), changes)
