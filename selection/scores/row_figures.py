"""Figures of every row from one pass of an untuned model: effort, loss with and without the prompt, hidden state."""

import numpy as np

from selection.method.effort import IGNORED_LABEL, EffortScorer, plan_batches, tokens_per_batch
from selection.method.length_control import length_residual
from selection.run.errors import refusals
from selection.run.log import progress_bar
from selection.scores.losses import losses_without_prompt

COLUMNS = ("el2n", "entropy", "hidden_state")  # that the scorer has to be made with
_Sample = tuple[tuple[int, ...], tuple[int, ...]]  # token ids and labels


def row_figures(
    tokenised, scorer: EffortScorer, around: tuple[list[int], list[int]], known: dict[_Sample, dict] | None = None
) -> dict[str, np.ndarray]:
    """Figures (N,) of each row by name; hidden_state (N, d). Equal rows are scored once.

    Args: `tokenised` as `tokenised_rows` makes it; `scorer` made with COLUMNS; `around`: `empty_turn`'s tokens;
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


def suspicions(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores (N,) of `row_figures` by name, each so that a higher one is more suspect."""
    tokens, unexplained = columns["n_response_tokens"], columns["loss"] - columns["loss_without_prompt"]
    hidden = columns["hidden_state"] / np.linalg.norm(columns["hidden_state"], axis=1, keepdims=True)
    nearest = hidden @ hidden.T
    np.fill_diagonal(nearest, -1)
    with refusals():
        without_length = length_residual(columns["effort"], tokens)
    return {
        "effort": columns["effort"],
        "effort, length held fixed": without_length,
        "EL2N": columns["el2n"],
        "entropy": columns["entropy"],
        "loss": columns["loss"],
        "IFD": np.exp(unexplained),  # Li et al. 2024 (2402.00530): perplexity with the prompt / without it
        "loss difference, summed over tokens": tokens * unexplained,
        "loss of the end": columns["end_loss"],
        "response tokens": tokens,
        "similarity to the nearest row": nearest.max(1),
        "distance from the mean row": -(hidden @ hidden.mean(0)),
    }
