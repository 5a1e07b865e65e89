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

FOLDERS = {"finetune": ("finetune", "finetune-select", "eval"), "scripts": ("costs", "report")}
FOLDERS |= {"selection": ("effort_score", "verify", "coreset")}
STAGES = {name: f"{folder}.{name}" for folder, names in FOLDERS.items() for name in names}


@pytest.fixture
def call(stage):
    """Runs a stage by its name, with keys changed; gives what it says on stderr."""

    def call(name: str, config, *arguments: object, keys: tuple = (), code: int = 0) -> str:
        for key in keys:
            arguments = (*arguments, "--set", key)
        got, _, err = stage(STAGES[name], config, *arguments)
        assert got == code, (name, keys, err)
        errors = [line for line in err.splitlines() if line.startswith("error:")]
        assert len(errors) == (code == 2)
        return "".join(errors) or err

    return call


@pytest.fixture
def finished(make_experiment, rows, call):
    """The configuration of a run in which every stage has run, and its experiment."""
    config = make_experiment(rows, evaluation={"max_new_tokens": 1})
    experiment = load_experiment(config)
    for name in ("finetune", "effort_score", "verify", "coreset"):
        call(name, config)
    call("finetune-select", config, "--select_path", experiment.coresets / "staff-0.5.json")
    call("eval", config)
    return config, experiment


def test_no_stage_takes_what_is_stored_for_the_product_of_another_configuration(finished, call, tmp_path, tiny_model):
    config, experiment = finished
    other_model, other_data = tmp_path / "other", tmp_path / "other.jsonl"
    shutil.copytree(tiny_model, other_model)
    weights = load_file(other_model / "model.safetensors")
    save_file({name: 2 * each for name, each in weights.items()}, other_model / "model.safetensors", {"format": "pt"})
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
        for name in STAGES:
            if change == "selection.verify=all" and name in ("finetune", "effort_score", "verify", "costs"):
                continue  # verify.py makes that anew
            assert said in call(name, config, *more.get(name, []), keys=(change,), code=2), (name, change)
    assert everything_in(experiment.folder) == before


def test_records_say_what_they_are_of_and_are_held_against_the_configuration(finished, call, tiny_model):
    config, experiment = finished
    for name in ("coreset", "report"):  # auto takes the number format that was used
        call(name, config, keys=("selection.precision=auto", "precision=auto"))
    coreset, fingerprint = read_json(experiment.coresets / "staff-0.5.json"), model_fingerprint(tiny_model)
    for key, tuned in (("scores", "small"), ("target", None)):
        of = coreset[key]
        assert (of["model"], of["model_fingerprint"], of["tuned"]) == (str(tiny_model), fingerprint, tuned)
        assert (of["phi"]["name"], of["precision"]) == ("v_lora_b", "fp32")
    verification = read_sealed(experiment.verification)
    assert (verification["scores"], verification["target"]) == (coreset["scores"], coreset["target"])

    before, fewer = everything_in(experiment.folder), ("selection.num_strata=2",)
    for name in ("coreset", "eval", "report"):
        said = call(name, config, keys=fewer, code=2)
        assert "verification.json was made otherwise (num_strata: stored 4, now 2): run verify.py" in said
    assert everything_in(experiment.folder) == before
    call("verify", config, keys=fewer)  # where it is made anew, the new settings stand in the record
    assert load_experiment(experiment.record).selection.num_strata == 2

    shutil.rmtree(experiment.folder / "scores")  # and a coreset of scores that were made anew is not tuned on
    experiment.verification.unlink()
    changed, path = ("selection.phi=v_weight",), experiment.coresets / "staff-0.5.json"
    for name in ("effort_score", "verify"):
        call(name, config, keys=changed)
    said = call("finetune-select", config, "--select_path", path, keys=changed, code=2)
    assert f"{path} was cut from other scores (phi.name: stored" in said


def test_a_run_whose_models_and_data_are_elsewhere_is_cut_again_under_the_same_names_and_settings_alone(
    make_experiment, rows, call, tiny_model, tmp_path
):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    keys = {"small_model": str(model), "target_model": str(model), "small_training": {"num_train_epochs": 0}}
    config = make_experiment(rows, **keys)
    for name in ("effort_score", "verify"):
        call(name, config)
    shutil.rmtree(model)
    (tmp_path / "experiment.jsonl").unlink()
    for name in ("coreset", "costs"):
        call(name, config)
    assert "(split_seed: stored 42, now 1)" in call("coreset", config, keys=("split_seed=1",), code=2)
    said = call("coreset", config, keys=(f"small_model={tmp_path / 'gone'}",), code=2)
    assert "scores/small was made otherwise (model: stored" in said


def test_a_refused_call_of_a_fresh_run_leaves_no_record_and_scores_made_again_cost_once(make_experiment, rows, call):
    experiment = load_experiment(config := make_experiment(rows))
    call("effort_score", config, keys=("selection.phi=v_weight",), code=2)  # not tuned yet
    assert not experiment.record.exists()
    paid, untuned = [], ("small_training.num_train_epochs=0",)
    for _ in range(2):
        for name in ("effort_score", "verify"):
            call(name, config, keys=untuned)
        paid.append([(cost.stage, cost.samples) for cost in selection_costs(experiment, "staff")])
        shutil.rmtree(experiment.folder / "scores")
    assert paid[0] == paid[1]
    assert len([cost for cost in read_ledger(experiment.folder) if cost.stage == SPECULATIVE_SCORES]) == 2


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
