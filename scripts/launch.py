"""Run stages, one after the other: those that pass over rows by torchrun where there are several GPUs, a process each.

    python scripts/launch.py finetune/finetune.py selection/effort_score.py --config_path configs/demo.yaml

Needs what the stages need. NPROC=N asks for N processes. Ends as the stage ended: torchrun alone ends with 1.
Every stage has a process of its own, as its keys (tf32, compilation) may change a whole process. Without a GPU that
is a fork of this one, which has imported the libraries once.
"""

import argparse
import contextlib
import gc
import importlib
import itertools
import os
import runpy
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import Interrupted, end_on_signals, interrupt, on_signals, run_stage

from selection.run.cli import argument_parser
from selection.run.errors import UserError
from selection.run.processes import end_with_parent, visible_gpus

_ONE_PROCESS = ("coreset.py", "costs.py", "report.py")  # they read and write, and pass over no rows


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
    if count <= 1 and len(stages) > 1 and sys.platform == "linux" and not visible_gpus():  # a fork cannot share CUDA
        _import_libraries()
    for stage in stages:
        if count > 1 and Path(stage).name not in _ONE_PROCESS:
            _in_a_child(_run_many, count, [stage, *arguments])
        else:
            _in_a_child(_run_here, stage, arguments)


def _import_libraries() -> None:
    from selection.rows.llama_factory import import_llama_factory

    import_llama_factory()
    importlib.import_module("llamafactory.train.sft.workflow")
    importlib.import_module("sklearn.cluster")  # of the report
    gc.freeze()  # a child looks through its own objects alone


def _in_a_child(run: Callable[..., None], *arguments) -> None:
    """Run it in a fork that ends as a script ends. A signal reaches the child; its exit code ends this process too."""
    came, signals = [], {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until it is known whom to hand them to
    sys.stdout.flush()
    # Python 3.12 warns of threads; here they are OpenBLAS's and jemalloc's, which are made for forks.
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        child = os.fork()
    if not child:
        end_with_parent()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        run(*arguments)
        sys.exit()

    def hand_on(number: int, frame) -> None:
        came.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    on_signals(hand_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    on_signals(interrupt)
    if code in (-signal.SIGINT, -signal.SIGTERM) or (came and not code):  # at the stage's end, when it says nothing
        raise Interrupted(came[0] if came else -code)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def _run_here(stage: str, arguments: list[str]) -> None:
    end_on_signals()
    with contextlib.suppress(OSError):  # Linux: peak memory counts from here
        Path("/proc/self/clear_refs").write_text("5")
    sys.argv, sys.path[0] = [stage, *arguments], str(Path(stage).resolve().parent)
    runpy.run_path(stage, run_name="__main__")


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
