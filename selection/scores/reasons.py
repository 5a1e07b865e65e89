"""Why each row is in a coreset of STAFF or not, in words."""

import numpy as np

from selection.method.staff import Choice, Strata
from selection.scores.verification import Settings


def explain(choice: Choice, strata: Strata, num_rows: int, settings: Settings) -> np.ndarray:
    """Reasons (num_rows,) in the order of the scores that `strata` are cut by."""
    chosen, reasons = np.zeros(num_rows, dtype=bool), np.empty(num_rows, dtype=object)
    chosen[choice.rows] = True
    drawn = ("not drawn in its stratum", "chosen: drawn at random in its stratum")
    if settings.rules == "released":
        drawn = ("below the chosen of its stratum", "chosen: among the highest of its stratum")
    hardest = (
        f"dropped: among the hardest {settings.hardest_cutoff:.0%}",
        "chosen: taken back from the hardest, as the strata do not hold enough",
    )
    for rows, texts in [*((members, drawn) for members in strata.members), (strata.hardest, hardest)]:
        reasons[rows] = np.array(texts, dtype=object)[chosen[rows].astype(np.intp)]
    reasons[np.setdiff1d(choice.fill, strata.hardest)] = "chosen: random fill of what the budgets left"
    return reasons
