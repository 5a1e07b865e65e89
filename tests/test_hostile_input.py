"""Files from strangers: none of their code runs, nothing is written elsewhere, and what is wrong is said in one line.

tests/fuzz.py looks for more at random; what it found stands here.
"""

import csv
import itertools
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, run_script
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from scripts.paper.cells import read_cells
from selection.coreset import read_features
from selection.rows.read import reading_rows
from selection.rows.split import training_split
from selection.rows.tokens import tokenised_rows
from selection.run.cli import run_stage
from selection.run.config import DatasetFormat, load_experiment
from selection.run.errors import UserError
from selection.run.ledger import Cost, read_ledger, summarise
from selection.run.metrics import read_metrics
from selection.run.model_folder import check_base, check_weights, model_path
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


def edit(path: Path, **changes) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model, to be spoilt."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def adapter(model, tmp_path) -> Path:
    """A LoRA of `model`."""
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2, target_modules=["v_proj"]))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    lora.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# No code runs


def test_a_payload_is_one(tmp_path):
    """What the tests below rely on."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "made")))
    assert (tmp_path / "made").exists()


def test_a_pickled_index_list_runs_nothing(tmp_path, canary):
    torch.save(Payload(canary), tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(canary)))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(UserError, match="no plain index list"):
            read_coreset(tmp_path / name)


def test_features_are_never_unpickled(tmp_path, canary):
    np.save(tmp_path / "f.npy", np.array([Payload(canary)], dtype=object), allow_pickle=True)
    (tmp_path / "g.npy").write_bytes(pickle.dumps(Payload(canary)))
    for name in ("f.npy", "g.npy"):
        with pytest.raises(UserError, match="cannot read features"):
            read_features(tmp_path / name, 1)


@pytest.mark.parametrize("key", ["dataset", "training"])
def test_yaml_makes_no_objects(make_experiment, rows, canary, key):
    path = make_experiment(rows)
    text = path.read_text()
    path.write_text(f"{text[:-1]}, {key}: !!python/object/apply:os.system [\"touch '{canary}'\"]}}")
    with pytest.raises(UserError, match="no readable YAML"):
        load_experiment(path)


def test_pickled_weights_are_refused(model, adapter, canary):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": Payload(canary)}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled"):
        check_weights(adapter, "adapter_model")
    with pytest.raises(UserError, match="cannot load model"):  # and if that check is left out, nothing runs
        load_for_scoring(str(model), adapter, "fp32")
    (model / "model.safetensors").rename(model / "other.safetensors")  # transformers would take the .bin beside it
    torch.save({"x": Payload(canary)}, model / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled.*convert them to safetensors"):
        model_path(str(model))
    with pytest.raises(UserError, match="cannot load model"):
        load_for_scoring(str(model), None, "fp32")


def test_a_tuned_folder_with_pickled_weights_is_refused(model, adapter, make_experiment, rows):
    from selection.run.model_folder import model_fingerprint

    (adapter / "made_from.json").write_text(json.dumps({"model": model_fingerprint(model)}))
    check_base(adapter, str(model))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled"):
        check_base(adapter, str(model))


@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_model_folder_is_not_run(model, canary, known, make_experiment, rows):
    """auto_map names a class in the folder; with a known model_type transformers has a class of its own."""
    (model / "modeling_evil.py").write_text(
        f"open({str(canary)!r}, 'w')\n"
        "from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T\n"
    )
    names = {"AutoConfig": "C", "AutoModelForCausalLM": "M", "AutoTokenizer": ["T", "T"]}
    names |= {} if known else {"AutoProcessor": "T"}
    auto_map = {
        k: [f"modeling_evil.{c}" for c in v] if isinstance(v, list) else f"modeling_evil.{v}" for k, v in names.items()
    }
    edit(model / "config.json", auto_map=auto_map, **({} if known else {"model_type": "evil"}))
    edit(
        model / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="PreTrainedTokenizerFast" if known else "T"
    )
    if not known:
        (model / "processor_config.json").write_text(json.dumps({"auto_map": auto_map, "processor_class": "T"}))
    experiment = load_experiment(make_experiment(rows, target_model=str(model)))
    split = training_split(experiment)
    calls = [
        lambda: parameters_of(str(model)),
        lambda: load_for_scoring(str(model), None, "fp32"),
        lambda: tokenised_rows(experiment, str(model), "train", split.rows),
    ]
    for call in calls:
        if known:
            call()
        else:
            with pytest.raises(UserError):
                call()
    assert "transformers_modules.model" not in sys.modules


def test_a_script_beside_the_data_is_not_run(tmp_path, canary):
    data = tmp_path / "data.jsonl"
    data.write_text('{"instruction": "a", "input": "", "output": "b"}\n' * 2)
    for name in ("data.py", "tmp.py", "__init__.py", f"{tmp_path.name}.py"):
        (tmp_path / name).write_text(f"open({str(canary)!r}, 'w')")
    with reading_rows(data, DatasetFormat()) as found:
        assert len(found) == 2


def test_an_adapter_imports_nothing(adapter):
    edit(adapter / "adapter_config.json", megatron_config={"x": 1}, megatron_core="antigravity")
    with pytest.raises(UserError, match="megatron_config"):
        check_weights(adapter, "adapter_model")


# Nothing but the named folders


def test_weights_lie_in_the_models_own_folder(model):
    tensors = model / "model.safetensors"
    tensors.rename(model.parent / "outside.safetensors")
    for name in ("../outside.safetensors", "/outside.safetensors", "pytorch_model.bin"):
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": name}}))
        with pytest.raises(UserError, match="of the folder itself"):
            model_path(str(model))


def test_a_model_folder_does_not_lead_to_another(model):
    edit(model / "config.json", transformers_weights="../outside.safetensors")
    with pytest.raises(UserError, match="transformers_weights"):
        model_path(str(model))
    edit(model / "config.json", transformers_weights=None)
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(UserError, match="base model"):
        model_path(str(model))


@pytest.mark.parametrize(
    "name", ["split", "dataset_info", "train", "eval", "full", "untuned", ".", "..", ".hidden", "a b"]
)
def test_a_coresets_name_stays_in_its_place(tmp_path, name):
    path = tmp_path / f"{name}.json"
    path.write_text('{"indices": [0]}')
    with pytest.raises(UserError, match="rename it"):
        read_coreset(path)


@pytest.mark.parametrize("link", ["data", "data/.lock", "costs.jsonl", "scores"])
def test_a_run_folder_whose_links_lead_out_is_refused(make_experiment, rows, tmp_path, link):
    (tmp_path / "outside").mkdir()
    path = tmp_path / "run" / link
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(tmp_path / "outside" if "." not in link else tmp_path / "outside" / "file")
    with pytest.raises(UserError, match="link that leads out"):
        load_experiment(make_experiment(rows))
    path.unlink()
    (tmp_path / "run" / "inside").write_text("x")
    path.symlink_to(tmp_path / "run" / "inside")
    load_experiment(make_experiment(rows))


def test_a_run_folder_may_be_a_link_itself(make_experiment, rows, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "latest").symlink_to("disk")
    load_experiment(make_experiment(rows))


@pytest.mark.parametrize("key", ["cache_dir", "push_to_hub", "adapter_folder", "logging_dir", "trust_remote_code"])
def test_training_keys_that_reach_out_are_refused(make_experiment, rows, key):
    with pytest.raises(UserError, match=f"{key} cannot be given"):
        load_experiment(make_experiment(rows, training={key: "x"}))


@pytest.mark.parametrize(
    "entry",
    [
        {"file_name": "../../other.json"},
        {"file_name": "train.arrow", "num_samples": 24},
        {"script_url": "evil"},
        {"hf_hub_url": "someone/evil"},
        {"file_name": "train.arrow", "columns": {"prompt": "output", "response": "instruction"}},
    ],
    ids=["file", "order", "script", "hub", "columns"],
)
def test_dataset_info_of_a_stranger_changes_nothing(make_experiment, rows, tmp_path, tiny_model, entry, canary):
    experiment = load_experiment(make_experiment(rows))
    split = training_split(experiment)
    trained = tokenised_rows(experiment, str(tiny_model), "train", split.rows)[:]
    others = [row | {"output": "poison"} for row in split.rows]
    (tmp_path / "other.json").write_text(json.dumps(others))
    (experiment.data_folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    info = experiment.data_folder / "dataset_info.json"
    edit(info, train=entry)
    split = training_split(experiment)  # as every stage begins
    again = tokenised_rows(experiment, str(tiny_model), "train", split.rows)[:]
    assert again["labels"] == trained["labels"]


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
    path = make_experiment(rows)
    bomb = 'a: &a ["x"]\n' + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghij")
    )
    path.write_text(f"{bomb}selection: *j\n")
    with pytest.raises(UserError, match="line 2: write the value out"):
        load_experiment(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("selection", {"seed": 2**64}), ("split_seed", 2**32), ("training", {"num_train_epochs": "many"})]
    + [("target_training", {"num_train_epochs": bad}) for bad in (None, -1, True, float("inf"), [])],
)
def test_values_that_would_fail_much_later_are_refused(make_experiment, rows, key, value):
    with pytest.raises(UserError, match=f"key {key}"):
        load_experiment(make_experiment(rows, **{key: value}))


def test_a_name_too_long_for_the_file_system_is_refused(make_experiment, rows):
    for key in ("output_dir", "dataset", "target_model"):
        experiment = None
        with pytest.raises(UserError, match="path"):
            experiment = load_experiment(make_experiment(rows, **{key: "x" * 300}))
            training_split(experiment)
            model_path(experiment.target_model)


@pytest.mark.parametrize(
    "text", ["NaN", "[Infinity]", "[1e999]", "-1e400", '{"a": -Infinity}', '"\\ud800"', "[" * 100_000, "", "\xff"]
)
def test_json_that_is_none(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="no readable JSON"):
        read_json(path)


def test_json_keeps_whole_characters(tmp_path):
    (tmp_path / "x.json").write_text('["\\ud83d\\ude00", "é", "\\\\ud"]')
    assert read_json(tmp_path / "x.json") == ["😀", "é", "\\ud"]


@pytest.mark.parametrize("record", ["[]", "3", "{}", '{"made_from": 1}', '{"made_from": {}, "fingerprint": 1}'])
def test_a_damaged_split_is_named(make_experiment, rows, record):
    experiment = load_experiment(make_experiment(rows))
    training_split(experiment)
    (experiment.data_folder / "split.json").write_text(record)
    with pytest.raises(UserError, match=r"split\.json is damaged"):
        training_split(experiment)


def test_a_damaged_made_from_is_named(tmp_path, tiny_model):
    for text, said in (("[]", "is damaged"), ("{}", "from another model")):
        (tmp_path / "made_from.json").write_text(text)
        with pytest.raises(UserError, match=said):
            check_base(tmp_path, str(tiny_model))


@pytest.mark.parametrize(
    "line",
    [
        '{"stage": "x"}',
        '{"stage": "x", "what": "y", "seconds": "a"}',
        '{"stage": "x", "what": "y", "seconds": -1}',
        '{"stage": "x", "what": "y", "seconds": NaN}',
        '{"stage": "x", "what": "y", "seconds": 1e999}',
        "3",
        "[" * 100_000,
    ],
)
def test_a_damaged_ledger_is_named(tmp_path, line):
    path = tmp_path / "costs.jsonl"
    path.write_text('{"stage": "a", "what": "b", "seconds": 2}\n')
    assert read_ledger(tmp_path) == [Cost("a", "b", seconds=2.0)]
    with path.open("a") as file:
        file.write(line)
    with pytest.raises(UserError, match=r"costs\.jsonl"):
        read_ledger(tmp_path)


@pytest.mark.parametrize("draft", ["[]", '{"cost": 3}', '{"cost": {"tokens": 1}}', '{"cost": {"seconds": "x"}}'])
def test_a_damaged_draft_is_named(make_experiment, rows, tmp_path, draft):
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "draft.json").write_text(draft)
    experiment = load_experiment(make_experiment(rows, small_model=str(tmp_path / "cut")))
    experiment.folder.mkdir(exist_ok=True)
    (experiment.folder / "costs.jsonl").write_text('{"stage": "a", "what": "b"}\n')
    with pytest.raises(UserError, match=r"draft\.json is damaged"):
        summarise(experiment)


def test_damaged_metrics_are_named(tmp_path):
    good = {"rouge-1": 1, "rouge-2": 2, "rouge-l": 3, "bleu-4": 100, "samples": 3, "code_version": "x"}
    (tmp_path / "metrics.json").write_text(json.dumps(good))
    assert read_metrics(tmp_path)["bleu-4"] == 100
    for change in ({"rouge-l": None}, {"bleu-4": -1}, {"rouge-1": 101}, {"by_sample": {"rouge-l": ["x"]}}):
        (tmp_path / "metrics.json").write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=r"metrics\.json is damaged"):
            read_metrics(tmp_path)


def test_cells_with_too_many_or_few_fields_are_refused(tmp_path):
    source = REPOSITORY / "data" / "results" / "smollm2_cpu" / "cells.csv"
    header, first, *_ = source.read_text().splitlines()
    path = tmp_path / "cells.csv"
    for row in (first + ",x", first.rsplit(",", 2)[0]):
        path.write_text(f"{header}\n{row}\n")
        with pytest.raises(UserError, match="more or fewer fields"):
            read_cells(path)


@pytest.mark.parametrize("shape", ["(1000000000000, 3)", "(" * 300, "(2, 3", "(-1, 3)"])
def test_features_with_a_lying_header_are_refused(tmp_path, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(400) + "\n"
    content = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 24
    (tmp_path / "f.npy").write_bytes(content)
    with pytest.raises(UserError, match="cannot read features"):
        read_features(tmp_path / "f.npy", 2)


def test_csv_words_that_mean_nothing_elsewhere_are_words_here(tmp_path):
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["instruction", "input", "output"], ["null", "NA", "None"], ["a", "", "nan"]])
    with reading_rows(tmp_path / "d.csv", DatasetFormat()) as found:
        rows = list(found)
    assert [list(row.values()) for row in rows] == [["null", "NA", "None"], ["a", "", "nan"]]


# No wrong result


def test_an_index_list_that_is_damaged_or_lies_is_refused(tmp_path):
    path = tmp_path / "rows.pt"
    torch.save(torch.arange(1000), path)
    assert len(read_coreset(path).indices) == 1000
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        numbers = next(entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
    data[numbers.header_offset + 1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        read_coreset(path)
    for lie in (torch.ones(1, dtype=torch.int64).expand(10**8), torch.empty(2**40, dtype=torch.int64, device="meta")):
        torch.save(lie, path)
        with pytest.raises(UserError, match="no plain index list"):
            read_coreset(path)


def test_a_coreset_with_another_size_than_it_says_is_refused(tmp_path):
    (tmp_path / "c.json").write_text('{"indices": [1, 2], "size": 3}')
    with pytest.raises(UserError, match="says size 3"):
        read_coreset(tmp_path / "c.json")


def test_weights_that_are_missing_are_not_drawn_at_random(model, adapter):
    edit(model / "config.json", num_hidden_layers=5)
    with pytest.raises(UserError, match=r"no weights for model\.layers\.4"):
        load_for_scoring(str(model), None, "fp32")
    edit(model / "config.json", num_hidden_layers=4)
    load_for_scoring(str(model), adapter, "fp32")
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="missing adapter keys"):
        load_for_scoring(str(model), adapter, "fp32")


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", "x"), ("rope_parameters", 3), ("hidden_act", []), ("vocab_size", 7)]
)
def test_a_damaged_configuration_is_refused_in_one_line(model, key, value):
    edit(model / "config.json", **{key: value})
    with pytest.raises(UserError, match="model"):
        load_for_scoring(str(model), None, "fp32")


# A few cases of each kind that needs no tuned model

_LIGHT = ["experiment", "grid", "data.jsonl", "scores.csv", "scores.parquet", "features.npy", "verification"]
_LIGHT += ["coreset.json", "coreset.pt", "draft", "cells", "split", "split's rows"]


def test_the_fuzz_script_finds_nothing_but_what_was_broken_on_purpose(tmp_path):
    """One reader is broken: there, and only there, cases fail, and each is named as it can be repeated."""
    (tmp_path / "broken.py").write_text(
        "import json, runpy, sys\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from selection.run import ledger\n"
        "def read(folder):\n"
        "    return [ledger.Cost(**json.loads(line)) for line in ledger.ledger_path(folder).open()]\n"
        "ledger.read_ledger = read\n"
        f"runpy.run_path({str(REPOSITORY / 'tests' / 'fuzz.py')!r}, run_name='__main__')\n"
    )
    arguments = ["--count", 8, "--workers", 1, "--kind", "costs", *_LIGHT]
    done = run_script(tmp_path / "broken.py", *arguments, cwd=REPOSITORY, check=False)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    table = [line for line in done.stdout.splitlines()[1:] if not line.startswith("failed: ")]
    counts = {line[:22].strip(): list(map(int, line[22:].split()[:4])) for line in table}
    assert counts.pop("in all")[0] == 8 * len(counts)
    broken = counts.pop("costs")
    assert broken[3] > 0 and all(failed == 0 for *_, failed in counts.values()), done.stdout
    assert sorted(counts) == sorted(_LIGHT) and sum(refused for _, _, refused, _ in counts.values()) > 15
    named = [line for line in done.stdout.splitlines() if line.startswith("failed: --kind 'costs' --seed 0 --case ")]
    assert len(named) == broken[3]
