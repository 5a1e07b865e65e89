"""A grid of task × method × rate × seed cells: each tuned and evaluated once, by the stage scripts themselves.

One seed of one task is an ordinary experiment with a run folder of its own, so every cell can be made again with the
stages' commands, and what a stopped run has finished is reused.
"""

import contextlib
import csv
import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from selection.run.config import REPOSITORY, Experiment, Grid, load_experiment
from selection.run.device import choose_precision
from selection.run.errors import UserError
from selection.run.flops import forward_flops, scoring_flops, tuning_flops
from selection.run.ledger import (
    CUTTING,
    SPECULATIVE_TUNING,
    TARGET_TUNING,
    Cost,
    ledger_path,
    read_ledger,
    selection_costs,
)
from selection.run.log import progress_bar
from selection.run.metrics import read_metrics
from selection.run.processes import end_with_parent, visible_gpus
from selection.run.products import atomic_path, digest
from selection.scores.coresets import coreset_name
from selection.scores.folder import SCORER_VERSION
from selection.scores.verification import RULES_VERSION

# Rows of STAFF with more than the published rules, and what they change in a task's experiment. Each has run folders of
# its own, as it has its own verification, and pays for its own speculator.
VARIANTS = {"staff_length": ("selection.mode=extended", "selection.length_control=residual")}

_METRICS = {
    "rouge_l": "rouge-l", "bleu_4": "bleu-4", "rouge_1": "rouge-1", "rouge_2": "rouge-2",
    "rouge_score_l": "rouge_score-l", "rouge_score_1": "rouge_score-1", "rouge_score_2": "rouge_score-2",
    "sacrebleu": "sacrebleu",
}  # fmt: skip
_BY_SAMPLE = {
    "rouge_l": "rouge-l", "bleu_4": "bleu-4",
    "rouge_score_l": "rouge_score-l", "sacrebleu_sentence": "sacrebleu-sentence",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    task: str
    method: str
    rate: float
    seed: int

    @property
    def variant(self) -> str | None:
        return self.method if self.method in VARIANTS else None

    @property
    def rule(self) -> str:
        """The method as the stages know it."""
        return "staff" if self.variant else self.method

    @property
    def tuned(self) -> str:
        """Name of the tuned target in the run folder."""
        return self.rule if self.rule == "full" else coreset_name(self.rule, self.rate)

    def __str__(self) -> str:
        return f"{self.task}, seed {self.seed}, {f'{self.variant}, ' if self.variant else ''}{self.tuned}"


@dataclass(frozen=True)
class Job:
    """Commands that run one after the other in one process; cells are finished with it."""

    name: str
    commands: list[list[str]]
    rows: int  # samples that it tunes on, epochs counted
    needs: str | None = None  # name of the job that must be done before
    cell: Cell | None = None


def cells_of(grid: Grid) -> list[Cell]:
    """Every cell of the grid; `full` has one a task and seed, at rate 1."""
    return [
        Cell(task, method, rate, seed)
        for seed in grid.seeds
        for task in grid.tasks
        for method in grid.methods
        for rate in ([1.0] if method == "full" else grid.rates)
    ]


def experiment_arguments(grid: Grid, run_folder: Path, task: str, seed: int, variant: str | None = None) -> list[str]:
    """What the stages get on their command lines for one seed of a task, or of a variant of STAFF on it."""
    methods = [method for method in grid.methods if method != "full" and method not in VARIANTS] or ["random"]
    methods, folder = (["staff"], f"{task}-seed-{seed}-{variant}") if variant else (methods, f"{task}-seed-{seed}")
    changes = [
        *grid.tasks[task].set,
        *(VARIANTS[variant] if variant else ()),
        f"output_dir={json.dumps(str(run_folder / folder))}",
        f"selection.methods={json.dumps(methods)}",
        f"selection.rates={json.dumps(grid.rates)}",
        f"selection.seed={seed}",
        f"training.seed={seed}",
    ]
    config = str((REPOSITORY / grid.tasks[task].config).resolve())
    return ["--config_path", config, *(part for change in changes for part in ("--set", change))]


def load(arguments: list[str]) -> Experiment:
    return load_experiment(arguments[1], arguments[3::2])


# What a cell's figures do not depend on, or what is a cell's own: method, rate and seed.
_NO_SETTINGS = {
    "output_dir": True,
    "speculative_run": True,  # whose scores are those of this run's own
    "selection": {"methods", "rates", "seed", "self_test", "tokens_per_batch"},
    "training": {"seed", "report_to", "run_name"},
    "evaluation": {"batch_size"},
}


def settings_digest(experiment: Experiment, fingerprint: str, models: Iterable[str]) -> str:
    """What the figures of all cells of a task depend on, number formats and rules included: 16 hex digits.

    Args: `fingerprint` of the training split, `models` the two models' fingerprints.
    """
    settings = experiment.model_dump(exclude=_NO_SETTINGS)
    formats = [choose_precision(asked) for asked in (experiment.precision, experiment.selection.precision)]
    texts = [json.dumps(settings, sort_keys=True), *formats, str(SCORER_VERSION), str(RULES_VERSION)]
    return digest(*(text.encode() for text in (*texts, fingerprint, *models)))[:16]


def jobs_of(
    task: str, seed: int, cells: list[Cell], experiment: Experiment, arguments: list[str], num_rows: int
) -> list[Job]:
    """The jobs that make `cells`, all of one task, seed and variant: STAFF's selection, the tuning of the target
    on everything with the scores that the baselines read, and each coreset's tuning and evaluation."""

    def passes(keys: dict) -> float:
        return (experiment.training | keys).get("num_train_epochs", 3)

    def command(script: str, *more: str) -> list[str]:
        return [script, *arguments, *more]

    variant = next((cell.variant for cell in cells if cell.variant), None)
    name, methods = f"{task}, seed {seed}" + (f", {variant}" if variant else ""), {cell.rule for cell in cells}
    speculative = methods & {"staff"}
    on_tuned_target = methods - {"staff", "random", "length", "full"}
    # Random and Length need any scores, for the number of rows and their tokens.
    light = methods & {"random", "length"}
    (on_tuned_target if on_tuned_target and not speculative else speculative).update(light)
    jobs = []
    if speculative:
        stages = ["finetune/finetune.py", "selection/effort_score.py"]
        stages += ["selection/verify.py"] if "staff" in speculative else []
        commands = [command(stage) for stage in stages]
        commands += [command("selection/coreset.py", "--method", *sorted(speculative))]
        rows = round(num_rows * passes(experiment.small_training))
        jobs.append(Job(f"{name}, speculative selection", commands, rows))
    if on_tuned_target or "full" in methods:
        commands = [command("finetune/finetune.py", "--model", "target")]
        if on_tuned_target:
            commands += [command("selection/effort_score.py", "--model", "target")]
            commands += [command("selection/coreset.py", "--method", *sorted(on_tuned_target))]
        full = next((cell for cell in cells if cell.method == "full"), None)
        commands += [command("finetune/eval.py", "--tuned", "full")] if full else []
        rows = round(num_rows * passes(experiment.target_training))
        jobs.append(Job(f"{name}, full", commands, rows, cell=full))
    for cell in cells:
        if cell.method == "full":
            continue
        coreset = experiment.coresets / f"{cell.tuned}.json"
        commands = [
            command("finetune/finetune-select.py", "--select_path", str(coreset)),
            command("finetune/eval.py", "--tuned", cell.tuned),
        ]
        rows = round(num_rows * cell.rate * passes(experiment.target_training))
        needs = f"{name}, {'speculative selection' if cell.rule in speculative else 'full'}"
        jobs.append(Job(str(cell), commands, rows, needs, cell))
    return jobs


def gpus_of_workers(count: int, gpus: list[str]) -> list[dict[str, str]]:
    """What each of `count` processes is to have in its environment: one of the visible `gpus`, in turn."""
    return [{"CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)]} if gpus else {} for worker in range(count)]


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """Other values in the environment of a process that is started inside."""
    before = {key: os.environ.get(key) for key in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for key, value in before.items():
            del os.environ[key]
            if value is not None:
                os.environ[key] = value


def run_jobs(jobs: list[Job], parallel: int, log_folder: Path, finished: Callable[[Job], None]) -> None:
    """Run jobs, `parallel` at a time, each in one of that many processes that import everything once and see one GPU.

    `finished` is called after each. Raises: UserError with what a failed job said, after those that run have ended;
    no more are begun.
    """
    if parallel < 1:
        raise UserError(f"--jobs {parallel}: at least one at a time")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // parallel)))
    log_folder.mkdir(parents=True, exist_ok=True)
    waiting, done, running, failures = list(jobs), set(), {}, []
    names = {job.name for job in jobs}
    with contextlib.ExitStack() as stack:
        progress = progress_bar(total=sum(job.rows for job in jobs), unit="rows", smoothing=0, desc="tuning")
        stack.enter_context(progress)
        workers = []
        for changes in reversed(gpus_of_workers(parallel, visible_gpus())):
            pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent)
            workers.append((stack.enter_context(pool), changes))
        while running or (waiting and not failures):
            ready = [job for job in waiting if job.needs is None or job.needs in done or job.needs not in names]
            for job in ready[: 0 if failures else parallel - len(running)]:
                waiting.remove(job)
                log = log_folder / f"{job.name.replace(', ', '-').replace(' ', '-')}.log"
                pool, changes = worker = workers.pop()
                with _environment(changes):  # the pool starts its process at its first job
                    running[pool.submit(run_commands, job.commands, log)] = job, log, worker
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, log, worker = running.pop(future)
                workers.append(worker)
                try:
                    said = future.result()
                except BrokenProcessPool:
                    said = "a process was killed, perhaps for want of memory: give fewer --jobs"
                if said:
                    failures.append(f"{job.name}: {said} (log: {log})")
                    continue
                done.add(job.name)
                finished(job)
                progress.update(job.rows)
    if failures:
        raise UserError(failures[0])


def run_commands(commands: list[list[str]], log: Path) -> str | None:
    """Run stage scripts in this process, all they print into `log`; what the first failing one said, or None."""
    with log.open("a", encoding="utf-8") as file:
        begun = file.tell()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for script, *arguments in commands:
        sys.argv = [script, *arguments]
        print("$", *sys.argv, flush=True)
        try:
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        except SystemExit as stop:
            if stop.code:
                sys.stderr.flush()
                said = log.read_bytes()[begun:].decode("utf-8", "replace").splitlines()
                errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
                return errors[-1] if errors else f"{script} stopped with exit code {stop.code}"
        except Exception as error:  # a stage's own bug, or a device out of memory: named here, in full in the log
            traceback.print_exc()
            return f"{script}: {type(error).__name__}: {error}"
        finally:
            sys.stdout.flush()
    return None


def finished_cell(
    cell: Cell, grid: Grid, experiment: Experiment, num_rows: int, settings: str, sizes: tuple[int, int]
) -> dict:
    """A cell's row of cells.csv, out of its run folder. `sizes`: parameters of the small model and of the target."""
    evaluation = experiment.folder / "eval" / cell.tuned
    metrics = read_metrics(evaluation)
    if "by_sample" not in metrics:
        raise UserError(f"{evaluation} was made before scores were kept by sample: remove it")
    tuned = [c for c in read_ledger(experiment.folder) if c.stage == TARGET_TUNING and c.what == cell.tuned]
    if not tuned:
        raise UserError(f"{ledger_path(experiment.folder)} does not say what tuning {cell.tuned} cost: remove the run")
    tuning, selection = tuned[-1], [] if cell.method == "full" else selection_costs(experiment, cell.rule)

    def flops(cost: Cost) -> float:
        return stage_flops(cost, experiment, sizes)

    task = grid.tasks[cell.task]
    return {
        "task": cell.task,
        "target": Path(experiment.target_model).name,
        "method": cell.method,
        "mode": experiment.selection.mode,
        "rate": cell.rate,
        "seed": cell.seed,
        "size": tuning.samples,
        "num_rows": num_rows,
        "eval_rows": metrics["samples"],
        **{column: metrics.get(metric, "") for column, metric in _METRICS.items()},  # none in earlier evaluations
        **{
            f"{column}_by_sample": " ".join(f"{value:g}" for value in metrics["by_sample"].get(metric, []))
            for column, metric in _BY_SAMPLE.items()
        },
        "selection_seconds": round(sum(cost.seconds for cost in selection), 2),
        "selection_tokens": round(sum(cost.tokens for cost in selection)),
        "selection_flops": f"{sum(map(flops, selection)):.4g}",
        "tuning_seconds": tuning.seconds,
        "tuning_tokens": tuning.tokens,
        "tuning_flops": f"{flops(tuning):.4g}",
        "peak_memory_gb": tuning.peak_memory_gb,
        "device": tuning.device,
        "precision": tuning.precision,
        "commit": metrics["code_version"],
        "settings": settings,
        "paper_target": task.paper_target,
        "paper_task": task.paper_task,
    }


def stage_flops(cost: Cost, experiment: Experiment, sizes: tuple[int, int]) -> float:
    """Of one stage; `sizes` as above."""
    if cost.stage == CUTTING:
        return forward_flops(cost.parameters, cost.tokens)
    if cost.stage not in (SPECULATIVE_TUNING, TARGET_TUNING):
        return scoring_flops(cost.parameters, cost.tokens, experiment.selection.phi)
    small = cost.stage == SPECULATIVE_TUNING
    keys = experiment.training | (experiment.small_training if small else experiment.target_training)
    lora = keys.get("finetuning_type", "lora") == "lora"
    checkpointing = not keys.get("disable_gradient_checkpointing", False)
    return tuning_flops(sizes[0] if small else sizes[1], cost.tokens, lora, checkpointing)


def read_cells(path: Path) -> dict[Cell, dict[str, str]]:
    """The rows of a cells.csv by cell; none where there is no file yet. Raises: UserError where it is no such file."""
    if not path.exists():
        return {}
    csv.field_size_limit(2**31 - 1)  # scores by sample are one long field
    cells = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, strict=True):
                if None in row or None in row.values():
                    raise ValueError(f"row {len(cells) + 2} has more or fewer fields than the header")
                if row["settings"]:
                    cells[Cell(row["task"], row["method"], float(row["rate"]), int(row["seed"]))] = row
        return cells
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"cannot read cells from {path}: {error!r}: move it away") from None


def write_cells(path: Path, done: dict[Cell, dict], order: list[Cell]) -> None:
    """All finished cells, in the grid's order; those of a larger grid stay, at the end.

    What selection cost is one figure for all rates of a method and seed, the first that was measured: a resumed run
    pays a little again.
    """
    others = [cell for cell in done if cell not in order]
    rows, costs = [done[cell] for cell in [*order, *others] if cell in done], {}
    for row in rows:
        selection = costs.setdefault((row["task"], row["method"], str(row["seed"])), row)
        row |= {key: value for key, value in selection.items() if key.startswith("selection_")}
    with atomic_path(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
