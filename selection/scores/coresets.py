"""Coresets on disk: our JSON, and the index lists that the authors published as `.pt`; quotas of several data sets."""

import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from selection.method.quotas import Quotas, shares
from selection.method.staff import coreset_size, floor_share
from selection.rows.split import data_sets, split_numbers
from selection.run.config import Experiment
from selection.run.errors import UserError, refusals
from selection.run.log import say
from selection.run.products import checked, code_version, digest, read_json, write_json
from selection.scores.folder import Scores
from selection.scores.pool import LeftOut

# The paper's data sets by the rows of their training splits, and its rates.
PUBLISHED_ROWS = {"BioInstruct": 22_504, "DialogSum": 13_014, "WMT-19 kk-en": 115_784}
PUBLISHED_RATES = (0.8, 0.5, 0.3, 0.2, 0.1)
# Names of a run folder's own data sets, tuned targets and records.
_RESERVED = ("train", "eval", "dev", "full", "untuned", "split", "dataset_info")


@dataclass(frozen=True)
class Coreset:
    """Rows of the training split, with what is known of the data they were chosen from."""

    name: str  # e.g. staff-0.1
    indices: np.ndarray  # (m,) int64, ascending, unique
    ids: list[str] | None
    fingerprint: str | None
    num_rows: int | None = None  # of the training split, if known
    published: bool = False  # a `.pt` index list
    scores: dict | None = None  # what made the scores that it was cut from (`made_by` in folder.py)
    target: dict | None = None  # the same for the target's scores in V_i
    num_train_epochs: float | None = None  # passes to tune for; None: as configured
    left_out: LeftOut | None = None  # rows that it was not chosen from


class _Record(TypedDict):
    indices: Annotated[list[Annotated[int, Field(strict=True, ge=0, lt=2**63)]], Field(min_length=1)]
    ids: NotRequired[list[str | None] | None]
    data_fingerprint: NotRequired[str | None]
    num_rows: NotRequired[int | None]
    size: NotRequired[int]
    indices_sha256: NotRequired[str]
    scores: NotRequired[dict | None]
    target: NotRequired[dict | None]
    num_train_epochs: NotRequired[Annotated[float, Field(gt=0, allow_inf_nan=False)] | None]
    left_out: NotRequired[LeftOut]


def coreset_name(method: str, rate: float) -> str:
    """staff-0.1; the rate in full, so that two rates never share a name."""
    return f"{method}-{str(rate).removesuffix('.0')}"


def write_coreset(
    folder: Path, method: str, rate: float | None, rows: np.ndarray, ids: list[str] | None, scores: Scores, record: dict
) -> Path:
    """Write METHOD-RATE.json, or METHOD.json, with the keys of `record`; returns the file. `ids`: those of `rows`."""
    name, about = (method, {}) if rate is None else (coreset_name(method, rate), {"rate": rate})
    path, about = folder / f"{name}.json", {"method": method, **about, **record}
    about |= {"scores": scores.made_by, "num_rows": scores.num_rows, "size": len(rows)}
    about |= {"data_fingerprint": scores.fingerprint, "code_version": code_version()}
    write_json(path, about | {"indices_sha256": _checksum(rows), "indices": rows.tolist(), "ids": ids})
    return path


def read_coreset(path: Path) -> Coreset:
    """Read a coreset JSON or a published `.pt` index list (with weights_only=True: no code runs). Raises: UserError for
    an unreadable file, and for indices that are no row numbers or not unique."""
    published = path.suffix == ".pt"
    record = checked(_Record, {"indices": _read_published(path)} if published else read_json(path), path)
    indices, ids = np.array(record["indices"], dtype=np.int64), record.get("ids")
    size, named = record.get("size", len(indices)), len(indices) if ids is None else len(ids)
    if not size == len(indices) == named:
        raise UserError(f"{path} says size {size} and holds {len(indices)} indices with {named} ids: cut it again")
    order = np.argsort(indices, kind="stable")
    indices = indices[order]
    if len(repeated := indices[1:][indices[1:] == indices[:-1]]):
        raise UserError(f"{path}: row {repeated[0]} is chosen more than once")
    if record.get("indices_sha256") not in (None, _checksum(indices)):
        raise UserError(f"{path} is damaged (the checksum of its indices does not fit): cut it again")
    if path.stem in _RESERVED or not re.fullmatch(r"[\w=+-][\w.=+-]*", path.stem):
        allowed = f"letters, digits and . _ - alone, no dot in front, and not {', '.join(_RESERVED)}"
        raise UserError(f"{path}: a coreset's file name names its data set and tuned model: rename it to {allowed}")
    ids = ids and [ids[i] for i in order]
    fingerprint, num_rows, scores, target = map(record.get, ("data_fingerprint", "num_rows", "scores", "target"))
    passes, left_out = record.get("num_train_epochs"), record.get("left_out")
    return Coreset(path.stem, indices, ids, fingerprint, num_rows, published, scores, target, passes, left_out)


def _checksum(indices: np.ndarray) -> str:
    return digest(np.ascontiguousarray(indices, dtype=np.int64).tobytes())


def _read_published(path: Path) -> list[Any]:
    import torch  # heavy, and only these files need it

    reason = "it is damaged, or no plain index list (a list or tensor of row numbers)"
    try:
        sound = not (zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip())  # torch tests no checksum
        value = torch.load(path, map_location="cpu", weights_only=True) if sound else None
        # A tensor may claim more numbers than the file holds.
        if isinstance(value, torch.Tensor) and value.ndim == 1 and value.nbytes <= path.stat().st_size:
            value = value.tolist()
        if isinstance(value, list | tuple):
            return list(value)
    except Exception as error:  # whatever a damaged or hostile file makes them raise
        reason = getattr(error, "strerror", None) or reason
    raise UserError(f"cannot read {path}: {reason}")


def check_fits(coreset: Coreset, ids: list[str], fingerprint: str, source: str) -> None:
    """Raises: UserError where a coreset is not of the training split with these `ids`. Without a fingerprint (cut from
    plain score files) only the number of rows is compared; of a `.pt` list the length, by `check_published`."""
    rows, num_rows, why = coreset.indices, len(ids), None
    if coreset.published and (said := check_published(len(rows), num_rows, source)):
        say(said)
    if rows[-1] >= num_rows:
        why = f"row {rows[-1]} is outside the training split of {num_rows} rows"
    elif coreset.num_rows not in (None, num_rows):
        why = f"chosen from {coreset.num_rows} rows, the training split has {num_rows}"
    elif coreset.fingerprint is not None:
        if coreset.fingerprint != fingerprint:
            why = f"chosen from other data (fingerprint {coreset.fingerprint}, at hand {fingerprint})"
        for row, was in zip(rows, coreset.ids or [], strict=False):
            if ids[row] != was:
                why = f"row {row} has id {ids[row]} in the data at hand and {was} in the coreset"
                break
    if why:
        raise UserError(f"{source}: {why}: the coreset is for other data; cut it again")


def check_published(count: int, num_rows: int, source: str) -> str | None:
    """Check a published list's length: None if `count` is ⌊rate · N⌋ at a published rate, N = `num_rows`, give or take
    one (the authors' rounding is not known); else a line that says so. Raises: UserError where it is the length
    of a list of another of the paper's data sets."""
    for name, rows in {"": num_rows, **PUBLISHED_ROWS}.items():
        found = [rate for rate in PUBLISHED_RATES if abs(count - floor_share(rate, rows)) <= 1]
        if found and not name:
            return None
        if found:
            of = f"the paper's coreset of {name} at rate {found[0]:g} ({rows:,} training rows, at hand {num_rows:,})"
            raise UserError(f"{source}: {count:,} rows are {of}: it was cut from other data")
    rates = ", ".join(f"{rate:g}" for rate in PUBLISHED_RATES)
    return f"{source}: {count:,} rows are no published rate ({rates}) of the {num_rows:,} rows of the training split"


def quotas_of(experiment: Experiment | None, scores: Scores) -> Quotas | None:
    """Data set and quota of the rows that have `scores`; None where there is one data set. Raises: UserError where the
    run folder has no split, or that of other data, and for scores of other rows."""
    if experiment is None or len(experiment.data_sets) == 1:
        return None
    quotas, scored = _quotas_of_all(experiment), len(scores.index) + len(scores.left_out)
    if (num_rows := len(quotas.data_set)) != scored:
        raise UserError(f"{scores.source} has {scored} rows, the training split {num_rows}: scores of other data")
    return replace(quotas, data_set=quotas.data_set[scores.index])


def check_quotas(experiment: Experiment) -> None:
    """Raises: UserError where the training split cannot fill the quotas at some rate, before anything costs."""
    if any(each.quota for each in experiment.data_sets):
        quotas = _quotas_of_all(experiment)
        with refusals():
            for rate in experiment.selection.rates:
                shares(quotas, coreset_size(rate, len(quotas.data_set)))


def _quotas_of_all(experiment: Experiment) -> Quotas:
    first_rows, sets = [first for _, first, _ in data_sets(experiment)], experiment.data_sets
    data_set = np.searchsorted(first_rows, split_numbers(experiment)["train"], side="right") - 1
    counts = np.bincount(data_set, minlength=len(sets)).tolist()
    return Quotas([each.name for each in sets], [each.quota for each in sets], counts, data_set)
