"""Kill stages at random moments, call them again, and compare with a run that nobody broke.

    python tests/chaos.py --count 50 --seed 0

Every stage of the tiny demo is run by one process and by two (as torchrun runs them), killed with SIGKILL, all of its
processes or one of them, and called again, until it ends by itself. Scores, V_i, coresets, tuned weights and answers
must then be those of the unbroken run, bit for bit, and nothing half-written may be left. Needs nothing but the stack.
Prints a count by stage; exit code 1 where a trial failed, with its number: --only N repeats it.
"""

import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

import numpy as np
import torch  # noqa: F401  forks take it over

from selection.run.cli import argument_parser
from selection.run.ledger import read_ledger
from selection.run.products import file_digest
from selection.scores.folder import read_scores
from tests.forks import REPOSITORY, run_processes


class Stage(NamedTuple):
    script: str
    makes: tuple[str, ...]  # in the run folder
    arguments: tuple[str, ...] = ()


_CORESET = ("--select_path", "{run}/coresets/staff-0.2.json")
STAGES = (
    Stage("finetune/finetune.py", ("data", "small")),
    Stage("selection/effort_score.py", ("tokenised", "scores")),
    Stage("selection/verify.py", ("scores/target", "verification.json")),
    Stage("selection/coreset.py", ("coresets",)),  # runs in one process whatever there is
    Stage("finetune/finetune-select.py", ("target", "data/staff-0.2.arrow"), _CORESET),
    Stage("finetune/eval.py", ("eval",)),
)
_COMPARED = (
    "verification.json", "scores/*/manifest.json", "data/*.arrow", "coresets/*.json", "small/*.safetensors",
    "target/*/*.safetensors", "eval/*/predictions.jsonl",
)  # fmt: skip


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--count", type=int, default=50, help="trials; default: 50")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed and when; default: 0")
    parser.add_argument("--only", type=int, nargs="+", help="only these trials, by number; default: all")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        failed = Trials(Path(folder)).run(arguments.count, arguments.seed, arguments.only)
    sys.exit(1 if failed else 0)


class Trials:
    def __init__(self, folder: Path):
        """Make the models."""
        self.folder, self.log, self.durations = folder, folder / "log", {}
        self.model, self.draft = folder / "model", folder / "draft"
        self._must([["scripts/make_tiny_model.py", "--out", self.model]])
        cutting = ["scripts/make_draft.py", *self._settings(folder / "cutting"), "--layers", 2]
        self._must([[*cutting, "--target", self.model, "--out", self.draft]])

    def _unbroken(self, number: int) -> Path:
        """A run by `number` processes that nobody broke, made once."""
        run = self.folder / f"unbroken-{number}"
        for stage in STAGES:
            if (stage, number) not in self.durations:
                begun = time.monotonic()
                self._must(self._commands(stage, run, number))
                self.durations[stage, number] = time.monotonic() - begun
        return run

    def run(self, count: int, seed: int, only: Sequence[int] | None) -> int:
        """Run the trials and print what came of them; the number of those that failed."""
        trial, killed, failed, tried = 0, 0, 0, Counter()
        while tried.total() < count and (not only or trial < max(only)):
            chance, stage, trial = random.Random(f"{seed} {trial}"), STAGES[trial % len(STAGES)], trial + 1
            if only and trial not in only:
                continue
            number = chance.choice((1, 2))
            kills, wrong = self._trial(chance, stage, number)
            tried[stage.script] += kills > 0
            killed += kills
            if wrong:
                failed += 1
                print(f"trial {trial}, {stage.script}, {number} processes, killed {kills} times: {wrong}", flush=True)
                print("".join(self.log.read_text(errors="replace").splitlines(True)[-15:]))
        for script, times in tried.items():
            print(f"{script:<32}{times:>4} trials")
        print(f"{killed} kills in {tried.total()} trials (seed {seed}): {failed} failed")
        return failed

    def _trial(self, chance: random.Random, stage: Stage, number: int) -> tuple[int, str | None]:
        """How often it was killed before it ended by itself, and what is wrong then."""
        unbroken, run, kills = self._unbroken(number), self.folder / "run", 0
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(unbroken, run)
        for later in STAGES[STAGES.index(stage) :]:
            for path in (run / name for name in later.makes):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        commands = self._commands(stage, run, number)
        while kills < 3:
            moment, victims = chance.uniform(0, self.durations[stage, number]), chance.choice(("all", "one"))
            if run_processes(commands, self.log, moment, victims) is not None:
                break  # it ended before the moment came
            kills += 1
            if chance.random() < 0.6:
                break
        if not kills:
            return 0, None
        code = run_processes(commands, self.log)
        return kills, f"exit code {code} when called again" if code else difference(unbroken, run)

    def _settings(self, run: Path) -> list[str]:
        changes = {
            "output_dir": run,
            "target_model": self.model,
            "small_model": self.draft,
            "precision": "fp32",
            "selection.precision": "fp32",
            "selection.tokens_per_batch": 400,
            "selection.rates": "[0.2]",
        }
        config = ["--config_path", str(REPOSITORY / "configs" / "tiny.yaml")]
        return config + [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]

    def _commands(self, stage: Stage, run: Path, number: int) -> list[list[str]]:
        more = [argument.format(run=run) for argument in stage.arguments]
        line = [stage.script, *self._settings(run), *more]
        return [line] * (1 if stage.script == "selection/coreset.py" else number)

    def _must(self, commands: list[list[str]]) -> None:
        if code := run_processes(commands, self.log):
            sys.exit(f"{commands[0][0]} ended with {code}: {self.log.read_text(errors='replace')[-3000:]}")


def difference(unbroken: Path, run: Path) -> str | None:
    """What in `run` is not as in the unbroken run, as far as `run` has come; or what is left over."""
    if left := next(run.rglob("*.partial"), None):
        return f"{left.relative_to(run)} is left over"
    if (run / "scores" / "small" / "plan.json").exists():
        return "scores/small has a plan that is done"
    for stored in ("scores/small", "scores/target"):
        if (run / stored).exists():
            one, other = (read_scores(folder / stored) for folder in (unbroken, run))
            if not np.array_equal(one.index, other.index) or one.effort.tobytes() != other.effort.tobytes():
                return f"{stored} has other scores"
    for name in (path.relative_to(unbroken) for pattern in _COMPARED for path in unbroken.glob(pattern)):
        if (run / name).exists() and file_digest(run / name) != file_digest(unbroken / name):
            return f"{name} is not the same"
    if (run / "costs.jsonl").exists():
        read_ledger(run)  # or raise
    return None


if __name__ == "__main__":
    run_stage(main)
