"""Speculative fine-tuning: tune the small model on the whole training split. With --model target, the target.

    CUDA_VISIBLE_DEVICES=0 python finetune.py --config_path ../configs/demo.yaml     # in finetune/

Needs the models and the data that the YAML names. Writes the split into <run folder>/data, where there is none yet,
and the tuned model to <run folder>/small (or <run folder>/target/full).
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

from finetune.tuning import parse_arguments, tune_once
from selection.rows.split import speculative_rows, training_split
from selection.run.cli import argument_parser
from selection.run.ledger import SPECULATIVE_TUNING, TARGET_TUNING
from selection.run.log import say
from selection.scores.coresets import check_quotas
from selection.scores.identity import check_run


def main() -> None:
    parser = argument_parser(__doc__)
    about = "which to tune on everything; default: small"
    parser.add_argument("--model", choices=["small", "target"], default="small", help=about)
    arguments, experiment, report = parse_arguments(parser)
    tell = print if arguments.dry_run else say
    if small := arguments.model == "small":
        stage, model, folder = SPECULATIVE_TUNING, experiment.small_model, experiment.tuned_small
    else:
        stage, model, folder = TARGET_TUNING, experiment.target_model, experiment.tuned_target("full")
    keys = experiment.speculative_training if small else experiment.target_training
    if folder is None:
        scores = f"speculation direct: {model} scores every row" if experiment.direct else "scores by an untuned model"
        tell(f"speculative tuning: none, {scores}")
        return
    # These take seconds, which --help need not.
    from selection.report.look import check_list
    from selection.scores.checks import check_machine, check_models, check_rows

    if not arguments.dry_run and not folder.exists():
        check_machine(experiment)
        check_models(experiment)
    split = training_split(experiment, arguments.dry_run)
    if split is None:
        print(f"{stage}: would split {experiment.dataset_paths} and tune {model} on it -> {folder}")
        return
    check_rows(experiment, len(split.rows))
    check_quotas(experiment)
    check_run(experiment, split)
    if small:
        check_list(experiment, split)
    if small and experiment.borrows:
        tell(f"{stage}: reusing {folder}, of speculative_run")
        return
    if small and {"s2l", "learning_percentage"} & set(experiment.selection.methods):  # they read each pass
        report |= {"save_strategy": "epoch", "save_only_model": True}
    rows, dataset = split.rows, "train"
    if small and experiment.speculative_share < 1:
        rows, dataset = rows.select(speculative_rows(experiment, len(rows))), "speculation"
    tune_once(experiment, model, dataset, rows, folder, keys, stage, report, arguments.dry_run)


if __name__ == "__main__":
    run_stage(main, one_gpu=True)
