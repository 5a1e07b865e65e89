"""The cost ledger of a run folder: what each stage took, and what selection costs against tuning on everything."""

import contextlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt
from typing_extensions import TypedDict

from selection.run.config import Experiment, from_repository
from selection.run.errors import UserError
from selection.run.log import say
from selection.run.processes import processes
from selection.run.products import checked, locked, parse_json, read_json, read_sealed, write_sealed

CUTTING, SPECULATIVE_TUNING = "cutting the speculator", "speculative tuning"
SPECULATIVE_SCORES, VERIFICATION, CORESETS = "speculative scores", "verification", "coresets"
TARGET_TUNING, TARGET_SCORES, EVALUATION = "target tuning", "target scores", "evaluation"
SPECULATIVE_STAGES = (CUTTING, SPECULATIVE_TUNING, SPECULATIVE_SCORES)
SELECTION_STAGES = (*SPECULATIVE_STAGES, VERIFICATION, CORESETS)
_SCORING_STAGES = (SPECULATIVE_SCORES, VERIFICATION, TARGET_SCORES)


@dataclass
class Cost:
    """One stage's entry. `tokens` without padding; `peak_memory_gb` of the process so far, on a GPU of the stage."""

    stage: str
    what: str  # model, coreset or method
    samples: NonNegativeInt = 0
    tokens: NonNegativeInt = 0
    parameters: NonNegativeInt = 0  # of the model it ran, of a mixture of experts the active ones
    seconds: NonNegativeFloat = 0.0
    peak_memory_gb: NonNegativeFloat = 0.0
    device: str = ""
    precision: str = ""
    finished: str = ""
    processes: int = 1
    folder: str = ""  # scores: in which score folder they are, by its id

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


def ledger_path(run_folder: Path) -> Path:
    return run_folder / "costs.jsonl"


@contextlib.contextmanager
def measured(run_folder: Path, cost: Cost) -> Iterator[Cost]:
    """Fill in wall time and peak memory of what runs inside, and append the entry; if it fails, for what was scored.

    Of several processes the leader enters the stage. If it fails, each enters what it has scored, the leader the time.
    """
    if gpu := _gpu():
        gpu.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
        yield cost
    finally:
        leads, failed = processes().leads, sys.exc_info()[0] is not None
        if (cost.stage in _SCORING_STAGES and cost.samples) if failed else leads:
            _append(run_folder, cost, time.perf_counter() - started if leads else 0.0)


def _gpu():
    """torch.cuda where a GPU is in use; a stage that never loaded torch used none."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _append(run_folder: Path, cost: Cost, seconds: float) -> None:
    cost.seconds = round(seconds, 2)
    gpu, resident = _gpu(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    peak = gpu.max_memory_allocated() if gpu else resident
    cost.peak_memory_gb = round(peak / 1e9, 2)
    cost.finished = time.strftime("%Y-%m-%dT%H:%M:%S")
    with locked(run_folder), ledger_path(run_folder).open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # a line that a full disk or a kill cut off
        file.write(json.dumps(asdict(cost)).encode() + b"\n")
    say(
        f"{cost.stage} of {cost.what}: {cost.samples} samples, {cost.tokens} tokens, {cost.seconds:.1f} s, "
        f"peak memory {cost.peak_memory_gb:.2f} GB"
    )


def read_ledger(run_folder: Path) -> list[Cost]:
    """All entries, oldest first. Raises: UserError where there is no ledger yet or a line is damaged."""
    path = ledger_path(run_folder)
    try:
        values = [parse_json(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except FileNotFoundError:
        raise UserError(f"{run_folder} has no cost ledger yet: run a stage first") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return checked(list[Cost], values, path)


@dataclass(frozen=True)
class CostSummary:
    selection_seconds: dict[str, float]  # by stage, this run's share
    full_tuning_seconds: float | None  # of the target on the whole training split
    full_tuning_basis: str  # how that figure was come by
    sharing_runs: int = 1  # that share the speculative stages, this one included
    coresets: int = 1  # of STAFF, one a rate, cut from this selection

    @property
    def selection_total(self) -> float:
        return sum(self.selection_seconds.values())


def summarise(experiment: Experiment) -> CostSummary:
    """Selection cost by stage, and the cost of tuning the target on everything.

    The latter is measured where it was run; else scaled by tokens from the target's tuning on coresets; else by
    tokens and parameters from the tuning of the small model.
    """
    selection = dict.fromkeys(SELECTION_STAGES, 0.0)
    for cost in selection_costs(experiment, "staff"):
        selection[cost.stage] += cost.seconds
    rates = len(list(experiment.coresets.glob("staff-*.json")))
    return CostSummary(selection, *_full_tuning(experiment), sharing_runs(experiment), rates)


def _full_tuning(experiment: Experiment) -> tuple[float | None, str]:
    """Seconds of tuning the target on everything, and their basis."""
    target, verified = (
        [c for c in read_ledger(experiment.folder) if c.stage == stage] for stage in (TARGET_TUNING, VERIFICATION)
    )
    speculative = read_ledger(experiment.speculative_folder)
    small, scored = [c for c in speculative if c.stage == SPECULATIVE_TUNING], _scoring(speculative, SPECULATIVE_SCORES)
    if full := [c for c in target if c.what == "full"]:
        return full[-1].seconds, "measured"
    passes, target_passes = (
        (experiment.training | keys).get("num_train_epochs", 3)
        for keys in (experiment.small_training, experiment.target_training)
    )
    if small and passes:
        full_tokens = small[-1].tokens / passes * target_passes
    elif scored:
        full_tokens = sum(c.tokens for c in scored) * target_passes
    else:
        return None, "unknown before something was tuned or scored"
    if target:
        per_token = sum(c.seconds for c in target) / sum(c.tokens for c in target)
        return per_token * full_tokens, "scaled by tokens from its tuning on coresets"
    if not (small and scored and verified):
        return None, "unknown before something was tuned and all was scored"
    ratio = verified[-1].parameters / scored[-1].parameters
    per_token = small[-1].seconds / small[-1].tokens * ratio
    return per_token * full_tokens, f"scaled from the small model's by tokens and size, {ratio:.1f} ×"


def selection_costs(experiment: Experiment, method: str) -> list[Cost]:
    """What a method's coresets were paid with; all rates share it.

    STAFF: cutting the speculator, if it is one that was cut (its draft.json says what that took), tuning it, its
    scores, verification. Where several runs share the speculator's scores, each pays an equal part of the first three,
    in fractions of tokens and samples too. A baseline that reads the tuned target's scores: tuning that on everything,
    and the scores. What was made again counts once, the last: a tuning, or the scores of a folder that was removed;
    parts of an interrupted scoring run add up.
    """
    costs = read_ledger(experiment.folder)
    if method == "staff" and experiment.borrows:
        theirs = read_ledger(experiment.speculative_folder)
        costs = [c for c in costs if c.stage not in SPECULATIVE_STAGES]
        costs += [c for c in theirs if c.stage in SPECULATIVE_STAGES]

    def last(stage: str, what: str | None = None) -> list[Cost]:
        return [c for c in costs if c.stage == stage and what in (None, c.what)][-1:]

    if method == "staff":
        whole = _cutting(experiment) + (last(SPECULATIVE_TUNING) if experiment.tuned_small else [])
        whole += _scoring(costs, SPECULATIVE_SCORES)
        paid = [_part(cost, sharing_runs(experiment)) for cost in whole] + _scoring(costs, VERIFICATION)
    elif method in ("random", "length"):
        paid = []
    else:
        paid = last(TARGET_TUNING, "full") + _scoring(costs, TARGET_SCORES)
    return paid + last(CORESETS, method)


def _scoring(costs: list[Cost], stage: str) -> list[Cost]:
    """The entries of the score folder that was filled last."""
    entries = [c for c in costs if c.stage == stage]
    return [c for c in entries if c.folder == entries[-1].folder]


def _part(cost: Cost, runs: int) -> Cost:
    """What one of `runs` pays of it."""
    if runs == 1:
        return cost
    return replace(cost, samples=cost.samples / runs, tokens=cost.tokens / runs, seconds=cost.seconds / runs)


def share_costs(experiment: Experiment) -> None:
    """Enter this run, once, in the run folder whose speculative scores it uses (`speculative_run`)."""
    folder = experiment.speculative_folder
    with locked(folder):
        runs = _shared_by(folder)
        if str(experiment.folder) not in runs:
            write_sealed(folder / "shared_by.json", {"runs": [*runs, str(experiment.folder)]})


def sharing_runs(experiment: Experiment) -> int:
    """How many runs use the same speculative scores: the one that made them, this one, and all that have entered and
    are still there."""
    folder = experiment.speculative_folder
    others = {run for run in _shared_by(folder) if Path(run).is_dir()}
    return len({str(folder), str(experiment.folder), *others})


def _shared_by(folder: Path) -> list[str]:
    path = folder / "shared_by.json"
    return checked(_SharedBy, read_sealed(path), path)["runs"] if path.exists() else []


class _SharedBy(TypedDict):
    runs: list[str]


def _cutting(experiment: Experiment) -> list[Cost]:
    draft = from_repository(experiment.small_model) / "draft.json"
    paid = checked(_Draft, read_json(draft), draft).get("cost") if draft.exists() else None
    return [Cost(CUTTING, experiment.small_model, **paid)] if paid else []


class _Draft(TypedDict, total=False):
    cost: "_CuttingCost"


class _CuttingCost(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid")

    tokens: NonNegativeInt
    parameters: NonNegativeInt
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


def format_summary(summary: CostSummary) -> str:
    runs, lines = summary.sharing_runs, []
    for stage, seconds in summary.selection_seconds.items():
        whole = f" ({seconds * runs:.1f} s, shared by {runs} runs)" if runs > 1 and stage in SPECULATIVE_STAGES else ""
        lines += [f"  {stage:<22} {seconds:>9.1f} s{whole}"] if seconds else []
    lines.append(f"  {'selection in all':<22} {summary.selection_total:>9.1f} s")
    if summary.coresets > 1:
        each = summary.selection_total / summary.coresets
        lines.append(f"  shared by the coresets of {summary.coresets} rates: {each:.1f} s each")
    if summary.full_tuning_seconds:
        share = summary.selection_total / summary.full_tuning_seconds
        lines.append(
            f"  tuning the target on everything: {summary.full_tuning_seconds:.1f} s ({summary.full_tuning_basis}); "
            f"selection costs {share:.0%} of it"
        )
    return "\n".join(lines)
