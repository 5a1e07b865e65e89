"""Rules of the small model's price against slow literal versions."""

import math

import numpy as np
import pytest
import torch
from conftest import everything_in, run_script, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM

from selection.method import rules
from selection.rows.split import split_numbers, training_split
from selection.rows.tokens import empty_turn, tokenised_rows
from selection.run.config import load_experiment
from selection.run.ledger import SPECULATIVE_SCORES, SPECULATIVE_TUNING, read_ledger, selection_costs
from selection.scores.coresets import read_coreset
from selection.scores.folder import read_scores
from selection.scores.losses import passes_of

SELECTION = {"rates": [0.5], "num_strata": 4, "verify_per_stratum": 2, "precision": "fp32"}


def some(seed: int, n: int = 60):
    rng = np.random.default_rng(seed)
    return rng, rng.integers(0, 5, n), rng.random(n), (rng.random(n) < 0.7 if seed % 2 else None)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 1))
def test_equal_parts_and_proportions_are_the_literal_ones(seed, share):
    _, cluster, keys, within = some(seed)
    rows = [r for r in range(60) if within is None or within[r]]
    m = max(1, int(share * len(rows)))
    members = {c: sorted((r for r in rows if cluster[r] == c), key=lambda r: keys[r]) for c in set(cluster[rows])}

    literal, rest = [], m
    by_size = sorted(members.values(), key=lambda part: (len(part), min(part)))
    for left, part in zip(range(len(by_size), 0, -1), by_size, strict=True):
        taken = part[: min(len(part), rest // left)]
        literal, rest = literal + taken, rest - len(taken)
    found = rules.in_equal_parts(cluster, keys)(m, within)
    assert found.rows.tolist() == sorted(literal) and len(literal) == m

    found = rules.in_proportion(cluster, keys)(m, within).rows.tolist()
    assert len(found) == m
    for part in members.values():
        count = sum(r in found for r in part)
        assert math.floor(m * len(part) / len(rows) + 1e-9) <= count <= math.ceil(m * len(part) / len(rows) - 1e-9)
        assert sorted(r for r in found if r in part) == sorted(part[:count])


def test_scores_are_the_formulas_of_their_papers():
    without, untuned, tuned = (
        np.array([2.0, 2.0, 2.0, 1.0]),
        np.array([1.0, 1.9, 2.5, 1.2]),
        np.array([0.5, 1.8, 1.0, 1.0]),
    )
    # IFD: 0.37, 0.90, 1.65, 1.22: the highest below 1, then those above, the nearest to 1 first.
    assert np.argsort(-rules.ifd(untuned, without)).tolist() == [1, 0, 3, 2]
    assert rules.davir(untuned, tuned) == pytest.approx([0.5, 0.1 / 1.9, 0.6, 0.2 / 1.2])
    assert rules.by_score(rules.middle(np.array([5.0, 1.0, 3.0, 9.0, 2.0])))(1, None).rows.tolist() == [2]
    assert rules.by_score(rules.middle(np.array([5.0, 1.0, 3.0, 9.0, 2.0])))(3, None).rows.tolist() == [0, 2, 4]


def test_s2l_learning_percentage_and_coverage_choose_in_clusters():
    features = np.random.default_rng(0).normal(size=(100, 3))
    cluster, distance = rules.clusters_of(features, 1)
    centres = np.array([features[cluster == c].mean(0) for c in range(10)])
    to_centres = np.linalg.norm(features[:, None] - centres, axis=2)
    assert cluster.max() == 9 and distance == pytest.approx(to_centres[np.arange(100), cluster])
    assert (distance <= to_centres.min(1) + 0.05).all()  # 20 iterations come near to the best
    sizes, untuned, first_pass = np.bincount(cluster), np.full(100, 2.0), np.linspace(1, 3, 100)
    by_pass = rules.s2l(features, 1)(30, None).rows
    assert (np.bincount(cluster[by_pass]) >= np.minimum(sizes, 3)).all() and len(by_pass) == 30
    for rule, keys in (
        (rules.coverage(features, 1), distance),
        (rules.learning_percentage(untuned, first_pass, features, 1), -first_pass),  # the loss fell least
    ):
        chosen = rule(30, None).rows
        assert len(chosen) == 30
        for c, size in enumerate(sizes):
            own = chosen[cluster[chosen] == c]
            assert math.floor(0.3 * size + 1e-9) <= len(own) <= math.ceil(0.3 * size)
            assert set(own) == set(sorted(np.flatnonzero(cluster == c), key=lambda row: keys[row])[: len(own)])


def test_rds_takes_in_turns_what_is_nearest_to_the_dev_rows():
    rng = np.random.default_rng(1)
    pool, dev = rng.normal(size=(40, 4)), rng.normal(size=(3, 4))
    likeness = (dev / np.linalg.norm(dev, axis=1)[:, None]) @ (pool / np.linalg.norm(pool, axis=1)[:, None]).T
    literal, turn = [], 0
    while len(literal) < 11:
        literal.append(max((r for r in range(40) if r not in literal), key=lambda r: likeness[turn % 3, r]))
        turn += 1
    assert rules.rds(pool, dev)(11, None).rows.tolist() == sorted(literal)
    within = np.arange(40) % 2 == 0
    assert (rules.rds(pool, dev)(20, within).rows == np.arange(0, 40, 2)).all()


def test_every_rule_from_a_tuned_small_model(make_experiment, rows, tmp_path):
    """The losses are transformers' own on the untuned model and on each pass's LoRA; efforts stay as they are."""
    names = ["ifd", "middle", "davir", "s2l", "learning_percentage", "clusters"]
    three = {"small_training": {"num_train_epochs": 3}}
    plain = make_experiment(rows, "plain", output_dir=str(tmp_path / "plain"), **three)
    config = make_experiment(rows, selection=SELECTION | {"methods": names}, **three)
    for path in (plain, config):
        run_script("finetune/finetune.py", "--config_path", path)
        run_script("selection/effort_score.py", "--config_path", path)
    experiment, without = load_experiment(config), load_experiment(plain)
    columns = ("effort", "loss", "loss_untuned", "loss_without_prompt", "loss_by_pass", "hidden_state")
    scores = read_scores(experiment.small_scores, columns)
    assert (scores.effort == read_scores(without.small_scores).effort).all()
    base = AutoModelForCausalLM.from_pretrained(experiment.small_model, dtype=torch.float32)
    tokenised = tokenised_rows(experiment, experiment.small_model, "train", training_split(experiment).rows)
    before, _ = empty_turn(experiment, experiment.small_model)

    def losses(model, alone=False):
        found = []
        for row in tokenised:
            ids, labels = row["input_ids"], row["labels"]
            if alone:
                labels = [label for label in labels if label != -100]
                ids, labels = before + labels, [-100] * len(before) + labels
            found.append(model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item())
        return pytest.approx(found, abs=1e-4)

    with torch.no_grad():
        assert scores.columns["loss_untuned"] == losses(base)
        assert scores.columns["loss_without_prompt"] == losses(base, alone=True)
        for number, folder in enumerate(passes_of(experiment.tuned_small, 3)):
            tuned = PeftModel.from_pretrained(base, folder)
            assert scores.columns["loss_by_pass"][:, number] == losses(tuned)
            base = tuned.unload()
    assert scores.columns["loss_by_pass"][:, 2] == pytest.approx(scores.columns["loss"], abs=1e-5)

    train = split_numbers(experiment)["train"]
    dev = write_jsonl(tmp_path / "dev.jsonl", [rows[row] for row in train[:2]])
    run_script("selection/coreset.py", "--config_path", config)
    run_script("selection/coreset.py", "--config_path", config, "--method", "rds", "--dev", dev, "--rate", 0.1)
    for name in names:
        assert len(read_coreset(experiment.coresets / f"{name}-0.5.json").indices) == 12
    assert read_coreset(experiment.coresets / "rds-0.1.json").indices.tolist() == [0, 1]
    (scoring,) = (cost for cost in read_ledger(experiment.folder) if cost.stage == SPECULATIVE_SCORES)
    responses = int(read_scores(experiment.small_scores, ["n_response_tokens"]).columns["n_response_tokens"].sum())
    assert scoring.more_tokens == 4 * scoring.tokens + responses
    costs = {name: {cost.stage for cost in selection_costs(experiment, name)} for name in names}
    assert SPECULATIVE_TUNING in costs["s2l"] and SPECULATIVE_TUNING not in costs["ifd"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"small_training.num_train_epochs": 0, "selection.methods": '["davir"]'}, "what tuning changes"),
        ({"training.finetuning_type": "full", "selection.methods": '["ifd"]'}, "finetuning_type must be lora"),
        ({"selection.methods": '["rds"]'}, "--method rds --dev FILE"),
        ({"selection.methods": '["clusters"]', "selection.mode": "released"}, "which mode released resets"),
    ],
)
def test_what_a_rule_cannot_read_is_said_before_anything_is_paid(make_experiment, rows, stage, changes, said):
    pairs = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    code, _, error = stage("finetune.finetune", make_experiment(rows), *pairs)
    assert code == 2 and said in error


def test_a_speculator_without_its_passes_is_refused_by_rules_that_read_them(make_experiment, rows, stage, tmp_path):
    config = make_experiment(rows)
    assert stage("finetune.finetune", config)[0] == 0
    code, _, error = stage("selection.effort_score", config, "--set", 'selection.methods=["s2l"]')
    assert code == 2 and "has not kept the model after each pass" in error
    code, _, error = stage("selection.coreset", config, "--method", "rds")
    assert code == 2 and "--dev FILE" in error
    # Checkpoints of a save_strategy of the user's own are no passes.
    steps = {"save_strategy": "steps", "save_steps": 1}
    config = make_experiment(rows, "steps", output_dir=str(tmp_path / "steps"), small_training=steps)
    assert stage("finetune.finetune", config)[0] == 0
    code, _, error = stage("selection.effort_score", config, "--set", 'selection.methods=["s2l"]')
    assert code == 2 and "has not kept the model after each pass" in error


def test_a_dry_run_of_rds_writes_nothing(make_experiment, rows, stage, tmp_path):
    selection = {"columns": ["hidden_state"], "rates": [0.5]}
    config = make_experiment(rows, selection=selection, small_training={"num_train_epochs": 0})
    assert stage("selection.effort_score", config)[0] == 0
    dev, before = write_jsonl(tmp_path / "dev.jsonl", rows[:2]), everything_in(tmp_path)
    code, out, _ = stage("selection.coreset", config, "--method", "rds", "--dev", dev, "--dry_run")
    assert code == 0 and "would score the rows of" in out and everything_in(tmp_path) == before
    code, _, error = stage("selection.coreset", config, "--method", "ifd")
    assert code == 2 and "has no column loss_untuned" in error and "add the method to selection.methods" in error
    for part in load_experiment(config).small_scores.glob("part-*"):
        part.unlink()  # as before the first is written: random needs no score
    assert stage("selection.coreset", config, "--method", "random")[0] == 0
    assert stage("selection.coreset", config, "--method", "length")[0] == 2
