"""One split for every stage: the pooled rows, cut once, written as LLaMA-Factory data sets in the run folder.

The split is the one that LLaMA-Factory makes with `val_size` and `seed` (`datasets`' train_test_split on all rows),
so row i of our training split is row i of its train part, and published index lists fit. After it no stage splits
again: `train`, `eval` and every coreset are data sets of their own in `<run folder>/data/dataset_info.json`.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
import pyarrow as pa
from pydantic import NonNegativeInt
from typing_extensions import TypedDict

from selection.rows.read import as_json, in_common_form, reading_rows
from selection.run.config import Experiment, from_repository
from selection.run.errors import UserError
from selection.run.log import say
from selection.run.processes import processes
from selection.run.products import (
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


@dataclass(frozen=True)
class TrainingSplit:
    """The training split's identity. `ids[i]` is the content hash of row i, `fingerprint` that of all in order."""

    rows: "datasets.Dataset"  # noqa: F821
    ids: list[str]
    fingerprint: str


def row_id(row: dict) -> str:
    """Content hash of a raw row, 16 hex digits: the same wherever and in whatever order the row stands."""
    return digest(as_json(row, sort_keys=True).encode())[:16]


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
    form = as_json(experiment.row_format.entry, sort_keys=True)  # the same rows read otherwise are other data
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
                rows = in_common_form(rows, each.dataset_format, cache / f"{number}.arrow")
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
