"""What STAFF is compared with: coresets by other rules, from stored scores.

But for Random and Length, which need no model, all of them read the scores of the target TUNED on the whole training
split. In `variant` "published" and "released" part: EL2N's formula (and with it all that is made of EL2N), and whether
CCS and D2 drop the hardest ⌊hardest_cutoff · N⌋ rows, by EL2N, before anything else (as published).
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from selection.method.staff import (
    Choice,
    Quotas,
    choose_by_rule,
    choose_first,
    choose_lowest,
    choose_staff,
    random_keys,
    stratify,
)
from selection.run.config import Selection

Columns = dict[str, np.ndarray]


def columns_of(method: str, variant: str) -> tuple[str, ...]:
    """The columns of the score files that a method reads."""
    el2n = "el2n" if variant == "published" else "el2n_released"
    return {
        "random": (),
        "length": ("n_response_tokens",),
        "grand": ("effort",),
        "el2n": (el2n,),
        "entropy": ("entropy",),
        "moderate": ("hidden_state",),
        "ccs": (el2n,),
        "d2": (el2n, "hidden_state"),
    }[method]


def baseline(
    method: str, columns: Columns, num_rows: int, selection: Selection, quotas: Quotas | None = None
) -> Callable[[float], Choice]:
    """The rule of `method` as a function from rate to coreset: what all rates share (D2's graph) is computed once.

    Args: `columns` those of `columns_of`, each (N,), hidden_state (N, d); N = `num_rows`.
    """
    values = [columns[name] for name in columns_of(method, selection.baseline_variant)]
    if method == "length":
        return _by_strata(1 / values[0], selection.hardest_cutoff, selection.rules, selection, quotas)
    published = selection.baseline_variant == "published"
    cutoff = selection.hardest_cutoff if published else 0.0
    if method == "ccs":
        # CCS (Zheng et al. 2023): equal-width strata of EL2N, equal budgets, smallest stratum first, random inside.
        return _by_strata(values[0], cutoff, "paper", selection, quotas)
    if method in ("moderate", "d2"):
        order = (
            moderate_order(values[0])
            if method == "moderate"
            else d2_after_cut(*values, selection.baseline_variant, cutoff)
        )
        return lambda rate: choose_by_rule(partial(choose_first, order), rate, num_rows, quotas)
    # GraNd (Paul et al. 2021): highest ‖∇_φ L‖₂. EL2N (same): highest error norm. Entropy: highest mean entropy.
    keys = random_keys(num_rows, selection.seed) if method == "random" else -values[0]
    return lambda rate: choose_by_rule(partial(choose_lowest, keys), rate, num_rows, quotas)


def _by_strata(
    scores: np.ndarray, cutoff: float, mode: str, selection: Selection, quotas: Quotas | None
) -> Callable[[float], Choice]:
    """STAFF's own rule without verification: every stratum has the same claim."""
    strata = stratify(scores, selection.num_strata, cutoff)
    unverified = [None] * len(strata.members)
    return lambda rate: choose_staff(scores, strata, unverified, rate, mode, selection.seed, quotas)


def moderate_order(features: np.ndarray) -> np.ndarray:
    """Moderate (Xia et al. 2023), as released: rows whose distance to the prototype is closest to the median distance.

    The prototype is the median of the features (N, d), coordinate by coordinate; there is one class.
    """
    distances = np.linalg.norm(features - np.median(features, axis=0), axis=1)
    return np.argsort(np.abs(distances - np.median(distances)), kind="stable")


def d2_after_cut(scores: np.ndarray, features: np.ndarray, variant: str, hardest_cutoff: float) -> np.ndarray:
    """D2's order (N,); the hardest, dropped before the graph, come last, the easiest of them first."""
    from selection.method.d2 import d2_order

    strata = stratify(scores, 1, hardest_cutoff)
    kept = strata.members[0]
    return np.concatenate([kept[d2_order(scores[kept], features[kept], variant)], strata.hardest])
