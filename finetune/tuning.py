"""Tune a model on a data set of the run folder, once: a finished result is reused, another is refused."""

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

from finetune import llama_factory
from finetune.data_split import row_id, rows_of, write_dataset
from selection.config import Experiment
from selection.device import choose_precision, device_name
from selection.errors import UserError
from selection.files import building_together, check_same_everywhere, digest, made_from, model_fingerprint, reuse
from selection.ledger import TARGET_TUNING, Cost, measured
from selection.log import say
from selection.processes import processes


def tune_once(
    experiment: Experiment,
    model: str,
    dataset: str,
    rows: "datasets.Dataset",  # noqa: F821
    folder: Path,
    keys: dict[str, Any],
    stage: str,
    report: dict[str, Any],
) -> None:
    """Tune `model` on `rows`, the data set `dataset` of the run folder, into `folder`.

    `keys` are LLaMA-Factory's, `report` those that only add logging. The folder appears when training is done, never
    before: nothing can be taken for finished, or resumed, that is not. Under torchrun the processes share each
    optimiser step's samples. (The last step of a pass, where it is not full, accelerate fills up with samples from the
    pass' start, so that every process has some.)
    """
    together, precision = processes(), choose_precision(experiment.precision)
    identity = tuning_identity(experiment, model, rows, keys)
    check_same_everywhere(identity)
    if together.from_leader(lambda: reuse(folder, identity)):
        say(f"{stage}: reusing {folder}")
        return
    shares = share_of_batch(experiment.training | keys, together.count)
    what = folder.name if stage == TARGET_TUNING else model
    if report:
        os.environ.setdefault("WANDB_DIR", str(experiment.folder))  # else it writes into the working directory
    with building_together(folder, identity) as draft:
        if together.leads:
            if dataset != "train":  # which stands there, for all stages
                say(f"{dataset}: {len(rows)} rows -> {write_dataset(experiment, dataset, rows)}")
            # What can be wrong with the rows is found before anything costs, with the held-out ones too.
            llama_factory.tokenised_rows(experiment, model, dataset, rows)
            llama_factory.tokenised_rows(experiment, model, "eval", rows_of(experiment, "eval"))
        together.wait()
        cost = Cost(stage, what, len(rows), device=device_name(), precision=precision, processes=together.count)
        with measured(experiment.folder, cost):
            metrics = llama_factory.tune(experiment, model, dataset, draft, precision, keys | shares | report)
            cost.tokens = metrics["tokens"]
    print(f"{stage}: {model} on {dataset} ({len(rows)} rows), training loss {metrics['train_loss']:.4f} -> {folder}")


def tuning_identity(experiment: Experiment, model: str, rows: "datasets.Dataset", keys: dict) -> dict[str, Any]:  # noqa: F821
    """All that a tuned model depends on."""
    return {
        "model": model_fingerprint(llama_factory.model_path(model)),
        "rows": digest(*(row_id(row).encode() for row in rows)),
        "dataset_format": experiment.dataset_format.entry,
        "template": experiment.template,
        "cutoff_len": experiment.cutoff_len,
        "precision": choose_precision(experiment.precision),
        "keys": experiment.training | keys,
    }


def share_of_batch(keys: dict[str, Any], processes: int) -> dict[str, int]:
    """What each of several processes takes of an optimiser step, as LLaMA-Factory's keys; none for one process.

    A step has per_device_train_batch_size x gradient_accumulation_steps samples, as for one process. (LLaMA-Factory
    alone would give each process as many: fewer and larger steps on more GPUs.) Raises: UserError where they cannot
    be shared out evenly.
    """
    if processes == 1:
        return {}
    size = keys.get("per_device_train_batch_size", 8)
    samples = size * keys.get("gradient_accumulation_steps", 1)
    if samples % processes:
        raise UserError(
            f"{processes} processes cannot share the {samples} samples of a step (training: "
            "per_device_train_batch_size x gradient_accumulation_steps): give NPROC=1 or another number"
        )
    share = samples // processes
    at_once = max(n for n in range(1, min(size, share) + 1) if share % n == 0)
    return {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": share // at_once}


def check_base(tuned: Path, model: str) -> None:
    """Raises: UserError where `tuned` was not made from `model` as it is now."""
    if made_from(tuned).get("model") != model_fingerprint(llama_factory.model_path(model)):
        raise UserError(f"{tuned} was tuned from another model than {model}: remove it or give another output_dir")
    adapter = (tuned / "adapter_config.json").exists()
    llama_factory.check_weights(tuned, "adapter_model" if adapter else "model")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--project", help="log to this Weights & Biases project (needs wandb); default: no logging")
    parser.add_argument("--name", help="name of the Weights & Biases run; default: one that wandb makes up")


def report_keys(arguments: argparse.Namespace) -> dict[str, Any]:
    """LLaMA-Factory's keys for `--project` and `--name`. Raises: UserError where wandb is not installed."""
    if arguments.project is None and arguments.name is None:
        return {}
    if importlib.util.find_spec("wandb") is None:
        raise UserError("--project and --name log to Weights & Biases, which is not installed: pip install wandb")
    if arguments.project:
        os.environ["WANDB_PROJECT"] = arguments.project
    return {"report_to": "wandb"} | ({"run_name": arguments.name} if arguments.name else {})
