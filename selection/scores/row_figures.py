"""Figures of every row from one pass of an untuned model: effort, loss with and without the prompt, hidden state."""

import numpy as np
import torch

from selection.method.effort import IGNORED_LABEL, EffortScorer, plan_batches, tokens_per_batch
from selection.run.device import choose_precision
from selection.run.ledger import Cost
from selection.run.log import progress_bar
from selection.run.model_folder import model_path
from selection.scores.losses import losses_without_prompt
from selection.scores.models import load_for_scoring
from selection.scores.within_memory import score_within_memory

_COLUMNS = ("el2n", "entropy", "hidden_state")
_Sample = tuple[tuple[int, ...], tuple[int, ...]]  # token ids and labels


class RowScorer(EffortScorer):
    """An EffortScorer whose `score` also gives `losses_without_prompt`; where `alone`, these only."""

    around, alone = ([], []), False

    def score(self, input_ids, labels) -> dict[str, torch.Tensor]:
        scores = {} if self.alone else super().score(input_ids, labels)
        losses = losses_without_prompt(self.model, labels, self.around)
        return scores | {name: values.cpu() for name, values in losses.items()}


def load_row_scorer(
    model: str, precision: str, columns: tuple[str, ...] = _COLUMNS, tokens: int | None = None, **placed
) -> RowScorer:
    """The untuned `model`, a folder or hub name, for `row_figures`; `precision` and `tokens` of a batch as in
    Selection, `placed` as `placement` says. Raises: UserError."""
    loaded = load_for_scoring(model_path(model), None, choose_precision(precision), **placed)
    scorer = RowScorer(loaded, columns=columns)
    scorer.largest_batch = tokens or tokens_per_batch("v_lora_b", scorer.device)
    return scorer


def row_figures(
    tokenised,
    scorer: RowScorer,
    around: tuple[list[int], list[int]],
    known: dict[_Sample, dict] | None = None,
    stored: dict[str, np.ndarray] | None = None,
    cost: Cost | None = None,
) -> dict[str, np.ndarray]:
    """Figures (N,) of each row by name; hidden_state (N, d). Equal rows are scored once.

    Args: `tokenised` as `tokenised_rows` makes it; `scorer` of `load_row_scorer`; `around`: `empty_turn`'s tokens;
    `known`: rows that were scored before, which grows; `stored`: the scorer's columns (N, …), where these are known;
    `cost`: counts samples and tokens. Beside the scorer's columns:
        loss_without_prompt: mean loss of the response behind an empty prompt, in nats a token;
        end_loss: loss of the template's tokens after the response, in nats, all together, in the same pass: high where
            an answer breaks off; 0 where cutoff_len has cut them;
        n_response_tokens.
    """
    known = {} if known is None else known
    scorer.around, scorer.alone = around, stored is not None
    after, end = around[1], max(1, len(around[1]))
    samples = [(tuple(row["input_ids"]), tuple(row["labels"])) for row in tokenised]
    responses = {sample: [label for label in sample[1] if label != IGNORED_LABEL] for sample in samples}
    first = {sample: row for row, sample in reversed(list(enumerate(samples)))}
    missing = [sample for sample in responses if sample not in known]
    with progress_bar(total=len(missing), unit="samples", desc="figures") as progress:
        for numbers in plan_batches(range(len(missing)), [len(ids) for ids, _ in missing], scorer.largest_batch):
            batch = [missing[number] for number in numbers]
            ids, labels = zip(*batch, strict=True)
            rows = [first[sample] for sample in batch]
            figures = score_within_memory(scorer, ids, labels, [f"row {row} of {len(samples)}" for row in rows])
            if stored is not None:
                figures |= {name: torch.from_numpy(values[rows]) for name, values in stored.items()}
            if cost:
                cost.samples += len(batch)
                cost.tokens += sum(map(len, ids)) if stored is None else 0
                cost.more_tokens += sum(len(around[0]) + len(responses[sample]) for sample in batch)
            for number, sample in enumerate(batch):
                known[sample] = {name: values[number].numpy() for name, values in figures.items()}
            progress.update(len(batch))
    columns = {name: np.array([known[sample][name] for sample in samples]) for name in known[samples[0]]}
    columns["end_loss"] *= [list(ids[-end:]) == after for ids, _ in samples]
    return columns | {"n_response_tokens": np.array([len(responses[sample]) for sample in samples])}
