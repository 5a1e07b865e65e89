"""Step 4 on stored scores: the verification ratio V_i of each stratum, and the record of what it is made of."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from selection.config import Selection
from selection.errors import UserError
from selection.files import digest, first_difference, read_json, write_json
from selection.score_files import Scores
from selection.staff import Strata, draw_verification_samples, min_max_normalise, stratify, verification_ratio


@dataclass(frozen=True)
class Settings:
    """What strata and draws depend on; a verification serves any rate, but no other settings than its own."""

    mode: str
    num_strata: int
    verify_per_stratum: int
    hardest_cutoff: float
    seed: int

    @classmethod
    def of(cls, selection: Selection) -> "Settings":
        return cls(**{field.name: getattr(selection, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class StratumRecord:
    """One stratum; the sums are over its verified samples, after normalisation. Not verified: no sums, no ratio."""

    stratum: int
    score_range: tuple[float, float]  # of the raw speculative effort score
    size: int
    verified: list[int]
    speculative_sum: float | None
    target_sum: float | None
    verification_ratio: float | None


def cut_strata(speculative: np.ndarray, settings: Settings) -> Strata:
    return stratify(speculative, settings.num_strata, settings.hardest_cutoff)


def draw(strata: Strata, settings: Settings) -> list[np.ndarray]:
    return draw_verification_samples(strata, settings.verify_per_stratum, settings.mode, settings.seed)


def verify(speculative: np.ndarray, target: Scores, settings: Settings) -> list[StratumRecord]:
    """V_i for every verified stratum. `speculative` (N,); `target` holds at least the drawn rows.

    Scores are min–max normalised first, each model's by its own minimum and maximum. The small model's are taken over
    D. So are the target's where it has scored all of D, as released; where it has scored only the verified samples,
    its extremes over D are unknown and those over the verified samples stand in for them, in both modes. For released
    budgets, which do not depend on the scale of V, only the stand-in for the minimum counts. Published budgets feel
    the maximum too: without the hardest rows it is too low and V too high, so a few more rows go to small strata.
    """
    strata = cut_strata(speculative, settings)
    draws = draw(strata, settings)
    complete = len(target.index) == len(speculative)
    known = target.effort if complete else target.at(np.concatenate(draws))
    records = []
    for i, rows in enumerate(draws):
        sums: tuple[Any, Any, Any] = (None, None, None)
        if len(rows):
            ours = min_max_normalise(speculative[rows], reference=speculative)
            theirs = min_max_normalise(target.at(rows), reference=known)
            sums = float(ours.sum()), float(theirs.sum()), verification_ratio(theirs, ours)
        records.append(StratumRecord(i, strata.score_ranges[i], strata.sizes[i], rows.tolist(), *sums))
    return records


def write_verification(path: Path, settings: Settings, speculative: Scores, records: list[StratumRecord]) -> None:
    write_json(
        path,
        {
            **_made_from(settings, speculative),
            "data_fingerprint": speculative.fingerprint,
            "verified_samples": sum(len(record.verified) for record in records),
            "strata": [asdict(record) for record in records],
        },
    )


def read_verification(path: Path, settings: Settings, speculative: Scores) -> list[StratumRecord]:
    """Raises: UserError where it was made under other settings or from other scores."""
    value, wanted = read_json(path), _made_from(settings, speculative)
    try:
        stored = {key: value[key] for key in wanted}
        records = [StratumRecord(**{**r, "score_range": tuple(r["score_range"])}) for r in value["strata"]]
    except (KeyError, TypeError):
        raise UserError(f"{path} is no verification: run verify.py") from None
    if difference := first_difference(stored, wanted):
        raise UserError(f"{path} was made otherwise ({difference}): run verify.py again under the settings of now")
    return records


def _made_from(settings: Settings, speculative: Scores) -> dict[str, Any]:
    scores = digest(np.ascontiguousarray(speculative.effort).tobytes())
    return {**asdict(settings), "speculative_scores_sha256": scores}
