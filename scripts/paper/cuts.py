"""Which cheap copy of a target scores rows as the target does? Ways to cut one, at equal price, untuned.

    python scripts/paper/cuts.py --config_path configs/demo.yaml --set max_samples=360 --set output_dir=runs/cuts

Needs the configuration's target, of Llama's kind. Copies of it cost as much as --layers of its decoder layers: without
the layers of least influence (make_draft.py), or those least missed when skipped alone (on 16 of the 64 calibration
rows); or with all layers, each linear map at lower rank (svd). Writes data/results/cuts/cuts.csv (--out): rank
correlation of each copy's effort scores with the target's on the training split, plain and with length held fixed, and
its mean loss. Seeds that are finished stand in it where the script is stopped.
"""

import copy
import itertools
import random
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
from selection.run.ending import run_stage

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from scripts.make_draft import cut_layers, decoder_layers, keep_layers
from scripts.paper.cells import markdown_table
from selection.method.effort import IGNORED_LABEL, EffortScorer, plan_batches, response_losses
from selection.method.norms import replaced_forward
from selection.method.phi import find_value_projection, projections
from selection.report.agreement import partial_spearman, spearman
from selection.rows.split import training_split
from selection.rows.tokens import lengths, tokenised_split
from selection.run.cli import add_experiment_arguments, argument_parser
from selection.run.config import REPOSITORY, load_experiment
from selection.run.device import choose_precision
from selection.run.log import say
from selection.run.model_folder import model_path
from selection.run.products import atomic_path, code_version
from selection.scores.models import load_for_scoring


def main() -> None:
    parser = argument_parser(__doc__)
    add_experiment_arguments(parser)
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 10], help="prices; default: 16 10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of calibration rows; default: 1 2 3")
    out = REPOSITORY / "data" / "results" / "cuts" / "cuts.csv"
    parser.add_argument("--out", type=Path, default=out, help="default: data/results/cuts/cuts.csv")
    arguments = parser.parse_args()
    experiment, commit = load_experiment(arguments.config_path, arguments.set), code_version()
    rows = tokenised_split(experiment, experiment.target_model, training_split(experiment))
    precision = choose_precision(experiment.selection.precision)
    target = load_for_scoring(model_path(experiment.target_model), None, precision)
    counts = [sum(label != IGNORED_LABEL for label in labels[1:]) for labels in rows["labels"]]
    effort, target_loss = scores_of(target, rows)
    table, count = [], len(getattr(*decoder_layers(target)))

    def add(seed: int, layers: int, way: str, own: np.ndarray, loss: np.ndarray) -> None:
        agree = spearman(own, effort), partial_spearman(own, effort, counts)
        losses = loss[chosen].mean(), np.delete(loss, chosen).mean()
        table.append((seed, layers, way, *(round(float(each), 4) for each in (*agree, *losses)), len(rows), commit))
        say(f"{table[-1]}")

    columns = ["seed", "layers", "way", "spearman", "spearman_length_fixed", "loss_calibration", "loss_other"]
    columns += ["rows", "commit"]
    for seed in arguments.seeds:
        chosen = random.Random(seed).sample(range(len(rows)), 64)  # as many as make_draft.py takes
        samples = rows.select(chosen)
        add(seed, count, "target", effort, target_loss)
        missed = skipped_losses(target, rows.select(chosen[:16]))  # 30 passes
        directions = principal_outputs(copy.deepcopy(target), samples, damping=0.01)
        for layers, way in itertools.product(arguments.layers, ("skipped", "influence", "svd")):
            small = copy.deepcopy(target)
            if way == "svd":
                lower_ranks(small, directions, layers / count)
            elif way == "influence":
                cut_layers(small, layers, samples)
            else:
                keep_layers(small, sorted(np.argsort(missed, kind="stable")[count - layers :]))
            add(seed, layers, way, *scores_of(small, rows))
        with atomic_path(arguments.out) as draft:
            pd.DataFrame(table, columns=columns).to_csv(draft, index=False)
    means = pd.DataFrame(table, columns=columns).groupby(["layers", "way"], as_index=False)[columns[3:7]].mean()
    print(markdown_table(list(means), means.round(3).astype(str).to_numpy().tolist()))


def scores_of(model: PreTrainedModel, rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Effort and loss of each row, (N,) each."""
    scorer, found = EffortScorer(model), np.empty((2, len(rows)))
    for batch in plan_batches(range(len(rows)), lengths(rows), 2048):
        part = scorer.score(rows[batch]["input_ids"], rows[batch]["labels"])
        found[:, batch] = part["effort"], part["loss"]
    return found[0], found[1]


def loss_of(model: PreTrainedModel, row: dict) -> torch.Tensor:
    return response_losses(model, [row["input_ids"]], [row["labels"]]).mean()


@torch.no_grad()
def skipped_losses(model: PreTrainedModel, samples: Dataset) -> list[float]:
    """The loss with each layer skipped alone."""
    found = []
    for layer in getattr(*decoder_layers(model)):
        with replaced_forward(layer, lambda hidden, **named: hidden):
            found.append(float(torch.stack([loss_of(model, row) for row in samples]).mean()))
    return found


@torch.no_grad()
def principal_outputs(model: PreTrainedModel, samples: Dataset, damping: float) -> dict[str, torch.Tensor]:
    """By name of each linear map W in the decoder layers: the directions of most power in its outputs W x, as columns.
    `damping` of the mean power is added to the second moment of its inputs x: they are of few tokens."""
    squares: dict[str, torch.Tensor] = defaultdict(float)
    maps = projections(nn.ModuleList(getattr(*decoder_layers(model))))

    def note(name: str, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        squares[name] = squares[name] + inputs[0][0].float().T @ inputs[0][0].float()

    for name, module in maps.items():
        module.register_forward_pre_hook(partial(note, name))
    for row in samples:
        loss_of(model, row)
    for name, square in squares.items():
        square.diagonal().add_(damping * square.diagonal().mean())
        half = maps[name].weight.float() @ torch.linalg.cholesky(square)
        squares[name] = torch.linalg.svd(half, full_matrices=False).U
    return squares


@torch.no_grad()
def lower_ranks(model: PreTrainedModel, directions: dict[str, torch.Tensor], share: float) -> None:
    """Put U (Uᵀ W) of rank r in the place of each linear map W, so that all cost `share` of what they did: the nearest
    to W in the mean square of outputs. The last layer's value projection, φ, stays."""
    layers = nn.ModuleList(getattr(*decoder_layers(model)))
    maps, kept = projections(layers), find_value_projection(model).module
    total, exact = sum(module.weight.numel() for module in maps.values()), kept.weight.numel()
    for name, module in ((name, module) for name, module in maps.items() if module is not kept):
        wide, deep = module.weight.shape
        rank = round((share * total - exact) / (total - exact) * wide * deep / (wide + deep))
        low = nn.Sequential(nn.Linear(deep, rank, bias=False), nn.Linear(rank, wide, bias=False)).to(
            module.weight.dtype
        )
        basis = directions[name][:, :rank]
        low[0].weight.copy_(basis.T @ module.weight.float())
        low[1].weight.copy_(basis)
        parent, _, own = name.rpartition(".")
        setattr(layers.get_submodule(parent), own, low)


if __name__ == "__main__":
    run_stage(main)
