"""Cut a speculative model out of a target that has no smaller sibling.

    python scripts/make_draft.py --config_path configs/demo.yaml --layers 16

Needs the target. Looks at calibration rows of the training split in one forward pass, drops the decoder layers that
change the hidden states least, and writes a Hugging Face checkpoint with draft.json. It serves runs that hold none of
these rows out.
"""

import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

import torch
from datasets import Dataset
from torch import nn
from torch.nn.functional import cosine_similarity
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
from selection.run.log import say
from selection.run.model_folder import model_fingerprint, model_path
from selection.run.products import building, reuse, write_json
from selection.scores.checks import check_machine
from selection.scores.models import NO_CODE, count_parameters, load_for_scoring

_TOKENS_PER_BATCH = 512  # rows of about one length
_PASSES = 2  # through the target, and through what is left of it
_LAYER_NUMBERS = ("moe_layers", "mlp_only_layers")  # keys of a config that list layers by number
_COPIED = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "pre", "processor")


def decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that holds the list of decoder layers, and the list's name in it."""
    path, _, _ = last_decoder_layer(model)[0].rpartition(".")
    parent, _, name = path.rpartition(".")
    return decoder_of(model).get_submodule(parent), name


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Leave only `kept` layers in the model and in the lists of its config."""
    parent, name = decoder_layers(model)
    layers, config = getattr(parent, name), model.config.get_text_config()
    setattr(parent, name, nn.ModuleList(layers[i] for i in kept))
    config.num_hidden_layers = len(kept)  # whatever the family calls it
    for key, value in dict(vars(config)).items():
        if key in _LAYER_NUMBERS:
            setattr(config, key, value and [new for new, old in enumerate(kept) if old in value])
        elif isinstance(value, list) and len(value) == len(layers):  # one entry a layer, such as kinds of attention
            setattr(config, key, [value[i] for i in kept])


@torch.no_grad()
def cut_layers(model: PreTrainedModel, num_kept: int, samples: Dataset) -> dict:
    """Leave only the `num_kept` layers of most influence in the model. Influence: 1 − cosine of a token's hidden state
    before and after the layer, mean over all tokens (ShortGPT, arXiv 2403.03853).

    Args: `samples`, calibration rows with input_ids and labels. They pass the model once, and what is left of it once.
    Returns layers by number (`kept`, and `dropped`, the least influence first), the `influence` of each, and mean
    losses in nats per response token: `full_loss`, `cut_loss`."""
    layers, lengths = getattr(*decoder_layers(model)), list(map(len, samples["input_ids"]))
    order = plan_batches(range(len(samples)), lengths, _TOKENS_PER_BATCH)
    batches = [samples[batch] for batch in order]
    cosines: list[list[torch.Tensor]] = [[] for _ in layers]

    def note(layer: int, module: nn.Module, arguments: tuple, named: dict, output: torch.Tensor | tuple) -> None:
        before = arguments[0] if arguments else named["hidden_states"]
        after = output if isinstance(output, torch.Tensor) else output[0]
        cosines[layer].extend(cosine_similarity(before.float(), after.float(), dim=-1).cpu())  # (T,) a row

    def mean_loss() -> float:
        return float(torch.cat([response_losses(model, each["input_ids"], each["labels"]) for each in batches]).mean())

    hooks = [layer.register_forward_hook(partial(note, i), with_kwargs=True) for i, layer in enumerate(layers)]
    full_loss = mean_loss()
    for hook in hooks:
        hook.remove()
    ends = [lengths[row] for batch in order for row in batch]  # padding behind them is no token
    tokens = [torch.cat([row[:end] for row, end in zip(each, ends, strict=True)]) for each in cosines]
    influence = [1 - float(each.double().mean()) for each in tokens]
    dropped = sorted(range(len(layers)), key=lambda i: (influence[i], i))[: len(layers) - num_kept]
    kept = sorted(set(range(len(layers))) - set(dropped))
    keep_layers(model, kept)
    figures = {"influence": influence, "full_loss": full_loss, "cut_loss": mean_loss()}
    return {"kept": kept, "dropped": dropped} | figures


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
    parser.add_argument("--rows", type=int, default=64, help="calibration rows of the training split; default: 64")
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
    identity |= {"precision": choose_precision(experiment.selection.precision), "chosen_by": "influence"}
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
        cost.tokens = _PASSES * sum(map(len, samples["input_ids"]))  # the second too as of the whole target
        cut = cut_layers(model, arguments.layers, samples)
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
    print(f"loss {cut['full_loss']:.3f} with {count} layers, {cut['cut_loss']:.3f} with {cut['kept']} -> {out}")


if __name__ == "__main__":
    run_stage(main)
