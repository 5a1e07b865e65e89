"""The verification ratio V_i of each stratum from stored scores, its record (verification.json), and reasons."""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, NonNegativeFloat

from selection.method import extended, staff
from selection.method.interval import null_ratios
from selection.method.length_control import length_residual
from selection.method.quotas import Rule
from selection.method.staff import Choice, Strata
from selection.run.config import Selection, rules_of, validated
from selection.run.errors import UserError, refusals
from selection.run.products import checked, digest, read_sealed, refuse_difference, write_sealed
from selection.scores.folder import Scores

RULES_VERSION = 2  # count it up when a change of draws, V_i, budgets or choice makes other coresets of the same scores
# Keys that came later: records keep them where they are not as published.
LATER = {"budgets": "ratio", "within_stratum": "random", "hardest_by": "effort", "leave_out": "none"}
_REQUIRED = ("mode", "num_strata", "verify_per_stratum", "hardest_cutoff", "seed")  # of a record, in any mode


@dataclass(frozen=True)
class Settings:
    """What strata and draws depend on: a verification serves any rate, but only these settings."""

    mode: str
    num_strata: int
    verify_per_stratum: int
    hardest_cutoff: float
    seed: int
    verify: str = "sampled"  # or "all"
    length_control: str = "none"
    budgets: str = "ratio"
    within_stratum: str = "random"
    hardest_by: str = "effort"
    leave_out: str = "none"  # or "suspects": the scores come without them

    @classmethod
    def of(cls, selection: Selection) -> "Settings":
        named = {field.name: getattr(selection, field.name) for field in fields(cls)}
        return cls(**named | {"verify": "all" if selection.verify_all else "sampled"})

    @classmethod
    def from_record(cls, record: dict[str, Any], source: Path) -> "Settings":
        """Raises: UserError naming the file `source` and the field that is wrong."""
        known = {field.name: record[field.name] for field in fields(cls) if record.get(field.name) is not None}
        if absent := set(_REQUIRED) - set(known):
            raise UserError(f"{source} is damaged: it has no {min(absent)}: make it again")
        return cls.of(validated(Selection(), known, str(source)))

    @property
    def record(self) -> dict[str, Any]:
        """What a verification and a coreset keep: under additions more, and `leave_out` where it is not "none"."""
        stratified_by = "effort" if self.length_control == "none" else "length residual of effort"
        later = {name: getattr(self, name) for name, published in LATER.items() if getattr(self, name) != published}
        kept = {name: value for name, value in asdict(self).items() if name not in LATER}
        kept |= {"stratified_by": stratified_by, **later}
        return kept if self.mode in ("extended", "recommended") else {name: kept[name] for name in (*_REQUIRED, *later)}

    @property
    def made_from(self) -> dict[str, Any]:
        """What a verification depends on beside the scores."""
        kept = {name: value for name, value in self.record.items() if name not in ("budgets", "within_stratum")}
        return kept | {"verify": self.verify, "rules": RULES_VERSION}

    rules = property(lambda self: rules_of(self.mode))  # "paper" or "released"

    @property
    def target_columns(self) -> tuple[str, ...]:  # of the target's score files
        return ("effort",) if self.length_control == "none" else ("effort", "n_response_tokens")

    @property
    def columns(self) -> tuple[str, ...]:  # of the small model's
        more = {*self.target_columns, *(() if self.within_stratum == "random" else ("hidden_state",))}
        if self.hardest_by != "effort":
            more |= {"loss_untuned", "loss_without_prompt", "n_response_tokens"}
        return tuple(sorted(more))


@dataclass(frozen=True)
class StratumRecord:
    """One stratum; the sums and the ratio are None where no sample is verified."""

    stratum: int
    score_range: tuple[float, float]  # of the score that is stratified by: raw effort, or its length residual
    size: int
    verified: list[int]
    speculative_sum: float | None  # of the normalised scores of the verified samples
    target_sum: float | None
    verification_ratio: NonNegativeFloat | None

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


def cut_strata(speculative: np.ndarray, settings: Settings, columns: dict[str, np.ndarray] | None = None) -> Strata:
    """The strata of `stratified_score`'s efforts (N,); `columns`: `settings.columns`, where hardest_by reads them."""
    difficulty = None
    if settings.hardest_by != "effort":
        difficulty = columns["loss_untuned"] - columns["loss_without_prompt"]  # the logarithm of IFD
        difficulty = difficulty * (1 if settings.hardest_by == "ifd" else columns["n_response_tokens"])
    with refusals():
        return staff.stratify(speculative, settings.num_strata, settings.hardest_cutoff, difficulty)


def staff_rule(scores: Scores, strata: Strata, records: list[StratumRecord], settings: Settings) -> Rule:
    """STAFF's choice by the V_i of `records`, with what mode extended adds."""
    ratios, effort, seed = [record.verification_ratio for record in records], scores.effort, settings.seed
    if settings.budgets == "calibrated":
        ratios = [None if np.isnan(ratio) else float(ratio) for ratio in calibrated_ratios_of(records)]
    nearest = settings.within_stratum == "nearest"
    take = extended.nearest_to_centres(scores.columns["hidden_state"], seed) if nearest else None

    def rule(m: int, within: np.ndarray | None) -> Choice:
        own, budgets = strata.within(within), None
        if settings.budgets in ("size", "neyman"):
            weights = own.sizes if settings.budgets == "size" else extended.neyman_weights(effort, own)
            budgets = extended.proportional_budgets(own.sizes, weights, m)
        return staff.choose_staff(effort, own, ratios, m, settings.rules, seed, budgets, take)

    return rule


def stratified_score(scores: Scores, settings: Settings) -> Scores:
    """Replace `effort` by the quantity that is stratified; `scores` has `settings.columns`. Raises: UserError, under
    length control, for a row without a response token, and too few scores above 0."""
    if settings.length_control == "none":
        return scores
    tokens = scores.columns["n_response_tokens"]
    if len(empty := np.flatnonzero(tokens < 1)):
        raise UserError(f"{scores.source}: row {scores.index[empty[0]]} has no response token: remove the row")
    with refusals():
        return replace(scores, columns=scores.columns | {"effort": length_residual(scores.effort, tokens)})


def draw(strata: Strata, settings: Settings) -> list[np.ndarray]:
    return staff.draw_verification_samples(strata, settings.verify_per_stratum, settings.rules, settings.seed)


def verify(
    speculative: np.ndarray, target: Scores, settings: Settings, strata: Strata | None = None, index=None
) -> list[StratumRecord]:
    """V_i (`staff.verification_ratio`) of every stratum; None where no row of it was verified.

    Args: `speculative` (N,), from `stratified_score`; `target`, raw with `settings.target_columns`, at least of the
    drawn rows; `index` (N,), row numbers, by default 0 to N − 1. A drawn row that the target left out does not count.
    Scores are min–max normalised over D. Where the target has scored only the verified samples, its least and greatest
    score get the small model's least and greatest normalised scores of the same samples: normalised among themselves
    they would give too high a V, as the hardest samples are never drawn."""
    strata = cut_strata(speculative, settings) if strata is None else strata
    records = []
    for i, (rows, ours, theirs) in enumerate(verified_pairs(speculative, target, settings, strata, index)):
        sums = None, None, None
        if len(rows):
            sums = float(ours.sum()), float(theirs.sum()), staff.verification_ratio(theirs, ours)
        records.append(StratumRecord(i, strata.score_ranges[i], strata.sizes[i], rows.tolist(), *sums))
    return records


def verified_pairs(
    speculative: np.ndarray, target: Scores, settings: Settings, strata: Strata, index: np.ndarray | None = None
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """By stratum: numbers of the k verified rows, and their normalised scores by small model and target, (k,) each."""
    target, draws = stratified_score(target, settings), draw(strata, settings)
    index = np.arange(len(speculative)) if index is None else index
    draws = [rows[~np.isin(index[rows], target.left_out)] for rows in draws]
    drawn = np.concatenate(draws)
    speculatives = targets = np.empty(0)  # normalised scores of the drawn rows
    if len(drawn):
        speculatives = staff.min_max_normalise(speculative[drawn], reference=speculative)
        targets = target.at(index[drawn])
        if len(target.index) + np.isin(target.left_out, index).sum() >= len(speculative):
            targets = staff.min_max_normalise(targets, reference=target.effort)
        else:
            low, high = speculatives.min(), speculatives.max()
            targets = low + (high - low) * staff.min_max_normalise(targets, reference=targets)
    ends = np.cumsum([len(rows) for rows in draws])[:-1]
    return list(zip(np.split(index[drawn], ends), np.split(speculatives, ends), np.split(targets, ends), strict=True))


def null_ratios_of(records: list[StratumRecord]) -> np.ndarray:
    """`null_ratios` (K,) of a verification's strata; NaN where nothing is verified."""
    return null_ratios(*_sums(records))


def calibrated_ratios_of(records: list[StratumRecord]) -> np.ndarray:
    """`calibrated_ratios` (K,) of a verification's strata; NaN where nothing is verified."""
    return extended.calibrated_ratios(*_sums(records))


def _sums(records: list[StratumRecord]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Verified rows (K,), and the sums of their normalised scores by small model and target (K,)."""
    sums = np.array([(r.speculative_sum, r.target_sum) for r in records], dtype=float).reshape(-1, 2)
    return np.array([len(record.verified) for record in records]), *sums.T


def explain(choice: Choice, strata: Strata, num_rows: int, settings: Settings) -> np.ndarray:
    """Why each row is in a coreset or not, (num_rows,) in the order of the scores that `strata` are cut by."""
    chosen, reasons = np.zeros(num_rows, dtype=bool), np.empty(num_rows, dtype=object)
    chosen[choice.rows] = True
    drawn = ("not drawn in its stratum", "chosen: drawn at random in its stratum")
    if settings.rules == "released":
        drawn = ("below the chosen of its stratum", "chosen: among the highest of its stratum")
    if settings.within_stratum == "nearest":
        drawn = ("another row of its stratum stands for it", "chosen: nearest to a cluster's centre in its stratum")
    kept = "chosen: taken back from the hardest, as the strata do not hold enough"
    by = "" if settings.hardest_by == "effort" else f" by {settings.hardest_by}"
    hardest = (f"dropped: among the hardest {settings.hardest_cutoff:.0%}{by}", kept)
    for rows, texts in [*((members, drawn) for members in strata.members), (strata.hardest, hardest)]:
        reasons[rows] = np.array(texts, dtype=object)[chosen[rows].astype(np.intp)]
    reasons[np.setdiff1d(choice.fill, strata.hardest)] = "chosen: random fill of what the budgets left"
    return reasons


def write_verification(
    path: Path, settings: Settings, speculative: Scores, records: list[StratumRecord], target: Scores | None = None
) -> None:
    """Write V_i with what made both models' scores."""
    about = {"scores": speculative.made_by, "target": target and target.made_by}
    about |= {"data_fingerprint": speculative.fingerprint, "strata": [asdict(record) for record in records]}
    about["verified_samples"] = sum(len(record.verified) for record in records)
    about["null_ratios"] = [None if np.isnan(ratio) else float(ratio) for ratio in null_ratios_of(records)]
    write_sealed(path, _made_from(settings, speculative) | about)


def read_verification(path: Path, settings: Settings, speculative: Scores) -> tuple[list[StratumRecord], dict | None]:
    """The strata and the target's `Scores.made_by`. Raises: UserError for other settings or scores, and damage."""
    value, todo = read_sealed(path), "run verify.py again under the settings of now"
    refuse_difference(path, value, value | dict.fromkeys(LATER) | _made_from(settings, speculative), todo)
    return checked(list[StratumRecord], value.get("strata"), path), checked(dict | None, value.get("target"), path)


def _made_from(settings: Settings, speculative: Scores) -> dict[str, Any]:
    made_from, out = settings.made_from, speculative.left_out
    if settings.leave_out != "none":  # of two rows with one score either may be left out
        made_from |= {"left_out": len(out), "left_out_sha256": digest(out.tobytes())}
    scores = digest(memoryview(np.ascontiguousarray(speculative.effort)).cast("B"))
    return made_from | {"speculative_scores_sha256": scores}
