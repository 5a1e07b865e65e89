r"""Tune the target on coresets: our JSON, or index lists as the authors published them (.pt).

    CUDA_VISIBLE_DEVICES=0 python finetune-select.py --config_path ../configs/demo.yaml \
        --select_path ../runs/demo/coresets/staff-0.2.json     # in finetune/

Needs the coresets (selection/coreset.py). Writes each as a LLaMA-Factory data set into <run folder>/data, and <run
folder>/target/<coreset's name>.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

from finetune.tuning import parse_arguments, tune_once
from selection.rows.split import training_split
from selection.run.cli import argument_parser
from selection.run.ledger import TARGET_TUNING
from selection.run.log import say
from selection.scores.coresets import check_fits, read_coreset
from selection.scores.identity import check_coreset, check_run


def main() -> None:
    parser = argument_parser(__doc__)
    about = "coresets: .json, or published .pt index lists; required"
    parser.add_argument("--select_path", type=Path, required=True, nargs="+", help=about)
    arguments, experiment, report = parse_arguments(parser)
    split = training_split(experiment, arguments.dry_run)
    coresets = [read_coreset(path) for path in arguments.select_path]
    if split is None:
        for coreset in coresets:
            print(f"{TARGET_TUNING}: would split {experiment.dataset_paths} and tune the target on {coreset.name}")
        return
    check_run(experiment, split, verified=True)
    for coreset, path in zip(coresets, arguments.select_path, strict=True):
        check_fits(coreset, split.ids, split.fingerprint, str(path))
        check_coreset(experiment, path, coreset, split.fingerprint)
    model, keys = experiment.target_model, experiment.target_training
    for coreset in coresets:
        say(f"{coreset.name}: {len(coreset.indices)} of {len(split.rows)} rows")
        rows, folder = split.rows.select(coreset.indices), experiment.tuned_target(coreset.name)
        own = {"num_train_epochs": coreset.num_train_epochs} if coreset.num_train_epochs else {}
        tune_once(experiment, model, coreset.name, rows, folder, keys, TARGET_TUNING, report, arguments.dry_run, own)


if __name__ == "__main__":
    run_stage(main, one_gpu=True)
