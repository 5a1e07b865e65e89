"""One split for every stage: the pooled rows, cut once, written as LLaMA-Factory data sets in the run folder.

The split is the one that LLaMA-Factory makes with `val_size` and `seed` (`datasets`' train_test_split on all rows),
so row i of our training split is row i of its train part, and published index lists fit. After it no stage splits
again: `train`, `eval` and every coreset are data sets of their own in `<run folder>/data/dataset_info.json`.
"""

import codecs
import contextlib
import glob
import hashlib
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
import pyarrow as pa
from pydantic import NonNegativeInt
from typing_extensions import TypedDict

from finetune import llama_factory
from selection.config import DatasetFormat, Experiment, from_repository
from selection.errors import UserError
from selection.files import (
    atomic_path,
    checked,
    digest,
    file_digest,
    first_difference,
    locked,
    read_json,
    read_sealed,
    write_json,
    write_sealed,
)
from selection.log import say, set_library_bars
from selection.processes import processes


@dataclass(frozen=True)
class TrainingSplit:
    """The training split's identity. `ids[i]` is the content hash of row i, `fingerprint` that of all in order."""

    rows: "datasets.Dataset"  # noqa: F821  of the raw rows, memory-mapped
    ids: list[str]
    fingerprint: str


def row_id(row: dict) -> str:
    """Content hash of a raw row, 16 hex digits: the same wherever and in whatever order the row stands."""
    return digest(_as_json(row, sort_keys=True).encode())[:16]


def _as_json(value: object, **options) -> str:
    """Dates and the like, which `datasets` finds in columns that nobody trains on, are written as text."""
    return json.dumps(value, ensure_ascii=False, default=str, **options)


def training_split(experiment: Experiment) -> TrainingSplit:
    """Load the training split, making it on the first call; of several processes the leader makes it.

    Raises: UserError for a data file that cannot be read, without usable rows, with rows without a response, and
    where the run folder holds the split of other data.
    """
    with processes().leader_first():
        return _training_split(experiment)


def held_out_ids(experiment: Experiment) -> list[str]:
    """`row_id` of each held-out row; the split must be made."""
    return [row_id(row) for row in rows_of(experiment, "eval")]


def existing_split(experiment: Experiment) -> TrainingSplit | None:
    """The training split where it has been made, else None; for a dry run, which writes nothing.

    Raises: as `training_split`.
    """
    wanted, record_path = _made_from(experiment), experiment.data_folder / "split.json"
    return _checked(experiment, read_sealed(record_path), wanted) if record_path.exists() else None


def finished_split(experiment: Experiment) -> TrainingSplit:
    """The training split of a run in which stages have run; nothing is written.

    Raises: as `training_split`, and where there is none yet.
    """
    if (split := existing_split(experiment)) is None:
        raise UserError(f"{experiment.data_folder} has no split yet: run a stage with this run's configuration first")
    return split


def _training_split(experiment: Experiment) -> TrainingSplit:
    wanted = _made_from(experiment)
    record_path = experiment.data_folder / "split.json"
    files = [split_path(experiment, name) for name in ("train", "eval")]
    with locked(experiment.folder):  # two stages may come to need it at a time
        record = read_sealed(record_path) if record_path.exists() else {}
        if not record or (record.get("made_from") == wanted and not all(path.exists() for path in files)):
            _make_split(experiment, wanted)
            record = read_sealed(record_path)
    train = _checked(experiment, record, wanted)
    list_datasets(experiment, ["train", "eval"])
    return train


def _checked(experiment: Experiment, record: dict, wanted: dict) -> TrainingSplit:
    """The split that `record` vouches for. Raises: UserError where it is of other data, or not what was written."""
    record_path = experiment.data_folder / "split.json"
    files = [split_path(experiment, name) for name in ("train", "eval")]
    record = _checked_record(experiment, record, wanted)
    if list(map(file_digest, files)) != record.get("files"):
        raise UserError(
            f"the split in {experiment.data_folder} is damaged or was changed by hand: remove {experiment.data_folder}"
        )
    train = _identify(experiment, "train")
    if train.fingerprint != record.get("fingerprint"):
        raise UserError(f"{record_path} is of other rows than {files[0]}: remove {experiment.data_folder}")
    return train


def data_sets(experiment: Experiment) -> list[tuple[str, int, int]]:
    """Name, first pooled row and number of rows of each data set, in order; the pooled rows are what was split.

    Raises: UserError where the run folder has no split yet, or that of other data.
    """
    path = experiment.data_folder / "split.json"
    record = _checked_record(experiment, read_sealed(path), _made_from(experiment))
    counts = record.get("num_rows") or [sum(len(rows_of(experiment, name)) for name in ("train", "eval"))]
    names = [each.name for each in experiment.data_sets]
    return list(zip(names, np.cumsum([0, *counts[:-1]]).tolist(), counts, strict=True))


def recorded_fingerprint(experiment: Experiment) -> str | None:
    """The training split's fingerprint as its record says, without reading a row; None where there is no split yet.

    Data that are not on this machine are taken for those that were split. Raises: UserError where the run folder has
    the split of other data or settings.
    """
    path = experiment.data_folder / "split.json"
    if not path.exists():
        return None
    record = read_sealed(path)
    here = all(from_repository(each.path).is_file() for each in experiment.data_sets)
    wanted = _made_from(experiment) if here else _settings_of_split(experiment)
    return _checked_record(experiment, record, checked(dict, record.get("made_from"), path) | wanted)["fingerprint"]


def _made_from(experiment: Experiment) -> dict[str, Any]:
    """What the split depends on."""
    sets = experiment.data_sets
    for each in sets:
        if not (source := from_repository(each.path)).is_file():
            raise UserError(f"dataset {each.path}: No such file (looked for {source})")
    content = [_content(from_repository(each.path)) for each in sets]
    return {"dataset_sha256": _one_or_each(content), **_settings_of_split(experiment)}


def _settings_of_split(experiment: Experiment) -> dict[str, Any]:
    """`_made_from` but for the data themselves."""
    sets = experiment.data_sets
    return {
        "dataset_format": _one_or_each([each.dataset_format.entry for each in sets]),
        "max_samples": _one_or_each([each.max_samples for each in sets]),
        "eval_size": experiment.eval_size,
        "split_seed": experiment.split_seed,
    }


def _one_or_each(values: list) -> Any:
    """Of several data sets a list of each one's value, of one the value itself."""
    return values[0] if len(values) == 1 else values


def split_path(experiment: Experiment, name: str) -> Path:
    """A data set of the run folder, an Arrow file: "train", "eval" or a coreset's name."""
    return experiment.data_folder / f"{name}.arrow"


def rows_of(experiment: Experiment, name: str) -> "datasets.Dataset":  # noqa: F821
    """The raw rows of a data set of the run folder, memory-mapped. Raises: UserError where the file is no data set."""
    from datasets import Dataset

    path = split_path(experiment, name)
    try:
        rows = Dataset.from_file(str(path))
        rows.data.validate(full=True)  # an Arrow file with wrong offsets would be read outside its bounds
        return rows
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(f"{path} is no data set of ours ({error}): remove {experiment.data_folder}") from None


def _content(source: Path) -> str:
    """`digest` of the file's bytes, without reading them all at once."""
    sha = hashlib.sha256(source.stat().st_size.to_bytes(8, "little"))
    try:
        with source.open("rb") as file:
            while block := file.read(2**20):
                sha.update(block)
    except OSError as error:
        raise UserError(f"dataset {source}: {error.strerror or error}") from None
    return sha.hexdigest()


class _SplitRecord(TypedDict):
    made_from: dict
    fingerprint: str
    files: list[str]
    num_rows: NotRequired[list[NonNegativeInt]]  # pooled rows of each data set, where there are several


def _checked_record(experiment: Experiment, record: dict, made_from: dict) -> _SplitRecord:
    """Raises: UserError where the record of the split is damaged or of other data than `made_from`."""
    record = checked(_SplitRecord, record, experiment.data_folder / "split.json")
    if difference := first_difference(record["made_from"], made_from):
        raise UserError(
            f"{experiment.folder} belongs to other data ({difference}): give another output_dir or remove that folder"
        )
    return record


def _identify(experiment: Experiment, name: str) -> TrainingSplit:
    rows = rows_of(experiment, name)
    ids = [row_id(row) for row in rows]
    form = _as_json(experiment.row_format.entry, sort_keys=True)  # the same rows read otherwise are other data
    return TrainingSplit(rows, ids, digest(form.encode(), *(i.encode() for i in ids)))


def _make_split(experiment: Experiment, made_from: dict) -> None:
    with _pooled_rows(experiment) as (rows, counts):
        if len(rows) < 2:
            raise UserError(
                f"dataset {experiment.dataset_paths} has {len(rows)} usable rows: at least 2 are needed to split it"
            )
        for name, numbers in _split_numbers(experiment, len(rows)).items():
            write_dataset(experiment, name, rows.select(numbers))
    train, held_out = (_identify(experiment, name) for name in ("train", "eval"))
    files = [file_digest(split_path(experiment, name)) for name in ("train", "eval")]
    record = {"made_from": made_from, "fingerprint": train.fingerprint, "files": files}
    if len(counts) > 1:
        record["num_rows"] = counts
    write_sealed(experiment.data_folder / "split.json", record)
    named = ", ".join(Path(each.path).name for each in experiment.data_sets)
    sizes = f"{len(train.rows)} training and {len(held_out.rows)} evaluation rows"
    say(f"split {named}: {sizes} -> {experiment.data_folder}")


@contextlib.contextmanager
def _pooled_rows(experiment: Experiment) -> Iterator[tuple["datasets.Dataset", list[int]]]:  # noqa: F821
    """The rows of all data sets in the order given, in `row_format`, and how many each has. They stay on disk.

    Data sets of one form are put together as they are; a column that only some have is empty in the others.
    """
    from datasets import Value, concatenate_datasets

    sets = experiment.data_sets
    mixed = any(each.dataset_format != experiment.row_format for each in sets)
    with contextlib.ExitStack() as stack:
        parts, cache = [], Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for number, each in enumerate(sets):
            source = from_repository(each.path)
            rows = stack.enter_context(reading_rows(source, each.dataset_format))
            if each.max_samples is not None and each.max_samples < len(rows):
                say(f"dataset {source.name}: first {each.max_samples:,} of {len(rows):,} rows")
                rows = rows.take(each.max_samples)
            if mixed:
                rows = llama_factory.in_common_form(rows, each.dataset_format, cache / f"{number}.arrow")
            parts.append(rows)
        kinds = {}
        for part, each in zip(parts, sets, strict=True):
            for name, feature in part.features.items():
                kind, path = kinds.setdefault(name, (feature, each.path)) if feature != Value("null") else (feature, "")
                if feature != kind:
                    raise UserError(
                        f"column {name} is {feature} in {each.path} and {kind} in {path}: make them the same, or "
                        "remove the column from one"
                    )
        yield (parts[0] if len(parts) == 1 else concatenate_datasets(parts)), list(map(len, parts))


def split_numbers(experiment: Experiment) -> dict[str, np.ndarray]:
    """Row numbers in the user's data of the rows of "train" and "eval", in their order; the split must be made."""
    return _split_numbers(experiment, sum(len(rows_of(experiment, name)) for name in ("train", "eval")))


def _split_numbers(experiment: Experiment, num_rows: int) -> dict[str, np.ndarray]:
    """The permutation depends on the number of rows and the seed alone, so splitting row numbers splits the rows."""
    from datasets import Dataset

    numbers = Dataset.from_dict({"row": range(num_rows)})
    try:
        parts = numbers.train_test_split(test_size=experiment.eval_size, seed=experiment.split_seed)
    except ValueError:
        raise UserError(f"eval_size {experiment.eval_size:g} of {num_rows} rows leaves none to train on") from None
    return {name: parts[part].with_format("numpy")["row"][:] for name, part in (("train", "train"), ("eval", "test"))}


def write_dataset(experiment: Experiment, name: str, rows: "datasets.Dataset") -> Path:  # noqa: F821
    """Write rows as a LLaMA-Factory data set with its `dataset_info.json` entry; returns the file."""
    path = split_path(experiment, name)
    with (
        atomic_path(path) as draft,
        pa.OSFile(str(draft), "wb") as file,
        pa.ipc.new_stream(file, rows.features.arrow_schema) as writer,
    ):
        for batch in rows.with_format("arrow").iter(batch_size=1000):
            writer.write_table(batch.combine_chunks())  # a chosen row is a chunk of its own, with kilobytes about it
    list_datasets(experiment, [name])
    return path


def list_datasets(experiment: Experiment, names: list[str]) -> None:
    """See that `dataset_info.json` says of these data sets that they are our files, and nothing else of them.

    Whatever it said before (a run folder may come from a stranger), LLaMA-Factory reads nothing else under these names.
    """
    path = experiment.data_folder / "dataset_info.json"
    with locked(experiment.data_folder):  # several coresets may be tuned at a time
        info = read_json(path) if path.exists() else {}
        if not isinstance(info, dict):
            raise UserError(f"{path} lists no data sets: remove it")
        ours = {name: {"file_name": split_path(experiment, name).name, **experiment.row_format.entry} for name in names}
        if info | ours != info:
            write_json(path, info | ours)


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
        rows = _with_text(rows, path, llama_factory.text_columns(dataset_format.entry))
        if unusable := llama_factory.unusable_rows(rows, dataset_format.entry):
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
    return value if isinstance(value, str) else _as_json(value)


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
