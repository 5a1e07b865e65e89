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
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
from selection.run.ending import run_stage

import numpy as np
import torch  # noqa: F401  forks take it over

from selection.run.cli import argument_parser
from selection.run.ledger import read_ledger
from selection.run.products import file_digest
from selection.scores.folder import read_scores
from tests.forks import REPOSITORY, run_processes

_CORESET = ("--select_path", "{}/coresets/staff-0.2.json")
STAGES = {  # script: (what it makes in the run folder, more arguments)
    "finetune/finetune.py": (("data", "small"), ()),
    "selection/effort_score.py": (("tokenised", "scores"), ()),
    "selection/verify.py": (("scores/target", "verification.json"), ()),
    "selection/coreset.py": (("coresets",), ()),
    "finetune/finetune-select.py": (("target", "data/staff-0.2.arrow"), _CORESET),
    "finetune/eval.py": (("eval",), ()),
}
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
    kills, failed, numbers = Counter(), 0, arguments.only or range(arguments.count)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        trials = Trials(Path(folder))
        for trial in numbers:
            chance, script = random.Random(f"{arguments.seed} {trial}"), list(STAGES)[trial % len(STAGES)]
            number = chance.choice((1, 2))
            killed, wrong = trials.run(chance, script, number)
            kills[script] += killed
            if wrong:
                failed += 1
                print(f"trial {trial}, {script}, {number} processes, killed {killed} times: {wrong}", flush=True)
                print("".join(trials.log.read_text(errors="replace").splitlines(True)[-15:]))
    for script, times in kills.items():
        print(f"{script:<32}{times:>4} kills")
    print(f"{kills.total()} kills in {len(numbers)} trials (seed {arguments.seed}): {failed} failed")
    sys.exit(1 if failed else 0)


class Trials:
    def __init__(self, folder: Path):
        """Make the models."""
        self.folder, self.log, self.durations = folder, folder / "log", {}
        changes = {"target_model": folder / "model", "small_model": folder / "draft", "precision": "fp32"}
        changes |= {f"selection.{key}": value for key, value in (("precision", "fp32"), ("tokens_per_batch", 400))}
        self.settings = ["--config_path", str(REPOSITORY / "configs" / "tiny.yaml"), "--set", "selection.rates=[0.2]"]
        self.settings += [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
        self._must([["scripts/make_tiny_model.py", "--out", folder / "model"]])
        self._must([["scripts/make_draft.py", *self.settings, "--set", f"output_dir={folder / 'cut'}", "--layers", 2]])

    def _unbroken(self, number: int) -> Path:
        """A run by `number` processes that nobody broke, made once."""
        run = self.folder / f"unbroken-{number}"
        for script in STAGES:
            if (script, number) not in self.durations:
                begun = time.monotonic()
                self._must(self._commands(script, run, number))
                self.durations[script, number] = time.monotonic() - begun
        return run

    def run(self, chance: random.Random, script: str, number: int) -> tuple[int, str | None]:
        """How often the stage was killed before it ended by itself, and what is wrong then."""
        unbroken, run, kills = self._unbroken(number), self.folder / "run", 0
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(unbroken, run)
        for later in list(STAGES)[list(STAGES).index(script) :]:
            for path in (run / name for name in STAGES[later][0]):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        commands = self._commands(script, run, number)
        for _ in range(chance.choice((1, 1, 2, 3))):
            moment, victims = chance.uniform(0, self.durations[script, number]), chance.choice(("all", "one"))
            if run_processes(commands, self.log, moment, victims) is not None:
                break  # it ended before the moment came
            kills += 1
        code = run_processes(commands, self.log)
        return kills, f"exit code {code} when called again" if code else difference(unbroken, run)

    def _commands(self, script: str, run: Path, number: int) -> list[list[str]]:
        more = [argument.format(run) for argument in STAGES[script][1]]
        line = [script, *self.settings, "--set", f"output_dir={run}", *more]
        return [line] * (1 if script == "selection/coreset.py" else number)  # that one is one process

    def _must(self, commands: list[list[str]]) -> None:
        if code := run_processes(commands, self.log):
            sys.exit(f"{commands[0][0]} ended with {code}: {self.log.read_text(errors='replace')[-3000:]}")


def difference(unbroken: Path, run: Path) -> str | None:
    """What in `run` is not as in the unbroken run, as far as `run` has come; or what is left over."""
    if left := [*run.rglob("*.partial"), *run.glob("scores/small/plan.json")]:
        return f"{left[0].relative_to(run)} is left over"
    for stored in (path.relative_to(run) for path in run.glob("scores/[!.]*")):
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
