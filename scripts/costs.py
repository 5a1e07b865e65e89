"""Sum up the cost ledger: what selection took, against tuning the target on everything.

    python scripts/costs.py --config_path configs/demo.yaml

Needs the ledger of a run folder in which a stage was run. Writes nothing.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from selection.run.ending import end_on_signals

end_on_signals()

from selection.run.cli import argument_parser, load_experiment_from_arguments, run_stage
from selection.run.ledger import format_summary, summarise
from selection.scores.identity import check_run


def main() -> None:
    experiment = load_experiment_from_arguments(argument_parser(__doc__))
    check_run(experiment)
    print("costs so far:\n" + format_summary(summarise(experiment)))


if __name__ == "__main__":
    run_stage(main)
