"""Per-sample scores on disk: a folder with `manifest.json` and Parquet parts, or a plain Parquet or CSV file."""

import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet
from pydantic import Field, NonNegativeInt, PositiveInt
from typing_extensions import TypedDict

from selection.run.errors import UserError
from selection.run.log import warn
from selection.run.products import (
    atomic_path,
    checked,
    code_version,
    digest,
    file_digest,
    first_difference,
    read_json,
    read_sealed,
    write_json,
    write_sealed,
)

SCORER_VERSION = 3  # counted up where a change moves scores by more than fp32's noise
SCHEMA = pa.schema(
    [
        ("index", pa.int64()),  # row of the training split
        ("id", pa.string()),  # content hash of the row
        ("n_prompt_tokens", pa.int32()),
        ("n_response_tokens", pa.int32()),
        ("loss", pa.float64()),  # mean cross-entropy over the response tokens, nats
        ("effort", pa.float64()),  # S_d = ‖∇_φ L‖₂
    ]
)
# Where `selection.columns` asks for them, after those.
MORE_COLUMNS = {
    "el2n": pa.float64(),
    "el2n_released": pa.float64(),
    "entropy": pa.float64(),  # nats
    "hidden_state": pa.list_(pa.float32()),  # (d,)
}

_NONE = np.empty(0, dtype=np.int64)
Plan = list[list[list[int]]]  # parts, each a list of batches, each a list of rows


@dataclass(frozen=True)
class Scores:
    """Figures by row. Rows that scoring left out, as their loss or score is not finite, have none."""

    index: np.ndarray  # (n,) int64, ascending, unique
    columns: dict[str, np.ndarray]  # each (n,) float64, finite, not negative; hidden_state (n, d) float32, finite
    ids: list[str] | None  # None too where they were not asked for
    fingerprint: str | None  # of the training split; known for our own folders, as the next is
    num_rows: int | None  # N, of the training split
    source: str
    left_out: np.ndarray = field(default_factory=lambda: _NONE)  # rows, ascending
    made_by: dict | None = None  # what made our own folder (`made_by`)

    @property
    def effort(self) -> np.ndarray:
        return self.columns["effort"]

    def check_complete(self) -> "Scores":
        """The same scores, with N. Raises: UserError where a row of the training split is missing."""
        index = np.union1d(self.index, self.left_out) if len(self.left_out) else self.index
        num_rows = self.num_rows or len(index)
        if len(index) != num_rows or index[-1] != num_rows - 1:
            gaps = np.flatnonzero(index != np.arange(len(index)))
            hole = gaps[0] if len(gaps) else len(index)
            missing = max(num_rows, index[-1] + 1) - len(index)
            raise UserError(f"{self.source}: row {hole} has no score ({missing} rows in all): every row needs one")
        return replace(self, num_rows=num_rows)

    def of_all_rows(self) -> np.ndarray:
        """The effort scores (N,). Raises: UserError where a row of the training split has none."""
        if len(self.left_out):
            raise UserError(f"{self.source}: row {self.left_out[0]} was left out in scoring: every row needs a score")
        return self.check_complete().effort

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Where `rows` stand in `index`. Raises: UserError naming the first row that has no score."""
        position = np.minimum(np.searchsorted(self.index, rows), len(self.index) - 1)
        if len(absent := rows[self.index[position] != rows]):
            raise UserError(f"{self.source}: row {absent[0]} was drawn for verification and has no score there")
        return position

    def at(self, rows: np.ndarray) -> np.ndarray:
        """The effort scores of `rows`. Raises: as `positions`."""
        return self.effort[self.positions(rows)]

    def only(self, rows: np.ndarray) -> "Scores":
        """Just these rows, which must have been scored."""
        left_out = np.intersect1d(rows, self.left_out)
        rows = np.setdiff1d(rows, left_out)
        positions = self.positions(rows)
        columns = {name: values[positions] for name, values in self.columns.items()}
        return replace(self, index=rows, columns=columns, ids=None, left_out=left_out)


_Batch = Annotated[list[NonNegativeInt], Field(min_length=1)]
_Part = Annotated[list[_Batch], Field(min_length=1)]


class _Identity(TypedDict):
    data_fingerprint: str


class _Manifest(TypedDict):
    identity: _Identity
    num_rows: PositiveInt
    columns: list[str]
    left_out: list[int]


def read_manifest(folder: Path) -> dict:
    """The manifest of a score folder. Raises: UserError where it is missing or damaged."""
    record = read_sealed(folder / "manifest.json", remove=folder)
    checked(_Manifest, record, folder / "manifest.json")
    return record


def made_by(manifest: dict) -> dict:
    """What made a folder's scores, for the records of V_i and coresets: the manifest's identity, with the names of the
    model and of its tuned folder, as its configuration gave them, in front of their fingerprints."""
    identity = dict(manifest["identity"])
    named = {key: manifest.get(key) for key in ("model", "tuned")}
    return named | {f"{key}_fingerprint": identity.pop(key, None) for key in named} | identity


def read_scores(path: Path, columns: Sequence[str] = ("effort",), ids: bool = True) -> Scores:
    """Read a score folder or a plain file with columns `index`, those asked for (and `id`, if there and `ids`).

    Only these columns are read: 10⁸ rows of one column need about 5 GB.
    Raises: UserError for a missing or unreadable file, a missing column, no rows, a duplicate or negative index,
    and figures that are NaN, infinite or negative; each names the row.
    """
    manifest = read_manifest(path) if path.is_dir() else None
    read = dict.fromkeys([*columns, "effort"] if manifest else columns)
    table = _read_table(path, ["index", *read, *["id"] * ids])
    index = table["index"].to_numpy()
    order = _order(index)
    index = index[order]
    if len(repeated := index[1:][index[1:] == index[:-1]]):
        raise UserError(f"{path}: row {repeated[0]} has more than one score")
    names = table["id"].take(pa.array(order)) if "id" in table.column_names else None
    figures = {name: _array(table[name], f"{path}: column {name}")[order] for name in read}
    del table, order
    left_out = _NONE
    if manifest and (out := np.isnan(figures["effort"])).any():  # what scoring writes for a row it leaves out
        left_out, index, names = index[out], index[~out], names and names.filter(pa.array(~out))
        figures = {name: values[~out] for name, values in figures.items()}
    for name in columns:
        values = figures[name]
        if name == "hidden_state":
            check_features(values, index, str(path))
        elif len(bad := np.flatnonzero(~(np.isfinite(values) & (values >= 0)))):
            raise UserError(
                f"{path}: row {index[bad[0]]} has {name} {values[bad[0]]} ({len(bad)} such rows in all): it must be "
                "finite and not negative; score these rows again or leave them out of the data"
            )
    figures, names = {name: figures[name] for name in columns}, names and names.to_pylist()
    if manifest is None:
        return Scores(index, figures, names, None, None, str(path))
    fingerprint, num_rows = manifest["identity"]["data_fingerprint"], manifest["num_rows"]
    return Scores(index, figures, names, fingerprint, num_rows, str(path), left_out, made_by(manifest))


def read_ids(path: Path, rows: np.ndarray) -> list[str] | None:
    """The ids of `rows` (m,), row numbers that the score folder or file has; None where it has no ids."""
    table = _read_table(path, ["index", "id"])
    if "id" not in table.column_names:
        return None
    index = table["index"].to_numpy()
    order = _order(index)
    return table["id"].take(pa.array(order[np.searchsorted(index, rows, sorter=order)])).to_pylist()


def has_column(path: Path, name: str) -> bool:
    """Whether a score folder or file has a column. Raises: UserError where it cannot be read."""
    return name in _open(_parts(path)[0], [name]).column_names


def check_features(features: np.ndarray, index: np.ndarray, source: str) -> np.ndarray:
    """Features (n, d) of the rows `index`, as they are. Raises: UserError naming a row that is not finite."""
    if len(bad := np.flatnonzero(~np.isfinite(features).all(1))):
        raise UserError(f"{source}: the features of row {index[bad[0]]} are not finite ({len(bad)} such rows in all)")
    return features


def _order(index: np.ndarray) -> np.ndarray:
    """The positions that sort row numbers (n,). Rows 0 to n − 1 need no sort: 10⁸ are put in order in seconds."""
    if index.max() < len(index):
        order = np.full(len(index), -1)
        order[index] = np.arange(len(index))
        if order.min() >= 0:
            return order
    return np.argsort(index, kind="stable")


def _parts(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder: run the scoring stage first (effort_score.py, verify.py)")
    parts = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
    if not parts:
        raise UserError(f"{path} holds no finished part yet: run the scoring stage to its end")
    return parts


def _read_table(path: Path, names: list[str]) -> pa.Table:
    """The columns `names` of all rows, each of its type; `id` only where there is one."""
    tables = []
    for part in _parts(path):
        if path.is_dir() and not _is_intact(part):
            raise UserError(f"{part} is damaged (its checksum does not fit): run the scoring stage again to mend it")
        found = _open(part, names)
        kept = [name for name in names if name != "id" or name in found.column_names]
        if found.num_rows:
            tables.append(pa.table({name: _column(found, name, path) for name in kept}))
    if not tables:
        raise UserError(f"{path} holds no scores")
    if len({table.num_columns for table in tables}) > 1:
        raise UserError(f"{path}: some parts have a column id, some have none: all need one, or none")
    return pa.concat_tables(tables)


def _open(path: Path, names: list[str]) -> pa.Table:
    """The columns of `names` that a file has; a CSV file as a whole."""
    try:
        if path.suffix.lower() == ".csv":
            table = pa.csv.read_csv(path, convert_options=pa.csv.ConvertOptions(column_types={"id": pa.string()}))
        elif path.suffix.lower() == ".parquet":
            with pa.parquet.ParquetFile(path) as file:
                there = file.schema_arrow.names
                table = file.read([name for name in names if name in there], use_threads=False)
        else:
            raise UserError(f"{path}: scores are read from a score folder, a .parquet or a .csv file")
        return table
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise UserError(f"cannot read scores from {path}: {error}") from None


# What is read, and what it must be; every other column: numbers.
_COLUMNS = {
    "index": (pa.int64(), "row numbers of the training split: 0, 1, 2, …"),
    "id": (pa.large_string(), "text"),
    "hidden_state": (pa.list_(pa.float32()), "lists of numbers"),
}


def _column(table: pa.Table, name: str, path: Path) -> pa.ChunkedArray:
    """The column `name` under its type. Raises: UserError where it is missing, there twice or of another type."""
    if table.column_names.count(name) != 1:
        how_many = "no column" if name not in table.column_names else "more than one column"
        there = f"it has {', '.join(table.column_names)}" if table.column_names else "of those asked for, it has none"
        raise UserError(f"{path} has {how_many} {name} ({there})")
    kind, what = _COLUMNS.get(name, (pa.float64(), "numbers"))
    try:
        stored = table[name].type
        if name not in ("id", "hidden_state") and not (pa.types.is_integer(stored) or pa.types.is_floating(stored)):
            raise pa.ArrowInvalid
        column = table[name].cast(kind, safe=name in ("index", "id"))
        if name == "index" and (column.null_count or (pa.compute.min(column).as_py() or 0) < 0):
            raise pa.ArrowInvalid
        column.validate(full=name == "id")  # that it is UTF-8
        return column
    except pa.ArrowException:
        raise UserError(f"{path}: column {name} must hold {what}") from None


def _array(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """Numbers (n,), or lists of one length as (n, d)."""
    if not pa.types.is_list(column.type):
        return column.to_numpy()
    if column.null_count or len(pa.compute.list_value_length(column).unique()) != 1:
        raise UserError(f"{name} must hold lists of one length")
    parts = [chunk.flatten().to_numpy().reshape(len(chunk), -1) for chunk in column.chunks if len(chunk)]
    return np.concatenate(parts)  # one Arrow array holds at most 2³¹ numbers


class ScoreFolder:
    """Scores of one model under one setting, growing part by part. Every write is atomic.

    `identity` says what the numbers depend on; a folder made under another identity is refused, so scores of two
    models, data sets or number formats never mix. `columns`: those of MORE_COLUMNS that must be there; a folder that
    has more keeps them, in every part. A part's file name says which batches of the plan it holds and carries a
    checksum of its content: part-<plan>-<content>.parquet.
    """

    def __init__(self, path: Path, identity: dict, num_rows: int, columns: Sequence[str] = ()):
        self.path, self.manifest_path, self.plan_path = path, path / "manifest.json", path / "plan.json"
        self.manifest = {
            "identity": identity,
            "num_rows": num_rows,
            "columns": [name for name in MORE_COLUMNS if name in columns],
            "code_version": code_version(),
            "left_out": [],  # rows whose loss or score is not finite
        }
        self.begun = any(path.glob("part-*.parquet"))  # a manifest without scores binds nobody
        if self.begun:
            self.manifest = read_manifest(path)
            if difference := first_difference(self.manifest["identity"], identity):
                raise UserError(f"{path} holds scores made otherwise ({difference}): remove it or change output_dir")
            if absent := [name for name in columns if name not in self.manifest["columns"]]:
                raise UserError(f"{path} holds scores without {', '.join(absent)}: remove it or change output_dir")

    def drop_damaged(self) -> None:
        """Remove parts whose content is not what was written, saying so: their rows count as missing again."""
        for left in self.path.glob(".part-*.partial"):  # of a killed process
            left.unlink(missing_ok=True)
        for part in self.path.glob("part-*.parquet"):
            if not _is_intact(part):
                warn(f"{part} is damaged: its rows are scored again")
                part.unlink(missing_ok=True)

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """The `rows` that no part holds yet."""
        parts = list(self.path.glob("part-*.parquet"))
        done = [_column(_open(part, ["index"]), "index", part).to_numpy() for part in parts]
        return np.setdiff1d(rows, np.concatenate(done)) if done else rows

    def plan(self, rows: np.ndarray, make_parts: Callable[[np.ndarray], Plan], about: dict | None = None) -> Plan:
        """The parts still to be scored.

        `make_parts` cuts the missing rows into parts. Its plan is kept until it is done, so that an interrupted run
        goes on with the same batches, whatever the number of processes: a score's last bits depend on what shares
        its batch. `about` joins the manifest, for the reader.
        """
        self.manifest |= about or {}
        write_sealed(self.manifest_path, self.manifest)
        if not self.begun and not (self.path / "id").exists():
            write_json(self.path / "id", secrets.token_hex(8))
        parts, missing = self._planned() if self.begun else [], self.missing(rows)
        planned = {row for part in parts for batch in part for row in batch}
        if not (planned <= set(rows.tolist()) and set(missing.tolist()) <= planned):  # not the plan of this request
            write_sealed(self.plan_path, {"parts": make_parts(missing)})
        return self.remaining()

    @property
    def id(self) -> str:
        """Of this folder alone: one that is filled again after it was removed has another. "" where none is known."""
        return checked(str, read_json(self.path / "id"), self.path / "id") if (self.path / "id").exists() else ""

    def remaining(self) -> Plan:
        """The parts of the plan in progress that are still to be scored."""
        return [part for part in self._planned() if not any(self.path.glob(f"part-{_plan_id(part)}-*.parquet"))]

    def _planned(self) -> Plan:
        """All parts of the plan in progress; none where there is no plan, or a damaged one."""
        try:
            plan = read_sealed(self.plan_path) if self.plan_path.exists() else {"parts": []}
            return checked(list[_Part], plan.get("parts"), self.plan_path)
        except UserError:
            return []

    def write_part(self, part: list[list[int]], columns: dict[str, np.ndarray]) -> None:
        """Write one finished part. `columns` are SCHEMA's and the manifest's, in the part's order."""
        schema = pa.schema([*SCHEMA, *((name, MORE_COLUMNS[name]) for name in self.manifest["columns"])])
        table = pa.table([pa.array(list(columns[field.name]), field.type) for field in schema], schema=schema)
        content = pa.BufferOutputStream()
        pa.parquet.write_table(table, content)
        content = content.getvalue()
        path = self.path / f"part-{_plan_id(part)}-{hashlib.sha256(content).hexdigest()[:16]}.parquet"
        with atomic_path(path) as draft:
            draft.write_bytes(content)

    def finish(self, rows: np.ndarray) -> None:
        """Note which of `rows` have no finite score, and forget the plan.

        Raises: UserError where a row was not scored, or where more than 1 % have no finite score.
        """
        if not self.plan_path.exists():
            return
        if len(missing := self.missing(rows)):
            raise UserError(f"{self.path}: row {missing[0]} was not scored: call the same command again")
        self.manifest["left_out"] = read_scores(self.path, ids=False).left_out.tolist()
        write_sealed(self.manifest_path, self.manifest)
        self.check_left_out(rows)
        self.plan_path.unlink(missing_ok=True)

    def check_left_out(self, rows: np.ndarray) -> None:
        """Raises: UserError where more than 1 % of `rows` have no finite score."""
        check_left_out(len(np.intersect1d(self.manifest["left_out"], rows)), len(rows), str(self.path))


def check_left_out(count: int, num_rows: int, source: str) -> None:
    """Raises: UserError where more than 1 % of the rows have no finite score."""
    if 100 * count > num_rows:
        raise UserError(
            f"{source}: {count} of {num_rows} rows have a loss or score that is NaN or infinite, more than 1 %: "
            "look at these rows, or score in fp32 (selection.precision) into another output_dir"
        )


def _is_intact(part: Path) -> bool:
    """Whether a part holds what was written to it, by the checksum in its name; one that has none is taken as it is."""
    checksum = part.stem.split("-")[2:]
    return not checksum or checksum[0] == file_digest(part)[:16]


def _plan_id(part: list[list[int]]) -> str:
    return digest(repr(part).encode())[:16]
