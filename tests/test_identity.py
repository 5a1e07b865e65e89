"""What is stored is what the configuration says, or the stage ends before it reads, makes or records anything."""

import os
import shutil

import pytest
from conftest import everything_in
from safetensors.torch import load_file, save_file

from selection.run import model_folder
from selection.run.config import load_experiment
from selection.run.ledger import SPECULATIVE_SCORES, read_ledger, selection_costs
from selection.run.model_folder import keep_hashes, model_fingerprint
from selection.run.products import read_json, read_sealed, write_sealed

_STAGES = ("finetune.finetune", "finetune.finetune-select", "finetune.eval", "scripts.costs", "scripts.report")
_STAGES += ("selection.effort_score", "selection.verify", "selection.coreset")
STAGES = {name.partition(".")[2]: name for name in _STAGES}


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


def test_what_is_stored_is_never_taken_for_the_product_of_another_configuration(
    make_experiment, rows, call, tmp_path, tiny_model
):
    experiment = load_experiment(config := make_experiment(rows, evaluation={"max_new_tokens": 1}))
    path = experiment.coresets / "staff-0.5.json"
    for name in ("finetune", "effort_score", "verify", "coreset"):
        call(name, config)
    call("finetune-select", config, "--select_path", path)
    call("eval", config)
    other_model, other_data = tmp_path / "other", tmp_path / "other.jsonl"
    shutil.copytree(tiny_model, other_model)
    weights = load_file(other_model / "model.safetensors")
    save_file({name: 2 * each for name, each in weights.items()}, other_model / "model.safetensors", {"format": "pt"})
    lines = (tmp_path / "experiment.jsonl").read_text().splitlines()
    other_data.write_text("\n".join(reversed(lines)) + "\n")
    changes = {
        "selection.phi=v_weight": '(phi.name: stored "v_lora_b", now "v_weight")',
        "selection.verify=all": '(verify: stored "sampled", now "all")',
        "target_training.num_train_epochs=2": "staff-0.5 was made otherwise (keys.num_train_epochs: stored 1, now 2)",
        "evaluation.max_new_tokens=2": "eval/staff-0.5 was made otherwise (max_new_tokens: stored 1, now 2)",
        "selection.mode=released": '(mode: stored "paper", now "released")',
        f"small_model={other_model}": "small was made otherwise (model: stored",
        f"target_model={other_model}": "scores/target was made otherwise (model_fingerprint: stored",
        "template=alpaca": "(template: stored",
        "cutoff_len=200": "(cutoff_len: stored 256, now 200)",
        "small_training.num_train_epochs=2": "(keys.num_train_epochs: stored 1, now 2)",
        "precision=bf16": '(precision: stored "fp32", now "bf16")',
        f"dataset={other_data}": "belongs to other data (dataset_sha256: stored",
        "split_seed=1": "(split_seed: stored 42, now 1)",
    }
    before, names = everything_in(experiment.folder), list(STAGES)
    more = {"finetune-select": ["--select_path", path], "coreset": ["--rate", 0.3]}
    for number, (change, said) in enumerate(changes.items()):  # the first in every stage, the others in two of them
        for name in names if number == 0 else (names[number % 8], names[(number + 3) % 8]):
            if change == "selection.verify=all":
                name = "coreset"  # verify.py makes that anew
            assert said in call(name, config, *more.get(name, []), keys=(change,), code=2), (name, change)
    assert everything_in(experiment.folder) == before

    # Records say what they are of.
    for name in ("coreset", "report"):  # auto takes the number format that was used
        call(name, config, keys=("selection.precision=auto", "precision=auto"))
    coreset, fingerprint = read_json(path), model_fingerprint(tiny_model)
    for key, tuned in (("scores", "small"), ("target", None)):
        of = coreset[key]
        assert (of["model"], of["model_fingerprint"], of["tuned"]) == (str(tiny_model), fingerprint, tuned)
        assert (of["phi"]["name"], of["precision"]) == ("v_lora_b", "fp32")
    verification = read_sealed(experiment.verification)
    assert (verification["scores"], verification["target"]) == (coreset["scores"], coreset["target"])
    write_sealed(experiment.verification, verification | {"target": "x"})
    assert "verification.json is damaged" in call("coreset", config, code=2)
    write_sealed(experiment.verification, verification)

    before, fewer = everything_in(experiment.folder), ("selection.num_strata=2",)
    for name in ("coreset", "eval"):
        said = call(name, config, keys=fewer, code=2)
        assert "verification.json was made otherwise (num_strata: stored 4, now 2): run verify.py" in said
    assert everything_in(experiment.folder) == before
    call("verify", config, keys=fewer)  # where it is made anew, the new settings stand in the record
    assert load_experiment(experiment.record).selection.num_strata == 2

    shutil.rmtree(experiment.folder / "scores")  # and a coreset of scores that were made anew is not tuned on
    experiment.verification.unlink()
    changed = ("selection.phi=v_weight",)
    for name in ("effort_score", "verify"):
        call(name, config, keys=changed)
    said = call("finetune-select", config, "--select_path", path, keys=changed, code=2)
    assert f"{path} was made otherwise (phi.name: stored" in said


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

_FILES = ("config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_FILES += ("tokenizer_config.json", "model.safetensors.index.json", "model.safetensors")


@pytest.fixture
def model(tmp_path):
    """A folder that looks like a model."""
    (tmp_path / "large").mkdir()
    for name in (*_FILES, "README.md"):
        (tmp_path / "large" / name).write_bytes(bytes(2**20))
    return tmp_path / "large"


def change(path) -> None:
    """Another byte in the middle, and the times of before, as cp -p leaves them."""
    content, stat = bytearray(path.read_bytes()), path.stat()
    content[2**19] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_byte_in_the_middle_of_weights_and_tokenizer_files_changes_the_fingerprint(model):
    seen = {model_fingerprint(model)}
    for name in _FILES:
        change(model / name)
        seen.add(model_fingerprint(model))
    assert len(seen) == 1 + len(_FILES)
    change(model / "README.md")
    assert model_fingerprint(model) in seen


def test_weights_are_hashed_once_as_long_as_the_file_stays_the_same(model, tmp_path, monkeypatch):
    hashed, digest = [], model_folder.file_digest
    monkeypatch.setattr(model_folder, "file_digest", lambda path: hashed.append(path.name) or digest(path))
    monkeypatch.setattr(model_folder.time, "time_ns", lambda: 2**62)  # the files are old
    run = tmp_path / "run"
    first = model_fingerprint(model, run)
    keep_hashes(run)
    assert sorted(hashed) == sorted(_FILES)
    for _ in range(2):  # in this process, and in the next one
        assert model_fingerprint(model, run) == first and len(hashed) == len(_FILES)
        monkeypatch.setattr(model_folder, "hashed", {})
    change(model / "model.safetensors")
    assert model_fingerprint(model, run) != first and hashed[len(_FILES) :] == ["model.safetensors"]
    (run / "hashes.json").write_text("[1]")  # damaged: all is hashed again
    monkeypatch.setattr(model_folder, "hashed", {})
    model_fingerprint(model, run)
    assert len(hashed) == 2 * len(_FILES) + 1
