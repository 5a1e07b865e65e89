"""The cost ledger of a run folder: what each stage took, and what selection costs against tuning on everything.

FLOPs count 2 for a multiply-add: 2·P·T for a forward pass of T tokens through P parameters (active ones of a mixture of
experts, with an untied input embedding), as much again for the gradients of activations, and again for trained weights;
without attention's T² part, norms, softmax and the optimiser.
"""

import contextlib
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from selection.run.config import ANY_SCORES, SMALL_RULES, Experiment, from_repository
from selection.run.errors import UserError
from selection.run.log import say
from selection.run.processes import processes
from selection.run.products import checked, locked, parse_json, read_record, read_sealed, write_sealed

CUTTING, SPECULATIVE_TUNING = "cutting the speculator", "speculative tuning"
SPECULATIVE_SCORES, VERIFICATION, CORESETS = "speculative scores", "verification", "coresets"
LOOK = "look at the rows"  # that lists suspects
TARGET_TUNING, TARGET_SCORES, EVALUATION = "target tuning", "target scores", "evaluation"
SPECULATIVE_STAGES = (CUTTING, SPECULATIVE_TUNING, SPECULATIVE_SCORES)
_SCORING_STAGES = (SPECULATIVE_SCORES, VERIFICATION, TARGET_SCORES)
_Count = Annotated[int, Field(ge=0, le=10**18)]  # more is damage: sums would be infinite
_Amount = Annotated[float, Field(ge=0, le=1e12)]


def forward_flops(parameters: int, tokens: int) -> float:
    """2·P·T."""
    return 2.0 * parameters * tokens


def tuning_flops(parameters: int, tokens: int, lora: bool, checkpointing: bool) -> float:
    """LoRA 4·P·T (adapters left out), full 6·P·T; checkpointing 2·P·T more. `tokens` over all epochs."""
    return ((2 if lora else 3) + checkpointing) * forward_flops(parameters, tokens)


def scoring_flops(parameters: int, tokens: int, phi: str) -> float:
    """all_lora 4·P·T; other φ 2·P·T, without their backward pass through the head and the last layer."""
    return (2 if phi == "all_lora" else 1) * forward_flops(parameters, tokens)


@dataclass
class Cost:
    """One stage's entry. `tokens` without padding; `peak_memory_gb` of the process so far, with what
    it shares with the launcher that imported the libraries; on a GPU of the stage."""

    stage: str
    what: str  # model, coreset or method
    samples: _Count = 0
    tokens: _Count = 0
    parameters: _Count = 0  # of the model it ran, of a mixture of experts the active ones
    seconds: _Amount = 0.0
    peak_memory_gb: _Amount = 0.0
    device: str = ""
    precision: str = ""
    finished: str = ""
    processes: int = 1
    folder: str = ""  # scores: the id of their folder
    more_tokens: _Count = 0  # of further forward passes: for losses that rules read (scores/losses.py), for a look

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


def ledger_path(run_folder: Path) -> Path:
    return run_folder / "costs.jsonl"


@contextlib.contextmanager
def measured(run_folder: Path, cost: Cost) -> Iterator[Cost]:
    """Append what runs inside to the ledger, by the leader, with wall time and peak memory. If it fails, every process
    records what it has scored, the leader alone the time."""
    torch = sys.modules.get("torch")  # a stage that never loaded torch used no GPU
    gpu = torch.cuda if torch and torch.cuda.is_available() else None
    if gpu:
        gpu.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
        yield cost
    finally:
        leads, failed = processes().leads, sys.exc_info()[0] is not None
        if (cost.stage in _SCORING_STAGES and cost.samples) if failed else leads:
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
            cost.peak_memory_gb = round((gpu.max_memory_allocated() if gpu else resident) / 1e9, 2)
            cost.seconds = round(time.perf_counter() - started if leads else 0.0, 2)
            cost.finished = time.strftime("%Y-%m-%dT%H:%M:%S")
            with locked(run_folder), ledger_path(run_folder).open("a+b") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)  # a line that a full disk or a kill cut off
                file.write(json.dumps(asdict(cost)).encode() + b"\n")
            took = f"{cost.tokens + cost.more_tokens} tokens, {cost.seconds:.1f} s"
            took += f", peak memory {cost.peak_memory_gb:.2f} GB"
            say(f"{cost.stage} of {cost.what}: {cost.samples} samples, {took}")


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
    full_tuning_basis: str  # "measured", or what that figure was scaled from
    sharing_runs: int = 1  # runs that share the speculative stages, this one included
    coresets: int = 1  # of that method, one a rate, cut from this selection
    direct_seconds: float | None = None  # that the untuned target would take to score every row itself

    selection_total = property(lambda self: sum(self.selection_seconds.values()))


def summarise(experiment: Experiment) -> CostSummary:
    """Selection cost by stage, of STAFF or else the first rule on the same scores, and the cost of tuning the target on
    everything."""
    selection, methods = Counter(), experiment.selection.methods
    rules = [method for method in methods if method in SMALL_RULES and "staff" not in methods]
    method = (rules or ["staff"])[0]
    for cost in selection_costs(experiment, method):
        selection[cost.stage] += cost.seconds
    rates = len(list(experiment.coresets.glob(f"{method}-*.json")))
    verified = _scoring(read_ledger(experiment.folder), VERIFICATION)
    scored = sum(cost.tokens for cost in _scoring(read_ledger(experiment.speculative_folder), SPECULATIVE_SCORES))
    direct = None
    if tokens := sum(cost.tokens for cost in verified):
        direct = sum(cost.seconds for cost in verified) * scored / tokens
    return CostSummary(selection, *_full_tuning(experiment), sharing_runs(experiment), rates, direct)


def _full_tuning(experiment: Experiment) -> tuple[float | None, str]:
    """Seconds of tuning the target on everything, as measured; else scaled by tokens from its tuning on coresets; else
    by tokens and parameters from the small model's tuning."""
    ours, theirs = read_ledger(experiment.folder), read_ledger(experiment.speculative_folder)
    if full := _last(ours, TARGET_TUNING, "full"):
        return full[0].seconds, "measured"
    target, verified = [c for c in ours if c.stage == TARGET_TUNING], _last(ours, VERIFICATION)
    small, scored = _last(theirs, SPECULATIVE_TUNING), _scoring(theirs, SPECULATIVE_SCORES)
    passes, target_passes = map(experiment.passes, (experiment.speculative_training, experiment.target_training))
    passes *= experiment.speculative_share
    tokens = small[0].tokens / passes if small and passes else sum(c.tokens for c in scored)  # of one pass
    if tokens and target:
        per_token = sum(c.seconds for c in target) / sum(c.tokens for c in target)
        return per_token * tokens * target_passes, "scaled by tokens from its tuning on coresets"
    if not (tokens and small and scored and verified):
        return None, "unknown before something was tuned and all was scored"
    ratio = verified[0].parameters / scored[-1].parameters
    per_token = small[0].seconds / small[0].tokens * ratio
    return per_token * tokens * target_passes, f"scaled from the small model's by tokens and size, {ratio:.1f} ×"


def selection_costs(experiment: Experiment, method: str, shared: bool = True) -> list[Cost]:
    """What a method's selection cost: one entry a stage, the last where it was done again. All rates share it.

    STAFF: cutting the speculator (from its draft.json), tuning it, its scores, all divided by the runs that share them
    where `shared`; verification. A rule on the small model's scores: the same without verification, ifd and middle also
    without tuning. A baseline that reads the tuned target's scores: tuning on everything, and these scores. All:
    the look at the rows, where suspects are left out; under speculation direct it takes its figures from the target's
    scores, so that all pay for them too."""
    ours, paid = read_ledger(experiment.folder), []
    look = experiment.selection.leave_out == "suspects"
    if method == "staff" or method in SMALL_RULES or (method in ANY_SCORES and look and experiment.direct):
        theirs, n = read_ledger(experiment.speculative_folder), sharing_runs(experiment)
        tuned = experiment.tuned_small and method not in ("ifd", "middle")  # these read the untuned model
        paid = _cutting(experiment) + (_last(theirs, SPECULATIVE_TUNING) if tuned else [])
        scoring = _scoring(theirs, SPECULATIVE_SCORES)
        paid += scoring if method in SMALL_RULES else [replace(c, more_tokens=0) for c in scoring]  # which read those
        if n > 1 and shared:
            divided = ("samples", "tokens", "more_tokens", "seconds")
            paid = [replace(c, **{name: getattr(c, name) / n for name in divided}) for c in paid]
        paid += _scoring(ours, VERIFICATION) if method == "staff" else []
    elif method not in ANY_SCORES:
        paid = _last(ours, TARGET_TUNING, "full") + _scoring(ours, TARGET_SCORES)
    looked = _last(ours, LOOK) if look else []
    return paid + looked + _last(ours, CORESETS, method)


def _last(costs: list[Cost], stage: str, what: str | None = None) -> list[Cost]:
    return [c for c in costs if c.stage == stage and what in (None, c.what)][-1:]


def _scoring(costs: list[Cost], stage: str) -> list[Cost]:
    """The stage's entries for the score folder that is there now: the one filled last."""
    entries = [c for c in costs if c.stage == stage]
    return [c for c in entries if c.folder == entries[-1].folder]


_NUMBERS = {"tokens": _Count, "parameters": _Count, "seconds": _Amount}
_CuttingCost = TypedDict("_CuttingCost", _NUMBERS)


def _cutting(experiment: Experiment) -> list[Cost]:
    draft = from_repository(experiment.small_model) / "draft.json"
    paid = checked(_CuttingCost | None, read_record(draft).get("cost"), draft) if draft.exists() else None
    return [Cost(CUTTING, experiment.small_model, **paid)] if paid else []


def _shared_by(path: Path) -> list[str]:
    return checked(list[str], read_sealed(path).get("runs"), path) if path.exists() else []


def share_costs(experiment: Experiment) -> None:
    """Record this run, once, in the run folder whose speculative scores it uses (`speculative_run`)."""
    folder, ours = experiment.speculative_folder, str(experiment.folder)
    with locked(folder):
        runs = _shared_by(folder / "shared_by.json")
        if ours not in runs:
            write_sealed(folder / "shared_by.json", {"runs": [*runs, ours]})


def sharing_runs(experiment: Experiment) -> int:
    """How many runs use the same speculative scores: the one that made them, this one, and all recorded that exist."""
    others = {run for run in _shared_by(experiment.speculative_folder / "shared_by.json") if Path(run).is_dir()}
    return len({str(experiment.speculative_folder), str(experiment.folder), *others})


def format_summary(summary: CostSummary) -> str:
    runs, total, lines = summary.sharing_runs, summary.selection_total, []
    for stage, seconds in summary.selection_seconds.items():
        whole = f" ({seconds * runs:.1f} s, shared by {runs} runs)" if runs > 1 and stage in SPECULATIVE_STAGES else ""
        lines.append(f"  {stage:<22} {seconds:>9.1f} s{whole}")
    lines.append(f"  {'selection in all':<22} {total:>9.1f} s")
    if (count := summary.coresets) > 1:
        lines.append(f"  shared by the coresets of {count} rates: {total / count:.1f} s each")
    if full := summary.full_tuning_seconds:
        basis = f"{full:.1f} s ({summary.full_tuning_basis})"
        lines.append(f"  tuning the target on everything: {basis}; selection costs {total / full:.0%} of it")
    if full and (direct := summary.direct_seconds):
        how = f"about {direct:.1f} s (scaled from verification), {direct / full:.0%} of it"
        lines.append(f"  every row scored by the untuned target instead (speculation direct): {how}")
    return "\n".join(lines)
