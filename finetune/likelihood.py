"""Held-out log likelihood: how probable a model finds the reference answers, with no answer generated."""

from pathlib import Path

import numpy as np
import torch

from finetune.trainer import model_keys
from selection.method.effort import plan_batches, response_losses, tokens_per_batch
from selection.rows.split import rows_of
from selection.rows.tokens import check_embeddings, lengths, tokenised_rows
from selection.run.config import Experiment
from selection.run.device import device
from selection.run.log import progress_bar
from selection.run.model_folder import model_path
from selection.run.processes import processes
from selection.scores.models import load_for_scoring


@torch.no_grad()
def held_out_losses(experiment: Experiment, tuned: Path | None, precision: str) -> list[float]:
    """Mean negative log likelihood a response token, in nats, of each held-out row (E,), in the split's order.

    By the scorer's own forward pass, on the target with what its tuning left in `tuned`. Tokens and labels are those of
    tuning: in a conversation every turn of the assistant counts. Several processes share the rows.
    """
    together = processes()
    with together.leader_first():
        tokenised = tokenised_rows(experiment, experiment.target_model, "eval", rows_of(experiment, "eval"))
    bits = model_keys(experiment).get("quantization_bit")
    model = load_for_scoring(model_path(experiment.target_model), tuned, precision, quantization_bit=bits)
    check_embeddings(experiment, experiment.target_model, model, tokenised)
    budget = experiment.selection.tokens_per_batch or tokens_per_batch(experiment.selection.phi, device())
    batches = plan_batches(range(len(tokenised)), lengths(tokenised), budget)[together.rank :: together.count]
    found = []
    with progress_bar(total=sum(map(len, batches)), unit="samples", desc="log likelihood") as progress:
        for batch in batches:
            samples = tokenised[batch]
            losses = response_losses(model, samples["input_ids"], samples["labels"])
            found += zip(batch, losses.double().tolist(), strict=True)
            progress.update(len(batch))
    losses = np.full(len(tokenised), np.nan)
    for row, loss in (pair for share in together.gather(found) for pair in share):
        losses[row] = loss
    return losses.tolist()
