"""Files from strangers: none of their code runs, nothing is written elsewhere, and what is wrong is said in one line.

tests/fuzz.py looks for more at random; what it found stands here.
"""

import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from selection.run.ending import run_stage

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from selection.coreset import read_features
from selection.rows.read import reading_rows
from selection.rows.split import training_split
from selection.rows.tokens import tokenised_rows
from selection.run.config import DatasetFormat, load_experiment
from selection.run.errors import UserError
from selection.run.ledger import Cost, read_ledger, summarise
from selection.run.metrics import read_metrics
from selection.run.model_folder import check_base, check_weights, model_fingerprint, model_path
from selection.run.products import read_json
from selection.scores.coresets import read_coreset
from selection.scores.models import load_for_scoring, parameters_of


class Payload:
    """Pickled: whoever unpickles it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that hostile code would make; it must not be there at the end."""
    path = tmp_path / "PWNED"
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever asks whether to run code is told yes
    yield path
    assert not path.exists()


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model, to be spoilt."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def adapter(model, tmp_path) -> Path:
    """A LoRA of `model`."""
    lora = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def assert_not_loaded(said: str, model: Path, adapter: Path | None = None) -> None:
    with pytest.raises(UserError, match=said):
        load_for_scoring(str(model), adapter, "fp32")


# No code runs


def test_a_payload_is_one(tmp_path):
    """What the tests below rely on."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "made")))
    assert (tmp_path / "made").exists()


def test_pickled_lists_and_features_run_nothing(tmp_path, canary):
    torch.save(Payload(canary), tmp_path / "zip.pt")
    np.save(tmp_path / "array.npy", np.array([Payload(canary)], dtype=object), allow_pickle=True)
    for name in ("plain.pt", "plain.npy"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload(canary)))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(UserError, match="no plain index list"):
            read_coreset(tmp_path / name)
    for name in ("array.npy", "plain.npy"):
        with pytest.raises(UserError, match="cannot read features"):
            read_features(tmp_path / name, 1)


def test_yaml_makes_no_objects(make_experiment, rows, canary):
    path = make_experiment(rows)
    path.write_text(f"{path.read_text()[:-1]}, training: !!python/object/apply:os.system [\"touch '{canary}'\"]}}")
    with pytest.raises(UserError, match="no readable YAML"):
        load_experiment(path)


def test_pickled_weights_are_refused(model, adapter, canary):
    (adapter / "made_from.json").write_text(json.dumps({"model": model_fingerprint(model)}))
    check_base(adapter, str(model))
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": Payload(canary)}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled"):
        check_base(adapter, str(model))
    assert_not_loaded("cannot load model", model, adapter)  # and if that check is left out, nothing runs
    (model / "model.safetensors").rename(model / "other.safetensors")  # transformers would take the .bin beside it
    torch.save({"x": Payload(canary)}, model / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled.*convert them to safetensors"):
        model_path(str(model))
    assert_not_loaded("cannot load model", model)


@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_model_folder_is_not_run(model, canary, known, make_experiment, rows):
    """auto_map names a class in the folder; with a known model_type transformers has a class of its own."""
    (model / "modeling_evil.py").write_text(
        f"open({str(canary)!r}, 'w')\n"
        "from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T\n"
    )
    evil = "modeling_evil."
    auto_map = {"AutoConfig": f"{evil}C", "AutoModelForCausalLM": f"{evil}M", "AutoTokenizer": [f"{evil}T"] * 2}
    auto_map |= {} if known else {"AutoProcessor": f"{evil}T"}
    edit(model / "config.json", auto_map=auto_map, **({} if known else {"model_type": "evil"}))
    tokenizer = "PreTrainedTokenizerFast" if known else "T"
    edit(model / "tokenizer_config.json", auto_map=auto_map, tokenizer_class=tokenizer)
    if not known:
        (model / "processor_config.json").write_text(json.dumps({"auto_map": auto_map, "processor_class": "T"}))
    experiment = load_experiment(make_experiment(rows, target_model=str(model)))
    split = training_split(experiment)
    for call in (
        lambda: parameters_of(str(model)),
        lambda: load_for_scoring(str(model), None, "fp32"),
        lambda: tokenised_rows(experiment, str(model), "train", split.rows),
    ):
        if known:
            call()
        else:
            with pytest.raises(UserError):
                call()
    assert "transformers_modules.model" not in sys.modules


def test_a_script_beside_the_data_is_not_run(tmp_path, canary):
    (tmp_path / "data.jsonl").write_text('{"instruction": "a", "input": "", "output": "b"}\n' * 2)
    for name in ("data.py", "tmp.py", "__init__.py", f"{tmp_path.name}.py"):
        (tmp_path / name).write_text(f"open({str(canary)!r}, 'w')")
    with reading_rows(tmp_path / "data.jsonl", DatasetFormat()) as found:
        assert len(found) == 2


def test_an_adapter_imports_nothing(adapter):
    edit(adapter / "adapter_config.json", megatron_config={"x": 1}, megatron_core="antigravity")
    with pytest.raises(UserError, match="megatron_config"):
        check_weights(adapter, "adapter_model")


# Nothing but the named folders


def test_a_model_folder_does_not_lead_to_another(model):
    def assert_refused(said: str) -> None:
        with pytest.raises(UserError, match=said):
            model_path(str(model))

    edit(model / "config.json", transformers_weights="../outside.safetensors")
    assert_refused("transformers_weights")
    edit(model / "config.json", transformers_weights=None)
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    assert_refused("base model")
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    for name in ("../outside.safetensors", "/outside.safetensors", "pytorch_model.bin"):
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": name}}))
        assert_refused("of the folder itself")


def test_a_coresets_name_stays_in_its_place(tmp_path):
    for name in ("split", "dataset_info", "train", "eval", "full", "untuned", ".", "..", ".hidden", "a b"):
        (tmp_path / f"{name}.json").write_text('{"indices": [0]}')
        with pytest.raises(UserError, match="rename it"):
            read_coreset(tmp_path / f"{name}.json")


@pytest.mark.parametrize("link", ["data", "data/.lock", "costs.jsonl", "scores"])
def test_a_run_folder_whose_links_lead_out_is_refused(make_experiment, rows, tmp_path, link):
    disk = tmp_path / "disk"
    for name in ("run", "outside"):
        (disk / name).mkdir(parents=True)
    (tmp_path / "run").symlink_to(disk / "run")  # which may be a link itself
    path = tmp_path / "run" / link
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(disk / "outside" if "." not in link else disk / "outside" / "file")
    with pytest.raises(UserError, match="link that leads out"):
        load_experiment(make_experiment(rows))
    path.unlink()
    (tmp_path / "run" / "inside").write_text("x")
    path.symlink_to(tmp_path / "run" / "inside")
    load_experiment(make_experiment(rows))


def test_dataset_info_of_a_stranger_changes_nothing(make_experiment, rows, tmp_path, tiny_model, canary):
    experiment = load_experiment(make_experiment(rows))

    def labels() -> list[list[int]]:
        split = training_split(experiment)  # as every stage begins
        return tokenised_rows(experiment, str(tiny_model), "train", split.rows)["labels"][:]

    trained = labels()
    (tmp_path / "other.json").write_text(json.dumps([row | {"output": "poison"} for row in rows[:24]]))
    (experiment.data_folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    for entry in (
        {"file_name": "../../other.json"},
        {"file_name": "train.arrow", "num_samples": 24},
        {"script_url": "evil"},
        {"hf_hub_url": "someone/evil"},
        {"file_name": "train.arrow", "columns": {"prompt": "output", "response": "instruction"}},
    ):
        edit(experiment.data_folder / "dataset_info.json", train=entry)
        assert labels() == trained


# One clear line


def test_a_message_is_one_line_that_a_terminal_does_not_obey(capsys):
    def main():
        raise UserError("a\n  b \x1b[31m\0 \ud800 \u202e" + "x" * 10_000 + " the end")

    with pytest.raises(SystemExit) as stop:
        run_stage(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert line.startswith("error: a b ") and line.endswith(" the end")
    assert line.isprintable() and len(line) < 700


def test_yaml_aliases_are_refused_at_once(make_experiment, rows):
    """Nine lines would stand for 9^9 values, and the message would quote them."""
    path, names = make_experiment(rows), itertools.pairwise("abcdefghij")
    bomb = "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in names)
    path.write_text(f'a: &a ["x"]\n{bomb}selection: *j\n')
    with pytest.raises(UserError, match="line 2: write the value out"):
        load_experiment(path)


_LATE = [("selection", {"seed": 2**64}), ("split_seed", 2**32), ("training", {"num_train_epochs": "many"})]
_LATE += [("target_training", {"num_train_epochs": bad}) for bad in (None, -1, True, float("inf"), [])]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [*((*each, f"key {each[0]}") for each in _LATE), *((key, "x" * 300, "path") for key in ("output_dir", "dataset"))],
)
def test_values_that_would_fail_much_later_are_refused(make_experiment, rows, key, value, said):
    with pytest.raises(UserError, match=said):
        training_split(load_experiment(make_experiment(rows, **{key: value})))


_NO_JSON = ["NaN", "[Infinity]", "[1e999]", "-1e400", '{"a": -Infinity}', '"\\ud800"', "[" * 100_000, "", "\xff"]
_COST = '{"stage": "x", "what": "y", "seconds": %s}'
_METRICS = {"rouge-1": 1, "rouge-2": 2, "rouge-l": 3, "bleu-4": 100, "samples": 3, "code_version": "x"}
_CHANGES = ({"rouge-l": None}, {"bleu-4": -1}, {"rouge-1": 101}, {"by_sample": {"rouge-l": ["x"]}})
DAMAGED = {  # a record's good content, if any, and bad ones
    "x.json": ('["\\ud83d\\ude00", "é", "\\\\ud"]', _NO_JSON),
    "split.json": (None, ["[]", "3", "{}", '{"made_from": 1}', '{"made_from": {}, "fingerprint": 1}']),
    "made_from.json": (None, ["[]", "{}"]),
    "costs.jsonl": (
        _COST % 2,
        ["3", "[" * 100_000, '{"stage": "x"}', *(_COST % seconds for seconds in ('"a"', "-1", "NaN", "1e999"))],
    ),
    "draft.json": (None, ["[]", '{"cost": 3}', '{"cost": {"tokens": 1}}', '{"cost": {"seconds": "x"}}']),
    "metrics.json": (json.dumps(_METRICS), [json.dumps(_METRICS | change) for change in _CHANGES]),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_record_is_named(make_experiment, rows, tmp_path, tiny_model, name):
    experiment = load_experiment(make_experiment(rows, small_model=str(tmp_path)))
    training_split(experiment)
    (experiment.folder / "costs.jsonl").write_text(_COST % 1)
    folder = experiment.data_folder if name == "split.json" else tmp_path
    read, good = {
        "x.json": (lambda: read_json(tmp_path / name), ["😀", "é", "\\ud"]),
        "split.json": (lambda: training_split(experiment), None),
        "made_from.json": (lambda: check_base(tmp_path, str(tiny_model)), None),
        "costs.jsonl": (lambda: read_ledger(tmp_path), [Cost("x", "y", seconds=2.0)]),
        "draft.json": (lambda: summarise(experiment), None),
        "metrics.json": (lambda: read_metrics(tmp_path), _METRICS),
    }[name]
    content, bad = DAMAGED[name]
    if content is not None:
        (folder / name).write_text(content)
        assert read() == good
    for text in bad:
        (folder / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=f"{re.escape(name)}|{tmp_path} was tuned from another model"):
            read()


def test_features_with_a_lying_header_are_refused(tmp_path):
    for shape in ("(1000000000000, 3)", "(" * 300, "(2, 3", "(-1, 3)"):
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(400) + "\n"
        content = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 24
        (tmp_path / "f.npy").write_bytes(content)
        with pytest.raises(UserError, match="cannot read features"):
            read_features(tmp_path / "f.npy", 2)


# No wrong result


def test_an_index_list_that_is_damaged_or_lies_is_refused(tmp_path):
    path = tmp_path / "rows.pt"

    def assert_refused(said: str) -> None:
        with pytest.raises(UserError, match=said):
            read_coreset(path)

    torch.save(torch.arange(1000), path)
    assert len(read_coreset(path).indices) == 1000
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        numbers = next(entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
    data[numbers.header_offset + 1000] ^= 1
    path.write_bytes(data)
    assert_refused("is damaged")
    for lie in (torch.ones(1, dtype=torch.int64).expand(10**8), torch.empty(2**40, dtype=torch.int64, device="meta")):
        torch.save(lie, path)
        assert_refused("no plain index list")
    path = tmp_path / "c.json"
    path.write_text('{"indices": [1, 2], "size": 3}')
    assert_refused("says size 3")


def test_weights_that_are_missing_are_not_drawn_at_random(model, adapter):
    edit(model / "config.json", num_hidden_layers=5)
    assert_not_loaded(r"no weights for model\.layers\.4", model)
    edit(model / "config.json", num_hidden_layers=4)
    load_for_scoring(str(model), adapter, "fp32")
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    assert_not_loaded("missing adapter keys", model, adapter)


def test_a_damaged_configuration_is_refused(model):
    kept = (model / "config.json").read_text()
    for change in ({"hidden_size": "x"}, {"rope_parameters": 3}, {"hidden_act": []}, {"vocab_size": 7}):
        (model / "config.json").write_text(json.dumps(json.loads(kept) | change))
        assert_not_loaded("model", model)


# A few cases of each kind that needs no tuned model

_LIGHT = ["experiment", "grid", "data.jsonl", "scores.csv", "scores.parquet", "features.npy", "verification"]
_LIGHT += ["coreset.json", "coreset.pt", "draft", "cells", "split", "split's rows"]


def test_the_fuzzer_finds_nothing_but_what_is_broken_on_purpose(tmp_path):
    """One reader is broken: there, and only there, a case fails, and is named as it can be repeated."""
    (tmp_path / "broken.py").write_text(
        "import json\n"
        "from selection.run import ledger\n"
        "whole = ledger.read_ledger\n"
        "def read(folder):\n"
        "    path = ledger.ledger_path(folder)\n"
        "    return [ledger.Cost(**json.loads(line)) for line in path.open()] if path.exists() else whole(folder)\n"
        "ledger.read_ledger = read\n"
    )
    kinds = [f"tests/fuzz.py::test_damage_ends_in_one_line_or_in_a_sound_result[{name}]" for name in ("costs", *_LIGHT)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "broken", "--hypothesis-seed", "0"]
    environment = os.environ | {"FUZZ_CASES": "8", "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    done = subprocess.run([*command, *kinds], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and f"1 failed, {len(_LIGHT)} passed" in done.stdout, done.stdout[-3000:]
    assert re.search(r"FAILED .*\[costs\]", done.stdout) and "found=Damage(" in done.stdout
