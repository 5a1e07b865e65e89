"""How far two sets of scores agree: their ranks, the strata cut from them, and the coresets that follow."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import adjusted_rand_score, rand_score

from selection.method.staff import choose_staff, coreset_size, stratify
from selection.run.errors import UserError, refusals
from selection.scores.folder import Scores

_SHUFFLES = 10  # of B's scores, to measure what two of STAFF's coresets share because one seed draws both


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two (n,) arrays, ties at their mean rank; nan where one of them is constant."""
    a, b = np.asarray(a), np.asarray(b)
    if len(a) < 2 or (a == a[0]).all() or (b == b[0]).all():
        return float("nan")
    return float(spearmanr(a, b).statistic)


def partial_spearman(a: np.ndarray, b: np.ndarray, given: np.ndarray) -> float:
    """Rank correlation of `a` and `b`, (n,) each, with `given` held fixed: Pearson's r of what a linear regression on
    the ranks of `given` leaves of the ranks of each, (r_ab − r_ac·r_bc) / √((1 − r_ac²)·(1 − r_bc²)).

    nan where an array is constant, or where `given` explains one of the other two wholly.
    """
    r_ab, r_ac, r_bc = spearman(a, b), spearman(a, given), spearman(b, given)
    if not min(1 - r_ac**2, 1 - r_bc**2) > 1e-12:  # rounding alone would make a correlation of it
        return float("nan")
    return float(np.clip((r_ab - r_ac * r_bc) / np.sqrt((1 - r_ac**2) * (1 - r_bc**2)), -1, 1))


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


def _common_rows(a: Scores, b: Scores) -> tuple[Scores, Scores]:
    """Both, cut to the rows that both have. Raises: UserError where there is none, or they are of different data."""
    if a.fingerprint != b.fingerprint and None not in (a.fingerprint, b.fingerprint):
        raise UserError(f"{a.source} and {b.source} are scores of different data (fingerprints differ)")
    rows = np.intersect1d(a.index, b.index, assume_unique=True)
    if not len(rows):
        raise UserError(f"{a.source} and {b.source} have no row in common: give two scores of the same data")
    ids = [None if each.ids is None else np.array(each.ids)[each.positions(rows)] for each in (a, b)]
    a, b = a.only(rows), b.only(rows)
    tokens = [each.columns.get("n_response_tokens") for each in (a, b)]
    for name, (of_a, of_b) in {"id": ids, "n_response_tokens": tokens}.items():
        if of_a is None or of_b is None:
            continue
        if len(different := np.flatnonzero(np.array(of_a) != np.array(of_b))):
            in_a, in_b = (str(values[different[0]]).removesuffix(".0") for values in (of_a, of_b))
            raise UserError(
                f"row {rows[different[0]]} has {name} {in_a} in {a.source} and {in_b} in {b.source} "
                f"({len(different)} such rows in all): they are scores of different data"
            )
    return a, b


def agreement(a: Scores, b: Scores, rates: list[float], num_strata: int, hardest_cutoff: float, seed: int) -> Agreement:
    """Cut strata and coresets from the common rows, STAFF's by the published rule without V_i and with one seed.

    Args: two sets of scores, with the column n_response_tokens where it is known; the rest as in the configuration.
    Raises: UserError for scores of different data and rates that keep no row.
    """
    a, b = _common_rows(a, b)
    num_rows, rng = len(a.index), np.random.default_rng(seed)
    efforts = [a.effort, b.effort, *(rng.permutation(b.effort) for _ in range(_SHUFFLES))]
    with refusals():
        strata = [stratify(effort, num_strata, hardest_cutoff) for effort in efforts]
        sizes = [coreset_size(rate, num_rows) for rate in rates]
    overlaps = []
    for rate, m in zip(rates, sizes, strict=True):
        highest = [np.argsort(-effort, kind="stable")[:m] for effort in (a.effort, b.effort)]
        of_a, of_b, *of_shuffled = (
            choose_staff(effort, each, [None] * len(each.members), m, "paper", seed).rows
            for effort, each in zip(efforts, strata, strict=True)
        )
        by_chance = float(np.mean([overlap(of_a, rows) for rows in of_shuffled]))
        overlaps.append(Overlap(rate, m, overlap(*highest), overlap(of_a, of_b), by_chance))
    groups = np.full((2, num_rows), -1)  # number of each row's stratum; −1 for the hardest
    for group, each in zip(groups, strata[:2], strict=True):
        for number, rows in enumerate(each.members):
            group[rows] = number
    known = [scores.columns["n_response_tokens"] for scores in (a, b) if "n_response_tokens" in scores.columns]
    return Agreement(
        num_rows=num_rows,
        spearman=spearman(a.effort, b.effort),
        partial_spearman=partial_spearman(a.effort, b.effort, known[0]) if known else None,
        rand_index=float(rand_score(*groups)),
        adjusted_rand_index=float(adjusted_rand_score(*groups)),
        overlaps=overlaps,
    )


def overlap(rows: np.ndarray, others: np.ndarray) -> float:
    """|A ∩ B| / m of two coresets of m rows."""
    return len(np.intersect1d(rows, others, assume_unique=True)) / len(rows)
