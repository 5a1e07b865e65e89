"""The rows of a user's data file: JSON, JSON Lines, CSV, Parquet or Arrow."""

import codecs
import contextlib
import glob
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from selection.rows.conversation import text_columns, unusable_rows
from selection.run.config import DatasetFormat
from selection.run.errors import UserError
from selection.run.log import say, set_library_bars

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_TEXT_TYPES = ("string", "large_string", "string_view", "null")
_NO_ROWS = (  # what the readers say of a file without a row
    "corresponds to no data", "No columns to parse", "at least one example", "file size is 0 bytes"
)  # fmt: skip
_NAMED = 10  # unusable rows of a file that are named in a message
_DEEPEST = 200  # values inside of values
_JSON_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"')
_BLANK = re.compile(r"\s*")


def as_json(value: object, **options) -> str:
    """JSON text; what JSON does not know, such as the dates that `datasets` finds, is written as text."""
    return json.dumps(value, ensure_ascii=False, default=str, **options)


@contextlib.contextmanager
def reading_rows(path: Path, dataset_format: DatasetFormat) -> Iterator[tuple["datasets.Dataset", dict[int, str]]]:  # noqa: F821
    """`raw_rows` as `in_format` gives them."""
    with raw_rows(path) as rows:
        yield in_format(rows, path, dataset_format)


def in_format(
    rows: "datasets.Dataset",  # noqa: F821
    path: Path,
    dataset_format: DatasetFormat,
) -> tuple["datasets.Dataset", dict[int, str]]:  # noqa: F821
    """The rows of the file `path`; numbers and dates in a prompt's or response's column are the text that stands there.

    And what is wrong with each row that LLaMA-Factory would drop or misread, which would shift later row numbers.
    Raises: UserError where the rows lack a column."""
    rows = _with_text(rows, path, text_columns(dataset_format.entry))
    return rows, unusable_rows(rows, dataset_format.entry)


def refuse_unusable(found: Iterable[tuple[Path, int, dict[int, str]]]) -> None:
    """Raises: UserError where a file, of so many rows, has rows of which something is wrong."""
    wrong = []
    for path, num_rows, unusable in found:
        reasons = {}
        for number in list(unusable)[:_NAMED]:
            reasons.setdefault(unusable[number], []).append(str(number))
        named = "; ".join(f"row{'s' * (len(rows) > 1)} {', '.join(rows)} ({why})" for why, rows in reasons.items())
        more = f"; and {len(unusable) - _NAMED:,} more" if len(unusable) > _NAMED else ""
        if unusable:
            wrong.append(
                f"{path}: {len(unusable):,} of {num_rows:,} rows have no prompt and text response: {named}{more}"
            )
    if wrong:
        how = "mend them, describe the columns with dataset_format, or leave them out with --skip_bad_rows"
        raise UserError(f"{'; '.join(wrong)}: {how} (in a YAML: skip_bad_rows: true)")


@contextlib.contextmanager
def raw_rows(path: Path) -> Iterator["datasets.Dataset"]:  # noqa: F821
    """The rows as `datasets`, and so LLaMA-Factory, reads them; they stay on disk. Raises: UserError.

    TRL's conversational prompt and completion, which LLaMA-Factory cannot read, are one column `messages`."""
    import pandas
    from datasets import Features, Value, load_dataset

    kind, options = _READERS.get(path.suffix.lower()), {}
    if kind is None:
        raise UserError(f"{path}: a data set is a {', '.join(_READERS)} file")
    with path.open("rb") as file:
        mark = file.peek(3)[:3]
        if kind in ("json", "csv") and mark[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"{path} is written in UTF-16: save it as UTF-8")
        if kind == "csv" and any(b"\0" in block for block in iter(lambda: file.read(2**20), b"")):
            raise UserError(f"{path} holds a NUL byte, which pandas would leave out: save it as UTF-8")
    if kind == "json":
        _check_json(path)
        options = {"encoding": "utf-8-sig" if mark == codecs.BOM_UTF8 else "utf-8"}
    elif kind == "csv":
        options = {"keep_default_na": False}  # or pandas takes the words null, NA and None for nothing
    set_library_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it says its errors and raises them
    with tempfile.TemporaryDirectory() as cache:
        options |= {"data_files": glob.escape(str(path)), "split": "train", "cache_dir": cache}
        try:
            try:
                rows = load_dataset(kind, **options)
            except Exception:
                if kind != "csv":
                    raise
                # A column may begin with numbers and go on with words: read all columns as text.
                text = Features({name: Value("string") for name in pandas.read_csv(path, nrows=0).columns})
                rows = load_dataset(kind, features=text, **options)
            rows.data.validate(full=True)  # finds text that is no UTF-8
        except Exception as error:  # each reader raises its own kinds
            said = (_mixed_column(path) if kind == "json" else None) or error.__cause__ or error
            if any(text in str(said) for text in _NO_ROWS):
                raise UserError(f"{path} has no rows") from None
            raise UserError(f"cannot read rows from {path}: {said}") from None
        yield _with_messages(rows, Path(cache))


def _with_messages(rows: "datasets.Dataset", cache: Path) -> "datasets.Dataset":  # noqa: F821
    """Join prompt and completion where both are lists of messages; a row that lacks one keeps what it has."""
    pair = ["prompt", "completion"]
    kinds = [rows.features.arrow_schema.field(name).type for name in pair if name in rows.column_names]
    if "messages" in rows.column_names or sum(map(_holds_messages, kinds)) < len(pair):
        return rows
    set_library_bars(long_work=len(rows) >= 10_000)
    return rows.map(
        lambda row: {"messages": [message for name in pair for message in row[name] or []]},
        remove_columns=pair,
        cache_file_name=str(cache / "messages.arrow"),
        load_from_cache_file=False,
    )


def _holds_messages(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    fields = kind.value_type if is_list and pa.types.is_struct(kind.value_type) else []
    return {"role", "content"} <= {field.name for field in fields}


def _with_text(rows: "datasets.Dataset", path: Path, columns: list[str]) -> "datasets.Dataset":  # noqa: F821
    """Give numbers, truth values and dates in `columns` as the file writes them (Parquet, Arrow: as JSON would)."""
    import pandas
    from datasets import Value

    kinds, kind = rows.features, _READERS[path.suffix.lower()]
    odd = [name for name in columns if isinstance(kinds.get(name), Value) and kinds[name].dtype not in _TEXT_TYPES]
    if not odd:
        return rows
    try:
        if kind in ("parquet", "arrow"):
            found = rows.select_columns(odd)
        elif kind == "csv":
            found = pandas.read_csv(path, dtype=str, keep_default_na=False, usecols=odd).to_dict("records")
        else:
            found = _read_json(path, parse_int=str, parse_float=str, parse_constant=str)
        values = {name: [row.get(name) for row in found] for name in odd}
    except (ValueError, AttributeError, RecursionError):  # a form that only Arrow's reader knows
        return rows
    if len(found) != len(rows):
        return rows
    for name in odd:
        say(f"dataset {path.name}: {name} holds {kinds[name].dtype}: taken as the text that stands in the file")
        texts = [value if isinstance(value, str | None) else as_json(value) for value in values[name]]
        rows = rows.remove_columns(name).add_column(name, texts, feature=Value("string"))
    return rows.select_columns(list(kinds))


def _read_json(path: Path, **options) -> list:
    """The values of a JSON or JSON Lines file. Raises: ValueError, RecursionError."""
    decoder, found, end = json.JSONDecoder(**options), [], 0
    content = path.read_text(encoding="utf-8-sig").strip()
    while end < len(content):
        value, end = decoder.raw_decode(content, _BLANK.match(content, end).end())
        found += value if isinstance(value, list) else [value]
    return found


def _check_json(path: Path) -> None:
    """Refuse what crashes Arrow's JSON reader: rows that are no objects, and values nested thousands deep."""
    depth = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            marks = _JSON_TEXT.sub(b"", line).strip()
            signs = np.frombuffer(marks, dtype=np.uint8)
            steps = np.isin(signs, list(b"[{")).astype(np.int64) - np.isin(signs, list(b"]}"))
            if len(marks) and depth + steps.cumsum().max() > _DEEPEST:
                raise UserError(f"{path}, line {number}: more than {_DEEPEST} values inside of each other")
            begins = depth or not marks or marks[:1] in b"{["
            depth += int(steps.sum())
            if depth < 0 or not begins or (depth == 0 and marks and marks[-1:] not in b"]},"):
                raise UserError(f"{path}, line {number}: no JSON object: a row is {{…}}, rows are on lines or in [ ]")


def _mixed_column(path: Path) -> str | None:
    """Name the column that is text in one row and not in another: Arrow's own message does not say it well."""
    import pandas

    with contextlib.suppress(ValueError, RecursionError, AttributeError, TypeError):  # rows that are no objects
        for name, values in pandas.DataFrame(_read_json(path), dtype=object).items():
            is_text = values.dropna().map(lambda value: isinstance(value, str))
            if is_text.nunique() > 1:
                text, other = is_text.idxmax(), is_text.idxmin()
                return f"column {name} is text in row {text} and is none in row {other}: write all of it as text"
    return None
