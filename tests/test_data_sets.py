"""Data sets that come in: forms of rows against LLaMA-Factory, several data sets in a run, published index lists."""

import json
import math
import re
import sys
from fractions import Fraction
from itertools import product
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
import torch
from conftest import rows_of_llama_factory, write_jsonl

from selection.rows.conversation import unusable_rows
from selection.rows.split import data_sets, held_out_copies, row_id, rows_of, split_numbers, training_split
from selection.rows.tokens import tokenised_rows
from selection.run.config import COMMON_FORM, load_experiment
from selection.run.errors import UserError
from selection.run.products import read_json
from selection.scores.coresets import PUBLISHED_RATES, PUBLISHED_ROWS, check_fits, check_published, read_coreset


def turns(*texts: str, roles=("human", "gpt"), tags=("from", "value")) -> list[dict[str, str]]:
    return [{tags[0]: roles[i % 2], tags[1]: text} for i, text in enumerate(texts)]


def said(text: str, role: str) -> dict[str, str]:
    return {"role": role, "content": text}


def asked(instruction: str, given: str | None, output: str, **more: object) -> dict:
    return {"instruction": instruction, "input": given, "output": output, **more}


OPENAI_TAGS = {
    "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
    "observation_tag": "tool", "function_tag": "call", "system_tag": "system",
}  # fmt: skip
TOOLS = json.dumps([{"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}])
CALL = json.dumps({"name": "add", "arguments": {"a": 1}})
ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
LONG, NONE = {"from": "system", "value": "Be long."}, {"from": "system", "value": ""}
USED = [{"from": "function_call", "value": CALL}, {"from": "observation", "value": "2"}]
HISTORY = [["Name a cell.", "A neuron."], ["Why?", "It came to mind."]]
SHORT = [said("Be short.", "system"), said("Why?", "user"), said("So.", "assistant")]
TWICE = [said("Why?", "user"), said("So.", "assistant"), said("A?", "user"), said("B.", "assistant")]
ADDED = [said("Add 1, add 2.", "user"), said(CALL, "call"), said("2", "tool"), said("3", "tool")]
FORMS = {  # the dataset_format of a form, and rows with all that the form has
    "alpaca": ({}, [asked("Name a cell.", "", "A neuron."), asked("Name a part.", "of the cell", "The nucleus.")]),
    "alpaca with system and history": (
        {"columns": ALPACA | {name: name for name in ("system", "history", "tools")}},
        [
            asked("And a part?", None, "The nucleus.", system="Be short.", history=HISTORY, tools=TOOLS),
            asked("Name one.", "now", "A gene.", system="", history=[], tools=""),
            asked("Name two.", "", "A, B", system=None, history=None, tools=None),
        ],
    ),
    "sharegpt": (
        {"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "system", "tools": "tools"}},
        [
            {"conversations": turns("A?", "A neuron.", "And a part?", "The nucleus."), "system": "S", "tools": None},
            {"conversations": [LONG, *turns("Why?", "So.")], "system": "Not this.", "tools": TOOLS},
            {"conversations": [NONE, *turns("Why?", "So.")], "system": None, "tools": ""},
            {"conversations": [*turns("Add 1."), *USED, {"from": "gpt", "value": "2."}], "system": "", "tools": TOOLS},
        ],
    ),
    "messages read as sharegpt": (
        {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": OPENAI_TAGS},
        [{"messages": SHORT}, {"messages": TWICE}],
    ),
    "openai": (
        {"formatting": "openai", "columns": {"messages": "messages", "tools": "tools"}, "tags": OPENAI_TAGS},
        [{"messages": SHORT, "tools": ""}, {"messages": [*ADDED, said("2 and 3.", "assistant")], "tools": TOOLS}],
    ),
}


def assert_tokens_are_those_of_llama_factory(make_experiment, folder: Path, forms: list[str]):
    info, sets = {}, []
    for number, (form, rows) in enumerate(FORMS[name] for name in forms):
        info[f"set{number}"] = {"file_name": f"set{number}.jsonl", **form}
        sets.append({"path": write_jsonl(folder / f"set{number}.jsonl", rows), "dataset_format": form})
    (folder / "dataset_info.json").write_text(json.dumps(info))
    experiment = load_experiment(make_experiment([], dataset=sets, output_dir=str(folder / "run"), cutoff_len=1024))
    train, numbers = training_split(experiment), split_numbers(experiment)
    theirs = rows_of_llama_factory(experiment, folder, ",".join(info))
    assert len(train.rows) + len(rows_of(experiment, "eval")) == len(theirs) > len(train.rows) > 0
    for name in ("train", "eval"):
        ours = tokenised_rows(experiment, experiment.target_model, name, rows_of(experiment, name))
        for row, number in zip(ours, numbers[name], strict=True):
            assert row["input_ids"] == theirs[int(number)]["input_ids"]
            assert row["labels"] == theirs[int(number)]["labels"]
    return experiment, theirs


def test_rows_of_every_form_together_have_the_tokens_of_their_own_form(make_experiment, tmp_path):
    from transformers import AutoTokenizer

    experiment, theirs = assert_tokens_are_those_of_llama_factory(make_experiment, tmp_path, list(FORMS))
    assert experiment.row_format == COMMON_FORM
    assert rows_of(experiment, "train").column_names == ["messages", "tools"]
    sizes = [len(rows) for _, rows in FORMS.values()]
    firsts = np.cumsum([0, *sizes])[:-1].tolist()
    assert data_sets(experiment) == [(f"set{i}", *each) for i, each in enumerate(zip(firsts, sizes, strict=True))]
    # A conversation of two turns has labels on both answers, and on nothing else.
    labels = [label for label in theirs[firsts[2]]["labels"] if label >= 0]
    text = AutoTokenizer.from_pretrained(experiment.target_model).decode(labels)
    assert "A neuron." in text and "The nucleus." in text and "part" not in text


@pytest.mark.parametrize("form", ["alpaca with system and history", "openai"])
def test_rows_of_one_form_stay_as_they_are(make_experiment, tmp_path, form):
    experiment, _ = assert_tokens_are_those_of_llama_factory(make_experiment, tmp_path, [form, form])
    assert experiment.row_format.entry == {"formatting": "alpaca"} | FORMS[form][0]
    assert sorted(rows_of(experiment, "train").column_names) == sorted(FORMS[form][1][0])


CHAT = {"formatting": "sharegpt"}
MESSAGES = {"formatting": "openai", "columns": {"messages": "messages"}, "tags": OPENAI_TAGS}
WRONG = [
    (CHAT, turns("a", "b", "c"), "it ends without a turn of 'gpt' or 'function_call'"),
    (CHAT, turns("a", "b", roles=("human", "bot")), "turn 1 is of 'bot' where one of 'gpt' or 'function_call' is due"),
    (CHAT, [*turns("a", "b"), {"from": "system", "value": "s"}, *turns("c")], "turn 2 is of 'system'"),
    (CHAT, turns("a", "b", tags=("role", "content")), r"turn 0 has no 'from' \(it has role, content\): name it under"),
    (CHAT, "a", "something else than text or turns"),
    (MESSAGES, [said("a", "user"), said(CALL, "call"), said("2", "tool")], "it ends without a turn"),
    (CHAT | {"columns": {"messages": "conversations", "system": "system"}}, {"system": 3}, "system prompt is no text"),
    (CHAT | {"columns": {"messages": "conversations", "tools": "tools"}}, {"tools": "add"}, "are no text that holds J"),
    ({}, {"output": None}, "it has not one response"),
    ({}, {"output": " \n"}, "its response is blank"),
]


def test_what_is_wrong_with_a_row_is_said_with_its_number(make_experiment):
    good = {"conversations": turns("a", "b"), "messages": [said("a", "user"), said("b", "assistant")], "system": "s"}
    good |= {"instruction": "a", "input": "", "output": "b", "tools": "[]"}
    for form, wrong, why in WRONG:
        column = "messages" if form is MESSAGES else "conversations"
        row = good | (wrong if isinstance(wrong, dict) else {column: wrong})
        ((number, text),) = unusable_rows([good, row, good], form).items()
        assert number == 1 and re.search(why, text), text


def test_all_bad_rows_are_counted_and_the_first_named_or_left_out_and_listed(make_experiment, rows, tmp_path, capsys):
    wrong = {row: {"output": [None, " "][row % 2]} for row in range(1, 13)}
    first = [row | wrong.get(number, {}) for number, row in enumerate(rows[:20])]
    second = [row | {"output": ""} if number in (0, 8) else row for number, row in enumerate(rows[20:])]
    sets = [{"path": write_jsonl(tmp_path / "a.jsonl", first)}, {"path": write_jsonl(tmp_path / "b.jsonl", second)}]
    sets[1]["max_samples"] = 8  # the last bad row is not among them
    both = load_experiment(make_experiment([], dataset=sets))
    said = r"a\.jsonl: 12 of 20 rows have no prompt and text response: rows 1, 3, 5, 7, 9 \(its response is blank\); "
    said += r"rows 2, 4, 6, 8, 10 \(it has .*; and 2 more; .*b\.jsonl: 1 of 8 rows .* row 0 \(.*--skip_bad_rows"
    with pytest.raises(UserError, match=said):
        training_split(both)
    skipping = both.model_copy(update={"skip_bad_rows": True})
    training_split(skipping)
    assert "left out: 13 of 28 rows, listed with the reason in" in capsys.readouterr().err
    listed = list(map(json.loads, (both.data_folder / "bad_rows.jsonl").read_text().splitlines()))
    assert [line["row"] for line in listed] == [*wrong, 0]
    assert [line["file"] for line in listed] == [sets[0]["path"]] * 12 + [sets[1]["path"]]
    assert {line["reason"] for line in listed} == {"its response is blank", "it has not one response"}
    assert data_sets(skipping) == [("a", 0, 20), ("b", 20, 8)]
    for name, numbers in split_numbers(skipping).items():  # as in the files
        assert list(rows_of(skipping, name)) == [[*first, *second][number] for number in numbers]
    with pytest.raises(UserError, match=r"was split without the rows in .*bad_rows\.jsonl: give skip_bad_rows"):
        training_split(both)
    good = load_experiment(make_experiment(rows, output_dir=str(tmp_path / "good")))
    training_split(good)
    record = (good.data_folder / "split.json").read_bytes()
    training_split(good.model_copy(update={"skip_bad_rows": True}))  # there are none
    assert (good.data_folder / "split.json").read_bytes() == record and b"skipped" not in record


def test_a_split_needs_nothing_of_a_torchvision_that_loads(make_experiment, rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))  # of today: without io.VideoReader
    monkeypatch.setattr(datasets.config, "TORCHVISION_AVAILABLE", True)
    assert len(training_split(load_experiment(make_experiment(rows))).rows) == 24


def test_copies_are_counted_and_stay_on_one_side_where_that_is_asked(make_experiment, rows, tmp_path, capsys):
    def split(given: list[dict], name: str, **changes) -> tuple:
        config = make_experiment(given, output_dir=str(tmp_path / name), **changes)
        experiment = load_experiment(config)
        train, err = training_split(experiment), capsys.readouterr().err
        texts = [{row["instruction"] for row in part} for part in (train.rows, rows_of(experiment, "eval"))]
        return experiment, texts[0] & texts[1], err

    twice = [*rows[:15], *(row | {"id": "again"} for row in rows[:15]), *rows[15:]]
    drawn, on_both, err = split(twice, "drawn")
    held_out = sum(row["instruction"] in on_both for row in rows_of(drawn, "eval"))
    assert held_out == held_out_copies(drawn) > 0
    assert "copies: 15 of 45 rows say the same as an earlier one; " in err
    assert f"; {held_out} of 9 held-out rows have a copy in training (split: keep_copies_together" in err
    kept, on_both, err = split(twice, "kept", split="keep_copies_together")
    assert not on_both and "; 0 of " in err and held_out_copies(kept) == 0
    first = {row["instruction"]: number for number, row in reversed(list(enumerate(twice)))}
    numbers, published = split_numbers(kept), split_numbers(drawn)
    for name in ("train", "eval"):  # where the published split has the first of them
        assert list(rows_of(kept, name)) == [twice[number] for number in numbers[name]]
        assert {first[twice[number]["instruction"]] for number in numbers[name]} <= set(published[name].tolist())
    for experiment, other in ((drawn, "keep_copies_together"), (kept, "llama_factory")):
        with pytest.raises(UserError, match=f'belongs to other data .split: stored .*, now "{other}"'):
            training_split(experiment.model_copy(update={"split": other}))
    # Without copies nothing changes, and the record of a published split is that of earlier versions.
    plain, *_ = split(rows, "plain")
    same, _, err = split(rows, "same", split="keep_copies_together")
    assert "copies:" not in err
    assert all((split_numbers(plain)[name] == split_numbers(same)[name]).all() for name in ("train", "eval"))
    record = read_json(plain.data_folder / "split.json")
    assert set(record) == {"made_from", "fingerprint", "files", "sha256"} and "split" not in record["made_from"]
    with pytest.raises(UserError, match="puts all rows on one side"):
        split([rows[0]] * 9, "all", split="keep_copies_together")
    with pytest.raises(UserError, match="beside eval_data nothing is split"):
        split(rows, "own", split="keep_copies_together", eval_data="own.jsonl")
    with pytest.raises(UserError, match=r"^eval_data own.jsonl: No such file or directory .looked for "):
        split(rows, "own", eval_data="own.jsonl")


def test_one_file_gives_the_same_run_folder_in_a_list_as_by_itself(make_experiment, rows, tmp_path):
    form = {"columns": {"prompt": "instruction", "response": "output"}}
    keys = {"max_samples": 20, "dataset_format": form}
    alone = load_experiment(make_experiment(rows, **keys, output_dir=str(tmp_path / "alone")))
    listed = [{"path": alone.dataset, "name": "other", "quota": 1.0, **keys}]
    among = load_experiment(make_experiment(rows, dataset=listed, output_dir=str(tmp_path / "among")))
    for experiment in (alone, among):
        training_split(experiment)
    for name in ("split.json", "train.arrow", "eval.arrow", "dataset_info.json"):
        assert (alone.data_folder / name).read_bytes() == (among.data_folder / name).read_bytes()
    assert [data_sets(alone), data_sets(among)] == [[("experiment", 0, 20)], [("other", 0, 20)]]


def test_rows_are_pooled_in_order_and_split_once(make_experiment, rows, tmp_path, capsys):
    for row in rows[12:]:
        row["only here"] = "x"
    paths = [write_jsonl(tmp_path / "a.jsonl", rows[:12]), write_jsonl(tmp_path / "b.jsonl", rows[12:])]
    sets = [{"path": paths[0]}, {"path": paths[1], "max_samples": 9}]

    def of(sets: list[dict]):
        return load_experiment(make_experiment([], dataset=sets, max_samples=11))

    experiment = of(sets)
    split, numbers = training_split(experiment), split_numbers(experiment)
    said = capsys.readouterr().err
    assert "dataset a.jsonl: first 11 of 12 rows\n" in said and "dataset b.jsonl: first 9 of 18 rows\n" in said
    assert data_sets(experiment) == [("a", 0, 11), ("b", 11, 9)]
    pooled = [row | {"only here": None} for row in rows[:11]] + rows[12:21]
    for name in ("train", "eval"):
        assert [row_id(row) for row in rows_of(experiment, name)] == [row_id(pooled[i]) for i in numbers[name]]
    # The same rows in one file: the same split.
    one = training_split(load_experiment(make_experiment(pooled, "one", output_dir=str(tmp_path / "one"))))
    assert (one.ids, one.fingerprint) == (split.ids, split.fingerprint)
    # Each file, its format and its number of rows count; names and quotas do not.
    for change in ([{"path": paths[0]}, {"path": paths[1]}], sets[::-1], [*sets, sets[1] | {"name": "c"}]):
        for call in (training_split, data_sets):
            with pytest.raises(UserError, match="belongs to other data"):
                call(of(change))
    renamed = of([sets[0] | {"name": "first", "quota": 0.5}, sets[1]])
    assert training_split(renamed).ids == split.ids and data_sets(renamed)[0][0] == "first"


def test_columns_that_do_not_go_together_are_named(make_experiment, rows, tmp_path):
    parts = {"a": rows[:12], "b": [row | {"id": 3} for row in rows[12:]]}
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in parts.items()]
    experiment = load_experiment(make_experiment([], dataset=[{"path": path} for path in paths]))
    with pytest.raises(UserError, match=r"column id is Value\('int64'\) in .*b\.js.* and Value\('string'\) in .*a\.js"):
        training_split(experiment)
    assert not (experiment.data_folder / "split.json").exists()


def test_lists_of_data_sets_that_cannot_be_are_refused(make_experiment):
    for sets, why in (
        ([{"path": "a.json"}, {"path": "x/a.jsonl"}], "more than one data set is called a:"),
        ([{"path": "a", "quota": 0.7}, {"path": "b", "quota": 0.4}], "sum to 1.1: they must sum to at most 1"),
        ([{"path": "a", "quota": 0.7}, {"path": "b", "quota": 0.2}], "must sum to 1 where every data set has one"),
        ([{"name": "a"}], "key dataset.0.path is missing: add it$"),
    ):
        with pytest.raises(UserError, match=why):
            load_experiment(make_experiment([], dataset=sets))


@pytest.mark.parametrize("name", PUBLISHED_ROWS)
def test_a_published_list_fits_its_own_data_alone(name):
    own = PUBLISHED_ROWS[name]
    assert sorted(PUBLISHED_ROWS.values()) == [13_014, 22_504, 115_784]
    for rate, off in product(PUBLISHED_RATES, (-1, 0, 1)):
        count = math.floor(Fraction(str(rate)) * own) + off
        assert check_published(count, own, "list.pt") is None
        for rows in set(PUBLISHED_ROWS.values()) - {own}:
            with pytest.raises(UserError, match=f"{count:,} rows are .* of {name} at rate {rate:g} .*{rows:,}"):
                check_published(count, rows, "list.pt")


def test_only_a_pt_list_is_held_against_the_published_lengths(tmp_path, capsys):
    def check(name: str) -> str:
        check_fits(read_coreset(tmp_path / name), list(map(str, range(1000))), "fingerprint", name)
        return capsys.readouterr().err

    torch.save(list(range(50)), tmp_path / "some.pt")
    (tmp_path / "some.json").write_text(json.dumps({"indices": list(range(50))}))
    assert check("some.json") == "" and "some.pt: 50 rows are no published rate" in check("some.pt")
    assert re.match(r"list\.pt: 1,303 rows are no published rate .* 13,014", check_published(1303, 13_014, "list.pt"))
    torch.save(list(range(1301)), tmp_path / "other.pt")  # before a row is found to be outside
    with pytest.raises(UserError, match=r"other\.pt: 1,301 rows are the paper's coreset of DialogSum at rate 0\.1"):
        check("other.pt")
