"""Score the training split on the tuned speculative model.

    python effort_score.py --config_path ../configs/demo.yaml

Needs the speculative model tuned first (finetune/finetune.py). Writes <run folder>/scores/small.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, whatever the working directory

import numpy as np  # noqa: E402

from finetune.data_split import training_split  # noqa: E402
from selection.errors import UserError, run_stage  # noqa: E402
from selection.ledger import SPECULATIVE_SCORES  # noqa: E402
from selection.scoring import score_rows  # noqa: E402
from selection.stage import load_scoring_arguments  # noqa: E402


def main() -> None:
    experiment = load_scoring_arguments(argparse.ArgumentParser(description=__doc__))
    tuned = experiment.tuned_small
    if not tuned.exists():
        raise UserError(f"the speculative model is not tuned yet (no {tuned}): run finetune.py with this configuration")
    split = training_split(experiment)
    rows = np.arange(len(split.rows))
    score_rows(experiment, split, experiment.small_model, tuned, rows, experiment.small_scores, SPECULATIVE_SCORES)


if __name__ == "__main__":
    run_stage(main)
