"""STAFF's arithmetic (arXiv 2410.01296): strata, verification ratios, budgets, coreset. Only numpy.

A *row* is a row number of the training split. Two modes run through this file: "paper" is what is published,
"released" is what the authors' code does; the README tabulates where they part.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from selection.run.errors import UserError

_CHUNK = 2**20  # rows worked on at a time where a whole array of results would be large

# One independent random stream per purpose: what is drawn in one place never shifts another.
_VERIFICATION, _WITHIN_STRATUM, _FILL, _RANDOM = range(4)


def _random_ranks(num_rows: int, seed: int, purpose: int) -> np.ndarray:
    """A random number in [0, 1) for each row: whatever the stratum, its rows are drawn lowest number first.

    So a row that moves to another stratum takes its luck along and leaves all other draws as they were; coresets from
    slightly different scores differ slightly.
    """
    return np.random.default_rng([seed, purpose]).random(num_rows)


def lowest(values: np.ndarray, count: int) -> np.ndarray:
    """Which of `values` (n,) are the `count` lowest, of equal ones the earlier, NaN last: a mask (n,), in time O(n).

    All choices here are of this form, so nothing is sorted as a whole: 10⁸ rows are cut in seconds.
    """
    if count <= 0 or count >= len(values):
        return np.full(len(values), count > 0)
    threshold = np.partition(values, count - 1)[count - 1]
    chosen, ties = values < threshold, np.flatnonzero(values == threshold)
    if np.isnan(threshold):
        chosen, ties = ~np.isnan(values), np.flatnonzero(np.isnan(values))
    chosen[ties[: count - np.count_nonzero(chosen)]] = True
    return chosen


def floor_share(share: float, count: int) -> int:
    """⌊share · count⌋ in exact decimal arithmetic: 0.29 of 100 is 29, where floats give 28."""
    return math.floor(Fraction(str(share)) * count)


def coreset_size(rate: float, num_rows: int) -> int:
    """m = ⌊rate · N⌋; `rate` is the fraction kept, the paper's pruning rate is 1 − rate."""
    if not 0 < rate <= 1:
        raise UserError(f"rate {rate:g} is outside (0, 1]: give the fraction of the training split to keep")
    m = floor_share(rate, num_rows)
    if m == 0:
        raise UserError(f"rate {rate:g} of {num_rows} rows keeps none: give a rate of {1 / num_rows:.3g} or more")
    return m


def min_max_normalise(scores: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(scores − min) / (max − min) with the minimum and maximum of `reference`; all ones if they are equal."""
    low, high = float(np.min(reference)), float(np.max(reference))
    return (scores - low) / (high - low) if high > low else np.ones_like(scores, dtype=np.float64)


@dataclass(frozen=True)
class Strata:
    """The training split cut by speculative score. Stratum 0 has the lowest scores; none is empty."""

    members: list[np.ndarray]  # rows of each stratum, ascending
    score_ranges: list[tuple[float, float]]  # low (inclusive) and high edge of each, in units of the score
    hardest: np.ndarray  # rows dropped before stratifying, lowest score first

    @property
    def sizes(self) -> list[int]:
        return [len(rows) for rows in self.members]

    @property
    def num_rows(self) -> int:
        """N, the hardest included."""
        return sum(self.sizes) + len(self.hardest)

    def within(self, mask: np.ndarray) -> "Strata":
        """The same strata with only the rows in `mask` (N,); some may be empty, and come first in Algorithm 1."""
        members = [rows[mask[rows]] for rows in self.members]
        return Strata(members, self.score_ranges, self.hardest[mask[self.hardest]])


def stratify(scores: np.ndarray, num_strata: int, hardest_cutoff: float) -> Strata:
    """Step 3: drop the hardest ⌊hardest_cutoff · N⌋ rows, cut the rest into K equal-width score ranges.

    Args: scores (N,), any scale (equal-width cuts do not depend on it); K = `num_strata`.
    Of equal scores at the cut the earlier rows stay. Empty strata vanish.
    """
    num_kept = len(scores) - floor_share(hardest_cutoff, len(scores))
    if num_kept == 0:
        raise UserError(f"hardest_cutoff {hardest_cutoff:g} leaves none of {len(scores)} rows: give a smaller one")
    is_kept = lowest(scores, num_kept)
    kept, dropped = np.flatnonzero(is_kept), np.flatnonzero(~is_kept)
    hardest = dropped[np.argsort(scores[dropped], kind="stable")]
    kept_scores = scores[kept].astype(np.float64, copy=False)
    low, high = kept_scores.min(), kept_scores.max()
    num_strata = num_strata if high > low else 1
    edges = np.linspace(low, high, num_strata + 1)
    # In the smallest type that holds K: numpy sorts one or two bytes by radix, in time O(N).
    stratum = np.empty(num_kept, dtype=np.min_scalar_type(num_strata))
    for start in range(0, num_kept, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        stratum[chunk] = np.searchsorted(edges[1:-1], kept_scores[chunk], side="right")
    del kept_scores
    by_stratum = np.split(
        kept[np.argsort(stratum, kind="stable")], np.cumsum(np.bincount(stratum, minlength=num_strata))[:-1]
    )
    return Strata(
        members=[rows for rows in by_stratum if len(rows)],
        score_ranges=[(float(edges[i]), float(edges[i + 1])) for i, rows in enumerate(by_stratum) if len(rows)],
        hardest=hardest,
    )


def draw_verification_samples(
    strata: Strata, verify_per_stratum: int | list[int], mode: str, seed: int
) -> list[np.ndarray]:
    """Step 4: the rows B*_i of each stratum that the target scores; at most K · b_v in all.

    b_v = `verify_per_stratum` rows at random (or a number for each stratum; a larger one draws the same rows and more),
    or the whole stratum where it is smaller. Released: a stratum of at most b_v rows is not verified (an empty array).
    """
    draws, ranks = [], _random_ranks(strata.num_rows, seed, _VERIFICATION)
    counts = verify_per_stratum if isinstance(verify_per_stratum, list) else [verify_per_stratum] * len(strata.members)
    for rows, count in zip(strata.members, counts, strict=True):
        if mode == "released" and len(rows) <= count:
            draws.append(rows[:0])
        else:
            draws.append(rows[lowest(ranks[rows], count)])
    return draws


def verification_ratio(target_scores: np.ndarray, speculative_scores: np.ndarray) -> float:
    """V_i = Σ S^t_d / Σ S^s_d over the verified samples of stratum i, step 4 of the method.

    Both arrays are min–max normalised, so a stratum that holds nothing but the easiest row sums to 0 and says nothing
    about how the models compare: its ratio is 1, where the formula has none.
    """
    target, speculative = float(np.sum(target_scores)), float(np.sum(speculative_scores))
    return target / speculative if speculative > np.finfo(np.float32).tiny else 1.0


def smallest_first(sizes: list[int]) -> list[int]:
    """The order of Algorithm 1: strata by size, of equal ones the lower-scored first."""
    return sorted(range(len(sizes)), key=lambda i: (sizes[i], i))


def allocate_budgets(sizes: list[int], ratios: list[float | None], m: int, mode: str) -> list[int]:
    """Step 5: the budget m_i of each stratum, smallest stratum first; what one cannot use flows to the later ones.

    published: m_i = min(|B_i|, ⌊(m − |D'|) · V_i / (strata left)⌋)
    released:  m_i = min(|B_i|, ⌊(m − |D'|) · V_i / Σ_{strata left} V⌋); unverified (None): ⌊(m − |D'|) / (strata left)⌋
    An overshoot (published budgets follow the scale of V) is cut at m. The sum is at most m; the rest is filled at
    random by `choose_staff`.
    """
    budgets = [0] * len(sizes)
    order = smallest_first(sizes)
    remaining = m
    for position, i in enumerate(order):
        left = order[position:]
        if ratios[i] is None or mode == "paper":
            weight = (1.0 if ratios[i] is None else ratios[i]) / len(left)
        else:
            total = sum(ratios[j] for j in left if ratios[j] is not None)
            weight = ratios[i] / total if total > 0 else 1 / len(left)
        # The tiny factor keeps a whole number whole: 30 · (0.7 / 2.1) is 9.999… in floats.
        budgets[i] = min(sizes[i], remaining, math.floor(min(remaining * weight * (1 + 1e-12), m)))
        remaining -= budgets[i]
    return budgets


@dataclass
class Choice:
    """A coreset and how each stratum came by its part. Σ budgets + from_hardest = len(rows) = m."""

    rows: np.ndarray  # ascending
    budgets: list[int] = field(default_factory=list)  # rows taken from each stratum, the random fill included
    filled: list[int] = field(default_factory=list)  # of which by the random fill at the end
    from_hardest: int = 0
    fill: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # the rows of that fill, ascending


@dataclass(frozen=True)
class Quotas:
    """Of which data set each row is, and what part of a coreset each data set is to have."""

    names: list[str]
    quotas: list[float | None]  # fractions of m; None: shares with the others that have none
    num_rows: list[int]  # of each data set in the training split, with those that have no score
    data_set: np.ndarray  # (N,) number of each row's data set

    def record(self, chosen: np.ndarray) -> list[dict[str, Any]]:
        """For the coreset file, of each data set: name, rows in the training split, of which `chosen`, and quota."""
        counts = np.bincount(self.data_set[chosen], minlength=len(self.names)).tolist()
        return [
            {"name": name, "rows": rows, "chosen": count, "quota": quota}
            for name, rows, count, quota in zip(self.names, self.num_rows, counts, self.quotas, strict=True)
        ]


def shares(quotas: Quotas, m: int) -> list[tuple[list[int], int]]:
    """Data sets that are chosen from together, and how many of m rows come from them; the numbers sum to m.

    A data set with a quota stands alone and gives ⌊quota · m⌋ rows; those without give the rest together. Where every
    data set has one, the quotas sum to 1, and the rows that ⌊ ⌋ leaves over go to the largest fractions cut off.
    Raises: UserError where a data set has fewer rows than it is to give.
    """
    sizes = np.bincount(quotas.data_set, minlength=len(quotas.names)).tolist()
    given = {j: floor_share(quota, m) for j, quota in enumerate(quotas.quotas) if quota is not None}
    for j, count in given.items():
        if count > sizes[j]:
            raise UserError(
                f"quota {quotas.quotas[j]:g} of a coreset of {m} rows asks for {count} rows of data set "
                f"{quotas.names[j]}, which has {sizes[j]} to choose from: lower the quota or the rate"
            )
    free, left = [j for j in range(len(sizes)) if j not in given], m - sum(given.values())
    if not free:
        by_fraction = sorted(given, key=lambda j: (given[j] - Fraction(str(quotas.quotas[j])) * m, j))
        while left:
            for j in by_fraction:
                more = int(left > 0 and given[j] < sizes[j])
                given[j], left = given[j] + more, left - more
    elif left > (room := sum(sizes[j] for j in free)):
        raise UserError(
            f"the quotas leave {left} rows of a coreset of {m} to data set {', '.join(quotas.names[j] for j in free)}, "
            f"with {room} to choose from: raise the quotas or lower the rate"
        )
    return [([j], count) for j, count in given.items()] + ([(free, left)] if free else [])


def choose_by_rule(
    rule: Callable[[int, np.ndarray | None], Choice], rate: float, num_rows: int, quotas: Quotas | None
) -> Choice:
    """The coreset of a rule: m = ⌊rate · N⌋ rows, of all or, with quotas, data set by data set.

    `rule` takes m and a mask (N,) of the rows to choose from, None for all. Whatever it goes by (scores, strata, V_i,
    an order) is of all rows; only the choice, and the budgets of STAFF, CCS and Length, are made within a data set.
    """
    m = coreset_size(rate, num_rows)
    if quotas is None or not any(quotas.quotas):
        return rule(m, None)
    parts = [rule(count, np.isin(quotas.data_set, together)) for together, count in shares(quotas, m)]
    return Choice(
        np.sort(np.concatenate([part.rows for part in parts])),
        [sum(budgets) for budgets in zip(*(part.budgets for part in parts), strict=True)],
        [sum(filled) for filled in zip(*(part.filled for part in parts), strict=True)],
        sum(part.from_hardest for part in parts),
        np.sort(np.concatenate([part.fill for part in parts])),
    )


def choose_staff(
    scores: np.ndarray,
    strata: Strata,
    ratios: list[float | None],
    rate: float,
    mode: str,
    seed: int,
    quotas: Quotas | None = None,
) -> Choice:
    """Steps 5 and 6's input: budgets, then the rows of each stratum, then the random fill up to m.

    published: rows at random in the stratum; released: its highest scores (of equal ones the earlier row).
    The fill draws from the unchosen rows of all strata. Only where m is more than all strata hold (a rate above
    1 − hardest_cutoff, on which the paper is silent) rows come back from the hardest, the easiest of them first.
    """

    def rule(m: int, within: np.ndarray | None) -> Choice:
        there = strata if within is None else strata.within(within)
        return choose_within_strata(scores, there, allocate_budgets(there.sizes, ratios, m, mode), m, mode, seed)

    return choose_by_rule(rule, rate, len(scores), quotas)


def choose_within_strata(
    scores: np.ndarray, strata: Strata, budgets: list[int], m: int, mode: str, seed: int
) -> Choice:
    """`choose_staff` from given budgets on."""
    chosen = np.zeros(len(scores), dtype=bool)
    ranks = None if mode == "released" else _random_ranks(len(scores), seed, _WITHIN_STRATUM)
    for rows, budget in zip(strata.members, budgets, strict=True):
        chosen[rows[lowest(-scores[rows] if ranks is None else ranks[rows], budget)]] = True
    del ranks
    taken = [int(chosen[rows].sum()) for rows in strata.members]
    missing, filled, from_hardest, fill = m - sum(taken), [0] * len(taken), 0, np.empty(0, dtype=np.int64)
    if missing:
        unchosen = [rows[~chosen[rows]] for rows in strata.members]
        ends, unchosen = np.cumsum([len(rows) for rows in unchosen]), np.concatenate(unchosen)
        is_fill = lowest(_random_ranks(len(scores), seed, _FILL)[unchosen], missing)
        filled = [int(part.sum()) for part in np.split(is_fill, ends[:-1])]
        from_hardest = missing - sum(filled)
        fill = np.sort(unchosen[is_fill])
        chosen[fill] = True
        chosen[strata.hardest[:from_hardest]] = True
    budgets = [rows + extra for rows, extra in zip(taken, filled, strict=True)]
    return Choice(np.flatnonzero(chosen), budgets, filled, from_hardest, fill)


def random_keys(num_rows: int, seed: int) -> np.ndarray:
    """A random number for each row: the Random baseline takes the m lowest."""
    return _random_ranks(num_rows, seed, _RANDOM)


def choose_lowest(keys: np.ndarray, m: int, within: np.ndarray | None = None) -> Choice:
    """The m rows with the lowest `keys` (N,), of equal ones the earlier; `within`: of a mask (N,) alone."""
    if within is None:
        return Choice(rows=np.flatnonzero(lowest(keys, m)))
    rows = np.flatnonzero(within)
    return Choice(rows=rows[lowest(keys[rows], m)])


def choose_first(order: np.ndarray, m: int, within: np.ndarray | None = None) -> Choice:
    """The first m of all N rows in `order`; `within`: of a mask (N,) alone."""
    return Choice(rows=np.sort((order if within is None else order[within[order]])[:m]))
