"""STAFF in one call, for models and a data set in memory: the stages' own functions without files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from selection.method.effort import IGNORED_LABEL, EffortScorer, tokens_per_batch
from selection.method.staff import coreset_size
from selection.run.config import Selection, validated
from selection.run.errors import UserError, refusals
from selection.scores.folder import Scores
from selection.scores.verification import Settings, cut_strata, draw, explain, staff_rule, verify
from selection.scores.within_memory import score_within_memory


@dataclass(frozen=True)
class Selected:
    """A coreset of m of N rows, and why."""

    rows: Dataset  # the chosen rows, in the data set's order
    indices: np.ndarray  # (m,) their numbers in the data set, ascending
    reasons: list[str]  # (N,) why each row of the data set was chosen or not
    strata: np.ndarray  # (N,) stratum of each row; −1 for the hardest, which are in none
    verification_ratios: list[float | None]  # (K,) V_i; None where nothing was verified
    effort: np.ndarray  # (N,) effort scores of the small model


def select_coreset(
    dataset: Dataset, small: nn.Module, target: nn.Module, rate: float, tokenizer=None, cutoff_len=1024, **settings
) -> Selected:
    """Choose ⌊rate · N⌋ rows of `dataset` by STAFF (Algorithm 1).

    Args:
        dataset: with columns input_ids and labels (−100 on the prompt), or, with a `tokenizer`, prompt and completion
            (text), or messages (role and content; the last one is the response).
        small, target: the model tuned on the data set, and the one to be tuned, of the same tokens. Both get frozen.
        settings: keys of `selection:` in a YAML, such as num_strata, verify_per_stratum, mode, phi, seed.
    Raises: UserError for a wrong setting, and for rows without a response or without a finite score."""
    chosen = validated(Selection(), settings | {"rates": [rate]}, "select_coreset")
    if unknown := {"hidden_state", "loss_untuned"} & set(Settings.of(chosen).columns):
        raise UserError(f"select_coreset has no {min(unknown)} of the rows: leave within_stratum and hardest_by out")
    if chosen.leave_out != "none" or chosen.mode == "recommended":
        what = "leave_out and mode recommended read the list in a run folder"
        raise UserError(f"{what}: take the rows out of the data set instead")
    tokens, rules, every = tokens_of(dataset, tokenizer, cutoff_len), Settings.of(chosen), np.arange(len(dataset))
    with refusals():
        speculative = _scores(small, tokens, every, chosen, "the small model")
        strata = cut_strata(speculative.effort, rules)
        verified = every if rules.verify == "all" else np.sort(np.concatenate(draw(strata, rules)))
        records = verify(speculative.effort, _scores(target, tokens, verified, chosen, "the target"), rules, strata)
        ratios = [record.verification_ratio for record in records]
        choice = staff_rule(speculative, strata, records, rules)(coreset_size(rate, len(dataset)), None)
    numbers = np.full(len(dataset), -1)
    for stratum, members in enumerate(strata.members):
        numbers[members] = stratum
    reasons = explain(choice, strata, len(dataset), rules).tolist()
    return Selected(dataset.select(choice.rows), choice.rows, reasons, numbers, ratios, speculative.effort)


def _scores(model: nn.Module, tokens: list[tuple], rows: np.ndarray, selection: Selection, who: str) -> Scores:
    """Effort scores of `rows`."""
    scorer = EffortScorer(model, selection.phi, selection.phi_rank, selection.phi_alpha, selection.seed)
    scorer.largest_batch = selection.tokens_per_batch or tokens_per_batch(selection.phi, scorer.device)
    names = [f"row {row} of the data set" for row in rows]
    ids, labels = ([tokens[row][part] for row in rows] for part in (0, 1))
    effort = score_within_memory(scorer, ids, labels, names)["effort"].numpy() if len(rows) else np.empty(0)
    if len(wild := np.flatnonzero(~np.isfinite(effort))):
        raise UserError(f"{names[wild[0]]}: its score by {who} is not finite: remove the row")
    columns = {"effort": effort, "n_response_tokens": np.array([_responses(tokens[row][1]) for row in rows])}
    return Scores(rows, columns, ids=None, fingerprint=None, num_rows=len(tokens), source=f"scores of {who}")


def _responses(labels: Sequence[int]) -> int:
    return sum(label != IGNORED_LABEL for label in labels[1:])  # nothing predicts the first token


def tokens_of(dataset: Dataset, tokenizer: Any, cutoff_len: int) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each row, cut at `cutoff_len`. Raises: UserError naming the row."""
    columns = set(dataset.column_names)
    if "input_ids" not in columns and (tokenizer is None or not columns & {"prompt", "messages"}):
        raise UserError("give input_ids and labels, or a tokenizer and prompt and completion, or messages")
    tokens = []
    for number, row in enumerate(dataset):
        if "input_ids" in columns:
            ids, labels = row["input_ids"], row["labels"]
        else:
            prompt, ids = _prompt_and_all(row, tokenizer, number)
            labels = [IGNORED_LABEL] * len(prompt) + ids[len(prompt) :]
        tokens.append((ids[:cutoff_len], labels[:cutoff_len]))
        if not _responses(tokens[-1][1]):
            raise UserError(f"row {number} of the data set: cutoff_len {cutoff_len} leaves no response token")
    return tokens


def _prompt_and_all(row: dict, tokenizer: Any, number: int) -> tuple[list[int], list[int]]:
    if "messages" in row:
        turns, template = row["messages"], tokenizer.apply_chat_template
        prompt = template(turns[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = template(turns, return_dict=True)["input_ids"]
        if ids[: len(prompt)] != prompt:
            raise UserError(f"row {number} of the data set: the chat template changes the prompt once it is answered")
        return prompt, ids
    prompt = tokenizer(row["prompt"])["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return prompt, prompt + tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + end
