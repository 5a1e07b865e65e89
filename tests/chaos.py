"""Kill stages at random moments, call them again, and compare with a run that nobody broke.

    python tests/chaos.py --count 50 --seed 0

Every stage of the tiny demo is run by one process and by two (as torchrun runs them), killed with SIGKILL, all of its
processes or one of them, and called again, until it ends by itself. Scores, V_i, coresets, tuned weights and answers
must then be those of the unbroken run, bit for bit, and nothing half-written may be left. Needs nothing but the stack.
Prints a count by stage; exit code 1 where a trial failed, with its number: --only N repeats it.
"""

import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

import numpy as np
from torch.distributed import TCPStore

from selection.rows.llama_factory import import_llama_factory
from selection.run.cli import argument_parser, run_stage
from selection.run.config import REPOSITORY
from selection.run.ledger import read_ledger
from selection.run.processes import processes
from selection.run.products import file_digest
from selection.scores.folder import read_scores

_PATIENCE = 5.0  # seconds that a process has to end when another one failed; torchrun gives it 30


@dataclass(frozen=True)
class Stage:
    script: str
    makes: tuple[str, ...]  # in the run folder
    arguments: tuple[str, ...] = ()
    alone: bool = False  # runs in one process whatever there is


STAGES = (
    Stage("finetune/finetune.py", ("data", "small")),
    Stage("selection/effort_score.py", ("tokenised", "scores")),
    Stage("selection/verify.py", ("scores/target", "verification.json")),
    Stage("selection/coreset.py", ("coresets",), alone=True),
    Stage(
        "finetune/finetune-select.py",
        ("target", "data/staff-0.2.arrow"),
        ("--select_path", "{run}/coresets/staff-0.2.json"),
    ),
    Stage("finetune/eval.py", ("eval",)),
)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--count", type=int, default=50, help="trials; default: 50")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed and when; default: 0")
    parser.add_argument("--only", type=int, nargs="+", help="only these trials, by number; default: all")
    arguments = parser.parse_args()
    import_llama_factory()  # once, for all the processes that are forked from this one
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        failed = trials(Path(folder), arguments.count, arguments.seed, arguments.only)
    sys.exit(1 if failed else 0)


def trials(folder: Path, count: int, seed: int, only: Sequence[int] | None) -> int:
    """Runs them and prints what came of them; the number of those that failed."""
    model, draft = folder / "model", folder / "draft"
    must([["scripts/make_tiny_model.py", "--out", str(model)]], folder / "log")
    cutting = ["scripts/make_draft.py", *settings(folder / "cutting", model, model), "--target", str(model)]
    must([[*cutting, "--layers", "2", "--out", str(draft)]], folder / "log")
    durations, unbroken = {}, {}
    for number in (1, 2):
        unbroken[number] = folder / f"unbroken-{number}"
        for stage in STAGES:
            begun = time.monotonic()
            must(command(stage, unbroken[number], model, draft, number), folder / "log")
            durations[stage, number] = time.monotonic() - begun
    trial, killed, tried, failures = 0, 0, Counter(), 0
    while sum(tried.values()) < count:
        chance = random.Random(f"{seed} {trial}")
        stage, number, trial = STAGES[trial % len(STAGES)], chance.choice((1, 2)), trial + 1
        if only and trial not in only:
            if trial > max(only):
                break
            continue
        run = folder / "run"
        begin_with(unbroken[number], run, stage)
        kills = 0
        while kills < 3:
            moment = chance.uniform(0, durations[stage, number])
            victims = chance.choice(("all", "one"))
            if run_processes(command(stage, run, model, draft, number), folder / "log", moment, victims) is not None:
                break  # it ended before the moment came
            kills += 1
            if chance.random() < 0.6:
                break
        if not kills:
            continue
        said = run_processes(command(stage, run, model, draft, number), folder / "log")
        wrong = difference(unbroken[number], run) if said == 0 else f"exit code {said} when called again"
        tried[stage.script] += 1
        killed += kills
        if wrong:
            failures += 1
            print(f"trial {trial}, {stage.script}, {number} processes, killed {kills} times: {wrong}", flush=True)
            if (folder / "log").exists():
                print("".join((folder / "log").read_text(errors="replace").splitlines(True)[-15:]))
    for script, times in tried.items():
        print(f"{script:<32}{times:>4} trials")
    print(f"{killed} kills in {sum(tried.values())} trials (seed {seed}): {failures} failed")
    return failures


def settings(run: Path, model: Path, draft: Path) -> list[str]:
    changes = {
        "output_dir": run,
        "target_model": model,
        "small_model": draft,
        "precision": "fp32",
        "selection.precision": "fp32",
        "selection.tokens_per_batch": 400,
        "selection.rates": "[0.2]",
    }
    config = str(REPOSITORY / "configs" / "tiny.yaml")
    return ["--config_path", config, *(part for key, value in changes.items() for part in ("--set", f"{key}={value}"))]


def command(stage: Stage, run: Path, model: Path, draft: Path, number: int) -> list[list[str]]:
    """The command line of each process."""
    more = [argument.format(run=run) for argument in stage.arguments]
    return [[stage.script, *settings(run, model, draft), *more]] * (1 if stage.alone else number)


def begin_with(unbroken: Path, run: Path, stage: Stage) -> None:
    """What the unbroken run had before `stage`."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(unbroken, run)
    for later in STAGES[STAGES.index(stage) :]:
        for name in later.makes:
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def must(commands: list[list[str]], log: Path) -> None:
    if code := run_processes(commands, log):
        sys.exit(f"{commands[0][0]} ended with {code}: {log.read_text(errors='replace')[-3000:]}")


def run_processes(
    commands: list[list[str]], log: Path, moment: float | None = None, victims: str = "all"
) -> int | None:
    """Run one process for each command line, as torchrun would, and kill them after `moment` seconds.

    Returns the highest exit code, or None where they were killed. Of several, the last may be the victim alone; then
    the others are stopped as torchrun stops them.
    """
    log.write_bytes(b"")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if len(commands) > 1 else None
    children = [fork(line, rank, len(commands), store, log) for rank, line in enumerate(commands)]
    codes: dict[int, int] = {}
    patience = None
    ends = None if moment is None else time.monotonic() + moment
    while len(codes) < len(children):
        if ends is not None and time.monotonic() >= ends:
            chosen = children if victims == "all" else children[-1:]
            stop([child for child in chosen if child not in codes], signal.SIGKILL)
            ends, moment = None, -1.0
        gone, status = os.waitpid(-1, os.WNOHANG)
        if gone:
            codes[gone] = os.waitstatus_to_exitcode(status)
            if codes[gone] and patience is None:
                patience = time.monotonic() + _PATIENCE
                stop([child for child in children if child not in codes], signal.SIGTERM)
        elif patience is not None and time.monotonic() > patience:
            stop([child for child in children if child not in codes], signal.SIGKILL)
        else:
            time.sleep(0.002)
    return None if moment == -1.0 and any(codes.values()) else max(codes.values(), key=abs)


def stop(children: list[int], number: signal.Signals) -> None:
    for child in children:
        os.kill(child, number)


def fork(line: list[str], rank: int, count: int, store: TCPStore | None, log: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # several write it
        for number in (1, 2):
            os.dup2(file, number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        if store is not None:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        processes.cache_clear()
        sys.argv = [str(REPOSITORY / line[0]), *line[1:]]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def difference(unbroken: Path, run: Path) -> str | None:
    """What of `run` is not what the unbroken one has, as far as `run` has come; or what is left over."""
    if left := [path for path in run.rglob("*") if path.name.endswith(".partial")]:
        return f"{left[0].relative_to(run)} is left over"
    for stored in ("scores/small", "scores/target"):
        if (run / stored).exists():
            one, other = (read_scores(folder / stored) for folder in (unbroken, run))
            if not np.array_equal(one.index, other.index) or one.effort.tobytes() != other.effort.tobytes():
                return f"{stored} has other scores"
    files, patterns = (
        ["verification.json", "scores/small/manifest.json", "scores/target/manifest.json"],
        (
            "data/*.arrow",
            "coresets/*.json",
            "small/*.safetensors",
            "target/*/*.safetensors",
            "eval/*/predictions.jsonl",
        ),
    )
    files += [str(path.relative_to(unbroken)) for pattern in patterns for path in unbroken.glob(pattern)]
    if (run / "scores" / "small" / "plan.json").exists():
        return "scores/small has a plan that is done"
    for name in files:
        if (run / name).exists() and file_digest(run / name) != file_digest(unbroken / name):
            return f"{name} is not the same"
    if (run / "costs.jsonl").exists():
        read_ledger(run)  # or raise
    return None


if __name__ == "__main__":
    run_stage(main)
