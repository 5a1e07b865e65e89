"""Before a run: what will each of its stages cost on this device, and does selection pay?

    python scripts/plan.py --config_path configs/demo.yaml --reuses 3

Needs the models and the data that the YAML names. Makes the split in a temporary folder, tokenises it, measures for
some seconds how fast small and target model are scored and tuned here, and multiplies. Prints a table; writes nothing
into the run folder. Times are those of this device, as busy as it is now; measure again before you trust ten per cent.
"""

import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, whatever the working directory

from selection.errors import UserError, end_on_signals, run_stage  # noqa: E402

end_on_signals()

from selection.config import load_experiment  # noqa: E402
from selection.stage import add_experiment_arguments, argument_parser  # noqa: E402


def main() -> None:
    parser = argument_parser(__doc__)
    add_experiment_arguments(parser)
    reuses_help = "tuning runs (other hyper-parameters, targets or rates) that share one selection; default: 1"
    parser.add_argument("--reuses", type=int, default=1, metavar="N", help=reuses_help)
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring in all, about; default: 10")
    arguments = parser.parse_args()
    if arguments.reuses < 1 or not 0 < arguments.seconds < float("inf"):
        raise UserError("--reuses and --seconds: give at least 1 run and more than 0 seconds")
    experiment = load_experiment(arguments.config_path, arguments.set)

    from finetune import llama_factory
    from finetune.data_split import training_split
    from selection import plan

    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        elsewhere = experiment.model_copy(update={"output_dir": folder})
        split = training_split(elsewhere)
        plan.check(experiment, len(split.rows))
        models = {"small": experiment.small_model, "target": experiment.target_model}
        tokenised = {
            name: llama_factory.tokenised_rows(elsewhere, model, "train", split.rows) for name, model in models.items()
        }
        speeds = plan.calibrate(experiment, tokenised, arguments.seconds)
        lengths = {name: [len(ids) for ids in rows["input_ids"]] for name, rows in tokenised.items()}
    print(plan.format_plan(plan.make_plan(experiment, lengths, speeds), arguments.reuses))
    if left_out := plan.not_in_the_times(experiment):
        print(f"\n{left_out}")


if __name__ == "__main__":
    run_stage(main)
