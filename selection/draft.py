"""A speculative model cut out of its target: the layers whose absence hurts least are dropped.

Keeping the first or last layers destroys a model; dropping by measured sensitivity does not.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from selection.effort import plan_batches, response_losses
from selection.errors import UserError
from selection.models import NO_CODE
from selection.phi import decoder_of, last_decoder_layer

_TOKENS_PER_BATCH = 2048
_OF_NUMBERS = ("moe_layers", "mlp_only_layers")  # keys of a config that list layers by number


@dataclass(frozen=True)
class Cut:
    """Layers by their number in the target. Losses are mean nats per response token of the calibration rows."""

    kept: list[int]
    dropped: list[int]  # in the order they were dropped
    full_loss: float
    sensitivity: list[float]  # (layers,) increase of the loss when that layer alone is skipped
    loss_after_drop: list[float]  # as `dropped`


def decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that holds the list of decoder layers, and the list's name in it."""
    path, _, _ = last_decoder_layer(model)[0].rpartition(".")
    parent, _, name = path.rpartition(".")
    return decoder_of(model).get_submodule(parent), name


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> Callable[[], None]:
    """Leave only `kept` layers in the model and its config; returns what undoes it.

    Every list in the config with one entry a layer (kinds of attention, …) is cut alike; where it holds the layers'
    numbers (those with experts), they are counted anew.
    """
    parent, name = decoder_layers(model)
    layers, config = getattr(parent, name), model.config.get_text_config()
    before = {
        key: value
        for key, value in vars(config).items()
        if key in ("num_hidden_layers", *_OF_NUMBERS) or (isinstance(value, list) and len(value) == len(layers))
    }
    setattr(parent, name, nn.ModuleList(layers[i] for i in kept))
    for key, value in before.items():
        if key in _OF_NUMBERS:
            setattr(config, key, value and [new for new, old in enumerate(kept) if old in value])
        else:
            setattr(config, key, [value[i] for i in kept] if isinstance(value, list) else len(kept))

    def undo() -> None:
        setattr(parent, name, layers)
        for key, value in before.items():
            setattr(config, key, value)

    return undo


def choose_layers(
    model: PreTrainedModel,
    num_kept: int,
    input_ids: list[list[int]],
    labels: list[list[int]],
    progress: Callable[[], object],
) -> Cut:
    """Skip each layer alone, then drop the least missed one by one, measuring the loss after each drop.

    `progress` is called after each of the 1 + layers + dropped passes over the calibration rows.
    """

    def loss_of(kept: Sequence[int]) -> float:
        undo = keep_layers(model, kept)
        try:
            losses = [response_losses(model, [input_ids[r] for r in b], [labels[r] for r in b]) for b in batches]
        finally:
            undo()
        progress()
        return float(torch.cat(losses).mean())

    batches = plan_batches(range(len(input_ids)), list(map(len, input_ids)), _TOKENS_PER_BATCH)
    parent, name = decoder_layers(model)
    every = list(range(len(getattr(parent, name))))
    full_loss = loss_of(every)
    sensitivity = [loss_of([i for i in every if i != skipped]) - full_loss for skipped in every]
    cheapest_first = sorted(every, key=lambda i: (sensitivity[i], i))
    dropped = cheapest_first[: len(every) - num_kept]
    after = [loss_of([i for i in every if i not in dropped[: n + 1]]) for n in range(len(dropped))]
    return Cut([i for i in every if i not in dropped], dropped, full_loss, sensitivity, after)


def check_loads(model: PreTrainedModel) -> None:
    """Raises: UserError where the model's configuration, as it was cut, describes other layers than it has."""
    with torch.device("meta"):
        described = AutoModelForCausalLM.from_config(model.config, **NO_CODE).state_dict()
    shapes = [{name: tensor.shape for name, tensor in each.items()} for each in (described, model.state_dict())]
    if shapes[0] != shapes[1]:
        odd = min(name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name))
        raise UserError(
            f"{type(model).__name__}: {odd} would have another place or shape in a model of fewer layers: give a small "
            "model (--small)"
        )


def save_with_tokenizer(model: PreTrainedModel, source: str, folder: Path) -> None:
    """Save the model, with the tokenizer of `source` (and its image processor): from a local folder its files as they
    are.

    (Loading and saving a tokenizer may write another class into its config.)
    """
    model.save_pretrained(folder)
    if not Path(source).is_dir():
        AutoTokenizer.from_pretrained(source, **NO_CODE).save_pretrained(folder)
        return
    for path in Path(source).iterdir():
        is_tokenizer = path.name.startswith(
            (
                "tokenizer",
                "vocab",
                "merges",
                "special_tokens",
                "added_tokens",
                "chat_template",
                "preprocessor",
                "processor",
            )
        )
        if is_tokenizer and path.is_file():
            shutil.copy(path, folder / path.name)
