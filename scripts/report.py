"""One HTML page about a run: its scores, strata, verification ratios, samples and costs, and what each coreset takes.

    python scripts/report.py runs/demo
    python scripts/report.py --config_path configs/demo.yaml

Needs a run folder with a coreset. Writes <run folder>/report.html and prints its path.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

from selection.run.cli import argument_parser, load_run_from_arguments


def main() -> None:
    experiment, _ = load_run_from_arguments(argument_parser(__doc__))

    from selection.report.page import write_report
    from selection.scores.identity import check_run

    check_run(experiment, verified=True)
    print(write_report(experiment))


if __name__ == "__main__":
    run_stage(main)
