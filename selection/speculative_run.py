"""Another run's tuned speculative model and scores (key `speculative_run`): used only where this run would make the
same ones; nothing there changes but the note of who shares them (shared_by.json, for the ledger)."""

from pathlib import Path

import numpy as np

from finetune.data_split import TrainingSplit
from finetune.tuning import tuning_identity
from selection.config import Experiment
from selection.errors import UserError
from selection.files import checked, first_difference, made_from, read_sealed
from selection.score_files import ScoreFolder
from selection.scoring import score_identity


def check_speculative_run(experiment: Experiment, split: TrainingSplit) -> None:
    """Raises: UserError where the other run is not finished up to its scores, or made them from something else than
    this run would; the first difference in data, tuning or scoring is named."""
    other, tuned, scores = experiment.speculative_folder, experiment.tuned_small, experiment.small_scores
    record, manifest = (folder / name for folder, name in ((other / "data", "split.json"), (scores, "manifest.json")))
    for path in filter(None, (record, tuned, manifest)):
        if not path.exists():
            raise _unfinished(other, f"has no {path.relative_to(other)}")
    theirs, ours = read_sealed(record), read_sealed(experiment.data_folder / record.name)
    if theirs.get("fingerprint") != split.fingerprint:
        _refuse_difference(record, theirs.get("made_from"), ours["made_from"])
        _refuse_difference(record, theirs, ours)
    if tuned is not None:
        tuning = tuning_identity(experiment, experiment.small_model, split.rows, experiment.small_training)
        _refuse_difference(tuned, made_from(tuned), tuning)
    identity, found = score_identity(experiment, split, experiment.small_model, tuned), read_sealed(manifest)
    _refuse_difference(scores, found.get("identity"), identity)
    store, every = ScoreFolder(scores, identity, len(split.rows)), np.arange(len(split.rows))
    if store.plan_path.exists() or len(store.missing(every)):
        raise _unfinished(other, "has not scored every row")
    if absent := [name for name in experiment.selection.columns if name not in store.manifest["columns"]]:
        _refuse_difference(scores, {"columns": store.manifest["columns"]}, {"columns": absent})


def _unfinished(other: Path, state: str) -> UserError:
    return UserError(
        f"speculative_run {other} {state}: run finetune.py and effort_score.py with that run's own configuration first"
    )


def _refuse_difference(path: Path, stored: object, wanted: dict) -> None:
    if difference := first_difference(checked(dict, stored, path), wanted):
        raise UserError(
            f"speculative_run: {path} was made otherwise ({difference}): give this run the same data and settings, or "
            "leave speculative_run out"
        )
