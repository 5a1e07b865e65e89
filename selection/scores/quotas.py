"""Which data set each row of the training split is of, where a run has several."""

import numpy as np

from selection.method.quotas import Quotas, shares
from selection.method.staff import coreset_size
from selection.rows.split import data_sets, split_numbers
from selection.run.config import Experiment
from selection.run.errors import UserError, refusals
from selection.scores.folder import Scores


def quotas_of(experiment: Experiment | None, scores: Scores) -> Quotas | None:
    """Data set and quota of the rows that have `scores`, which are all that a rule sees; None where there is one set.

    Raises: UserError where the run folder has no split, or that of other data, and for scores of other rows.
    """
    if experiment is None or len(experiment.data_sets) == 1:
        return None
    data_set = _data_set_of_each_row(experiment)
    if len(data_set) != (scored := len(scores.index) + len(scores.left_out)):
        raise UserError(
            f"{scores.source} has {scored} rows, the training split {len(data_set)}: they are scores of other data"
        )
    return _quotas(experiment, data_set, data_set[scores.index])


def check_quotas(experiment: Experiment) -> None:
    """Raises: UserError where the training split cannot fill the quotas at some rate, before anything costs."""
    if any(each.quota for each in experiment.data_sets):
        data_set = _data_set_of_each_row(experiment)
        with refusals():
            for rate in experiment.selection.rates:
                shares(_quotas(experiment, data_set, data_set), coreset_size(rate, len(data_set)))


def _data_set_of_each_row(experiment: Experiment) -> np.ndarray:
    """Number of the data set of each row of the training split (N,)."""
    first_rows = [first for _, first, _ in data_sets(experiment)]
    return np.searchsorted(first_rows, split_numbers(experiment)["train"], side="right") - 1


def _quotas(experiment: Experiment, of_all_rows: np.ndarray, of_scored_rows: np.ndarray) -> Quotas:
    sets = experiment.data_sets
    return Quotas(
        names=[each.name for each in sets],
        quotas=[each.quota for each in sets],
        num_rows=np.bincount(of_all_rows, minlength=len(sets)).tolist(),
        data_set=of_scored_rows.astype(np.min_scalar_type(len(sets))),
    )
