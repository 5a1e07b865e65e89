"""How far two sets of scores agree: in rank, in strata, and in coresets."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import adjusted_rand_score, rand_score

from selection.method.staff import choose_staff, coreset_size, stratify
from selection.run.errors import UserError, refusals
from selection.scores.folder import Scores

_SHUFFLES = 10  # of B's scores, for the overlap by chance: one seed draws both coresets


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two (n,) arrays, ties at their mean rank; nan where one of them is constant."""
    if min(len(np.unique(a)), len(np.unique(b))) < 2:
        return float("nan")
    return float(spearmanr(a, b).statistic)


def partial_spearman(a: np.ndarray, b: np.ndarray, given: np.ndarray) -> float:
    """Rank correlation of `a` and `b`, (n,) each, `given` held fixed: (r_ab − r_ac·r_bc) / √((1 − r_ac²)(1 − r_bc²)).

    nan where an array is constant, or where `given` explains another one wholly."""
    r_ab, r_ac, r_bc = spearman(a, b), spearman(a, given), spearman(b, given)
    if not min(1 - r_ac**2, 1 - r_bc**2) > 1e-12:  # rounding alone would make a correlation of it
        return float("nan")
    return float(np.clip((r_ab - r_ac * r_bc) / np.sqrt((1 - r_ac**2) * (1 - r_bc**2)), -1, 1))


def correlation_interval(r: float, n: int, given: int = 0) -> tuple[float, float]:
    """95 % interval of a rank correlation `r` of n rows with `given` other columns held fixed: Fisher's z, with the
    standard error √((1 + r²/2) / (n − 3 − given)) of Bonett and Wright (2000). (nan, nan) below 10 rows."""
    if n < 10 or not np.isfinite(r):
        return float("nan"), float("nan")
    z, reach = np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12)), 1.96 * np.sqrt((1 + r**2 / 2) / (n - 3 - given))
    return float(np.tanh(z - reach)), float(np.tanh(z + reach))


@dataclass(frozen=True)
class Overlap:
    """|A ∩ B| / m of two coresets of m rows at one rate. By chance, the highest scores share `rate`."""

    rate: float
    m: int
    highest: float  # of the m highest scores; equal scores in row order
    staff: float  # of STAFF's coresets without verification
    staff_by_chance: float  # the same with B's scores shuffled, mean of `_SHUFFLES`


@dataclass(frozen=True)
class Agreement:
    """How far two sets of scores agree, over the rows that both have."""

    num_rows: int
    spearman: float
    partial_spearman: float | None  # with the number of response tokens held fixed; None where it is unknown
    rand_index: float  # of the strata; the dropped hardest rows are a group too
    adjusted_rand_index: float
    overlaps: list[Overlap]


def _common_rows(a: Scores, b: Scores) -> tuple[Scores, Scores]:
    """Both, cut to the rows that both have. Raises: UserError where there is none, or they are of different data."""
    if a.fingerprint != b.fingerprint and None not in (a.fingerprint, b.fingerprint):
        raise UserError(f"{a.source} and {b.source} are scores of different data (fingerprints differ)")
    rows = np.intersect1d(a.index, b.index, assume_unique=True)
    if not len(rows):
        raise UserError(f"{a.source} and {b.source} have no row in common: give two scores of the same data")
    for name in ("id", "n_response_tokens"):
        both = [each.ids if name == "id" else each.columns.get(name) for each in (a, b)]
        if any(values is None for values in both):
            continue
        in_a, in_b = (np.array(of)[each.positions(rows)] for of, each in zip(both, (a, b), strict=True))
        if len(different := np.flatnonzero(in_a != in_b)):
            first, second = (str(values[different[0]]).removesuffix(".0") for values in (in_a, in_b))
            where = f"row {rows[different[0]]} has {name} {first} in {a.source} and {second} in {b.source}"
            raise UserError(f"{where}: they are scores of different data")
    return a.only(rows), b.only(rows)


def agreement(a: Scores, b: Scores, rates: list[float], num_strata: int, hardest_cutoff: float, seed: int) -> Agreement:
    """Compare the common rows' scores, their strata, and coresets that STAFF's published rule cuts without V_i.

    Args: scores, with the column n_response_tokens where known; the rest as in the configuration.
    Raises: UserError for scores of different data and rates that keep no row."""
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
    groups = np.full((2, num_rows), -1)  # each row's stratum; −1 for the hardest
    for group, each in zip(groups, strata[:2], strict=True):
        for number, rows in enumerate(each.members):
            group[rows] = number
    tokens = (a.columns | b.columns).get("n_response_tokens")
    return Agreement(
        num_rows=num_rows,
        spearman=spearman(a.effort, b.effort),
        partial_spearman=None if tokens is None else partial_spearman(a.effort, b.effort, tokens),
        rand_index=float(rand_score(*groups)),
        adjusted_rand_index=float(adjusted_rand_score(*groups)),
        overlaps=overlaps,
    )


def overlap(rows: np.ndarray, others: np.ndarray) -> float:
    """|A ∩ B| / m of two coresets of m rows."""
    return len(np.intersect1d(rows, others, assume_unique=True)) / len(rows)
