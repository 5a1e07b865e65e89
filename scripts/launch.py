"""Run a stage on all visible GPUs: torchrun with one process each, or simply here where there is one or none.

    python scripts/launch.py selection/effort_score.py --config_path configs/demo.yaml

Needs what the stage needs. NPROC=N asks for N processes. Ends as the stage ended: torchrun alone ends with 1.
"""

import argparse
import os
import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import Interrupted, end_on_signals, run_stage

from selection.run.cli import argument_parser
from selection.run.errors import UserError
from selection.run.processes import visible_gpus


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("stage", help="script of a stage; required")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="as the stage requires")
    parser.parse_args()
    asked = os.environ.get("NPROC", "")
    if asked and not (asked.isdigit() and int(asked)):
        raise UserError(f"NPROC={asked}: give the number of processes")
    if (count := int(asked or len(visible_gpus()))) > 1:
        return _run_many(count, sys.argv[1:])
    end_on_signals()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def _run_many(count: int, command: list[str]) -> None:
    import logging

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import api, errors

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the stage has said what is wrong
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    try:
        run.run(run.parse_args(["--standalone", "--nproc_per_node", str(count), *command]))
    except errors.ChildFailedError as error:  # the code of the process that failed: torchrun ends the others by SIGTERM
        codes = (failure.exitcode for failure in error.failures.values())
        code = next((code for code in codes if code not in (-15, 143)), 143)
        sys.exit(code if code > 0 else 128 - code)
    except api.SignalException as stop:
        raise Interrupted(int(stop.sigval)) from None


if __name__ == "__main__":
    run_stage(main)
