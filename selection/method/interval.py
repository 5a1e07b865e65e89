"""The 95 % interval of V_i over the verified samples of a stratum."""

import numpy as np
from scipy.special import stdtrit  # quantiles of Student's t

from selection.method.staff import verification_ratio

FEWEST = 5  # verified samples that an interval needs


def ratio_interval(target_scores: np.ndarray, speculative_scores: np.ndarray, size: int) -> tuple[float, float]:
    """V_i · exp(± t · e): 95 % interval against V_i of all `size` rows, from the n verified samples' normalised scores.

    e is the jackknife error of log V_i, times √(1 − n/size) for draws without replacement; t is Student's (n − 1).
    (nan, nan) for n below FEWEST, unless that is the whole stratum, and where a model has at most one score above 0.
    On simulated strata it holds V_i in 93 to 96 % of cases, in 91 to 93 % for scores as skewed as a lognormal of σ = 1.
    """
    n = len(target_scores)
    targets, speculatives = (scores.sum() - scores for scores in (target_scores, speculative_scores))  # without each
    if 0 < n == size:
        error = 0.0
    elif n < FEWEST or any((without <= 1e-9 * without.max()).any() for without in (targets, speculatives)):
        return float("nan"), float("nan")
    else:
        error = np.sqrt((n - 1) * np.var(np.log(targets / speculatives)) * (1 - n / size))
    ratio, reach = verification_ratio(target_scores, speculative_scores), np.exp(stdtrit(max(n - 1, 1), 0.975) * error)
    return float(ratio / reach), float(ratio * reach)
