"""Every row of the user's data beside what selection found: score, stratum, V_i, chosen or not, and why."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
import pyarrow as pa
from pydantic import ConfigDict, Field, NonNegativeInt
from typing_extensions import TypedDict

from selection.method.quotas import choose_by_rule
from selection.method.staff import Choice, choose_staff
from selection.rows.split import TrainingSplit, data_sets, finished_split, split_numbers
from selection.run.config import Experiment
from selection.run.errors import UserError, refusals
from selection.run.products import checked, read_record
from selection.scores.coresets import check_fits, quotas_of, read_coreset
from selection.scores.folder import has_column, read_scores
from selection.scores.reasons import explain
from selection.scores.verification import Settings, StratumRecord, cut_strata, stratified_score

_LENGTHS = ("n_prompt_tokens", "n_response_tokens")


def annotated(experiment: Experiment, coreset: Path, split: TrainingSplit | None = None) -> pa.Table:
    """One line for each row of training and evaluation split, in the order of the user's data.

    Columns: row (in the user's data), dataset (where there are several; rows then count in each), split ("train",
    "eval"), index (row of the training split), id, effort and loss of the speculative model, n_prompt_tokens,
    n_response_tokens, target_effort, stratum, verification_ratio (V_i), verified, chosen, reason (a sentence); null
    where not known. `split`: that of `finished_split`, where it is known already.
    Raises: UserError where the coreset is of other data, or was cut from other scores than those of now.
    """
    split, chosen = split or finished_split(experiment), read_coreset(coreset)
    check_fits(chosen, split.ids, split.fingerprint, str(coreset))
    num_rows = len(split.rows)
    is_chosen = np.isin(np.arange(num_rows), chosen.indices)
    about = {} if coreset.suffix == ".pt" else read_record(coreset)
    method = about.get("method", "the given list")
    columns = {
        "index": np.arange(num_rows),
        "id": np.array(split.ids),
        **_scores_of_all_rows(experiment, num_rows),
        "stratum": np.full(num_rows, np.nan),
        "verification_ratio": np.full(num_rows, np.nan),
        "verified": np.zeros(num_rows, dtype=bool),
        "chosen": is_chosen,
        "reason": np.array([f"not chosen by {method}", f"chosen by {method}"], dtype=object)[is_chosen.astype(np.intp)],
    }
    if method == "staff" and experiment.small_scores.exists():
        _explain_staff(experiment, coreset, about, columns)
    return _in_order_of_the_data(experiment, columns)


def _scores_of_all_rows(experiment: Experiment, num_rows: int) -> dict[str, np.ndarray]:
    """Columns (N,), nan where not known."""
    small, target = ({name: name for name in ("effort", "loss", *_LENGTHS)}, {"effort": "target_effort"})
    found = {name: np.full(num_rows, np.nan) for name in [*small.values(), *target.values()]}
    for folder, names in ((experiment.small_scores, small), (experiment.target_scores, target)):
        if not folder.exists():
            continue
        scores = read_scores(folder, [name for name in names if has_column(folder, name)], ids=False)
        if scores.index[-1] >= num_rows:
            raise UserError(f"{folder} scores row {scores.index[-1]} of {num_rows}: they are scores of other data")
        for name, values in scores.columns.items():
            found[names[name]][scores.index] = values
    return found


class _DataSet(TypedDict):
    quota: Annotated[float, Field(gt=0, le=1)] | None


class _StaffRecord(TypedDict):  # what the explanation needs of a coreset's file beside `Settings`
    __pydantic_config__ = ConfigDict(extra="allow")

    rate: float
    indices: list[NonNegativeInt]
    strata: Annotated[list[dict[str, Any]], Field(min_length=1)]
    data_sets: NotRequired[list[_DataSet]]


def _explain_staff(experiment: Experiment, coreset: Path, about: dict, columns: dict[str, np.ndarray]) -> None:
    """Strata, V_i and reasons, by cutting the coreset again from its own record."""
    about, settings = checked(_StaffRecord, about, coreset), Settings.from_record(about, coreset)
    kept = [{field.name: entry.get(field.name) for field in fields(StratumRecord)} for entry in about["strata"]]
    records = checked(list[StratumRecord], kept, coreset)
    scores = read_scores(experiment.small_scores, settings.columns, ids=False).check_complete()
    scores = stratified_score(scores, settings)
    strata = cut_strata(scores.effort, settings)
    ratios = [record.verification_ratio for record in records]
    other = UserError(f"{coreset} was cut from other scores than {experiment.small_scores} has now: cut it again")
    if len(ratios) != len(strata.members):
        raise other
    quotas = quotas_of(experiment, scores)
    if quotas is not None and len(own := about.get("data_sets", [])) == len(quotas.names):
        quotas = replace(quotas, quotas=[each["quota"] for each in own])  # as they were when it was cut

    def rule(m: int, within: np.ndarray | None) -> Choice:
        return choose_staff(scores.effort, strata.within(within), ratios, m, settings.rules, settings.seed)

    with refusals():
        choice = choose_by_rule(rule, about["rate"], len(scores.effort), quotas)
    if about["indices"] != scores.index[choice.rows].tolist():
        raise other
    columns["reason"][:] = "left out: its loss or score is not finite"
    columns["reason"][scores.index] = explain(choice, strata, len(scores.effort), settings)
    for record, members in zip(records, strata.members, strict=True):
        rows = scores.index[members]
        columns["stratum"][rows] = record.stratum
        columns["verification_ratio"][rows] = record.verification_ratio  # None becomes nan
        columns["verified"][record.verified] = True


def _in_order_of_the_data(experiment: Experiment, columns: dict[str, np.ndarray]) -> pa.Table:
    numbers = split_numbers(experiment)
    held_out = {"split": "eval", "verified": False, "chosen": False, "reason": "held out for evaluation"}
    train = pa.table({"row": numbers["train"], "split": ["train"] * len(numbers["train"])})
    for name, values in columns.items():
        array = pa.array(values, from_pandas=True)
        train = train.append_column(name, array.cast(pa.int64()) if name in ("stratum", *_LENGTHS) else array)
    rest = {name: pa.array([value] * len(numbers["eval"])) for name, value in held_out.items()}
    rest = pa.table({"row": numbers["eval"], **rest})
    table = pa.concat_tables([train, rest], promote_options="default").sort_by("row")
    if len(sets := data_sets(experiment)) == 1:
        return table
    names, first_rows, counts = zip(*sets, strict=True)
    own = pa.array(table["row"].to_numpy() - np.repeat(first_rows, counts))
    return table.set_column(0, "row", own).add_column(1, "dataset", pa.array(np.repeat(names, counts)))
