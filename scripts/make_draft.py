"""Cut a speculative model out of a target that has no smaller sibling.

    python scripts/make_draft.py --config_path configs/demo.yaml --layers 16

Needs the target. Skips each decoder layer alone on calibration rows of the training split, drops the least missed ones,
and writes a Hugging Face checkpoint with draft.json. It serves runs that hold none of these rows out.
"""

import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from selection.method.effort import plan_batches, response_losses
from selection.method.phi import decoder_of, last_decoder_layer
from selection.rows.split import held_out_ids, training_split
from selection.rows.tokens import tokenised_rows
from selection.run.cli import add_experiment_arguments, argument_parser
from selection.run.config import REPOSITORY, from_repository, load_experiment
from selection.run.device import choose_precision, device_name
from selection.run.errors import UserError, refusals
from selection.run.ledger import CUTTING, Cost, measured
from selection.run.log import progress_bar, say
from selection.run.model_folder import model_fingerprint, model_path
from selection.run.products import building, reuse, write_json
from selection.scores.checks import check_machine
from selection.scores.models import NO_CODE, count_parameters, load_for_scoring

_TOKENS_PER_BATCH = 2048
_LAYER_NUMBERS = ("moe_layers", "mlp_only_layers")  # keys of a config that list layers by number
_COPIED = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "pre", "processor")


def decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that holds the list of decoder layers, and the list's name in it."""
    path, _, _ = last_decoder_layer(model)[0].rpartition(".")
    parent, _, name = path.rpartition(".")
    return decoder_of(model).get_submodule(parent), name


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> Callable[[], None]:
    """Leave only `kept` layers in the model and in the lists of its config; returns a function that undoes it."""
    parent, name = decoder_layers(model)
    layers, config = getattr(parent, name), model.config.get_text_config()
    before = dict(vars(config))
    setattr(parent, name, nn.ModuleList(layers[i] for i in kept))
    for key, value in before.items():
        if key == "num_hidden_layers":
            setattr(config, key, len(kept))
        elif key in _LAYER_NUMBERS:
            setattr(config, key, value and [new for new, old in enumerate(kept) if old in value])
        elif isinstance(value, list) and len(value) == len(layers):  # one entry a layer, such as kinds of attention
            setattr(config, key, [value[i] for i in kept])

    def undo() -> None:
        setattr(parent, name, layers)
        vars(config).update(before)

    return undo


@torch.no_grad()
def choose_layers(model: PreTrainedModel, num_kept: int, samples: Dataset, progress: Callable) -> dict:
    """Skip each layer alone, then drop the least missed one by one and measure the loss after each drop.

    Args: `samples`, calibration rows with input_ids and labels; `progress` is called after each of the 1 + layers +
    dropped passes over them.
    Returns layers by number (`kept`, and `dropped` in that order) and mean losses in nats per response token:
    `full_loss`, its increase without each layer (`sensitivity`), `loss_after_drop`."""
    batches = plan_batches(range(len(samples)), list(map(len, samples["input_ids"])), _TOKENS_PER_BATCH)
    batches, every = [samples[batch] for batch in batches], range(len(getattr(*decoder_layers(model))))

    def loss_without(skipped: Sequence[int]) -> float:
        undo = keep_layers(model, [i for i in every if i not in skipped])
        losses = [response_losses(model, batch["input_ids"], batch["labels"]) for batch in batches]
        undo()
        progress()
        return float(torch.cat(losses).mean())

    full_loss = loss_without([])
    sensitivity = [loss_without([i]) - full_loss for i in every]
    dropped = sorted(every, key=lambda i: (sensitivity[i], i))[: len(every) - num_kept]
    after = [loss_without(dropped[: n + 1]) for n in range(len(dropped))]
    cut = {"kept": [i for i in every if i not in dropped], "dropped": dropped}
    return cut | {"full_loss": full_loss, "sensitivity": sensitivity, "loss_after_drop": after}


def check_loads(model: PreTrainedModel) -> None:
    """Raises: UserError where the model's configuration, as it was cut, describes other layers than it has."""
    with torch.device("meta"):
        described = AutoModelForCausalLM.from_config(model.config, **NO_CODE)
    shapes = [{(name, tensor.shape) for name, tensor in each.state_dict().items()} for each in (described, model)]
    if odd := shapes[0] ^ shapes[1]:
        name = f"{type(model).__name__}: {min(odd)[0]}"
        raise UserError(f"{name} has another place or shape in a model of fewer layers: give a small model (--small)")


def main() -> None:
    parser = argument_parser(__doc__)
    add_experiment_arguments(parser, required=False, default=REPOSITORY / "configs" / "demo.yaml")
    parser.add_argument("--target", help="model folder or hub name; default: the configuration's target_model")
    parser.add_argument("--layers", type=int, required=True, help="decoder layers to keep; required")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint; default: the configuration's small_model")
    parser.add_argument("--rows", type=int, default=16, help="calibration rows of the training split; default: 16")
    arguments = parser.parse_args()
    experiment = load_experiment(arguments.config_path, arguments.set)
    name = arguments.target or experiment.target_model
    if arguments.target and Path(name).is_dir():  # paths on a command line begin at the working directory
        name = os.path.abspath(name)
    target = model_path(name)
    out = arguments.out.resolve() if arguments.out else from_repository(experiment.small_model)
    check_machine(experiment)
    split = training_split(experiment)
    if arguments.rows < 1:
        raise UserError(f"--rows {arguments.rows}: give at least one calibration row")
    held_out = set(held_out_ids(experiment))  # the same row may stand in the data twice
    own = [row for row, row_id in enumerate(split.ids) if row_id not in held_out]
    rows = sorted(random.Random(42).sample(own, min(arguments.rows, len(own))))
    if not rows:
        raise UserError("every row of the training split is held out too: mend the data")
    identity = {"target_fingerprint": model_fingerprint(target, experiment.folder), "layers": arguments.layers}
    identity |= {"data_fingerprint": split.fingerprint, "template": experiment.template}
    identity |= {"cutoff_len": experiment.cutoff_len, "calibration_rows": rows}
    identity["precision"] = choose_precision(experiment.selection.precision)
    if reuse(out, identity):
        say(f"draft: reusing {out}")
        return

    samples = tokenised_rows(experiment, name, "train", split.rows).select(rows)
    cost = Cost(CUTTING, Path(target).name, len(rows), device=device_name(), precision=identity["precision"])
    started = time.perf_counter()
    with building(out, identity) as draft, measured(experiment.folder, cost):
        model = load_for_scoring(target, None, identity["precision"])
        with refusals():
            count, cost.parameters = len(getattr(*decoder_layers(model))), count_parameters(model)
        if not 1 <= arguments.layers < count:
            raise UserError(f"--layers {arguments.layers}: the target has {count} layers: keep 1 to {count - 1}")
        passes = 1 + count + count - arguments.layers
        cost.tokens = passes * sum(map(len, samples["input_ids"]))
        with progress_bar(total=passes, unit="passes", desc="layer sensitivity") as progress:
            cut = choose_layers(model, arguments.layers, samples, progress.update)
        del model
        whole = AutoModelForCausalLM.from_pretrained(target, dtype="auto", **NO_CODE)
        keep_layers(whole, cut["kept"])
        check_loads(whole)
        whole.save_pretrained(draft)
        if not Path(target).is_dir():
            AutoTokenizer.from_pretrained(target, **NO_CODE).save_pretrained(draft)
        # A local tokenizer is copied: loading and saving may write another class into its config.
        for path in Path(target).iterdir() if Path(target).is_dir() else []:
            if path.name.startswith(_COPIED) and path.is_file():
                shutil.copy(path, draft)
        seconds = round(time.perf_counter() - started, 2)
        # The cost stays with the model: every experiment that uses it pays for it.
        paid = {"tokens": cost.tokens, "parameters": cost.parameters, "seconds": seconds}
        ids = [split.ids[row] for row in rows]
        record = {"target": Path(target).name, **identity, "calibration_ids": ids, **cut, "cost": paid}
        write_json(draft / "draft.json", record)
    losses = cut["full_loss"], cut["loss_after_drop"][-1]
    print(f"loss {losses[0]:.3f} with {count} layers, {losses[1]:.3f} with {cut['kept']} -> {out}")


if __name__ == "__main__":
    run_stage(main)
