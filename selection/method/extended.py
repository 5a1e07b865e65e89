"""Additions to Algorithm 1 that `mode: extended` switches on, each alone: other budgets, other rows. (ours)"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np

from selection.method.staff import Strata


def calibrated_ratios(counts: np.ndarray, speculative_sums: np.ndarray, target_sums: np.ndarray) -> np.ndarray:
    """Verification that measures the target and not the small model's noise: Σ S^t / Σ Ŝ^t (K,) in place of V_i.

    Strata are cut by S^s, so V_i = Σ S^t / Σ S^s falls from the first to the last wherever the two models agree
    imperfectly (`null_ratios`). Ŝ^t = a + b · S^s is what the small model's scores lead to expect, by least squares
    over the strata's means, weighted by the verified rows. 1 means: as expected.

    Args: of each stratum the k_i verified rows (0: NaN comes out), and the sums of their normalised scores (K,)."""
    there = counts > 0
    n, ours, theirs = counts[there], speculative_sums[there] / counts[there], target_sums[there] / counts[there]
    design = np.column_stack([np.ones(len(n)), ours])
    root = np.sqrt(n)
    expected = design @ np.linalg.lstsq(design * root[:, None], theirs * root, rcond=None)[0]
    ratios = np.full(len(counts), np.nan)
    ratios[there] = np.where(expected > 1e-9, theirs / np.maximum(expected, 1e-9), 1.0)
    return ratios


def proportional_budgets(sizes: Sequence[int], weights: Sequence[float], m: int) -> list[int]:
    """Budgets in proportion to `weights` (K,), none above its size; they sum to min(m, Σ sizes). What a full stratum
    cannot use goes to the others, and the rest of the rounding to the largest fractions, of equal ones the first."""
    sizes, weights = np.asarray(sizes), np.asarray(weights, dtype=float)
    budgets, open_ = np.zeros(len(sizes), dtype=int), sizes > 0
    while open_.any():
        left = min(m, sizes.sum()) - budgets.sum()
        own = np.where(open_, weights, 0.0)
        own = own if own.sum() > 0 else open_.astype(float)
        wanted = left * own / own.sum()
        if not (full := open_ & (wanted >= sizes)).any():
            floors = np.floor(wanted + 1e-9).astype(int)
            floors[np.argsort(floors - wanted, kind="stable")[: left - floors.sum()]] += 1
            return (budgets + floors).tolist()
        budgets[full], open_ = sizes[full], open_ & ~full
    return budgets.tolist()


def neyman_weights(scores: np.ndarray, strata: Strata) -> list[float]:
    """Size · standard deviation of the `scores` (N,) in each stratum, as a survey is allocated (Neyman 1934)."""
    return [len(rows) * float(np.std(scores[rows])) if len(rows) else 0.0 for rows in strata.members]


def nearest_to_centres(features: np.ndarray, seed: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """A function that takes `count` of `rows`: k-means of their `features` (N, d) with `count` clusters, and of each
    the row nearest to its centre."""

    from sklearn.cluster import KMeans  # takes seconds, which other commands need not
    from sklearn.exceptions import ConvergenceWarning

    def take(rows: np.ndarray, count: int) -> np.ndarray:
        if count <= 0 or count >= len(rows):
            return rows[:count] if count <= 0 else rows
        own = features[rows].astype(np.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than clusters
            model = KMeans(count, n_init=1, max_iter=20, random_state=seed).fit(own)
        distance = np.linalg.norm(own - model.cluster_centers_[model.labels_], axis=1)
        order = np.lexsort([distance, model.labels_])
        first = np.append(True, np.diff(model.labels_[order]) > 0)  # of each cluster
        ranks = np.where(first[np.argsort(order)], -1.0, distance)
        return np.sort(rows[np.argsort(ranks, kind="stable")[:count]])

    return take
