"""What lm_eval calls in an exported task: copied beside the task's files with comparable.py, alone there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from comparable import comparable_scores


def context(row: dict) -> str:
    """The prompt but for its last word."""
    return row["prompt"][: _last_word(row["prompt"])]


def continuations(row: dict) -> list[str]:
    """The prompt's last word, and that with the response behind: the difference is the response's log likelihood.

    lm_eval counts blanks at the end of a prompt as response; these it counts in both."""
    word = row["prompt"][_last_word(row["prompt"]) :]
    return [word, word + row["response"]]


def _last_word(prompt: str) -> int:
    words = prompt.rstrip()
    return max(words.rfind(" "), words.rfind("\n"), 0) + 1


def nll(row: dict, results: list[tuple[float, bool]]) -> dict[str, float]:
    (word, _), (both, _) = results
    return {"nll": (word - both) / row["tokens"]}


def answer_scores(row: dict, results: list[str]) -> dict:
    """ROUGE of one answer in percent, and what corpus BLEU is made of."""
    overall, _ = comparable_scores(results, [row["answer"]])
    return {"rouge_score-l": overall["rouge_score-l"], "bleu": (row["answer"], results[0])}
