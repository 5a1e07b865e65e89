"""What STAFF is compared with: coresets by other rules, from stored scores.

All but Random, Length and the rules of rules.py read the scores of the target TUNED on the whole training split.
`variant` decides EL2N's formula (and so CCS and D2); "published" CCS and D2 first drop the hardest ⌊hardest_cutoff · N⌋
rows by EL2N.
"""

from fractions import Fraction

import numpy as np

from selection.method import rules
from selection.method.d2 import d2_order
from selection.method.quotas import Rule
from selection.method.staff import RANDOM, Choice, choose_staff, lowest, random_ranks, stratify


def columns_of(method: str, variant: str) -> tuple[str, ...]:
    """The columns of the score files that a method reads."""
    el2n = "el2n" if variant == "published" else "el2n_released"
    columns = {"random": (), "rs2": (), "length": ("n_response_tokens",), "grand": ("effort",), "entropy": ("entropy",)}
    columns |= {"moderate": ("hidden_state",), "el2n": (el2n,), "ccs": (el2n,), "d2": (el2n, "hidden_state")}
    columns |= {"ifd": ("loss_untuned", "loss_without_prompt"), "middle": ("loss_untuned",)}
    columns |= {"davir": ("loss_untuned", "loss"), "s2l": ("loss_by_pass",), "clusters": ("hidden_state",)}
    columns |= {"learning_percentage": ("loss_untuned", "loss_by_pass", "hidden_state"), "rds": ("hidden_state",)}
    return columns[method]


def baseline(
    method: str, columns: dict, num_rows: int, mode: str, variant: str, num_strata: int, cutoff: float, seed: int
) -> Rule:
    """The rule of `method`, with what all rates share (D2's graph) computed once.

    `columns`: those of `columns_of`, (N,) each, hidden_state (N, d), loss_by_pass (N, P), and for rds `dev` (D, d);
    `mode` concerns Length alone; `cutoff` is the hardest_cutoff. Raises: ValueError, as `stratify` and `d2_order`."""
    values = [columns[name] for name in columns_of(method, variant)]
    if method in ("ifd", "middle", "davir"):
        return rules.by_score({"ifd": rules.ifd, "middle": rules.middle, "davir": rules.davir}[method](*values))
    if method == "learning_percentage":
        untuned, by_pass, features = values
        return rules.learning_percentage(untuned, by_pass[:, 0], features, seed)
    if method in ("s2l", "clusters"):
        return {"s2l": rules.s2l, "clusters": rules.coverage}[method](*values, seed)
    if method == "rds":
        return rules.rds(*values, columns["dev"])
    if method != "length" and variant == "released":
        cutoff = 0.0
    if method in ("length", "ccs"):
        # CCS (Zheng et al. 2023): STAFF's rule on EL2N without verification, random inside. Length: of 1 / tokens.
        scores, mode = (values[0], "paper") if method == "ccs" else (1 / values[0], mode)
        strata = stratify(scores, num_strata, cutoff)
        unverified = [None] * len(strata.members)
        return lambda m, within: choose_staff(scores, strata.within(within), unverified, m, mode, seed)
    if method in ("moderate", "d2"):
        order = moderate_order(values[0]) if method == "moderate" else _d2_after_cut(*values, variant, cutoff)
        return lambda m, within: Choice(np.sort((order if within is None else order[within[order]])[:m]))
    # Every other method takes the highest: GraNd (Paul et al. 2021) ‖∇_φ L‖₂, EL2N (same) error norms, Entropy entropy.
    keys = random_ranks(num_rows, seed, RANDOM) if method in ("random", "rs2") else -values[0]

    def choose_lowest(m: int, within: np.ndarray | None) -> Choice:
        if within is None:
            return Choice(np.flatnonzero(lowest(keys, m)))
        rows = np.flatnonzero(within)
        return Choice(rows[lowest(keys[rows], m)])

    return choose_lowest


def rs2(rate: float, passes: float) -> tuple[float, float]:
    """Repeated sampling (Okanovic et al. 2024): a fresh random subset of rate · N rows in each pass, at the same number
    of optimiser steps as `passes` passes over one. No row comes again before all have come, so it is one pass over
    rate · passes of the rows, drawn at random, or, where that is more than all, as many passes over all of them.

    Returns the fraction of rows to draw, and the passes to tune for."""
    drawn = float(Fraction(str(rate)) * Fraction(str(passes)))  # 0.3 · 3 is 0.9, where floats give less
    return min(1.0, drawn), max(1.0, drawn)


def moderate_order(features: np.ndarray) -> np.ndarray:
    """Moderate (Xia et al. 2023), as released, with one class: rows at about the median distance to the prototype."""
    distances = np.linalg.norm(features - np.median(features, axis=0), axis=1)
    return np.argsort(np.abs(distances - np.median(distances)), kind="stable")


def _d2_after_cut(scores: np.ndarray, features: np.ndarray, variant: str, cutoff: float) -> np.ndarray:
    """D2's order (N,); the hardest, dropped before the graph, come last, the easiest of them first."""
    strata = stratify(scores, 1, cutoff)
    kept = strata.members[0]
    return np.concatenate([kept[d2_order(scores[kept], features[kept], variant)], strata.hardest])
