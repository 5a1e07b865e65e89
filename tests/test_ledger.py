"""What each method's selection cost, read from the ledger of a run folder."""

import json
from dataclasses import asdict

import pytest

from selection.run import ledger
from selection.run.config import load_experiment
from selection.run.ledger import Cost, ledger_path, selection_costs, summarise

COSTS = [
    Cost(ledger.SPECULATIVE_TUNING, "small", tokens=300, seconds=90.0),  # made again below
    Cost(ledger.SPECULATIVE_TUNING, "small", tokens=300, seconds=60.0),
    Cost(ledger.SPECULATIVE_SCORES, "small", tokens=70, parameters=10, seconds=5.0),  # a run that was interrupted
    Cost(ledger.SPECULATIVE_SCORES, "small", tokens=30, parameters=10, seconds=2.0),
    Cost(ledger.VERIFICATION, "target", tokens=10, parameters=40, seconds=1.0),
    Cost(ledger.TARGET_SCORES, "target", tokens=100, parameters=40, seconds=20.0),
    *(Cost(ledger.CORESETS, method, seconds=0.5) for method in ("staff", "d2", "random", "d2")),
]
FULL = Cost(ledger.TARGET_TUNING, "full", tokens=400, seconds=500.0)
ON_CORESET = Cost(ledger.TARGET_TUNING, "staff-0.1", tokens=40, seconds=48.0)
UNTUNED = {"small_training": {"num_train_epochs": 0}}


@pytest.fixture
def experiment(tmp_path):
    """A function that writes a ledger of given entries; the speculator was cut out of the target."""

    def make(costs: list[Cost], **changes):
        (tmp_path / "draft.json").write_text('{"cost": {"tokens": 8, "parameters": 40, "seconds": 11.0}}')
        keys = {"output_dir": str(tmp_path), "small_model": str(tmp_path), "target_model": "a/b"}
        keys |= {"template": "chatml", "dataset": "rows.jsonl"} | changes
        (tmp_path / "experiment.yaml").write_text(json.dumps(keys))
        ledger_path(tmp_path).write_text("".join(json.dumps(asdict(cost)) + "\n" for cost in costs))
        return load_experiment(tmp_path / "experiment.yaml")

    return make


def test_each_method_pays_for_its_own_stages_once(experiment):
    def seconds(run, method: str) -> list[float]:
        return [cost.seconds for cost in selection_costs(run, method)]

    run = experiment([*COSTS, FULL, ON_CORESET])
    # Cutting, tuning, both parts of scoring, verification, choice.
    assert seconds(run, "staff") == [11.0, 60.0, 5.0, 2.0, 1.0, 0.5]
    assert summarise(run).selection_total == sum(seconds(run, "staff"))
    assert seconds(run, "random") == [0.5] and seconds(run, "length") == []
    for method in ("grand", "el2n", "ccs", "moderate", "entropy"):
        assert seconds(run, method) == [500.0, 20.0]
    assert seconds(run, "d2") == [500.0, 20.0, 0.5]
    assert seconds(experiment(COSTS, **UNTUNED), "staff") == [11.0, 5.0, 2.0, 1.0, 0.5]
    look, left_out = Cost(ledger.LOOK, "target", seconds=3.0), {"selection": {"leave_out": "suspects"}}
    assert seconds(experiment([*COSTS, look], **left_out), "random") == [3.0, 0.5]  # the look is every method's price
    assert seconds(experiment([*COSTS, look]), "random") == [0.5]
    recommended = {"selection": {"mode": "recommended"}}  # where the target's scores are the look's too
    run = experiment([*COSTS, look], **recommended, small_model="a/b")
    assert seconds(run, "rs2") == [5.0, 2.0, 3.0] == list(seconds(run, "clusters"))
    assert summarise(run).selection_total == 10.0


def test_tuning_on_everything_is_measured_or_scaled_and_says_which(experiment):
    def found(*costs: Cost, **changes) -> tuple[float | None, str]:
        summary = summarise(experiment([*COSTS, *costs], **changes))
        return summary.full_tuning_seconds, summary.full_tuning_basis

    assert found(FULL, ON_CORESET) == (500.0, "measured")
    # 300 tokens in 3 passes, so 4 passes are 400; the coreset took 1.2 s a token.
    assert found(ON_CORESET) == (pytest.approx(480.0), "scaled by tokens from its tuning on coresets")
    # 60 s / 300 tokens, for a model of 4 times the parameters.
    assert found() == (pytest.approx(320.0), "scaled from the small model's by tokens and size, 4.0 ×")
    assert found(ON_CORESET, **UNTUNED)[0] == pytest.approx(480.0)  # 100 tokens were scored
    assert summarise(experiment([], **UNTUNED)).full_tuning_seconds is None
    # Verification took 1 s for 10 of the 100 tokens that were scored.
    assert "direct): about 10.0 s (scaled" in ledger.format_summary(summarise(experiment([*COSTS, FULL])))
