"""Verify the strata on the target, which is not tuned: score the drawn samples, write V_i.

    python verify.py --config_path ../configs/demo.yaml        # in selection/

Needs the speculative scores (effort_score.py). Scores at most num_strata x verify_per_stratum samples, or all under
verify: all. Writes <run folder>/scores/target and <run folder>/verification.json.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, whatever the working directory

from selection.errors import UserError, end_on_signals, run_stage  # noqa: E402

end_on_signals()

import numpy as np  # noqa: E402

from finetune.data_split import training_split  # noqa: E402
from selection.ledger import VERIFICATION  # noqa: E402
from selection.processes import processes  # noqa: E402
from selection.score_files import ScoreFolder, read_scores  # noqa: E402
from selection.scoring import score_identity, score_rows  # noqa: E402
from selection.stage import argument_parser, load_scoring_arguments  # noqa: E402
from selection.verification import Settings, cut_strata, draw, verify, write_verification  # noqa: E402


def main() -> None:
    experiment, _ = load_scoring_arguments(argument_parser(__doc__))
    split, settings = training_split(experiment), Settings.of(experiment.selection)
    small, tuned, every = experiment.small_model, experiment.tuned_small, np.arange(len(split.rows))
    scores = read_scores(experiment.small_scores, ids=False)
    ScoreFolder(experiment.small_scores, score_identity(experiment, split, small, tuned), len(every))  # or refuse
    speculative = scores.check_complete().effort
    drawn = np.sort(scores.index[np.concatenate(draw(cut_strata(speculative, settings), settings))])
    rows = every if experiment.selection.verify_all else drawn
    if not len(rows):
        raise UserError("no stratum has more than verify_per_stratum samples, nothing to verify: lower num_strata")
    score_rows(experiment, split, experiment.target_model, None, rows, experiment.target_scores, VERIFICATION)
    if not processes().leads:
        return
    # Of what earlier settings left there, nothing but the asked rows counts.
    target = read_scores(experiment.target_scores, ids=False).only(rows)
    records = verify(speculative, target, settings, index=scores.index)
    write_verification(experiment.verification, settings, scores, records)
    ratios = [r.verification_ratio for r in records if r.verification_ratio is not None]
    print(
        f"{len(records)} strata, {len(rows)} of {len(speculative)} samples scored on the target, "
        f"V between {min(ratios, default=1):.3f} and {max(ratios, default=1):.3f} -> {experiment.verification}"
    )


if __name__ == "__main__":
    run_stage(main)
