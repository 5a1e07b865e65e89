"""A data file's rows: what LLaMA-Factory makes of them is what is scored and tuned on; what cannot be used is named."""

import codecs
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import rows_of_llama_factory, write_jsonl
from datasets import Dataset

from selection.rows.cut import cut_rows
from selection.rows.form import detect_form
from selection.rows.read import in_format, raw_rows, reading_rows
from selection.rows.split import rows_of, training_split, write_dataset
from selection.rows.tokens import check_tokenizer, lengths, tokenised_rows
from selection.run.config import DatasetFormat, load_experiment
from selection.run.errors import UserError
from selection.run.products import read_json

# Parity with LLaMA-Factory


def test_our_split_is_the_one_llama_factory_makes(make_experiment, rows, tmp_path):
    rows = [row | {"day": "2020-01-01"} for row in rows]  # a date in another column does no harm
    experiment = load_experiment(make_experiment(rows))
    split = training_split(experiment)
    ours = tokenised_rows(experiment, experiment.target_model, "train", split.rows)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"all": {"file_name": "experiment.jsonl"}}))
    theirs = rows_of_llama_factory(experiment, tmp_path, "all", val_size=0.2, seed=42)
    assert len(ours) == 24
    assert ours["input_ids"] == theirs["input_ids"] and ours["labels"] == theirs["labels"]
    everything = [*rows_of(experiment, "eval"), *split.rows]
    assert [row["id"] for row in everything] != [row["id"] for row in rows]
    assert sorted(row["id"] for row in everything) == sorted(row["id"] for row in rows)


def test_a_written_coreset_is_what_llama_factory_trains_on(make_experiment, rows):
    experiment = load_experiment(make_experiment(rows))
    split, indices = training_split(experiment), [1, 5, 6, 20]
    everything = tokenised_rows(experiment, experiment.target_model, "train", split.rows)
    write_dataset(experiment, "some", split.rows.select(indices))
    trained = rows_of_llama_factory(experiment, experiment.data_folder, "some")
    for column in ("input_ids", "labels"):
        assert trained[column][:] == [everything[i][column] for i in indices]


# Files

TWO_COLUMNS = DatasetFormat(columns={"prompt": "instruction", "response": "output"})
NUMBERS = ["0", "1", "1.50", "1e3", "-7"]


def csv_of(answers: list[str]) -> str:
    return "instruction,output,id\n" + "".join(f"{i} or not?,{each},{i}\n" for i, each in enumerate(answers))


def jsonl_of(answers: list[str], instruction: str = '"{}"') -> str:
    rows = ((instruction.format(i), each, i) for i, each in enumerate(answers))
    return "".join(f'{{"instruction": {a}, "output": {b}, "id": {i}}}\n' for a, b, i in rows)


MARK = "\ufeff"  # of byte order
FILES = {  # name, content and the responses as text
    "d.csv": (csv_of(NUMBERS), NUMBERS),
    "zeros.CSV": (MARK + csv_of(["007", "0"]), ["007", "0"]),
    "missing.csv": ("instruction,input,output,id\n1,,0,0\n2,5,1,1\n", ["0", "1"]),
    "truth.csv": (MARK + csv_of(["True", "False"]), ["True", "False"]),
    "d.jsonl": (jsonl_of(NUMBERS), NUMBERS),
    "d.JSON": (f"{MARK}[{jsonl_of(['0', '1'], '2').strip().replace(chr(10), ',')}]", ["0", "1"]),
    "truth.jsonl": (jsonl_of(["true", "false"]), ["true", "false"]),
    "dates.jsonl": (jsonl_of(['"2020-01-01"', '"2020-01-02"']), ["2020-01-01", "2020-01-02"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_number_counts_as_the_text_that_stands_in_the_file(name, tmp_path, capsys):
    content, responses = FILES[name]
    (tmp_path / name).write_text(content, encoding="utf-8")
    with reading_rows(tmp_path / name, TWO_COLUMNS) as (found, _):
        found = found.to_list()
    assert [row["output"] for row in found] == responses
    assert all(isinstance(row["instruction"], str) for row in found)
    assert [row["id"] for row in found] == list(range(len(found)))  # no text of the sample: as it was read
    assert f"dataset {name}: output holds " in capsys.readouterr().err


def test_csv_words_are_words_behind_numbers_too_and_where_they_mean_nothing_elsewhere(tmp_path):
    answers = [str(i % 2) if i < 15_000 else "unknown" for i in range(25_000)]  # it is read 10,000 rows at a time
    (tmp_path / "d.csv").write_text(csv_of(answers))
    with reading_rows(tmp_path / "d.csv", TWO_COLUMNS) as (found, _):
        assert found["output"][:] == answers
    (tmp_path / "d.csv").write_text("instruction,input,output\nnull,NA,None\na,,nan\n")
    with reading_rows(tmp_path / "d.csv", DatasetFormat()) as (found, _):
        assert [list(row.values()) for row in found] == [["null", "NA", "None"], ["a", "", "nan"]]


def test_numbers_of_a_parquet_file_are_written_as_in_json(tmp_path):
    answers = {"output": [0, 1], "instruction": ["a", "b"], "input": [1.5, None], "system": [True, False]}
    Dataset.from_dict(answers).to_parquet(tmp_path / "d.PARQUET")
    columns = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
    with reading_rows(tmp_path / "d.PARQUET", DatasetFormat(columns=columns)) as (found, _):
        assert found.column_names == list(answers)
        assert [list(row.values()) for row in found] == [["0", "a", "1.5", "true"], ["1", "b", None, "false"]]


# What cannot be used


def mixed(*values: object) -> bytes:
    return b"\n".join(json.dumps({"instruction": "a", "output": value}).encode() for value in values)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.csv", b"instruction,output,id\na,b,c\nd,e,\0\n", "holds a NUL byte"),
        ("d.txt", b"a", "a data set is a .json, .jsonl, .csv, .parquet, .arrow file"),
        ("d.jsonl", b'{"instruction": "a"}', r"row 0 of the data set has no column 'output' \(it has instruction"),
        ("d.json", codecs.BOM_UTF16_BE + b"\0a", "is written in UTF-16: save it as UTF-8"),
        *((name, content, r"d\.\w+ has no rows") for content in (b"", b"\n") for name in ("d.jsonl", "d.csv")),
        ("d.json", b"[]", "has no rows"),
        ("d.csv", b"instruction,output\n", "has no rows"),
        ("d.parquet", b"", "has no rows"),
        ("d.csv", b'instruction,output\na,"b\n', "cannot read rows from .*EOF inside string"),
        ("d.jsonl", mixed(0, "unknown", 1), "column output is text in row 1 and is none in row 0: write all of it as"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_by_us_alone(tmp_path, name, content, said, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said), reading_rows(tmp_path / name, TWO_COLUMNS):
        pass
    assert not caplog.records


def test_a_response_that_is_all_cut_off_is_named(make_experiment, rows):
    long = [("human", "a"), ("gpt", "b"), ("human", "c " * 200), ("gpt", "d")]  # only the last is trained on
    turns = [{"conversations": [{"from": role, "value": text} for role, text in long]} for _ in rows]
    experiment = load_experiment(make_experiment(turns, dataset_format={"formatting": "sharegpt"}, cutoff_len=2))
    with pytest.raises(UserError, match=r"row 0 of train\.arrow: cutoff_len 2 leaves no response token"):
        tokenised_rows(experiment, experiment.target_model, "train", training_split(experiment).rows)


@pytest.mark.parametrize("template", ["chatml", "bailing"])  # the latter adds an end mark of its own
def test_rows_that_cutoff_len_cuts_are_counted_and_said_once(template, make_experiment, rows, tiny_model, capsys):
    def tokens(cutoff_len: int, model=tiny_model) -> tuple:
        folder = str(tiny_model.parent / template / str(cutoff_len))
        experiment = load_experiment(make_experiment(rows, template=template, cutoff_len=cutoff_len, output_dir=folder))
        return experiment, tokenised_rows(experiment, str(model), "train", training_split(experiment).rows)

    whole = lengths(tokens(10_000)[1])
    assert "longer than" not in capsys.readouterr().err
    at = int(np.sort(whole)[12])  # which this row has to the token
    experiment, tokenised = tokens(at)
    cut = np.flatnonzero(whole > at)
    assert cut_rows(experiment).tolist() == cut.tolist() and (lengths(tokenised)[cut] == at).all() and len(cut) == 11
    said = (
        f"11 of 24 training rows are longer than cutoff_len {at} and are cut to it (the longest has {whole.max()} tok"
    )
    assert said in capsys.readouterr().err
    tokens(at, f"{tiny_model}/")  # another model's tokenizer, which says the same
    assert "longer than" not in capsys.readouterr().err
    assert len(read_json(experiment.data_folder / "cut.json")) == 2
    assert cut_rows(experiment.model_copy(update={"cutoff_len": at + 1})) is None


def test_trls_conversational_prompts_and_completions_are_read_as_conversations(tmp_path):
    rows = [([("user", "a"), ("assistant", "b"), ("user", "c")], [("assistant", "d")]), ([("user", "a")], None)]
    rows = [[messages and [{"role": r, "content": c} for r, c in messages] for messages in pair] for pair in rows]
    write_jsonl(tmp_path / "d.jsonl", [{"prompt": p, "completion": c, "id": 1} for p, c in rows])
    with raw_rows(tmp_path / "d.jsonl") as found:
        assert found.to_list() == [{"messages": p + (c or []), "id": 1} for p, c in rows]
        form, _ = detect_form(found.column_names, found.to_list(), "d.jsonl")
        _, unusable = in_format(found, tmp_path / "d.jsonl", DatasetFormat(**form))
    assert list(unusable) == [1] and "ends without a turn of 'assistant'" in unusable[1]


def test_a_tokenizer_that_loses_spaces_is_refused(rows, tiny_model):
    from transformers import AutoTokenizer

    real, texts = AutoTokenizer.from_pretrained(tiny_model), [row["output"] for row in rows]
    check_tokenizer(real, texts, "tiny")
    lossy = SimpleNamespace(encode=lambda text, **k: real.encode(text.replace(" ", ""), **k), decode=real.decode)
    with pytest.raises(UserError, match="the tokenizer of tiny changes the text"):
        check_tokenizer(lossy, texts, "tiny")


# The split in the run folder


def test_a_split_that_leaves_nothing_to_train_on_or_was_changed_is_refused(make_experiment, rows):
    for num_rows, said in ((2, r"eval_size 0\.9 of 2 rows leaves none to train on"), (1, "has 1 usable rows")):
        with pytest.raises(UserError, match=said):
            training_split(load_experiment(make_experiment(rows[:num_rows], eval_size=0.9)))
    experiment = load_experiment(make_experiment(rows))
    training_split(experiment)
    held_out = experiment.data_folder / "eval.arrow"
    kept = held_out.read_bytes()
    held_out.write_bytes(kept.replace(b"biological", b"philosophi"))
    with pytest.raises(UserError, match="was changed by hand"):
        training_split(experiment)
    held_out.write_bytes(kept)
    training_split(experiment)


def test_data_sets_that_are_written_at_the_same_time_are_all_listed(make_experiment, rows):
    experiment = load_experiment(make_experiment(rows))
    names, one = [f"coreset-{i}" for i in range(40)], Dataset.from_list(rows[:1])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: write_dataset(experiment, name, one), names))
    assert sorted(read_json(experiment.data_folder / "dataset_info.json")) == sorted(names)


def test_errors_of_a_stage_are_one_line_with_exit_code_2(make_experiment, rows, tmp_path, stage):
    config, empty = make_experiment(rows), tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    for arguments, said in {
        ("--set", f"small_model={tmp_path / 'nowhere'}"): "nowhere",
        ("--set", f"small_model={empty}"): "no weights",
        ("--set", "template=no_such_template"): "no_such_template",
        ("--set", "training.no_such_key=1"): "no_such_key",
        ("--set", "dataset=no/such/file.json"): "no/such/file.json",
        ("--project", "p"): "pip install wandb",
    }.items():
        code, _, errors = stage("finetune.finetune", config, *arguments)
        assert code == 2 and errors.count("error: ") == 1 and said in errors.splitlines()[-1], errors
        assert not (tmp_path / "run" / "small").exists()
