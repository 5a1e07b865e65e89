"""Verify the strata on the untuned target: score the drawn samples, write V_i.

    python verify.py --config_path ../configs/demo.yaml        # in selection/

Needs the speculative scores (effort_score.py). Scores at most num_strata x verify_per_stratum samples, or all under
verify: all, and none where staff is not among selection.methods, as nothing else reads V_i. Writes
<run folder>/scores/target and <run folder>/verification.json.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

import numpy as np

from selection.rows.split import training_split
from selection.run.cli import argument_parser, load_scoring_arguments
from selection.run.config import Experiment
from selection.run.errors import UserError
from selection.run.ledger import VERIFICATION, share_costs
from selection.run.log import say
from selection.run.processes import processes
from selection.scores.folder import read_scores
from selection.scores.identity import check_run
from selection.scores.pool import all_rows, rows_left_out, without
from selection.scores.scoring import score_rows
from selection.scores.verification import Settings, cut_strata, draw, stratified_score, verify, write_verification


def main() -> None:
    experiment, arguments = load_scoring_arguments(argument_parser(__doc__))
    if "staff" not in experiment.selection.methods:
        tell = print if arguments.dry_run else say
        tell(f"{VERIFICATION}: nothing to do, as selection.methods has no staff, which alone reads V_i")
        return
    split = training_split(experiment, arguments.dry_run)
    settings, folder = Settings.of(experiment.selection), experiment.target_scores
    if arguments.dry_run and (split is None or not _is_scored(experiment)):
        most = f"at most {settings.num_strata} x {settings.verify_per_stratum} rows"
        most = most if settings.verify == "sampled" else "every row"
        most = "no more rows" if experiment.direct else most
        print(f"{VERIFICATION}: would score {most} on {experiment.target_model} -> {folder}")
        return
    check_run(experiment, split)
    if experiment.borrows and processes().leads and not arguments.dry_run:
        share_costs(experiment)
    left_out = rows_left_out(experiment)
    scores = without(read_scores(experiment.small_scores, settings.columns, ids=False).check_complete(), left_out)
    speculative = stratified_score(scores, settings).effort
    strata = cut_strata(speculative, settings, scores.columns)
    rows = np.setdiff1d(np.arange(len(split.rows)), all_rows(left_out))
    if settings.verify == "sampled":
        rows = np.sort(scores.index[np.concatenate(draw(strata, settings))])
    if not len(rows):
        raise UserError("no stratum has more than verify_per_stratum samples, nothing to verify: lower num_strata")
    if not experiment.direct:  # else the target has scored every row
        score_rows(experiment, split, experiment.target_model, None, rows, folder, VERIFICATION, arguments.dry_run)
    if arguments.dry_run or not processes().leads:
        return
    target = read_scores(folder, settings.target_columns, ids=False).only(rows)  # not what earlier settings left there
    records = verify(speculative, target, settings, strata, scores.index)
    write_verification(experiment.verification, settings, scores, records, target)
    ratios = [r.verification_ratio for r in records if r.verification_ratio is not None]
    between = f"V between {min(ratios, default=1):.3f} and {max(ratios, default=1):.3f}"
    count = "all" if experiment.direct else len(rows)
    scored = f"{len(records)} strata, {count} of {len(speculative)} samples scored on the target"
    print(f"{scored}, {between} -> {experiment.verification}")


def _is_scored(experiment: Experiment) -> bool:
    try:
        read_scores(experiment.small_scores, ids=False).check_complete()
    except UserError:
        return False
    return True


if __name__ == "__main__":
    run_stage(main)
