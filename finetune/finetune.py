"""Speculative fine-tuning: tune the small model on the whole training split. With --model target, the target.

    CUDA_VISIBLE_DEVICES=0 python finetune.py --config_path ../configs/demo.yaml     # in finetune/

Needs the models and the data that the YAML names. Writes the split into <run folder>/data, where it is not there yet,
and the tuned model to <run folder>/small (or <run folder>/target/full).
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from selection.run.ending import end_on_signals

end_on_signals()

from finetune.tuning import add_report_arguments, report_keys, tune_once
from selection.rows.split import existing_split, training_split
from selection.run.cli import add_dry_run_argument, add_experiment_arguments, argument_parser, run_stage
from selection.run.config import load_experiment
from selection.run.ledger import SPECULATIVE_TUNING, TARGET_TUNING
from selection.run.log import say
from selection.run.model_folder import model_path
from selection.scores.identity import check_run
from selection.scores.quotas import check_quotas


def main() -> None:
    parser = argument_parser(__doc__)
    add_experiment_arguments(parser)
    add_dry_run_argument(parser)
    add_report_arguments(parser)
    parser.add_argument(
        "--model",
        choices=["small", "target"],
        default="small",
        help="which model to tune on everything; default: small",
    )
    arguments = parser.parse_args()
    report = report_keys(arguments)
    experiment = load_experiment(arguments.config_path, arguments.set)
    if arguments.model == "small" and experiment.tuned_small is None:
        (print if arguments.dry_run else say)("speculative tuning: none, num_train_epochs is 0")
        return
    if arguments.model == "small":
        model, folder, keys, stage = (
            experiment.small_model,
            experiment.tuned_small,
            experiment.small_training,
            SPECULATIVE_TUNING,
        )
    else:
        model, folder, keys, stage = (
            experiment.target_model,
            experiment.tuned_target("full"),
            experiment.target_training,
            TARGET_TUNING,
        )
    from selection.scores.checks import check_machine, check_models, check_rows

    if not arguments.dry_run and not folder.exists():
        check_machine(experiment)
        check_models(experiment)
    split = existing_split(experiment) if arguments.dry_run else training_split(experiment)
    if split is None:
        print(f"{stage}: would split {experiment.dataset_paths} and tune {model_path(model)} on it -> {folder}")
        return
    check_rows(experiment, len(split.rows))
    check_quotas(experiment)
    check_run(experiment, split)
    if arguments.model == "small" and experiment.borrows:
        (print if arguments.dry_run else say)(f"{stage}: reusing {folder}, of speculative_run")
        return
    tune_once(experiment, model, "train", split.rows, folder, keys, stage, report, arguments.dry_run)


if __name__ == "__main__":
    run_stage(main, one_gpu=True)
