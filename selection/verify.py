"""Verify the strata on the target, which is not tuned: score the drawn samples, write V_i.

    python verify.py --config_path ../configs/demo.yaml        # in selection/

Needs the speculative scores (effort_score.py). Scores at most num_strata x verify_per_stratum samples, or all under
verify: all; under verify: adaptive in rounds, each where the last one left the budgets most uncertain. Writes
<run folder>/scores/target and <run folder>/verification.json.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from selection.run.ending import end_on_signals

end_on_signals()

from collections.abc import Iterator

import numpy as np

from selection.rows.split import existing_split, training_split
from selection.run.cli import argument_parser, load_scoring_arguments, run_stage
from selection.run.config import Experiment
from selection.run.errors import UserError
from selection.run.ledger import VERIFICATION, share_costs
from selection.run.processes import processes
from selection.scores.folder import Scores, read_scores
from selection.scores.identity import check_run
from selection.scores.scoring import score_rows, would_score
from selection.scores.verification import (
    Settings,
    adaptive_draws,
    cut_strata,
    draw,
    stratified_score,
    verify,
    write_verification,
)


def main() -> None:
    experiment, arguments = load_scoring_arguments(argument_parser(__doc__))
    split = existing_split(experiment) if arguments.dry_run else training_split(experiment)
    settings = Settings.of(experiment.selection)
    adaptive = settings.verify == "adaptive"
    if arguments.dry_run and (split is None or adaptive or not _is_scored(experiment)):
        drawn = f"at most {settings.num_strata} x {settings.verify_per_stratum} rows"
        most = "every row" if experiment.selection.verify_all else drawn
        print(f"{VERIFICATION}: would score {most} on {experiment.target_model} -> {experiment.target_scores}")
        return
    check_run(experiment, split)
    if experiment.borrows and processes().leads and not arguments.dry_run:
        share_costs(experiment)
    scores = read_scores(experiment.small_scores, settings.columns, ids=False)
    speculative = stratified_score(scores.check_complete(), settings).effort
    strata, rounds = cut_strata(speculative, settings), []

    def target_now() -> Scores:
        return read_scores(experiment.target_scores, settings.columns, ids=False)

    def asked() -> Iterator[np.ndarray]:
        """Rows of each round, all so far."""
        for draws in adaptive_draws(speculative, settings, strata, scores.index, target_now):
            rounds.append([len(rows) for rows in draws])
            yield np.sort(scores.index[np.concatenate(draws)])

    rows: np.ndarray | Iterator[np.ndarray]
    if adaptive:
        rows = asked()
    else:
        rows = (
            np.arange(len(split.rows))
            if settings.verify == "all"
            else np.sort(scores.index[np.concatenate(draw(strata, settings))])
        )
        if not len(rows):
            raise UserError("no stratum has more than verify_per_stratum samples, nothing to verify: lower num_strata")
    folder = experiment.target_scores
    if arguments.dry_run:
        would_score(experiment, split, experiment.target_model, None, rows, folder, VERIFICATION)
        return
    rows = score_rows(experiment, split, experiment.target_model, None, rows, folder, VERIFICATION)
    if not processes().leads:
        return
    # Of what earlier settings left there, nothing but the asked rows counts.
    target = target_now().only(rows)
    records = verify(speculative, target, settings, strata, scores.index)
    write_verification(experiment.verification, settings, scores, records, target, rounds or None)
    in_rounds = f"{len(rounds)} rounds, " if rounds else ""
    ratios = [r.verification_ratio for r in records if r.verification_ratio is not None]
    print(
        f"{len(records)} strata, {in_rounds}{len(rows)} of {len(speculative)} samples scored on the target, "
        f"V between {min(ratios, default=1):.3f} and {max(ratios, default=1):.3f} -> {experiment.verification}"
    )


def _is_scored(experiment: Experiment) -> bool:
    """Whether the speculative scores are there and complete."""
    try:
        read_scores(experiment.small_scores, ids=False).check_complete()
    except UserError:
        return False
    return True


if __name__ == "__main__":
    run_stage(main)
