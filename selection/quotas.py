"""Which data set each row of the training split is of, where a run has several."""

import numpy as np

from finetune.data_split import data_sets, split_numbers
from selection.config import Experiment
from selection.errors import UserError
from selection.score_files import Scores
from selection.staff import Quotas


def quotas_of(experiment: Experiment | None, scores: Scores) -> Quotas | None:
    """Data set and quota of the rows that have `scores`, which are all that a rule sees; None where there is one set.

    Raises: UserError where the run folder has no split, or that of other data, and for scores of other rows.
    """
    if experiment is None or len(sets := experiment.data_sets) == 1:
        return None
    first_rows = [first for _, first, _ in data_sets(experiment)]
    data_set = np.searchsorted(first_rows, split_numbers(experiment)["train"], side="right") - 1
    if len(data_set) != (scored := len(scores.index) + len(scores.left_out)):
        raise UserError(
            f"{scores.source} has {scored} rows, the training split {len(data_set)}: they are scores of other data"
        )
    return Quotas(
        names=[each.name for each in sets],
        quotas=[each.quota for each in sets],
        num_rows=np.bincount(data_set, minlength=len(sets)).tolist(),
        data_set=data_set[scores.index].astype(np.min_scalar_type(len(sets))),
    )
