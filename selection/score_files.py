"""Per-sample scores on disk: a folder with `manifest.json` and Parquet parts, or a plain Parquet or CSV file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from selection.errors import UserError
from selection.files import atomic_path, code_version, digest, first_difference, read_json, write_json

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
    """Effort scores by row. `ids`, `fingerprint` and `num_rows` are known where our own folder was read."""

    index: np.ndarray  # (n,) int64, ascending, unique
    effort: np.ndarray  # (n,) float64, finite, not negative
    ids: list[str] | None
    fingerprint: str | None  # of the training split
    num_rows: int | None  # of the training split
    source: str

    def of_all_rows(self) -> np.ndarray:
        """The scores as (N,), row by row. Raises: UserError where a row of the training split has none."""
        num_rows = len(self.index) if self.num_rows is None else self.num_rows
        if len(self.index) != num_rows or self.index[-1] != num_rows - 1:
            gaps = np.flatnonzero(self.index != np.arange(len(self.index)))  # ascending and unique, so a gap shows
            hole = int(gaps[0]) if len(gaps) else len(self.index)
            missing = max(num_rows, int(self.index[-1]) + 1) - len(self.index)
            raise UserError(
                f"{self.source}: row {hole} of the training split has no score ({missing} rows in all): "
                "every row needs one"
            )
        return self.effort

    def only(self, rows: np.ndarray) -> "Scores":
        """Just these rows, which must have scores."""
        return replace(self, index=rows, effort=self.at(rows), ids=None)

    def at(self, rows: np.ndarray) -> np.ndarray:
        """The scores of `rows`. Raises: UserError naming the first row that has none."""
        position = np.minimum(np.searchsorted(self.index, rows), len(self.index) - 1)
        if len(absent := rows[self.index[position] != rows]):
            raise UserError(f"{self.source}: row {absent[0]} was drawn for verification and has no score there")
        return self.effort[position]


def read_scores(path: Path) -> Scores:
    """Read a score folder or a plain file with columns `index,effort` (and `id`, if there).

    Raises: UserError for a missing or unreadable file, a missing column, no rows, a duplicate or negative index,
    and scores that are NaN, infinite or negative; each names the row.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder: run the scoring stage first (effort_score.py, verify.py)")
    if path.is_dir():
        manifest = read_json(path / "manifest.json")
        try:
            fingerprint, num_rows = manifest["identity"]["data_fingerprint"], manifest["num_rows"]
        except (KeyError, TypeError):
            raise UserError(f"{path / 'manifest.json'} is no manifest of a score folder") from None
        parts = sorted(path.glob("part-*.parquet"))
        if not parts:
            raise UserError(f"{path} holds no finished part yet: run the scoring stage to its end")
        table = pa.concat_tables([_read_table(part) for part in parts])
    else:
        fingerprint = num_rows = None
        table = _read_table(path)
    index, effort = (_numbers(table, name, path) for name in ("index", "effort"))
    if len(index) == 0:
        raise UserError(f"{path} holds no scores")
    if not np.isfinite(index).all() or (index != np.floor(index)).any() or index.min() < 0 or index.max() >= 2**63:
        raise UserError(f"{path}: column index must hold row numbers of the training split: 0, 1, 2, …")
    order = np.argsort(index, kind="stable")
    index, effort = index[order].astype(np.int64), effort[order].astype(np.float64)
    if len(repeated := index[1:][index[1:] == index[:-1]]):
        raise UserError(f"{path}: row {repeated[0]} has more than one score")
    if len(bad := np.flatnonzero(~(np.isfinite(effort) & (effort >= 0)))):
        raise UserError(
            f"{path}: row {index[bad[0]]} has effort {effort[bad[0]]} ({len(bad)} such rows in all): "
            "an effort score is a norm, finite and not negative; score these rows again or leave them out of the data"
        )
    ids = None
    if "id" in table.column_names:
        if not pa.types.is_string(table["id"].type) and not pa.types.is_integer(table["id"].type):
            raise UserError(f"{path}: column id holds {table['id'].type}, not text")
        ids = table["id"].cast(pa.string()).take(pa.array(order)).to_pylist()
    return Scores(index, effort, ids, fingerprint, num_rows, str(path))


def _read_table(path: Path) -> pa.Table:
    try:
        if path.suffix == ".csv":
            as_text = pa.csv.ConvertOptions(column_types={"id": pa.string()})
            return pa.csv.read_csv(path, convert_options=as_text)
        if path.suffix == ".parquet":
            wanted = [name for name in ("index", "id", "effort") if name in pa.parquet.read_schema(path).names]
            return pa.parquet.read_table(path, columns=wanted, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read scores from {path}: {error}") from None
    raise UserError(f"{path}: scores are read from a score folder, a .parquet or a .csv file")


def _numbers(table: pa.Table, name: str, path: Path) -> np.ndarray:
    if table.column_names.count(name) != 1:
        how_many = "no column" if name not in table.column_names else "more than one column"
        raise UserError(f"{path} has {how_many} {name} (it has {', '.join(table.column_names)})")
    column = table[name]
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise UserError(f"{path}: column {name} holds {column.type}, not numbers")
    return column.to_numpy()


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
        done = [_numbers(_read_table(part), "index", part) for part in parts]
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
