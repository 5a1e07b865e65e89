"""Rows of a pool that look wrong, by one pass of an untuned model (row_figures.py) and by their text."""

import unicodedata
from collections import Counter

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors

# What is wrong with a row, in the order of the list; one that has several faults is listed under the first.
KINDS = {
    "stock answer": "the same answer stands behind several prompts",
    "other language": "the answer is in another script than most",
    "cut off": "the answer breaks off",
    "unexplained": "the answer is no more likely with its prompt than without it: perhaps another row's",
    "far from all": "unlike every other row",
    "copy": "the same row stands earlier",
    "near copy": "almost the same row stands earlier",
}
# Held-out log likelihood of 60 rows of pools of 1,000, in nats a response token (data/results/worth_go_biology), with
# 95 % intervals.
_OTHER_TASK = "gained 0.055 (0.027 to 0.087) where 30 % were of another task"
_GAINS = {
    "stock answer": "selection.mode=recommended gained 0.117 (0.087 to 0.152) where 30 % were",
    "other language": f"selection.mode=recommended {_OTHER_TASK}",
    "cut off": "choosing none of them gained 0.036 (0.026 to 0.048) where 30 % were",
    "unexplained": "selection.mode=recommended was +0.019 (−0.006 to 0.039) from Random where 30 % were wrong, and "
    f"{_OTHER_TASK}: read them and mend them",
    "copy": "selection.mode=recommended gained 0.045 (0.012 to 0.080) where 50 % were",
}
_GAINS["near copy"] = _GAINS["copy"]
_NO_GAIN = "on a clean pool --method rs2, which costs nothing, gained 0.037 (0.017 to 0.054), and more rows gain most"
# The same on pools of Kazakh to English (data/results/worth_kazakh_english).
_UNREAD = (
    "this model cannot judge the rows; on such ones selection.mode=recommended gained 0.237 (0.197 to 0.281) where "
    "30 % were stock answers, 0.073 (0.045 to 0.101) where 30 % were answers of other rows and 0.064 (0.033 to 0.094) "
    "on a clean pool"
)
_FEW = 0.05  # share of rows below which a fault is too rare to gain by
_STOCK = 3  # rows with other prompts that share an answer
_LABELS = 0.5  # share of rows with such answers, from which on these are labels and none is suspect
_ALIKE = 0.9  # cosine of two rows' words
_END, _CLOSING = ".!?…。！？।؟", "\"'”’»)]*`"  # signs that end a text, and what may stand after them
_MOST_END = 0.9  # share of answers that do, from which on one that does not is suspect
_BROKEN = 0.25  # quantile of the end loss of answers cut in half, above which one without such a sign is suspect
_NOT_TOLD = 0.5  # rows that look faulty, as a share of those with the fault put in that do: from here on none is listed
_FAR = 5.0  # deviations of the distance to the nearest rows, in medians


def possible_gain(counts: dict[str, int], rows: int, tried: dict[str, list[float]]) -> str:
    """What selection can gain on a pool with `counts` of suspects by kind among its `rows`, from what was measured;
    `tried` as `find_suspects` gives it."""
    if "unexplained" in tried and not _told(*tried["unexplained"]):
        return _UNREAD
    shares = {kind: counts.get(kind, 0) / rows for kind in _GAINS}
    kind = max(shares, key=shares.get)
    if shares[kind] < _FEW:
        return f"few rows are suspect: {_NO_GAIN}"
    return f"{shares[kind]:.0%} of the rows: {kind}; {_GAINS[kind]}"


def how_far_to_trust(tried: dict[str, list[float]]) -> str:
    """What `find_suspects` says of the faults that were tried, for people."""
    said = []
    for kind, (own, planted) in tried.items():
        if _told(own, planted):
            said.append(f"{kind}: the model finds {planted:.0%} of the answers in which that fault was put")
        else:
            why = "the model cannot judge these rows, or half of them are wrong"
            said.append(f"{kind}: none is listed, {own:.0%} look so, {planted:.0%} with that fault put in: {why}")
    return "; ".join(said)


def find_suspects(
    prompts: list[str], answers: list[str], columns: dict[str, np.ndarray]
) -> tuple[pd.DataFrame, dict[str, list[float]]]:
    """Suspect rows, worst first: `row`, `kind` (of KINDS), `also` (other kinds), `group` (the first row of copies and
    stock answers, else −1), and the figures loss, loss_without_prompt, unexplained (nats, summed over the response:
    above 0 the prompt does not help) and end_loss. And of the kinds that a model that does not know the task cannot
    judge: the share of answers that look so, and of answers that such a fault was put in. Where the first is half of
    the second or more, none is listed.

    Args: texts of N rows, and `row_figures`' columns of them.
    """
    unexplained = columns["n_response_tokens"] * (columns["loss"] - columns["loss_without_prompt"])
    stock, copy, near = _stock_answers(prompts, answers), *_copies(prompts, answers)
    swapped, own = columns["loss_swapped"] - columns["loss_without_prompt"], stock < 0
    cut, tried = _cut_off(answers, columns["end_loss"], columns["end_loss_cut"])
    tried["unexplained"] = [_share(unexplained[own] > 0), _share(swapped[own & np.isfinite(swapped)] > 0)]
    told = {kind: _told(*shares) for kind, shares in tried.items()}
    masks = {
        "stock answer": stock >= 0,
        "other language": _other_script(answers),
        "cut off": cut & told.get("cut off", True),
        "unexplained": (unexplained > 0) & told["unexplained"],
        "far from all": _far(columns["hidden_state"]),
        "copy": copy >= 0,
        "near copy": near >= 0,
    }
    found = np.column_stack([masks[kind] for kind in KINDS])
    rows, names = np.flatnonzero(found.any(1)), np.array(list(KINDS))
    table = pd.DataFrame({"row": rows, "kind": names[found[rows].argmax(1)]})
    table["also"], table["group"] = [names[found[row]][1:].tolist() for row in rows], -1
    for kind, first in {"stock answer": stock, "copy": copy, "near copy": near}.items():
        table.loc[table.kind == kind, "group"] = first[rows[table.kind == kind]]
    for name in ("loss", "loss_without_prompt", "end_loss"):
        table[name] = columns[name][rows]
    table["unexplained"] = unexplained[rows]
    order = table.kind.map(list(KINDS).index)
    return table.iloc[np.lexsort([-table.unexplained, order])].reset_index(drop=True), tried


def _plain(text: str) -> str:
    """Letters and digits alone, in lower case, with single spaces."""
    kept = (c if c.isalnum() else " " for c in unicodedata.normalize("NFKC", text).lower())
    return " ".join("".join(kept).split())


def _first_of(keys: list) -> np.ndarray:
    """The number of the first row with the same key (N,); −1 for the first itself."""
    first: dict = {}
    rows = np.array([first.setdefault(key, number) for number, key in enumerate(keys)])
    return np.where(rows == np.arange(len(keys)), -1, rows)


def _stock_answers(prompts: list[str], answers: list[str]) -> np.ndarray:
    """The first row with the answer (N,), for answers behind at least _STOCK different prompts; else −1. Where most
    answers are such ones, as yes and no, −1 throughout."""
    plain = [_plain(answer) for answer in answers]
    behind: dict[str, set[str]] = {}
    for prompt, answer in zip(prompts, plain, strict=True):
        behind.setdefault(answer, set()).add(_plain(prompt))
    first = {answer: plain.index(answer) for answer, own in behind.items() if len(own) >= _STOCK}
    found = np.array([first.get(answer, -1) for answer in plain])
    return found if np.mean(found >= 0) < _LABELS else np.full(len(found), -1)


def _copies(prompts: list[str], answers: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """For each row the earlier row that it repeats (N,), exactly and nearly; −1 where it repeats none."""
    pairs = list(zip(prompts, answers, strict=True))
    exact, near = _first_of(pairs), np.full(len(pairs), -1)
    rest = np.flatnonzero(exact < 0)
    texts = [_plain(" ".join(pairs[row])) for row in rest]
    try:
        words = TfidfVectorizer(token_pattern=r"\S+", ngram_range=(1, 2), binary=True).fit_transform(texts)
    except ValueError:  # no word in any row
        return exact, near
    graph = NearestNeighbors(radius=1 - _ALIKE, metric="cosine").fit(words).radius_neighbors_graph()
    _, group = connected_components(graph, directed=False)
    near[rest] = [-1 if first < 0 else rest[first] for first in _first_of(group.tolist())]
    return exact, near


def _cut_off(
    answers: list[str], end_loss: np.ndarray, end_loss_cut: np.ndarray
) -> tuple[np.ndarray, dict[str, list[float]]]:
    """Answers without a sign that ends a text, where most have one; elsewhere those of them whose end the model expects
    as little as that of most answers cut in half, and what `find_suspects` says of this trial."""
    ends = np.array([answer.rstrip().rstrip(_CLOSING)[-1:] in _END for answer in answers])  # an empty one ends
    if ends.mean() >= _MOST_END:
        return ~ends, {}
    halves = end_loss_cut[np.isfinite(end_loss_cut)]
    if not len(halves):  # answers of one token
        return np.zeros_like(ends), {}
    broken = end_loss > np.quantile(halves, _BROKEN)
    return ~ends & broken, {"cut off": [_share(broken), 1 - _BROKEN]}


def _told(own: float, planted: float) -> bool:
    return own < _NOT_TOLD * planted


def _share(found: np.ndarray) -> float:
    return round(float(np.mean(found)), 3) if len(found) else 0.0


def _other_script(answers: list[str]) -> np.ndarray:
    """Answers whose letters are mostly of another script than those of most answers."""

    def script(text: str) -> str:
        letters = Counter(unicodedata.name(c, "").partition(" ")[0] for c in text[:1000] if c.isalpha())
        return letters.most_common(1)[0][0] if letters else ""

    scripts = [script(answer) for answer in answers]
    usual, count = Counter(filter(None, scripts)).most_common(1)[0] if any(scripts) else ("", 0)
    return np.array([bool(own) and own != usual for own in scripts]) & (count > len(answers) / 2)


def _far(hidden: np.ndarray) -> np.ndarray:
    """Rows whose mean distance to their five nearest is far above the usual one, or not finite."""
    known = np.isfinite(hidden).all(1)
    far, count = ~known, min(5, known.sum() - 1)
    if count < 1:
        return far
    distances, _ = NearestNeighbors(n_neighbors=count, metric="cosine").fit(hidden[known]).kneighbors()
    distance = distances.mean(1)
    middle = np.median(distance)
    far[known] = distance > middle + _FAR * np.median(np.abs(distance - middle)) * 1.4826
    return far
