"""Score the training split on the tuned speculative model; with --model target, on the target tuned on everything.

    python effort_score.py --config_path ../configs/demo.yaml      # in selection/

Needs that model tuned first (finetune/finetune.py, with the same --model). Writes <run folder>/scores/small. The
target's one pass collects all that the baselines read, into <run folder>/scores/target-full. Where
selection.leave_out asks for it and there is no list of suspect rows yet, it makes one, as scripts/check_pool.py does.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

import numpy as np

from selection.method.baselines import columns_of
from selection.report.look import check_list, look_at_rows
from selection.rows.split import TrainingSplit, training_split
from selection.run.cli import argument_parser, load_scoring_arguments
from selection.run.config import SMALL_RULES, Experiment
from selection.run.errors import UserError
from selection.run.ledger import SPECULATIVE_SCORES, TARGET_SCORES, share_costs
from selection.run.log import say
from selection.run.processes import processes
from selection.scores.checks import check_machine, check_models, check_rows
from selection.scores.coresets import check_quotas
from selection.scores.folder import MORE_COLUMNS, has_column
from selection.scores.identity import check_run
from selection.scores.losses import LOSSES, passes_of
from selection.scores.scoring import score_rows
from selection.scores.verification import Settings


def main() -> None:
    parser = argument_parser(__doc__)
    about = "which tuned model scores; default: small"
    parser.add_argument("--model", choices=["small", "target"], default="small", help=about)
    experiment, arguments = load_scoring_arguments(parser)
    split = score(experiment, arguments)
    if experiment.selection.leave_out == "suspects" and processes().leads:
        look_at_rows(experiment, split, experiment.pool, arguments.dry_run)
    processes().wait()


def score(experiment: Experiment, arguments: argparse.Namespace) -> TrainingSplit | None:
    """Returns the split; None where a dry run finds none."""
    dry_run, borrows = arguments.dry_run, arguments.model == "small" and experiment.borrows
    if arguments.model == "small":
        model, tuned, folder = experiment.small_model, experiment.tuned_small, experiment.small_scores
        stage, columns = SPECULATIVE_SCORES, small_columns(experiment)
    else:
        model, tuned, folder = experiment.target_model, experiment.tuned_target("full"), experiment.tuned_target_scores
        stage, columns = TARGET_SCORES, [name for name in MORE_COLUMNS if name not in LOSSES]
    ready = tuned is None or tuned.exists()
    if not (ready or borrows or dry_run):
        how = f"finetune.py --model {arguments.model} with this configuration"
        raise UserError(f"the {arguments.model} model is not tuned yet (no {tuned}): run {how}")
    if "loss_by_pass" in columns and ready and not borrows:
        passes_of(tuned, experiment.passes(experiment.speculative_training))
    if not dry_run and not folder.exists():
        check_machine(experiment)
        check_models(experiment)
    split = training_split(experiment, dry_run)
    if dry_run and (split is None or not ready):
        print(f"{stage}: would score every row on {model}{'' if ready else ', once that is tuned'} -> {folder}")
        return split
    check_run(experiment, split)
    check_rows(experiment, len(split.rows))
    check_quotas(experiment)
    check_list(experiment, split)
    if borrows:
        read = [name for name in columns if name not in experiment.selection.columns]
        if absent := [name for name in read if not has_column(folder, name)]:
            todo = "give that run the same methods and settings, and score again"
            raise UserError(f"{folder}, of speculative_run, has no column {', '.join(absent)}: {todo}")
        if processes().leads and not dry_run:
            share_costs(experiment)
        (print if dry_run else say)(f"{stage}: reusing {folder}, of speculative_run")
        return split
    score_rows(experiment, split, model, tuned, np.arange(len(split.rows)), folder, stage, dry_run, columns)
    return split


def small_columns(experiment: Experiment) -> list[str]:
    """The columns of MORE_COLUMNS that the small model's scores need, or the target's that stand for them."""
    rules = [rule for rule in SMALL_RULES if rule in experiment.selection.methods]
    read = {name for rule in rules for name in columns_of(rule, "published")}
    read |= {*Settings.of(experiment.selection).columns, *experiment.selection.columns}
    return [name for name in MORE_COLUMNS if name in read]


if __name__ == "__main__":
    run_stage(main)
