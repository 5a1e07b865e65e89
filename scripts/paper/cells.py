"""A grid of task × method × rate × seed cells: each tuned and evaluated once, by the stage scripts themselves."""

import contextlib
import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal, get_args
from unittest.mock import patch

import numpy as np
import pandas as pd
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from selection.run import ledger
from selection.run.config import NO_SCORES, REPOSITORY, SMALL_RULES, Experiment, Grid, Method, Variant, load_experiment
from selection.run.device import choose_precision
from selection.run.errors import UserError
from selection.run.metrics import read_metrics
from selection.run.processes import end_with_parent, visible_gpus
from selection.run.products import atomic_path, digest
from selection.scores.coresets import coreset_name
from selection.scores.folder import SCORER_VERSION
from selection.scores.verification import LATER, RULES_VERSION

# Random, Clusters and STAFF with additions, and what these change in a task's experiment. Each has its own coresets, so
# its own run folders; STAFF's take the speculative scores of STAFF. cleaned: Random among the rows that the target
# itself, by check_pool.py, does not suspect; rs2_cleaned: RS2; clusters_cleaned: Clusters of its hidden states;
# easier_half: STAFF without V_i among them, the half with most effort for its length dropped.
VARIANTS = {
    "cleaned": "selection.leave_out=suspects",
    "rs2_cleaned": "selection.leave_out=suspects",
    "clusters_cleaned": "selection.leave_out=suspects selection.speculation=direct",
    "easier_half": "selection.leave_out=suspects selection.speculation=direct selection.length_control=residual "
    "selection.budgets=size selection.hardest_cutoff=0.5",
    "staff_length": "selection.length_control=residual",
    "staff_size": "selection.budgets=size",
    "staff_neyman": "selection.budgets=neyman",
    "staff_calibrated": "selection.budgets=calibrated",
    "staff_nearest": "selection.within_stratum=nearest",
    "staff_ifd": "selection.hardest_by=ifd",
    "staff_direct": "selection.speculation=direct",
}


@dataclass(frozen=True)
class Cell:
    task: str
    method: str
    rate: float
    seed: int

    @property
    def rule(self) -> str:
        """The method as the stages know it."""
        rules = {"cleaned": "random", "rs2_cleaned": "rs2", "clusters_cleaned": "clusters"}
        return rules.get(self.method, "staff") if self.method in VARIANTS else self.method

    @property
    def tuned(self) -> str:
        """Name of the tuned target in the run folder."""
        return self.rule if self.rule == "full" else coreset_name(self.rule, self.rate)

    @property
    def run(self) -> str:
        """Name of the run folder: one for a task and seed, another for each variant."""
        return f"{self.task}-seed-{self.seed}" + f"-{self.method}" * (self.method in VARIANTS)

    @property
    def lender(self) -> "Cell":
        """The cell whose run folder holds the small model's scores."""
        scores_itself = "direct" in VARIANTS.get(self.method, "")
        return self if scores_itself else replace(self, method="staff")

    def __str__(self) -> str:
        return f"{self.run} {self.tuned}"


_Percent, _Cost = Annotated[float, Field(ge=0, le=100.001)], Annotated[float, Field(ge=0)]
UNITS = {"seconds": _Cost, "tokens": NonNegativeInt, "flops": _Cost}
# A figure for each evaluation row; in the file with spaces between them. nll: of log likelihood, in nats a token.
_BySample = Annotated[list[_Cost], BeforeValidator(lambda value: value.split() if isinstance(value, str) else value)]
METRICS = ("nll", "rouge_l", "bleu_4")
_ANSWERS = ("rouge_l", "bleu_4", "rouge_1", "rouge_2", "rouge_score_l", "rouge_score_1", "rouge_score_2", "sacrebleu")
_SAMPLED = (*METRICS, "rouge_score_l", "sacrebleu_sentence")
_FIGURES = {  # empty where no answers were generated; earlier evaluations have no nll
    "nll": _Cost | Literal[""],
    **dict.fromkeys(_ANSWERS, _Percent | Literal[""]),
    **dict.fromkeys((f"{metric}_by_sample" for metric in _SAMPLED), _BySample),
}
COLUMNS = {
    **dict.fromkeys(("task", "target"), str),
    "method": Literal["full", "oracle", Variant, Method],
    "mode": str,
    "rate": Annotated[float, Field(gt=0, le=1)],
    **dict.fromkeys(("seed", "size", "num_rows", "eval_rows"), int),
    **_FIGURES,
    **{f"{kind}_{unit}": one for kind in ("selection", "tuning") for unit, one in UNITS.items()},
    "peak_memory_gb": _Cost,
    **dict.fromkeys(("device", "precision", "commit", "settings", "paper_target", "paper_task"), str),
}


def _consistent(row: dict) -> dict:
    if (row["rate"] == 1) != (row["method"] == "full"):
        raise ValueError("column rate: full has 1, coresets less")
    metrics = [metric for metric in METRICS if row[metric] != ""]
    for metric in metrics:
        values = row[f"{metric}_by_sample"]
        if not values or len(values) != row["eval_rows"] or abs(np.mean(values) - row[metric]) > 0.05:  # rounding
            raise ValueError(f"column {metric}_by_sample: not eval_rows values with {metric} as their mean")
    if not metrics:
        raise ValueError(f"columns {', '.join(METRICS)}: all are empty")
    return row


_ROW = Annotated[TypedDict("_Row", COLUMNS), AfterValidator(_consistent)]
_ROWS = TypeAdapter(list[_ROW], config=ConfigDict(allow_inf_nan=False))


def read_cells(path: Path) -> dict[Cell, dict]:
    """The rows of a cells.csv by cell, with values of the types in COLUMNS; none where there is no file yet.

    Raises: UserError naming row, counted from the header as row 1, and column."""
    try:
        records = pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
        rows = _ROWS.validate_python([dict.fromkeys(_FIGURES, "") | record for record in records])
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        (row, *column), said = error.errors()[0]["loc"], error.errors()[0]["msg"]
        raise UserError(f"{path}, row {row + 2}{f', column {column[0]}' if column else ''}: {said}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no readable CSV: {' '.join(str(error).split())}") from None
    cells = {Cell(*(row[name] for name in ("task", "method", "rate", "seed"))): row for row in rows}
    if len(cells) < len(rows):
        raise UserError(f"{path} has a cell twice: remove one of the rows")
    return cells


def write_cells(path: Path, done: dict[Cell, dict], order: list[Cell]) -> None:
    """All finished cells, in the grid's order; those of a larger grid stay, at the end.

    All rates of a method and seed get the first selection cost that was measured: a resumed run pays a little again."""
    costs, rows = {}, []
    for cell in sorted(done, key=lambda cell: order.index(cell) if cell in order else len(order)):
        selection = {key: value for key, value in done[cell].items() if key.startswith("selection_")}
        done[cell] |= costs.setdefault((cell.run, cell.method), selection)
        texts = {k: " ".join(f"{x:g}" for x in v) for k, v in done[cell].items() if isinstance(v, list)}
        rows.append(done[cell] | texts)
    with atomic_path(path) as draft:
        pd.DataFrame(rows, columns=list(COLUMNS), dtype=object).to_csv(draft, index=False)


def markdown_table(heading: list[str], rows: list[list[str]], title: str = "") -> str:
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return f"### {title}\n\n" * bool(title) + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells_of(grid: Grid) -> list[Cell]:
    """Every cell of the grid; `full` has one a task and seed, at rate 1."""
    rates = {method: [1.0] if method == "full" else grid.rates for method in grid.methods}
    each = product(grid.seeds, grid.tasks, grid.methods)
    return [Cell(task, method, rate, seed) for seed, task, method in each for rate in rates[method]]


def stage_arguments(grid: Grid, runs: Path, cell: Cell) -> list[str]:
    """The stages' command line for the run folder of a cell."""
    task, values = grid.tasks[cell.task], {"output_dir": str(runs / cell.run)}
    if cell.method in ("cleaned", "rs2_cleaned"):
        task_of = load(stage_arguments(grid, runs, replace(cell, method="random")))
        values |= {"selection.methods": [cell.rule], "small_model": task_of.target_model}
    elif cell.method in VARIANTS:
        values |= {"selection.methods": [cell.rule], "selection.mode": "extended"}
        if cell.lender != cell:
            values["speculative_run"] = str(runs / cell.lender.run)
    else:  # the small model's scores are also those of the variants
        read = {"staff_nearest": "clusters", "staff_ifd": "ifd"}
        methods = [read.get(method, method) for method in grid.methods]
        values["selection.methods"] = [each for each in get_args(Method) if each in methods] or ["random"]
    variant = VARIANTS.get(cell.method, "").split()
    values |= {"selection.rates": grid.rates, "selection.seed": cell.seed, "training.seed": cell.seed}
    changes = [*task.set, *variant, *(f"{key}={json.dumps(value)}" for key, value in values.items())]
    config = str((REPOSITORY / task.config).resolve())
    return ["--config_path", config, *(part for change in changes for part in ("--set", change))]


def load(arguments: list[str]) -> Experiment:
    return load_experiment(arguments[1], arguments[3::2])


def settings_digest(experiment: Experiment, fingerprint: str, models: Iterable[str]) -> str:
    """16 hex digits of what a task's figures depend on. Args: fingerprints of training split and of both models."""
    no_matter = {"output_dir": True, "speculative_run": True, "evaluation": {"batch_size"}}
    of_a_cell = {"training": {"seed", "report_to", "run_name"}}
    of_a_cell |= {"selection": {"methods", "rates", "seed", "self_test", "tokens_per_batch"}}
    settings = experiment.model_dump(exclude=no_matter | of_a_cell)
    later = {"speculation": "published"} | LATER  # keys that came later count where they are given
    data = {"eval_data": None, "split": "llama_factory", "skip_bad_rows": False}
    evaluation = {"generate": True, "engine": "llama_factory"}
    each = (settings, data), (settings["selection"], later), (settings["evaluation"], evaluation)
    for values, published in each:
        for key in [key for key, value in published.items() if values[key] == value]:
            del values[key]
    settings = json.dumps(settings, sort_keys=True)
    formats = [choose_precision(asked) for asked in (experiment.precision, experiment.selection.precision)]
    texts = [settings, *formats, str(SCORER_VERSION), str(RULES_VERSION), fingerprint, *models]
    return digest(*(text.encode() for text in texts))[:16]


@dataclass(frozen=True)
class Job:
    """Commands that run one after the other in one process; `cell` is finished with it."""

    name: str
    commands: list[list[str]]
    needs: str | None = None  # name of the job that must be done before
    cell: Cell | None = None


def jobs_of(cells: list[Cell], arguments: list[str], lender: list[str], after: str | None = None) -> list[Job]:
    """The jobs that make `cells` of one run folder: selection by the small model's scores, a variant's by those of the
    run that `lender`'s arguments name, once the job `after` is done; the target tuned on everything, and the baselines'
    selection by its scores; each coreset's tuning and evaluation."""
    methods, run, experiment = {cell.rule for cell in cells}, cells[0].run, load(arguments)
    unscored, small = methods & {*NO_SCORES, "oracle"}, methods & {"staff", *SMALL_RULES}
    target = methods - {"full", "length"} - unscored - small
    (target if target and not small else small).update(methods & {"length"})
    full = next((cell for cell in cells if cell.method == "full"), None)

    def stage(script: str, *more: str) -> list[str]:
        return [script, *arguments, *more]

    look = [stage("scripts/check_pool.py")] if experiment.selection.leave_out == "suspects" else []
    jobs = []
    if unscored:
        rules = sorted(unscored - {"oracle"})
        commands = look + [stage("selection/coreset.py", "--method", *rules)] * bool(rules)
        commands += [stage("scripts/paper/oracle.py")] if "oracle" in unscored else []
        jobs.append(Job(f"{run} unscored", commands))
    if small:
        own = [] if experiment.direct else look  # else effort_score.py looks, by the scores that it has
        commands = own + [[script, *lender] for script in ("finetune/finetune.py", "selection/effort_score.py")]
        commands += [stage("selection/verify.py")] if "staff" in small else []
        commands.append(stage("selection/coreset.py", "--method", *sorted(small)))
        jobs.append(Job(f"{run} small", commands, after))
    if target or full:
        commands = [*(look if target else []), stage("finetune/finetune.py", "--model", "target")]
        if target:
            commands.append(stage("selection/effort_score.py", "--model", "target"))
            commands.append(stage("selection/coreset.py", "--method", *sorted(target)))
        commands += [stage("finetune/eval.py", "--tuned", "full")] if full else []
        jobs.append(Job(f"{run} target", commands, cell=full))
    for cell in cells:
        if cell.method != "full":
            path = experiment.coresets / f"{cell.tuned}.json"
            select = stage("finetune/finetune-select.py", "--select_path", str(path))
            needs = "unscored" if cell.rule in unscored else "small" if cell.rule in small else "target"
            commands = [select, stage("finetune/eval.py", "--tuned", cell.tuned)]
            jobs.append(Job(str(cell), commands, f"{run} {needs}", cell))
    return jobs


def run_jobs(jobs: list[Job], parallel: int, log_folder: Path, finished: Callable[[Job], None]) -> None:
    """Run jobs, `parallel` at a time, in as many processes that import everything once and see one GPU.

    `finished` is called after each. Raises: UserError with what a failed job said, after those that run have ended."""
    if parallel < 1:
        raise UserError(f"--jobs {parallel}: at least one at a time")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // parallel)))
    log_folder.mkdir(parents=True, exist_ok=True)
    waiting, running, failures, idle, gpus = list(jobs), {}, [], [], visible_gpus()
    with contextlib.ExitStack() as stack:
        for worker in range(min(parallel, len(jobs))):
            pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent)
            idle.append(stack.enter_context(pool))
            with patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)]} if gpus else {}):
                pool.submit(int)  # starts the process: a library may ask for GPUs while it is imported
        while running or (waiting and not failures):
            unfinished = {job.name for job in [*waiting, *(job for job, _ in running.values())]}
            ready = [job for job in waiting if job.needs not in unfinished and not failures]
            for job in ready[: len(idle)]:
                waiting.remove(job)
                log, pool = log_folder / f"{job.name.replace(' ', '-')}.log", idle.pop()
                running[pool.submit(run_commands, job.commands, log)] = job, pool
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, pool = running.pop(future)
                idle.append(pool)
                try:
                    future.result()
                    finished(job)
                except BrokenProcessPool:
                    failures.append(f"{job.name}: a process was killed, perhaps for want of memory: give fewer --jobs")
                except UserError as error:
                    failures.append(f"{job.name}: {error}")
    if failures:
        raise UserError(failures[0])


def run_commands(commands: list[list[str]], log: Path) -> None:
    """Run stage scripts in this process, with their output in `log`. Raises: UserError with what one said."""
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for script, *arguments in commands:
        sys.argv = [script, *arguments]
        print("$", *sys.argv, flush=True)
        try:
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        except SystemExit as stop:
            if stop.code:  # the stage has said why in its last line
                sys.stderr.flush()
                said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-1]
                raise UserError(f"{said.removeprefix('error: ')} (log: {log})") from None
        except Exception as error:  # a stage's own bug, or a device out of memory: in full in the log
            traceback.print_exc()
            raise UserError(f"{script}: {type(error).__name__}: {error} (log: {log})") from None
        finally:
            sys.stdout.flush()


def finished_cell(cell: Cell, grid: Grid, experiment: Experiment, about: dict, sizes: tuple[int, int]) -> dict:
    """A cell's row, from its run folder. `about`: more columns. `sizes`: parameters of small model and target."""
    metrics, costs = read_metrics(experiment.folder / "eval" / cell.tuned), ledger.read_ledger(experiment.folder)
    tuned = [cost for cost in costs if (cost.stage, cost.what) == (ledger.TARGET_TUNING, cell.tuned)]
    if "by_sample" not in metrics or not tuned:
        raise UserError(f"{experiment.folder} lacks the scores by sample or the tuning cost of {cell.tuned}: remove it")
    scores = metrics | {f"{metric}_by_sample": values for metric, values in metrics["by_sample"].items()}
    row = {name.replace("-", "_"): value for name, value in scores.items()} | vars(cell) | about
    selection = [] if cell.method in ("full", "oracle") else ledger.selection_costs(experiment, cell.rule, shared=False)
    for kind, costs in (("selection", selection), ("tuning", tuned[-1:])):
        row[f"{kind}_seconds"] = round(sum(cost.seconds for cost in costs), 2)
        row[f"{kind}_tokens"] = round(sum(cost.tokens for cost in costs))
        row[f"{kind}_flops"] = f"{sum(stage_flops(cost, experiment, sizes) for cost in costs):.4g}"
    row |= {name: getattr(tuned[-1], name) for name in ("peak_memory_gb", "device", "precision")}
    row |= {"target": Path(experiment.target_model).name, "mode": experiment.selection.mode}
    row |= {"size": tuned[-1].samples, "eval_rows": metrics["samples"], "commit": metrics["code_version"]}
    row |= {name: getattr(grid.tasks[cell.task], name) or "" for name in ("paper_target", "paper_task")}
    return _ROWS.validate_python([dict.fromkeys(_FIGURES, "") | row])[0]


def stage_flops(cost: ledger.Cost, experiment: Experiment, sizes: tuple[int, int]) -> float:
    """FLOPs of a stage; `sizes` as in `finished_cell`."""
    if cost.stage == ledger.CUTTING:
        return ledger.forward_flops(cost.parameters, cost.tokens)
    if cost.stage not in (ledger.SPECULATIVE_TUNING, ledger.TARGET_TUNING):
        scoring = ledger.scoring_flops(cost.parameters, cost.tokens, experiment.selection.phi)
        return scoring + ledger.forward_flops(cost.parameters, cost.more_tokens)
    small = cost.stage == ledger.SPECULATIVE_TUNING
    keys = experiment.training | (experiment.speculative_training if small else experiment.target_training)
    lora = keys.get("finetuning_type", "lora") == "lora"
    checkpointing = not keys.get("disable_gradient_checkpointing", False)
    return ledger.tuning_flops(sizes[0] if small else sizes[1], cost.tokens, lora, checkpointing)
