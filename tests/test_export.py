"""Exports are what the libraries they are for load and train on: the chosen rows, on the tokens that were scored."""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from datasets import Dataset, load_dataset, load_from_disk
from test_rows import tokens_of_llama_factory

from selection.report.annotated import annotated
from selection.report.export import as_chat, coreset_paths, export
from selection.rows.conversation import as_messages, tools_of
from selection.rows.split import rows_of, split_numbers, training_split
from selection.rows.tokens import tokenised_rows
from selection.run.cli import run_stage
from selection.run.config import load_experiment
from selection.run.errors import UserError
from selection.run.products import read_json
from selection.scores.coresets import read_coreset

IM_END = 2  # the tiny tokenizer's end mark
# What a user would give a tokenizer that has none: ChatML, with the marks that assistant_only_loss needs.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAREGPT = {
    "formatting": "sharegpt",
    "columns": {"messages": "conversations", "system": "system", "tools": "tools"},
}


def biology() -> list[dict]:
    """30 rows; `about` is not trained on."""
    lines = (REPOSITORY / "data" / "go_biology.jsonl").read_text(encoding="utf-8").splitlines()[:30]
    return [json.loads(line) | {"about": {"number": number}} for number, line in enumerate(lines)]


def conversations() -> list[dict]:
    """10 rows: a system prompt in each second, one to three questions, and one that calls a tool."""

    def turns(row: int) -> list[dict]:
        pairs = [(f"Question {row}.{turn}?", f"Answer {row}.{turn}.") for turn in range(row % 3 + 1)]
        return [
            {"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)
        ]

    rows = [
        {"conversations": turns(row), "system": f"Rule {row}." if row % 2 else "", "tools": ""} for row in range(10)
    ]
    call = {"name": "weigh", "arguments": {"thing": "cell"}}
    rows[4]["tools"] = json.dumps([{"name": "weigh", "description": "Weighs.", "parameters": {"properties": {}}}])
    rows[4]["conversations"] = [
        {"from": "human", "value": "How heavy?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "1 ng"},
        {"from": "gpt", "value": "One nanogram."},
    ]
    return rows


def write_experiment(folder, model, rows, ending: str = "jsonl", **changes):
    folder.mkdir(exist_ok=True)
    data, path = folder / f"data.{ending}", folder / "given.yaml"
    if ending == "jsonl":
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        Dataset.from_list(rows).to_parquet(data)
    keys = {
        "output_dir": str(folder / "run"),
        "small_model": str(model),
        "target_model": str(model),
        "template": "chatml",
        "dataset": str(data),
        "eval_size": 0.2,
        "precision": "fp32",
        "selection": {"rates": [0.5], "num_strata": 3, "verify_per_stratum": 2, "precision": "fp32", "self_test": 0},
        "small_training": {"num_train_epochs": 0},
    }
    path.write_text(json.dumps(keys | changes), encoding="utf-8")
    return path


def exported(folder, model, rows, chosen: list[int], **changes):
    """An export of a published list, with all it was made from."""
    experiment = load_experiment(write_experiment(folder, model, rows, **changes))
    torch.save(chosen, folder / "mine.pt")
    training_split(experiment)
    said = export(experiment, folder / "mine.pt", folder / "out")
    return SimpleNamespace(experiment=experiment, path=folder / "mine.pt", folder=folder / "out", said=said)


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A run folder as the stages leave it, with the export of staff-0.5 made by the script's own main."""
    folder = tmp_path_factory.mktemp("export")
    path = write_experiment(folder, tiny_model, biology())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", sys.path.copy())  # the scripts change it
        for stage in ("selection.effort_score", "selection.verify", "selection.coreset"):
            patch.setattr(sys, "argv", [stage, "--config_path", str(path)])
            importlib.import_module(stage).main()
        patch.setattr("selection.report.export._BATCH", 7)  # several batches
        patch.setattr(sys, "argv", ["export.py", str(folder / "run"), "--coreset", "staff-0.5"])
        importlib.import_module("scripts.export").main()
    experiment = load_experiment(path)
    coreset = experiment.coresets / "staff-0.5.json"
    split = training_split(experiment)
    rows = split.rows.select(read_coreset(coreset).indices)
    tokens = tokenised_rows(experiment, str(tiny_model), "train", split.rows)
    return SimpleNamespace(
        experiment=experiment,
        coreset=coreset,
        folder=experiment.folder / "export" / "staff-0.5",
        rows=rows.to_list(),
        tokens=tokens.select(read_coreset(coreset).indices).to_list(),
    )


@pytest.fixture(scope="module")
def talks(tiny_model, tmp_path_factory):
    """A published list of every training row of the conversations."""
    return exported(
        tmp_path_factory.mktemp("talks"), tiny_model, conversations(), list(range(8)), dataset_format=SHAREGPT
    )


@pytest.fixture
def train(tiny_model, tmp_path):
    """A function that takes two steps with TRL's SFTTrainer; returns what it trained on: input_ids, labels, row by row.

    Labels are those of the trainer's own collator.
    """

    def train(rows, template: str | None = None, formatting_func=None, steps: int = 2, **keys) -> list[dict]:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.chat_template = template or tokenizer.chat_template
        keys |= {"max_steps": steps, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none"}
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model),
            args=SFTConfig(output_dir=tmp_path / "sft", save_strategy="no", disable_tqdm=True, **keys),
            train_dataset=rows,
            processing_class=tokenizer,
            formatting_func=formatting_func,
        )
        if steps:
            assert math.isfinite(trainer.train().training_loss) and trainer.state.global_step == steps
        batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
        return [{key: batch[key][0].tolist() for key in ("input_ids", "labels")} for batch in batches]

    return train


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def text(tokenizer_folder, tokens: list[int]) -> str:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder).decode(tokens)


def to_end_mark(row: dict, last_response_alone: bool = False) -> dict:
    """LLaMA-Factory's tokens of a row, without the line end behind the last end mark."""
    assert row["input_ids"][-2] == IM_END
    labels = row["labels"][:-1]
    if last_response_alone:
        start = len(labels) - labels[::-1].index(-100)
        labels = [-100] * start + labels[start:]
    return {"input_ids": row["input_ids"][:-1], "labels": labels}


def test_annotated_files_hold_every_row_as_it_was_and_what_is_known_of_it(run):
    rows, known = biology(), annotated(run.experiment, run.coreset).to_pylist()
    for kind, name in (("parquet", "annotated.parquet"), ("json", "annotated.jsonl")):
        read = load_dataset(kind, data_files=str(run.folder / name), split="train").to_list()
        assert len(read) == len(known) == 30
        for line, row, figures in zip(read, rows, known, strict=True):
            ours = {f"staff_{name}": value for name, value in figures.items()}
            assert line == row | ours
            assert list(line) == [*row, *ours]  # ours behind
    held_out = [line for line in read if line["staff_split"] == "eval"]
    assert len(held_out) == 6 and {line["staff_reason"] for line in held_out} == {"held out for evaluation"}
    chosen = sorted((line for line in read if line["staff_chosen"]), key=lambda line: line["staff_index"])
    assert [{key: line[key] for key in rows[0]} for line in chosen] == run.rows
    assert len(run.rows) == 12


def test_numbers_and_folder_give_the_chosen_rows(run):
    data = load_dataset("json", data_files=run.experiment.dataset, split="train")
    numbers = [int(line) for line in (run.folder / "indices.txt").read_text().splitlines()]
    assert data.select(numbers).to_list() == run.rows == load_from_disk(run.folder / "dataset").to_list()


def test_llama_factory_trains_on_the_exported_rows_anywhere(run, tmp_path):
    moved = shutil.copytree(run.folder / "llamafactory", tmp_path / "elsewhere")
    assert read_lines(moved / "staff-0.5.jsonl") == run.rows
    keys = {
        "stage": "sft", "do_train": True, "model_name_or_path": run.experiment.target_model, "template": "chatml",
        "dataset_dir": moved, "dataset": "staff-0.5", "output_dir": tmp_path / "tuned", "max_steps": 2,
        "per_device_train_batch_size": 4, "finetuning_type": "lora", "lora_target": "all", "report_to": "none",
        "use_cpu": True, "overwrite_cache": True,
    }  # fmt: skip
    cli = Path(sys.executable).with_name("llamafactory-cli")
    own = {
        "PYTHONPATH": str(REPOSITORY / "selection" / "rows" / "no_torchaudio"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [cli, "train", *(str(word) for key, value in keys.items() for word in (f"--{key}", value))],
        env=os.environ | own | {"HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = read_json(tmp_path / "tuned" / "trainer_state.json")
    assert state["global_step"] == 2 and state["epoch"] == pytest.approx(2 / 3)  # 3 steps of 4 rows are a pass
    assert math.isfinite(read_json(tmp_path / "tuned/train_results.json")["train_loss"])
    theirs = tokens_of_llama_factory(run.experiment, dataset_dir=str(moved), dataset="staff-0.5")["train_dataset"]
    assert theirs["input_ids"] == [row["input_ids"] for row in run.tokens]
    assert theirs["labels"] == [row["labels"] for row in run.tokens]


def test_trl_trains_on_prompt_and_completion_as_llama_factory_does(run, train):
    rows = load_dataset("json", data_files=str(run.folder / "prompt_completion.jsonl"), split="train")
    trained = train(rows)
    assert trained == [to_end_mark(row) for row in run.tokens]
    for tokens, row in zip(trained, run.rows, strict=True):
        response = text(run.experiment.target_model, [token for token in tokens["labels"] if token != -100])
        assert response == row["output"] + "<|im_end|>"
    assert [row["instruction"] in line["prompt"] for line, row in zip(rows, run.rows, strict=True)] == [True] * 12


def test_trl_trains_on_messages_as_llama_factory_does(run, train):
    rows = load_dataset("json", data_files=str(run.folder / "chat.jsonl"), split="train")
    assert train(rows, CHATML, assistant_only_loss=True) == [
        {"input_ids": row["input_ids"], "labels": row["labels"]} for row in run.tokens
    ]


def test_trl_trains_on_the_folder_of_rows(run, train):
    """Rows in the user's own columns: TRL takes them through a function, or renamed to its own names."""
    rows = load_from_disk(run.folder / "dataset")
    model = run.experiment.target_model
    trained = train(rows, formatting_func=lambda row: f"{row['instruction']}\n{row['output']}")
    texts = [f"{row['instruction']}\n{row['output']}<|im_end|>" for row in run.rows]
    assert [text(model, row["labels"]) for row in trained] == texts
    renamed = rows.rename_columns({"instruction": "prompt", "output": "completion"}).remove_columns(["input"])
    trained = train(renamed, steps=0)
    for tokens, row in zip(trained, run.rows, strict=True):
        assert text(model, tokens["input_ids"]) == row["instruction"] + row["output"] + "<|im_end|>"


def test_conversations_train_on_the_scored_responses(talks, train, tiny_model):
    experiment, rows = talks.experiment, training_split(talks.experiment).rows
    tokens = tokenised_rows(experiment, str(tiny_model), "train", rows).to_list()
    pairs = load_dataset("json", data_files=str(talks.folder / "prompt_completion.jsonl"), split="train")
    assert train(pairs) == [to_end_mark(row, last_response_alone=True) for row in tokens]
    several = sum(len(row["conversations"]) > 2 for row in rows)
    assert several and any(f"; {several} of them with earlier responses" in line for line in talks.said)
    chats = load_dataset("json", data_files=str(talks.folder / "chat.jsonl"), split="train")
    without_tools = [number for number, row in enumerate(rows) if not row["tools"]]
    assert len(without_tools) == 7  # chat templates write calls each in their own way
    assert train(chats.select(without_tools), CHATML, assistant_only_loss=True) == [
        {key: tokens[number][key] for key in ("input_ids", "labels")} for number in without_tools
    ]
    shows_all = "{% for message in messages %}{{ message }}{% endfor %}{{ tools }}"
    shown = [text(tiny_model, row["labels"]) for row in train(chats, shows_all)]
    assert ["'tool_calls': [{'" in row and "Weighs." in row for row in shown].count(True) == 1
    assert sum("None" in row for row in shown) == 7  # the others' tools


def test_tools_and_their_calls_are_as_chat_templates_take_them():
    row = conversations()[4]
    chat = as_chat(as_messages(row, SHAREGPT), tools_of(row, SHAREGPT))
    call = {"type": "function", "function": {"name": "weigh", "arguments": {"thing": "cell"}}}
    assert chat == {
        "messages": [
            {"role": "user", "content": "How heavy?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "1 ng"},
            {"role": "assistant", "content": "One nanogram."},
        ],
        "tools": [{"name": "weigh", "description": "Weighs.", "parameters": {"properties": {}}}],
    }
    row["conversations"][1]["value"] = json.dumps([call["function"], call["function"]])
    assert as_chat(as_messages(row, SHAREGPT), "")["messages"][1]["tool_calls"] == [call, call]


def test_messages_are_llama_factorys_own():
    alpaca = {"columns": {"prompt": "ask", "query": "more", "response": "say", "history": "past", "system": "rule"}}
    row = {"ask": "a", "more": "b", "say": "c", "past": [["x", "y"]], "rule": "r"}
    texts = [("system", "r"), ("user", "x"), ("assistant", "y"), ("user", "a\nb"), ("assistant", "c")]
    assert as_messages(row, alpaca) == [{"role": role, "content": said} for role, said in texts]
    assert len(as_messages(row | {"rule": None, "past": None}, alpaca)) == 2
    for broken, said in (({"say": " "}, "no prompt and text response"), ({"say": 3}, "no prompt and text response")):
        with pytest.raises(UserError, match=said):
            as_messages(row | broken, alpaca)
    with pytest.raises(UserError, match="no column 'rule'"):
        as_messages({key: value for key, value in row.items() if key != "rule"}, alpaca)


def test_a_tokenizers_own_first_mark_is_not_doubled(tiny_model, tmp_path):
    """As Llama's and Gemma's tokenizers put one in front of every text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    model = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    mark = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{mark} $A", special_tokens=[(mark, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(model)
    made = exported(tmp_path, model, biology(), [0, 3, 7], template="llama2")  # writes that mark, and a bare end mark
    rows = training_split(made.experiment).rows.select([0, 3, 7])
    tokens = tokenised_rows(made.experiment, str(model), "train", training_split(made.experiment).rows)
    lines, tokenizer = read_lines(made.folder / "prompt_completion.jsonl"), AutoTokenizer.from_pretrained(model)
    for line, row, wanted in zip(lines, rows, tokens.select([0, 3, 7]), strict=True):
        assert tokenizer(line["prompt"] + line["completion"])["input_ids"] == wanted["input_ids"]
        assert line["prompt"].startswith("[INST]") and line["completion"].strip() == row["output"] + "<|im_end|>"
    assert not any("otherwise" in line for line in made.said)
    # The same tokenizer under a template without the mark cuts every row otherwise.
    other = exported(tmp_path / "other", model, biology(), [0, 3, 7], template="empty")
    assert any("; 3 of them the tokenizer cuts otherwise" in line for line in other.said)


def test_an_end_mark_that_only_the_last_turn_gets(tiny_model, tmp_path):
    """Templates with efficient_eos write none behind a response; tuning adds one."""
    made = exported(tmp_path, tiny_model, biology(), [0, 3], template="bailing")
    split = training_split(made.experiment)
    tokens = tokenised_rows(made.experiment, str(tiny_model), "train", split.rows).select([0, 3])
    for line, row, wanted in zip(
        read_lines(made.folder / "prompt_completion.jsonl"), split.rows.select([0, 3]), tokens, strict=True
    ):
        assert line["completion"] == row["output"] + "<|im_end|>"
        assert line["prompt"] + line["completion"] == text(tiny_model, wanted["input_ids"])


def test_conversational_prompts_would_train_on_the_prompt(train):
    """Why prompt_completion.jsonl is text: where this fails, TRL and transformers fit again, and messages will do."""
    row = {"prompt": [{"role": "user", "content": "Where?"}], "completion": [{"role": "assistant", "content": "Here."}]}
    (trained,) = train(Dataset.from_list([row]), CHATML, steps=0)
    assert trained["labels"].count(-100) == 2


def test_text_of_dates_alone_goes_out_as_parquet(tiny_model, tmp_path):
    rows = [{"instruction": f"When was {i}?", "input": "", "output": f"2020-01-{i + 1:02}"} for i in range(10)]
    made = exported(tmp_path, tiny_model, rows, [1, 2], ending="parquet")
    theirs = tokens_of_llama_factory(made.experiment, dataset_dir=str(made.folder / "llamafactory"), dataset="mine")
    assert len(theirs["train_dataset"]) == 2
    assert sorted(path.name for path in (made.folder / "llamafactory").iterdir()) == [
        "dataset_info.json",
        "mine.parquet",
    ]


def test_a_published_list_has_annotations_without_scores(talks):
    read = read_lines(talks.folder / "annotated.jsonl")
    assert [{key: line[key] for key in ("conversations", "system", "tools")} for line in read] == conversations()
    assert {line["staff_effort"] for line in read} == {None}
    chosen = [line["staff_row"] for line in read if line["staff_chosen"]]
    assert chosen == sorted(split_numbers(talks.experiment)["train"])


def test_figures_that_are_no_numbers_and_rows_left_out(tiny_model, tmp_path):
    rows = [row | {"weight": math.nan if number == 2 else 0.5} for number, row in enumerate(biology())]
    made = exported(tmp_path, tiny_model, rows, [0], ending="parquet", max_samples=20)
    weights = [line["weight"] for line in read_lines(made.folder / "annotated.jsonl")]
    assert len(weights) == 20 and weights[2] is None and set(weights) == {None, 0.5}
    assert any("max_samples left them out: the 10 rows" in line for line in made.said)


@pytest.mark.parametrize("form", ["the same", "two"])
def test_rows_of_several_files_are_numbered_in_their_own(tiny_model, tmp_path, form):
    first = biology()[:9]
    second = conversations() if form == "two" else biology()[9:19]
    sets = []
    for name, rows in (("first", first), ("second", second)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        sets.append({"path": str(path)} | ({"dataset_format": SHAREGPT} if form == "two" and name == "second" else {}))
    sets[1]["max_samples"] = 8
    chosen = list(range(0, 13, 2))
    made = exported(tmp_path, tiny_model, [], chosen, dataset=sets)
    pooled, numbers = [*first, *second[:8]], split_numbers(made.experiment)["train"][chosen]
    in_first, in_second = (
        [int(line) for line in (made.folder / f"indices-{name}.txt").read_text().split()]
        for name in ("first", "second")
    )
    assert in_first == [n for n in numbers if n < 9] and in_second == [n - 9 for n in numbers if n >= 9]
    assert in_first and in_second and not (made.folder / "indices.txt").exists()
    lines = read_lines(made.folder / "annotated.jsonl")
    assert [line["staff_dataset"] for line in lines] == ["first"] * 9 + ["second"] * 8
    assert any(line.endswith("the 2 rows of second after its first 8") for line in made.said)
    if form == "the same":
        assert [{key: line[key] for key in row} for line, row in zip(lines, pooled, strict=True)] == pooled
    theirs = tokens_of_llama_factory(made.experiment, dataset_dir=str(made.folder / "llamafactory"), dataset="mine")
    ours = tokenised_rows(made.experiment, str(tiny_model), "train", training_split(made.experiment).rows)
    assert theirs["train_dataset"]["input_ids"] == ours.select(chosen)["input_ids"]


def test_a_second_export_replaces_the_first_and_nothing_else(tiny_model, tmp_path, monkeypatch):
    made = exported(tmp_path, tiny_model, biology(), [0, 1])
    (made.folder / "of the first").touch()
    torch.save([2, 3, 4], made.path)
    export(made.experiment, made.path, made.folder)
    assert len(read_lines(made.folder / "chat.jsonl")) == 3 and not (made.folder / "of the first").exists()
    before = {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()}
    torch.save([999], made.path)
    with pytest.raises(UserError, match="outside the training split"):
        export(made.experiment, made.path, made.folder)
    split = rows_of(made.experiment, "train")
    torch.save([2], made.path)
    broken = made.experiment.model_copy(update={"template": "no such"})
    with pytest.raises(UserError, match="no such"):  # after annotated.* was written
        export(broken, made.path, made.folder)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="disk is full"):

        def full(path, record):
            raise UserError("the disk is full")

        patch.setattr("selection.run.products.write_sealed", full)  # the very last file
        export(made.experiment, made.path, made.folder)
    assert {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()} == before
    assert len(split) == 24 and not list(tmp_path.glob(".out.*al")) and not list(tmp_path.glob(".out.earlier"))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").touch()
    with pytest.raises(UserError, match="no export of mine"):
        export(made.experiment, made.path, tmp_path / "theirs")
    assert (tmp_path / "theirs" / "thesis.txt").exists()


def test_a_column_of_ours_in_the_data_is_refused(tiny_model, tmp_path):
    rows = [row | {"staff_effort": 1.0} for row in biology()]
    with pytest.raises(UserError, match="column staff_effort already"):
        exported(tmp_path, tiny_model, rows, [0])


def test_coresets_are_found_by_name_or_path(run, monkeypatch, capsys):
    assert [path.stem for path in coreset_paths(run.experiment, [])] == ["random-0.5", "staff-0.5"]
    assert list(coreset_paths(run.experiment, ["staff-0.5", "some/list.pt"])) == [run.coreset, Path("some/list.pt")]
    monkeypatch.setattr(sys, "argv", ["export.py", str(run.experiment.folder), "--coreset", "staff-0.7"])
    with pytest.raises(SystemExit) as stop:
        run_stage(importlib.import_module("scripts.export").main)
    assert stop.value.code == 2
    assert re.fullmatch(
        r"error: .* has no coreset staff-0\.7; there: random-0\.5, staff-0\.5\n", capsys.readouterr().err
    )


def test_the_export_says_what_it_was_made_from(run):
    record = read_json(run.folder / "made_from.json")
    assert record["export_of"] == "staff-0.5" and record["template"] == "chatml"
    assert str(REPOSITORY) not in json.dumps(record)
    assert np.array_equal(read_coreset(run.coreset).indices, np.sort(read_coreset(run.coreset).indices))
