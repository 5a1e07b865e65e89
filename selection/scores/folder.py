"""Per-sample scores on disk: a folder with `manifest.json` and Parquet parts, or a plain Parquet or CSV file."""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
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


@dataclass(frozen=True)
class Scores:
    """Figures by row. `ids`, `fingerprint` and `num_rows` are known where our own folder was read.

    Rows that scoring left out, as their loss or score is not finite, have none: no method sees them.
    """

    index: np.ndarray  # (n,) int64, ascending, unique
    columns: dict[str, np.ndarray]  # each (n,) float64, finite, not negative; hidden_state (n, d) float32, finite
    ids: list[str] | pa.ChunkedArray | None  # None too where they were not asked for
    fingerprint: str | None  # of the training split
    num_rows: int | None  # of the training split
    source: str
    left_out: np.ndarray = field(default_factory=lambda: _NONE)  # rows, ascending
    made_by: dict | None = None  # of our own folder: see `made_by`

    @property
    def effort(self) -> np.ndarray:
        return self.columns["effort"]

    def check_complete(self) -> "Scores":
        """Raises: UserError where a row of the training split is missing."""
        index = np.union1d(self.index, self.left_out) if len(self.left_out) else self.index
        num_rows = len(index) if self.num_rows is None else self.num_rows
        if len(index) != num_rows or index[-1] != num_rows - 1:
            gaps = np.flatnonzero(index != np.arange(len(index)))  # ascending and unique, so a gap shows
            hole = int(gaps[0]) if len(gaps) else len(index)
            missing = max(num_rows, int(index[-1]) + 1) - len(index)
            raise UserError(
                f"{self.source}: row {hole} of the training split has no score ({missing} rows in all): "
                "every row needs one"
            )
        return self

    def of_all_rows(self) -> np.ndarray:
        """The effort scores as (N,), row by row. Raises: UserError where a row of the training split has none."""
        if len(self.left_out):
            raise UserError(
                f"{self.source}: row {self.left_out[0]} was left out in scoring: every row needs a score here"
            )
        return self.check_complete().effort

    def only(self, rows: np.ndarray) -> "Scores":
        """Just these rows, which must have been scored."""
        left_out = np.intersect1d(rows, self.left_out)
        rows = np.setdiff1d(rows, left_out) if len(left_out) else rows
        positions = self.positions(rows)
        columns = {name: values[positions] for name, values in self.columns.items()}
        return replace(self, index=rows, columns=columns, ids=None, left_out=left_out)

    def at(self, rows: np.ndarray) -> np.ndarray:
        """The effort scores of `rows`. Raises: UserError naming the first row that has none."""
        return self.effort[self.positions(rows)]

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Where `rows` stand in `index`. Raises: UserError naming the first row that has no score."""
        position = np.minimum(np.searchsorted(self.index, rows), len(self.index) - 1)
        if len(absent := rows[self.index[position] != rows]):
            raise UserError(f"{self.source}: row {absent[0]} was drawn for verification and has no score there")
        return position

    def chosen(self, rows: np.ndarray) -> "Scores":
        """What a coreset's file tells of its `rows`, ascending: their ids, read only now, and N; no figures."""
        ids = read_ids(Path(self.source), rows)
        return replace(self, index=rows, columns={}, ids=ids, num_rows=len(self.index) + len(self.left_out))

    def ids_at(self, positions: np.ndarray) -> list[str]:
        if isinstance(self.ids, list):
            return [self.ids[position] for position in positions]
        return self.ids.take(pa.array(positions)).to_pylist()


class _Identity(TypedDict):
    data_fingerprint: str


_Batch = Annotated[list[NonNegativeInt], Field(min_length=1)]
_Part = Annotated[list[_Batch], Field(min_length=1)]


class _Manifest(TypedDict):
    identity: _Identity
    num_rows: PositiveInt
    columns: list[str]
    left_out: list[int]


def read_manifest(folder: Path) -> dict:
    """Of a score folder. Raises: UserError where it is missing or damaged."""
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

    Of each part only these columns are read, and none is held twice as a whole: 10⁸ rows of one column need about 4 GB.
    Raises: UserError for a missing or unreadable file, a missing column, no rows, a duplicate or negative index,
    and figures that are NaN, infinite or negative; each names the row.
    """
    if path.is_dir():
        manifest = read_manifest(path)
        fingerprint, num_rows = manifest["identity"]["data_fingerprint"], manifest["num_rows"]
        named, maker = np.array(manifest["left_out"], dtype=np.int64), made_by(manifest)
    else:
        fingerprint = num_rows = maker = None
    asked = columns
    if (path / "plan.json").exists() and "effort" not in columns:  # not finished: nothing else says who is left out
        columns = ("effort", *columns)
    names = ("index", "id", *columns) if ids else ("index", *columns)
    indices, pieces, id_pieces = [], {name: [] for name in columns}, []
    for part in _parts(path):
        if path.is_dir() and not is_intact(part):
            raise UserError(f"{part} is damaged (its checksum does not fit): run the scoring stage again to mend it")
        table = _read_table(part, names)
        if not table.num_rows:
            continue
        indices.append(_row_numbers(table, path))
        for name in columns:
            pieces[name].append((_vectors if name == "hidden_state" else _numbers)(table, name, path))
        if ids and "id" in table.column_names:
            id_pieces.append(_ids(table, path).to_numpy())
    if not indices:
        raise UserError(f"{path} holds no scores")
    if id_pieces and len(id_pieces) != len(indices):
        raise UserError(
            f"{path}: only {len(id_pieces)} of {len(indices)} parts have a column id: all need one, or none"
        )
    index = np.concatenate(indices)
    del indices
    index, places = _ascending(index, path)
    figures = {}
    for name in columns:
        if name == "hidden_state":
            if len({piece.shape[1] for piece in pieces[name]}) != 1:
                raise UserError(f"{path}: column {name} must hold lists of one length")
            figures[name] = _in_place(pieces[name], places, pieces[name][0].dtype)
        else:
            figures[name] = _in_place(pieces[name], places, np.float64)
    names_of_rows = _in_place(id_pieces, places, object).tolist() if id_pieces else None
    left_out = _NONE
    if path.is_dir() and (nothing := _without_figures(figures, index, named)).any():
        left_out, index = index[nothing], index[~nothing]
        figures = {name: values[~nothing] for name, values in figures.items()}
        names_of_rows = names_of_rows and [each for each, out in zip(names_of_rows, nothing, strict=True) if not out]
    figures = {name: figures[name] for name in asked}
    for name, values in figures.items():
        if name == "hidden_state":
            check_features(values, index, str(path))
        elif len(bad := np.flatnonzero(~(np.isfinite(values) & (values >= 0)))):
            raise UserError(
                f"{path}: row {index[bad[0]]} has {name} {values[bad[0]]} ({len(bad)} such rows in all): it must be "
                "finite and not negative; score these rows again or leave them out of the data"
            )
    return Scores(index, figures, names_of_rows, fingerprint, num_rows, str(path), left_out, maker)


def _without_figures(figures: dict[str, np.ndarray], index: np.ndarray, named: np.ndarray) -> np.ndarray:
    """Whether a row (n,) is `named` or has no number in some column: what scoring writes for a row it leaves out."""
    nothing = np.isin(index, named) if len(named) else np.zeros(len(index), dtype=bool)
    for values in figures.values():
        nothing |= np.isnan(values if values.ndim == 1 else values[:, 0])
    return nothing


def read_ids(path: Path, rows: np.ndarray) -> pa.ChunkedArray | None:
    """The ids of `rows` (m,), ascending row numbers that the score folder or file has; None where it has no ids."""
    wanted = np.zeros(rows[-1] + 1, dtype=bool)
    wanted[rows] = True
    found, pieces = [], []
    for part in _parts(path):
        table = _read_table(part, ("index", "id"))
        if "id" not in table.column_names:
            return None
        index = _row_numbers(table, path)
        here = np.flatnonzero(index < len(wanted))
        here = here[wanted[index[here]]]
        found.append(index[here])
        pieces += _ids(table, path).take(pa.array(here)).cast(pa.large_string()).chunks  # beyond 2 GiB of text
    return pa.chunked_array(pieces, pa.large_string()).take(pa.array(np.argsort(np.concatenate(found))))


def _ascending(index: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The row numbers in ascending order, and the place of each one given (n,); None where they are in order.

    Raises: UserError where one comes twice.
    """
    if (index[1:] > index[:-1]).all():
        return index, None
    if index.max() < len(index):
        seen = np.zeros(len(index), dtype=bool)
        seen[index] = True
        if seen.all():  # rows 0 to n − 1, each once: its number is its place
            return np.arange(len(index)), index
    order = np.argsort(index, kind="stable")
    index = index[order]
    if len(repeated := index[1:][index[1:] == index[:-1]]):
        raise UserError(f"{path}: row {repeated[0]} has more than one score")
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return index, places


def _in_place(pieces: list[np.ndarray], places: np.ndarray | None, dtype: type) -> np.ndarray:
    """The pieces (k, …) joined to one (n, …), each row at its place; empties `pieces`, to hold no column twice."""
    joined = np.empty((sum(map(len, pieces)), *pieces[0].shape[1:]), dtype=dtype)
    end = len(joined)
    while pieces:
        piece = pieces.pop()
        start = end - len(piece)
        joined[slice(start, end) if places is None else places[start:end]] = piece
        end = start
    return joined


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
        if path.suffix.lower() == ".csv":
            as_text = pa.csv.ConvertOptions(column_types={"id": pa.string()})
            return _with_readable_text(pa.csv.read_csv(path, convert_options=as_text))
        if path.suffix.lower() == ".parquet":
            with pa.parquet.ParquetFile(path) as file:
                there = file.schema_arrow.names
                return _with_readable_text(file.read([name for name in names if name in there], use_threads=False))
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise UserError(f"cannot read scores from {path}: {error}") from None
    raise UserError(f"{path}: scores are read from a score folder, a .parquet or a .csv file")


def _with_readable_text(table: pa.Table) -> pa.Table:
    """The table. Raises: UnicodeDecodeError, ArrowException where names or ids are no UTF-8."""
    if "id" in table.column_names:
        table["id"].validate(full=True)
    return table


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


def _row_numbers(table: pa.Table, path: Path) -> np.ndarray:
    index = _numbers(table, "index", path)
    whole = index.dtype.kind != "f" or (index == np.floor(index)).all()
    if len(index) and not (whole and index.min() >= 0 and index.max() < 2**63):
        raise UserError(f"{path}: column index must hold row numbers of the training split: 0, 1, 2, …")
    return index.astype(np.int64, copy=False)


def _ids(table: pa.Table, path: Path) -> pa.ChunkedArray:
    column = _column(table, "id", path)
    if not pa.types.is_string(column.type) and not pa.types.is_integer(column.type):
        raise UserError(f"{path}: column id holds {column.type}, not text")
    return column.cast(pa.string())


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
            if not is_intact(part):
                warn(f"{part} is damaged: its rows are scored again")
                part.unlink(missing_ok=True)

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Of `rows`, those that no part holds yet."""
        done = [_numbers(_read_table(part, ("index",)), "index", part) for part in self.path.glob("part-*.parquet")]
        return np.setdiff1d(rows, np.concatenate(done)) if done else rows

    def plan(self, rows: np.ndarray, make_parts, about: dict | None = None) -> list[list[list[int]]]:
        """The parts still to be scored: each a list of batches, each a list of rows.

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
            parts = make_parts(missing)
            write_sealed(self.plan_path, {"parts": parts})
        return self.remaining()

    @property
    def id(self) -> str:
        """Of this folder alone: one that is filled again after it was removed has another. "" where none is known."""
        return checked(str, read_json(self.path / "id"), self.path / "id") if (self.path / "id").exists() else ""

    def remaining(self) -> list[list[list[int]]]:
        """Of the plan in progress, the parts still to be scored."""
        return [part for part in self._planned() if not any(self.path.glob(f"part-{_plan_id(part)}-*.parquet"))]

    def _planned(self) -> list[list[list[int]]]:
        """All parts of the plan in progress; none where there is no plan, or a damaged one."""
        try:
            plan = read_sealed(self.plan_path) if self.plan_path.exists() else {"parts": []}
            return checked(list[_Part], plan.get("parts"), self.plan_path)
        except UserError:
            return []

    def write_part(self, part: list[list[int]], columns: dict[str, np.ndarray]) -> None:
        """One finished part. `columns` are SCHEMA's and the manifest's, in the part's order."""
        schema = SCHEMA
        for name in self.manifest["columns"]:
            schema = schema.append(pa.field(name, MORE_COLUMNS[name]))
        table = pa.table([pa.array(list(columns[field.name]), field.type) for field in schema], schema=schema)
        content = pa.BufferOutputStream()
        pa.parquet.write_table(table, content)
        content = content.getvalue()
        path = self.path / f"part-{_plan_id(part)}-{hashlib.sha256(content).hexdigest()[:16]}.parquet"
        with atomic_path(path) as draft:
            draft.write_bytes(content)

    def finish(self, rows: np.ndarray) -> None:
        """Every one of `rows` has its score: note those that are not finite, forget the plan.

        Raises: UserError where a row has none, or where those that are not finite are more than 1 %.
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


def is_intact(part: Path) -> bool:
    """Whether a part holds what was written to it, by the checksum in its name; one that has none is taken as it is."""
    checksum = part.stem.split("-")[2:]
    return not checksum or checksum[0] == file_digest(part)[:16]


def _plan_id(part: list[list[int]]) -> str:
    return digest(repr(part).encode())[:16]
