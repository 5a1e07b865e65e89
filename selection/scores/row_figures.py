"""Figures of every row from one pass of an untuned model: effort, loss with and without the prompt, hidden state."""

import numpy as np

from selection.method.effort import IGNORED_LABEL, EffortScorer, plan_batches, tokens_per_batch
from selection.run.device import choose_precision
from selection.run.errors import refusals
from selection.run.log import progress_bar
from selection.run.model_folder import model_path
from selection.scores.losses import losses_without_prompt
from selection.scores.models import load_for_scoring

_COLUMNS = ("el2n", "entropy", "hidden_state")
_Sample = tuple[tuple[int, ...], tuple[int, ...]]  # token ids and labels


def load_row_scorer(model: str, precision: str) -> EffortScorer:
    """The untuned `model`, a folder or hub name, for `row_figures`; `precision` as in Selection. Raises: UserError."""
    return EffortScorer(load_for_scoring(model_path(model), None, choose_precision(precision)), columns=_COLUMNS)


def row_figures(
    tokenised, scorer: EffortScorer, around: tuple[list[int], list[int]], known: dict[_Sample, dict] | None = None
) -> dict[str, np.ndarray]:
    """Figures (N,) of each row by name; hidden_state (N, d). Equal rows are scored once.

    Args: `tokenised` as `tokenised_rows` makes it; `scorer` of `load_row_scorer`; `around`: `empty_turn`'s tokens;
    `known`: rows that were scored before, which grows. Beside the scorer's columns:
        loss_without_prompt: mean loss of the response behind an empty prompt, in nats a token;
        end_loss: loss of the template's tokens after the response, in nats, all together, in the same pass: high where
            an answer breaks off; 0 where cutoff_len has cut them;
        n_response_tokens.
    """
    known, budget = {} if known is None else known, tokens_per_batch("v_lora_b", scorer.device)
    after, end = around[1], max(1, len(around[1]))
    samples = [(tuple(row["input_ids"]), tuple(row["labels"])) for row in tokenised]
    responses = {sample: [label for label in sample[1] if label != IGNORED_LABEL] for sample in samples}
    missing = [sample for sample in responses if sample not in known]
    with progress_bar(total=len(missing), unit="samples", desc="figures") as progress:
        for numbers in plan_batches(range(len(missing)), [len(ids) for ids, _ in missing], budget):
            batch = [missing[number] for number in numbers]
            ids, labels = zip(*batch, strict=True)
            with refusals():
                figures = scorer.score(ids, labels)
            figures |= losses_without_prompt(scorer.model, labels, around)
            for number, sample in enumerate(batch):
                known[sample] = {name: values[number].cpu().numpy() for name, values in figures.items()}
            progress.update(len(batch))
    columns = {name: np.array([known[sample][name] for sample in samples]) for name in known[samples[0]]}
    columns["end_loss"] *= [list(ids[-end:]) == after for ids, _ in samples]
    return columns | {"n_response_tokens": np.array([len(responses[sample]) for sample in samples])}
