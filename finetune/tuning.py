"""Tune a model on a data set of the run folder, once: a finished result is reused, another is refused."""

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

from finetune import trainer
from selection.rows.llama_factory import environment
from selection.rows.split import rows_of, write_dataset
from selection.rows.tokens import tokenised_rows
from selection.run.cli import add_dry_run_argument, load_experiment_from_arguments
from selection.run.config import Experiment
from selection.run.device import choose_precision, device_name
from selection.run.errors import UserError
from selection.run.ledger import TARGET_TUNING, Cost, measured
from selection.run.log import say
from selection.run.processes import processes
from selection.run.products import building_together, check_same_everywhere, reuse
from selection.scores.identity import KEYS_OF_ITS_OWN, tuning_identity, write_experiment


def parse_arguments(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Experiment, dict[str, Any]]:
    """A tuning script's arguments, its experiment, and `report` for `tune_once`."""
    add_dry_run_argument(parser)
    parser.add_argument("--project", help="log to this Weights & Biases project (needs wandb); default: no logging")
    parser.add_argument("--name", help="name of the Weights & Biases run; default: one that wandb makes up")
    experiment, arguments = load_experiment_from_arguments(parser)
    if arguments.project is None and arguments.name is None:
        return arguments, experiment, {}
    os.environ |= {"WANDB_PROJECT": arguments.project} if arguments.project else {}
    return arguments, experiment, {"report_to": "wandb"} | ({"run_name": arguments.name} if arguments.name else {})


def tune_once(
    experiment: Experiment,
    model: str,
    dataset: str,
    rows: "datasets.Dataset",  # noqa: F821
    folder: Path,
    keys: dict[str, Any],
    stage: str,
    report: dict[str, Any],
    dry_run: bool = False,
    keys_of_coreset: dict[str, Any] | None = None,
    of_run: Experiment | None = None,
) -> None:
    """Tune `model` on `rows`, the data set `dataset` of the run folder, into `folder`, which appears when all is done.

    `keys` are LLaMA-Factory's, `report` those that do not change the tuned model, as logging, `keys_of_coreset` go
    before `keys`; `of_run` is the run's configuration where `experiment` has keys for this one tuning. Under torchrun
    the processes share each optimiser step's samples. Raises: UserError where `folder`
    was made otherwise, or tuning cannot be done."""
    together, precision = processes(), choose_precision(experiment.precision)
    with together.leader_first():
        keys = keys | (keys_of_coreset or {})
        identity = tuning_identity(experiment, model, rows, keys)
        identity |= {"keys_of_coreset": keys_of_coreset} if keys_of_coreset else {}
        identity |= {KEYS_OF_ITS_OWN: True} if of_run else {}
    check_same_everywhere(identity)
    todo = {} if dataset == "train" else {"todo": "remove it, or give another name: finetune-select.py --as NAME"}
    if together.from_leader(lambda: reuse(folder, identity, **todo)):
        (print if dry_run else say)(f"{stage}: reusing {folder}")
        if not dry_run:
            write_experiment(of_run or experiment)
        return
    report = report | {"report_to": _logs_to(experiment.training | keys, report)}
    shares = share_of_batch(experiment.training | keys, together.count)
    if dry_run:
        print(f"{stage}: would tune {model} on {dataset} ({len(rows)} rows) -> {folder}")
        return
    what = folder.name if stage == TARGET_TUNING else model
    cost = Cost(stage, what, len(rows), device=device_name(), precision=precision, processes=together.count)
    # Loggers write into the run folder, outside what is tuned (its files carry checksums), or as the user says.
    tensorboard = experiment.folder / "tensorboard" / folder.relative_to(experiment.folder)
    logs = {"WANDB_DIR": experiment.folder, "TENSORBOARD_LOGGING_DIR": tensorboard}
    logs = {name: os.environ.get(name, str(path)) for name, path in logs.items()}
    with environment(logs), building_together(folder, identity) as draft:
        if together.leads:
            if dataset != "train":  # every stage has that
                say(f"{dataset}: {len(rows)} rows -> {write_dataset(experiment, dataset, rows)}")
            # Find what is wrong with the rows, the held-out ones too, before anything costs.
            tokenised_rows(experiment, model, dataset, rows)
            tokenised_rows(experiment, model, "eval", rows_of(experiment, "eval"))
            write_experiment(of_run or experiment)
        together.wait()
        with measured(experiment.folder, cost):
            metrics = trainer.tune(experiment, model, dataset, draft, precision, keys | shares | report)
            cost.tokens = metrics["tokens"]
    print(f"{stage}: {model} on {dataset} ({len(rows)} rows), training loss {metrics['train_loss']:.4f} -> {folder}")


def _logs_to(keys: dict[str, Any], report: dict[str, Any]) -> list[str]:
    """`report_to` of the YAML and of the command line together. Raises: UserError where one is not installed."""
    said = [keys.get("report_to") or "none", report.get("report_to", "none")]
    names = [name for each in said for name in ([each] if isinstance(each, str) else each) if name != "none"]
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or importlib.util.find_spec(name) is None:
            raise UserError(f"report_to {name}: not installed: pip install {name}, or remove it")
    return list(dict.fromkeys(names)) or ["none"]


def share_of_batch(keys: dict[str, Any], processes: int) -> dict[str, int]:
    """Each process's share of an optimiser step as LLaMA-Factory's keys: alone it gives every process a whole step.

    Raises: UserError where the samples of a step cannot be shared out evenly."""
    if processes == 1:
        return {}
    size = keys.get("per_device_train_batch_size", 8)
    samples = size * keys.get("gradient_accumulation_steps", 1)
    if samples % processes:
        step = f"the {samples} samples of a step (per_device_train_batch_size x gradient_accumulation_steps)"
        raise UserError(f"{processes} processes cannot share {step}: give NPROC=1 or another number")
    share = samples // processes
    at_once = max(n for n in range(1, min(size, share) + 1) if share % n == 0)
    return {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": share // at_once}
