"""How far two sets of scores agree: their ranks, the strata cut from them, and the coresets that follow."""

from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import adjusted_rand_score, rand_score

from selection.method.staff import Strata, choose_staff, coreset_size, stratify
from selection.run.errors import UserError, refusals
from selection.scores.folder import Scores


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two (n,) arrays, ties at their mean rank; nan where one of them is constant."""
    if len(a) < 2 or _is_constant(a) or _is_constant(b):
        return float("nan")
    return float(spearmanr(a, b).statistic)


def partial_spearman(a: np.ndarray, b: np.ndarray, given: np.ndarray) -> float:
    """Rank correlation of `a` and `b`, (n,) each, with `given` held fixed: Pearson's r of what a linear regression on
    the ranks of `given` leaves of the ranks of each, (r_ab − r_ac·r_bc) / √((1 − r_ac²)·(1 − r_bc²)).

    nan where an array is constant, or where `given` explains one of the other two wholly.
    """
    r_ab, r_ac, r_bc = spearman(a, b), spearman(a, given), spearman(b, given)
    unexplained = (1 - r_ac**2) * (1 - r_bc**2)
    if not min(1 - r_ac**2, 1 - r_bc**2) > 1e-12:  # rounding alone would make a correlation of it
        return float("nan")
    return float(np.clip((r_ab - r_ac * r_bc) / np.sqrt(unexplained), -1, 1))


def _is_constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())


# STAFF draws inside a stratum; how much two coresets share because both are drawn with one seed is no rate, so it is
# measured.
_SHUFFLES = 10


@dataclass(frozen=True)
class Overlap:
    """|A ∩ B| / m of two coresets of m rows at one rate. By chance the highest scores share the rate."""

    rate: float
    m: int
    highest: float  # of the m highest scores (of equal ones the earlier row)
    staff: float  # of STAFF's coresets without verification
    staff_by_chance: float  # the same after B's scores were shuffled, mean of `_SHUFFLES`


@dataclass(frozen=True)
class Agreement:
    """Of two sets of scores, over the rows that both have."""

    num_rows: int
    spearman: float
    partial_spearman: float | None  # number of response tokens held fixed; None: neither knows it
    rand_index: float  # of the strata, the dropped hardest rows as a group of their own
    adjusted_rand_index: float
    overlaps: list[Overlap]


def common_rows(a: Scores, b: Scores) -> tuple[Scores, Scores]:
    """Both, cut to the rows that both have.

    Raises: UserError where they are of different data (by fingerprint or row id), share no row, or differ in
    n_response_tokens where both have it.
    """
    if a.fingerprint != b.fingerprint and None not in (a.fingerprint, b.fingerprint):
        raise UserError(f"{a.source} and {b.source} are scores of different data (fingerprints differ)")
    rows, in_a, in_b = np.intersect1d(a.index, b.index, assume_unique=True, return_indices=True)
    if not len(rows):
        raise UserError(f"{a.source} and {b.source} have no row in common: give two scores of the same data")
    a, b = _only(a, in_a), _only(b, in_b)
    if a.ids is not None and b.ids is not None:
        _refuse_difference(a, b, np.array(a.ids), np.array(b.ids), "id")
    if "n_response_tokens" in a.columns and "n_response_tokens" in b.columns:
        name = "n_response_tokens"
        _refuse_difference(a, b, a.columns[name].astype(int), b.columns[name].astype(int), name)
    return a, b


def _only(scores: Scores, positions: np.ndarray) -> Scores:
    return replace(
        scores,
        index=scores.index[positions],
        columns={name: values[positions] for name, values in scores.columns.items()},
        ids=None if scores.ids is None else [scores.ids[i] for i in positions],
    )


def _refuse_difference(a: Scores, b: Scores, of_a: np.ndarray, of_b: np.ndarray, name: str) -> None:
    if len(different := np.flatnonzero(of_a != of_b)):
        i = different[0]
        raise UserError(
            f"row {a.index[i]} has {name} {of_a[i]} in {a.source} and {of_b[i]} in {b.source} "
            f"({len(different)} such rows in all): they are scores of different data"
        )


def agreement(a: Scores, b: Scores, rates: list[float], num_strata: int, hardest_cutoff: float, seed: int) -> Agreement:
    """Args: two sets of scores, with the column n_response_tokens where it is known; the rest as in the configuration.

    Strata and coresets are cut from the common rows alone. STAFF's coresets are the published ones with every V_i
    left out, so that nothing but the scores tells them apart; both are drawn with the same seed.
    """
    a, b = common_rows(a, b)
    known = [scores.columns["n_response_tokens"] for scores in (a, b) if "n_response_tokens" in scores.columns]
    rng = np.random.default_rng(seed)
    efforts = [a.effort, b.effort, *(rng.permutation(b.effort) for _ in range(_SHUFFLES))]
    with refusals():
        strata = [stratify(effort, num_strata, hardest_cutoff) for effort in efforts]
        sizes = [coreset_size(rate, len(a.index)) for rate in rates]
    overlaps = []
    for rate, m in zip(rates, sizes, strict=True):
        highest = [np.argsort(-effort, kind="stable")[:m] for effort in (a.effort, b.effort)]
        of_a, of_b, *of_shuffled = (
            choose_staff(effort, each, [None] * len(each.members), m, "paper", seed).rows
            for effort, each in zip(efforts, strata, strict=True)
        )
        by_chance = float(np.mean([overlap(of_a, rows) for rows in of_shuffled]))
        overlaps.append(Overlap(rate, m, overlap(*highest), overlap(of_a, of_b), by_chance))
    groups = [_stratum_of_each_row(each, len(a.index)) for each in strata[:2]]
    return Agreement(
        num_rows=len(a.index),
        spearman=spearman(a.effort, b.effort),
        partial_spearman=partial_spearman(a.effort, b.effort, known[0]) if known else None,
        rand_index=float(rand_score(*groups)),
        adjusted_rand_index=float(adjusted_rand_score(*groups)),
        overlaps=overlaps,
    )


def overlap(rows: np.ndarray, others: np.ndarray) -> float:
    """|A ∩ B| / m of two coresets of m rows."""
    return len(np.intersect1d(rows, others, assume_unique=True)) / len(rows)


def _stratum_of_each_row(strata: Strata, num_rows: int) -> np.ndarray:
    """(N,) the number of the stratum; −1 for the hardest rows, which are in none."""
    stratum = np.full(num_rows, -1)
    for i, rows in enumerate(strata.members):
        stratum[rows] = i
    return stratum


def format_agreement(result: Agreement) -> str:
    partial = "unknown" if result.partial_spearman is None else f"{result.partial_spearman:.4f}"
    lines = [
        f"{'rows with both scores':<48}{result.num_rows}",
        f"{'Spearman':<48}{result.spearman:.4f}",
        f"{'Spearman, number of response tokens held fixed':<48}{partial}",
        f"{'Rand index of the strata':<48}{result.rand_index:.4f}",
        f"{'adjusted Rand index':<48}{result.adjusted_rand_index:.4f}",
        "",
        "overlap of the coresets, |A ∩ B| / m, and by chance (STAFF without verification: B's scores shuffled)",
        f"{'rate':>6}{'m':>9}{'highest scores':>17}{'by chance':>12}{'STAFF':>12}{'by chance':>12}",
    ]
    for o in result.overlaps:
        lines.append(f"{o.rate:>6g}{o.m:>9}{o.highest:>17.3f}{o.rate:>12.3f}{o.staff:>12.3f}{o.staff_by_chance:>12.3f}")
    return "\n".join(lines)
