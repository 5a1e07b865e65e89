r"""Tune the target on coresets: our JSON, or index lists as the authors published them (.pt).

    CUDA_VISIBLE_DEVICES=0 python finetune-select.py --config_path ../configs/demo.yaml \
        --select_path ../runs/demo/coresets/staff-0.2.json     # in finetune/

Needs the coresets (selection/coreset.py). Writes each as a LLaMA-Factory data set into <run folder>/data, and <run
folder>/target/<coreset's name>. `--as lr3e-4 --set target_training.learning_rate=3e-4` tunes once more under other
training keys, into target/<coreset's name>-lr3e-4; eval.py takes each by its name.
"""

import re
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

from finetune.tuning import parse_arguments, tune_once
from selection.rows.split import training_split
from selection.run.cli import argument_parser
from selection.run.config import Experiment, load_run
from selection.run.errors import UserError
from selection.run.ledger import TARGET_TUNING
from selection.run.log import say
from selection.scores.coresets import check_fits, read_coreset
from selection.scores.identity import check_coreset, check_run


def main() -> None:
    parser = argument_parser(__doc__)
    about = "coresets: .json, or published .pt index lists; required"
    parser.add_argument("--select_path", type=Path, required=True, nargs="+", help=about)
    about = "tune under training keys that are not the run's, into <coreset's name>-NAME; default: none"
    parser.add_argument("--as", dest="name_of_keys", metavar="NAME", help=about)
    arguments, experiment, report = parse_arguments(parser)
    suffix, run = "", experiment
    if (name := arguments.name_of_keys) is not None:
        if not re.fullmatch(r"[\w.=+-]+", name):
            raise UserError(f"--as {name}: give letters, digits and . _ - = + alone")
        suffix, run = f"-{name}", with_keys_of_run(experiment)
    split, coresets = training_split(experiment, arguments.dry_run), {}
    for path in arguments.select_path:
        if path.exists() or not arguments.dry_run:
            coresets[path] = read_coreset(path)
        else:
            print(f"{TARGET_TUNING}: would tune the target on {path.stem}, once there is {path}")
    if split is None:
        for coreset in coresets.values():
            print(f"{TARGET_TUNING}: would split {experiment.dataset_paths} and tune the target on {coreset.name}")
        return
    check_run(run, split, verified=True)
    for path, coreset in coresets.items():
        check_fits(coreset, split.ids, split.fingerprint, str(path))
        check_coreset(run, path, coreset, split.fingerprint)
    model, of_run = experiment.target_model, None if name is None else run
    for coreset in coresets.values():
        say(f"{coreset.name}: {len(coreset.indices)} of {len(split.rows)} rows")
        rows, tuned = split.rows.select(coreset.indices), coreset.name + suffix
        own = {"num_train_epochs": coreset.num_train_epochs} if coreset.num_train_epochs else {}
        how = experiment.target_training, TARGET_TUNING, report, arguments.dry_run, own, of_run
        tune_once(experiment, model, tuned, rows, experiment.tuned_target(tuned), *how)


def with_keys_of_run(experiment: Experiment) -> Experiment:
    """The experiment with the training keys that the run folder's own record has; as it is where there is none."""
    if not experiment.record.exists():
        return experiment
    run = load_run(experiment.folder)
    keys = ("training", "small_training", "target_training")
    return experiment.model_copy(update={key: getattr(run, key) for key in keys})


if __name__ == "__main__":
    run_stage(main, one_gpu=True)
