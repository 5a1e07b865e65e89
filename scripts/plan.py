"""Before a run: what will each of its stages cost on this device, and does selection pay?

    python scripts/plan.py --config_path configs/demo.yaml --reuses 3

Needs the models and the data that the YAML names. Makes the split in a temporary folder, tokenises it, measures for
some seconds how fast small and target model are scored and tuned here, and multiplies. Prints a table; writes nothing
into the run folder. Times are those of this device, as busy as it is now; measure again before you trust ten per cent.
"""

import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from selection.run.ending import end_on_signals

end_on_signals()

import itertools
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from selection.method.effort import IGNORED_LABEL, EffortScorer, plan_batches, tokens_per_batch
from selection.method.staff import coreset_size, floor_share
from selection.rows.tokens import check_embeddings, tokenised_rows
from selection.run.cli import add_experiment_arguments, argument_parser, run_stage
from selection.run.config import Experiment, load_experiment
from selection.run.device import choose_precision, device, out_of_memory
from selection.run.errors import UserError
from selection.run.flops import scoring_flops, tuning_flops
from selection.run.ledger import SPECULATIVE_SCORES, SPECULATIVE_TUNING, TARGET_TUNING, VERIFICATION
from selection.run.log import say
from selection.run.model_folder import model_path
from selection.scores.identity import tuning_lora
from selection.scores.models import (
    NO_CODE,
    load_for_scoring,
    model_errors,
    parameters_of,
    straight_to_device,
    with_fresh_lora,
)

_PAD_TO_MULTIPLE_OF = 8  # tuning's batches, as LLaMA-Factory pads them
_ATTENTION = {"disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"}  # of LLaMA-Factory's flash_attn


@dataclass(frozen=True)
class Speed:
    """Of one model on this device, in seconds for each token of the data; padding is in the seconds."""

    parameters: int
    scoring: float
    tuning: float


@dataclass(frozen=True)
class Stage:
    name: str
    rows: int
    tokens: int  # without padding, over all epochs
    flops: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Left out: the split, evaluation (the same whatever is chosen), and cutting a speculator out of the target."""

    selection: list[Stage]
    coresets: dict[float, Stage]  # by rate: tuning the target on it
    full: Stage  # tuning the target on everything
    baseline_scores: Stage  # GraNd's and the like: all rows on the target that was tuned on everything

    @property
    def selection_seconds(self) -> float:
        return sum(stage.seconds for stage in self.selection)


def make_plan(experiment: Experiment, lengths: dict[str, Sequence[int]], speeds: dict[str, Speed]) -> Plan:
    """The costs of every stage. `lengths` and `speeds` by "small" and "target": tokens of each row of the training
    split, and what a token costs.

    Verification's rows are an upper bound (strata may be empty or small); its tokens, and a coreset's, are the mean
    row's, as those of rows drawn at random are.
    """
    settings = experiment.selection
    num_rows = len(lengths["target"])
    keys = {name: tuning_keys(experiment, name) for name in ("small", "target")}

    def tuning(name: str, model: str, rows: int) -> Stage:
        speed, epochs = speeds[model], keys[model].get("num_train_epochs", 3)
        tokens = round(sum(lengths[model]) * rows / num_rows * epochs)
        checkpointing = not keys[model].get("disable_gradient_checkpointing", False)
        flops = tuning_flops(speed.parameters, tokens, _is_lora(keys[model]), checkpointing)
        return Stage(name, rows, tokens, flops, tokens * speed.tuning)

    def scoring(name: str, model: str, rows: int) -> Stage:
        speed, tokens = speeds[model], round(sum(lengths[model]) * rows / num_rows)
        flops = scoring_flops(speed.parameters, tokens, settings.phi)
        return Stage(name, rows, tokens, flops, tokens * speed.scoring)

    drawn = num_rows
    if not settings.verify_all:
        kept = num_rows - floor_share(settings.hardest_cutoff, num_rows)
        drawn = min(kept, settings.num_strata * settings.verify_per_stratum)
    speculative = [tuning(SPECULATIVE_TUNING, "small", num_rows), scoring(SPECULATIVE_SCORES, "small", num_rows)]
    if experiment.borrows:  # of speculative_run, which has paid
        speculative = []
    return Plan(
        selection=[*speculative, scoring(VERIFICATION, "target", drawn)],
        coresets={
            rate: tuning(f"{TARGET_TUNING} at rate {rate:g}", "target", coreset_size(rate, num_rows))
            for rate in settings.rates
        },
        full=tuning(f"{TARGET_TUNING} on everything", "target", num_rows),
        baseline_scores=scoring("scores of all rows on the target", "target", num_rows),
    )


def check(experiment: Experiment, num_rows: int) -> None:
    """Raises: UserError for what `make_plan` would refuse, before anything is measured."""
    for rate in experiment.selection.rates:
        coreset_size(rate, num_rows)
    for model in ("small", "target"):
        tuning_keys(experiment, model)


def tuning_keys(experiment: Experiment, model: str) -> dict[str, Any]:
    """LLaMA-Factory's keys for tuning "small" or "target".

    Raises: UserError for keys under which the costs are not those of epochs of LoRA or full tuning.
    """
    keys = experiment.training | (experiment.small_training if model == "small" else experiment.target_training)
    if keys.get("max_steps", -1) > 0:
        raise UserError("training key max_steps makes a run equally long on any coreset: nothing to plan; remove it")
    if keys.get("finetuning_type", "lora") not in ("lora", "full"):
        raise UserError(f"finetuning_type {keys['finetuning_type']}: costs are known for lora and full only")
    return keys


def _is_lora(keys: dict[str, Any]) -> bool:
    return keys.get("finetuning_type", "lora") == "lora"


def format_plan(plan: Plan, reuses: int) -> str:
    selection, full, scores = plan.selection, plan.full, plan.baseline_scores
    lines = [f"{'stage':<44}{'rows':>9}{'tokens':>14}{'FLOPs':>11}{'time':>12}"]
    lines += [*map(_line, selection), _line(_sum("selection in all", selection))]
    lines += [*map(_line, plan.coresets.values()), _line(full)]
    lines.append(_line(_sum("GraNd's selection: that and scores of all", [full, scores])))
    lines.append(f"\nselection-to-tuning ratio where one selection serves {reuses} tuning run{'s' * (reuses > 1)}:")
    lines += [
        verdict(rate, plan.selection_seconds, coreset.seconds, full.seconds, reuses)
        for rate, coreset in plan.coresets.items()
    ]
    return "\n".join(lines)


def not_in_the_times(experiment: Experiment) -> str | None:
    """What the experiment asks for that `calibrate` does not measure, in one line; None where there is nothing."""
    settings, processes = experiment.selection, os.environ.get("NPROC") or torch.cuda.device_count()
    named = [f"{processes} processes"] if int(processes) > 1 else []
    named += [key for key in ("device_map", "quantization_bit") if getattr(settings, key)]
    if not named:
        return None
    return f"times are of one process on one device in full precision: without {', '.join(named)}"


def _sum(name: str, stages: list[Stage]) -> Stage:
    tokens, flops = sum(stage.tokens for stage in stages), sum(stage.flops for stage in stages)
    return Stage(name, max(stage.rows for stage in stages), tokens, flops, sum(stage.seconds for stage in stages))


def _line(stage: Stage) -> str:
    return f"{stage.name:<44}{stage.rows:>9,}{stage.tokens:>14,}{stage.flops:>11.2e}{_duration(stage.seconds):>12}"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def selection_to_tuning(selection: float, coreset: float, full: float, reuses: int) -> float:
    """Selection-to-tuning ratio: (selection / reuses + tuning on the coreset) / tuning on everything, in seconds."""
    return (selection / reuses + coreset) / full


def verdict(rate: float, selection: float, coreset: float, full: float, reuses: int) -> str:
    """Whether selection pays at a rate: whether a `reuses`-th of it and tuning on the coreset take less time than
    tuning on everything. Args: seconds of all selection, tuning on the coreset, tuning on everything."""
    ratio = selection_to_tuning(selection, coreset, full, reuses)
    said = f"{ratio:.2f} of the time of tuning on everything (random selection: {coreset / full:.2f})"
    if ratio < 1:
        return f"at rate {rate:g} selection pays: {said}"
    return f"at rate {rate:g} selection does not pay: {said}; {_when_it_would(selection, coreset, full)}"


def _when_it_would(selection: float, coreset: float, full: float) -> str:
    if coreset >= full:
        return "no re-use would change that"
    return f"it would from {reuses_to_pay(selection, coreset, full)} re-uses on"


def reuses_to_pay(selection: float, coreset: float, full: float) -> int:
    """The fewest tuning runs n that must share a selection: the least n with selection / n + coreset < full."""
    n = max(1, int(selection / (full - coreset)))
    return n if selection / n + coreset < full else n + 1


# Calibration


Batches = list[list[int]]  # row numbers
Step = Callable[[dict[str, list]], object]  # computes one batch of samples: input_ids, labels


def calibrate(experiment: Experiment, tokenised: dict[str, Dataset], seconds: float) -> dict[str, Speed]:
    """Speeds of both models on this device, on real rows in the batches of scoring and of tuning.

    `tokenised`: the training split by "small" and "target", as LLaMA-Factory tokenises it. The four measurements take
    `seconds` in all, beside the loading of the models, one batch each that does not count, and one at least that does.
    Raises: UserError where a model does not load or does not fit into the device's memory.
    """
    precisions = choose_precision(experiment.selection.precision), choose_precision(experiment.precision)
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if device().type == "cpu" and load > 1 + cores / 4:  # 1 may be our own
        say(f"the machine was busy in the last minute (load {load:.1f} on {cores} cores): times may come out too long")
    speeds = {}
    for name, rows in tokenised.items():
        model = experiment.small_model if name == "small" else experiment.target_model
        path, measured = model_path(model), []
        for what, prepare, precision in zip(("scoring", "tuning"), (_scoring, _tuning), precisions, strict=True):
            try:
                per_token = _seconds_per_token(*prepare(experiment, name, path, rows, precision), rows, seconds / 4)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                raise UserError(
                    f"{what} on {model} does not fit into the memory of this device: give smaller batches "
                    "(selection.tokens_per_batch, training.per_device_train_batch_size) or take another device"
                ) from None
            rows_per_second = len(rows) / sum(map(len, rows["input_ids"])) / per_token
            say(f"{what} on {model}: {1 / per_token:,.0f} tokens/s, {rows_per_second:.2f} rows/s")
            measured.append(per_token)
        speeds[name] = Speed(parameters_of(path), *measured)
    return speeds


def _seconds_per_token(step: Step, batches: Batches, multiple: int, rows: Dataset, seconds: float) -> float:
    """Seconds for each token without padding: measured for padded tokens on some batches, after the first, which does
    not count; times the padding of all batches."""
    lengths = [len(ids) for ids in rows["input_ids"]]

    def padded(batch: list[int]) -> int:
        return len(batch) * _rounded_up(max(lengths[row] for row in batch), multiple)

    step(rows[batches[0]])
    _synchronise()
    order = random.Random(0).sample(batches[1:], len(batches) - 1) or batches
    started, tokens = time.perf_counter(), 0
    for batch in itertools.cycle(order):
        step(rows[batch])
        _synchronise()
        tokens += padded(batch)
        if (elapsed := time.perf_counter() - started) >= seconds:
            break
    return elapsed / tokens * sum(map(padded, batches)) / sum(lengths)


def _synchronise() -> None:
    """A GPU answers before it has computed."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _scoring(experiment: Experiment, name: str, path: str, rows: Dataset, precision: str) -> tuple[Step, Batches, int]:
    """Scoring as the stages do it, and its batches. The small model carries a LoRA, as its tuning leaves one."""
    settings, keys = experiment.selection, tuning_keys(experiment, name)
    model = load_for_scoring(path, None, precision)
    if settings.phi == "all_lora" or (name == "small" and _is_lora(keys) and experiment.tuned_small):
        model = with_fresh_lora(model, **tuning_lora(keys), seed=settings.seed)
    check_embeddings(experiment, experiment.small_model if name == "small" else experiment.target_model, model, rows)
    scorer = EffortScorer(model, settings.phi, settings.phi_rank, settings.phi_alpha, settings.seed, settings.columns)
    budget = settings.tokens_per_batch or tokens_per_batch(settings.phi, scorer.device)
    batches = plan_batches(range(len(rows)), [len(ids) for ids in rows["input_ids"]], budget)
    return lambda batch: scorer.score(batch["input_ids"], batch["labels"]), batches, 1


def _tuning(experiment: Experiment, name: str, path: str, rows: Dataset, precision: str) -> tuple[Step, Batches, int]:
    """Forward pass, backward pass and optimiser's step as in LLaMA-Factory's trainer, and batches drawn as there."""
    keys = tuning_keys(experiment, name)
    model = load_for_tuning(path, keys, experiment.selection.seed)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    number_format = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def step(batch: dict[str, list]) -> None:
        with torch.autocast(model.device.type, dtype=number_format, enabled=number_format is not None):
            loss = model(**padded_batch(batch, model.device)).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    size = keys.get("per_device_train_batch_size", 1)
    order = random.Random(0).sample(range(len(rows)), len(rows))
    return step, [order[i : i + size] for i in range(0, len(order), size)], _PAD_TO_MULTIPLE_OF


def load_for_tuning(path: str, keys: dict[str, Any], seed: int) -> nn.Module:
    """A model as LLaMA-Factory tunes it under `keys`: weights as the checkpoint stores them, what is trained in fp32,
    attention by `flash_attn`, gradient checkpointing unless it is disabled."""
    attention = _ATTENTION.get(keys.get("flash_attn", "auto"))
    with model_errors(f"cannot load model {path} for tuning"):
        if attention is None and getattr(AutoConfig.from_pretrained(path, **NO_CODE), "attn_logit_softcapping", None):
            attention = "eager"
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", attn_implementation=attention, **NO_CODE, **straight_to_device()
        )
    model.config.use_cache = False
    if not keys.get("disable_gradient_checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    if _is_lora(keys):
        model = with_fresh_lora(model, **tuning_lora(keys), seed=seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or not _is_lora(keys))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


def padded_batch(batch: dict[str, list], to: torch.device) -> dict[str, torch.Tensor]:
    """Samples padded on the right to a multiple of 8: what a causal language model takes, (B, T) each."""
    ids, labels = batch["input_ids"], batch["labels"]
    length = _rounded_up(max(map(len, ids)), _PAD_TO_MULTIPLE_OF)

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], device=to)

    mask = padded([[1] * len(row) for row in ids], 0)
    return {"input_ids": padded(ids, 0), "attention_mask": mask, "labels": padded(labels, IGNORED_LABEL)}


def main() -> None:
    parser = argument_parser(__doc__)
    add_experiment_arguments(parser)
    reuses_help = "tuning runs (other hyper-parameters, targets or rates) that share one selection; default: 1"
    parser.add_argument("--reuses", type=int, default=1, metavar="N", help=reuses_help)
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring in all, about; default: 10")
    arguments = parser.parse_args()
    if arguments.reuses < 1 or not 0 < arguments.seconds < float("inf"):
        raise UserError("--reuses and --seconds: give at least 1 run and more than 0 seconds")
    experiment = load_experiment(arguments.config_path, arguments.set)

    from selection.rows.split import training_split

    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        elsewhere = experiment.model_copy(update={"output_dir": folder})
        split = training_split(elsewhere)
        check(experiment, len(split.rows))
        models = {"small": experiment.small_model, "target": experiment.target_model}
        tokenised = {name: tokenised_rows(elsewhere, model, "train", split.rows) for name, model in models.items()}
        speeds = calibrate(experiment, tokenised, arguments.seconds)
        lengths = {name: [len(ids) for ids in rows["input_ids"]] for name, rows in tokenised.items()}
    print(format_plan(make_plan(experiment, lengths, speeds), arguments.reuses))
    if left_out := not_in_the_times(experiment):
        print(f"\n{left_out}")


if __name__ == "__main__":
    run_stage(main)
