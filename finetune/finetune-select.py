"""Tune the target on a coreset: our JSON, or an index list as the authors published them (.pt).

    CUDA_VISIBLE_DEVICES=0 python finetune-select.py --config_path ../configs/demo.yaml \
        --select_path ../runs/demo/coresets/staff-0.2.json

Writes the coreset as a LLaMA-Factory data set into <run folder>/data, and <run folder>/target/<coreset's name>.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, whatever the working directory

from finetune.data_split import training_split, write_coreset_dataset  # noqa: E402
from finetune.tuning import add_report_arguments, report_keys, tune_once  # noqa: E402
from selection.config import load_experiment  # noqa: E402
from selection.coreset_files import check_fits, read_coreset  # noqa: E402
from selection.errors import run_stage  # noqa: E402
from selection.ledger import TARGET_TUNING  # noqa: E402
from selection.stage import add_experiment_arguments  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_experiment_arguments(parser)
    add_report_arguments(parser)
    parser.add_argument("--select_path", type=Path, required=True, help="coreset: .json, or a published .pt index list")
    arguments = parser.parse_args()
    report = report_keys(arguments)
    experiment = load_experiment(arguments.config_path, arguments.set)
    coreset = read_coreset(arguments.select_path)
    split = training_split(experiment)
    check_fits(coreset, split.ids, split.fingerprint, str(arguments.select_path))
    dataset = write_coreset_dataset(experiment, coreset.name, split, coreset.indices)
    print(f"{coreset.name}: {len(coreset.indices)} of {len(split.rows)} rows -> {dataset}")
    folder = experiment.tuned_target(coreset.name)
    tune_once(
        experiment, experiment.target_model, coreset.name, folder, experiment.target_training, TARGET_TUNING, report
    )


if __name__ == "__main__":
    run_stage(main)
