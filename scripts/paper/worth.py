"""Worth of a coreset: how many random rows reach the same held-out log likelihood, divided by the coreset's rows."""

import numpy as np


def falling(losses: np.ndarray) -> np.ndarray:
    """The curves (B, R) by isotonic regression, so that none rises: g_i = min_{a ≤ i} max_{b ≥ i} mean(a … b)."""
    sums = np.cumsum(np.pad(losses, ((0, 0), (1, 0))), axis=1)
    count = losses.shape[1]

    def mean(a: int, b: int) -> np.ndarray:
        return (sums[:, b + 1] - sums[:, a]) / (b + 1 - a)

    highest = [[np.max([mean(a, b) for b in range(i, count)], axis=0) for a in range(i + 1)] for i in range(count)]
    return np.column_stack([np.min(each, axis=0) for each in highest])


def worth(sizes: np.ndarray, losses: np.ndarray, loss: np.ndarray, size: float) -> np.ndarray:
    """Sizes of random subsets that reach `loss`, divided by `size`, replicate by replicate (B,).

    Args: `sizes` (R,) of random subsets, ascending, R ≥ 2, in rows or tokens; `losses` (B, R): their mean held-out
    negative log likelihood, as `falling` makes it; `loss` (B,) and `size` of a coreset. Between the sizes the curve is
    linear in log(size). A loss above it gives the smallest size, one below the largest: only then is the true size
    further out."""
    logs = np.log(sizes)
    return np.exp([np.interp(-one, -curve, logs) for curve, one in zip(losses, loss, strict=True)]) / size
