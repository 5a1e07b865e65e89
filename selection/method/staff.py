"""STAFF's Algorithm 1 (arXiv 2410.01296): strata, verification ratios, budgets, coreset.

A *row* is a row number of the training split. `mode` is "paper" (as published) or "released" (as the authors' code).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

# One independent random stream per purpose: what is drawn in one place never shifts another.
VERIFICATION, WITHIN_STRATUM, FILL, RANDOM = range(4)


def random_ranks(num_rows: int, seed: int, purpose: int) -> np.ndarray:
    """A number in [0, 1) for each row; the lowest are drawn, so a row's stratum decides no other row's draw."""
    return np.random.default_rng([seed, purpose]).random(num_rows)


def lowest(values: np.ndarray, count: int) -> np.ndarray:
    """Mark the `count` lowest of `values` (n,), none NaN: a mask (n,), in O(n) time. Of equal values the earlier."""
    if count <= 0 or count >= len(values):
        return np.full(len(values), count > 0)
    threshold = np.partition(values, count - 1)[count - 1]
    chosen, ties = values < threshold, np.flatnonzero(values == threshold)
    chosen[ties[: count - np.count_nonzero(chosen)]] = True
    return chosen


def floor_share(share: float, count: int) -> int:
    """⌊share · count⌋ in exact decimal arithmetic: 0.29 of 100 is 29, where floats give 28."""
    return math.floor(Fraction(str(share)) * count)


def coreset_size(rate: float, num_rows: int) -> int:
    """m = ⌊rate · N⌋; `rate` is the fraction kept, 1 − the paper's pruning rate. Raises: ValueError."""
    if not 0 < rate <= 1:
        raise ValueError(f"rate {rate:g} is outside (0, 1]: give the fraction of the training split to keep")
    m = floor_share(rate, num_rows)
    if m == 0:
        raise ValueError(f"rate {rate:g} of {num_rows} rows keeps none: give a rate of {1 / num_rows:.3g} or more")
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
    hardest: np.ndarray  # rows dropped before stratifying, easiest first

    @property
    def sizes(self) -> list[int]:
        return [len(rows) for rows in self.members]

    def within(self, mask: np.ndarray | None) -> "Strata":
        """The same strata with only the rows in `mask` (N,), None for all; some may then be empty."""
        if mask is None:
            return self
        members = [rows[mask[rows]] for rows in self.members]
        return Strata(members, self.score_ranges, self.hardest[mask[self.hardest]])


def stratify(
    scores: np.ndarray, num_strata: int, hardest_cutoff: float, difficulty: np.ndarray | None = None
) -> Strata:
    """Drop the hardest ⌊hardest_cutoff · N⌋ rows by `difficulty` (N,), by default `scores` (N,), and cut the rest into
    K ranges of equal score width.

    Of equal ones at the cut the earlier rows stay. Empty strata are left out. Raises: ValueError where none is left.
    """
    difficulty = scores if difficulty is None else difficulty
    num_kept = len(scores) - floor_share(hardest_cutoff, len(scores))
    if num_kept == 0:
        raise ValueError(f"hardest_cutoff {hardest_cutoff:g} leaves none of {len(scores)} rows: give a smaller one")
    is_kept = lowest(difficulty, num_kept)
    kept, hardest = np.flatnonzero(is_kept), np.flatnonzero(~is_kept)
    kept_scores = scores[kept].astype(np.float64, copy=False)
    low, high = kept_scores.min(), kept_scores.max()
    num_strata = num_strata if high > low else 1
    edges = np.linspace(low, high, num_strata + 1)
    stratum = np.searchsorted(edges[1:-1], kept_scores, side="right")
    stratum = stratum.astype(np.min_scalar_type(num_strata))  # numpy sorts one or two bytes in O(N)
    ends = np.cumsum(np.bincount(stratum, minlength=num_strata))[:-1]
    members = np.split(kept[np.argsort(stratum, kind="stable")], ends)
    return Strata(
        members=[rows for rows in members if len(rows)],
        score_ranges=[(float(edges[i]), float(edges[i + 1])) for i, rows in enumerate(members) if len(rows)],
        hardest=hardest[np.argsort(difficulty[hardest], kind="stable")],
    )


def draw_verification_samples(strata: Strata, verify_per_stratum: int, mode: str, seed: int) -> list[np.ndarray]:
    """Draw the b_v rows B*_i of each stratum that the target scores, or all; released: none of a stratum of ≤ b_v."""
    draws, ranks = [], random_ranks(sum(strata.sizes) + len(strata.hardest), seed, VERIFICATION)
    for rows in strata.members:
        skip = mode == "released" and len(rows) <= verify_per_stratum
        draws.append(rows[:0] if skip else rows[lowest(ranks[rows], verify_per_stratum)])
    return draws


def verification_ratio(target_scores: np.ndarray, speculative_scores: np.ndarray) -> float:
    """V_i = Σ S^t_d / Σ S^s_d over verified samples, min–max normalised in scores/verification.py; 1 if Σ S^s is 0."""
    target, speculative = float(np.sum(target_scores)), float(np.sum(speculative_scores))
    return target / speculative if speculative > np.finfo(np.float32).tiny else 1.0


def allocate_budgets(sizes: list[int], ratios: list[float | None], m: int, mode: str) -> list[int]:
    """The budget m_i of each stratum, smallest first (of equal ones the lower-scored); the later ones get what is left.

    published: m_i = min(|B_i|, ⌊(m − |D'|) · V_i / (strata left)⌋)
    released:  m_i = min(|B_i|, ⌊(m − |D'|) · V_i / Σ_{strata left} V⌋); unverified (None): ⌊(m − |D'|) / (strata left)⌋
    D' are the rows given so far. The sum is at most m (an overshoot is cut); `choose_staff` fills what is left."""
    budgets, remaining, order = [0] * len(sizes), m, sorted(range(len(sizes)), key=lambda i: sizes[i])
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


def choose_staff(
    scores: np.ndarray,
    strata: Strata,
    ratios: list[float | None],
    m: int,
    mode: str,
    seed: int,
    budgets: list[int] | None = None,
    take: Callable[[np.ndarray, int], np.ndarray] | None = None,
) -> Choice:
    """Algorithm 1 from the speculative scores (N,), strata and their V_i (None: not verified) to m rows.

    Take the budget of each stratum (published: at random; released: the highest scores), then fill up to m from the
    unchosen rows of all strata. Where these are too few (the paper is silent), the easiest of the hardest come back.
    `budgets` replaces those by V_i; `take`, which gives so many of a stratum's rows, the choice in it (extended.py)."""
    budgets = allocate_budgets(strata.sizes, ratios, m, mode) if budgets is None else budgets
    ranks = -scores if mode == "released" else random_ranks(len(scores), seed, WITHIN_STRATUM)
    chosen = np.zeros(len(scores), dtype=bool)
    for rows, budget in zip(strata.members, budgets, strict=True):
        chosen[take(rows, budget) if take else rows[lowest(ranks[rows], budget)]] = True
    taken = np.array([chosen[rows].sum() for rows in strata.members])
    unchosen = np.concatenate([rows[~chosen[rows]] for rows in strata.members])
    fill = np.sort(unchosen[lowest(random_ranks(len(scores), seed, FILL)[unchosen], m - taken.sum())])
    chosen[fill] = True
    budgets = np.array([chosen[rows].sum() for rows in strata.members])
    from_hardest = m - int(budgets.sum())
    chosen[strata.hardest[:from_hardest]] = True
    return Choice(np.flatnonzero(chosen), budgets.tolist(), (budgets - taken).tolist(), from_hardest, fill)
