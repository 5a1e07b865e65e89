"""Coresets on disk: our JSON, and the index lists that the authors published as `.pt`."""

import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from selection.method.staff import Choice, floor_share
from selection.run.errors import UserError
from selection.run.log import say
from selection.run.products import atomic_path, checked, code_version, digest, read_json
from selection.scores.folder import Scores

_CHUNK = 2**16  # rows written at a time
# The paper's data sets by the rows of their training splits, and its rates: what published lists may be of.
PUBLISHED_ROWS = {"BioInstruct": 22_504, "DialogSum": 13_014, "WMT-19 kk-en": 115_784}
PUBLISHED_RATES = (0.8, 0.5, 0.3, 0.2, 0.1)
# Names of a run folder's own data sets, tuned targets and records.
_RESERVED = ("train", "eval", "full", "untuned", "split", "dataset_info")


@dataclass(frozen=True)
class Coreset:
    """Rows of the training split, with what is known of the data they were chosen from."""

    name: str  # e.g. staff-0.1
    indices: np.ndarray  # (m,) int64, ascending, unique
    ids: list[str] | None
    fingerprint: str | None
    num_rows: int | None = None  # of the training split, if known
    published: bool = False  # a `.pt` index list
    # What made the scores that it was cut from, and those of the target that V_i is of: `made_by` in score_files.py.
    scores: dict | None = None
    target: dict | None = None


def coreset_name(method: str, rate: float) -> str:
    """staff-0.1; the rate in full, so that two rates never share a name."""
    return f"{method}-{str(rate).removesuffix('.0')}"


def write_coreset(
    folder: Path, method: str, rate: float, choice: Choice, scores: Scores, record: dict[str, Any]
) -> Path:
    """Write METHOD-RATE.json, the keys of `record` in between; returns the file. `scores` has at least the chosen rows.

    Indices and ids go out piece by piece, in the layout of `write_json`: no list of all of them is ever held.
    """
    path = folder / f"{coreset_name(method, rate)}.json"
    about = {
        "method": method,
        "rate": rate,
        **record,
        "scores": scores.made_by,
        "num_rows": len(scores.index) if scores.num_rows is None else scores.num_rows,
        "size": len(choice.rows),
        "data_fingerprint": scores.fingerprint,
        "code_version": code_version(),
        "indices_sha256": _checksum(choice.rows),
    }
    head = json.dumps(about, indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    with atomic_path(path) as draft, draft.open("w", encoding="utf-8") as file:
        file.write(f'{head},\n "indices": [')
        positions = scores.positions(choice.rows)
        _write_items(file, (choice.rows[chunk].tolist() for chunk in _chunks(len(positions))))
        file.write('\n ],\n "ids": ')
        if scores.ids is None:
            file.write("null\n}\n")
        else:
            file.write("[")
            _write_items(file, (scores.ids_at(positions[chunk]) for chunk in _chunks(len(positions))))
            file.write("\n ]\n}\n")
    return path


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, length, _CHUNK))


def _write_items(file: TextIO, pieces: Iterable[list]) -> None:
    """The items of a list, one a line."""
    between = "\n  "
    for items in pieces:
        file.write(between + json.dumps(items, separators=(",\n  ", ": "), ensure_ascii=False)[1:-1])
        between = ",\n  "


def read_coreset(path: Path) -> Coreset:
    """Read a coreset JSON or a published `.pt` index list (unpickled with weights_only=True: no code runs).

    Raises: UserError for an unreadable file, and for indices that are no row numbers or not unique.
    """
    ids = fingerprint = num_rows = checksum = scores = target = None
    if path.suffix == ".pt":
        indices = _read_published(path)
    else:
        record = read_json(path)
        if not isinstance(record, dict) or not isinstance(record.get("indices"), list):
            raise UserError(f"{path} is no coreset: it has no list `indices`")
        indices, ids, fingerprint = record["indices"], record.get("ids"), record.get("data_fingerprint")
        num_rows, checksum = record.get("num_rows"), record.get("indices_sha256")
        scores, target = (checked(dict | None, record.get(key), path) for key in ("scores", "target"))
        if record.get("size", len(indices)) != len(indices):
            raise UserError(f"{path} says size {record['size']} and holds {len(indices)} indices: cut it again")
        if ids is not None and (not isinstance(ids, list) or len(ids) != len(indices)):
            raise UserError(f"{path}: `ids` must name each of the {len(indices)} indices")
    if not indices or not all(type(i) is int and 0 <= i < 2**63 for i in indices):
        raise UserError(f"{path}: `indices` must be row numbers of the training split, at least one")
    order = np.argsort(np.array(indices, dtype=np.int64), kind="stable")
    ascending = np.array(indices, dtype=np.int64)[order]
    if len(repeated := ascending[1:][ascending[1:] == ascending[:-1]]):
        raise UserError(f"{path}: row {repeated[0]} is chosen more than once")
    if checksum not in (None, _checksum(ascending)):
        raise UserError(f"{path} is damaged (the checksum of its indices does not fit): cut it again")
    if path.stem in _RESERVED or not re.fullmatch(r"[\w=+-][\w.=+-]*", path.stem):
        raise UserError(
            f"{path}: a coreset's file name names its data set and tuned model: rename it to letters, digits and . _ - "
            f"alone, no dot in front, and not {', '.join(_RESERVED)}"
        )
    ids = [ids[i] for i in order] if ids else None
    return Coreset(path.stem, ascending, ids, fingerprint, num_rows, path.suffix == ".pt", scores, target)


def _checksum(indices: np.ndarray) -> str:
    return digest(memoryview(np.ascontiguousarray(indices, dtype=np.int64)).cast("B"))


def _read_published(path: Path) -> list[int]:
    import torch  # heavy, and only these files need it

    try:
        if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):  # torch checks no checksum
            raise UserError(f"{path} is damaged ({damaged}): get it again")
        value = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(value, list | tuple):
            return list(value)
        # A tensor may claim more numbers than the file holds.
        if isinstance(value, torch.Tensor) and value.ndim == 1 and value.nbytes <= path.stat().st_size:
            return value.tolist()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except UserError:
        raise
    except Exception:  # whatever a damaged or hostile file makes them raise
        pass
    raise UserError(f"{path} is no plain index list: a list or tensor of row numbers is expected")


def check_fits(coreset: Coreset, ids: list[str], fingerprint: str, source: str) -> None:
    """Refuse a coreset that was chosen from other data than the training split at hand (its `ids`, row by row).

    A coreset cut from plain score files has no fingerprint; then its number of rows must do. A `.pt` list names no data
    at all; then its length must be one that the paper's rates give (`check_published`), or a line says that it is none.
    """
    if coreset.published and (said := check_published(len(coreset.indices), len(ids), source)):
        say(said)
    if coreset.indices[-1] >= len(ids):
        raise UserError(
            f"{source}: row {coreset.indices[-1]} is outside the training split of {len(ids)} rows: "
            "the coreset is for other data"
        )
    if coreset.num_rows is not None and coreset.num_rows != len(ids):
        raise UserError(
            f"{source}: chosen from {coreset.num_rows} rows, the training split has {len(ids)}: "
            "the coreset is for other data"
        )
    if coreset.fingerprint is None:
        return
    for row, stored in zip(coreset.indices, coreset.ids or [], strict=coreset.ids is not None):
        if ids[row] != stored:
            raise UserError(
                f"{source}: row {row} has id {ids[row]} in the data at hand and {stored} in the coreset: "
                "the coreset is for other data; cut it again"
            )
    if coreset.fingerprint != fingerprint:
        raise UserError(
            f"{source}: chosen from other data (fingerprint {coreset.fingerprint}, at hand {fingerprint}): cut it again"
        )


def check_published(count: int, num_rows: int, source: str) -> str | None:
    """Whether a published list of `count` rows can be of a training split of `num_rows`: m = ⌊rate · N⌋, give or take
    one, as the authors' rounding is not known. None: it can; else a line to show.

    Raises: UserError where it is the length of a list of another of the paper's data sets.
    """
    if _published_rate(count, num_rows):
        return None
    for name, rows in PUBLISHED_ROWS.items():
        if rate := _published_rate(count, rows):
            raise UserError(
                f"{source}: {count:,} rows are the paper's coreset of {name} at rate {rate:g} (of {rows:,} training "
                f"rows), the training split at hand has {num_rows:,}: the coreset is for other data"
            )
    rates = ", ".join(f"{rate:g}" for rate in PUBLISHED_RATES)
    return f"{source}: {count:,} rows are no published rate ({rates}) of the {num_rows:,} rows of the training split"


def _published_rate(count: int, num_rows: int) -> float | None:
    return next((rate for rate in PUBLISHED_RATES if abs(count - floor_share(rate, num_rows)) <= 1), None)
