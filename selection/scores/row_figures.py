"""Figures of every row from one pass of an untuned model: effort, loss with and without the prompt, hidden state."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from selection.method.effort import IGNORED_LABEL, EffortScorer, plan_batches, response_losses, tokens_per_batch
from selection.run.device import choose_precision
from selection.run.ledger import Cost
from selection.run.log import progress_bar
from selection.run.model_folder import model_path
from selection.scores.losses import losses_without_prompt
from selection.scores.models import load_for_scoring
from selection.scores.within_memory import score_within_memory

_COLUMNS = ("el2n", "entropy", "hidden_state")
TRIED = 100  # rows whose answers are tried with a planted fault: the share that shows it is known to 0.1 (95 %)
_Sample = tuple[tuple[int, ...], tuple[int, ...]]  # token ids and labels


class RowScorer(EffortScorer):
    """An EffortScorer whose `score` also gives `losses_without_prompt`, these only under `reads` "alone"; under
    "faults" loss_swapped, of what it is given, and end_loss_cut alone, of the first halves of the responses."""

    around, reads = ([], []), "all"

    def score(self, input_ids, labels) -> dict[str, torch.Tensor]:
        if self.reads == "faults":
            swapped = response_losses(self.model, input_ids, labels).double()
            halves = [_first_half([label for label in own if label != IGNORED_LABEL], self.around[1]) for own in labels]
            cut = losses_without_prompt(self.model, halves, self.around)["end_loss"]
            return {"loss_swapped": swapped.cpu(), "end_loss_cut": cut.cpu()}
        scores = {} if self.reads == "alone" else super().score(input_ids, labels)
        losses = losses_without_prompt(self.model, labels, self.around)
        return scores | {name: values.cpu() for name, values in losses.items()}


def _first_half(response: list[int], after: list[int]) -> list[int]:
    """The first half of a response's tokens, with the template's `after` behind it; of one token, that token."""
    said = response[: -len(after)] if after and response[-len(after) :] == after else response
    return said[: max(1, len(said) // 2)] + after


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
        loss_swapped: what the loss would be behind another row's prompt; of several turns the first prompt alone is
            another's. Of at most TRIED rows of each call, drawn at random, whose prompts differ, else NaN;
        end_loss_cut: of the same rows, end_loss after the first half of the response; NaN where that is all of it;
        n_response_tokens.
    """
    known = {} if known is None else known
    scorer.around, scorer.reads = around, "all" if stored is None else "alone"
    after, end = around[1], max(1, len(around[1]))
    samples = [(tuple(row["input_ids"]), tuple(row["labels"])) for row in tokenised]
    responses = {sample: [label for label in sample[1] if label != IGNORED_LABEL] for sample in samples}
    first = {sample: row for row, sample in reversed(list(enumerate(samples)))}
    missing = [sample for sample in responses if sample not in known]
    with progress_bar(total=len(missing), unit="samples", desc="figures") as progress:
        for numbers, figures in _scored(scorer, missing, [first[sample] for sample in missing], len(samples)):
            batch = [missing[number] for number in numbers]
            if stored is not None:
                rows = [first[sample] for sample in batch]
                figures |= {name: torch.from_numpy(values[rows]) for name, values in stored.items()}
            if cost:
                cost.samples += len(batch)
                cost.tokens += sum(len(ids) for ids, _ in batch) if stored is None else 0
                cost.more_tokens += sum(len(around[0]) + len(responses[sample]) for sample in batch)
            for number, sample in enumerate(batch):
                known[sample] = {name: values[number].numpy() for name, values in figures.items()}
            progress.update(len(batch))
    columns = {name: np.array([known[sample][name] for sample in samples]) for name in known[samples[0]]}
    columns["end_loss"] *= [list(ids[-end:]) == after for ids, _ in samples]
    columns |= _with_faults(samples, scorer, cost)
    return columns | {"n_response_tokens": np.array([len(responses[sample]) for sample in samples])}


def _with_faults(samples: list[_Sample], scorer: RowScorer, cost: Cost | None) -> dict[str, np.ndarray]:
    """`row_figures`' loss_swapped and end_loss_cut."""
    scorer.reads, longest = "faults", max(len(ids) for ids, _ in samples)
    tried = np.random.default_rng(0).permutation(len(samples))[:TRIED]
    swapped = [
        _behind(samples[other], samples[row], longest) for row, other in zip(tried, np.roll(tried, 1), strict=True)
    ]
    responses = [[label for label in samples[row][1] if label != IGNORED_LABEL] for row in tried]
    halves = [_first_half(response, scorer.around[1]) for response in responses]
    columns = {name: np.full(len(samples), np.nan) for name in ("loss_swapped", "end_loss_cut")}
    for numbers, figures in _scored(scorer, swapped, tried, len(samples)):
        for name, values in columns.items():
            values[tried[numbers]] = figures[name].numpy()
    if cost:
        cost.more_tokens += sum(len(ids) for ids, _ in swapped)
        cost.more_tokens += sum(len(scorer.around[0]) + len(half) for half in halves)
    same = [sample == samples[row] for sample, row in zip(swapped, tried, strict=True)]
    columns["loss_swapped"][tried[same]] = np.nan
    columns["end_loss_cut"][tried[[half == whole for half, whole in zip(halves, responses, strict=True)]]] = np.nan
    return columns


def _behind(other: _Sample, own: _Sample, longest: int) -> _Sample:
    """The response of `own`, with all that stands after its beginning, behind the prompt of `other`, or its end where
    both have more than `longest` tokens: a model may have no more places."""

    def start(sample: _Sample) -> int:
        return next(place for place, label in enumerate(sample[1]) if label != IGNORED_LABEL)

    rest = own[0][start(own) :]
    prompt = other[0][max(0, start(other) + len(rest) - longest) : start(other)]
    return prompt + rest, (IGNORED_LABEL,) * len(prompt) + own[1][start(own) :]


def _scored(scorer: RowScorer, samples: list[_Sample], rows: Sequence[int], count: int) -> Iterator:
    """Batches of places in `samples` and their figures; `rows` of the `count` ones say in errors which they are."""
    lengths = [len(ids) for ids, _ in samples]
    for numbers in plan_batches(range(len(samples)), lengths, scorer.largest_batch):
        ids, labels = zip(*(samples[number] for number in numbers), strict=True)
        yield numbers, score_within_memory(scorer, ids, labels, [f"row {rows[n]} of {count}" for n in numbers])
