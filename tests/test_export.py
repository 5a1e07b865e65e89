"""Exports are what the libraries they are for load and train on: the chosen rows, on the tokens that were scored."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import (
    REPOSITORY,
    assert_one_line_error,
    copy_of,
    everything_in,
    rows_of_llama_factory,
    run_main,
    run_script,
    write_jsonl,
)
from datasets import Dataset, load_dataset, load_from_disk
from safetensors.torch import load_file

from selection.report.annotated import annotated
from selection.report.export import as_chat, coreset_paths, export
from selection.rows.conversation import as_messages
from selection.rows.split import split_numbers, training_split
from selection.rows.tokens import tokenised_rows
from selection.run.config import load_experiment
from selection.run.errors import UserError
from selection.run.products import read_json
from selection.scores.coresets import read_coreset

# What a user would give a tokenizer that has none: ChatML, with the marks that assistant_only_loss needs.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COLUMNS = ("conversations", "system", "tools")
SHAREGPT = {"formatting": "sharegpt", "columns": dict(zip(("messages", *COLUMNS[1:]), COLUMNS, strict=True))}


def conversations() -> list[dict]:
    """10 rows: a system prompt in each second, one to three questions, and one that calls a tool."""
    rows = []
    for row in range(10):
        pairs = [(("human", f"Question {row}.{i}?"), ("gpt", f"Answer {row}.{i}.")) for i in range(row % 3 + 1)]
        turns = [{"from": who, "value": text} for pair in pairs for who, text in pair]
        rows.append({"conversations": turns, "system": f"Rule {row}." if row % 2 else "", "tools": ""})
    call = {"name": "weigh", "arguments": {"thing": "cell"}}
    rows[4]["tools"] = json.dumps([{"name": "weigh", "description": "Weighs.", "parameters": {"properties": {}}}])
    rows[4]["conversations"] = [
        {"from": "human", "value": "How heavy?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "1 ng"},
        {"from": "gpt", "value": "One nanogram."},
    ]
    return rows


def made(experiment, path: Path, folder: Path, said=()) -> SimpleNamespace:
    """An export with what it was made from: the chosen rows, and their tokens as tuning has them."""
    split, chosen = training_split(experiment), read_coreset(path).indices
    tokens = tokenised_rows(experiment, experiment.target_model, "train", split.rows).select(chosen).to_list()
    rows = split.rows.select(chosen).to_list()
    return SimpleNamespace(experiment=experiment, path=path, folder=folder, said=said, rows=rows, tokens=tokens)


@pytest.fixture
def exported(make_experiment, tiny_model, tmp_path):
    """A function that exports a published list."""

    def exported(rows: list[dict], chosen: list[int], model=tiny_model, **changes):
        changes = {"target_model": str(model), "small_model": str(model), "cutoff_len": 1024} | changes
        experiment, path = load_experiment(make_experiment(rows, **changes)), tmp_path / "mine.pt"
        torch.save(chosen, path)
        training_split(experiment)
        return made(experiment, path, tmp_path / "out", export(experiment, path, tmp_path / "out"))

    return exported


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    """The finished run with the export of staff-0.2, made by the script's own main."""
    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selection.report.export._BATCH", 7)  # several batches
        run_main("scripts.export", finished_run.folder, "--coreset", "staff-0.2", "--out", folder)
    return made(finished_run, finished_run.coresets / "staff-0.2.json", folder / "staff-0.2")


@pytest.fixture
def train(tiny_model, tmp_path):
    """A function that takes two steps with TRL's SFTTrainer; returns the rows' input_ids and labels by its collator."""

    def train(rows, template: str | None = None, **keys) -> list[dict]:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.chat_template = template or tokenizer.chat_template
        keys |= {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none"}
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model),
            args=SFTConfig(output_dir=tmp_path / "sft", save_strategy="no", disable_tqdm=True, **keys),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        assert math.isfinite(trainer.train().training_loss) and trainer.state.global_step == 2
        batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
        return [{key: batch[key][0].tolist() for key in ("input_ids", "labels")} for batch in batches]

    return train


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load(kind: str, path: Path) -> Dataset:
    return load_dataset(kind, data_files=str(path), split="train")


def text(tokenizer_folder, tokens: list[int]) -> str:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder).decode([token for token in tokens if token != -100])


def to_end_mark(row: dict, last_response_alone: bool = False) -> dict:
    """LLaMA-Factory's tokens of a row, without the line end behind the last end mark."""
    assert row["input_ids"][-2] == 2  # the tiny tokenizer's end mark
    labels = row["labels"][:-1]
    start = len(labels) - labels[::-1].index(-100) if last_response_alone else 0
    return {"input_ids": row["input_ids"][:-1], "labels": [-100] * start + labels[start:]}


def inputs_and_labels(rows: list[dict]) -> list[dict]:
    return [{key: row[key] for key in ("input_ids", "labels")} for row in rows]


def test_files_hold_every_row_as_it_was_with_what_is_known_of_it_and_the_chosen_rows(run):
    rows, known = read_lines(Path(run.experiment.dataset)), annotated(run.experiment, run.path).to_pylist()
    for kind, name in (("parquet", "annotated.parquet"), ("json", "annotated.jsonl")):
        read = load(kind, run.folder / name).to_list()
        assert len(read) == len(known) == 150
        for line, row, figures in zip(read, rows, known, strict=True):
            ours = {f"staff_{name}": value for name, value in figures.items()}
            assert line == row | ours and list(line) == [*row, *ours]  # ours behind
    chosen = sorted((line for line in read if line["staff_chosen"]), key=lambda line: line["staff_index"])
    assert [{key: line[key] for key in rows[0]} for line in chosen] == run.rows and len(chosen) == 24
    record = read_json(run.folder / "made_from.json")
    assert record["export_of"] == "staff-0.2" and record["template"] == "chatml"
    numbers = [int(line) for line in (run.folder / "indices.txt").read_text().splitlines()]
    assert [rows[number] for number in numbers] == run.rows == load_from_disk(run.folder / "dataset").to_list()


def test_llama_factory_reads_the_exported_rows_anywhere_as_they_were_scored(run, tmp_path):
    moved = shutil.copytree(run.folder / "llamafactory", tmp_path / "elsewhere")
    assert load("parquet", moved / "staff-0.2.parquet").to_list() == run.rows
    theirs = rows_of_llama_factory(run.experiment, moved, "staff-0.2")
    assert inputs_and_labels(theirs) == inputs_and_labels(run.tokens)


def test_llamafactory_cli_tunes_by_the_exported_file_as_the_suite_does(run, tmp_path):
    moved = shutil.copytree(run.folder / "llamafactory", tmp_path / "else where")
    cli = Path(sys.executable).with_name("llamafactory-cli")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "selection" / "rows" / "no_torchaudio")}
    done = subprocess.run([cli, "train", "train.yaml"], cwd=moved, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    experiment = copy_of(run.experiment, tmp_path / "run")
    at = ["--config_path", experiment.record, "--set", f"output_dir={experiment.folder}"]
    run_main("finetune.finetune-select", *at, "--select_path", experiment.coresets / "staff-0.2.json")
    theirs, ours = (
        load_file(each / "adapter_model.safetensors")
        for each in (moved / "tuned", experiment.tuned_target("staff-0.2"))
    )
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_trl_trains_on_prompts_and_on_messages_as_llama_factory_does(run, train):
    rows = load("json", run.folder / "prompt_completion.jsonl")
    trained = train(rows)
    assert trained == [to_end_mark(row) for row in run.tokens]
    for tokens, line, row in zip(trained, rows, run.rows, strict=True):
        assert text(run.experiment.target_model, tokens["labels"]) == row["output"] + "<|im_end|>"
        assert row["instruction"] in line["prompt"]
    chats = load("json", run.folder / "chat.jsonl")
    assert train(chats, CHATML, assistant_only_loss=True) == inputs_and_labels(run.tokens)


def test_conversations_train_on_the_scored_responses(exported, train):
    talks = exported(conversations(), list(range(8)), dataset_format=SHAREGPT)
    pairs = load("json", talks.folder / "prompt_completion.jsonl")
    assert train(pairs) == [to_end_mark(row, last_response_alone=True) for row in talks.tokens]
    several = sum(len(row["conversations"]) > 2 for row in talks.rows)
    assert several and any(f"; {several} of them with earlier responses" in line for line in talks.said)
    chats = load("json", talks.folder / "chat.jsonl")
    without_tools = [number for number, row in enumerate(talks.rows) if not row["tools"]]
    assert len(without_tools) == 7  # chat templates write calls each in their own way
    trained = train(chats.select(without_tools), CHATML, assistant_only_loss=True)
    assert trained == inputs_and_labels([talks.tokens[number] for number in without_tools])
    call = {"type": "function", "function": {"name": "weigh", "arguments": {"thing": "cell"}}}
    (chat,) = (line for line in read_lines(talks.folder / "chat.jsonl") if "tools" in line)
    assert chat["tools"] == json.loads(conversations()[4]["tools"])
    assert chat["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert chat["messages"][2] == {"role": "tool", "content": "1 ng"} and len(chat["messages"]) == 4
    two_calls = {"role": "function", "content": json.dumps([call["function"]] * 2)}
    assert as_chat([two_calls], "")["messages"][0]["tool_calls"] == [call, call]
    read = read_lines(talks.folder / "annotated.jsonl")
    assert [{key: line[key] for key in COLUMNS} for line in read] == conversations()
    assert {line["staff_effort"] for line in read} == {None}  # nothing was scored


def test_each_trainers_lines_in_the_readme_take_the_messages_as_they_are(
    exported, rows, tiny_model, tmp_path, monkeypatch
):
    """TRL's of this environment; unsloth and axolotl are not installed: a stand-in, and the stanza as YAML."""
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = shutil.copytree(tiny_model, tmp_path / "my model")
    (model / "chat_template.jinja").write_text(CHATML)
    relative = os.path.relpath(model, REPOSITORY)  # as configurations count it; the export is used elsewhere
    out, trainers, train = exported(rows, list(range(8)), relative), [], trl.SFTTrainer.train
    readme = (out.folder / "README.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"^(TRL|unsloth|axolotl)\b.*\n\n((?: {4}.*\n|\n)+)", readme, re.M))
    config = partial(trl.SFTConfig, use_cpu=True, bf16=False, max_steps=2, report_to="none", save_strategy="no")
    monkeypatch.setattr(trl, "SFTConfig", config)
    monkeypatch.setattr(trl.SFTTrainer, "train", lambda trainer: trainers.append(trainer) or train(trainer))
    loaders = {"from_pretrained": lambda name, max_seq_length: [a.from_pretrained(name) for a in autos]}
    autos, loaders["get_peft_model"] = (AutoModelForCausalLM, AutoTokenizer), lambda model: model
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=SimpleNamespace(**loaders)))
    monkeypatch.chdir(out.folder)
    for name in ("TRL", "unsloth"):
        exec(textwrap.dedent(blocks[name]), {})
        assert trainers[-1].state.global_step == 2 and trainers[-1].args.max_length == 1024
        batches = [trainers[-1].data_collator([row]) for row in trainers[-1].train_dataset]
        assert [batch["labels"][0].tolist() for batch in batches] == [row["labels"] for row in out.tokens]
    stanza = {"path": "chat.parquet", "ds_type": "parquet", "type": "chat_template"}
    axolotl = {"base_model": str(model), "sequence_len": 1024, "datasets": [stanza]}
    assert yaml.safe_load(blocks["axolotl"]) == axolotl


def test_messages_hold_no_empty_field(exported, run, tmp_path):
    table = load("parquet", run.folder / "chat.parquet")
    assert table.to_list() == read_lines(run.folder / "chat.jsonl") and len(table) == len(run.rows)
    talks = exported(conversations(), list(range(8)), dataset_format=SHAREGPT)  # Arrow would fill in what they lack
    assert not (talks.folder / "chat.parquet").exists()
    assert any("no Parquet, as 1 of them have tools" in line for line in talks.said)
    readme = (talks.folder / "README.md").read_text(encoding="utf-8")
    assert readme.count('load_dataset("json", data_files="chat.jsonl"') == 2 and "ds_type: json" in readme
    assert ": null" not in (talks.folder / "chat.jsonl").read_text() + (run.folder / "chat.jsonl").read_text()


def test_messages_are_llama_factorys_own():
    alpaca = {"columns": {"prompt": "ask", "query": "more", "response": "say", "history": "past", "system": "rule"}}
    row = {"ask": "a", "more": "b", "say": "c", "past": [["x", "y"]], "rule": "r"}
    texts = [("system", "r"), ("user", "x"), ("assistant", "y"), ("user", "a\nb"), ("assistant", "c")]
    assert as_messages(row, alpaca) == [{"role": role, "content": said} for role, said in texts]
    assert len(as_messages(row | {"rule": None, "past": None}, alpaca)) == 2
    for broken in ({"say": " "}, {"say": 3}):
        with pytest.raises(UserError, match="no prompt and text response"):
            as_messages(row | broken, alpaca)
    with pytest.raises(UserError, match="no column 'rule'"):
        as_messages({key: value for key, value in row.items() if key != "rule"}, alpaca)


def test_a_tokenizers_own_first_mark_is_not_doubled(exported, rows, tiny_model, tmp_path):
    """As Llama's and Gemma's tokenizers put one in front of every text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    model = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    mark = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{mark[0]} $A", special_tokens=[mark])
    tokenizer.save_pretrained(model)
    out = exported(rows, [0, 3, 7], model, template="llama2")  # writes that mark, and a bare end mark
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = read_lines(out.folder / "prompt_completion.jsonl")
    for line, row, wanted in zip(lines, out.rows, out.tokens, strict=True):
        assert tokenizer(line["prompt"] + line["completion"])["input_ids"] == wanted["input_ids"]
        assert line["prompt"].startswith("[INST]") and line["completion"].strip() == row["output"] + "<|im_end|>"
    assert not any("otherwise" in line for line in out.said)
    other = exported(rows, [0, 3, 7], model, template="empty", output_dir=str(tmp_path / "other" / "run"))
    assert any("; 3 of them the tokenizer cuts otherwise" in line for line in other.said)  # without the mark


def test_an_end_mark_that_only_the_last_turn_gets_is_added(exported, rows, tiny_model):
    out = exported(rows, [0, 3], template="bailing")  # efficient_eos
    lines = read_lines(out.folder / "prompt_completion.jsonl")
    for line, row, wanted in zip(lines, out.rows, out.tokens, strict=True):
        assert line["completion"] == row["output"] + "<|im_end|>"
        assert line["prompt"] + line["completion"] == text(tiny_model, wanted["input_ids"])


def test_figures_that_are_no_numbers_go_out_as_null_and_a_column_of_ours_is_refused(exported, rows, tmp_path):
    rows = [row | {"weight": math.nan if number == 2 else 0.5} for number, row in enumerate(rows)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    out = exported([], [0], dataset=str(tmp_path / "rows.parquet"), max_samples=20)
    weights = [line["weight"] for line in read_lines(out.folder / "annotated.jsonl")]
    assert weights == [0.5] * 2 + [None] + [0.5] * 17
    with pytest.raises(UserError, match="column staff_effort already"):
        exported([row | {"staff_effort": 1.0} for row in rows], [0], output_dir=str(tmp_path / "other" / "run"))


def test_rows_that_were_cut_are_marked_and_what_cuts_them_alike_is_said(make_experiment, tiny_model, tmp_path, train):
    words = {name: " ".join(f"{name}{number}" for number in range(20)) for name in "ab"}
    asked = [("q", "x"), ("q", words["a"]), (words["b"], words["a"]), ("q", "y")] * 4
    rows = [{"instruction": f"{i} {prompt}", "input": "", "output": answer} for i, (prompt, answer) in enumerate(asked)]
    experiment = load_experiment(make_experiment(rows, cutoff_len=40))
    split = training_split(experiment)
    tokenised_rows(experiment, experiment.small_model, "train", split.rows)
    chosen, path = [row for row in range(len(split.rows)) if row % 4 < 3], tmp_path / "mine.pt"
    torch.save(chosen, path)
    out = made(experiment, path, tmp_path / "out", export(experiment, path, tmp_path / "out"))
    longer = [len(row["output"]) > 9 for row in out.rows]
    text = (out.folder / "README.md").read_text()
    assert f"cutoff_len 40: {sum(longer)} of {len(longer)} rows are longer" in text and "max_length=40" in text
    assert 0 < sum(longer) < len(longer) and all(f"- {line}\n" in text for line in out.said)
    lines = [line for line in read_lines(out.folder / "annotated.jsonl") if line["staff_split"] == "train"]
    assert all(line["staff_cut"] == (len(line["output"]) > 9) for line in lines)
    trained = train(load("json", out.folder / "prompt_completion.jsonl"), max_length=40)
    for row, tokens, ours, cut in zip(out.rows, trained, out.tokens, longer, strict=True):
        if len(row["instruction"]) < 9:
            assert tokens == (inputs_and_labels([ours])[0] if cut else to_end_mark(ours))
        else:  # LLaMA-Factory shortens the prompt too
            assert tokens["input_ids"] != ours["input_ids"]
            assert sum(label >= 0 for label in tokens["labels"]) < sum(label >= 0 for label in ours["labels"])


def test_rows_of_several_files_are_numbered_in_their_own(exported, rows, tmp_path):
    """Also where a bad row is left out."""
    parts = {"first": [*rows[:4], rows[4] | {"output": ""}, *rows[5:9]], "second": conversations()}
    sets = [{"path": write_jsonl(tmp_path / f"{name}.jsonl", part)} for name, part in parts.items()]
    sets[1] |= {"max_samples": 8, "dataset_format": SHAREGPT}
    chosen = list(range(0, 12, 2))
    out = exported([], chosen, dataset=sets, skip_bad_rows=True)
    numbers = split_numbers(out.experiment)["train"][chosen]
    for name, own in (("first", [n for n in numbers if n < 9]), ("second", [n - 9 for n in numbers if n >= 9])):
        assert own and [int(line) for line in (out.folder / f"indices-{name}.txt").read_text().split()] == own
    lines = read_lines(out.folder / "annotated.jsonl")
    assert [line["staff_dataset"] for line in lines] == ["first"] * 8 + ["second"] * 8
    assert [line["staff_row"] for line in lines] == [0, 1, 2, 3, 5, 6, 7, 8, *range(8)]
    theirs = rows_of_llama_factory(out.experiment, out.folder / "llamafactory", "mine")
    assert theirs["input_ids"] == [row["input_ids"] for row in out.tokens]


def test_a_second_export_replaces_the_first_and_nothing_else(exported, rows, tmp_path, monkeypatch):
    out = exported(rows, [0, 1])
    (out.folder / "of the first").touch()
    torch.save([2, 3, 4], out.path)
    with monkeypatch.context() as patch:  # killed while it removes the first, the next call would refuse what is left
        remove, removed = shutil.rmtree, []
        patch.setattr(shutil, "rmtree", lambda path, *more, **keys: removed.append(path) or remove(path, *more, **keys))
        export(out.experiment, out.path, out.folder)
    assert out.folder not in removed
    assert len(read_lines(out.folder / "chat.jsonl")) == 3 and not (out.folder / "of the first").exists()
    before, around = everything_in(out.folder), set(tmp_path.iterdir())
    broken = out.experiment.model_copy(update={"template": "no such"})
    for chosen, experiment, said in (([999], out.experiment, "outside the training split"), ([2], broken, "no such")):
        torch.save(chosen, out.path)
        with pytest.raises(UserError, match=said):
            export(experiment, out.path, out.folder)
    monkeypatch.delattr("selection.run.products.write_sealed")  # the very last file
    with pytest.raises(NameError):
        export(out.experiment, out.path, out.folder)
    assert everything_in(out.folder) == before and set(tmp_path.iterdir()) == around
    (tmp_path / "theirs").mkdir()
    with pytest.raises(UserError, match="no export of mine"):
        export(out.experiment, out.path, tmp_path / "theirs")


def test_coresets_are_found_by_name_or_path(run):
    names = ["random-0.2", "random-0.5", "staff-0.2", "staff-0.5"]
    assert [path.stem for path in coreset_paths(run.experiment, [])] == names
    assert coreset_paths(run.experiment, ["staff-0.2", "some/list.pt"]) == [run.path, Path("some/list.pt")]
    done = run_script("scripts/export.py", run.experiment.folder, "--coreset", "staff-0.7", check=False)
    assert_one_line_error(done, f"has no coreset staff-0.7; there: {', '.join(names)}")


def test_check_exports_says_in_one_line_what_it_lacks(tmp_path, monkeypatch):
    """Of a copy, so that no environment of the repository is touched; nothing is installed."""
    for part in ("scripts/check_exports.sh", "requirements.txt"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / part, tmp_path / part)
    monkeypatch.setenv("PYTHON", "false")  # an interpreter that cannot make an environment
    script = tmp_path / "scripts" / "check_exports.sh"
    assert_one_line_error(
        run_script(script, check=False), "trl==1.16.0", "torch==", "cannot be installed: runs/trl.log"
    )
    assert (tmp_path / "runs" / "trl.log").exists() and not (tmp_path / "runs" / "trl").exists()
    assert_one_line_error(run_script(script, tmp_path, check=False), f"{tmp_path} is no export")
    assert "[EXPORT_FOLDER]" in run_script(script, "--help").stdout
