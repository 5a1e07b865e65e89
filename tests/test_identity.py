"""What is stored is what the configuration says, or the stage ends before it reads, makes or records anything."""

import os
import shutil

import pytest
import torch
from conftest import everything_in
from safetensors.torch import load_file, save_file

from selection.run import model_folder
from selection.run.config import load_experiment
from selection.run.ledger import SPECULATIVE_SCORES, read_ledger, selection_costs
from selection.run.model_folder import keep_hashes, model_fingerprint
from selection.run.products import read_json, read_sealed

STAGES = {
    "finetune": "finetune.finetune",
    "effort_score": "selection.effort_score",
    "verify": "selection.verify",
    "coreset": "selection.coreset",
    "costs": "scripts.costs",
    "finetune-select": "finetune.finetune-select",
    "eval": "finetune.eval",
    "report": "scripts.report",
}


@pytest.fixture
def finished(make_experiment, rows, stage):
    """The configuration of a run in which every stage has run, and its experiment."""
    config = make_experiment(rows, evaluation={"max_new_tokens": 1})
    experiment = load_experiment(config)
    for name in ("finetune", "effort_score", "verify", "coreset"):
        assert stage(STAGES[name], config)[0] == 0
    coreset = experiment.coresets / "staff-0.5.json"
    assert stage(STAGES["finetune-select"], config, "--select_path", coreset)[0] == 0
    assert stage(STAGES["eval"], config)[0] == 0
    return config, experiment


def test_no_stage_takes_what_is_stored_for_the_product_of_another_configuration(finished, stage, tmp_path, tiny_model):
    config, experiment = finished
    other_model = tmp_path / "other"
    shutil.copytree(tiny_model, other_model)
    weights = load_file(other_model / "model.safetensors")
    save_file({name: 2 * each for name, each in weights.items()}, other_model / "model.safetensors", {"format": "pt"})
    other_data = tmp_path / "other.jsonl"
    lines = (tmp_path / "experiment.jsonl").read_text().splitlines()
    other_data.write_text("\n".join(reversed(lines)) + "\n")
    changes = {
        "selection.phi=v_weight": '(phi.name: stored "v_lora_b", now "v_weight")',
        "selection.phi_rank=8": "(phi.rank: stored 81, now 8)",
        "selection.verify=all": '(verify: stored "sampled", now "all")',
        "target_training.num_train_epochs=2": "staff-0.5 was made otherwise (keys.num_train_epochs: stored 1, now 2)",
        "evaluation.max_new_tokens=2": "eval/staff-0.5 was made otherwise (max_new_tokens: stored 1, now 2)",
        "selection.precision=bf16": '(precision: stored "fp32", now "bf16")',
        "selection.mode=released": '(mode: stored "paper", now "released")',
        f"small_model={other_model}": "small was made otherwise (model: stored",
        f"target_model={other_model}": "scores/target was made otherwise (model_fingerprint: stored",
        "target_model=some/other-model": 'now "some/other-model")',
        "template=alpaca": "(template: stored",
        "cutoff_len=200": "(cutoff_len: stored 256, now 200)",
        "training.learning_rate=0.5": "(keys.learning_rate: stored 0.001, now 0.5)",
        "small_training.num_train_epochs=2": "(keys.num_train_epochs: stored 1, now 2)",
        "precision=bf16": '(precision: stored "fp32", now "bf16")',
        f"dataset={other_data}": "belongs to other data (dataset_sha256: stored",
        "eval_size=0.3": "(eval_size: stored 0.2, now 0.3)",
        "split_seed=1": "(split_seed: stored 42, now 1)",
    }
    before = everything_in(experiment.folder)
    more = {"finetune-select": ["--select_path", experiment.coresets / "staff-0.5.json"], "coreset": ["--rate", 0.3]}
    for change, said in changes.items():
        for name, module in STAGES.items():
            if change == "selection.verify=all" and name in ("finetune", "effort_score", "verify", "costs"):
                continue  # verify.py makes that anew
            code, _, err = stage(module, config, *more.get(name, []), "--set", change)
            assert code == 2, (name, change)
            errors = [line for line in err.splitlines() if line.startswith("error:")]
            assert len(errors) == 1 and said in errors[0], (name, change, err)
    assert everything_in(experiment.folder) == before


def test_what_a_verification_depends_on_is_held_against_the_configuration_too(finished, stage):
    config, experiment = finished
    before = everything_in(experiment.folder)
    for name in ("coreset", "eval", "report"):
        code, _, err = stage(STAGES[name], config, "--set", "selection.num_strata=2")
        assert code == 2 and "verification.json was made otherwise (num_strata: stored 4, now 2): run verify.py" in err
    assert everything_in(experiment.folder) == before
    # Where it is made anew, the new settings stand in the record.
    assert stage(STAGES["verify"], config, "--set", "selection.num_strata=2")[0] == 0
    assert load_experiment(experiment.record).selection.num_strata == 2


def test_records_say_which_models_and_phi_they_are_of_and_auto_takes_the_number_format_that_was_used(
    finished, stage, tiny_model
):
    config, experiment = finished
    for name in ("coreset", "report"):
        code, _, err = stage(STAGES[name], config, "--set", "selection.precision=auto", "--set", "precision=auto")
        assert code == 0, err
    coreset = read_json(experiment.coresets / "staff-0.5.json")
    fingerprint = model_fingerprint(tiny_model)
    for key, tuned in (("scores", "small"), ("target", None)):
        of = coreset[key]
        assert (of["model"], of["model_fingerprint"], of["tuned"]) == (str(tiny_model), fingerprint, tuned)
        assert (of["phi"]["name"], of["precision"]) == ("v_lora_b", "fp32")
    verification = read_sealed(experiment.verification)
    assert (verification["scores"], verification["target"]) == (coreset["scores"], coreset["target"])


def test_a_coreset_of_scores_that_were_made_anew_otherwise_is_not_tuned_on(finished, stage):
    config, experiment = finished
    changed = ["--set", "selection.phi=v_weight"]
    shutil.rmtree(experiment.folder / "scores")
    experiment.verification.unlink()
    for name in ("effort_score", "verify"):
        assert stage(STAGES[name], config, *changed)[0] == 0
    coreset = experiment.coresets / "staff-0.5.json"
    code, _, err = stage(STAGES["finetune-select"], config, "--select_path", coreset, *changed)
    assert code == 2 and f"{coreset} was cut from other scores (phi.name: stored" in err


def test_a_run_whose_models_and_data_are_elsewhere_is_cut_again_under_the_same_names_and_settings_alone(
    make_experiment, rows, stage, tiny_model, tmp_path
):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    keys = {"small_model": str(model), "target_model": str(model), "small_training": {"num_train_epochs": 0}}
    config = make_experiment(rows, **keys)
    for name in ("effort_score", "verify"):
        assert stage(STAGES[name], config)[0] == 0
    shutil.rmtree(model)
    (tmp_path / "experiment.jsonl").unlink()
    for name in ("coreset", "costs"):
        assert stage(STAGES[name], config)[0] == 0
    code, _, err = stage(STAGES["coreset"], config, "--set", "split_seed=1")
    assert code == 2 and "(split_seed: stored 42, now 1)" in err
    code, _, err = stage(STAGES["coreset"], config, "--set", f"small_model={tmp_path / 'gone'}")
    assert code == 2 and "scores/small was made otherwise (model: stored" in err


def test_a_refused_call_of_a_fresh_run_leaves_no_record(make_experiment, rows, stage):
    experiment = load_experiment(config := make_experiment(rows))
    code, _, _ = stage(STAGES["effort_score"], config, "--set", "selection.phi=v_weight")
    assert code == 2 and not experiment.record.exists()


def test_scores_made_again_after_the_folder_was_removed_cost_once(make_experiment, rows, stage):
    experiment = load_experiment(config := make_experiment(rows, small_training={"num_train_epochs": 0}))
    assert stage(STAGES["effort_score"], config)[0] == 0
    assert stage(STAGES["verify"], config)[0] == 0
    paid = [(cost.stage, cost.samples) for cost in selection_costs(experiment, "staff")]
    shutil.rmtree(experiment.folder / "scores")
    assert stage(STAGES["effort_score"], config)[0] == 0
    assert stage(STAGES["verify"], config)[0] == 0
    assert len([cost for cost in read_ledger(experiment.folder) if cost.stage == SPECULATIVE_SCORES]) == 2
    assert [(cost.stage, cost.samples) for cost in selection_costs(experiment, "staff")] == paid


# Fingerprints


@pytest.fixture
def large_model(tmp_path):
    """A folder that looks like a model of 6 MiB, three of them in the middle that could be any layers."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({f"layer-{i}": torch.full((2**18,), float(i)) for i in range(6)}, folder / "model.safetensors")
    for name, text in {
        "vocab.json": "{}",
        "merges.txt": "a b",
        "special_tokens_map.json": "{}",
        "added_tokens.json": "{}",
        "tokenizer_config.json": "{}",
        "model.safetensors.index.json": "{}",
        "README.md": "about",
    }.items():
        (folder / name).write_text(text)
    return folder


def test_a_layer_replaced_in_the_middle_and_every_tokenizer_file_change_the_fingerprint(large_model):
    seen = {model_fingerprint(large_model)}
    weights = large_model / "model.safetensors"
    layers = load_file(weights)
    save_file(layers | {"layer-3": layers["layer-3"] + 1}, weights)
    seen.add(model_fingerprint(large_model))
    for path in sorted(large_model.glob("*[ns]*.[jt]*")):
        path.write_text(path.read_text() + " ")
        seen.add(model_fingerprint(large_model))
    assert len(seen) == 2 + len(list(large_model.glob("*[ns]*.[jt]*"))) == 8
    (large_model / "README.md").write_text("about something else")
    assert model_fingerprint(large_model) in seen


def test_weights_are_hashed_once_as_long_as_the_file_stays_the_same(large_model, tmp_path, monkeypatch):
    hashed = []
    digest = model_folder.file_digest
    monkeypatch.setattr(model_folder, "file_digest", lambda path: hashed.append(path.name) or digest(path))
    monkeypatch.setattr(model_folder.time, "time_ns", lambda: 2**62)  # the files are old
    run = tmp_path / "run"
    first = model_fingerprint(large_model, run)
    assert "model.safetensors" in hashed
    keep_hashes(run)
    for _ in range(2):  # in this process, and in the next one
        hashed.clear()
        assert model_fingerprint(large_model, run) == first and not hashed
        monkeypatch.setattr(model_folder, "_hashed", {})
    weights = large_model / "model.safetensors"
    content, stat = bytearray(weights.read_bytes()), weights.stat()
    content[3 * 2**20] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as cp -p does it
    assert model_fingerprint(large_model, run) != first and hashed == ["model.safetensors"]
    (run / "hashes.json").write_text("[1]")  # damaged: all is hashed again
    monkeypatch.setattr(model_folder, "_hashed", {})
    hashed.clear()
    model_fingerprint(large_model, run)
    assert "model.safetensors" in hashed
