"""What the report shows of a run: scores by row, coresets with their strata, correlations, a map, evaluations."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
from scipy.stats import hypergeom
from typing_extensions import TypedDict

from selection.method.interval import ratio_interval
from selection.report.agreement import correlation_interval, partial_spearman, spearman
from selection.report.annotated import CoresetRecord, annotated
from selection.rows.conversation import as_messages
from selection.rows.split import finished_split, rows_of
from selection.run.config import Experiment
from selection.run.errors import UserError
from selection.run.metrics import NLL, Metrics, read_metrics
from selection.run.products import checked, parse_json, read_json, read_record
from selection.scores.folder import Scores, has_column, read_scores
from selection.scores.pool import Pool, read_suspects, without
from selection.scores.verification import Settings, cut_strata, null_ratios_of, stratified_score, verified_pairs

CHOSEN, NOT_CHOSEN, HARDEST = "chosen", "not chosen", "hardest, dropped"
STATUSES = [CHOSEN, NOT_CHOSEN, HARDEST]
WORST = 5  # suspects of each kind that are shown
ANSWERS = 10  # held-out rows whose answers are shown


@dataclass
class Shown:
    """A coreset as the page shows it. Arrays are (N,), by row of the training split."""

    name: str
    about: dict[str, Any]  # the coreset's own record
    chosen: np.ndarray  # bool
    reason: np.ndarray  # text
    score: np.ndarray  # what strata are cut by, nan where not known: effort, or its length residual
    stratum: np.ndarray  # −1 where there is none
    strata: list[dict[str, Any]]  # the record's, with low, high, ratio (V_i), ratio_low, ratio_high; verified: a number
    strata_of: str | None  # the coreset that they were cut for

    @property
    def m(self) -> int:
        return int(self.chosen.sum())

    def status(self, rows: np.ndarray) -> np.ndarray:
        """One of STATUSES for each of `rows`, which have scores."""
        dropped = (self.stratum[rows] < 0) & np.isfinite(self.score[rows]) & bool(self.strata)  # not: left out
        return np.select([self.chosen[rows], dropped], [CHOSEN, HARDEST], NOT_CHOSEN)


def read_run(experiment: Experiment) -> tuple[pd.DataFrame, list[Shown], list[str]]:
    """The scores, the coresets (STAFF's first, clean last), and a line for each coreset that cannot be shown.

    Scores are (N, 4), by row of the training split, nan where not known: row (in the user's data, from 0), effort,
    target (the target's effort score), length (response tokens).
    Raises: UserError where there is no coreset, or none that can be shown."""
    if not (paths := sorted(experiment.coresets.glob("*.json"))):
        raise UserError(f"{experiment.folder} has no coreset yet: run coreset.py, then this again")
    shown, refused, split = [], [], finished_split(experiment)
    for path in sorted(paths, key=lambda path: (not path.name.startswith("staff-"), path.stem == "clean")):
        try:
            about = checked(CoresetRecord, read_record(path), path)
            table = annotated(experiment, path, split)
            train = table.filter(pc.equal(table["split"], "train")).sort_by("index")
            shown.append(_shown(experiment, path, about, train, shown[0] if shown else None))
        except UserError as error:
            refused.append(f"{path.stem} is not shown: {error}")
    if not shown:
        raise UserError(refused[0])
    named = {"row": "row", "effort": "effort", "target": "target_effort", "length": "n_response_tokens"}
    figures = pd.DataFrame({name: train[column].to_numpy() for name, column in named.items()})
    if experiment.direct:  # its scores stand under effort: there are no two to compare
        figures["target"] = np.nan
    return figures, shown, refused


def _shown(experiment: Experiment, path: Path, about: dict, train: pa.Table, first: Shown | None) -> Shown:
    name, chosen, reason, score = path.stem, *(train[column].to_numpy() for column in ("chosen", "reason", "effort"))
    if "strata" in about:
        settings = Settings.from_record(about, path)
        scores = read_scores(experiment.small_scores, settings.columns, ids=False)
        scores = stratified_score(without(scores, about.get("left_out")), settings)
        score = np.full(len(chosen), np.nan)
        score[scores.index] = scores.effort
        stratum, strata = train["stratum"].fill_null(-1).to_numpy(), []
        spreads, nulls = _intervals(experiment, about, scores, settings), null_ratios_of(about["strata"])
        for entry, spread, null in zip(about["strata"], spreads, nulls, strict=True):
            (low, high), ratio = entry.score_range, entry.verification_ratio
            own = {"low": low, "high": high, "ratio": ratio, "ratio_low": spread[0], "ratio_high": spread[1]}
            own["null_ratio"] = float(null)
            strata.append({**vars(entry), **own, "verified": len(entry.verified)})
        return Shown(name, about, chosen, reason, score, stratum, strata, name)
    if first and first.strata:  # another method's coreset, by the strata of STAFF's first
        taken = [int((chosen & (first.stratum == s["stratum"])).sum()) for s in first.strata]
        strata = [{**s, "budget": n, "of_which_random_fill": 0} for s, n in zip(first.strata, taken, strict=True)]
        return Shown(name, about, chosen, reason, first.score, first.stratum, strata, first.name)
    return Shown(name, about, chosen, reason, score, np.full(len(chosen), -1), [], None)


def _intervals(experiment: Experiment, about: dict, scores: Scores, settings: Settings) -> list[tuple[float, float]]:
    """The interval of each stratum's V_i; nan where the run folder lacks the target's scores that V_i was made of."""
    unknown = [(float("nan"), float("nan"))] * len(about["strata"])
    try:
        target = read_scores(experiment.target_scores, settings.target_columns, ids=False)
        target, strata = without(target, about.get("left_out")), cut_strata(scores.effort, settings, scores.columns)
        pairs = verified_pairs(scores.effort, target, settings, strata, scores.index)
    except UserError:  # no target scores, or not of the rows that this coreset verified
        return unknown
    for (rows, _, theirs), entry in zip(pairs, about["strata"], strict=True):
        if rows.tolist() != entry.verified or not np.isclose(theirs.sum(), entry.target_sum or 0):
            return unknown
    strata = about["strata"]
    return [ratio_interval(theirs, ours, entry.size) for (_, ours, theirs), entry in zip(pairs, strata, strict=True)]


def read_pool(experiment: Experiment) -> dict[str, Any] | None:
    """What check_pool.py found: its pool.json, and of each kind of suspect that its list has now: name, what it means,
    how many rows, and the worst of them with shortened texts; `unread`: why there is no list. None: it was not run."""
    if not (path := experiment.pool / "pool.json").exists():
        return None
    # It imports scikit-learn, for runs with a pool alone.
    from selection.scores.suspects import KINDS, how_far_to_trust, possible_gain

    try:
        about, suspects = read_json(path, Pool), read_suspects(path.with_name("suspects.jsonl"))
    except UserError as error:
        return {"unread": str(error)}
    by_kind: dict[str, list] = {kind: [] for kind in KINDS}
    for suspect in suspects:
        by_kind.setdefault(suspect.get("kind", "listed"), []).append(suspect)
    kinds = [
        {"kind": kind, "meaning": KINDS.get(kind, "not of check_pool.py"), "count": len(own), "worst": own[:WORST]}
        for kind, own in by_kind.items()
        if own
    ]
    tried = about.get("tried", {})
    gain = possible_gain({kind: len(own) for kind, own in by_kind.items()}, about["rows"], tried)
    said = {"gain": gain, "trust": how_far_to_trust(tried), "unread": ""}
    return about | {"suspects": len(suspects), "kinds": kinds} | said


@dataclass(frozen=True)
class Correlation:
    value: float
    low: float  # of the 95 % interval, nan where it is not known
    high: float
    says: str


_SAYS = {  # what a rank correlation below 0.3, below 0.7 and from there on says
    "target": [f"the small model says {much} about the target" for much in ("little", "something", "much")],
    "length": [f"the score is {much} length" for much in ("no measure of", "partly", "mostly")],
}
_SAYS["target_by_length"] = [f"{each} beyond length" for each in _SAYS["target"]]


def _correlation(name: str, value: float, n: int) -> Correlation | None:
    if np.isnan(value):
        return None
    low, high = correlation_interval(value, n, given=name == "target_by_length")
    strength, ends = (-value, (-high, -low)) if name == "length" and value < 0 else (value, (low, high))
    unsure = not np.isfinite(low) or (ends[0] < 0.3 and ends[1] >= 0.7)
    says = "too few rows to tell" if unsure else _SAYS[name][(strength >= 0.3) + (strength >= 0.7)]
    return Correlation(value, low, high, says)


def correlations(figures: pd.DataFrame) -> dict[str, Correlation | None]:
    """Spearman's of small and target scores (`target`), the same with response length held fixed (`target_by_length`),
    and of scores and response length (`length`); None where it has no meaning."""
    scored, both = figures.dropna(subset="effort"), figures.dropna(subset=["effort", "target"])
    found = {
        "target": spearman(both["effort"], both["target"]),
        "target_by_length": partial_spearman(both["effort"], both["target"], both["length"]),
        "length": spearman(scored["effort"], scored["length"]),
    }
    return {name: _correlation(name, value, len(scored if name == "length" else both)) for name, value in found.items()}


def transcript(messages: list[dict[str, str]]) -> str:
    """A row's messages but for the last response; those that are scored beside it say so."""
    *before, _ = messages
    if len(before) == 1:
        return before[0]["content"]
    scored = {role: f"{role} (scored)" for role in ("assistant", "function")}
    return "\n".join(f"{scored.get(m['role'], m['role'])}: {m['content']}" for m in before)


def against_all(
    experiment: Experiment, figures: pd.DataFrame, shown: list[Shown], rows: np.ndarray
) -> list[dict[str, Any]]:
    """What the coresets are made of, all rows first: name, m, quartiles of response tokens and of scores, tokens in
    all; how many of the k-means `clusters` of the features of `rows` it has `reached`, and a random draw would."""
    features, lines = _features(experiment, rows), []
    if features is not None:
        from selection.method.rules import clusters_of  # imports scikit-learn, for runs with features alone

        cluster, _ = clusters_of(features, experiment.selection.seed)
        sizes = np.bincount(cluster)
    for name, chosen in [("all rows", np.ones(len(figures), bool)), *((each.name, each.chosen) for each in shown)]:
        own = figures[chosen]
        line = {"name": name, "m": len(own), "tokens": own["length"].sum() if own["length"].notna().all() else None}
        line |= {f"{of}_quartiles": own[of].quantile([0.25, 0.5, 0.75]).tolist() for of in ("length", "effort")}
        if features is not None:
            none = hypergeom.pmf(0, len(rows), sizes, chosen[rows].sum())
            line |= {"clusters": len(sizes), "reached": len(np.unique(cluster[chosen[rows]]))}
            line["at_random"] = float((1 - none).sum())
        lines.append(line)
    return lines


def project(experiment: Experiment, rows: np.ndarray) -> tuple[np.ndarray, list[float]] | None:
    """The first two principal components (n, 2) of the speculative model's features of `rows`, ascending, and their
    share of the variance. None where there are no features or fewer than three different rows."""
    if (features := _features(experiment, rows)) is None:
        return None
    from sklearn.decomposition import PCA  # seconds to import, for runs with features alone

    pca = PCA(n_components=2, svd_solver="full")
    return pca.fit_transform(features), pca.explained_variance_ratio_.tolist()


def _features(experiment: Experiment, rows: np.ndarray) -> np.ndarray | None:
    folder = experiment.small_scores
    if len(rows) < 3 or not has_column(folder, "hidden_state"):
        return None
    parts = pa.dataset.dataset([str(path) for path in sorted(folder.glob("part-*.parquet"))], format="parquet")
    table = parts.to_table(["index", "hidden_state"], filter=pc.field("index").isin(rows.tolist())).sort_by("index")
    features = np.stack(table["hidden_state"].to_numpy()).astype(np.float64)
    return features if features.shape[1] > 1 and np.ptp(features, axis=0).any() else None


def evaluations(experiment: Experiment, first: list[str]) -> tuple[dict[str, Metrics], list[str]]:
    """Metrics by the evaluated target's name, those of `first` first; and a line for each that cannot be read."""
    folders = {path.name: path for path in (experiment.folder / "eval").glob("[!.]*") if path.is_dir()}
    found, unread = {}, []
    for name in [*(name for name in first if name in folders), *sorted(folders.keys() - set(first))]:
        try:
            found[name] = read_metrics(folders[name])
        except UserError as error:
            unread.append(f"The evaluation of {name} is not shown: {error}")
    return found, unread


class _Answer(TypedDict):
    predict: str
    label: str


def side_by_side(experiment: Experiment, evaluated: dict[str, Metrics]) -> tuple[list[str], list[dict[str, Any]], str]:
    """Two evaluated targets, of one rate where there are such; the first held-out rows with prompt, reference and
    both's `answers` (text, nll or None); and why they cannot be shown, where that is so."""
    files = {name: experiment.folder / "eval" / name / "predictions.jsonl" for name in evaluated}
    first, *others = [name for name, path in files.items() if path.exists()] or [""]
    if not others:
        return [], [], ""
    names = [first, min(others, key=lambda name: name.rpartition("-")[2] != first.rpartition("-")[2])]
    rows, answers = rows_of(experiment, "eval"), []
    try:
        for name in names:
            with files[name].open(encoding="utf-8") as file:
                lines = [parse_json(line) for line in itertools.islice(file, min(ANSWERS, len(rows)))]
            answers.append(checked(list[_Answer], lines, files[name]))
    except (OSError, ValueError, RecursionError, UserError) as error:
        return [], [], f"The answers of {name} are not shown: {error}"
    losses = [[*evaluated[name].get("by_sample", {}).get(NLL, []), *[None] * ANSWERS] for name in names]
    shown = []
    for number, pair in enumerate(zip(*answers, strict=False)):  # one of them may be shorter
        own = [(each["predict"], loss[number]) for each, loss in zip(pair, losses, strict=True)]
        prompt = transcript(as_messages(rows[number], experiment.row_format.entry))
        shown.append({"prompt": prompt, "reference": pair[0]["label"], "answers": own})
    return names, shown, ""


def number(value: float | None, digits: int = 4) -> str:
    """Like 0.01234, 12,345; – where it is not known."""
    if value is None or not np.isfinite(value):
        return "–"
    if float(value).is_integer():
        return f"{int(value):,}"
    text = f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"
    return text.replace("-", "−", 1) if value < 0 else text


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def interval(stratum: dict[str, Any]) -> str:
    """The 95 % interval of V_i."""
    low, high = stratum["ratio_low"], stratum["ratio_high"]
    return f"{number(low, 3)} to {number(high, 3)}" if np.isfinite(low) else "not known"
