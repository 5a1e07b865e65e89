"""Worth of a coreset: how many random rows reach the same held-out log likelihood, divided by the coreset's rows."""

import numpy as np
from sklearn.isotonic import IsotonicRegression


def equivalent_size(sizes: np.ndarray, losses: np.ndarray, loss: float) -> float:
    """Size of a random subset that reaches `loss`.

    Args: `sizes` (R,) of random subsets, ascending, R ≥ 2, in rows or tokens; `losses` (R,): their mean held-out
    negative log likelihood. Between them the curve is linear in log(size), after isotonic regression has made it fall.
    A loss above the curve gives the smallest size, one below it the largest: only then is the true size further out.
    """
    falling = IsotonicRegression(increasing=False).fit_transform(np.log(sizes), losses)
    return float(np.exp(np.interp(-loss, -falling, np.log(sizes))))


def worth(sizes: np.ndarray, losses: np.ndarray, loss: np.ndarray, size: float) -> np.ndarray:
    """`equivalent_size` / `size`, replicate by replicate: `losses` (B, R) and `loss` (B,); gives (B,)."""
    return np.array([equivalent_size(sizes, *pair) for pair in zip(losses, loss, strict=True)]) / size
