"""Adaptive verification: where the next target gradients go, and when they are enough. Only numpy.

Neither the paper nor the released code has it. A stratum's draws are the first of the same random order that fixed b_v
takes its first b_v of, so what is decided here is only how many each stratum gets.
"""

from collections.abc import Callable

import numpy as np

from scripts.paper.intervals import log_ratio_error
from selection.method.staff import allocate_budgets, smallest_first, verification_ratio

START = 5  # draws of each stratum before anything is known: the interval of fewer is mostly noise
SETTLED = 0.05  # of the coreset: budgets that move by less in 95 % of the resamples are settled
RESAMPLES = 200
_RESAMPLED = 4  # random stream; staff.py has 0 to 3

# The verified samples of a stratum: the small model's and the target's normalised scores, (k,) each.
Pairs = tuple[np.ndarray, np.ndarray]


def first_counts(sizes: list[int], per_stratum: int) -> list[int]:
    """Draws of each stratum to begin with: `START`, or b_v = `per_stratum`, or all rows, whichever is least."""
    return [min(size, per_stratum, START) for size in sizes]


def next_counts(
    counts: list[int],
    pairs: list[Pairs],
    sizes: list[int],
    limit: int,
    coreset_sizes: list[int],
    seed: int,
    settled: float = SETTLED,
    widths: Callable[..., np.ndarray] | None = None,
) -> list[int] | None:
    """How many rows each stratum has drawn after the next round; None where no more are to be drawn.

    Args: `counts` drawn so far, with `pairs` the scores of those that have any; `sizes` |B_i|; `limit` K · b_v draws
    in all; `coreset_sizes` m at each rate; `settled` 0: as many as `limit` allows; `widths`: what to draw by, as a
    rule `budget_widths`.

    No more: where all strata are drawn whole, `limit` draws are spent, or at every m 95 % of the resampled budgets are
    within `settled` of the estimated ones, in the share of the coreset that moves. Else as many draws as there are
    strata go one by one to the stratum that is widest at the time, on the assumption that a width falls with the root
    of the number of draws. A round at most doubles the draws of a stratum, as the width of few samples is a guess.
    """
    room = min(limit, sum(sizes)) - sum(counts)
    if room <= 0:
        return None
    ratios = [verification_ratio(theirs, ours) if len(ours) else None for ours, theirs in pairs]
    replicates = resampled_ratios(counts, pairs, sizes, seed)
    if settled and all(np.quantile(moves(sizes, ratios, replicates, m), 0.95) <= settled for m in coreset_sizes):
        return None
    low, high = np.quantile(replicates, [0.025, 0.975], axis=0)
    width = np.mean([(widths or budget_widths)(sizes, ratios, low, high, m) for m in coreset_sizes], axis=0)
    drawn, most = np.array(counts), np.minimum(2 * np.array(counts), sizes)
    for _ in range(min(room, len(sizes))):
        now = np.where(drawn < most, width * np.sqrt(np.array(counts) / drawn), -1.0)
        if (widest := int(now.argmax())) < 0 or now[widest] < 0:
            break
        drawn[widest] += 1
    return drawn.tolist()


def resampled_ratios(counts: list[int], pairs: list[Pairs], sizes: list[int], seed: int) -> np.ndarray:
    """Draws of every V_i, (resamples, strata), from the distribution whose central 95 % is the interval of V_i
    (intervals.py): V_i · exp(error · t), with Student's t of n − 1 degrees of freedom. A stratum whose rows
    are all drawn has no spread; one whose spread is not known has none either.
    """
    rng, replicates = np.random.default_rng([seed, _RESAMPLED, sum(counts)]), []
    for (ours, theirs), size in zip(pairs, sizes, strict=True):
        ratio = verification_ratio(theirs, ours) if len(ours) else 1.0
        error = log_ratio_error(theirs, ours, size)
        if error > 0:
            drawn = error * rng.standard_t(len(ours) - 1, RESAMPLES)
            replicates.append(ratio * np.exp(drawn.clip(-50, 50)))  # of two samples a draw may be without bounds
        else:
            replicates.append(np.full(RESAMPLES, ratio))
    return np.array(replicates).T


def moves(sizes: list[int], ratios: list[float | None], replicates: np.ndarray, m: int) -> np.ndarray:
    """The share of a coreset of m rows that goes to other strata, or to the random fill, under each replicate of V:
    half the L1 distance of the budgets, the fill among them, over m; (resamples,)."""

    def budgets(v: list[float | None]) -> np.ndarray:
        of_strata = allocate_budgets(sizes, v, m, "paper")
        return np.array([*of_strata, m - sum(of_strata)])

    estimated = budgets(ratios)
    return np.array([np.abs(budgets(list(v)) - estimated).sum() for v in replicates]) / (2 * m)


def budget_widths(
    sizes: list[int], ratios: list[float | None], low: np.ndarray, high: np.ndarray, m: int
) -> np.ndarray:
    """How far the interval of V_i, `low` to `high`, moves the stratum's own budget, the earlier strata's as estimated:
    rows, (strata,). A stratum that is taken whole at both ends has 0, however uncertain its V_i is."""
    budgets = allocate_budgets(sizes, ratios, m, "paper")
    order = smallest_first(sizes)
    remaining, widths = m, np.zeros(len(sizes))
    for position, i in enumerate(order):
        share = remaining / (len(order) - position)
        ends = [min(sizes[i], remaining, share * end) for end in (low[i], high[i])]
        widths[i] = ends[1] - ends[0]
        remaining -= budgets[i]
    return widths


def ratio_widths(sizes: list[int], ratios: list[float | None], low: np.ndarray, high: np.ndarray, m: int) -> np.ndarray:
    """The interval of V_i itself, for comparison (scripts/paper/adaptive_verification.py)."""
    return high - low
