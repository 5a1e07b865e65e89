"""Per-sample scores on disk: a folder with `manifest.json` and Parquet parts, or a plain Parquet or CSV file."""

import contextlib
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

from selection.run import products
from selection.run.errors import UserError
from selection.run.log import warn

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
    "loss_untuned": pa.float64(),  # L0: `loss` before the small model is tuned (losses.py has these three)
    "loss_without_prompt": pa.float64(),  # the same behind an empty prompt
    "loss_by_pass": pa.list_(pa.float32()),  # (P,): L_e after each tuning pass e
}
_LISTS = [name for name, kind in MORE_COLUMNS.items() if pa.types.is_list(kind)]

_NONE = np.empty(0, dtype=np.int64)
_Batch = Annotated[list[NonNegativeInt], Field(min_length=1)]  # row numbers
Plan = list[Annotated[list[_Batch], Field(min_length=1)]]  # the parts, each a list of batches


@dataclass(frozen=True)
class Scores:
    """Scores by row. Rows whose loss or score is not finite are `left_out`, and not in `index`."""

    index: np.ndarray  # (n,) int64, ascending, unique
    columns: dict[str, np.ndarray]  # each (n,) float64, finite, not negative; lists (n, d) float32, finite
    ids: list[str] | None  # None too where they were not asked for
    fingerprint: str | None  # of the training split; None for plain files
    num_rows: int | None  # N, of the training split; None for plain files
    source: str
    left_out: np.ndarray = field(default_factory=lambda: _NONE)  # rows, ascending
    made_by: dict | None = None  # what made a score folder (`made_by`)

    effort = property(lambda self: self.columns["effort"])

    def check_complete(self) -> "Scores":
        """The same scores, with N. Raises: UserError where a row of the training split is missing."""
        index = np.union1d(self.index, self.left_out) if len(self.left_out) else self.index
        num_rows = self.num_rows or len(index)
        if len(index) != num_rows or index[-1] != num_rows - 1:
            hole = np.append(index != np.arange(len(index)), True).argmax()
            raise UserError(f"{self.source}: row {hole} has no score: every row needs one")
        return replace(self, num_rows=num_rows)

    def of_all_rows(self) -> np.ndarray:
        """The effort scores (N,). Raises: UserError where a row of the training split has none."""
        if len(self.left_out):
            raise UserError(f"{self.source}: row {self.left_out[0]} was left out in scoring: every row needs a score")
        return self.check_complete().effort

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """The positions of `rows` in `index`. Raises: UserError naming the first row that has no score."""
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


class _Manifest(TypedDict):
    identity: TypedDict("_Identity", {"data_fingerprint": str})
    num_rows: PositiveInt
    columns: list[str]
    left_out: list[int]


def read_manifest(folder: Path) -> dict:
    """The manifest of a score folder. Raises: UserError where it is missing or damaged."""
    record = products.read_sealed(folder / "manifest.json", remove=folder)
    products.checked(_Manifest, record, folder / "manifest.json")
    return record


def made_by(manifest: dict) -> dict:
    """What made a folder's scores: the manifest's identity, and the names of the model and its tuned folder."""
    identity = dict(manifest["identity"])
    named = {key: manifest.get(key) for key in ("model", "tuned")}
    return named | {f"{key}_fingerprint": identity.pop(key, None) for key in named} | identity


def read_scores(path: Path, columns: Sequence[str] = ("effort",), ids: bool = True) -> Scores:
    """Read `index`, `columns` and, with `ids`, `id` (where there is one) of a score folder or a plain file; 10⁸ rows of
    one column need about 5 GB. Raises: UserError for a file or column that is missing or cannot be read, no rows, and
    for a row that has two scores or one that is NaN, infinite or negative."""
    manifest = read_manifest(path) if path.is_dir() else None
    read = dict.fromkeys([*columns, "effort"] if manifest else columns)
    table = _read_table(path, ["index", *read, *["id"] * ids])
    index = table["index"].to_numpy()
    order, left_out = _order(index), _NONE
    index = index[order]
    if len(repeated := index[1:][index[1:] == index[:-1]]):
        raise UserError(f"{path}: row {repeated[0]} has more than one score")
    if manifest and (out := np.isnan(table["effort"].to_numpy())[order]).any():  # rows that scoring left out
        left_out, index, order = index[out], index[~out], order[~out]
    figures = {name: _array(table[name], f"{path}: column {name}")[order] for name in columns}
    names = table["id"].take(pa.array(order)).to_pylist() if "id" in table.column_names else None
    del table, order
    for name, values in figures.items():
        if name in _LISTS:
            check_features(values, index, str(path))
        elif len(bad := np.flatnonzero(~(np.isfinite(values) & (values >= 0)))):
            todo = "it must be finite and not negative: score such rows again or leave them out of the data"
            raise UserError(f"{path}: row {index[bad[0]]} has {name} {values[bad[0]]} ({len(bad)} such rows): {todo}")
    about = (manifest["identity"]["data_fingerprint"], manifest["num_rows"]) if manifest else (None, None)
    return Scores(index, figures, names, *about, str(path), left_out, manifest and made_by(manifest))


def read_ids(path: Path, *choices: np.ndarray) -> list[list[str] | None]:
    """The ids of each choice (m,) of rows that the score folder or file has; None where it has no ids."""
    table = _read_table(path, ["index", "id"])
    if "id" not in table.column_names:
        return [None] * len(choices)
    index = table["index"].to_numpy()
    order = _order(index)
    places = [order[np.searchsorted(index, rows, sorter=order)] for rows in choices]
    return [table["id"].take(pa.array(place)).to_pylist() for place in places]


def is_finished(folder: Path) -> bool:
    """Whether a score folder has parts, and no plan for more."""
    return any(folder.glob("part-*.parquet")) and not (folder / "plan.json").exists()


def has_column(path: Path, name: str) -> bool:
    """Whether a score folder or file has a column. Raises: UserError where it cannot be read."""
    return name in _open(_parts(path)[0], [name]).column_names


def check_features(features: np.ndarray, index: np.ndarray, source: str) -> np.ndarray:
    """Features (n, d) of the rows `index`, as they are. Raises: UserError naming a row that is not finite."""
    if len(bad := np.flatnonzero(~np.isfinite(features).all(1))):
        raise UserError(f"{source}: the features of row {index[bad[0]]} are not finite ({len(bad)} such rows in all)")
    return features


def _order(index: np.ndarray) -> np.ndarray:
    """The positions that sort row numbers (n,); rows 0 to n − 1 without a sort, 10⁸ of them in seconds."""
    if index.max() < len(index):
        order = np.full(len(index), -1)
        order[index] = np.arange(len(index))
        if order.min() >= 0:
            return order
    return np.argsort(index, kind="stable")


def _parts(path: Path) -> list[Path]:
    if not path.exists():
        stage = "verify.py" if path.name == "target" else "effort_score.py"
        raise UserError(f"{path}: no such file or folder: run {stage} first")
    if parts := sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]:
        return parts
    raise UserError(f"{path} holds no finished part yet: run the scoring stage to its end")


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
    kind = path.suffix.lower()
    if kind not in (".csv", ".parquet"):
        raise UserError(f"{path}: scores are read from a score folder, a .parquet or a .csv file")
    try:
        if kind == ".csv":
            return pa.csv.read_csv(path, convert_options=pa.csv.ConvertOptions(column_types={"id": pa.string()}))
        with pa.parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            return file.read([name for name in names if name in there], use_threads=False)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise UserError(f"cannot read scores from {path}: {error}") from None


_COLUMNS = {  # what they must hold; every other column: numbers
    "index": (pa.int64(), "row numbers of the training split: 0, 1, 2, …"),
    "id": (pa.large_string(), "text"),
    **{name: (MORE_COLUMNS[name], "lists of numbers") for name in _LISTS},
}


def _column(table: pa.Table, name: str, path: Path) -> pa.ChunkedArray:
    """The column under its type. Raises: UserError where it is missing, there twice or of another type."""
    if table.column_names.count(name) != 1:
        how_many = "more than one column" if name in table.column_names else "no column"
        todo = ": add the method to selection.methods and score again" if name in MORE_COLUMNS and path.is_dir() else ""
        raise UserError(
            f"{path} has {how_many} {name} (it has {', '.join(table.column_names) or 'none asked for'}){todo}"
        )
    kind, what = _COLUMNS.get(name, (pa.float64(), "numbers"))
    try:
        stored = table[name].type
        if name not in ("id", *_LISTS) and not (pa.types.is_integer(stored) or pa.types.is_floating(stored)):
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

    `identity`: what the numbers depend on; a folder of another one is refused. `columns`: the MORE_COLUMNS wanted; a
    folder that has more keeps them. A part is named after its batches and checksum: part-<plan>-<content>.parquet."""

    def __init__(self, path: Path, identity: dict, num_rows: int, columns: Sequence[str] = ()):
        self.path, self.manifest_path, self.plan_path = path, path / "manifest.json", path / "plan.json"
        self.manifest = {
            "identity": identity,
            "num_rows": num_rows,
            "columns": [name for name in MORE_COLUMNS if name in columns],
            "code_version": products.code_version(),
            "left_out": [],  # rows whose loss or score is not finite
        }
        self.begun = any(path.glob("part-*.parquet"))  # before the first part, the manifest may still change
        if self.begun:
            self.manifest = read_manifest(path)
            if difference := products.first_difference(self.manifest["identity"], identity):
                raise UserError(f"{path} holds scores made otherwise ({difference}): remove it or change output_dir")
            if absent := [name for name in columns if name not in self.manifest["columns"]]:
                raise UserError(f"{path} holds scores without {', '.join(absent)}: remove it or change output_dir")

    def drop_damaged(self) -> None:
        """Remove damaged parts, with a warning: their rows count as missing again."""
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
        """The parts still to be scored, as `make_parts` cuts the missing rows; `about` joins the manifest. The plan is
        kept until it is done: a score's last bits depend on its batch, which must not change when a run is resumed."""
        self.manifest |= about or {}
        products.write_sealed(self.manifest_path, self.manifest)
        if not self.begun and not (self.path / "id").exists():
            products.write_json(self.path / "id", secrets.token_hex(8))
        parts, missing = self._planned() if self.begun else [], self.missing(rows)
        planned = {row for part in parts for batch in part for row in batch}
        if not (planned <= set(rows.tolist()) and set(missing.tolist()) <= planned):  # the plan was for other rows
            products.write_sealed(self.plan_path, {"parts": make_parts(missing)})
        return self.remaining()

    @property
    def id(self) -> str:
        """A random text made with the folder: removed and filled again, it gets another. "" in a folder without one."""
        path = self.path / "id"
        return products.read_json(path, str) if path.exists() else ""

    def remaining(self) -> Plan:
        """The parts of the plan in progress that are still to be scored."""
        return [part for part in self._planned() if not any(self.path.glob(f"part-{_plan_id(part)}-*.parquet"))]

    def _planned(self) -> Plan:
        """All parts of the plan in progress; none where there is no plan, or a damaged one."""
        with contextlib.suppress(UserError):
            return products.checked(Plan, products.read_sealed(self.plan_path).get("parts"), self.plan_path)
        return []

    def write_part(self, part: list[list[int]], columns: dict[str, np.ndarray]) -> None:
        """Write one finished part. `columns` are SCHEMA's and the manifest's, in the part's order."""
        schema = pa.schema([*SCHEMA, *((name, MORE_COLUMNS[name]) for name in self.manifest["columns"])])
        table = pa.table([pa.array(list(columns[field.name]), field.type) for field in schema], schema=schema)
        content = pa.BufferOutputStream()
        pa.parquet.write_table(table, content)
        content = content.getvalue()
        path = self.path / f"part-{_plan_id(part)}-{hashlib.sha256(content).hexdigest()[:16]}.parquet"
        with products.atomic_path(path) as draft:
            draft.write_bytes(content)

    def finish(self, rows: np.ndarray) -> None:
        """Note which of `rows` have no finite score, and drop the plan. Raises: UserError where a row has no score."""
        if not self.plan_path.exists():
            return
        if len(missing := self.missing(rows)):
            raise UserError(f"{self.path}: row {missing[0]} was not scored: call the same command again")
        self.manifest["left_out"] = read_scores(self.path, ids=False).left_out.tolist()
        products.write_sealed(self.manifest_path, self.manifest)
        self.check_left_out(rows)
        self.plan_path.unlink(missing_ok=True)

    def check_left_out(self, rows: np.ndarray, count: int | None = None) -> None:
        """Raises: UserError where more than 1 % of `rows` have no finite score; `count`: how many, if not as noted."""
        count = len(np.intersect1d(self.manifest["left_out"], rows)) if count is None else count
        if 100 * count > len(rows):
            what = f"{count} of {len(rows)} rows have a loss or score that is NaN or infinite, more than 1 %"
            todo = "look at these rows, or score in fp32 (selection.precision) into another output_dir"
            raise UserError(f"{self.path}: {what}: {todo}")


def _is_intact(part: Path) -> bool:
    """Whether a part has the checksum in its name; one without a checksum is taken as it is."""
    checksum = part.stem.split("-")[2:]
    return not checksum or checksum[0] == products.file_digest(part)[:16]


def _plan_id(part: list[list[int]]) -> str:
    return products.digest(repr(part).encode())[:16]
