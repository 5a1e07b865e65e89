"""Sum up the cost ledger: what selection took, against tuning the target on everything.

    python costs.py --config_path ../configs/demo.yaml      # in selection/

Needs the ledger of a run folder in which a stage was run. Writes nothing.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, whatever the working directory

from selection.errors import end_on_signals, run_stage  # noqa: E402

end_on_signals()

from selection.identity import check_run  # noqa: E402
from selection.ledger import format_summary, summarise  # noqa: E402
from selection.stage import argument_parser, load_experiment_from_arguments  # noqa: E402


def main() -> None:
    experiment = load_experiment_from_arguments(argument_parser(__doc__))
    check_run(experiment)
    print("costs so far:\n" + format_summary(summarise(experiment)))


if __name__ == "__main__":
    run_stage(main)
