"""The part of the effort scores that response length does not explain; neither paper nor released code has it."""

import numpy as np

_FEWEST = 10  # scores above 0 that a fit needs


def length_residual(scores: np.ndarray, response_tokens: np.ndarray) -> np.ndarray:
    """score' = S / exp(a + b · log(tokens)), with log S = a + b · log(tokens) fitted by least squares.

    Args: `scores` S (n,), not negative; `response_tokens` (n,), at least 1. Returns (n,): not negative, without S's
    unit. A score of 0 has no logarithm: it is left out of the fit and stays 0. Equal lengths explain nothing: b is 0.
    In logarithms, as the gradient of a mean over T tokens falls by a power of T where tokens are alike.
    Raises: ValueError where fewer than ten scores are above 0."""
    positive = scores > 0
    if (count := int(positive.sum())) < _FEWEST:
        raise ValueError(
            f"length_control residual: {count} scores above 0, at least {_FEWEST} are needed to fit their length: "
            "verify more samples, or give length_control none"
        )
    log_scores, lengths = np.log(scores[positive]), np.log(response_tokens[positive])
    centred = lengths - lengths.mean()
    spread = centred @ centred
    slope = centred @ log_scores / spread if spread > 1e-12 * len(lengths) else 0.0  # rounding alone is no spread
    residual = np.zeros(len(scores))
    residual[positive] = np.exp(log_scores - log_scores.mean() - slope * centred)
    return residual
