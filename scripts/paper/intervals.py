"""Means over seeds and evaluation rows, and their 95 % intervals."""

import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

REPLICATES = 10_000


def bootstrap_means(values: np.ndarray, stream: int = 0, replicates: int = REPLICATES) -> np.ndarray:
    """Means over seeds and samples, resampled: (replicates, quantities).

    Args: values (quantities, seeds, samples), scores or paired differences of scores; a seed that a quantity lacks is
    NaN throughout. The same `stream` and shape draw the same.

    Each replicate draws samples with replacement, the same for all quantities and seeds, as all were evaluated on the
    same rows; then seeds, for each quantity from those that it has. Quantities with the same seeds get the same draw,
    so that means over quantities can be taken inside a replicate. A quantity without a seed is NaN.

    The spread between S seeds comes out (S − 1) / S of what it is; noise of single answers counts more than once.
    Intervals are thus too narrow where seeds differ much, and too wide where only samples do.
    """
    num_quantities, num_seeds, num_samples = values.shape
    rng = np.random.default_rng([stream, num_seeds, num_samples])
    position = rng.random((replicates, num_seeds))  # of the drawn seeds among those that a quantity has, as a share
    present = ~np.isnan(values).any(axis=2)
    flat = np.where(present[:, :, None], values, 0.0).reshape(-1, num_samples).T
    by_seed = np.empty((replicates, flat.shape[1]))
    for replicate in range(replicates):
        times_drawn = np.bincount(rng.integers(num_samples, size=num_samples), minlength=num_samples)
        by_seed[replicate] = times_drawn / num_samples @ flat
    by_seed = by_seed.reshape(replicates, num_quantities, num_seeds)
    means = np.full((replicates, num_quantities), np.nan)
    for quantity, here in enumerate(present):
        if count := int(here.sum()):
            drawn = (position[:, :count] * count).astype(np.intp)
            means[:, quantity] = np.take_along_axis(by_seed[:, quantity, here], drawn, axis=1).mean(axis=1)
    return means


@dataclass(frozen=True)
class Estimate:
    mean: float
    replicates: np.ndarray  # of the mean: (replicates,)
    num_seeds: int

    @property
    def interval(self) -> tuple[float, float]:
        """The central 95 % of the replicates; its ends are values that occur, so that counts stay whole."""
        low, high = np.quantile(self.replicates, [0.025, 0.975], method="inverted_cdf")
        return float(low), float(high)

    @property
    def sign(self) -> int:
        """1 where the interval lies above 0, −1 where it lies below, 0 where it includes 0."""
        low, high = self.interval
        return (low > 0) - (high < 0)


@dataclass(frozen=True)
class Grid:
    cells: pd.DataFrame  # the rows of cells.csv; scores by sample are lists
    tasks: list[str]
    methods: list[str]
    rates: list[float]  # of coresets, by ascending pruning rate
    seeds: list[int]

    def rates_of(self, method: str) -> list[float]:
        return [1.0] if method == "full" else self.rates


# By (metric, method, other method or "") and then (task, rate): a mean score, or the mean difference from the other.
Estimates = dict[tuple[str, str, str], dict[tuple[str, float], Estimate]]


def estimate_grid(grid: Grid, metrics: Iterable[str], against: Iterable[str]) -> Estimates:
    """Mean scores, and mean differences over the seeds that both methods have: STAFF's from each of `against`, every
    method's from Random. All of a task share a draw. Tasks do not: they have other rows and tuning runs."""
    estimates: Estimates = defaultdict(dict)
    for stream, task in enumerate(grid.tasks):
        cells, values = grid.cells[grid.cells.task == task], {}
        empty = np.full((len(grid.seeds), cells.eval_rows.iloc[0]), np.nan)
        for cell, metric in itertools.product(cells.itertuples(), metrics):
            by_seed = values.setdefault((metric, cell.method, "", cell.rate), empty.copy())
            by_seed[grid.seeds.index(cell.seed)] = getattr(cell, f"{metric}_by_sample")
        for metric, method, _, rate in list(values):
            for other in against if method == "staff" else ("random",):
                if other != method and (metric, other, "", rate) in values:
                    difference = values[metric, method, "", rate] - values[metric, other, "", rate]
                    if not np.isnan(difference).all():
                        values[metric, method, other, rate] = difference
        replicates = bootstrap_means(np.stack(list(values.values())), stream).T
        for ((*key, rate), scores), drawn in zip(values.items(), replicates, strict=True):
            num_seeds = int((~np.isnan(scores[:, 0])).sum())
            estimates[tuple(key)][task, rate] = Estimate(float(np.nanmean(scores)), drawn, num_seeds)
    return estimates


def pool(estimates: list[Estimate], together=np.mean) -> Estimate | None:
    """A figure of several estimates, by default their mean, taken inside each replicate too. None of none."""
    if not estimates:
        return None
    return Estimate(
        float(together([one.mean for one in estimates], axis=0)),
        together([one.replicates for one in estimates], axis=0),
        min(one.num_seeds for one in estimates),
    )
