"""Run stages on all visible GPUs: by torchrun with one process each, or all of them here where there is one or none.

    python scripts/launch.py selection/effort_score.py selection/verify.py --config_path configs/demo.yaml

Needs what the stages need. NPROC=N asks for N processes. Ends as the stage ended: torchrun alone ends with 1.
"""

import argparse
import contextlib
import gc
import itertools
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
    parser.add_argument("stage", nargs="+", help="scripts of stages, one after the other; required")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="as the stages require")
    parser.parse_args()
    stages = list(itertools.takewhile(lambda argument: argument.endswith(".py"), sys.argv[1:]))
    arguments = sys.argv[1 + len(stages) :]
    asked = os.environ.get("NPROC", "")
    if asked and not (asked.isdigit() and int(asked)):
        raise UserError(f"NPROC={asked}: give the number of processes")
    count = int(asked or len(visible_gpus()))
    for stage in stages:
        if count > 1:
            _run_many(count, [stage, *arguments])
        else:
            _run_here(stage, arguments)


def _run_here(stage: str, arguments: list[str]) -> None:
    end_on_signals()
    with contextlib.suppress(OSError):  # Linux: peak memory counts from here
        Path("/proc/self/clear_refs").write_text("5")
    sys.argv, sys.path[0] = [stage, *arguments], str(Path(stage).resolve().parent)
    runpy.run_path(stage, run_name="__main__")
    gc.collect()  # its models
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()


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
