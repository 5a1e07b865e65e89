"""Before a run: what will each of its stages cost on this device, and does selection pay?

    python scripts/plan.py --config_path configs/demo.yaml --reuses 3

Needs the models and the data that the YAML names. Splits and tokenises in a temporary folder; says by formula how much
memory each stage needs on a GPU, and what to change where the GPU that it sees has less; measures for some seconds how
fast both models are scored and tuned here, and multiplies. Prints tables. Times are those of one process on this
device, as busy as it is now: do not trust ten per cent.
"""

import contextlib
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

import torch
from datasets import Dataset

from selection.effort_score import small_columns
from selection.method.effort import IGNORED_LABEL, EffortScorer, plan_batches, tokens_per_batch
from selection.method.staff import coreset_size, floor_share
from selection.rows.llama_factory import common_arguments, import_llama_factory, quiet, user_errors
from selection.rows.split import speculative_rows, training_split
from selection.rows.tokens import check_embeddings, empty_turn, tokenised_rows
from selection.run import ledger
from selection.run.cli import add_experiment_arguments, argument_parser
from selection.run.config import Experiment, load_experiment, with_recommended
from selection.run.device import choose_precision, device, out_of_memory
from selection.run.errors import UserError, refusals
from selection.run.log import say
from selection.run.model_folder import model_path
from selection.scores.gpu_memory import Memory, Shape, scoring_memory, shape_of, tuning_memory
from selection.scores.identity import tuning_lora
from selection.scores.models import DTYPES, load_for_scoring, parameters_of, with_fresh_lora
from selection.scores.row_figures import TRIED

SELECTION, GRAND = "selection in all", "GraNd's selection: that and all scores"
FULL = f"{ledger.TARGET_TUNING} on everything"
SPECULATIONS = "published", "{share: 0.2, passes: 1}", "untuned", "direct"
WAYS = {f"speculation {kind}": ["selection.mode=extended", f"selection.speculation={kind}"] for kind in SPECULATIONS}
_MEANT = with_recommended({"mode": "recommended"})  # whatever the YAML has
WAYS["mode recommended"] = [f"selection.{key}={json.dumps(value)}" for key, value in _MEANT.items()]
# No worse than the published way where that was measured (data/results).
AS_GOOD = "speculation published", "speculation direct", "mode recommended"
SPREAD = "selection.device_map auto"
_PAD_TO_MULTIPLE_OF = 8  # tuning's batches, as LLaMA-Factory pads them


@dataclass(frozen=True)
class Speed:
    """One model on this device: seconds for each token of the data, with the time that padding takes."""

    parameters: int
    scoring: float
    tuning: float


class Need(NamedTuple):
    """A stage's memory on a GPU as a function of the tokens of a batch and of quantised bits, and what is planned."""

    memory: Callable[[int, int | None], Memory]
    tokens: int  # of a batch, with padding
    least: int  # of the longest row alone
    bits: int | None
    batch_key: str
    bits_key: str | None  # None: this stage has none
    elsewhere: str | None  # what holds weights that are too large for one GPU


class Stage(NamedTuple):
    rows: int
    tokens: int  # without padding, over all epochs
    flops: float
    seconds: float


def make_plan(
    experiment: Experiment, lengths: dict[str, Sequence[int]], speeds: dict[str, Speed]
) -> tuple[dict[str, Stage], dict[float, Stage]]:
    """The costs of every stage by name, in the order of the table; and of tuning on each coreset, by rate.

    Args: `lengths` (tokens of each row of the training split) and `speeds`, by "small" and "target"; lengths also of
    the "responses" behind an empty prompt, which a look at the rows reads.
    Without the split, evaluation and cutting a speculator. Verification's rows are an upper bound, as strata may be
    small; its tokens, and a coreset's, are those of mean rows. Raises: UserError where tuning cannot be planned
    (`tuning_keys`), and for a rate that keeps no row."""
    settings, num_rows = experiment.selection, len(lengths["target"])

    def stage(model: str, rows: int, tunes: bool = False) -> Stage:
        keys, speed = tuning_keys(experiment, model), speeds[model]
        tokens = round(sum(lengths[model]) * rows / num_rows * (keys["num_train_epochs"] if tunes else 1))
        if tunes:
            lora, checkpointing = keys["finetuning_type"] == "lora", not keys["disable_gradient_checkpointing"]
            flops = ledger.tuning_flops(speed.parameters, tokens, lora, checkpointing)
        else:
            flops = ledger.scoring_flops(speed.parameters, tokens, settings.phi)
        return Stage(rows, tokens, flops, tokens * (speed.tuning if tunes else speed.scoring))

    def total(*stages: Stage) -> Stage:
        rows, *figures = zip(Stage(0, 0, 0.0, 0.0), *stages, strict=True)
        return Stage(max(rows), *map(sum, figures))

    drawn, stages = num_rows, {}
    if not settings.verify_all:
        kept = num_rows - floor_share(settings.hardest_cutoff, num_rows)
        drawn = min(kept, settings.num_strata * settings.verify_per_stratum)
    if not experiment.borrows:  # else speculative_run has paid
        if experiment.tuned_small:
            tuned_on = len(speculative_rows(experiment, num_rows))
            stages[ledger.SPECULATIVE_TUNING] = stage("small", tuned_on, tunes=True)
        stages[ledger.SPECULATIVE_SCORES] = stage("target" if experiment.direct else "small", num_rows)
    if settings.leave_out == "suspects":  # of responses without their prompts, where scores have the other figures
        model = "target" if experiment.direct else "small"
        looked, alone = stage(model, num_rows), sum(lengths["responses"])
        tokens = alone if experiment.direct and "hidden_state" in small_columns(experiment) else looked.tokens + alone
        tokens += round(min(TRIED, num_rows) / num_rows * (looked.tokens + alone / 2))
        flops, seconds = (each * tokens / looked.tokens for each in looked[2:])
        stages[ledger.LOOK] = Stage(num_rows, tokens, flops, seconds)
    if not experiment.direct and "staff" in settings.methods:
        stages[ledger.VERIFICATION] = stage("target", drawn)
    stages[SELECTION] = total(*stages.values())
    with refusals():
        coresets = {rate: stage("target", coreset_size(rate, num_rows), tunes=True) for rate in settings.rates}
    stages |= {f"{ledger.TARGET_TUNING} at rate {rate:g}": each for rate, each in coresets.items()}
    stages[FULL] = stage("target", num_rows, tunes=True)
    stages[GRAND] = total(stages[FULL], stage("target", num_rows))
    return stages, coresets


def tuning_keys(experiment: Experiment, model: str) -> dict[str, Any]:
    """LLaMA-Factory's keys for tuning "small" or "target", with its defaults for those that FLOPs depend on.

    Raises: UserError where tuning is not some epochs of LoRA or full tuning."""
    keys = {"finetuning_type": "lora", "num_train_epochs": 3, "disable_gradient_checkpointing": False}
    keys |= experiment.training | (experiment.speculative_training if model == "small" else experiment.target_training)
    if keys.get("max_steps", -1) > 0:
        raise UserError("training key max_steps makes a run equally long on any coreset: remove it")
    if keys["finetuning_type"] not in ("lora", "full"):
        raise UserError(f"finetuning_type {keys['finetuning_type']}: costs are known for lora and full only")
    return keys


def format_plan(stages: dict[str, Stage], coresets: dict[float, Stage], reuses: int) -> str:
    lines = [f"{'stage':<44}{'rows':>9}{'tokens':>14}{'FLOPs':>11}{'time':>12}"]
    for name, (rows, tokens, flops, seconds) in stages.items():
        lines.append(f"{name:<44}{rows:>9,}{tokens:>14,}{flops:>11.2e}{seconds:>10,.1f} s")
    lines.append(f"\nselection-to-tuning ratio where one selection serves {reuses} tuning run{'s' * (reuses > 1)}:")
    selection, full = stages[SELECTION].seconds, stages[FULL].seconds
    lines += [verdict(rate, selection, coreset.seconds, full, reuses) for rate, coreset in coresets.items()]
    return "\n".join(lines)


def verdict(rate: float, selection: float, coreset: float, full: float, reuses: int) -> str:
    """Whether selection pays at a rate, by the selection-to-tuning ratio (selection / reuses + coreset) / full.

    Args: seconds of all selection, of tuning on the coreset and of tuning on everything."""
    ratio = (selection / reuses + coreset) / full
    said = f"{ratio:.2f} of the time of tuning on everything (random selection: {coreset / full:.2f})"
    if ratio < 1:
        return f"at rate {rate:g} selection pays: {said}"
    when = "no re-use would change that"
    if coreset < full:  # the least n with selection / n + coreset < full
        when = f"it would from {int(selection // (full - coreset)) + 1} re-uses on"
    return f"at rate {rate:g} selection does not pay: {said}; {when}"


def format_ways(plans: dict[str, dict[str, Stage]]) -> str:
    """What selection costs by each of WAYS, from `make_plan`'s stages by its name."""
    full = plans["mode recommended"][FULL].seconds
    lines = [f"{'selection in all, by selection.…':<67}{'FLOPs':>11}{'time':>12}   of tuning on everything"]
    for name, stages in plans.items():
        *_, flops, seconds = stages[SELECTION]
        lines.append(f"{name:<67}{flops:>11.2e}{seconds:>10,.1f} s{seconds / full:>10.1%}")
    cheapest = min((way for way in plans if way in AS_GOOD), key=lambda way: plans[way][SELECTION].seconds)
    lines.append(f"the cheapest that was no worse than the published where it was measured (data/results): {cheapest}")
    return "\n".join(lines)


def memory_needs(
    experiment: Experiment, shapes: dict[str, Shape], lengths: dict[str, Sequence[int]]
) -> dict[str, Need]:
    """What each stage needs on one GPU, by name; `shapes` and `lengths` by "small" and "target"."""
    settings = experiment.selection

    def scoring(model: str) -> Need:
        placed = model == "target"
        number, every_layer = DTYPES[choose_precision(settings.precision)].itemsize, settings.phi == "all_lora"
        memory = lambda tokens, bits: scoring_memory(shapes[model], tokens, number, every_layer, bits)  # noqa: E731
        budget = settings.tokens_per_batch or tokens_per_batch(settings.phi, torch.device("cuda"))
        longest, bits = max(lengths[model]), settings.quantization_bit if placed else None
        tokens = max(longest, min(budget, longest * len(lengths[model])))
        keys = ("selection.quantization_bit", SPREAD) if placed else (None, None)
        return Need(memory, tokens, longest, bits, "selection.tokens_per_batch", *keys)

    def tuning(model: str) -> Need:
        keys, number = tuning_keys(experiment, model), DTYPES[choose_precision(experiment.precision)].itemsize
        full, checkpointing = keys["finetuning_type"] == "full", not keys["disable_gradient_checkpointing"]
        memory = lambda tokens, bits: tuning_memory(shapes[model], tokens, number, full, checkpointing, bits)  # noqa: E731
        longest = -(-max(lengths[model]) // _PAD_TO_MULTIPLE_OF) * _PAD_TO_MULTIPLE_OF
        tokens = longest * min(keys.get("per_device_train_batch_size", 8), len(lengths[model]))
        own, bits = f"{model}_training", None if full else keys.get("quantization_bit")
        names = f"{own}.per_device_train_batch_size", None if full else f"{own}.quantization_bit"
        return Need(memory, tokens, longest, bits, *names, "training.deepspeed on several GPUs")

    needs = {}
    if not experiment.borrows:
        needs |= {ledger.SPECULATIVE_TUNING: tuning("small")} if experiment.tuned_small else {}
        needs[ledger.SPECULATIVE_SCORES] = scoring("target" if experiment.direct else "small")
    if not experiment.direct and "staff" in settings.methods:
        needs[ledger.VERIFICATION] = scoring("target")
    return needs | {ledger.TARGET_TUNING: tuning("target")}


def format_memory(needs: dict[str, Need], free: int | None, spread: bool = False) -> str:
    """A table in GiB, and a line for each stage that `free` bytes do not hold; `spread`: by device_map."""
    head = f"{'weights':>10}{'trained':>10}{'activations':>13}{'in all':>9}{'tokens of a batch':>20}"
    lines = [f"{'GPU memory in GiB, by formula':<32}{head}"]
    for name, need in needs.items():
        memory = need.memory(need.tokens, need.bits)
        parts = memory.weights, memory.states, memory.activations, memory.total
        gib = "{:>10.2f}{:>10.2f}{:>13.2f}{:>9.2f}".format(*(part / 2**30 for part in parts))
        lines.append(f"{name:<32}{gib}{need.tokens:>20,}")
    if free is None:
        return "\n".join([*lines, "(no GPU is seen here to hold this against)"])
    for name, need in needs.items():
        if need.memory(need.tokens, need.bits).total > free and not (spread and need.elsewhere == SPREAD):
            lines.append(f"{name} does not fit the {free / 2**30:.1f} GiB that are free: {remedies(need, free)}")
    return "\n".join(lines)


def remedies(need: Need, free: int) -> str:
    """What makes a stage fit that does not."""
    smaller = need.memory(need.least, need.bits).total <= free
    ways = [f"a smaller {need.batch_key}"] if smaller else [need.elsewhere] * bool(need.elsewhere)
    for bits in (8, 4):
        if need.bits_key and bits < (need.bits or 16) and need.memory(need.least, bits).total <= free:
            ways.append(f"{need.bits_key} {bits} ({need.memory(need.tokens, bits).total / 2**30:.2f} GiB)")
    return f"give {' or '.join(ways)}" if ways else "take a GPU with more memory"


Step, Batches = Callable[[dict[str, list]], object], list[list[int]]  # computes input_ids and labels; row numbers


def calibrate(experiment: Experiment, tokenised: dict[str, Dataset], seconds: float) -> dict[str, Speed]:
    """Speeds of both models on this device, on real rows in the batches of scoring and of tuning.

    Args: `tokenised`, the training split by "small" and "target"; `seconds` of all four measurements together, without
    loading and first batches. Raises: UserError where a model does not load or does not fit into memory."""
    speeds, models = {}, {"small": experiment.small_model, "target": experiment.target_model}
    for name, rows in tokenised.items():
        measured = []
        for what, prepare in (("scoring", prepare_scoring), ("tuning", prepare_tuning)):
            try:
                step, batches, multiple = prepare(experiment, name, models[name], rows)
                measured.append(seconds_per_token(step, batches, multiple, rows, seconds / 4))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                keys = "selection.tokens_per_batch, training.per_device_train_batch_size"
                raise UserError(f"{what} on {models[name]} does not fit into memory: give smaller {keys}") from None
            say(f"{what} on {models[name]}: {1 / measured[-1]:,.0f} tokens/s")
        speeds[name] = Speed(parameters_of(model_path(models[name])), *measured)
    return speeds


def seconds_per_token(step: Step, batches: Batches, multiple: int, rows: Dataset, seconds: float) -> float:
    """Seconds for each token of the data, measured on some batches (after a first one as warm-up) and scaled from their
    padded tokens to the padding of all batches. A batch is padded to a `multiple`."""
    lengths = [len(ids) for ids in rows["input_ids"]]

    def padded(batch: list[int]) -> int:
        return len(batch) * -(-max(lengths[row] for row in batch) // multiple) * multiple

    def run(batch: list[int]) -> None:
        step(rows[batch])
        if torch.cuda.is_available():  # a GPU answers before it has computed
            torch.cuda.synchronize()

    run(batches[0])
    order = random.Random(0).sample(batches[1:], len(batches) - 1) or batches
    started, tokens = time.perf_counter(), 0
    for batch in itertools.cycle(order):
        run(batch)
        tokens += padded(batch)
        if (elapsed := time.perf_counter() - started) >= seconds:
            return elapsed / tokens * sum(map(padded, batches)) / sum(lengths)


def prepare_scoring(experiment: Experiment, name: str, model: str, rows: Dataset) -> tuple[Step, Batches, int]:
    """Scoring as the stages do it, and its batches. The small model carries a LoRA, as its tuning leaves one."""
    settings, keys = experiment.selection, tuning_keys(experiment, name)
    loaded = load_for_scoring(model_path(model), None, choose_precision(settings.precision))
    tuned = name == "small" and keys["finetuning_type"] == "lora" and experiment.tuned_small
    if settings.phi == "all_lora" or tuned:
        loaded = with_fresh_lora(loaded, **tuning_lora(keys), seed=settings.seed)
    check_embeddings(experiment, model, loaded, rows)
    with refusals():
        phi = settings.phi, settings.phi_rank, settings.phi_alpha
        scorer = EffortScorer(loaded, *phi, settings.seed, settings.columns)
    budget = settings.tokens_per_batch or tokens_per_batch(settings.phi, scorer.device)
    batches = plan_batches(range(len(rows)), [len(ids) for ids in rows["input_ids"]], budget)
    return lambda batch: scorer.score(batch["input_ids"], batch["labels"]), batches, 1


def prepare_tuning(experiment: Experiment, name: str, model: str, rows: Dataset) -> tuple[Step, Batches, int]:
    """Steps of LLaMA-Factory's trainer on the model as it loads it, and batches drawn as there."""
    import_llama_factory()
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer
    from transformers import DataCollatorForSeq2Seq

    precision, own = choose_precision(experiment.precision), {"dataset": "train", "do_train": True}
    keys = common_arguments(experiment, model, experiment.folder, precision) | own | tuning_keys(experiment, name)
    with user_errors(f"tuning {model}"), quiet():
        model_args, data_args, training_args, tuning_args, _ = get_train_args(keys)
        tokenizer = load_tokenizer(model_args)["tokenizer"]
        get_template_and_fix_tokenizer(tokenizer, data_args)
        loaded = load_model(tokenizer, model_args, tuning_args, is_trainable=True)
    collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=_PAD_TO_MULTIPLE_OF)
    optimiser = torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad])
    number_format = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def step(batch: dict[str, list]) -> None:
        pairs = zip(batch["input_ids"], batch["labels"], strict=True)
        samples = [{"input_ids": ids, "labels": labels} for ids, labels in pairs]
        with torch.autocast(loaded.device.type, dtype=number_format, enabled=number_format is not None):
            loss = loaded(**collate(samples).to(loaded.device)).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    size, order = training_args.per_device_train_batch_size, random.Random(0).sample(range(len(rows)), len(rows))
    return step, [order[i : i + size] for i in range(0, len(order), size)], _PAD_TO_MULTIPLE_OF


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
    models = {"small": experiment.small_model, "target": experiment.target_model}
    ways = {}
    # direct knows no small model to compare with, and what another run has paid for is no price of a way
    for way, changes in ({} if experiment.direct or experiment.borrows else WAYS).items():
        with contextlib.suppress(UserError):  # S2L and others go one way only
            ways[way] = load_experiment(arguments.config_path, arguments.set + changes)
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        elsewhere = experiment.model_copy(update={"output_dir": folder})
        split = training_split(elsewhere)
        # What no plan can be made for is refused before anything is measured.
        ones = dict.fromkeys([*models, "responses"], [1] * len(split.rows))
        make_plan(experiment, ones, dict.fromkeys(models, Speed(1, 1, 1)))
        tokenised = {name: tokenised_rows(elsewhere, model, "train", split.rows) for name, model in models.items()}
        lengths = {name: [len(ids) for ids in rows["input_ids"]] for name, rows in tokenised.items()}
        turn = len(empty_turn(elsewhere, experiment.target_model)[0])
        lengths["responses"] = [turn + len(row) - row.count(IGNORED_LABEL) for row in tokenised["target"]["labels"]]
        loras = {name: tuning_lora(tuning_keys(experiment, name)) for name in models}
        shapes = {name: shape_of(model_path(models[name]), loras[name]) for name in models}
        free = torch.cuda.mem_get_info(device())[0] if device().type == "cuda" else None
        needs = memory_needs(experiment, shapes, lengths)
        print(format_memory(needs, free, spread=experiment.selection.device_map is not None), flush=True)
        speeds = calibrate(elsewhere, tokenised, arguments.seconds)
    print("\n" + format_plan(*make_plan(experiment, lengths, speeds), arguments.reuses))
    if ways:
        print(f"\n{format_ways({way: make_plan(each, lengths, speeds)[0] for way, each in ways.items()})}")
    print("\ntimes are of one process on one device, without device_map and quantization_bit")


if __name__ == "__main__":
    run_stage(main, one_gpu=True)
