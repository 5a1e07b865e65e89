"""One split for every stage: the pooled rows, cut once, written as LLaMA-Factory data sets in the run folder.

It is the split that LLaMA-Factory makes with `val_size` and `seed`, so published index lists fit. `train`, `eval` and
every coreset are data sets in `<run folder>/data/dataset_info.json`.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
import pyarrow as pa
from pydantic import NonNegativeInt
from typing_extensions import TypedDict

from selection.rows.conversation import in_common_form
from selection.rows.copies import text_hashes
from selection.rows.read import as_json, reading_rows, refuse_unusable
from selection.run import products
from selection.run.config import DataSet, Experiment, from_repository
from selection.run.errors import UserError
from selection.run.log import say
from selection.run.processes import processes

_PARTS = ("train", "eval")
_PUBLISHED = Experiment.model_fields["split"].default


@dataclass(frozen=True)
class TrainingSplit:
    rows: "datasets.Dataset"  # noqa: F821
    ids: list[str]  # content hash of each row
    fingerprint: str  # of all ids in order, and of the form of the rows


class _SplitRecord(TypedDict):
    made_from: dict
    fingerprint: str
    files: list[str]
    # Rows of each data set, with those left out; where there are several, or some are left out.
    num_rows: NotRequired[list[NonNegativeInt]]
    skipped: NotRequired[list[NonNegativeInt]]  # pooled rows that are left out, where any were
    moved: NotRequired[list[NonNegativeInt]]  # of the rows left, those that lie where the first of their copies does


def row_id(row: dict) -> str:
    """Content hash of a raw row, 16 hex digits, whatever the order of its columns."""
    return products.digest(as_json(row, sort_keys=True).encode())[:16]


def speculative_rows(experiment: Experiment, num_rows: int) -> np.ndarray:
    """Rows of a training split of `num_rows` that the small model is tuned on, ascending: all, or a random share."""
    share, seed = Fraction(str(experiment.speculative_share)), experiment.selection.seed
    size = max(1, int(share * num_rows))
    return np.sort(np.random.default_rng(seed).choice(num_rows, size, replace=False))


def training_split(experiment: Experiment, dry_run: bool = False) -> TrainingSplit | None:
    """Load the training split; make it on the first call. A dry run writes nothing: None where there is no split yet.

    Raises: UserError for a data file that cannot be read or has unusable rows, and a split of other data or changed."""
    with processes().leader_first():
        made_from, record_path = _made_from(experiment), _record_path(experiment)
        if dry_run:
            return _load_split(experiment, made_from) if record_path.exists() else None
        with products.locked(experiment.folder):  # two stages may need the split at the same time
            lost = not all(split_path(experiment, name).exists() for name in _PARTS)
            if not record_path.exists() or (lost and products.read_sealed(record_path).get("made_from") == made_from):
                _make_split(experiment, made_from)
        split = _load_split(experiment, made_from)
        list_datasets(experiment, _PARTS)
        return split


def finished_split(experiment: Experiment) -> TrainingSplit:
    """The training split of a run in which stages have run; writes nothing. Raises: UserError where there is none."""
    if split := training_split(experiment, dry_run=True):
        return split
    raise UserError(f"{experiment.data_folder} has no split yet: run a stage with this run's configuration first")


def held_out_ids(experiment: Experiment) -> list[str]:
    """`row_id` of each held-out row; the split must be made."""
    return [row_id(row) for row in rows_of(experiment, "eval")]


def held_out_copies(experiment: Experiment) -> int:
    """Held-out rows of which the training split has an exact copy; the split must be made."""
    train, held_out = (text_hashes(rows_of(experiment, name), experiment.row_format.entry) for name in _PARTS)
    return int(np.isin(held_out, train).sum())


def data_sets(experiment: Experiment) -> list[tuple[str, int, int]]:
    """Name, first pooled row and number of rows, left out ones too, of each data set in order.

    Raises: UserError without a split."""
    record = _read_record(experiment, _made_from(experiment))
    counts = record.get("num_rows") or [_num_rows(experiment)]
    names = [each.name for each in experiment.data_sets]
    return list(zip(names, np.cumsum([0, *counts[:-1]]).tolist(), counts, strict=True))


def recorded_fingerprint(experiment: Experiment) -> str | None:
    """The training split's fingerprint by its record; None: no split yet. Data that are not here count as unchanged.

    Raises: UserError for the split of other data or settings."""
    if not _record_path(experiment).exists():
        return None
    here = all(from_repository(each.path).is_file() for each in experiment.data_sets + experiment.eval_set)
    return _read_record(experiment, _made_from(experiment, data=here))["fingerprint"]


def split_numbers(experiment: Experiment) -> dict[str, np.ndarray]:
    """Pooled row numbers of "train" and "eval", in their order; rows left out have theirs too. The split must be made.
    Rows of `eval_data` are not pooled and have none."""
    path = _record_path(experiment)
    record = products.checked(_SplitRecord, products.read_sealed(path), path)
    skipped, num_rows = record.get("skipped", []), _num_rows(experiment)
    kept = np.delete(np.arange(num_rows + len(skipped)), np.array(skipped, dtype=np.int64))
    return {name: kept[rows] for name, rows in _drawn(experiment, num_rows, record.get("moved", [])).items()}


def _drawn(experiment: Experiment, num_rows: int, moved: Iterable[int] = ()) -> dict[str, np.ndarray]:
    """Rows of "train" and "eval" as LLaMA-Factory draws them, but for those `moved` to the other part."""
    from datasets import Dataset

    if experiment.eval_set:
        return {"train": np.arange(num_rows), "eval": np.arange(0)}
    numbers = Dataset.from_dict({"row": range(num_rows)})
    try:  # the permutation depends on the number of rows and the seed alone
        parts = numbers.train_test_split(test_size=experiment.eval_size, seed=experiment.split_seed)
    except ValueError:
        raise UserError(f"eval_size {experiment.eval_size:g} of {num_rows} rows leaves none to train on") from None
    # Not by format "numpy": that of `datasets` 4.0 fails beside a torchvision of today, where one loads.
    rows = np.concatenate([part.with_format("arrow")[:]["row"].to_numpy() for part in parts.values()])
    held_out = (np.arange(num_rows) >= len(parts["train"])) ^ np.isin(rows, moved)
    if held_out.all() or not held_out.any():
        raise UserError("split keep_copies_together puts all rows on one side, as they are copies: remove the copies")
    return {"train": rows[~held_out], "eval": rows[held_out]}


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
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(f"{path} is no data set of ours ({error}): remove {experiment.data_folder}") from None
    return rows


def write_dataset(experiment: Experiment, name: str, rows: "datasets.Dataset") -> Path:  # noqa: F821
    """Write rows as a LLaMA-Factory data set with its `dataset_info.json` entry; returns the file."""
    path, schema = split_path(experiment, name), rows.features.arrow_schema
    with products.atomic_path(path) as draft, pa.ipc.new_stream(str(draft), schema) as writer:
        for batch in rows.with_format("arrow").iter(batch_size=1000):
            writer.write_table(batch.combine_chunks())  # else each chosen row is a chunk, which takes kilobytes
    list_datasets(experiment, [name])
    return path


def list_datasets(experiment: Experiment, names: Iterable[str]) -> None:
    """Make `dataset_info.json` name our files for these data sets, whatever it said before."""
    path = experiment.data_folder / "dataset_info.json"
    with products.locked(experiment.data_folder):  # several coresets may be tuned at a time
        info = products.read_record(path) if path.exists() else {}
        ours = {name: {"file_name": split_path(experiment, name).name, **experiment.row_format.entry} for name in names}
        if info | ours != info:
            products.write_json(path, info | ours)


def _record_path(experiment: Experiment) -> Path:
    return experiment.data_folder / "split.json"


def _num_rows(experiment: Experiment) -> int:
    return sum(len(rows_of(experiment, name)) for name in _PARTS[: 1 if experiment.eval_set else 2])


def _made_from(experiment: Experiment, data: bool = True) -> dict[str, Any]:
    """All that the split depends on, or all but the `data`."""
    sets = experiment.data_sets
    of_each = {"dataset_sha256": [_content("dataset", each.path) for each in sets]} if data else {}
    of_each["dataset_format"] = [each.dataset_format.entry for each in sets]
    of_each["max_samples"] = [each.max_samples for each in sets]
    made_from = {key: values[0] if len(sets) == 1 else values for key, values in of_each.items()}
    if sets := experiment.eval_set:
        own = {"eval_dataset_sha256": _content("eval_data", sets[0].path)} if data else {}
        return made_from | own | {"eval_dataset_format": sets[0].dataset_format.entry}
    made_from |= {} if experiment.split == _PUBLISHED else {"split": experiment.split}  # earlier splits do not say
    return made_from | {"eval_size": experiment.eval_size, "split_seed": experiment.split_seed}


def _content(key: str, path: str) -> str:
    """`digest` of the data file that `key` names, read in blocks. Raises: UserError where it cannot be read."""
    source = from_repository(path)
    try:
        with source.open("rb") as file:
            sha = hashlib.sha256(source.stat().st_size.to_bytes(8, "little"))
            return hashlib.file_digest(file, lambda: sha).hexdigest()
    except OSError as error:
        raise UserError(f"{key} {path}: {error.strerror or error} (looked for {source})") from None


def _read_record(experiment: Experiment, made_from: dict) -> _SplitRecord:
    """Raises: UserError where the split's record is missing, damaged or of other data than `made_from`."""
    path = _record_path(experiment)
    record = products.checked(_SplitRecord, products.read_sealed(path), path)
    stored = {"split": _PUBLISHED} | record["made_from"]
    if difference := products.first_difference(stored, stored | {"split": _PUBLISHED} | made_from):
        other = "give another output_dir or remove that folder"
        raise UserError(f"{experiment.folder} belongs to other data ({difference}): {other}")
    if "skipped" in record and not experiment.skip_bad_rows:
        without = f"was split without the rows in {_bad_rows(experiment)}"
        raise UserError(f"{experiment.folder} {without}: give skip_bad_rows: true, or another output_dir")
    return record


def _load_split(experiment: Experiment, made_from: dict) -> TrainingSplit:
    """Raises: UserError where the split is of other data, or not what was written."""
    record, folder = _read_record(experiment, made_from), experiment.data_folder
    intact = [products.file_digest(split_path(experiment, name)) for name in _PARTS] == record["files"]
    if not intact or (train := _identify(experiment)).fingerprint != record["fingerprint"]:
        raise UserError(f"the split in {folder} is damaged or was changed by hand: remove {folder}")
    return train


def _identify(experiment: Experiment) -> TrainingSplit:
    rows = rows_of(experiment, "train")
    ids = list(map(row_id, rows))
    form = as_json(experiment.row_format.entry, sort_keys=True)  # the same rows read otherwise are other data
    return TrainingSplit(rows, ids, products.digest(form.encode(), *(i.encode() for i in ids)))


def _make_split(experiment: Experiment, made_from: dict) -> None:
    with pooled_rows(experiment, experiment.data_sets) as (rows, read):
        if len(rows) < 2:
            raise UserError(f"dataset {experiment.dataset_paths} has {len(rows)} usable rows: a split needs at least 2")
        hashes, moved = text_hashes(rows, experiment.row_format.entry), []
        numbers = _drawn(experiment, len(rows))
        if experiment.split == "keep_copies_together":
            _, first, of = np.unique(hashes, return_index=True, return_inverse=True)
            held_out = np.isin(np.arange(len(rows)), numbers["eval"])
            moved = np.flatnonzero(held_out != held_out[first[of]]).tolist()
            numbers = _drawn(experiment, len(rows), moved)
        of_held_out = hashes[numbers["eval"]]
        for name in _PARTS:
            write_dataset(experiment, name, rows.select(numbers[name]))
    if experiment.eval_set:
        with pooled_rows(experiment, experiment.eval_set) as (held_out, more):
            write_dataset(experiment, "eval", held_out)
            of_held_out, read = text_hashes(held_out, experiment.row_format.entry), read + more
    files = [products.file_digest(split_path(experiment, name)) for name in _PARTS]
    record = {"made_from": made_from, "fingerprint": _identify(experiment).fingerprint, "files": files}
    record |= {"moved": moved} if moved else {}
    counts = [count for _, count, _ in read[: len(experiment.data_sets)]]
    if bad := any(unusable for *_, unusable in read):
        firsts = np.cumsum([0, *counts[:-1]]).tolist()
        record["skipped"] = [first + row for first, (*_, wrong) in zip(firsts, read, strict=False) for row in wrong]
        _list_bad_rows(experiment, read)
    record |= {"num_rows": counts} if len(counts) > 1 or bad else {}
    products.write_sealed(_record_path(experiment), record)
    named = ", ".join(Path(each.path).name for each in experiment.data_sets)
    train, held_out = (len(rows_of(experiment, name)) for name in _PARTS)
    say(f"split {named}: {train} training and {held_out} evaluation rows -> {experiment.data_folder}")
    copies = len(hashes) - len(np.unique(hashes))
    alike = int(np.isin(of_held_out, hashes[numbers["train"]]).sum())
    if copies or alike:
        todo = " (split: keep_copies_together puts them on one side)" if alike and not experiment.eval_set else ""
        said = f"copies: {copies:,} of {len(hashes):,} rows say the same as an earlier one"
        say(f"{said}; {alike:,} of {len(of_held_out):,} held-out rows have a copy in training{todo}")


@contextlib.contextmanager
def pooled_rows(
    experiment: Experiment, sets: list[DataSet]
) -> Iterator[tuple["datasets.Dataset", list[tuple[Path, int, dict[int, str]]]]]:  # noqa: F821
    """The rows of `sets` in `row_format`, in the order given; and each file, its rows (at most `max_samples`), and what
    is wrong with those of them that are left out under `skip_bad_rows`. The rows stay on disk."""
    from datasets import Value, concatenate_datasets

    parts, kinds, read = [], {}, []
    mixed = any(each.dataset_format != experiment.row_format for each in sets)
    with contextlib.ExitStack() as stack:
        cache = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for each in sets:
            source = from_repository(each.path)
            rows, unusable = stack.enter_context(reading_rows(source, each.dataset_format))
            if each.max_samples is not None and each.max_samples < len(rows):
                say(f"dataset {source.name}: first {each.max_samples:,} of {len(rows):,} rows")
                rows = rows.take(each.max_samples)
            unusable = {row: why for row, why in unusable.items() if row < len(rows)}
            read.append((source, len(rows), unusable))
            if unusable:
                rows = rows.select(np.delete(np.arange(len(rows)), list(unusable)))
            parts.append(rows)
        if not experiment.skip_bad_rows:
            refuse_unusable(read)
        for number, (rows, each) in enumerate(zip(parts, sets, strict=True)):
            if mixed:
                parts[number] = in_common_form(rows, each.dataset_format, cache / f"{number}.arrow")
            for name, kind in parts[number].features.items():
                before, path = kinds.setdefault(name, (kind, each.path)) if kind != Value("null") else (kind, "")
                if kind != before:
                    wrong = f"column {name} is {kind} in {each.path} and {before} in {path}"
                    raise UserError(f"{wrong}: make them the same, or remove the column from one")
        # A column that only some data sets have is empty in the others.
        yield concatenate_datasets(parts), read


def _bad_rows(experiment: Experiment) -> Path:
    return experiment.data_folder / "bad_rows.jsonl"


def _list_bad_rows(experiment: Experiment, read: list[tuple[Path, int, dict[int, str]]]) -> None:
    lines = [
        as_json({"file": str(path), "row": row, "reason": reason}) + "\n"
        for path, _, unusable in read
        for row, reason in unusable.items()
    ]
    with products.atomic_path(path := _bad_rows(experiment)) as draft:
        draft.write_text("".join(lines), encoding="utf-8")
    say(f"left out: {len(lines):,} of {sum(count for _, count, _ in read):,} rows, listed with the reason in {path}")
