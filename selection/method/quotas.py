"""Coresets of several data sets: the part of each, and a rule that chooses data set by data set."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from selection.method.staff import Choice

# A function of m and a mask (N,): chooses m rows of those in the mask, or of all where it is None.
Rule = Callable[[int, np.ndarray | None], Choice]


@dataclass(frozen=True)
class Quotas:
    """The data set of each row, and the part of a coreset that each data set is to have."""

    names: list[str]
    quotas: list[float | None]  # fractions of m; None: shares with the others that have none
    num_rows: list[int]  # of each data set in the training split, with those that have no score
    data_set: np.ndarray  # (N,) number of each row's data set

    def record(self, chosen: np.ndarray) -> list[dict[str, Any]]:
        """For the coreset file, of each data set: name, rows in the training split, of which `chosen`, and quota."""
        counts = np.bincount(self.data_set[chosen], minlength=len(self.names)).tolist()
        columns = zip(self.names, self.num_rows, counts, self.quotas, strict=True)
        return [dict(zip(("name", "rows", "chosen", "quota"), each, strict=True)) for each in columns]


def shares(quotas: Quotas, m: int) -> list[tuple[list[int], int]]:
    """Groups of data sets that are chosen from together, and how many of m rows come from each.

    A data set with a quota gives ⌊quota · m⌋ rows; those without give the rest together. Where every data set has one,
    the rows left over go to the largest fractions cut off. Raises: ValueError where a data set has too few rows."""
    sizes = np.bincount(quotas.data_set, minlength=len(quotas.names)).tolist()
    exact = {j: Fraction(str(quota)) * m for j, quota in enumerate(quotas.quotas) if quota is not None}
    given = {j: math.floor(share) for j, share in exact.items()}
    for j, count in given.items():
        if count > sizes[j]:
            raise ValueError(
                f"quota {quotas.quotas[j]:g} of a coreset of {m} rows asks for {count} rows of data set "
                f"{quotas.names[j]}, which has {sizes[j]} to choose from: lower the quota or the rate"
            )
    free, left = [j for j in range(len(sizes)) if j not in given], m - sum(given.values())
    if free and left > (room := sum(sizes[j] for j in free)):
        raise ValueError(
            f"the quotas leave {left} rows of a coreset of {m} to data set {', '.join(quotas.names[j] for j in free)}, "
            f"with {room} to choose from: raise the quotas or lower the rate"
        )
    if free:
        return [*(([j], count) for j, count in given.items()), (free, left)]
    for j in itertools.cycle(sorted(given, key=lambda j: given[j] - exact[j])):
        if not left:
            return [([j], count) for j, count in given.items()]
        more = int(given[j] < sizes[j])
        given[j], left = given[j] + more, left - more


def choose_by_rule(rule: Rule, m: int, quotas: Quotas | None = None) -> Choice:
    """A rule's coreset of m rows: of all rows or, with quotas, data set by data set. Raises: ValueError."""
    if quotas is None or not any(quotas.quotas):
        return rule(m, None)
    parts = [rule(count, np.isin(quotas.data_set, together)) for together, count in shares(quotas, m)]
    return Choice(
        np.sort(np.concatenate([part.rows for part in parts])),
        [sum(budgets) for budgets in zip(*(part.budgets for part in parts), strict=True)],
        [sum(filled) for filled in zip(*(part.filled for part in parts), strict=True)],
        sum(part.from_hardest for part in parts),
        np.sort(np.concatenate([part.fill for part in parts])),
    )
