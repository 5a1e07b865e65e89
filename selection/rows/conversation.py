"""A raw row as the conversation that LLaMA-Factory's own converter makes of it, or what is wrong with the row."""

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from selection.rows.llama_factory import import_llama_factory
from selection.run.config import DatasetFormat
from selection.run.errors import UserError
from selection.run.log import set_library_bars


def unusable_rows(rows: Iterable[dict], entry: dict[str, Any]) -> dict[int, str]:
    """What is wrong with each row that LLaMA-Factory would drop, misread or crash on, by row number.

    `entry`: the data set's in `dataset_info.json`. Raises: UserError where a row lacks a column."""
    converted = (convert_row(row, entry, f"row {number} of the data set") for number, row in enumerate(rows))
    return {number: sample for number, sample in enumerate(converted) if isinstance(sample, str)}


def text_columns(entry: dict[str, Any]) -> list[str]:
    """Columns that hold a row's text; none for conversations."""
    form = _converter(json.dumps(entry)).dataset_attr
    columns = (form.prompt, form.query, form.response, form.system) if form.formatting == "alpaca" else ()
    return [column for column in dict.fromkeys(columns) if column]


def in_common_form(rows, dataset_format: DatasetFormat, cache: Path) -> "datasets.Dataset":  # noqa: F821
    """The rows in COMMON_FORM, of which LLaMA-Factory makes the same tokens; they lie in the file `cache`."""
    from datasets import Features, Value

    if media := {"images", "videos", "audios"} & set(dataset_format.columns):
        raise UserError(f"dataset_format.columns.{min(media)}: data sets in different forms may hold text alone")
    entry, text = dataset_format.entry, Value("large_string")  # a column of `string` ends at 2 GiB
    set_library_bars(long_work=len(rows) >= 10_000)
    features = Features({"messages": [{"role": text, "content": text}], "tools": text})
    options = {"remove_columns": rows.column_names, "features": features, "desc": "into one form"}
    return rows.map(
        lambda row: {"messages": as_messages(row, entry), "tools": convert_row(row, entry)["_tools"] or ""},
        **options | {"cache_file_name": str(cache), "load_from_cache_file": False},
    )


def as_messages(row: dict, entry: dict[str, Any]) -> list[dict[str, str]]:
    """A raw row as the messages {role, content} that LLaMA-Factory trains on; the last one is the response.

    Roles: system (at most one, first, never empty), then user or observation (a tool's answer) and assistant or
    function (a call, JSON text) in turn. Raises: UserError for a row that is unusable or lacks a column."""
    sample = convert_row(row, entry)
    if isinstance(sample, str):
        raise UserError(f"the row has no prompt and text response ({sample}): LLaMA-Factory would drop it")
    system = [{"role": "system", "content": sample["_system"]}] if sample["_system"] else []
    return [*system, *sample["_prompt"], *sample["_response"]]


def convert_row(row: dict, entry: dict[str, Any], name: str = "the row") -> dict[str, Any] | str:
    """LLaMA-Factory's _prompt, _response, _system and _tools of a raw row, or a text: what is wrong with it.

    Raises: UserError with `name` where the row lacks a column."""
    convert = _converter(json.dumps(entry))
    try:
        # Turns first: at an unknown role LLaMA-Factory raises a KeyError, or drops the row without a word.
        if convert.dataset_attr.formatting != "alpaca" and (odd := _odd_turns(row, convert.dataset_attr)):
            return odd
        sample = convert(row)
    except KeyError as error:
        lacks = f"{name} has no column {error.args[0]!r} (it has {', '.join(row)})"
        raise UserError(f"{lacks}: name the columns under dataset_format.columns") from None
    except (TypeError, ValueError, AttributeError):
        return "a column holds something else than text or turns"
    if len(sample["_prompt"]) % 2 == 0 or len(sample["_response"]) != 1:
        return "it has not one response"
    texts = [turn["content"] for turn in sample["_prompt"] + sample["_response"]]
    if not all(isinstance(text, str) for text in [*texts, sample["_system"] or ""]):
        return "its prompt, response or system prompt is no text"
    if not texts[-1].strip():
        return "its response is blank"
    try:
        json.loads(sample["_tools"] or "[]")
    except (TypeError, ValueError):
        return "its tools are no text that holds JSON"
    return sample


def _odd_turns(row: dict[str, Any], form) -> str | None:
    """What is wrong with the turns, counted from 0; None: nothing. Raises: AttributeError, TypeError for no turns."""
    asks = [tag for tag in (form.user_tag, form.observation_tag) if tag]
    answers = [tag for tag in (form.assistant_tag, form.function_tag) if tag]
    due, before = asks, None
    for number, turn in enumerate(row[form.messages]):
        if lacking := {form.role_tag, form.content_tag} - turn.keys():
            has = f"it has {', '.join(turn)}"
            return f"turn {number} has no {min(lacking)!r} ({has}): name it under dataset_format.tags"
        role = turn[form.role_tag]
        if number == 0 and form.system_tag and role == form.system_tag:
            continue
        # Under openai several tool results in a row are one turn.
        if form.formatting == "openai" and role == before == form.observation_tag:
            continue
        if role not in due:
            return f"turn {number} is of {role!r} where one of {' or '.join(map(repr, due))} is due"
        due, before = answers if due is asks else asks, role
    return None if before in answers else f"it ends without a turn of {' or '.join(map(repr, answers))}"


@functools.lru_cache
def _converter(entry: str) -> Callable[[dict], dict]:
    import_llama_factory()
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.hparams import DataArguments

    attributes = DatasetAttr("file", dataset_name="rows")
    attributes.join(json.loads(entry))
    return get_dataset_converter(attributes.formatting, attributes, DataArguments())
