"""Features of rows that stand for the task that is meant: a dev set, which rds compares the pool with."""

from pathlib import Path

import numpy as np

from selection.method.effort import EffortScorer, tokens_per_batch
from selection.rows.split import pooled_rows, write_dataset
from selection.rows.tokens import tokenised_rows
from selection.run.config import DataSet, Experiment
from selection.run.device import choose_precision
from selection.run.model_folder import model_path
from selection.scores.folder import check_features
from selection.scores.models import load_for_scoring
from selection.scores.within_memory import score_within_memory


def features_of_rows(experiment: Experiment, path: Path) -> np.ndarray:
    """Mean last hidden state (D, d) of the responses in a data file, by the speculative model that scores the run.

    Writes the rows into the run folder as the data set `dev`. Raises: UserError for a file that cannot be read."""
    dev = DataSet(path=str(path.resolve()), dataset_format=experiment.dataset_format)
    with pooled_rows(experiment, [dev]) as (rows, _):
        write_dataset(experiment, "dev", rows)
        tokenised = tokenised_rows(experiment, experiment.small_model, "dev", rows)
    settings = experiment.selection
    tuned, precision = experiment.tuned_small, choose_precision(settings.precision)
    reset_query_value = settings.rules == "released" and tuned is not None  # as the run's rows are scored
    model = load_for_scoring(model_path(experiment.small_model), tuned, precision, reset_query_value)
    scorer = EffortScorer(model, columns=("hidden_state",))
    scorer.largest_batch = settings.tokens_per_batch or tokens_per_batch(settings.phi, scorer.device)
    names = [f"row {row} of {path}" for row in range(len(tokenised))]
    scores = score_within_memory(scorer, tokenised["input_ids"], tokenised["labels"], names)
    return check_features(scores["hidden_state"].numpy(), np.arange(len(tokenised)), str(path))
