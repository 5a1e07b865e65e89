"""Tune a model on a data set of the run folder, once: a finished result is reused, another is refused."""

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

from finetune import llama_factory
from finetune.data_split import row_id, write_dataset
from selection.config import Experiment
from selection.device import choose_precision, device_name
from selection.errors import UserError
from selection.files import building, digest, model_fingerprint, read_json, read_record, reuse
from selection.ledger import TARGET_TUNING, Cost, measured


def tune_once(
    experiment: Experiment,
    model: str,
    dataset: str,
    rows: list[dict],
    folder: Path,
    keys: dict[str, Any],
    stage: str,
    report: dict[str, Any],
) -> None:
    """Tune `model` on `rows`, the data set `dataset` of the run folder, into `folder`.

    `keys` are LLaMA-Factory's, `report` those that only add logging. The folder appears when training is done, never
    before: nothing can be taken for finished, or resumed, that is not.
    """
    precision = choose_precision(experiment.precision)
    identity = {
        "model": model_fingerprint(llama_factory.model_path(model)),
        "rows": digest(*(row_id(row).encode() for row in rows)),
        "dataset_format": experiment.dataset_format.entry,
        "template": experiment.template,
        "cutoff_len": experiment.cutoff_len,
        "precision": precision,
        "keys": experiment.training | keys,
    }
    if reuse(folder, identity):
        print(f"{stage}: reusing {folder}")
        return
    print(f"{dataset}: {len(rows)} rows -> {write_dataset(experiment, dataset, rows)}")
    # What can be wrong with the rows is found before anything costs, with the held-out ones too.
    llama_factory.tokenised_rows(experiment, model, dataset, rows)
    llama_factory.tokenised_rows(experiment, model, "eval", read_json(experiment.data_folder / "eval.json"))
    what = folder.name if stage == TARGET_TUNING else model
    if report:
        os.environ.setdefault("WANDB_DIR", str(experiment.folder))  # else it writes into the working directory
    with building(folder, identity) as draft:
        cost = Cost(stage, what, samples=len(rows), device=device_name(), precision=precision)
        with measured(experiment.folder, cost):
            metrics = llama_factory.tune(experiment, model, dataset, draft, precision, keys | report)
            cost.tokens = metrics["tokens"]
    print(f"{stage}: {model} on {dataset} ({len(rows)} rows), training loss {metrics['train_loss']:.4f} -> {folder}")


def check_base(tuned: Path, model: str) -> None:
    """Raises: UserError where `tuned` was not made from `model` as it is now."""
    record = read_record(tuned / "made_from.json")
    if record.get("model") != model_fingerprint(llama_factory.model_path(model)):
        raise UserError(f"{tuned} was tuned from another model than {model}: remove it or give another output_dir")
    adapter = (tuned / "adapter_config.json").exists()
    llama_factory.check_weights(tuned, "adapter_model" if adapter else "model")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--project", help="log to this Weights & Biases project (needs wandb)")
    parser.add_argument("--name", help="name of the Weights & Biases run")


def report_keys(arguments: argparse.Namespace) -> dict[str, Any]:
    """LLaMA-Factory's keys for `--project` and `--name`. Raises: UserError where wandb is not installed."""
    if arguments.project is None and arguments.name is None:
        return {}
    if importlib.util.find_spec("wandb") is None:
        raise UserError("--project and --name log to Weights & Biases, which is not installed: pip install wandb")
    if arguments.project:
        os.environ["WANDB_PROJECT"] = arguments.project
    return {"report_to": "wandb"} | ({"run_name": arguments.name} if arguments.name else {})
