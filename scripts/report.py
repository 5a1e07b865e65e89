"""One HTML page about a run: its scores, strata, verification ratios, samples and costs, and what each coreset takes.

    python scripts/report.py runs/demo
    python scripts/report.py --config_path configs/demo.yaml

Needs a run folder with a coreset. Writes <run folder>/report.html and prints its path.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

from selection.run.cli import add_experiment_arguments, argument_parser
from selection.run.config import load_experiment, load_run
from selection.run.errors import UserError


def main() -> None:
    parser = argument_parser(__doc__)
    add_experiment_arguments(parser, required=False)
    parser.add_argument("run", nargs="?", type=Path, help="run folder; default: that of --config_path")
    arguments = parser.parse_args()
    if (arguments.run is None) == (arguments.config_path is None):
        raise UserError("give either a run folder or --config_path")
    experiment = load_run(arguments.run) if arguments.run else load_experiment(arguments.config_path, arguments.set)

    from selection.report.page import write_report
    from selection.scores.identity import check_run

    check_run(experiment, verified=True)
    print(write_report(experiment))


if __name__ == "__main__":
    run_stage(main)
