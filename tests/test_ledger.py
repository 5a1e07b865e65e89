"""What each method's selection cost, read from the ledger of a run folder."""

import json
from dataclasses import asdict

import pytest

from selection.run.config import load_experiment
from selection.run.ledger import (
    CORESETS,
    CUTTING,
    SPECULATIVE_SCORES,
    SPECULATIVE_TUNING,
    TARGET_SCORES,
    TARGET_TUNING,
    VERIFICATION,
    Cost,
    ledger_path,
    selection_costs,
    summarise,
)

COSTS = [
    Cost(SPECULATIVE_TUNING, "small", tokens=300, seconds=90.0),  # made again below
    Cost(SPECULATIVE_TUNING, "small", tokens=300, seconds=60.0),
    Cost(SPECULATIVE_SCORES, "small", tokens=70, parameters=10, seconds=5.0),  # a run that was interrupted
    Cost(SPECULATIVE_SCORES, "small", tokens=30, parameters=10, seconds=2.0),
    Cost(VERIFICATION, "target", tokens=10, parameters=40, seconds=1.0),
    Cost(TARGET_SCORES, "target", tokens=100, parameters=40, seconds=20.0),
    *(Cost(CORESETS, method, seconds=0.5) for method in ("staff", "d2", "random", "d2")),
]
FULL = Cost(TARGET_TUNING, "full", tokens=400, seconds=500.0)
ON_CORESET = Cost(TARGET_TUNING, "staff-0.1", tokens=40, seconds=48.0)


@pytest.fixture
def experiment(tmp_path):
    """A function that writes a ledger of given entries; the speculator was cut out of the target."""

    def make(costs: list[Cost], **changes):
        (tmp_path / "small").mkdir(exist_ok=True)
        (tmp_path / "small" / "draft.json").write_text('{"cost": {"tokens": 8, "parameters": 40, "seconds": 11.0}}')
        names = {"output_dir": str(tmp_path), "small_model": str(tmp_path / "small"), "target_model": "a/b"}
        names |= {"template": "chatml", "dataset": "rows.jsonl"}
        keys = names | {"small_training": {"num_train_epochs": 3}} | changes
        (tmp_path / "experiment.yaml").write_text(json.dumps(keys))
        ledger_path(tmp_path).write_text("".join(json.dumps(asdict(cost)) + "\n" for cost in costs))
        return load_experiment(tmp_path / "experiment.yaml")

    return make


def test_each_method_pays_for_its_own_stages_once(experiment):
    def seconds(run, method: str) -> dict[str, float]:
        costs = selection_costs(run, method)
        return {stage: sum(c.seconds for c in costs if c.stage == stage) for stage in {c.stage for c in costs}}

    run = experiment([*COSTS, FULL, ON_CORESET])
    scored = {TARGET_TUNING: 500.0, TARGET_SCORES: 20.0}
    paid = {CUTTING: 11.0, SPECULATIVE_TUNING: 60.0, SPECULATIVE_SCORES: 7.0, VERIFICATION: 1.0, CORESETS: 0.5}
    assert seconds(run, "staff") == paid and summarise(run).selection_total == sum(paid.values())
    assert seconds(run, "random") == {CORESETS: 0.5} and seconds(run, "length") == {}
    for method in ("grand", "el2n", "ccs", "moderate", "entropy"):
        assert seconds(run, method) == scored
    assert seconds(run, "d2") == scored | {CORESETS: 0.5}
    untuned = experiment(COSTS, small_training={"num_train_epochs": 0})
    assert SPECULATIVE_TUNING not in seconds(untuned, "staff")


def test_tuning_on_everything_is_measured_or_scaled_and_says_which(experiment):
    def found(*costs: Cost, **changes) -> tuple[float | None, str]:
        summary = summarise(experiment([*COSTS, *costs], **changes))
        return summary.full_tuning_seconds, summary.full_tuning_basis

    assert found(FULL, ON_CORESET) == (500.0, "measured")
    # 300 tokens in 3 passes, so 4 passes are 400; the coreset took 1.2 s a token.
    assert found(ON_CORESET) == (pytest.approx(480.0), "scaled by tokens from its tuning on coresets")
    # 60 s / 300 tokens, for a model of 4 times the parameters.
    assert found() == (pytest.approx(320.0), "scaled from the small model's by tokens and size, 4.0 ×")
    untuned = {"small_training": {"num_train_epochs": 0}}
    assert found(ON_CORESET, **untuned)[0] == pytest.approx(480.0)  # 100 tokens were scored
    assert summarise(experiment([], **untuned)).full_tuning_seconds is None
