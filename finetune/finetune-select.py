r"""Tune the target on coresets: our JSON, or index lists as the authors published them (.pt).

    CUDA_VISIBLE_DEVICES=0 python finetune-select.py --config_path ../configs/demo.yaml \
        --select_path ../runs/demo/coresets/staff-0.2.json     # in finetune/

Needs the coresets (selection/coreset.py). Writes each as a LLaMA-Factory data set into <run folder>/data, and <run
folder>/target/<coreset's name>.
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
from selection.run.ledger import TARGET_TUNING
from selection.run.log import say
from selection.scores.coresets import check_fits, read_coreset
from selection.scores.identity import check_coreset, check_run


def main() -> None:
    parser = argument_parser(__doc__)
    add_experiment_arguments(parser)
    add_dry_run_argument(parser)
    add_report_arguments(parser)
    parser.add_argument(
        "--select_path",
        type=Path,
        required=True,
        nargs="+",
        help="coresets: .json, or published .pt index lists; required",
    )
    arguments = parser.parse_args()
    report = report_keys(arguments)
    experiment = load_experiment(arguments.config_path, arguments.set)
    split = existing_split(experiment) if arguments.dry_run else training_split(experiment)
    coresets = [read_coreset(path) for path in arguments.select_path]
    if split is None:
        for coreset in coresets:
            print(f"{TARGET_TUNING}: would split {experiment.dataset_paths} and tune the target on {coreset.name}")
        return
    check_run(experiment, split, verified=True)
    for coreset, path in zip(coresets, arguments.select_path, strict=True):
        check_fits(coreset, split.ids, split.fingerprint, str(path))
        check_coreset(experiment, path, coreset, split.fingerprint)
    for coreset in coresets:
        say(f"{coreset.name}: {len(coreset.indices)} of {len(split.rows)} rows")
        rows, folder = split.rows.select(coreset.indices), experiment.tuned_target(coreset.name)
        model, keys, stage = experiment.target_model, experiment.target_training, TARGET_TUNING
        tune_once(experiment, model, coreset.name, rows, folder, keys, stage, report, arguments.dry_run)


if __name__ == "__main__":
    run_stage(main, one_gpu=True)
