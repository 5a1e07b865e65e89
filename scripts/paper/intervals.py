"""Intervals of mean scores and mean differences over evaluation samples and seeds."""

import numpy as np

_DRAWS_AT_A_TIME = 2**22  # bounds memory: 32 MiB of row numbers, and as much of counts


def bootstrap_means(values: np.ndarray, stream: int = 0, replicates: int = 10_000) -> np.ndarray:
    """Means over seeds and samples, resampled: (replicates, quantities).

    Args: values (quantities, seeds, samples), scores or paired differences of scores; a seed that a quantity lacks is
    NaN throughout. `stream` names the draw: the same `stream` and shape draw the same.

    Each replicate draws samples with replacement, the same for all quantities and seeds, as they were evaluated on the
    same rows; then it draws seeds with replacement, for each quantity from those that it has. Quantities with the same
    seeds get the same draw of seeds, so means over quantities can be taken inside of a replicate. A quantity without
    a seed is NaN.

    The spread between S seeds comes out (S − 1) / S of what it is, half of it at two seeds and none at one; noise of
    single answers counts more than once. Intervals are thus too narrow where seeds differ much, and wide where only
    samples do.
    """
    num_quantities, num_seeds, num_samples = values.shape
    rng = np.random.default_rng([stream, num_seeds, num_samples])
    position = rng.random((replicates, num_seeds))  # of the drawn seeds among those that a quantity has, as a share
    present = ~np.isnan(values).any(axis=2)
    flat = np.where(present[:, :, None], values, 0.0).reshape(-1, num_samples).T
    by_seed = np.concatenate(
        [
            _draw_counts(rng, size, num_samples) @ flat / num_samples
            for size in _parts(replicates, max(1, _DRAWS_AT_A_TIME // num_samples))
        ]
    ).reshape(replicates, num_quantities, num_seeds)
    means = np.full((replicates, num_quantities), np.nan)
    for quantity, here in enumerate(present):
        if count := int(here.sum()):
            drawn = (position[:, :count] * count).astype(np.intp)
            means[:, quantity] = np.take_along_axis(by_seed[:, quantity, here], drawn, axis=1).mean(axis=1)
    return means


def _parts(total: int, largest: int) -> list[int]:
    return [min(largest, total - start) for start in range(0, total, largest)]


def _draw_counts(rng: np.random.Generator, replicates: int, num_samples: int) -> np.ndarray:
    """How often each replicate drew each sample: (replicates, samples), every row sums to `num_samples`."""
    drawn = rng.integers(num_samples, size=(replicates, num_samples))
    drawn += np.arange(replicates)[:, None] * num_samples
    counts = np.bincount(drawn.ravel(), minlength=replicates * num_samples)
    return counts.reshape(replicates, num_samples).astype(np.float64)


def percentile_interval(replicates: np.ndarray) -> tuple[float, float]:
    """The central 95 % of one quantity's replicates; its ends are values that occur, so counts stay whole."""
    low, high = np.quantile(replicates, [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)
