"""Per-sample scores on disk: a folder with `manifest.json` and Parquet parts, or a plain Parquet or CSV file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from pydantic import PositiveInt
from typing_extensions import TypedDict

from selection.errors import UserError
from selection.files import atomic_path, checked, code_version, digest, first_difference, read_json, write_json

SCORER_VERSION = 2  # counted up where a change moves scores by more than fp32's noise
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


@dataclass(frozen=True)
class Scores:
    """Figures by row. `ids`, `fingerprint` and `num_rows` are known where our own folder was read."""

    index: np.ndarray  # (n,) int64, ascending, unique
    columns: dict[str, np.ndarray]  # each (n,) float64, finite, not negative; hidden_state (n, d) float32, finite
    ids: list[str] | None
    fingerprint: str | None  # of the training split
    num_rows: int | None  # of the training split
    source: str

    @property
    def effort(self) -> np.ndarray:
        return self.columns["effort"]

    def check_complete(self) -> "Scores":
        """Raises: UserError where a row of the training split is missing."""
        num_rows = len(self.index) if self.num_rows is None else self.num_rows
        if len(self.index) != num_rows or self.index[-1] != num_rows - 1:
            gaps = np.flatnonzero(self.index != np.arange(len(self.index)))  # ascending and unique, so a gap shows
            hole = int(gaps[0]) if len(gaps) else len(self.index)
            missing = max(num_rows, int(self.index[-1]) + 1) - len(self.index)
            raise UserError(
                f"{self.source}: row {hole} of the training split has no score ({missing} rows in all): "
                "every row needs one"
            )
        return self

    def of_all_rows(self) -> np.ndarray:
        """The effort scores as (N,), row by row. Raises: UserError where a row of the training split has none."""
        return self.check_complete().effort

    def only(self, rows: np.ndarray) -> "Scores":
        """Just these rows, which must have scores."""
        positions = self._positions(rows)
        columns = {name: values[positions] for name, values in self.columns.items()}
        return replace(self, index=rows, columns=columns, ids=None)

    def at(self, rows: np.ndarray) -> np.ndarray:
        """The effort scores of `rows`. Raises: UserError naming the first row that has none."""
        return self.effort[self._positions(rows)]

    def _positions(self, rows: np.ndarray) -> np.ndarray:
        position = np.minimum(np.searchsorted(self.index, rows), len(self.index) - 1)
        if len(absent := rows[self.index[position] != rows]):
            raise UserError(f"{self.source}: row {absent[0]} was drawn for verification and has no score there")
        return position


class _Identity(TypedDict):
    data_fingerprint: str


class _Manifest(TypedDict):
    identity: _Identity
    num_rows: PositiveInt


def read_scores(path: Path, columns: Sequence[str] = ("effort",)) -> Scores:
    """Read a score folder or a plain file with columns `index`, those asked for (and `id`, if there).

    Raises: UserError for a missing or unreadable file, a missing column, no rows, a duplicate or negative index,
    and figures that are NaN, infinite or negative; each names the row.
    """
    if path.is_dir():
        manifest = checked(_Manifest, read_json(path / "manifest.json"), path / "manifest.json")
        fingerprint, num_rows = manifest["identity"]["data_fingerprint"], manifest["num_rows"]
    else:
        fingerprint = num_rows = None
    table = pa.concat_tables([_read_table(part, ("index", "id", *columns)) for part in _parts(path)])
    index = _numbers(table, "index", path)
    if len(index) == 0:
        raise UserError(f"{path} holds no scores")
    if not np.isfinite(index).all() or (index != np.floor(index)).any() or index.min() < 0 or index.max() >= 2**63:
        raise UserError(f"{path}: column index must hold row numbers of the training split: 0, 1, 2, …")
    order = np.argsort(index, kind="stable")
    index = index[order].astype(np.int64)
    if len(repeated := index[1:][index[1:] == index[:-1]]):
        raise UserError(f"{path}: row {repeated[0]} has more than one score")
    figures = {}
    for name in columns:
        if name == "hidden_state":
            figures[name] = check_features(_vectors(table, name, path)[order], index, str(path))
            continue
        values = figures[name] = _numbers(table, name, path)[order].astype(np.float64)
        if len(bad := np.flatnonzero(~(np.isfinite(values) & (values >= 0)))):
            raise UserError(
                f"{path}: row {index[bad[0]]} has {name} {values[bad[0]]} ({len(bad)} such rows in all): it must be "
                "finite and not negative; score these rows again or leave them out of the data"
            )
    ids = None
    if "id" in table.column_names:
        if not pa.types.is_string(table["id"].type) and not pa.types.is_integer(table["id"].type):
            raise UserError(f"{path}: column id holds {table['id'].type}, not text")
        ids = table["id"].cast(pa.string()).take(pa.array(order)).to_pylist()
    return Scores(index, figures, ids, fingerprint, num_rows, str(path))


def has_column(path: Path, name: str) -> bool:
    """Whether a score folder or file has a column. Raises: UserError where it cannot be read."""
    return name in _read_table(_parts(path)[0], (name,)).column_names


def check_features(features: np.ndarray, index: np.ndarray, source: str) -> np.ndarray:
    """Features (n, d) of the rows `index`, as they are. Raises: UserError naming a row that is not finite."""
    if len(bad := np.flatnonzero(~np.isfinite(features).all(1))):
        raise UserError(f"{source}: the features of row {index[bad[0]]} are not finite ({len(bad)} such rows in all)")
    return features


def _parts(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder: run the scoring stage first (effort_score.py, verify.py)")
    parts = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
    if not parts:
        raise UserError(f"{path} holds no finished part yet: run the scoring stage to its end")
    return parts


def _read_table(path: Path, names: Sequence[str]) -> pa.Table:
    """Those of `names` that the file has; a CSV file as a whole."""
    try:
        if path.suffix == ".csv":
            as_text = pa.csv.ConvertOptions(column_types={"id": pa.string()})
            return pa.csv.read_csv(path, convert_options=as_text)
        if path.suffix == ".parquet":
            there = pa.parquet.read_schema(path).names
            wanted = [name for name in names if name in there]
            return pa.parquet.read_table(path, columns=wanted, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read scores from {path}: {error}") from None
    raise UserError(f"{path}: scores are read from a score folder, a .parquet or a .csv file")


def _column(table: pa.Table, name: str, path: Path) -> pa.ChunkedArray:
    if table.column_names.count(name) != 1:
        how_many = "no column" if name not in table.column_names else "more than one column"
        there = f"it has {', '.join(table.column_names)}" if table.column_names else "of those asked for, it has none"
        raise UserError(f"{path} has {how_many} {name} ({there})")
    return table[name]


def _numbers(table: pa.Table, name: str, path: Path) -> np.ndarray:
    column = _column(table, name, path)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise UserError(f"{path}: column {name} holds {column.type}, not numbers")
    return column.to_numpy()


def _vectors(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """A column of lists of equal length as (n, d)."""
    column = _column(table, name, path).combine_chunks()
    if not pa.types.is_list(column.type) or not pa.types.is_floating(column.type.value_type):
        raise UserError(f"{path}: column {name} holds {column.type}, not lists of numbers")
    lengths = column.value_lengths()
    if column.null_count or len(lengths.unique()) != 1:
        raise UserError(f"{path}: column {name} must hold lists of one length")
    return column.flatten().to_numpy().reshape(len(column), -1)


class ScoreFolder:
    """Scores of one model under one setting, growing part by part. Every write is atomic.

    `identity` says what the numbers depend on; a folder made under another identity is refused, so scores of two
    models, data sets or number formats never mix. `columns`: of MORE_COLUMNS those that must be there; a folder that
    has more keeps them, in every part.
    """

    def __init__(self, path: Path, identity: dict, num_rows: int, columns: Sequence[str] = ()):
        self.path, self.manifest_path, self.plan_path = path, path / "manifest.json", path / "plan.json"
        self.manifest = {
            "identity": identity,
            "num_rows": num_rows,
            "columns": [name for name in MORE_COLUMNS if name in columns],
            "code_version": code_version(),
            "cost": {"seconds": 0.0, "samples": 0, "tokens": 0},
        }
        self.begun = any(path.glob("part-*.parquet"))  # a manifest without scores binds nobody
        if self.begun:
            self.manifest = read_json(self.manifest_path)
            if difference := first_difference(self.manifest.get("identity", {}), identity):
                raise UserError(f"{path} holds scores made otherwise ({difference}): remove it or change output_dir")
            if absent := [name for name in columns if name not in self.manifest["columns"]]:
                raise UserError(f"{path} holds scores without {', '.join(absent)}: remove it or change output_dir")

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Of `rows`, those that no part holds yet."""
        parts = sorted(self.path.glob("part-*.parquet"))
        done = [_numbers(_read_table(part, ("index",)), "index", part) for part in parts]
        return np.setdiff1d(rows, np.concatenate(done)) if done else rows

    def plan(self, rows: np.ndarray, make_parts, about: dict | None = None) -> list[list[list[int]]]:
        """The parts still to be scored: each a list of batches, each a list of rows.

        `make_parts` cuts the missing rows into parts. Its plan is kept until it is done, so that an interrupted run
        goes on with the same batches: a score's last bits depend on what shares its batch. `about` joins the
        manifest, for the reader.
        """
        self.manifest |= about or {}
        write_json(self.manifest_path, self.manifest)
        parts = read_json(self.plan_path)["parts"] if self.begun and self.plan_path.exists() else []
        planned, missing = {row for part in parts for batch in part for row in batch}, self.missing(rows)
        if not (planned <= set(rows.tolist()) and set(missing.tolist()) <= planned):  # not the plan of this request
            parts = make_parts(missing)
            write_json(self.plan_path, {"parts": parts})
        return [part for part in parts if not self._part_path(part).exists()]

    def write_part(self, part: list[list[int]], columns: dict[str, np.ndarray], seconds: float, tokens: int) -> None:
        """One finished part, then its cost. `columns` are SCHEMA's and the manifest's, in the part's order."""
        schema = SCHEMA
        for name in self.manifest["columns"]:
            schema = schema.append(pa.field(name, MORE_COLUMNS[name]))
        table = pa.table([pa.array(list(columns[field.name]), field.type) for field in schema], schema=schema)
        with atomic_path(self._part_path(part)) as draft:
            pa.parquet.write_table(table, draft)
        cost = self.manifest["cost"]
        cost["seconds"] = round(cost["seconds"] + seconds, 3)
        cost["samples"] += table.num_rows
        cost["tokens"] += tokens
        write_json(self.manifest_path, self.manifest)

    def finish(self) -> None:
        """Every asked row has its score: forget the plan."""
        self.plan_path.unlink(missing_ok=True)

    def _part_path(self, part: list[list[int]]) -> Path:
        return self.path / f"part-{digest(repr(part).encode())[:16]}.parquet"
