"""One split for every stage: the pooled rows, cut once, written as LLaMA-Factory data sets in the run folder.

The split is the one that LLaMA-Factory makes with `val_size` and `seed` (`datasets`' train_test_split on all rows),
so row i of our training split is row i of its train part, and published index lists fit. After it no stage splits
again: `train`, `eval` and every coreset are data sets of their own in `<run folder>/data/dataset_info.json`.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict

from finetune import llama_factory
from selection.config import DatasetFormat, Experiment, from_repository
from selection.errors import UserError
from selection.files import atomic_path, checked, digest, first_difference, locked, read_json, write_json


@dataclass(frozen=True)
class TrainingSplit:
    """The training split's identity. `ids[i]` is the content hash of row i, `fingerprint` that of all in order."""

    rows: list[dict]
    ids: list[str]
    fingerprint: str


def row_id(row: dict) -> str:
    """Content hash of a raw row, 16 hex digits: the same wherever and in whatever order the row stands."""
    return digest(_as_json(row, sort_keys=True).encode())[:16]


def _as_json(value: object, **options) -> str:
    """Dates and the like, which `datasets` finds in columns that nobody trains on, are written as text."""
    return json.dumps(value, ensure_ascii=False, default=str, **options)


def training_split(experiment: Experiment) -> TrainingSplit:
    """Load the training split, making it on the first call.

    Raises: UserError for a data file that cannot be read, without usable rows, with rows without a response, and
    where the run folder holds the split of other data.
    """
    source = from_repository(experiment.dataset)
    try:
        content = digest(source.read_bytes())
    except OSError as error:
        raise UserError(f"dataset {experiment.dataset}: {error.strerror or error} (looked for {source})") from None
    wanted = {
        "dataset_sha256": content,
        "dataset_format": experiment.dataset_format.entry,
        "max_samples": experiment.max_samples,
        "eval_size": experiment.eval_size,
        "split_seed": experiment.split_seed,
    }
    record_path = experiment.data_folder / "split.json"
    if not record_path.exists():
        _make_split(experiment, source, wanted)
    record = checked(_SplitRecord, read_json(record_path), record_path)
    if difference := first_difference(record["made_from"], wanted):
        raise UserError(
            f"{experiment.folder} belongs to other data ({difference}): give another output_dir or remove that folder"
        )
    train, held_out = (_identify(experiment, name) for name in ("train", "eval"))
    if (train.fingerprint, held_out.fingerprint) != (record["fingerprint"], record["eval_fingerprint"]):
        raise UserError(f"the split in {experiment.data_folder} was changed by hand: remove {experiment.folder}")
    return train


class _SplitRecord(TypedDict):
    made_from: dict
    fingerprint: str
    eval_fingerprint: str


def _identify(experiment: Experiment, name: str) -> TrainingSplit:
    path = experiment.data_folder / f"{name}.json"
    rows = checked(list[dict], read_json(path), path)
    ids = [row_id(row) for row in rows]
    form = _as_json(experiment.dataset_format.entry, sort_keys=True)  # the same rows read otherwise are other data
    return TrainingSplit(rows, ids, digest(form.encode(), *(i.encode() for i in ids)))


def _make_split(experiment: Experiment, source: Path, made_from: dict) -> None:
    from datasets import Dataset

    rows = read_rows(source, experiment.dataset_format)[: experiment.max_samples]
    if len(rows) < 2:
        raise UserError(f"dataset {experiment.dataset} has {len(rows)} usable rows: at least 2 are needed to split it")
    # The permutation depends on the number of rows and the seed alone, so splitting row numbers splits the rows.
    numbers = Dataset.from_dict({"row": range(len(rows))})
    try:
        parts = numbers.train_test_split(test_size=experiment.eval_size, seed=experiment.split_seed)
    except ValueError:
        raise UserError(f"eval_size {experiment.eval_size:g} of {len(rows)} rows leaves none to train on") from None
    for name, part in (("train", "train"), ("eval", "test")):
        write_dataset(experiment, name, [rows[i] for i in parts[part]["row"]])
    train, held_out = (_identify(experiment, name) for name in ("train", "eval"))
    record = {"made_from": made_from, "fingerprint": train.fingerprint, "eval_fingerprint": held_out.fingerprint}
    write_json(experiment.data_folder / "split.json", record)
    sizes = f"{len(train.rows)} training and {len(held_out.rows)} evaluation rows"
    print(f"split {source.name}: {sizes} -> {experiment.data_folder}")


def write_dataset(experiment: Experiment, name: str, rows: list[dict]) -> Path:
    """Write rows as a LLaMA-Factory data set with its `dataset_info.json` entry; returns the file."""
    folder = experiment.data_folder
    path = folder / f"{name}.json"
    with atomic_path(path) as draft:
        draft.write_text(_as_json(rows, indent=1) + "\n", encoding="utf-8")
    info_path = folder / "dataset_info.json"
    with locked(folder):  # several coresets may be tuned at a time
        info = read_json(info_path) if info_path.exists() else {}
        info[name] = {"file_name": path.name, **experiment.dataset_format.entry}
        write_json(info_path, info)
    return path


_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read_rows(path: Path, dataset_format: DatasetFormat) -> list[dict]:
    """Rows of a JSON, JSONL, CSV or Parquet file as `datasets` reads them, and so as LLaMA-Factory sees them.

    Every row is put through LLaMA-Factory's converter: it drops rows without a response silently, which would shift
    every later row number. Raises: UserError, naming the rows (counted from 0, as everywhere).
    """
    from datasets import load_dataset

    if path.suffix not in _READERS:
        raise UserError(f"{path}: a data set is a {', '.join(_READERS)} file")
    with tempfile.TemporaryDirectory() as cache:
        try:
            # Else pandas takes the words null, NA and None in a CSV file for nothing.
            options = {"keep_default_na": False} if path.suffix == ".csv" else {}
            table = load_dataset(_READERS[path.suffix], data_files=str(path), split="train", cache_dir=cache, **options)
            rows = table.to_list()
        except Exception as error:  # each reader raises its own kinds
            raise UserError(f"cannot read rows from {path}: {error.__cause__ or error}") from None
    if unusable := llama_factory.rows_without_response(rows, dataset_format.entry):
        named = ", ".join(map(str, unusable[:5]))
        raise UserError(
            f"{path}: {len(unusable)} of {len(rows)} rows have no prompt and text response, first row {named}: "
            "LLaMA-Factory would drop them; mend or remove them, or describe the columns with dataset_format"
        )
    return rows
