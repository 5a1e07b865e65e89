"""What is scored, exported and tuned on is what LLaMA-Factory trains on, row by row."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import REPOSITORY, assert_one_line_error, run_script
from datasets import Dataset

from selection.rows.llama_factory import import_llama_factory
from selection.rows.read import raw_rows, reading_rows
from selection.rows.split import row_id, rows_of, training_split, write_dataset
from selection.rows.tokens import check_tokenizer, tokenised_rows
from selection.run.config import DatasetFormat, load_experiment
from selection.run.errors import UserError
from selection.run.products import read_json


def tokens_of_llama_factory(experiment, **keys):
    """LLaMA-Factory's own way from keys to training rows."""
    import_llama_factory()
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    arguments = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": experiment.target_model,
        "template": experiment.template,
        "cutoff_len": experiment.cutoff_len,
        "output_dir": str(experiment.folder / "elsewhere"),
        "use_cpu": True,
        "overwrite_cache": True,
    }
    model_args, data_args, training_args, _, _ = get_train_args(arguments | keys)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    return get_dataset(template, model_args, data_args, training_args, stage="sft", **module)


def test_our_split_is_the_one_llama_factory_makes(make_experiment, rows, tmp_path):
    experiment = load_experiment(make_experiment(rows))
    split = training_split(experiment)
    ours = tokenised_rows(experiment, experiment.target_model, "train", split.rows)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"all": {"file_name": "experiment.jsonl"}}))
    theirs = tokens_of_llama_factory(experiment, dataset_dir=str(tmp_path), dataset="all", val_size=0.2, seed=42)
    assert len(ours) == 24
    assert ours["input_ids"] == theirs["train_dataset"]["input_ids"]
    assert ours["labels"] == theirs["train_dataset"]["labels"]
    everything = [*rows_of(experiment, "eval"), *split.rows]
    assert [row["id"] for row in everything] != [row["id"] for row in rows]
    assert sorted(map(row_id, everything)) == sorted(map(row_id, rows))


def test_the_exported_coreset_is_what_llama_factory_trains_on(make_experiment, rows):
    experiment = load_experiment(make_experiment(rows))
    split = training_split(experiment)
    everything = tokenised_rows(experiment, experiment.target_model, "train", split.rows)
    indices = [1, 5, 6, 20]
    write_dataset(experiment, "some", split.rows.select(indices))
    trained = tokens_of_llama_factory(experiment, dataset_dir=str(experiment.data_folder), dataset="some")
    assert trained["train_dataset"]["input_ids"] == [everything[i]["input_ids"] for i in indices]
    assert trained["train_dataset"]["labels"] == [everything[i]["labels"] for i in indices]


def test_llamafactory_cli_trains_on_the_exported_coreset_as_it_is(make_experiment, rows, tmp_path):
    experiment = load_experiment(make_experiment(rows))
    split = training_split(experiment)
    write_dataset(experiment, "some", split.rows.take(8))
    keys = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": experiment.target_model,
        "template": "chatml",
        "dataset_dir": str(experiment.data_folder),
        "dataset": "some",
        "eval_dataset": "eval",
        "finetuning_type": "lora",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "output_dir": str(tmp_path / "cli"),
        "use_cpu": True,
        "report_to": "none",
    }
    (tmp_path / "cli.yaml").write_text(json.dumps(keys))
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY / "selection" / "rows" / "no_torchaudio"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", "from llamafactory.cli import main; main()", "train", str(tmp_path / "cli.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "cli" / "adapter_model.safetensors").exists()
    assert "Generating train split: 8 examples" in done.stderr


def test_sharegpt_rows_keep_their_form(make_experiment, rows, tmp_path):
    turns = [
        {"conversations": [{"from": "human", "value": r["instruction"]}, {"from": "gpt", "value": r["output"]}]}
        for r in rows
    ]
    form = {"formatting": "sharegpt"}
    chats = load_experiment(make_experiment(turns, "chats", dataset_format=form, output_dir=str(tmp_path / "chats")))
    plain = load_experiment(make_experiment(rows, "plain", output_dir=str(tmp_path / "plain")))
    tokens = [tokenised_rows(e, e.target_model, "train", training_split(e).rows)["input_ids"] for e in (chats, plain)]
    assert tokens[0] == tokens[1]


def test_a_row_id_depends_on_content_alone():
    assert row_id({"a": 1, "b": "x"}) == row_id({"b": "x", "a": 1})
    assert row_id({"a": 1, "b": "x"}) != row_id({"a": 1, "b": "y"})


@pytest.mark.parametrize("output", [None, "", "  \n", ["a"]], ids=repr)
def test_rows_without_a_response_are_named(make_experiment, rows, output):
    for row in rows:
        row["output"] = [] if isinstance(output, list) else row["output"]
    rows[7]["output"] = rows[11]["output"] = output
    experiment = load_experiment(make_experiment(rows))
    with pytest.raises(UserError, match=r"rows have no prompt and text response, first row (7, 11|0, 1, 2)"):
        training_split(experiment)
    assert not experiment.data_folder.exists() or not (experiment.data_folder / "split.json").exists()


TWO_COLUMNS = DatasetFormat(columns={"prompt": "instruction", "response": "output"})
NUMBERS = ["0", "1", "1.50", "1e3", "-7"]
FILES = {  # what a file holds, of NUMBERS and some others as the responses
    "d.csv": "instruction,output,id\n" + "".join(f"{i} or not?,{n},{i}\n" for i, n in enumerate(NUMBERS)),
    "zeros.CSV": "instruction,output,id\n" + "".join(f"{i} or not?,{n},{i}\n" for i, n in enumerate(["007", "0"])),
    "missing.csv": "instruction,input,output,id\n1,,0,0\n2,5,1,1\n",
    "d.jsonl": "".join(f'{{"instruction": "{i}", "output": {n}, "id": {i}}}\n' for i, n in enumerate(NUMBERS)),
    "d.JSON": json.dumps([{"instruction": 2, "output": 0, "id": 0}, {"instruction": 3, "output": 1, "id": 1}]),
    "truth.jsonl": "".join(
        f'{{"instruction": "{n}?", "output": {n}, "id": {i}}}\n' for i, n in enumerate(["true", "false"])
    ),
    "truth.csv": "instruction,output,id\nyes?,True,0\nno?,False,1\n",
    "dates.jsonl": "".join(f'{{"instruction": "when?", "output": "2020-01-0{i}", "id": {i - 1}}}\n' for i in (1, 2)),
}
RESPONSES = {
    "zeros.CSV": ["007", "0"],
    "missing.csv": ["0", "1"],
    "d.JSON": ["0", "1"],
    "truth.jsonl": ["true", "false"],
    "truth.csv": ["True", "False"],
    "dates.jsonl": ["2020-01-01", "2020-01-02"],
}


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "byte-order mark"])
@pytest.mark.parametrize("name", FILES)
def test_a_number_counts_as_the_text_that_stands_in_the_file(name, mark, tmp_path, capsys):
    (tmp_path / name).write_text(mark + FILES[name], encoding="utf-8")
    with reading_rows(tmp_path / name, TWO_COLUMNS) as found:
        found = found.to_list()
    assert [row["output"] for row in found] == RESPONSES.get(name, NUMBERS)
    assert all(isinstance(row["instruction"], str) for row in found)
    assert [row["id"] for row in found] == list(range(len(found)))  # which is no text of the sample: as it was read
    assert f"dataset {name}: output holds " in capsys.readouterr().err


def test_a_csv_column_that_begins_with_numbers_may_go_on_with_words(tmp_path):
    answers = [str(i % 2) if i < 15_000 else "unknown" for i in range(25_000)]  # it is read 10,000 rows at a time
    lines = ["instruction,output\n", *(f"q{i},{answer}\n" for i, answer in enumerate(answers))]
    (tmp_path / "d.csv").write_text("".join(lines))
    with reading_rows(tmp_path / "d.csv", TWO_COLUMNS) as found:
        assert found["output"][:] == answers


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("values", [[0, "unknown", 1], ["unknown", None, 1.5]])
def test_a_json_column_of_numbers_and_words_is_named_with_its_rows(name, values, tmp_path):
    lines = [json.dumps({"instruction": "a", "output": value}) for value in values]
    (tmp_path / name).write_text("[" + ",\n".join(lines) + "]" if name == "rows.json" else "\n".join(lines))
    text = values.index("unknown")
    said = rf"column output is text in row {text} and is none in row {0 if text else 2}: write all of it as text"
    with pytest.raises(UserError, match=said), raw_rows(tmp_path / name):
        pass


def test_a_csv_file_with_a_nul_byte_is_refused_and_not_read_without_it(tmp_path):
    (tmp_path / "d.csv").write_bytes(b"instruction,output,id\na,b,c\nd,e,\0\n")
    with pytest.raises(UserError, match="holds a NUL byte"), raw_rows(tmp_path / "d.csv"):
        pass


@pytest.mark.parametrize("name", ["d.PARQUET", "d.parquet"])
def test_numbers_of_a_parquet_file_are_written_as_in_json(name, tmp_path):
    answers = {"output": [0, 1], "instruction": ["a", "b"], "input": [1.5, None], "system": [True, False]}
    Dataset.from_dict(answers).to_parquet(tmp_path / name)
    columns = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
    with reading_rows(tmp_path / name, DatasetFormat(columns=columns)) as found:
        assert found.column_names == list(answers)
        assert [list(row.values()) for row in found] == [["0", "a", "1.5", "true"], ["1", "b", None, "false"]]


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_named(name, encoding, tmp_path):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / name).write_text(f'{mark}{{"instruction": "a", "output": "b"}}\n', encoding=encoding)
    with pytest.raises(UserError, match=rf"{name} is written in UTF-16: save it as UTF-8"), raw_rows(tmp_path / name):
        pass


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.csv"])
def test_a_byte_order_mark_is_passed_over(name, rows, tmp_path):
    given = [{"instruction": row["instruction"], "output": row["output"]} for row in rows]
    if name == "d.csv":
        Dataset.from_list(given).to_csv(tmp_path / name)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in given)
        (tmp_path / name).write_text(json.dumps(given) if name == "d.json" else lines, encoding="utf-8")
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    with reading_rows(tmp_path / name, TWO_COLUMNS) as found:
        assert found.to_list() == given


def test_a_missing_column_is_named(make_experiment, rows):
    for row in rows:
        row["answer"] = row.pop("output")
    with pytest.raises(UserError, match=r"row 0 of the data set has no column 'output' \(it has id, instruction"):
        training_split(load_experiment(make_experiment(rows)))
    columns = {"columns": {"prompt": "instruction", "response": "answer"}}
    assert len(training_split(load_experiment(make_experiment(rows, dataset_format=columns))).rows) == 24


def test_a_response_that_is_all_cut_off_is_named(make_experiment, rows):
    turns = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]} for _ in rows]
    for row in turns:  # two turns; only the last is trained on, and the first fills the cut-off
        row["conversations"] += [{"from": "human", "value": "c " * 200}, {"from": "gpt", "value": "d"}]
    form = {"formatting": "sharegpt", "columns": {"messages": "conversations"}}
    experiment = load_experiment(make_experiment(turns, dataset_format=form, cutoff_len=2))
    with pytest.raises(UserError, match=r"row 0 of train\.arrow: cutoff_len 2 leaves no response token"):
        tokenised_rows(experiment, experiment.target_model, "train", training_split(experiment).rows)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\x00\xff\x00", b'{"instruction": "a", "output": "b"}\n'])
def test_a_data_set_without_usable_rows_is_refused(make_experiment, rows, tmp_path, content):
    config = make_experiment(rows)
    (tmp_path / "experiment.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"(cannot read rows from|usable rows|no column|line 1: no JSON object)"):
        training_split(load_experiment(config))


def test_a_tokenizer_that_loses_spaces_is_refused(make_experiment, rows, tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = [row["output"] for row in rows]
    check_tokenizer(tokenizer, texts, "tiny")

    class LosesSpaces:
        def encode(self, text, **kwargs):
            return tokenizer.encode(text.replace(" ", ""), **kwargs)

        decode = tokenizer.decode

    with pytest.raises(UserError, match="the tokenizer of tiny changes the text"):
        check_tokenizer(LosesSpaces(), texts, "tiny")


def test_dates_in_other_columns_do_no_harm(make_experiment, rows):
    for row in rows:
        row["day"] = "2020-01-01"
    assert len(training_split(load_experiment(make_experiment(rows))).rows) == 24


def test_a_split_that_leaves_nothing_to_train_on_is_refused(make_experiment, rows):
    experiment = load_experiment(make_experiment(rows, max_samples=2, eval_size=0.9))
    with pytest.raises(UserError, match=r"eval_size 0\.9 of 2 rows leaves none to train on"):
        training_split(experiment)


def test_a_held_out_split_changed_by_hand_is_refused(make_experiment, rows):
    experiment = load_experiment(make_experiment(rows))
    training_split(experiment)
    held_out = experiment.data_folder / "eval.arrow"
    held_out.write_bytes(held_out.read_bytes().replace(b"biological", b"philosophi"))
    with pytest.raises(UserError, match="was changed by hand"):
        training_split(experiment)


def test_other_data_in_the_same_run_folder_is_refused(make_experiment, rows):
    training_split(load_experiment(make_experiment(rows)))
    rows[3]["output"] += " And more."
    with pytest.raises(UserError, match=r"belongs to other data \(dataset_sha256"):
        training_split(load_experiment(make_experiment(rows)))


def test_errors_of_a_stage_are_one_line_with_exit_code_2(make_experiment, rows, tmp_path):
    def finetune(*arguments):
        return run_script("finetune/finetune.py", *arguments, check=False)

    config = make_experiment(rows)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    for override, said in {
        f"small_model={tmp_path / 'nowhere'}": "nowhere",
        f"small_model={empty}": "no weights",
        "template=no_such_template": "no_such_template",
        "training.no_such_key=1": "no_such_key",
        "dataset=no/such/file.json": "no/such/file.json",
    }.items():
        assert_one_line_error(finetune("--config_path", config, "--set", override), said)
        assert not (tmp_path / "run" / "small").exists()
    assert_one_line_error(finetune("--config_path", config, "--project", "p"), "pip install wandb")


def test_data_sets_that_are_written_at_the_same_time_are_all_listed(make_experiment, rows):
    experiment = load_experiment(make_experiment(rows))
    names, one = [f"coreset-{i}" for i in range(40)], Dataset.from_list(rows[:1])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: write_dataset(experiment, name, one), names))
    assert sorted(read_json(experiment.data_folder / "dataset_info.json")) == sorted(names)
