"""Other rules at the small model's price: coresets from its losses and hidden states, without a tuned target.

L is the mean response loss of a row, L0 before tuning, L_e after pass e. Each rule is a function from m to m rows.
"""

import math

import numpy as np

from selection.method.extended import proportional_budgets
from selection.method.quotas import Rule
from selection.method.staff import RANDOM, Choice, random_ranks


def by_score(scores: np.ndarray) -> Rule:
    """The m rows with the highest `scores` (N,); of equal ones the earlier."""
    order = np.argsort(-scores, kind="stable")
    return lambda m, within: Choice(np.sort((order if within is None else order[within[order]])[:m]))


def ifd(loss_untuned: np.ndarray, loss_without_prompt: np.ndarray) -> np.ndarray:
    """Instruction-following difficulty exp L0(y given x) / exp L0(y) (N,), Li et al. 2024 (2402.00530), as a score: the
    highest below 1 are taken first; from 1 on the prompt does not help, and the row comes last, the nearest to 1 first.
    """
    difficulty = np.exp(loss_untuned - loss_without_prompt)
    return np.where(difficulty < 1, difficulty, -difficulty)


def davir(loss_untuned: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """(L0 − L_last) / L0 (N,), Zhou et al. 2025 (2310.13008): the highest are taken."""
    return (loss_untuned - loss) / loss_untuned


def middle(loss_untuned: np.ndarray) -> np.ndarray:
    """Rank of L0 (N,), as a score: the nearest to the middle are taken first."""
    ranks = np.empty(len(loss_untuned))
    ranks[np.argsort(loss_untuned, kind="stable")] = np.arange(len(loss_untuned))
    return -np.abs(ranks - (len(ranks) - 1) / 2)


def clusters_of(features: np.ndarray, seed: int, most: int = 2**31) -> tuple[np.ndarray, np.ndarray]:
    """k-means with √N clusters, at `most` so many, on `features` (N, d): cluster of each row (N,), and its distance
    from the cluster's centre (N,)."""
    from sklearn.cluster import KMeans  # takes seconds, which other commands need not

    count = min(most, max(1, round(math.sqrt(len(features)))), len(np.unique(features, axis=0)))
    model = KMeans(count, n_init=3, max_iter=20, random_state=seed)
    cluster = model.fit_predict(features.astype(np.float64))
    return cluster, np.linalg.norm(features - model.cluster_centers_[cluster], axis=1)


def in_equal_parts(cluster: np.ndarray, keys: np.ndarray) -> Rule:
    """S2L's budgets: the smallest cluster first, each ⌊what is left / clusters left⌋ or all that it has; inside a
    cluster the lowest `keys` (N,). What the floors leave goes to the last, largest one."""

    def rule(m: int, within: np.ndarray | None) -> Choice:
        rows = np.arange(len(cluster)) if within is None else np.flatnonzero(within)
        parts = [rows[cluster[rows] == number] for number in np.unique(cluster[rows])]
        parts.sort(key=lambda part: (len(part), part[0]))
        chosen, rest = [rows[:0]], m
        for position, part in enumerate(parts):
            taken = part[np.argsort(keys[part], kind="stable")][: rest // (len(parts) - position)]
            chosen.append(taken)
            rest -= len(taken)
        return Choice(np.sort(np.concatenate(chosen)))

    return rule


def in_proportion(cluster: np.ndarray, keys: np.ndarray) -> Rule:
    """Each cluster in proportion to its size; inside a cluster the lowest `keys` (N,)."""

    def rule(m: int, within: np.ndarray | None) -> Choice:
        rows = np.arange(len(cluster)) if within is None else np.flatnonzero(within)
        parts = [rows[cluster[rows] == number] for number in np.unique(cluster[rows])]
        sizes = list(map(len, parts))
        counts = proportional_budgets(sizes, sizes, m)
        taken = [part[np.argsort(keys[part], kind="stable")][:n] for part, n in zip(parts, counts, strict=True)]
        return Choice(np.sort(np.concatenate([rows[:0], *taken])))

    return rule


def s2l(losses_by_pass: np.ndarray, seed: int) -> Rule:
    """Small to large (Yang et al. 2024, 2403.07384): clusters of the rows' loss trajectories (N, passes), each an equal
    part of the coreset, at random inside."""
    cluster, _ = clusters_of(losses_by_pass, seed, most=100)
    return in_equal_parts(cluster, random_ranks(len(cluster), seed, RANDOM))


def learning_percentage(loss_untuned: np.ndarray, loss_first_pass: np.ndarray, features: np.ndarray, seed: int) -> Rule:
    """(P0 − P1) / P0 of perplexities (Mekala et al. 2024, 2402.10430): the lowest in each cluster of `features`."""
    cluster, _ = clusters_of(features, seed)
    return in_proportion(cluster, 1 - np.exp(loss_first_pass - loss_untuned))


def coverage(features: np.ndarray, seed: int) -> Rule:
    """Clusters of hidden states (N, d) in proportion to their size, the rows nearest to the centre."""
    return in_proportion(*clusters_of(features, seed))


def rds(features: np.ndarray, wanted: np.ndarray) -> Rule:
    """RDS+ (Ivison et al. 2025, 2503.01807): rows of a dev set, `wanted` (D, d), take in turns the row of the pool,
    `features` (N, d), that is nearest by cosine and not yet taken."""
    pool, dev = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (features, wanted))
    likeness = dev @ pool.T

    def rule(m: int, within: np.ndarray | None) -> Choice:
        free = np.ones(len(pool), bool) if within is None else within.copy()
        orders, places, chosen = np.argsort(-likeness, axis=1, kind="stable"), np.zeros(len(dev), int), []
        while len(chosen) < m:
            for turn in range(len(dev)):
                while not free[orders[turn, places[turn]]]:
                    places[turn] += 1
                row = orders[turn, places[turn]]
                free[row] = False
                chosen.append(row)
                if len(chosen) == m:
                    break
        return Choice(np.sort(np.array(chosen, dtype=int)))

    return rule
