"""The stages together, on a tiny random model: what is stored, refused, resumed and repeated."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import assert_one_line_error, run_script
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finetune import trainer
from finetune.tuning import tune_once
from selection.method.effort import EffortScorer
from selection.rows.split import held_out_ids, rows_of, training_split
from selection.rows.tokens import tokenised_rows
from selection.run import ending
from selection.run.config import load_experiment
from selection.run.errors import UserError
from selection.run.ledger import SPECULATIVE_SCORES, SPECULATIVE_TUNING, TARGET_SCORES, TARGET_TUNING, VERIFICATION
from selection.run.model_folder import check_base
from selection.scores import scoring
from selection.scores.folder import read_scores
from selection.scores.identity import check_run
from selection.scores.scoring import score_rows


def score(experiment, folder, rows=None):
    split = training_split(experiment)
    rows = np.arange(len(split.rows)) if rows is None else rows
    score_rows(experiment, split, experiment.target_model, None, rows, folder, VERIFICATION)
    return read_scores(folder)


def test_stored_scores_are_autograd_on_the_rows_llama_factory_trains_on(make_experiment, rows, tmp_path):
    experiment = load_experiment(make_experiment(rows), ["selection.phi=v_weight"])
    scores = score(experiment, tmp_path / "scores")
    split = training_split(experiment)
    samples = tokenised_rows(experiment, experiment.target_model, "train", split.rows)
    model = AutoModelForCausalLM.from_pretrained(experiment.target_model, dtype=torch.float32)
    weight = model.model.layers[-1].self_attn.v_proj.weight
    for row, sample in enumerate(samples):
        weight.grad = None
        model(input_ids=torch.tensor([sample["input_ids"]]), labels=torch.tensor([sample["labels"]])).loss.backward()
        assert scores.effort[row] == pytest.approx(weight.grad.norm().item(), rel=1e-5)
    assert scores.ids == split.ids
    assert scores.fingerprint == split.fingerprint


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(make_experiment, rows, tmp_path, monkeypatch):
    experiment = load_experiment(make_experiment(rows), ["selection.tokens_per_batch=400", "selection.self_test=0"])
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
    parts = list((tmp_path / "resumed").glob("part-*"))
    assert parts
    resumed = score(experiment, tmp_path / "resumed")
    scored_twice = sum(len(batch) for batch in batches) - 24
    assert scored_twice <= 3 * max(map(len, batches))  # only the part in hand was done again
    assert resumed.effort.tobytes() == unbroken.effort.tobytes()
    assert np.array_equal(resumed.index, unbroken.index)


def test_the_same_seed_repeats_bit_for_bit_and_another_draws_another_a(make_experiment, rows, tmp_path):
    experiment = load_experiment(make_experiment(rows))
    first, second = (score(experiment, tmp_path / name).effort for name in ("first", "second"))
    assert first.tobytes() == second.tobytes()
    other = load_experiment(make_experiment(rows), ["selection.seed=1"])
    assert not np.allclose(score(other, tmp_path / "other").effort, first)


def test_scores_of_another_model_or_setting_never_mix(make_experiment, rows, tmp_path):
    score(load_experiment(make_experiment(rows)), tmp_path / "scores", np.arange(3))
    for change, key in (
        ("selection.phi=v_weight", "phi"),
        ("cutoff_len=100", "cutoff_len"),
        ("template=alpaca", "template"),
    ):
        with pytest.raises(UserError, match=f"holds scores made otherwise \\({key}"):
            score(load_experiment(make_experiment(rows), [change]), tmp_path / "scores")


def test_later_rows_join_what_is_scored_already(make_experiment, rows, tmp_path, capsys):
    experiment = load_experiment(make_experiment(rows))
    assert list(score(experiment, tmp_path / "scores", np.array([2, 9])).index) == [2, 9]
    assert list(score(experiment, tmp_path / "scores", np.array([2, 5, 9])).index) == [2, 5, 9]
    capsys.readouterr()
    score(experiment, tmp_path / "scores", np.array([5]))
    assert "reusing" in capsys.readouterr().err


def test_rows_without_a_finite_score_are_named_and_more_than_one_percent_stop_the_run(
    make_experiment, rows, tmp_path, monkeypatch, capsys
):
    experiment = load_experiment(make_experiment(rows), ["selection.self_test=0"])
    score_batch = EffortScorer.score
    not_finite = torch.full((99,), torch.nan)
    monkeypatch.setattr(EffortScorer, "score", lambda *a: score_batch(*a) | {"effort": not_finite[: len(a[1])]})
    with pytest.raises(UserError, match=r"1?\d of 24 rows have a loss or score that is NaN or infinite, more than 1 %"):
        score(experiment, tmp_path / "scores")
    assert not list((tmp_path / "scores").glob("part-*"))
    named = capsys.readouterr().err
    assert re.search(r"left out: row \d+ of the training split \(id [0-9a-f]{16}\): effort not finite", named)


def test_more_columns_stand_beside_the_scores(make_experiment, rows, tmp_path):
    columns = "selection.columns=[hidden_state, entropy]"
    experiment = load_experiment(make_experiment(rows), [columns])
    scores = score(experiment, tmp_path / "scores")
    assert np.array_equal(scores.effort, score(load_experiment(make_experiment(rows)), tmp_path / "plain").effort)
    table = pa.concat_tables(map(pa.parquet.read_table, (tmp_path / "scores").glob("part-*")))
    config = AutoModelForCausalLM.from_pretrained(experiment.target_model).config
    assert {len(state) for state in table["hidden_state"].to_pylist()} == {config.hidden_size}
    assert 0 < np.median(table["entropy"]) <= np.log(config.vocab_size)
    score(load_experiment(make_experiment(rows)), tmp_path / "scores")  # asks for less: reused
    with pytest.raises(UserError, match=r"holds scores without hidden_state, entropy|entropy, hidden_state"):
        score(experiment, tmp_path / "plain")


def test_all_lora_takes_the_tuned_adapter_and_gives_the_untuned_target_a_fresh_one(make_experiment, rows, tmp_path):
    config, keys = make_experiment(rows), ["selection.phi=all_lora", "training.lora_rank=3"]
    experiment = load_experiment(config, keys)
    split, tuned, every = training_split(experiment), experiment.tuned_small, np.arange(4)
    tune_once(experiment, experiment.small_model, "train", split.rows, tuned, {"max_steps": 2}, SPECULATIVE_TUNING, {})
    score_rows(experiment, split, experiment.small_model, tuned, every, tmp_path / "tuned", SPECULATIVE_SCORES)
    samples = tokenised_rows(experiment, experiment.small_model, "train", split.rows)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(experiment.small_model), tuned)
    matrices = [p.requires_grad_(True) for key, p in model.named_parameters() if "lora_" in key]
    assert {min(p.shape) for p in matrices} == {3}
    efforts = read_scores(tmp_path / "tuned").effort
    for row in every:
        model.zero_grad()
        ids, labels = (torch.tensor([samples[int(row)][key]]) for key in ("input_ids", "labels"))
        model(input_ids=ids, labels=labels).loss.backward()
        norm = torch.stack([p.grad.double().norm() for p in matrices]).norm().item()
        assert efforts[row] == pytest.approx(norm, rel=1e-5)

    fresh, again = score(experiment, tmp_path / "fresh", every), score(experiment, tmp_path / "again", every)
    assert fresh.effort.tobytes() == again.effort.tobytes()
    assert not np.allclose(fresh.effort, efforts)
    with pytest.raises(UserError, match=r"holds scores made otherwise \(phi\.rank: stored"):
        score(load_experiment(config, ["selection.phi=all_lora", "training.lora_rank=4"]), tmp_path / "fresh", every)


def test_released_resets_the_adapters_of_the_speculator_and_not_of_the_tuned_target(
    make_experiment, rows, tmp_path, monkeypatch
):
    experiment = load_experiment(make_experiment(rows), ["selection.mode=released", "selection.self_test=0"])
    split, model, tuned = training_split(experiment), experiment.target_model, experiment.folder / "tuned"
    tune_once(experiment, model, "train", split.rows, tuned, {"max_steps": 1}, TARGET_TUNING, {})
    asked, load = [], scoring.load_for_scoring
    monkeypatch.setattr(scoring, "load_for_scoring", lambda *a, **k: asked.append(a[-1]) or load(*a, **k))
    for stage in (SPECULATIVE_SCORES, TARGET_SCORES):
        score_rows(experiment, split, model, tuned, np.arange(2), tmp_path / stage, stage)
    assert asked == [True, False]


def test_released_scores_are_twice_the_published_ones(make_experiment, rows, tmp_path):
    paper = score(load_experiment(make_experiment(rows)), tmp_path / "paper").effort
    released = score(load_experiment(make_experiment(rows), ["selection.mode=released"]), tmp_path / "released").effort
    assert np.array_equal(released, 2 * paper)


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_verification_scores_only_the_drawn_samples_or_all_as_released(make_experiment, rows, mode):
    config = make_experiment(rows)
    experiment = load_experiment(config, [f"selection.mode={mode}"])
    split = training_split(experiment)
    small, tuned, every = experiment.small_model, experiment.tuned_small, np.arange(len(split.rows))
    tune_once(experiment, small, "train", split.rows, tuned, experiment.small_training, SPECULATIVE_TUNING, {})
    score_rows(experiment, split, small, tuned, every, experiment.small_scores, SPECULATIVE_SCORES)
    done = run_script("selection/verify.py", "--config_path", config, "--set", f"selection.mode={mode}")
    assert "self-test: 4 samples in a batch and one by one agree to" in done.stderr
    verification = json.loads(experiment.verification.read_text())
    drawn = sorted(row for stratum in verification["strata"] for row in stratum["verified"])
    scored = list(read_scores(experiment.target_scores).index)
    assert verification["verified_samples"] == len(drawn) <= 4 * 2
    assert scored == (drawn if mode == "paper" else list(range(24)))
    if mode == "paper":
        keys = ["--set", "selection.phi=v_weight"]
        no_number = run_script("selection/verify.py", "--config_path", config, "--self_test", -1, check=False)
        assert_one_line_error(no_number, "key selection.self_test")
        other_phi = run_script("selection/verify.py", "--config_path", config, *keys, check=False)
        assert_one_line_error(other_phi, "scores/small was made otherwise (phi.name: stored")
        run_script("selection/coreset.py", "--config_path", config)
        coreset = json.loads((experiment.coresets / "staff-0.5.json").read_text())
        assert len(coreset["indices"]) == 12
        assert coreset["ids"] == [split.ids[i] for i in coreset["indices"]]
        other = run_script("selection/coreset.py", "--config_path", config, "--seed", 1, check=False)
        assert_one_line_error(other, "verification.json was made otherwise (seed: stored 42, now 1)")


def test_tuning_on_published_index_lists_and_refusing_what_does_not_fit(make_experiment, rows, tmp_path):
    config = make_experiment(rows)
    experiment = load_experiment(config)
    split = training_split(experiment)
    torch.save([4, 2, 11, 7], tmp_path / "published.pt")
    coreset = {"indices": [0, 3], "ids": [split.ids[0], split.ids[4]], "data_fingerprint": split.fingerprint}
    (tmp_path / "other.json").write_text(json.dumps(coreset))

    def tune(*names):
        paths = [tmp_path / name for name in names]
        return run_script("finetune/finetune-select.py", "--config_path", config, "--select_path", *paths, check=False)

    assert_one_line_error(tune("published.pt", "other.json"), "row 3 has id", "the coreset is for other data")
    assert not (experiment.folder / "target").exists()
    done = tune("published.pt")
    assert done.returncode == 0, done.stderr[-2000:]
    chosen = list(rows_of(experiment, "published"))
    assert chosen == [split.rows[i] for i in (2, 4, 7, 11)]
    assert (experiment.tuned_target("published") / "adapter_model.safetensors").exists()
    assert "reusing" in tune("published.pt").stderr

    torch.save([4, 2, 11, 8], tmp_path / "published.pt")  # another coreset under a name that is taken
    assert_one_line_error(tune("published.pt"), "was made otherwise (rows:")
    assert list(rows_of(experiment, "published")) == chosen  # what was tuned on stays

    for name in ("train.pt", "eval.pt", "full.pt", "a,b.pt"):
        torch.save([1], tmp_path / name)
        assert_one_line_error(tune(name), f"{name}: a coreset's file name names its data set")
    assert training_split(experiment).ids == split.ids


def test_an_adapter_on_another_model_is_refused(make_experiment, rows, tmp_path, tiny_model):
    experiment = load_experiment(make_experiment(rows))
    split, tuned = training_split(experiment), experiment.folder / "tuned"
    tune_once(experiment, str(tiny_model), "train", split.rows, tuned, {"max_steps": 1}, SPECULATIVE_TUNING, {})
    check_base(tuned, str(tiny_model))
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    (other / "tokenizer_config.json").write_text((other / "tokenizer_config.json").read_text() + "\n")
    with pytest.raises(UserError, match="was tuned from another model"):
        check_base(tuned, str(other))


def test_a_speculator_without_a_pass_scores_as_it_is(make_experiment, rows, tmp_path):
    config, keys = make_experiment(rows), ["small_training.num_train_epochs=0"]
    untuned = ["--config_path", config, "--set", *keys]
    assert "none, num_train_epochs is 0" in run_script("finetune/finetune.py", *untuned).stderr
    run_script("selection/effort_score.py", *untuned)
    experiment = load_experiment(config, keys)
    assert not (experiment.folder / "small").exists()
    assert np.array_equal(read_scores(experiment.small_scores).effort, score(experiment, tmp_path / "scores").effort)
    tuned = run_script("selection/effort_score.py", "--config_path", config, check=False)
    assert_one_line_error(tuned, "the speculative model is not tuned yet")


def test_stages_say_which_stage_is_missing(make_experiment, rows):
    config = make_experiment(rows)
    for script, said in {
        "selection/effort_score.py": "run finetune.py",
        "finetune/eval.py": "run finetune-select.py first",
        "scripts/costs.py": "no cost ledger yet",
    }.items():
        assert_one_line_error(run_script(script, "--config_path", config, check=False), said)
    target = run_script("selection/effort_score.py", "--config_path", config, "--model", "target", check=False)
    assert_one_line_error(target, "the target is not tuned yet", "run finetune.py --model target")
    grand = run_script("selection/coreset.py", "--config_path", config, "--method", "grand", check=False)
    assert_one_line_error(grand, "grand reads the scores of the tuned target", "--model target")


def test_a_speculator_cut_on_held_out_rows_is_refused_before_anything(make_experiment, rows, tmp_path):
    """30 rows, 24 in training: of 16 calibration rows of one split some are held out in another."""
    small = tmp_path / "cut"
    own = make_experiment(rows, small_model=str(small))
    run_script("scripts/make_draft.py", "--config_path", own, "--layers", 2)
    made = json.loads((small / "draft.json").read_text())
    experiment = load_experiment(own)
    split = training_split(experiment)
    assert made["calibration_ids"] == [split.ids[row] for row in made["calibration_rows"]]

    elsewhere = ["--config_path", own, "--set", "split_seed=7", "--set", f"output_dir={tmp_path / 'other'}"]
    other = load_experiment(own, elsewhere[3::2])
    with pytest.raises(UserError, match=r"was cut on (\d+) of the rows that this run holds out") as refused:
        check_run(other, training_split(other))
    held_out = set(held_out_ids(other)).intersection(made["calibration_ids"])
    assert f"on {len(held_out)} of" in str(refused.value)
    done = run_script("finetune/finetune.py", *elsewhere, check=False)
    assert_one_line_error(done, str(small), "scripts/make_draft.py")
    assert not other.record.exists() and {path.name for path in other.folder.iterdir() if path.is_dir()} == {"data"}

    del made["calibration_ids"]  # as of a speculator that does not name its rows
    (small / "draft.json").write_text(json.dumps(made))
    check_run(experiment, split)
    with pytest.raises(UserError, match="does not say on which rows"):
        check_run(other, training_split(other))
    run_script("scripts/make_draft.py", *elsewhere, "--layers", 2, "--out", tmp_path / "again")
    again = load_experiment(own, [*elsewhere[3::2], f"small_model={tmp_path / 'again'}"])
    check_run(again, training_split(again))


def test_rows_that_are_held_out_too_do_not_calibrate(make_experiment, rows, tmp_path):
    own = make_experiment([*rows[:20], *rows[:10]], small_model=str(tmp_path / "cut"))
    run_script("scripts/make_draft.py", "--config_path", own, "--layers", 2)
    experiment = load_experiment(own)
    held_out = set(held_out_ids(experiment))
    assert held_out.intersection(training_split(experiment).ids)
    assert not held_out.intersection(json.loads((tmp_path / "cut" / "draft.json").read_text())["calibration_ids"])


@pytest.fixture
def evaluate(monkeypatch):
    """eval.py's function; the script itself changes the path and handles signals."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(ending, "end_on_signals", lambda: None)
    script = importlib.import_module("finetune.eval")

    def evaluate(experiment, name: str) -> dict:
        identity = script.identity_of(experiment, name)
        return script.evaluate(experiment, name, identity, script.is_there(experiment, name, identity))

    return evaluate


def test_evaluation_takes_the_keys_of_the_model_and_not_those_of_training(make_experiment, rows, monkeypatch):
    """A QLoRA adapter answers on the quantised base, tuned or full; LLaMA-Factory accepts what it is handed."""
    from llamafactory.hparams import get_train_args
    from llamafactory.train import tuner

    model = {"quantization_bit": 4, "quantization_type": "fp4", "double_quantization": False, "flash_attn": "fa2"}
    only_training = {"learning_rate": 1e-3, "lora_rank": 4, "num_train_epochs": 2, "compute_accuracy": True}
    only_training |= {"disable_gradient_checkpointing": True, "upcast_layernorm": True}
    training = model | only_training | {"flash_attn": "sdpa"}
    config = make_experiment(rows, training=training, target_training={"flash_attn": "fa2"})
    experiment = load_experiment(config)
    training_split(experiment)
    handed = []

    def run_exp(arguments, callbacks):
        handed.append(arguments)
        folder = Path(arguments["output_dir"])
        (folder / "generated_predictions.jsonl").write_text("")
        (folder / "predict_results.json").write_text("{}")

    monkeypatch.setattr(tuner, "run_exp", run_exp)
    adapter = experiment.folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for tuned in (None, adapter):
        trainer.predict(experiment, tuned, experiment.folder, "fp32")
        arguments = handed.pop()
        assert {key: arguments.get(key) for key in model} == model
        assert not only_training.keys() & arguments.keys()
        assert get_train_args(arguments)[0].quantization_bit == 4


def test_flash_attn_reaches_the_model_that_answers_and_belongs_to_the_evaluation(
    make_experiment, rows, monkeypatch, evaluate
):
    from llamafactory.train.sft import workflow

    experiment = load_experiment(make_experiment(rows), ["training.flash_attn=disabled"])
    training_split(experiment)
    loaded, load = [], workflow.load_model
    monkeypatch.setattr(workflow, "load_model", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])
    evaluate(experiment, "untuned")
    assert [model.config._attn_implementation for model in loaded] == ["eager"]
    other = load_experiment(make_experiment(rows), ["training.flash_attn=sdpa"])
    with pytest.raises(UserError, match=r"was made otherwise \(model_keys\.flash_attn: "):
        evaluate(other, "untuned")
    evaluate(experiment, "untuned")  # reused
    assert len(loaded) == 1


def test_a_target_from_scratch_is_refused(make_experiment, rows):
    """It would be another model than the one that is scored, and evaluated with other random weights."""
    with pytest.raises(UserError, match="train_from_scratch cannot be given here"):
        load_experiment(make_experiment(rows), ["target_training.train_from_scratch=true"])
