"""A user's data file to rows, each checked with LLaMA-Factory's own converter."""

import codecs
import contextlib
import functools
import glob
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from selection.rows.llama_factory import import_llama_factory
from selection.run.config import DatasetFormat
from selection.run.errors import UserError
from selection.run.log import say, set_library_bars


def unusable_rows(rows: Iterable[dict], dataset_format: dict[str, Any]) -> dict[int, str]:
    """What is wrong with each row that LLaMA-Factory would drop, misread or crash on, or whose response is blank.

    By row number. Raises: UserError where a row lacks a column that `dataset_format` names.
    """
    unusable = {}
    for number, row in enumerate(rows):
        try:
            if isinstance(objection := convert_row(row, dataset_format), str):
                unusable[number] = objection
        except KeyError as error:
            raise UserError(f"row {number} of the data set {_lacks(error, row)}") from None
    return unusable


def text_columns(dataset_format: dict[str, Any]) -> list[str]:
    """Columns that hold a row's text, where it is no conversation."""
    attributes = _converter(json.dumps(dataset_format, sort_keys=True)).dataset_attr
    if attributes.formatting != "alpaca":
        return []
    columns = (attributes.prompt, attributes.query, attributes.response, attributes.system)
    return [column for column in dict.fromkeys(columns) if column]


def in_common_form(rows, dataset_format: DatasetFormat, cache: Path) -> "datasets.Dataset":  # noqa: F821
    """The rows as conversations in COMMON_FORM, in the file `cache`: LLaMA-Factory makes the same tokens of them.

    Columns messages (as `as_messages` makes them) and tools (JSON text, "" for none).
    """
    from datasets import Features, Value

    if media := {"images", "videos", "audios"} & set(dataset_format.columns):
        raise UserError(f"dataset_format.columns.{min(media)}: data sets in different forms may hold text alone")
    entry, text = dataset_format.entry, Value("large_string")  # no 2 GiB a column
    set_library_bars(long_work=len(rows) >= 10_000)
    return rows.map(
        lambda row: {"messages": as_messages(row, entry), "tools": tools_of(row, entry)},
        remove_columns=rows.column_names,
        features=Features({"messages": [{"role": text, "content": text}], "tools": text}),
        cache_file_name=str(cache),
        load_from_cache_file=False,
        desc="into one form",
    )


def as_messages(row: dict, entry: dict[str, Any]) -> list[dict[str, str]]:
    """A raw row as the messages {role, content} that LLaMA-Factory makes of it; `entry` as in `dataset_info.json`.

    Roles as LLaMA-Factory has them: system (at most one, first; none where it is empty), then user or observation (a
    tool's answer) and assistant or function (a call, JSON text) in turn. The last one is the response; tuning trains
    on every assistant and function turn. Under `formatting: openai` LLaMA-Factory itself puts "detailed thinking off"
    behind the system prompt of rows without tools, or makes it one; the other forms stay as they are. Raises:
    UserError for a row that LLaMA-Factory would drop, whose response is blank, or that lacks a column; the caller
    knows which row it is.
    """
    try:
        sample = convert_row(row, entry)
    except KeyError as error:
        raise UserError(f"the row {_lacks(error, row)}") from None
    if isinstance(sample, str):
        raise UserError(f"the row has no prompt and text response ({sample}): LLaMA-Factory would drop it")
    system = [{"role": "system", "content": sample["_system"]}] if sample["_system"] else []
    return [*system, *sample["_prompt"], *sample["_response"]]


def tools_of(row: dict, entry: dict[str, Any]) -> str:
    """What a raw row says of tools, JSON text; "" for none. For a row of which `as_messages` makes messages."""
    return convert_row(row, entry)["_tools"] or ""


def _lacks(error: KeyError, row: dict) -> str:
    return (
        f"has no column {error.args[0]!r} (it has {', '.join(row)}): "
        "say under dataset_format.columns what the columns are called"
    )


def convert_row(row: dict, entry: dict[str, Any]) -> dict[str, Any] | str:
    """A raw row as LLaMA-Factory's converter makes it: _prompt, _response, _system, _tools.

    A text, what is wrong with it, where LLaMA-Factory would drop it, misread it or crash on it, and where its response
    is blank. Raises: KeyError for a missing column.
    """
    convert = _converter(json.dumps(entry, sort_keys=True))
    try:
        # Odd turns first: at an unknown role LLaMA-Factory raises a KeyError too, or drops the row without a word.
        if odd := convert.dataset_attr.formatting != "alpaca" and _odd_turns(row, convert.dataset_attr):
            return odd
        sample = convert(row)
    except (TypeError, ValueError, AttributeError):
        return "a column holds something else than text or turns"
    return _objection(sample) or sample


def _objection(sample: dict[str, Any]) -> str | None:
    """What is wrong with a row that LLaMA-Factory has converted; None: nothing."""
    if not (len(sample["_prompt"]) % 2 == 1 and len(sample["_response"]) == 1):
        return "it has not one response"
    if not all(isinstance(turn["content"], str) for turn in sample["_prompt"] + sample["_response"]):
        return "its prompt or response is no text"
    if not sample["_response"][0]["content"].strip():
        return "its response is blank"
    if not isinstance(sample["_system"] or "", str):
        return "its system prompt is no text"
    try:
        if sample["_tools"]:
            json.loads(sample["_tools"])
    except (TypeError, ValueError):
        return "its tools are no text that holds JSON"
    return None


def _odd_turns(row: dict[str, Any], attributes) -> str | None:
    """What is wrong with the turns of a conversation, counted from 0 with the system's; None: nothing.

    Raises: KeyError where there is no such column, TypeError where it holds no list of turns.
    """
    turns, role, content = row[attributes.messages], attributes.role_tag, attributes.content_tag
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise TypeError
        if absent := [tag for tag in (role, content) if tag not in turn]:
            said = f"turn {number} has no {absent[0]!r} (it has {', '.join(turn)})"
            return f"{said}: say under dataset_format.tags what it is called"
    roles = [turn[role] for turn in turns]
    begins = 1 if roles and attributes.system_tag and roles[0] == attributes.system_tag else 0
    asks = [tag for tag in (attributes.user_tag, attributes.observation_tag) if tag]
    answers = [tag for tag in (attributes.assistant_tag, attributes.function_tag) if tag]
    asked = False
    for number, name in enumerate(roles[begins:], start=begins):
        # Several results of tools in a row are one turn of the openai form.
        if asked and attributes.formatting == "openai" and name == attributes.observation_tag == roles[number - 1]:
            continue
        wanted = answers if asked else asks
        if name not in wanted:
            return f"turn {number} is of {name!r} where one of {' or '.join(map(repr, wanted))} is due"
        asked = not asked
    if asked or len(roles) == begins:
        return f"it ends without a turn of {' or '.join(map(repr, answers))}"
    return None


@functools.lru_cache
def _converter(entry: str) -> Callable[[dict], dict]:
    import_llama_factory()
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.hparams import DataArguments

    attributes = DatasetAttr("file", dataset_name="rows")
    attributes.join(json.loads(entry))
    return get_dataset_converter(attributes.formatting, attributes, DataArguments())


def as_json(value: object, **options) -> str:
    """Dates and the like, which `datasets` finds in columns that nobody trains on, are written as text."""
    return json.dumps(value, ensure_ascii=False, default=str, **options)


_DEEPEST = 200  # values inside of values
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"')


def _check_json(path: Path) -> None:
    """Refuse what Arrow's JSON reader crashes on: rows that are no objects, and values nested some thousand times.

    Raises: UserError naming the line of a JSON or JSON Lines file.
    """
    depth = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            marks = _TEXT.sub(b"", line).strip()
            steps = np.frombuffer(marks, dtype=np.uint8)
            steps = np.isin(steps, list(b"[{")).astype(np.int64) - np.isin(steps, list(b"]}"))
            if len(marks) and depth + steps.cumsum().max() > _DEEPEST:
                raise UserError(f"{path}, line {number}: more than {_DEEPEST} values inside of each other")
            before, depth = depth, depth + int(steps.sum())
            begins = before or not marks or marks[:1] in b"{["
            if depth < 0 or not begins or (depth == 0 and marks and marks[-1:] not in b"]},"):
                raise UserError(f"{path}, line {number}: no JSON object: a row is {{…}}, rows are on lines or in [ ]")


_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@contextlib.contextmanager
def reading_rows(path: Path, dataset_format: DatasetFormat) -> Iterator["datasets.Dataset"]:  # noqa: F821
    """`raw_rows`, every one put through LLaMA-Factory's converter.

    It drops rows without a response silently, which would shift every later row number. Where prompt or response is a
    column of numbers, or of what is taken for numbers or dates, the text in the file counts. Raises: UserError, naming
    the rows (counted from 0, as everywhere).
    """
    with raw_rows(path) as rows:
        rows = _with_text(rows, path, text_columns(dataset_format.entry))
        if unusable := unusable_rows(rows, dataset_format.entry):
            first, *_ = unusable
            named = ", ".join(map(str, itertools.islice(unusable, 5)))
            raise UserError(
                f"{path}: {len(unusable)} of {len(rows)} rows have no prompt and text response, first row {named} "
                f"(row {first}: {unusable[first]}): LLaMA-Factory would drop them or fail; mend or remove them, or "
                "describe the columns with dataset_format"
            )
        yield rows


def _with_text(rows: "datasets.Dataset", path: Path, columns: list[str]) -> "datasets.Dataset":  # noqa: F821
    """The rows, with those of `columns` that were read as numbers, truth values or dates as they stand in the file."""
    from datasets import Value

    names, kinds = rows.column_names, rows.features
    odd = [name for name in columns if isinstance(kinds.get(name), Value) and kinds[name].dtype not in _TEXT_TYPES]
    if not odd:
        return rows
    try:
        texts = _texts(rows, path, odd)
    except (ValueError, AttributeError, RecursionError):  # of a form that only the reader above knows
        return rows
    if any(len(text) != len(rows) for text in texts.values()):
        return rows
    for name in odd:
        say(f"dataset {path.name}: {name} holds {kinds[name].dtype}: taken as the text that stands in the file")
        rows = rows.remove_columns(name).add_column(name, texts[name], feature=Value("string"))
    return rows.select_columns(names)


_BLANK = re.compile(r"\s*")
_TEXT_TYPES = ("string", "large_string", "string_view", "null")


def _texts(rows: "datasets.Dataset", path: Path, columns: list[str]) -> dict[str, list[str | None]]:  # noqa: F821
    """These columns' values as the file writes them; Parquet, which writes none, as JSON would."""
    kind = _READERS[path.suffix.lower()]
    if kind == "csv":
        import pandas

        table = pandas.read_csv(path, dtype=str, keep_default_na=False, usecols=columns)
        return {name: table[name].tolist() for name in columns}
    if kind == "parquet":
        return {name: [None if v is None else _written(v) for v in rows[name]] for name in columns}
    found = _json_rows(path, json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str))
    values = {name: [row.get(name) for row in found] for name in columns}
    return {name: [v if v is None else _written(v) for v in column] for name, column in values.items()}


def _json_rows(path: Path, decoder: json.JSONDecoder) -> list:
    """Raises: ValueError, RecursionError where the file is no JSON or JSON Lines."""
    found, content, end = [], path.read_text(encoding="utf-8-sig").strip(), 0
    while end < len(content):
        value, end = decoder.raw_decode(content, _BLANK.match(content, end).end())
        found += value if isinstance(value, list) else [value]
    return found


def _mixed_column(path: Path) -> str | None:
    """What Arrow, which reads a column as of one kind, does not say well: where text stands beside something else."""
    first: dict[str, tuple[int, bool]] = {}
    try:
        for number, row in enumerate(_json_rows(path, json.JSONDecoder())):
            for name, value in row.items():
                if value is None:
                    continue
                before, was_text = first.setdefault(name, (number, isinstance(value, str)))
                if isinstance(value, str) != was_text:
                    text, other = (before, number) if was_text else (number, before)
                    return f"column {name} is text in row {text} and is none in row {other}: write all of it as text"
    except (ValueError, RecursionError, AttributeError):
        return None
    return None


def _all_text(path: Path) -> "datasets.Features":  # noqa: F821
    """The columns of a CSV file, each as text."""
    import pandas
    from datasets import Features, Value

    return Features({name: Value("string") for name in pandas.read_csv(path, nrows=0).columns})


def _written(value: Any) -> str:
    return value if isinstance(value, str) else as_json(value)


@contextlib.contextmanager
def raw_rows(path: Path) -> Iterator["datasets.Dataset"]:  # noqa: F821
    """Rows of a JSON, JSONL, CSV or Parquet file as `datasets` reads them, and so as LLaMA-Factory sees them.

    They stay on disk. Raises: UserError for a file that cannot be read.
    """
    from datasets import load_dataset

    kind = _READERS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path}: a data set is a {', '.join(_READERS)} file")
    with path.open("rb") as file:
        mark = file.read(3)
        file.seek(0)
        nul = kind == "csv" and any(b"\0" in block for block in iter(lambda: file.read(2**20), b""))
    if kind != "parquet" and mark[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"{path} is written in UTF-16: save it as UTF-8")
    if nul:  # which pandas leaves out without a word
        raise UserError(f"{path} holds a NUL byte: it is damaged, or no text: save it as UTF-8")
    if kind == "json":
        _check_json(path)
    set_library_bars()
    with tempfile.TemporaryDirectory() as cache:
        source = path
        if kind == "json" and mark == codecs.BOM_UTF8:  # which is not everywhere passed over
            source = Path(cache) / "without_mark.json"
            with path.open("rb") as file, source.open("wb") as copy:
                file.seek(len(mark))
                shutil.copyfileobj(file, copy)
        try:
            options = {"data_files": glob.escape(str(source)), "split": "train", "cache_dir": cache}
            if kind == "csv":  # else pandas takes the words null, NA and None for nothing
                options["keep_default_na"] = False
            try:
                rows = load_dataset(kind, **options)
            except Exception:
                if kind != "csv":
                    raise
                # A column of numbers in its first rows and of words in later ones: then all are text.
                rows = load_dataset(kind, features=_all_text(source), **options)
            rows.data.validate(full=True)  # text that is no UTF-8 would be found out row by row, or never
        except Exception as error:  # each reader raises its own kinds
            said = (_mixed_column(path) if kind == "json" else None) or error.__cause__ or error
            raise UserError(f"cannot read rows from {path}: {said}") from None
        yield rows
