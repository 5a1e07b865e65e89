"""Every row of the user's data with what selection found: score, stratum, V_i, chosen or not, and why."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import ConfigDict, Field, NonNegativeInt
from typing_extensions import TypedDict

from selection.method.quotas import choose_by_rule
from selection.method.staff import coreset_size
from selection.rows.cut import cut_rows
from selection.rows.split import TrainingSplit, data_sets, finished_split, split_numbers
from selection.run.config import Experiment
from selection.run.errors import UserError, refusals
from selection.run.products import checked, read_record
from selection.scores.coresets import check_fits, quotas_of, read_coreset
from selection.scores.folder import has_column, read_scores
from selection.scores.pool import LeftOut, check_left_out, without
from selection.scores.verification import Settings, StratumRecord, cut_strata, explain, staff_rule, stratified_score

_LENGTHS = ("n_prompt_tokens", "n_response_tokens")


@dataclass(frozen=True)
class _Stratum(StratumRecord):
    budget: NonNegativeInt
    of_which_random_fill: NonNegativeInt

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)


class _DataSet(TypedDict):
    quota: Annotated[float, Field(gt=0, le=1)] | None


class CoresetRecord(TypedDict, total=False):
    """What a coreset's file says beside what `Settings` checks."""

    __pydantic_config__ = ConfigDict(extra="allow", allow_inf_nan=False)

    method: str
    rate: float
    indices: list[NonNegativeInt]
    strata: Annotated[list[_Stratum], Field(min_length=1)]  # of STAFF's
    from_hardest: int
    data_sets: list[_DataSet]
    stratified_by: str
    data_fingerprint: str | None
    left_out: LeftOut


def annotated(experiment: Experiment, coreset: Path, split: TrainingSplit | None = None) -> pa.Table:
    """One line for each row of training and evaluation split, in the order of the user's data.

    Columns, null where not known: row (in the user's data), dataset (where there are several; rows then count in each),
    split ("train", "eval"), index (row of the training split), id, effort and loss of the speculative model,
    n_prompt_tokens, n_response_tokens, target_effort, cut (longer than cutoff_len: scored and tuned on its beginning),
    stratum, verification_ratio (V_i), verified, chosen, reason.
    Raises: UserError where the coreset is of other data, or was cut from other scores than the run has now."""
    split, chosen = split or finished_split(experiment), read_coreset(coreset)
    check_fits(chosen, split.ids, split.fingerprint, str(coreset))
    num_rows, cut = len(split.rows), cut_rows(experiment)
    is_chosen = np.isin(np.arange(num_rows), chosen.indices)
    about = {} if coreset.suffix == ".pt" else checked(CoresetRecord, read_record(coreset), coreset)
    method = about.get("method", "the given list")
    columns = {
        "index": np.arange(num_rows),
        "id": np.array(split.ids),
        **_scores_of_all_rows(experiment, num_rows),
        "cut": np.full(num_rows, None) if cut is None else np.isin(np.arange(num_rows), cut),
        "stratum": np.full(num_rows, np.nan),
        "verification_ratio": np.full(num_rows, np.nan),
        "verified": np.zeros(num_rows, dtype=bool),
        "chosen": is_chosen,
        "reason": np.where(is_chosen, f"chosen by {method}", f"not chosen by {method}").astype(object),
    }
    if method == "staff" and experiment.small_scores.exists():
        _explain_staff(experiment, coreset, about, columns)
    if (left_out := about.get("left_out")) is not None:
        check_left_out(experiment, coreset, left_out)
        if any(max(rows, default=0) >= num_rows for rows in left_out.values()):
            raise UserError(f"{coreset} is damaged: it leaves out a row that is not there: make it again")
        for kind, rows in left_out.items():
            columns["reason"][rows] = f"left out: suspect ({kind})"
    return _in_order_of_the_data(experiment, columns)


def _scores_of_all_rows(experiment: Experiment, num_rows: int) -> dict[str, np.ndarray]:
    """Columns (N,), nan where not known."""
    small = {name: name for name in ("effort", "loss", *_LENGTHS)}
    found = {name: np.full(num_rows, np.nan) for name in (*small, "target_effort")}
    for folder, names in ((experiment.small_scores, small), (experiment.target_scores, {"effort": "target_effort"})):
        if not folder.exists():
            continue
        scores = read_scores(folder, [name for name in names if has_column(folder, name)], ids=False)
        if scores.index[-1] >= num_rows:
            raise UserError(f"{folder} scores row {scores.index[-1]} of {num_rows}: they are scores of other data")
        for name, values in scores.columns.items():
            found[names[name]][scores.index] = values
    return found


def _explain_staff(experiment: Experiment, path: Path, about: dict, columns: dict[str, np.ndarray]) -> None:
    """Fill in strata, V_i and reasons, by cutting the coreset again from its own record."""
    settings = Settings.from_record(about, path)
    if absent := {"rate", "strata"} - about.keys():
        raise UserError(f"{path} is damaged: it has no {min(absent)}: cut it again")
    scores = read_scores(experiment.small_scores, settings.columns, ids=False).check_complete()
    count = len(scores.index)
    scores = stratified_score(without(scores, about.get("left_out")), settings)
    strata, recorded = cut_strata(scores.effort, settings, scores.columns), about["strata"]
    other = UserError(f"{path} was cut from other scores than {experiment.small_scores} has now: cut it again")
    if len(recorded) != len(strata.members):
        raise other
    quotas = quotas_of(experiment, scores)
    if quotas is not None and len(own := about.get("data_sets", [])) == len(quotas.names):
        quotas = replace(quotas, quotas=[each["quota"] for each in own])  # as they were when it was cut
    with refusals():
        rule = staff_rule(scores, strata, recorded, settings)
        m = min(coreset_size(about["rate"], count), len(scores.index))
        choice = choose_by_rule(rule, m, quotas)
    if about["indices"] != scores.index[choice.rows].tolist():
        raise other
    columns["reason"][:] = "left out: its loss or score is not finite"
    columns["reason"][scores.index] = explain(choice, strata, len(scores.effort), settings)
    verified = [row for record in recorded for row in record.verified]
    columns["verified"] = np.isin(columns["index"], verified)
    for record, members in zip(recorded, strata.members, strict=True):
        rows = scores.index[members]
        columns["stratum"][rows] = record.stratum
        columns["verification_ratio"][rows] = record.verification_ratio  # None becomes nan


def _in_order_of_the_data(experiment: Experiment, columns: dict[str, np.ndarray]) -> pa.Table:
    numbers = split_numbers(experiment)
    held_out = {"split": "eval", "verified": False, "chosen": False, "reason": "held out for evaluation"}
    arrays = {name: pa.array(values, from_pandas=True) for name, values in columns.items()}
    arrays |= {name: arrays[name].cast(pa.int64()) for name in ("stratum", *_LENGTHS)}
    arrays["cut"] = arrays["cut"].cast(pa.bool_())
    train = pa.table({"row": numbers["train"], "split": ["train"] * len(numbers["train"]), **arrays})
    count = len(numbers["eval"])
    rest = pa.table({"row": numbers["eval"], **{name: [value] * count for name, value in held_out.items()}})
    table = pa.concat_tables([train, rest], promote_options="default").sort_by("row")
    if len(sets := data_sets(experiment)) == 1:
        return table
    names, first_rows, _ = zip(*sets, strict=True)
    rows = table["row"].to_numpy()
    of = np.searchsorted(first_rows, rows, side="right") - 1
    own = pa.array(rows - np.array(first_rows)[of])
    return table.set_column(0, "row", own).add_column(1, "dataset", pa.array(np.array(names)[of]))
