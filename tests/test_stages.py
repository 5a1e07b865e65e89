"""The stages together, on a tiny random model: what is stored, refused, resumed and repeated."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, assert_one_line_error, everything_in, run_script
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finetune import trainer
from finetune.tuning import tune_once
from selection.method.effort import EffortScorer
from selection.rows.split import held_out_ids, rows_of, training_split
from selection.rows.tokens import tokenised_rows
from selection.run.config import load_experiment
from selection.run.errors import UserError
from selection.run.ledger import (
    SPECULATIVE_SCORES,
    SPECULATIVE_TUNING,
    TARGET_SCORES,
    TARGET_TUNING,
    VERIFICATION,
    read_ledger,
)
from selection.run.model_folder import check_base
from selection.run.products import read_json
from selection.scores import scoring
from selection.scores.folder import read_scores
from selection.scores.identity import check_run
from selection.scores.scoring import score_rows


@pytest.fixture
def load(make_experiment, rows):
    return lambda *keys: load_experiment(make_experiment(rows), list(keys))


def score(experiment, folder, rows=None, tuned=None, stage=VERIFICATION, columns=("effort",)):
    split = training_split(experiment)
    rows = np.arange(len(split.rows)) if rows is None else np.array(rows)
    score_rows(experiment, split, experiment.target_model, tuned, rows, folder, stage)
    return read_scores(folder, columns)


def tune(experiment, folder: Path, passes: dict) -> Path:
    rows = training_split(experiment).rows
    tune_once(experiment, experiment.small_model, "train", rows, folder, passes, SPECULATIVE_TUNING, {})
    return folder


def autograd_efforts(experiment, model, parameters: list) -> list[float]:
    """Of every row of the training split, on what LLaMA-Factory trains on."""
    norms = []
    for sample in tokenised_rows(experiment, experiment.small_model, "train", training_split(experiment).rows):
        model.zero_grad()
        ids, labels = (torch.tensor([sample[key]]) for key in ("input_ids", "labels"))
        model(input_ids=ids, labels=labels).loss.backward()
        norms.append(torch.stack([each.grad.double().norm() for each in parameters]).norm().item())
    return norms


def test_stored_scores_are_autograd_on_the_rows_llama_factory_trains_on(load, tmp_path):
    experiment = load("selection.phi=v_weight")
    scores, split = score(experiment, tmp_path / "scores"), training_split(experiment)
    model = AutoModelForCausalLM.from_pretrained(experiment.target_model, dtype=torch.float32)
    weight = model.model.layers[-1].self_attn.v_proj.weight
    assert scores.effort == pytest.approx(autograd_efforts(experiment, model, [weight]), rel=1e-5)
    assert (scores.ids, scores.fingerprint) == (split.ids, split.fingerprint)


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(load, tmp_path, monkeypatch):
    experiment = load("selection.tokens_per_batch=400", "selection.self_test=0")
    monkeypatch.setattr(scoring, "_ENOUGH_PARTS", 3)
    unbroken = score(experiment, tmp_path / "unbroken")
    batches, score_batch = [], EffortScorer.score

    def interrupted(self, input_ids, labels):
        batches.append(input_ids)
        if len(batches) == 6:
            raise KeyboardInterrupt
        return score_batch(self, input_ids, labels)

    monkeypatch.setattr(EffortScorer, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(experiment, tmp_path / "resumed")
    assert list((tmp_path / "resumed").glob("part-*"))
    resumed = score(experiment, tmp_path / "resumed")
    assert sum(map(len, batches)) - 24 <= 3 * max(map(len, batches))  # only the part in hand was done again
    assert resumed.effort.tobytes() == unbroken.effort.tobytes()


def test_scores_repeat_bit_for_bit_another_seed_draws_another_a_and_released_ones_are_doubled(load, tmp_path):
    first = score(load(), tmp_path / "first").effort
    assert score(load(), tmp_path / "second").effort.tobytes() == first.tobytes()
    assert not np.allclose(score(load("selection.seed=1"), tmp_path / "other").effort, first)
    assert np.array_equal(score(load("selection.mode=released"), tmp_path / "released").effort, 2 * first)


def test_later_rows_join_what_is_scored(load, tmp_path, capsys):
    for rows, joined in (([2, 9], [2, 9]), ([2, 5, 9], [2, 5, 9]), ([5], [2, 5, 9])):
        assert list(score(load(), tmp_path / "scores", rows).index) == joined
    assert capsys.readouterr().err.count("reusing") == 1


def test_rows_without_a_finite_score_are_named_and_too_many_stop_the_run(load, tmp_path, monkeypatch, capsys):
    score_batch, not_finite = EffortScorer.score, torch.full((99,), torch.nan)
    monkeypatch.setattr(EffortScorer, "score", lambda *a: score_batch(*a) | {"effort": not_finite[: len(a[1])]})
    with pytest.raises(UserError, match=r"1?\d of 24 rows have a loss or score that is NaN or infinite, more than 1 %"):
        score(load("selection.self_test=0"), tmp_path / "scores")
    assert not list((tmp_path / "scores").glob("part-*"))
    named = capsys.readouterr().err
    assert re.search(r"left out: row \d+ of the training split \(id [0-9a-f]{16}\): effort not finite", named)


def test_more_columns_stand_beside_the_scores(load, tmp_path):
    columns = ("effort", "hidden_state", "entropy")
    experiment = load("selection.columns=[hidden_state, entropy]")
    scores = score(experiment, tmp_path / "scores", columns=columns)
    assert np.array_equal(scores.effort, score(load(), tmp_path / "plain").effort)
    assert scores.columns["hidden_state"].shape == (24, 32) and 0 < np.median(scores.columns["entropy"]) < np.log(512)
    score(load(), tmp_path / "scores")  # asks for less: reused
    with pytest.raises(UserError, match=r"holds scores without (hidden_state, entropy|entropy, hidden_state)"):
        score(experiment, tmp_path / "plain")


def test_all_lora_takes_the_tuned_adapter_and_gives_the_untuned_target_a_fresh_one(load, tmp_path):
    experiment = load("selection.phi=all_lora", "training.lora_rank=3")
    tuned = tune(experiment, experiment.tuned_small, {"max_steps": 2})
    efforts = score(experiment, tmp_path / "tuned", tuned=tuned, stage=SPECULATIVE_SCORES).effort
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(experiment.small_model), tuned)
    matrices = [p.requires_grad_(True) for key, p in model.named_parameters() if "lora_" in key]
    assert {min(p.shape) for p in matrices} == {3}
    assert efforts == pytest.approx(autograd_efforts(experiment, model, matrices), rel=1e-5)

    fresh, again = (score(experiment, tmp_path / name, range(4)).effort for name in ("fresh", "again"))
    assert fresh.tobytes() == again.tobytes() and not np.allclose(fresh, efforts[:4])
    with pytest.raises(UserError, match=r"holds scores made otherwise \(phi\.rank: stored"):
        score(load("selection.phi=all_lora", "training.lora_rank=4"), tmp_path / "fresh", range(4))


def test_released_resets_the_adapters_of_the_speculator_and_not_of_the_tuned_target(load, tmp_path, monkeypatch):
    experiment = load("selection.mode=released", "selection.self_test=0")
    tuned = tune(experiment, experiment.folder / "tuned", {"max_steps": 1})
    asked, load_model = [], scoring.load_for_scoring
    monkeypatch.setattr(scoring, "load_for_scoring", lambda *a, **k: asked.append(a[-1]) or load_model(*a, **k))
    for stage in (SPECULATIVE_SCORES, TARGET_SCORES):
        score(experiment, tmp_path / stage, range(2), tuned, stage)
    assert asked == [True, False]
    other = tmp_path / "other"  # and an adapter is refused on another model
    check_base(tuned, experiment.small_model)
    shutil.copytree(experiment.small_model, other)
    (other / "tokenizer_config.json").write_text((other / "tokenizer_config.json").read_text() + "\n")
    with pytest.raises(UserError, match="was tuned from another model"):
        check_base(tuned, str(other))


@pytest.fixture
def call(stage):
    """A function that runs a stage and gives what it says; it ends well, or in one line that says `error`."""

    def call(name: str, config, *arguments: object, error: str = "") -> str:
        code, _, said = stage(name, config, *arguments)
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert (code, len(errors)) == ((2, 1) if error else (0, 0)) and re.search(error, "".join(errors)), said
        return said

    return call


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_verification_scores_only_the_drawn_samples_or_all_as_released(make_experiment, rows, call, mode):
    config = make_experiment(rows)
    experiment = load_experiment(config, [f"selection.mode={mode}"])
    tuned = tune(experiment, experiment.tuned_small, experiment.small_training)
    score(experiment, experiment.small_scores, tuned=tuned, stage=SPECULATIVE_SCORES)
    assert "self-test: 4 samples" in call("selection.verify", config, "--set", f"selection.mode={mode}")
    verification = json.loads(experiment.verification.read_text())
    drawn = sorted(row for stratum in verification["strata"] for row in stratum["verified"])
    assert verification["verified_samples"] == len(drawn) <= 4 * 2
    assert list(read_scores(experiment.target_scores).index) == (drawn if mode == "paper" else list(range(24)))


def test_tuning_on_published_index_lists_and_refusing_what_does_not_fit(make_experiment, rows, tmp_path, call):
    config = make_experiment(rows)
    experiment = load_experiment(config)
    split = training_split(experiment)
    torch.save([4, 2, 11, 7], tmp_path / "published.pt")
    coreset = {"indices": [0, 3], "ids": [split.ids[0], split.ids[4]], "data_fingerprint": split.fingerprint}
    (tmp_path / "other.json").write_text(json.dumps(coreset))

    def select(*names, error=""):
        paths = [tmp_path / name for name in names]
        return call("finetune.finetune-select", config, "--select_path", *paths, error=error)

    select("published.pt", "other.json", error="row 3 has id .*the coreset is for other data")
    assert not (experiment.folder / "target").exists()
    select("published.pt")
    chosen = list(rows_of(experiment, "published"))
    assert chosen == [split.rows[i] for i in (2, 4, 7, 11)]
    assert (experiment.tuned_target("published") / "adapter_model.safetensors").exists()
    assert "reusing" in select("published.pt")

    torch.save([4, 2, 11, 8], tmp_path / "published.pt")  # another coreset under a name that is taken
    select("published.pt", error=r"was made otherwise \(rows:")
    assert list(rows_of(experiment, "published")) == chosen  # what was tuned on stays
    for name in ("train.pt", "a,b.pt"):
        torch.save([1], tmp_path / name)
        select(name, error=f"{name}: a coreset's file name names its data set")


def test_a_second_tuning_of_a_coreset_takes_a_name_and_leaves_the_run_as_it_is(make_experiment, rows, tmp_path, call):
    experiment = load_experiment(config := make_experiment(rows, evaluation={"generate": False}))
    torch.save([4, 2, 11, 7], tmp_path / "c.pt")

    def select(*arguments, error=""):
        return call("finetune.finetune-select", config, "--select_path", tmp_path / "c.pt", *arguments, error=error)

    hot = ("--set", "training.learning_rate=0.5", "--set", "target_training.flash_attn=sdpa")
    call("finetune.finetune", config)
    select()
    select(*hot, error=r"/small was made otherwise \(keys\.learning_rate: stored 0\.001, now 0\.5\): .*--as NAME")
    select(*hot[2:], error=r'/c was made otherwise \(keys\.flash_attn: stored null, now "sdpa"\): .*--as NAME')
    select("--as", "a/b", *hot, error="--as a/b: give letters")
    before = everything_in(experiment.tuned_target("c"))
    select("--as", "hot", *hot)
    assert everything_in(experiment.tuned_target("c")) == before and "reusing" in select("--as", "hot", *hot)
    warm = ("--set", "training.learning_rate=0.25")
    select("--as", "hot", *warm, error=r"/c-hot was made otherwise \(keys\.learning_rate: stored 0\.5, .*--as NAME")
    assert load_experiment(experiment.record).training == experiment.training  # the run's own

    call("selection.effort_score", config)
    call("finetune.eval", config)
    made = {name: read_json(experiment.folder / "eval" / name / "made_from.json") for name in ("c", "c-hot")}
    assert [each["model_keys"] for each in made.values()] == [{}, {"flash_attn": "sdpa"}]  # answers as it was tuned
    losses = [read_json(experiment.folder / "eval" / name / "metrics.json")["nll"] for name in made]
    assert losses[0] != losses[1] and "reusing" in call("finetune.eval", config, "--tuned", "c-hot")
    tuned = [cost.what for cost in read_ledger(experiment.folder) if cost.stage == TARGET_TUNING]
    assert tuned == ["c", "c-hot"]


def test_stages_say_which_stage_is_missing_and_no_pass_is_none(make_experiment, rows, tmp_path, call):
    config = make_experiment(rows)
    call("selection.effort_score", config, error="the small model is not tuned yet .*: run finetune.py --model small")
    call("selection.effort_score", config, "--model", "target", error="the target model is not tuned .*--model target")
    call("selection.coreset", config, "--method", "grand", error="scores of the tuned target.*--model target")
    call("selection.verify", config, error="scores/small: no such file or folder: run effort_score.py first")
    call("finetune.eval", config, error="run finetune-select.py first")
    call("scripts.costs", config, error="no cost ledger yet")

    config = make_experiment(rows, small_training={"num_train_epochs": 0})  # a speculator that scores as it is
    assert "none, scores by an untuned model" in call("finetune.finetune", config)
    call("selection.effort_score", config)
    experiment = load_experiment(config)
    assert np.array_equal(read_scores(experiment.small_scores).effort, score(experiment, tmp_path / "scores").effort)


def test_a_speculator_cut_on_held_out_rows_is_refused_before_anything(make_experiment, rows, tmp_path, call):
    small = tmp_path / "cut"
    own = make_experiment(rows, small_model=str(small))
    call("scripts.make_draft", own, "--layers", 2)
    made, experiment = json.loads((small / "draft.json").read_text()), load_experiment(own)
    split = training_split(experiment)
    assert made["calibration_ids"] == [split.ids[row] for row in made["calibration_rows"]]

    keys = ["split_seed=7", f"output_dir={tmp_path / 'other'}"]  # of its calibration rows some are held out
    other = load_experiment(own, keys)
    other_split, error = training_split(other), r"was cut on \d+ of the rows that this run holds out.*make_draft"
    call("finetune.finetune", own, "--set", keys[0], "--set", keys[1], error=error)
    assert not other.record.exists() and {path.name for path in other.folder.iterdir() if path.is_dir()} == {"data"}

    del made["calibration_ids"]  # as of a speculator that does not name its rows
    (small / "draft.json").write_text(json.dumps(made))
    check_run(experiment, split)
    with pytest.raises(UserError, match="does not say on which rows"):
        check_run(other, other_split)


def test_rows_that_are_held_out_too_do_not_calibrate(make_experiment, rows, tmp_path, call):
    own = make_experiment([*rows[:20], *rows[:10]], small_model=str(tmp_path / "cut"))
    call("scripts.make_draft", own, "--layers", 2)
    held_out = set(held_out_ids(load_experiment(own)))
    assert held_out.intersection(training_split(load_experiment(own)).ids)
    assert not held_out.intersection(json.loads((tmp_path / "cut" / "draft.json").read_text())["calibration_ids"])


def test_evaluation_takes_the_keys_of_the_model_and_not_those_of_training(load, monkeypatch):
    """A QLoRA adapter answers on the quantised base; LLaMA-Factory accepts what it is handed."""
    from llamafactory.hparams import get_train_args
    from llamafactory.train import tuner

    model = {"quantization_bit": 4, "quantization_type": "fp4", "double_quantization": False, "flash_attn": "fa2"}
    only_training = {"learning_rate": 1e-3, "lora_rank": 4, "compute_accuracy": True, "upcast_layernorm": True}
    training = json.dumps(model | only_training | {"flash_attn": "sdpa"})
    experiment = load(f"training={training}", "target_training.flash_attn=fa2")
    training_split(experiment)
    handed, adapter = [], experiment.folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")

    def run_exp(arguments):
        handed.append(arguments)
        for name, text in (("generated_predictions.jsonl", ""), ("predict_results.json", "{}")):
            (Path(arguments["output_dir"]) / name).write_text(text)

    monkeypatch.setattr(tuner, "run_exp", run_exp)
    monkeypatch.setattr(sys, "path", sys.path.copy())  # the script changes it
    identity = importlib.import_module("finetune.eval").identity_of(experiment, "untuned")
    assert identity["model_keys"] == model  # answers under other keys are other answers
    for tuned in (None, adapter):
        trainer.predict(experiment, tuned, experiment.folder, "fp32")
        arguments = handed.pop()
        assert {key: arguments.get(key) for key in model} == model
        assert not only_training.keys() & arguments.keys()
        assert get_train_args(arguments)[0].quantization_bit == 4


def test_stages_in_one_process_make_what_each_makes_in_its_own(make_experiment, rows, tmp_path):
    stages = [REPOSITORY / "selection" / f"{name}.py" for name in ("effort_score", "verify")]
    config, made = make_experiment(rows), []
    for folder in ("together", "apart"):
        at = ("--config_path", config, "--set", f"output_dir={tmp_path / folder}")
        run_script("scripts/launch.py", REPOSITORY / "finetune" / "finetune.py", *at)
        for group in [stages] if folder == "together" else [[stage] for stage in stages]:
            run_script("scripts/launch.py", *group, *at)
        run = load_experiment(config, [f"output_dir={tmp_path / folder}"])
        scores = [read_scores(each).effort for each in (run.small_scores, run.target_scores)]
        made.append([*scores, (run.tuned_small / "adapter_model.safetensors").read_bytes()])
        paid = {cost.stage for cost in read_ledger(run.folder)}
        assert paid == {SPECULATIVE_TUNING, SPECULATIVE_SCORES, VERIFICATION}
    for together, apart in zip(*made, strict=True):
        assert np.array_equal(together, apart)
    broken = run_script("scripts/launch.py", *stages, "--config_path", tmp_path / "none.yaml", check=False)
    assert_one_line_error(broken, "none.yaml: No such file")
