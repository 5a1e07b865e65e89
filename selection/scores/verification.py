"""Step 4 on stored scores: the verification ratio V_i of each stratum, and the record of what it is made of."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict

from selection.method.adaptive import first_counts, next_counts
from selection.method.length_control import length_residual
from selection.method.staff import (
    Strata,
    coreset_size,
    draw_verification_samples,
    min_max_normalise,
    stratify,
    verification_ratio,
)
from selection.run.config import Selection, rules_of, validated
from selection.run.errors import UserError
from selection.run.products import checked, digest, first_difference, read_sealed, write_sealed
from selection.scores.folder import Scores

RULES_VERSION = 2  # of draws, V_i and choice: counted up where the same scores give another coreset


@dataclass(frozen=True)
class Settings:
    """What strata and draws depend on; a verification serves any rate, but no other settings than its own."""

    mode: str
    num_strata: int
    verify_per_stratum: int
    hardest_cutoff: float
    seed: int
    verify: str = "sampled"  # or "all" or "adaptive"; it and what follows is told apart under mode extended alone
    length_control: str = "none"
    rates: list[float] | None = None  # of adaptive verification, whose end they decide on

    @classmethod
    def of(cls, selection: Selection) -> "Settings":
        named = {field.name: getattr(selection, field.name) for field in fields(cls)}
        verify = "all" if selection.verify_all else "adaptive" if selection.verify == "adaptive" else "sampled"
        return cls(**named | {"verify": verify, "rates": list(selection.rates) if verify == "adaptive" else None})

    @classmethod
    def from_record(cls, record: dict[str, Any], source: Path) -> "Settings":
        """Those of a `record` (below) out of the file `source`. Raises: UserError naming the field that is wrong."""
        known = {field.name: record[field.name] for field in fields(cls) if record.get(field.name) is not None}
        if absent := {"mode", "num_strata", "verify_per_stratum", "hardest_cutoff", "seed"} - set(known):
            raise UserError(f"{source} is damaged: it has no {min(absent)}: make it again")
        return cls.of(validated(Selection(), known, str(source)))

    @property
    def record(self) -> dict[str, Any]:
        """What a verification and a coreset keep; of the two published modes just what they always kept."""
        kept = asdict(self)
        if self.mode != "extended":
            return {name: kept[name] for name in kept if name not in ("verify", "length_control", "rates")}
        return kept | {"stratified_by": "effort" if self.length_control == "none" else "length residual of effort"}

    @property
    def made_from(self) -> dict[str, Any]:
        """What a verification depends on beside the scores."""
        return {**self.record, "verify": self.verify, "rules": RULES_VERSION}

    @property
    def rules(self) -> str:
        """ "paper" or "released"."""
        return rules_of(self.mode)

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the score files, what strata and V_i are made of."""
        return ("effort",) if self.length_control == "none" else ("effort", "n_response_tokens")


@dataclass(frozen=True)
class StratumRecord:
    """One stratum; the sums are over its verified samples, after normalisation. Not verified: no sums, no ratio."""

    stratum: int
    score_range: tuple[float, float]  # of the score that is stratified by: raw effort, or its length residual
    size: int
    verified: list[int]
    speculative_sum: float | None
    target_sum: float | None
    verification_ratio: float | None

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


def cut_strata(speculative: np.ndarray, settings: Settings) -> Strata:
    return stratify(speculative, settings.num_strata, settings.hardest_cutoff)


def stratified_score(scores: Scores, settings: Settings) -> Scores:
    """With that score as `effort` which strata and V_i are of; of raw `scores` with `settings.columns`."""
    return length_controlled(scores) if settings.length_control == "residual" else scores


def draw(strata: Strata, settings: Settings) -> list[np.ndarray]:
    """The b_v rows of each stratum; those of adaptive verification come from `adaptive_draws`."""
    return draw_verification_samples(strata, settings.verify_per_stratum, settings.rules, settings.seed)


def adaptive_draws(
    speculative: np.ndarray,
    settings: Settings,
    strata: Strata,
    index: np.ndarray | None,
    target_now: Callable[[], Scores],
) -> Iterator[list[np.ndarray]]:
    """All rows of each stratum drawn so far, round after round, until enough are (selection/method/adaptive.py).

    `target_now` gives the raw scores of the target, when the next round is asked for: then it has scored at least
    this one. What it has scored besides decides nothing, so stored scores of all rows give the rounds of a real run.
    """
    limit, counts = settings.num_strata * settings.verify_per_stratum, None
    ms = [coreset_size(rate, len(speculative)) for rate in settings.rates]
    following: list[int] | None = first_counts(strata.sizes, settings.verify_per_stratum)
    while following is not None:
        counts = following
        draws = draw_verification_samples(strata, counts, settings.rules, settings.seed)
        yield draws
        pairs = pairs_of(draws, speculative, _drawn_alone(target_now(), draws, index), settings, index)
        following = next_counts(counts, [pair[1:] for pair in pairs], strata.sizes, limit, ms, settings.seed)


def _drawn_alone(target: Scores, draws: list[np.ndarray], index: np.ndarray | None) -> Scores:
    rows = np.sort(np.concatenate(draws))
    return target.only(rows if index is None else index[rows])


def verify(
    speculative: np.ndarray,
    target: Scores,
    settings: Settings,
    strata: Strata | None = None,
    index: np.ndarray | None = None,
) -> list[StratumRecord]:
    """V_i for every verified stratum. `speculative` (N,), as `stratified_score` has it; `target`, raw with
    `settings.columns`, has scored at least the drawn rows.

    `strata`: those of `cut_strata`, from whoever has them already. `index` (N,): the row numbers, where they are not
    0 to N − 1 because rows were left out in scoring. A drawn row that the target left out counts for neither model.

    Scores are min–max normalised first, each model's over D. Where the target has scored only the verified samples,
    its minimum and maximum over D are unknown. In both modes its least and greatest verified score then get the
    places that the small model's normalised scores of the same samples reach from and to, as they would if the two
    models agreed; so V says where they disagree and not how few samples were looked at. (With the minimum and maximum
    over the verified samples themselves V comes out too high, as the hardest samples are never among them.)
    """
    strata = cut_strata(speculative, settings) if strata is None else strata
    records = []
    for i, (rows, ours, theirs) in enumerate(verified_pairs(speculative, target, settings, strata, index)):
        sums: tuple[Any, Any, Any] = (None, None, None)
        if len(rows):
            sums = float(ours.sum()), float(theirs.sum()), verification_ratio(theirs, ours)
        records.append(StratumRecord(i, strata.score_ranges[i], strata.sizes[i], rows.tolist(), *sums))
    return records


def verified_pairs(
    speculative: np.ndarray, target: Scores, settings: Settings, strata: Strata, index: np.ndarray | None = None
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What `verify` takes V_i of, stratum by stratum: the verified rows' numbers, and the small model's and the
    target's normalised scores of them, (k,) each; empty where a stratum is not verified. Args: as `verify`."""
    if settings.verify == "adaptive":
        *_, draws = adaptive_draws(speculative, settings, strata, index, lambda: target)
        return pairs_of(draws, speculative, _drawn_alone(target, draws, index), settings, index)
    return pairs_of(draw(strata, settings), speculative, target, settings, index)


def pairs_of(
    draws: list[np.ndarray],
    speculative: np.ndarray,
    target: Scores,
    settings: Settings,
    index: np.ndarray | None = None,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """`verified_pairs` of given `draws`, the rows (places in `speculative`) of each stratum."""
    target = stratified_score(target, settings)
    numbers = draws if index is None else [index[rows] for rows in draws]
    if len(target.left_out):
        known = [~np.isin(rows, target.left_out) for rows in numbers]
        draws, numbers = ([rows[k] for rows, k in zip(each, known, strict=True)] for each in (draws, numbers))
    drawn = np.concatenate(draws)
    speculatives = targets = np.empty(0)  # normalised scores of the drawn rows
    if len(drawn):
        complete = len(target.index) + len(target.left_out) >= len(speculative)
        of_drawn = target.at(np.concatenate(numbers))
        speculatives = min_max_normalise(speculative[drawn], reference=speculative)
        low, high = (0.0, 1.0) if complete else (speculatives.min(), speculatives.max())
        targets = min_max_normalise(of_drawn, reference=target.effort if complete else of_drawn)
        targets = low + (high - low) * targets
    ends = np.cumsum([len(rows) for rows in draws])[:-1]
    return list(zip(numbers, np.split(speculatives, ends), np.split(targets, ends), strict=True))


def write_verification(
    path: Path,
    settings: Settings,
    speculative: Scores,
    records: list[StratumRecord],
    target: Scores | None = None,
    rounds: list[list[int]] | None = None,
) -> None:
    """`target`: the scores that V_i is of beside the speculative ones; both are named. `rounds` of adaptive
    verification: draws of each stratum after each."""
    value = {
        **_made_from(settings, speculative),
        "scores": speculative.made_by,
        "target": target and target.made_by,
        **({} if rounds is None else {"rounds": rounds}),
        "data_fingerprint": speculative.fingerprint,
        "verified_samples": sum(len(record.verified) for record in records),
        "strata": [asdict(record) for record in records],
    }
    write_sealed(path, value)


def read_verification(path: Path, settings: Settings, speculative: Scores) -> tuple[list[StratumRecord], dict | None]:
    """The strata, and what made the target's scores, where that is known (`made_by` in score_files.py).

    Raises: UserError where it was made under other settings or from other scores, or was changed since."""
    value, wanted = read_sealed(path), _made_from(settings, speculative)
    if difference := first_difference({key: value.get(key) for key in wanted}, wanted):
        raise UserError(f"{path} was made otherwise ({difference}): run verify.py again under the settings of now")
    return checked(list[StratumRecord], value.get("strata"), path), checked(dict | None, value.get("target"), path)


def _made_from(settings: Settings, speculative: Scores) -> dict[str, Any]:
    scores = digest(memoryview(np.ascontiguousarray(speculative.effort)).cast("B"))
    return {**settings.made_from, "speculative_scores_sha256": scores}


def length_controlled(scores: Scores) -> Scores:
    """With the length residual in the place of the effort score, fitted over the rows that are there.

    Raises: UserError where a row has no response token.
    """
    tokens = scores.columns["n_response_tokens"]
    if len(empty := np.flatnonzero(tokens < 1)):
        raise UserError(f"{scores.source}: row {scores.index[empty[0]]} has no response token: remove the row")
    return replace(scores, columns=scores.columns | {"effort": length_residual(scores.effort, tokens)})
