"""What comes in: forms of rows against LLaMA-Factory, several data sets, quotas, published lists."""

import importlib
import json
import math
import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from conftest import baseline_by_rate, by_rate
from hypothesis import given, settings
from hypothesis import strategies as st

from selection.method.baselines import columns_of, moderate_order
from selection.method.quotas import Quotas, shares
from selection.method.staff import RANDOM, choose_staff, coreset_size, random_ranks, stratify
from selection.rows.conversation import unusable_rows
from selection.rows.llama_factory import import_llama_factory
from selection.rows.split import data_sets, row_id, rows_of, split_numbers, training_split
from selection.rows.tokens import tokenised_rows
from selection.run.config import COMMON_FORM, load_experiment
from selection.run.errors import UserError
from selection.run.products import read_json
from selection.scores.coresets import PUBLISHED_RATES, PUBLISHED_ROWS, check_fits, check_published, read_coreset
from selection.scores.folder import Scores
from selection.scores.quotas import quotas_of

by_property = settings(max_examples=60, deadline=None)

# Forms of rows


def turns(*texts: str, roles=("human", "gpt"), tags=("from", "value")) -> list[dict[str, str]]:
    return [{tags[0]: roles[i % 2], tags[1]: text} for i, text in enumerate(texts)]


OPENAI_TAGS = {
    "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
    "observation_tag": "tool", "function_tag": "call", "system_tag": "system",
}  # fmt: skip
TOOLS = json.dumps([{"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}])
CALL = json.dumps({"name": "add", "arguments": {"a": 1}})


def said(text: str, role: str) -> dict[str, str]:
    return {"role": role, "content": text}


# A form: its dataset_format, and rows of it, which bring out all that the form has.
FORMS = {
    "alpaca": (
        {},
        [
            {"instruction": "Name a cell.", "input": "", "output": "A neuron."},
            {"instruction": "Name a part.", "input": "of the cell", "output": "The nucleus."},
        ],
    ),
    "alpaca with system and history": (
        {
            "columns": {
                "prompt": "instruction", "query": "input", "response": "output", "system": "system",
                "history": "history", "tools": "tools",
            }
        },
        [
            {"instruction": "And a part?", "input": None, "output": "The nucleus.", "system": "Be short.",
             "history": [["Name a cell.", "A neuron."], ["Why?", "It came to mind."]], "tools": TOOLS},
            {"instruction": "Name one.", "input": "now", "output": "A gene.", "system": "", "history": [], "tools": ""},
            {"instruction": "Name two.", "input": "", "output": "A, B", "system": None, "history": None, "tools": None},
        ],
    ),
    "sharegpt": (
        {"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "system", "tools": "tools"}},
        [
            {"conversations": turns("Name a cell.", "A neuron.", "And a part?", "The nucleus."), "system": "Be short.",
             "tools": None},
            {"conversations": [{"from": "system", "value": "Be long."}, *turns("Why?", "So.")], "system": "Not this.",
             "tools": TOOLS},
            {"conversations": [{"from": "system", "value": ""}, *turns("Why?", "So.")], "system": None, "tools": ""},
            {"conversations": [*turns("Add 1."), {"from": "function_call", "value": CALL},
                               {"from": "observation", "value": "2"}, {"from": "gpt", "value": "It is 2."}],
             "system": "", "tools": TOOLS},
        ],
    ),
    "messages read as sharegpt": (
        {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": OPENAI_TAGS},
        [
            {"messages": [said("Be short.", "system"), said("Why?", "user"), said("So.", "assistant")]},
            {"messages": [said("Why?", "user"), said("So.", "assistant"), said("A?", "user"), said("B.", "assistant")]},
        ],
    ),
    "openai": (
        {"formatting": "openai", "columns": {"messages": "messages", "tools": "tools"}, "tags": OPENAI_TAGS},
        [
            {"messages": [said("Be short.", "system"), said("Why?", "user"), said("So.", "assistant")], "tools": ""},
            {"messages": [said("Add 1, add 2.", "user"), said(CALL, "call"), said("2", "tool"), said("3", "tool"),
                          said("2 and 3.", "assistant")], "tools": TOOLS},
        ],
    ),
}  # fmt: skip


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def of_llama_factory(experiment, folder: Path, forms: list[str]) -> list[dict]:
    """What LLaMA-Factory itself makes of the files of these forms, one data set after the other."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    names = [f"set{number}" for number in range(len(forms))]
    entries = {}
    for name, form in zip(names, forms, strict=True):
        write_jsonl(folder / f"{name}.jsonl", FORMS[form][1])
        entries[name] = {"file_name": f"{name}.jsonl", **FORMS[form][0]}
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    keys = {
        "stage": "sft", "do_train": True, "model_name_or_path": experiment.target_model, "use_cpu": True,
        "template": experiment.template, "cutoff_len": experiment.cutoff_len, "overwrite_cache": True,
        "dataset_dir": str(folder), "dataset": ",".join(names), "output_dir": str(folder / "elsewhere"),
    }  # fmt: skip
    model_args, data_args, training_args, _, _ = get_train_args(keys)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    return list(get_dataset(template, model_args, data_args, training_args, stage="sft", **module)["train_dataset"])


def assert_tokens_are_those_of_llama_factory(make_experiment, folder: Path, forms: list[str]):
    import_llama_factory()
    sets = [
        {"path": write_jsonl(folder / f"{number}.jsonl", FORMS[form][1]), "dataset_format": FORMS[form][0]}
        for number, form in enumerate(forms)
    ]
    experiment = load_experiment(make_experiment([], dataset=sets, output_dir=str(folder / "run"), cutoff_len=1024))
    train, numbers = training_split(experiment), split_numbers(experiment)
    theirs = of_llama_factory(experiment, folder, forms)
    assert len(train.rows) + len(rows_of(experiment, "eval")) == len(theirs) > len(train.rows) > 0
    for name in ("train", "eval"):
        ours = tokenised_rows(experiment, experiment.target_model, name, rows_of(experiment, name))
        for row, number in zip(ours, numbers[name], strict=True):
            assert row["input_ids"] == theirs[number]["input_ids"]
            assert row["labels"] == theirs[number]["labels"]
    return experiment, theirs


def test_rows_of_every_form_together_have_the_tokens_of_their_own_form(make_experiment, tmp_path):
    experiment, theirs = assert_tokens_are_those_of_llama_factory(make_experiment, tmp_path, list(FORMS))
    assert experiment.row_format == COMMON_FORM
    assert rows_of(experiment, "train").column_names == ["messages", "tools"]
    sizes = [len(rows) for _, rows in FORMS.values()]
    firsts = np.cumsum([0, *sizes])[:-1].tolist()
    assert data_sets(experiment) == list(zip(map(str, range(len(sizes))), firsts, sizes, strict=True))
    # A conversation of two turns has labels on both answers, and on nothing else.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(experiment.target_model)
    conversation = theirs[firsts[2]]
    labels = tokenizer.decode([label for label in conversation["labels"] if label >= 0])
    assert "A neuron." in labels and "The nucleus." in labels and "part" not in labels
    entry = read_json(experiment.data_folder / "dataset_info.json")["train"]
    assert entry == {"file_name": "train.arrow", **COMMON_FORM.entry}


@pytest.mark.parametrize("form", [form for form in FORMS if form != "alpaca"])
def test_rows_of_one_form_stay_as_they_are(make_experiment, tmp_path, form):
    experiment, _ = assert_tokens_are_those_of_llama_factory(make_experiment, tmp_path, [form, form])
    assert experiment.row_format.entry == {"formatting": "alpaca"} | FORMS[form][0]
    assert sorted(rows_of(experiment, "train").column_names) == sorted(FORMS[form][1][0])


CHAT = {"formatting": "sharegpt"}
MESSAGES = {"formatting": "openai", "columns": {"messages": "messages"}, "tags": OPENAI_TAGS}


@pytest.mark.parametrize(
    ("form", "row", "why"),
    [
        (CHAT, {"conversations": turns("a", "b", "c")}, "it ends without a turn of 'gpt' or 'function_call'"),
        (CHAT, {"conversations": turns("a", "b", roles=("human", "bot"))},
         "turn 1 is of 'bot' where one of 'gpt' or 'function_call' is due"),
        (CHAT, {"conversations": turns("a", "b", roles=("gpt", "human"))}, "turn 0 is of 'gpt' where one of 'human'"),
        (CHAT, {"conversations": [*turns("a", "b"), {"from": "system", "value": "s"}, *turns("c")]},
         "turn 2 is of 'system'"),
        (CHAT, {"conversations": [{"from": "system", "value": "s"}]}, "it ends without a turn of 'gpt'"),
        (CHAT, {"conversations": []}, "it ends without a turn of 'gpt'"),
        (CHAT, {"conversations": turns("a", "b", tags=("role", "content"))},
         r"turn 0 has no 'from' \(it has role, content\): give its name under dataset_format.tags"),
        (CHAT, {"conversations": "a"}, "something else than text or turns"),
        (CHAT, {"conversations": turns("a", "  ")}, "its response is blank"),
        (CHAT | {"columns": {"messages": "conversations", "system": "system"}},
         {"conversations": turns("a", "b"), "system": 3}, "its system prompt is no text"),
        (CHAT | {"columns": {"messages": "conversations", "tools": "tools"}},
         {"conversations": turns("a", "b"), "tools": "add"}, "its tools are no text that holds JSON"),
        (MESSAGES, {"messages": [said("a", "user"), said("b", "bot")]}, "turn 1 is of 'bot'"),
        (MESSAGES, {"messages": [said("a", "user"), said(CALL, "call"), said("2", "tool")]}, "it ends without a turn"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_conversation_is_said_with_its_row(make_experiment, form, row, why):

    messages = [said("a", "user"), said("b", "assistant")]
    good = {"conversations": turns("a", "b"), "messages": messages, "system": "s", "tools": "[]"}
    fits = {key: good[key] for key in row}
    unusable = unusable_rows([fits, row, fits], form)
    assert list(unusable) == [1]
    assert re.search(why, unusable[1])
    if why.startswith("it ends") and row.get("conversations"):
        experiment = load_experiment(make_experiment([fits, row, fits], dataset_format=form))
        with pytest.raises(UserError, match=rf"1 of 3 rows have .*first row 1 \(row 1: {why}"):
            training_split(experiment)


# Several data sets


def record_of(experiment) -> dict:
    training_split(experiment)
    return read_json(experiment.data_folder / "split.json")


def test_one_file_gives_the_same_run_folder_in_a_list_as_by_itself(make_experiment, rows, tmp_path):
    form = {"columns": {"prompt": "instruction", "response": "output"}}
    keys = {"max_samples": 20, "dataset_format": form}
    alone = load_experiment(make_experiment(rows, **keys, output_dir=str(tmp_path / "alone")))
    listed = [{"path": alone.dataset, "name": "other", "quota": 1.0, **keys}]
    among = load_experiment(make_experiment(rows, dataset=listed, output_dir=str(tmp_path / "among")))
    records = [record_of(experiment) for experiment in (alone, among)]
    assert records[0] == records[1]
    # As before there were lists: these are the keys that coresets and scores of old run folders rest on.
    assert set(records[0]) - {"sha256"} == {"made_from", "fingerprint", "files"} | (set(records[0]) & {"seal"})
    assert records[0]["made_from"] == {
        "dataset_sha256": records[0]["made_from"]["dataset_sha256"],
        "dataset_format": {"formatting": "alpaca", **form},
        "max_samples": 20,
        "eval_size": 0.2,
        "split_seed": 42,
    }
    for name in ("train.arrow", "eval.arrow", "dataset_info.json"):
        assert (alone.data_folder / name).read_bytes() == (among.data_folder / name).read_bytes()
    assert [data_sets(alone), data_sets(among)] == [[("experiment", 0, 20)], [("other", 0, 20)]]


def test_rows_are_pooled_in_order_and_split_once(make_experiment, rows, tmp_path, capsys):
    for row in rows[12:]:
        row["only here"] = "x"
    paths = [write_jsonl(tmp_path / "a.jsonl", rows[:12]), write_jsonl(tmp_path / "b.jsonl", rows[12:])]
    sets = [{"path": paths[0]}, {"path": paths[1], "max_samples": 9}]
    experiment = load_experiment(make_experiment([], dataset=sets, max_samples=11))
    split, numbers = training_split(experiment), split_numbers(experiment)
    said = capsys.readouterr().err
    assert "dataset a.jsonl: first 11 of 12 rows\n" in said and "dataset b.jsonl: first 9 of 18 rows\n" in said
    assert data_sets(experiment) == [("a", 0, 11), ("b", 11, 9)]
    pooled = [row | {"only here": None} for row in rows[:11]] + rows[12:21]
    for name in ("train", "eval"):
        assert [row_id(row) for row in rows_of(experiment, name)] == [row_id(pooled[i]) for i in numbers[name]]
    # The same rows in one file: the same split.
    one = load_experiment(make_experiment(pooled, "one", output_dir=str(tmp_path / "one")))
    assert training_split(one).ids == split.ids
    assert training_split(one).fingerprint == split.fingerprint
    # Each file, its format and its number of rows count.
    for change in ([{"path": paths[0]}, {"path": paths[1]}], sets[::-1], [*sets, sets[1] | {"name": "c"}]):
        with pytest.raises(UserError, match="belongs to other data"):
            training_split(load_experiment(make_experiment([], dataset=change, max_samples=11)))
        with pytest.raises(UserError, match="belongs to other data"):
            data_sets(load_experiment(make_experiment([], dataset=change, max_samples=11)))
    renamed = [sets[0] | {"name": "first", "quota": 0.5}, sets[1]]
    experiment = load_experiment(make_experiment([], dataset=renamed, max_samples=11))
    assert training_split(experiment).ids == split.ids
    assert [name for name, *_ in data_sets(experiment)] == ["first", "b"]


def test_columns_that_do_not_go_together_are_named(make_experiment, rows, tmp_path):
    paths = [write_jsonl(tmp_path / "a.jsonl", rows[:12])]
    paths.append(write_jsonl(tmp_path / "b.jsonl", [row | {"id": 3} for row in rows[12:]]))
    experiment = load_experiment(make_experiment([], dataset=[{"path": path} for path in paths]))
    with pytest.raises(
        UserError, match=r"column id is Value\('int64'\) in .*b\.jsonl and Value\('string'\) in .*a\.js"
    ):
        training_split(experiment)
    assert not (experiment.data_folder / "split.json").exists()


@pytest.mark.parametrize(
    ("sets", "why"),
    [
        ([{"path": "a.json"}, {"path": "x/a.jsonl"}], "more than one data set is called a:"),
        (
            [{"path": "a", "quota": 0.7}, {"path": "b", "quota": 0.4}],
            "the quotas sum to 1.1: they must sum to at most 1",
        ),
        ([{"path": "a", "quota": 0.7}, {"path": "b", "quota": 0.2}], "must sum to 1 where every data set has one"),
        ([{"path": "a", "quota": 0}], "key dataset.0.quota: Input should be greater than 0"),
        ([{"path": "a", "name": "../b"}], "key dataset.0.name: String should match"),
        ([{"name": "a"}], "key dataset.0.path is missing: add it$"),
        ([{"path": "a", "weight": 1}], "unknown key dataset.0.weight"),
        ([], "key dataset: List should have at least 1 item"),
        (3, "key dataset: Input should be a valid string, not 3"),
    ],
)
def test_lists_of_data_sets_that_cannot_be_are_refused(make_experiment, sets, why):
    with pytest.raises(UserError, match=why):
        load_experiment(make_experiment([], dataset=sets))


# Quotas


@st.composite
def quota_cases(draw) -> tuple[Quotas, float]:
    """Data sets of any sizes, quotas that can be met and that cannot, and a rate."""
    sizes = draw(st.lists(st.integers(0, 60), min_size=2, max_size=5).filter(any))
    tenths = [draw(st.integers(0, 10)) for _ in sizes]
    while sum(tenths) > 10:
        tenths[tenths.index(max(tenths))] -= 1
    if draw(st.booleans()) and all(tenths):
        tenths[-1] += 10 - sum(tenths)
    quotas = [tenth / 10 if tenth else None for tenth in tenths]
    if None not in quotas and sum(tenths) < 10:
        quotas[draw(st.integers(0, len(sizes) - 1))] = None
    data_set = np.repeat(np.arange(len(sizes)), sizes)
    np.random.default_rng(draw(st.integers(0, 99))).shuffle(data_set)
    rate = draw(st.integers(math.ceil(100 / len(data_set)), 100)) / 100
    return Quotas([f"set{i}" for i in range(len(sizes))], quotas, sizes, data_set), rate


def exact(quota: float, m: int) -> Fraction:
    return Fraction(str(quota)) * m


@by_property
@given(quota_cases())
def test_shares_sum_to_m_and_are_the_floors_of_the_quotas(case):
    quotas, rate = case
    m, sizes = coreset_size(rate, len(quotas.data_set)), quotas.num_rows
    wanted = {j: math.floor(exact(quota, m)) for j, quota in enumerate(quotas.quotas) if quota}
    free = [j for j in range(len(sizes)) if j not in wanted]
    rest = m - sum(wanted.values())
    if over := [j for j, count in wanted.items() if count > sizes[j]]:
        with pytest.raises(
            ValueError, match=f"asks for {wanted[over[0]]} rows of data set set{over[0]}.* {sizes[over[0]]} to"
        ):
            shares(quotas, m)
    elif free and rest > (room := sum(sizes[j] for j in free)):
        with pytest.raises(ValueError, match=f"leave {rest} rows of a coreset of {m} to .* with {room} to choose from"):
            shares(quotas, m)
    else:
        got = shares(quotas, m)
        assert sum(count for _, count in got) == m
        assert sorted(j for together, _ in got for j in together) == list(range(len(sizes)))
        for together, count in got:
            assert count <= sum(sizes[j] for j in together)
            if together == free:
                assert count == rest
            elif free:
                assert [count] == [wanted[j] for j in together]
            else:
                assert wanted[together[0]] <= count


def test_rows_that_the_floors_leave_over_go_to_the_largest_fractions():
    data_set = np.repeat([0, 1, 2], [10, 10, 10])
    names, sizes = ["a", "b", "c"], [10, 10, 10]
    assert shares(Quotas(names, [0.25, 0.5, 0.25], sizes, data_set), 7) == [([0], 2), ([1], 3), ([2], 2)]
    assert shares(Quotas(names, [0.2, 0.3, 0.5], sizes, data_set), 11) == [([0], 2), ([1], 3), ([2], 6)]
    data_set = np.repeat([0, 1, 2], [1, 3, 26])  # b has no more to give than its floor
    assert shares(Quotas(names, [0.1, 0.29, 0.61], [1, 3, 26], data_set), 13) == [([0], 1), ([1], 3), ([2], 9)]


def columns_for(method: str, num_rows: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    every = {
        "n_response_tokens": rng.integers(1, 20, num_rows).astype(float),
        "hidden_state": rng.normal(size=(num_rows, 3)).astype(np.float32),
    }
    return {name: every.get(name, rng.integers(0, 30, num_rows) / 7) for name in columns_of(method, "published")}


METHODS = ["random", "length", "grand", "el2n", "ccs", "moderate", "entropy", "staff", "staff released"]


def rule_of(method: str, num_rows: int, seed: int, quotas: Quotas | None):
    """The method's coreset by rate, and the scores and strata of STAFF's."""
    from selection.run.config import Selection

    if not method.startswith("staff"):
        selection = Selection(num_strata=4, seed=seed)
        return baseline_by_rate(method, columns_for(method, num_rows, seed), num_rows, selection, quotas), None
    scores = np.random.default_rng(seed).integers(0, 30, num_rows) / 7
    strata = stratify(scores, 4, 0.1)
    ratios = [0.5 + i / 3 for i in range(len(strata.members))]
    mode = "released" if "released" in method else "paper"
    rule = by_rate(
        lambda m, within: choose_staff(scores, strata.within(within), ratios, m, mode, seed), num_rows, quotas
    )
    return rule, (scores, strata, ratios, mode)


@pytest.mark.parametrize("method", METHODS)
@by_property
@given(quota_cases(), st.integers(0, 3))
def test_a_coreset_with_quotas_has_m_rows_and_of_each_data_set_its_share(method, case, seed):
    quotas, rate = case
    m = coreset_size(rate, len(quotas.data_set))
    choose, _ = rule_of(method, len(quotas.data_set), seed, quotas)
    try:
        wanted = shares(quotas, m) if any(quotas.quotas) else [(list(range(len(quotas.names))), m)]
    except ValueError as error:
        with pytest.raises(ValueError) as refusal:
            choose(rate)
        assert str(refusal.value) == str(error)
        return
    choice = choose(rate)
    assert len(choice.rows) == m == len(set(choice.rows.tolist()))
    assert (np.diff(choice.rows) > 0).all()
    for together, count in wanted:
        assert np.isin(quotas.data_set[choice.rows], together).sum() == count
    assert [entry["chosen"] for entry in quotas.record(choice.rows)] == np.bincount(
        quotas.data_set[choice.rows], minlength=len(quotas.names)
    ).tolist()
    if choice.budgets:
        assert sum(choice.budgets) + choice.from_hardest == m
        assert np.isin(choice.fill, choice.rows).all() and len(choice.fill) == sum(choice.filled)


@pytest.mark.parametrize("method", ["random", "grand", "moderate"])
@by_property
@given(quota_cases(), st.integers(0, 3))
def test_of_an_order_over_all_rows_each_data_set_gives_its_first(method, case, seed):
    quotas, rate = case
    num_rows = len(quotas.data_set)
    if method == "random":
        order = np.argsort(random_ranks(num_rows, seed, RANDOM))
    elif method == "grand":
        order = np.argsort(-columns_for(method, num_rows, seed)["effort"], kind="stable")
    else:
        order = moderate_order(columns_for(method, num_rows, seed)["hidden_state"])
    try:
        wanted = shares(quotas, coreset_size(rate, num_rows)) if any(quotas.quotas) else None
    except ValueError:
        return
    if wanted is None:
        wanted = [(list(range(len(quotas.names))), coreset_size(rate, num_rows))]
    literal = [row for together, m in wanted for row in [r for r in order if quotas.data_set[r] in together][:m]]
    assert rule_of(method, num_rows, seed, quotas)[0](rate).rows.tolist() == sorted(literal)


@pytest.mark.parametrize("mode", ["staff", "staff released"])
@by_property
@given(st.integers(0, 30), st.integers(2, 10))
def test_staff_inside_a_data_set_is_staff_on_its_rows_of_the_strata(mode, seed, tenths):
    """Against a literal Algorithm 1 on the strata's rows of each data set."""
    from selection.method.staff import allocate_budgets, choose_within_strata

    num_rows = 80
    data_set = np.random.default_rng(seed).integers(0, 2, num_rows)
    sizes = np.bincount(data_set, minlength=2).tolist()
    quotas = Quotas(["a", "b"], [0.3, None], sizes, data_set)
    rate = tenths / 25
    choose, (scores, strata, ratios, how) = rule_of(mode, num_rows, seed, quotas)
    choice, m = choose(rate), coreset_size(rate, num_rows)
    first = math.floor(Fraction(3, 10) * m)
    budgets = np.zeros(len(strata.members), dtype=int)
    for number, size in ((0, first), (1, m - first)):
        inside = [[row for row in rows if data_set[row] == number] for rows in strata.members]
        full = [i for i, rows in enumerate(inside) if rows]  # empty strata vanish
        here = type(strata)(
            [np.array(inside[i]) for i in full],
            [strata.score_ranges[i] for i in full],
            np.array([row for row in strata.hardest if data_set[row] == number], dtype=int),
        )
        given = allocate_budgets(here.sizes, [ratios[i] for i in full], size, how)
        part = choose_within_strata(scores, here, given, size, how, seed)
        assert np.array_equal(part.rows, [row for row in choice.rows if data_set[row] == number])
        budgets[full] += part.budgets
    assert choice.budgets == budgets.tolist()


def test_without_a_quota_data_sets_change_nothing():
    data_set = np.arange(50) % 2
    for method in METHODS:
        quotas = Quotas(["a", "b"], [None, None], [25, 25], data_set)
        for rate in (0.1, 0.5, 0.95):
            plain, other = (rule_of(method, 50, 1, each)[0](rate) for each in (None, quotas))
            assert plain.rows.tolist() == other.rows.tolist()
            assert (plain.budgets, plain.filled) == (other.budgets, other.filled)


def test_which_data_set_a_row_is_of(make_experiment, rows, tmp_path):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in (("a", rows[:7]), ("b", rows[7:]))]
    sets = [{"path": paths[0], "quota": 0.5}, {"path": paths[1]}]
    experiment = load_experiment(make_experiment([], dataset=sets))
    split, of_a = training_split(experiment), {row_id(row) for row in rows[:7]}

    def scores(index, left_out=()):
        return Scores(np.array(index), {}, None, None, 24, "scores", np.array(left_out, dtype=int))

    quotas = quotas_of(experiment, scores(range(24)))
    assert quotas.data_set.tolist() == [0 if each in of_a else 1 for each in split.ids]
    assert quotas.num_rows == np.bincount(quotas.data_set).tolist()
    without = quotas_of(experiment, scores([i for i in range(24) if i != 3], [3]))  # a row that scoring left out
    assert without.data_set.tolist() == [set_ for i, set_ in enumerate(quotas.data_set) if i != 3]
    assert without.num_rows == quotas.num_rows
    with pytest.raises(UserError, match="scores has 23 rows, the training split 24"):
        quotas_of(experiment, scores(range(23)))
    one = load_experiment(make_experiment(rows, "one", output_dir=str(tmp_path / "one")))
    assert quotas_of(one, scores(range(24))) is None and quotas_of(None, scores(range(24))) is None


@pytest.fixture
def cut(monkeypatch):
    """Runs coreset.py in this process."""
    monkeypatch.setattr(sys, "path", sys.path.copy())  # the script changes it
    main = importlib.import_module("selection.coreset").main

    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["coreset.py", *map(str, arguments)])
        main()

    return call


def test_the_coreset_file_says_what_each_data_set_gave(cut, make_experiment, rows, tmp_path, capsys):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in (("a", rows[:7]), ("b", rows[7:]))]
    sets = [{"path": paths[0]}, {"path": paths[1], "name": "late", "quota": 0.75}]
    config = make_experiment([], dataset=sets)
    split, of_a = training_split(load_experiment(config)), {row_id(row) for row in rows[:7]}
    in_a = [each in of_a for each in split.ids]
    effort = np.random.default_rng(0).lognormal(size=24)
    pa.csv.write_csv(pa.table({"index": np.arange(24), "effort": effort}), tmp_path / "scores.csv")
    given = ["--config_path", config, "--scores", tmp_path / "scores.csv", "--target_scores", tmp_path / "scores.csv"]
    cut(*given, "--method", "staff", "grand", "random", "--rate", 0.4)
    for method in ("staff", "grand", "random"):
        record = read_json(tmp_path / "run" / "coresets" / f"{method}-0.4.json")
        assert record["size"] == len(record["indices"]) == 9
        from_a = sum(in_a[i] for i in record["indices"])
        assert record["data_sets"] == [
            {"name": "a", "rows": sum(in_a), "chosen": from_a, "quota": None},
            {"name": "late", "rows": 24 - sum(in_a), "chosen": 9 - from_a, "quota": 0.75},
        ]
        assert from_a == 3  # 9 − ⌊0.75 · 9⌋
    said = f"leave 6 rows of a coreset of 24 to data set a, with {sum(in_a)} to choose from"
    with pytest.raises(UserError, match=said if sum(in_a) < 6 else "asks for 18 rows of data set late, which has 17"):
        cut(*given, "--method", "grand", "--rate", 1.0)
    assert not (tmp_path / "run" / "coresets" / "grand-1.json").exists()
    # One data set: the file is as it was.
    one = make_experiment(rows, "one", output_dir=str(tmp_path / "one"))
    training_split(load_experiment(one))
    cut("--config_path", one, *given[2:], "--method", "grand", "--rate", 0.4)
    assert "data_sets" not in read_json(tmp_path / "one" / "coresets" / "grand-0.4.json")


# Published lists


@pytest.mark.parametrize("name", PUBLISHED_ROWS)
@pytest.mark.parametrize("rate", PUBLISHED_RATES)
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_a_published_list_fits_its_own_data_alone(name, rate, off):
    num_rows = PUBLISHED_ROWS[name]
    count = math.floor(Fraction(str(rate)) * num_rows) + off
    assert check_published(count, num_rows, "list.pt") is None
    for other, rows in PUBLISHED_ROWS.items():
        if other != name:
            with pytest.raises(
                UserError, match=f"list.pt: {count:,} rows are .* of {name} at rate {rate:g} .*{rows:,}"
            ):
                check_published(count, rows, "list.pt")
    assert PUBLISHED_ROWS[name] in (22_504, 13_014, 115_784)


def test_a_list_of_no_published_length_is_taken_with_a_line():
    count = math.floor(0.1 * 13_014) + 2
    line = check_published(count, 13_014, "list.pt")
    assert line.startswith(f"list.pt: {count:,} rows are no published rate") and "13,014" in line
    assert check_published(50, 1000, "list.pt") is not None
    assert check_published(101, 1000, "list.pt") is None


def test_only_a_pt_list_is_held_against_the_published_lengths(tmp_path, capsys):
    import torch

    ids = [f"id{row}" for row in range(1000)]
    torch.save(list(range(50)), tmp_path / "some.pt")
    (tmp_path / "some.json").write_text(json.dumps({"indices": list(range(50))}))
    check_fits(read_coreset(tmp_path / "some.json"), ids, "fingerprint", "some.json")
    assert capsys.readouterr().err == ""
    check_fits(read_coreset(tmp_path / "some.pt"), ids, "fingerprint", "some.pt")
    assert "some.pt: 50 rows are no published rate" in capsys.readouterr().err
    torch.save(list(range(1301)), tmp_path / "other.pt")  # before a row is found to be outside
    with pytest.raises(UserError, match=r"other\.pt: 1,301 rows are the paper's coreset of DialogSum at rate 0\.1"):
        check_fits(read_coreset(tmp_path / "other.pt"), ids, "fingerprint", "other.pt")
