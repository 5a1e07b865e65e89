"""Files from strangers: none of their code runs, nothing is written elsewhere, and what is wrong is said in one line.

tests/fuzz.py looks for more at random.
"""

import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

from selection.run.ending import run_stage

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from damage import JSON, NPY, PAYLOAD, PT
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from selection.coreset import read_features
from selection.rows.read import reading_rows
from selection.rows.split import training_split
from selection.rows.tokens import tokenised_rows
from selection.run.config import DatasetFormat, load_experiment
from selection.run.errors import UserError
from selection.run.ledger import read_ledger
from selection.run.metrics import read_metrics
from selection.run.model_folder import check_base, check_weights, model_fingerprint, model_path
from selection.scores.coresets import read_coreset
from selection.scores.models import load_for_scoring, parameters_of


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that hostile code would make; it must not be there at the end."""
    path = tmp_path / "PWNED"
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(PAYLOAD))
    path.unlink()  # so a payload is one
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


def refused(said: str, call, *arguments) -> None:
    with pytest.raises(UserError, match=said):
        call(*arguments)


GOOD = PT.encode(torch.arange(1000))
CHANGED = GOOD.replace(np.arange(1000).tobytes(), np.arange(1, 1001).tobytes())  # beside the checksum of before
LIST, FEATURES, COST = "no plain index list", "cannot read features", b'{"stage": "x", "what": "y", "seconds": %s}'
LIES = (torch.ones(1).long().expand(10**8), torch.empty(2**40, device="meta"))
NAMES = ("split", "dataset_info", "train", "eval", "full", "untuned", ".", "..", ".hidden", "a b")
METRICS = {"rouge-1": 1, "rouge-2": 2, "rouge-l": 3, "bleu-4": 100, "samples": 3, "code_version": "x"}
CHANGES = ({"rouge-l": None}, {"bleu-4": -1}, {"rouge-1": 101}, {"by_sample": {"rouge-l": ["x"]}})
READERS = {  # by a file's name or ending
    "costs.jsonl": lambda path: read_ledger(path.parent),
    "metrics.json": lambda path: read_metrics(path.parent),
    ".npy": lambda path: read_features(path, 2),
    ".json": read_coreset,
    ".pt": read_coreset,
}
# File, good content if any, bad ones, what is said of these.
FILES = [
    ("pickled.pt", None, [pickle.dumps(PAYLOAD), PT.encode(PAYLOAD)], LIST),
    ("pickled.npy", None, [pickle.dumps(PAYLOAD), NPY.encode(np.array([PAYLOAD], dtype=object))], FEATURES),
    ("lies.pt", None, list(map(PT.encode, LIES)), LIST),
    ("changed.pt", GOOD, [CHANGED], "is damaged"),
    ("lies.json", b'{"indices": [1, 2], "size": 2}', [b'{"indices": [1, 2], "size": 3}'], "says size 3"),
    *((f"{name}.json", None, [b'{"indices": [0]}'], "rename it") for name in NAMES),
    ("x.json", None, [b"NaN", b"[1e999]", b'"\\ud800"', b"[" * 100_000, b"", b"\xff"], r"x\.json"),
    ("costs.jsonl", b"", [b"3", b"[" * 100_000, b'{"stage": "x"}'], r"costs\.jsonl"),
    ("costs.jsonl", COST % b"2", [COST % n for n in (b'"a"', b"-1", b"NaN", b"1e999")], r"costs\.jsonl"),
    ("metrics.json", JSON.encode(METRICS), [JSON.encode(METRICS | change) for change in CHANGES], "metrics"),
]


@pytest.mark.parametrize(("name", "good", "bad", "said"), FILES, ids=[name for name, *_ in FILES])
def test_a_file_that_is_damaged_or_lies_is_named_and_runs_nothing(tmp_path, canary, name, good, bad, said):
    path, read = tmp_path / name, READERS.get(name) or READERS[Path(f"x{name}").suffix]
    if good is not None:
        path.write_bytes(good)
        read(path)
    for content in bad:
        path.write_bytes(content)
        refused(said, read, path)


def test_yaml_makes_no_objects_and_no_nine_to_the_ninth_values(make_experiment, rows, canary):
    path, names = make_experiment(rows), itertools.pairwise("abcdefghij")
    path.write_text(f"{path.read_text()[:-1]}, training: !!python/object/apply:os.system [\"touch '{canary}'\"]}}")
    refused("no readable YAML", load_experiment, path)
    bomb = "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in names)
    path.write_text(f'a: &a ["x"]\n{bomb}selection: *j\n')
    refused("write values out instead of aliases", load_experiment, path)


def test_pickled_weights_are_refused(model, adapter, canary):
    (adapter / "made_from.json").write_text(json.dumps({"model": model_fingerprint(model)}))
    check_base(adapter, str(model))
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": PAYLOAD}, adapter / "adapter_model.bin")
    refused("pickled", check_base, adapter, str(model))
    refused("cannot load model", load_for_scoring, str(model), adapter, "fp32")  # nor without that check
    (model / "model.safetensors").rename(model / "other.safetensors")  # transformers would take the .bin beside it
    torch.save({"x": PAYLOAD}, model / "pytorch_model.bin")
    refused(r"pickled.*convert them to safetensors", model_path, str(model))
    refused("cannot load model", load_for_scoring, str(model), None, "fp32")


@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_model_folder_is_not_run(model, canary, known, make_experiment, rows):
    """auto_map names a class in the folder; with a known model_type transformers has a class of its own."""
    classes = "LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T"
    (model / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')\nfrom transformers import {classes}\n")
    auto_map = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    auto_map |= {"AutoTokenizer": ["modeling_evil.T"] * 2}
    edit(model / "config.json", auto_map=auto_map, model_type="llama" if known else "evil")
    tokenizer = "PreTrainedTokenizerFast" if known else "T"
    edit(model / "tokenizer_config.json", auto_map=auto_map, tokenizer_class=tokenizer)
    experiment = load_experiment(make_experiment(rows, target_model=str(model)))
    split = training_split(experiment)
    for call in (
        lambda: parameters_of(str(model)),
        lambda: load_for_scoring(str(model), None, "fp32"),
        lambda: tokenised_rows(experiment, str(model), "train", split.rows),
    ):
        call() if known else refused("model|tokenizer|code", call)
    assert "transformers_modules.model" not in sys.modules


def test_a_script_beside_the_data_is_not_run(tmp_path, canary):
    (tmp_path / "data.jsonl").write_text('{"instruction": "a", "input": "", "output": "b"}\n' * 2)
    for name in ("data.py", "tmp.py", "__init__.py", f"{tmp_path.name}.py"):
        (tmp_path / name).write_text(f"open({str(canary)!r}, 'w')")
    with reading_rows(tmp_path / "data.jsonl", DatasetFormat()) as (found, _):
        assert len(found) == 2


def test_an_adapter_imports_nothing_and_a_model_folder_does_not_lead_to_another(model, adapter):
    edit(adapter / "adapter_config.json", megatron_config={"x": 1}, megatron_core="antigravity")
    refused("megatron_config", check_weights, adapter, "adapter_model")
    edit(model / "config.json", transformers_weights="../outside.safetensors")
    refused("transformers_weights", model_path, str(model))
    edit(model / "config.json", transformers_weights=None)
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    refused("base model", model_path, str(model))
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    for name in ("../outside.safetensors", "/outside.safetensors", "pytorch_model.bin"):
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": name}}))
        refused("of the folder itself", model_path, str(model))


def test_a_run_folder_whose_links_lead_out_is_refused(make_experiment, rows, tmp_path):
    (tmp_path / "disk" / "run" / "data").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")  # which may be a link itself
    path = tmp_path / "run" / "data" / ".lock"
    path.symlink_to(tmp_path / "disk" / "outside")
    refused("link that leads out", load_experiment, make_experiment(rows))
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
    swapped = {"file_name": "train.arrow", "columns": {"prompt": "output", "response": "instruction"}}
    for entry in ({"file_name": "../../other.json"}, {"script_url": "evil"}, swapped):
        edit(experiment.data_folder / "dataset_info.json", train=entry)
        assert labels() == trained


def test_a_message_is_one_line_that_a_terminal_does_not_obey(capsys):
    def main():
        raise UserError("a\n  b \x1b[31m\0 \ud800 \u202e" + "x" * 10_000 + " the end")

    with pytest.raises(SystemExit) as stop:
        run_stage(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert line.startswith("error: a b ") and line.endswith(" the end")
    assert line.isprintable() and len(line) < 700


def test_weights_that_are_missing_are_not_drawn_at_random(model, adapter):
    edit(model / "config.json", num_hidden_layers=5)
    refused(r"no weights for model\.layers\.4", load_for_scoring, str(model), None, "fp32")
    edit(model / "config.json", num_hidden_layers=4)
    load_for_scoring(str(model), adapter, "fp32")
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    refused("missing adapter keys", load_for_scoring, str(model), adapter, "fp32")
    edit(model / "config.json", hidden_size="x")
    refused("model", load_for_scoring, str(model), None, "fp32")


# Kinds that need no model.
_LIGHT = ["experiment", "data.jsonl", "scores.csv", "features.npy", "verification, sealed", "coreset.json", "split"]


def test_the_fuzzer_finds_nothing_but_what_is_broken_on_purpose(tmp_path):
    """One reader is broken: there, and only there, a case fails, and is named as it can be repeated."""
    (tmp_path / "broken.py").write_text("from selection.run import ledger\nledger.UserError = ValueError\n")
    kinds = [f"tests/fuzz.py::test_damage_ends_in_one_line_or_in_a_sound_result[{name}]" for name in ("costs", *_LIGHT)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "broken", "--hypothesis-seed", "0"]
    environment = os.environ | {"FUZZ_CASES": "4", "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    done = subprocess.run([*command, *kinds], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and f"1 failed, {len(_LIGHT)} passed" in done.stdout, done.stdout[-3000:]
    assert re.search(r"FAILED .*\[costs\]", done.stdout) and "found=Damage(" in done.stdout
