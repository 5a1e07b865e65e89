"""One HTML page about a run: scores, strata, verification ratios, samples, costs, and what each coreset takes.

The page holds everything it shows and reaches for nothing else. Each figure is defined once, as a Vega-Lite chart:
drawn into the page as SVG, for readers and printers without scripts, and made interactive by the library's own script.
"""

import base64
import hashlib
import itertools
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import altair as alt
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import vl_convert
from jinja2 import Environment
from markupsafe import Markup
from pydantic import ConfigDict, Field, NonNegativeInt
from typing_extensions import TypedDict

from selection.method.interval import FEWEST, ratio_interval
from selection.method.staff import lowest
from selection.report.agreement import partial_spearman, spearman
from selection.report.annotated import annotated
from selection.rows.split import finished_split, rows_of
from selection.run.config import REPOSITORY, DatasetFormat, Experiment
from selection.run.errors import UserError
from selection.run.ledger import TARGET_TUNING, CostSummary, format_summary, read_ledger, summarise
from selection.run.metrics import ABOUT, Metrics, read_metrics, two_decimals
from selection.run.products import atomic_path, checked, code_version, read_json
from selection.run.yaml_file import to_yaml
from selection.scores.folder import Scores, has_column, read_scores
from selection.scores.verification import Settings, cut_strata, stratified_score, verified_pairs

MOST_ROWS = 20_000  # in the table
MOST_POINTS = 3_000  # in a figure
MOST_TEXT = 16_000_000  # characters of all prompts and responses; longer ones are cut to fit
ROWS_WITHOUT_SCRIPT = 100
WIDTH = 1000  # of a figure, pixels
BARS = 60  # of the histogram below the cut, about

CHOSEN, NOT_CHOSEN, HARDEST = "chosen", "not chosen", "hardest, dropped"
STATUSES = [CHOSEN, NOT_CHOSEN, HARDEST]
DRAWN, FILLED, LEFT = "chosen by budget", "chosen by random fill", "not chosen"


@dataclass
class Shown:
    """A coreset as the page shows it. Arrays are (N,), by row of the training split."""

    name: str
    about: dict[str, Any]  # the coreset's own record
    chosen: np.ndarray  # bool
    reason: list[str]
    score: np.ndarray  # what strata are cut by, nan where not known: effort, or its length residual
    stratum: np.ndarray  # −1 where there is none
    strata: list[dict[str, Any]]  # stratum, low, high, size, verified, ratio, ratio_low, ratio_high, budget, fill
    strata_of: str | None  # the coreset that they were cut for

    @property
    def m(self) -> int:
        return int(self.chosen.sum())

    def status(self, rows: np.ndarray) -> np.ndarray:
        """Number in STATUSES of each of `rows`, which have scores."""
        not_chosen = np.where((self.stratum[rows] < 0) & bool(self.strata), 2, 1)
        return np.where(self.chosen[rows], 0, not_chosen)


@dataclass
class Figures:
    """(N,) by row of the training split, nan where not known."""

    row: np.ndarray  # number in the user's data, from 0
    effort: np.ndarray
    target: np.ndarray
    length: np.ndarray  # response tokens

    @classmethod
    def of(cls, train: pa.Table) -> "Figures":
        names = ("effort", "target_effort", "n_response_tokens")
        return cls(train["row"].to_numpy(), *(_numbers(train, name) for name in names))


def write_report(experiment: Experiment) -> Path:
    """Write <run folder>/report.html; returns it. Raises: UserError where there is no coreset that can be shown."""
    page = render(experiment)
    path = experiment.folder / "report.html"
    with atomic_path(path) as draft:
        draft.write_text(page, encoding="utf-8")
    return path


def render(experiment: Experiment) -> str:
    configuration = _configuration(experiment)  # before anything here counts as a stage
    figures, shown, refused = read_run(experiment)
    seed = experiment.selection.seed
    scored = np.flatnonzero(np.isfinite(figures.effort))
    both = scored[np.isfinite(figures.target[scored])]
    points, pairs = sample(scored, MOST_POINTS, seed), sample(both, MOST_POINTS, seed)
    places, explained, why_no_map = project(experiment, points)
    of_map = {}
    if places is not None:
        fifth, labels = fifths(figures.effort[scored])
        fifth = fifth[np.searchsorted(scored, points)]
        of_map = {"x": places[:, 0], "y": places[:, 1], "fifth": np.array(labels)[fifth]}
    bases = {
        "points": _columns(figures, points) | of_map,
        "pairs": _columns(figures, pairs),
    }
    stratified_by = shown[0].about.get("stratified_by", "effort").replace("effort", "effort score")
    specs = charts(figures, scored, both, places is not None, bool(shown[0].strata), stratified_by)
    datasets = [
        {**bar_data(each), "status": {"points": each.status(points), "pairs": each.status(pairs)}} for each in shown
    ]
    static = {name: svg(name, spec, with_points(bases, datasets[0])) for name, spec in specs.items()}
    table = table_rows(experiment, figures, shown[0], seed)
    in_table = table["index"]
    groups = sorted({(bool(c), r) for each in shown for c, r in zip(each.chosen, each.reason, strict=True)})
    group_number = {group: i for i, group in enumerate(groups)}
    data = {
        "rows": {name: values for name, values in table.items() if name != "index"},
        "groups": [{"chosen": chosen, "reason": reason} for chosen, reason in groups],
        "statuses": STATUSES,
        "coresets": [
            {
                "name": each.name,
                "group": [group_number[bool(each.chosen[i]), each.reason[i]] for i in in_table],
                "stratum": each.stratum[in_table],
                "ratio": [s["ratio"] for s in each.strata],
                "data": datasets[k],
            }
            for k, each in enumerate(shown)
        ],
        "bases": bases,
        "charts": specs,
    }
    summary, costs, no_costs = _costs(experiment)
    evaluated, unread = evaluations(experiment, [each.name for each in shown])
    return _page(
        experiment=experiment,
        run=experiment.folder.relative_to(REPOSITORY)
        if experiment.folder.is_relative_to(REPOSITORY)
        else experiment.folder,
        num_rows=len(figures.row),
        held_out=_held_out(experiment),
        shown=shown,
        refused=refused,
        verdicts=[verdict(summary, costs, each.name, no_costs) for each in shown],
        facts=facts(experiment, figures, shown[0]),
        correlations=correlations(figures, scored, both),
        evaluated=evaluated,
        unread=unread,
        tuned_on={cost.what: cost.samples for cost in costs if cost.stage == TARGET_TUNING},
        static={name: Markup(text) for name, text in static.items()},
        captions=captions(figures, shown[0], scored, both, points, pairs, explained),
        why_no_map=why_no_map,
        table=static_rows(table, shown[0]),
        table_note=table_note(table, figures, shown[0], seed),
        costs=costs,
        no_costs=no_costs,
        summary=summary and format_summary(summary),
        configuration=configuration,
        version=code_version(),
        stratified_by=stratified_by,
        data=data,
    )


# What is known of the run


def read_run(experiment: Experiment) -> tuple[Figures, list[Shown], list[str]]:
    """The run's figures, its coresets, STAFF's first, and what is said of those that cannot be shown."""
    paths = sorted(experiment.coresets.glob("*.json"))
    if not paths:
        raise UserError(f"{experiment.folder} has no coreset yet: run coreset.py, then this again")
    records, refused = [], []
    for path in paths:
        try:
            records.append((path, checked(_Record, read_json(path), path)))
        except UserError as error:
            refused.append(f"{path.stem} is not shown: {error}")
    records.sort(key=lambda each: (each[1].get("method") != "staff", each[1].get("method", ""), each[1].get("rate", 0)))
    figures, shown, split = None, [], finished_split(experiment)
    for path, about in records:
        try:
            table = annotated(experiment, path, split)
            train = table.filter(pc.equal(table["split"], "train")).sort_by("index")
            shown.append(_shown(experiment, path.stem, about, train, shown))
        except UserError as error:
            refused.append(f"{path.stem} is not shown: {error}")
            continue
        figures = figures or Figures.of(train)
    if not shown:
        raise UserError(refused[0])
    return figures, shown, refused


class _Budget(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow", strict=True)

    budget: NonNegativeInt
    of_which_random_fill: NonNegativeInt


class _Record(TypedDict, total=False):
    """Of a coreset's file, what the page reads and nobody else checks."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)

    method: str
    rate: float
    mode: str
    num_strata: int
    verify_per_stratum: int
    hardest_cutoff: float
    seed: int
    from_hardest: int
    stratified_by: str
    code_version: str
    data_fingerprint: str | None
    strata: Annotated[list[_Budget], Field(min_length=1)]


def _shown(experiment: Experiment, name: str, about: dict, train: pa.Table, earlier: list[Shown]) -> Shown:
    chosen, reason = train["chosen"].to_numpy(), train["reason"].to_pylist()
    score, strata_of = _numbers(train, "effort"), name
    if "strata" in about:
        settings = Settings.from_record(about, experiment.coresets / f"{name}.json")
        scores = stratified_score(read_scores(experiment.small_scores, settings.columns, ids=False), settings)
        score[scores.index] = scores.effort
        stratum = train["stratum"].fill_null(-1).to_numpy()
        same = [s for s in earlier if _verified(s.about) == _verified(about)]
        strata = same[0].strata if same else []
        intervals = [(s["ratio_low"], s["ratio_high"]) for s in strata] or _intervals(
            experiment, about, scores, settings
        )
        strata = [_stratum(entry, *intervals[i]) for i, entry in enumerate(about["strata"])]
    elif earlier and earlier[0].strata:  # another method's coreset, by the strata of STAFF's first
        score, stratum, strata_of = earlier[0].score, earlier[0].stratum, earlier[0].name
        taken = np.bincount(stratum[chosen & (stratum >= 0)], minlength=len(earlier[0].strata)).tolist()
        strata = [{**s, "budget": n, "fill": 0} for s, n in zip(earlier[0].strata, taken, strict=True)]
    else:
        stratum, strata, strata_of = np.full(len(chosen), -1), [], None
    return Shown(name, about, chosen, reason, score, stratum, strata, strata_of)


def _verified(about: dict) -> list | None:
    """What V_i and its interval are made of; the rates of one run share it."""
    return [(s["verified"], s["target_sum"]) for s in about["strata"]] if "strata" in about else None


def _stratum(entry: dict, ratio_low: float, ratio_high: float) -> dict[str, Any]:
    return {
        "stratum": entry["stratum"],
        "low": entry["score_range"][0],
        "high": entry["score_range"][1],
        "size": entry["size"],
        "verified": len(entry["verified"]),
        "ratio": entry["verification_ratio"],
        "ratio_low": ratio_low,
        "ratio_high": ratio_high,
        "budget": entry["budget"],
        "fill": entry["of_which_random_fill"],
    }


def _intervals(experiment: Experiment, about: dict, scores: Scores, settings: Settings) -> list[tuple[float, float]]:
    """Of each stratum's V_i; nan where the target's scores are not in the run folder, or are not those of V_i."""
    unknown = [(float("nan"), float("nan"))] * len(about["strata"])
    if not experiment.target_scores.exists():
        return unknown
    target = read_scores(experiment.target_scores, settings.columns, ids=False)
    try:
        pairs = verified_pairs(scores.effort, target, settings, cut_strata(scores.effort, settings), scores.index)
    except UserError:  # the target has scored other rows than this coreset's
        return unknown
    for (rows, _, theirs), entry in zip(pairs, about["strata"], strict=True):
        if rows.tolist() != entry["verified"] or not np.isclose(theirs.sum(), entry["target_sum"] or 0):
            return unknown
    sizes = [entry["size"] for entry in about["strata"]]
    return [ratio_interval(theirs, ours, size) for (_, ours, theirs), size in zip(pairs, sizes, strict=True)]


def _configuration(experiment: Experiment) -> str:
    return experiment.record.read_text(encoding="utf-8") if experiment.record.exists() else to_yaml(experiment)


def _held_out(experiment: Experiment) -> int:
    return len(rows_of(experiment, "eval"))


def _costs(experiment: Experiment) -> tuple[CostSummary | None, list, str]:
    try:
        return summarise(experiment), read_ledger(experiment.folder), ""
    except UserError as error:
        return None, [], str(error)


def evaluations(experiment: Experiment, first: list[str]) -> tuple[dict[str, Metrics], list[str]]:
    """Metrics by the evaluated target's name, those of `first` first; and what is said of those that cannot be read."""
    folders = {path.name: path for path in (experiment.folder / "eval").glob("[!.]*") if path.is_dir()}
    found, unread = {}, []
    for name in [*(name for name in first if name in folders), *sorted(folders.keys() - set(first))]:
        try:
            found[name] = read_metrics(folders[name])
        except UserError as error:
            unread.append(f"The evaluation of {name} is not shown: {error}")
    return found, unread


def verdict(summary: CostSummary | None, costs: list, name: str, no_costs: str) -> str:
    """What choosing cost against tuning the target on everything, in one sentence."""
    if summary is None:
        return no_costs
    spent, full = summary.selection_total, summary.full_tuning_seconds
    if not full:
        return (
            f"Selection took {spent:,.1f} s; what tuning the target on everything takes is {summary.full_tuning_basis}."
        )
    text = f"Selection took {spent:,.1f} s, {percent(spent / full)} of the {full:,.1f} s that tuning the target on "
    text += (
        "everything took"
        if summary.full_tuning_basis == "measured"
        else f"everything would take ({summary.full_tuning_basis})"
    )
    tuned = [cost.seconds for cost in costs if cost.stage == TARGET_TUNING and cost.what == name]
    if tuned:
        text += f"; with tuning the target on {name}, {tuned[-1]:,.1f} s, it is {percent((spent + tuned[-1]) / full)}"
    return text + "."


def facts(experiment: Experiment, figures: Figures, first: Shown) -> list[tuple[str, str]]:
    unscored = int(np.isnan(figures.effort).sum())
    entries = [
        ("speculative model", experiment.small_model),
        ("target model", experiment.target_model),
        (
            "data",
            f"{experiment.dataset_paths}, {counted(len(figures.row), 'training row')}, "
            f"{_held_out(experiment):,} held out",
        ),
        (
            "scores",
            f"φ = {experiment.selection.phi}" + (f"; {counted(unscored, 'row')} without one" if unscored else ""),
        ),
    ]
    if first.strata:
        about = first.about
        verified = sum(s["verified"] for s in first.strata)
        entries.append(
            (
                "strata",
                f"{len(first.strata)} (K = {about['num_strata']}) below the hardest "
                f"{percent(about['hardest_cutoff'])}; {counted(verified, 'row')} verified "
                f"(at most {about['verify_per_stratum']} a stratum)",
            )
        )
        entries.append(("rule", f"mode {about['mode']}, seed {about['seed']}"))
    return entries


@dataclass
class Correlations:
    """Spearman's, nan or None where they are not known."""

    target: float | None  # of small and target scores
    target_by_length: float | None  # with response length held fixed
    length: float | None  # of scores and response length


def correlations(figures: Figures, scored: np.ndarray, both: np.ndarray) -> Correlations:
    effort, target, length = figures.effort, figures.target, figures.length
    known = bool(len(scored)) and not np.isnan(length[scored]).any()
    return Correlations(
        spearman(effort[both], target[both]) if len(both) > 1 else None,
        partial_spearman(effort[both], target[both], length[both]) if known and len(both) > 2 else None,
        spearman(effort[scored], length[scored]) if known else None,
    )


# Samples


def sample(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most `most` of `rows`, drawn at random; ascending where `rows` are."""
    return rows[lowest(np.random.default_rng(seed).random(len(rows)), most)]


def table_rows(experiment: Experiment, figures: Figures, first: Shown, seed: int) -> dict[str, Any]:
    """Columns of the table, one value a row: rows that the first coreset chose, then others; by row of the data."""
    chosen, others = np.flatnonzero(first.chosen), np.flatnonzero(~first.chosen)
    chosen = sample(chosen, MOST_ROWS, seed)
    index = np.concatenate([chosen, sample(others, MOST_ROWS - len(chosen), seed)])
    index = index[np.argsort(figures.row[index])]
    texts = [texts_of(row, experiment.row_format) for row in rows_of(experiment, "train").select(index)]
    longest = longest_text([len(text) for pair in texts for text in pair], MOST_TEXT)
    return {
        "index": index,
        "row": figures.row[index],
        "prompt": [cut_text(prompt, longest) for prompt, _ in texts],
        "response": [cut_text(response, longest) for _, response in texts],
        "effort": figures.effort[index],
        "target": figures.target[index],
        "length": figures.length[index],
    }


def texts_of(row: dict[str, Any], form: DatasetFormat) -> tuple[str, str]:
    """Prompt and response of a raw row, for reading; LLaMA-Factory's own converter takes many seconds to load."""
    names = form.columns
    if form.formatting == "alpaca":
        names = names or {"prompt": "instruction", "query": "input", "response": "output"}
        said = [text for turn in _value(row, names, "history") or [] for text in turn]
        said = [_value(row, names, "system"), *said, _value(row, names, "prompt"), _value(row, names, "query")]
        return "\n".join(str(text) for text in said if text), str(_value(row, names, "response") or "")
    turns = row.get(names.get("messages", "conversations")) or []
    role, content = form.tags.get("role_tag", "from"), form.tags.get("content_tag", "value")
    said = [f"{turn.get(role)}: {turn.get(content)}" for turn in turns[:-1]]
    system = _value(row, names, "system")
    return "\n".join([str(system), *said] if system else said), str(turns[-1].get(content)) if turns else ""


def _value(row: dict[str, Any], names: dict[str, str], what: str) -> Any:
    return row.get(names[what]) if names.get(what) else None


def longest_text(lengths: Sequence[int], total: int) -> int | None:
    """To how many characters texts are to be cut so that all together have at most `total`; None: not at all."""
    ascending = np.sort(np.asarray(lengths, dtype=np.int64))
    if ascending.sum() <= total:
        return None
    left = len(ascending) - np.arange(len(ascending))
    before = np.concatenate([[0], np.cumsum(ascending)[:-1]])
    fits = before + left * ascending <= total  # were all longer ones cut to this one's length
    last = int(fits.sum())
    return int((total - before[last]) // left[last])


def cut_text(text: str, longest: int | None) -> str:
    return text if longest is None or len(text) <= longest else f"{text[: max(longest - 1, 0)]}…"


def project(experiment: Experiment, rows: np.ndarray) -> tuple[np.ndarray | None, list[float], str]:
    """The first two principal components (n, 2) of the speculative model's features of `rows`, and their share of the
    variance; or None and why there is no map."""
    folder = experiment.small_scores
    if not folder.exists() or not has_column(folder, "hidden_state"):
        return None, [], "features"
    if len(rows) < 3:
        return None, [], "rows"
    from sklearn.decomposition import PCA  # seconds to import, for runs with features alone

    parts = [str(path) for path in sorted(folder.glob("part-*.parquet"))]
    there = pa.dataset.dataset(parts, format="parquet")
    table = there.to_table(["index", "hidden_state"], filter=pc.field("index").isin(rows.tolist())).sort_by("index")
    features = np.stack(table["hidden_state"].combine_chunks().to_numpy(zero_copy_only=False)).astype(np.float64)
    if features.shape[1] < 2 or not np.ptp(features, axis=0).any():
        return None, [], "rows"
    pca = PCA(n_components=2, svd_solver="full")
    return pca.fit_transform(features), pca.explained_variance_ratio_.tolist(), ""


# Figures


def _colours(domain: list[str], names: list[str], title: str | None = None) -> alt.Color:
    scale = alt.Scale(domain=domain, range=[f"var(--{name})" for name in names])
    return alt.Color("status:N", scale=scale, legend=alt.Legend(title=title, orient="top", symbolType="circle"))


def _axis_scale(values: np.ndarray) -> alt.Scale:
    """Logarithmic where the values span more than a factor of 30."""
    positive = len(values) and values.min() > 0
    if positive and values.max() > 30 * values.min():
        return alt.Scale(type="log", nice=False, padding=8)
    return alt.Scale(zero=False, nice=False, padding=8)


def charts(
    figures: Figures, scored: np.ndarray, both: np.ndarray, with_map: bool, with_strata: bool, stratified_by: str
) -> dict[str, dict[str, Any]]:
    """The figures as Vega-Lite, over the named data of `bar_data` and `with_points`."""
    if not len(scored):
        return {}
    specs = {"scores": score_chart(with_strata, stratified_by)}
    effort, length = figures.effort[scored], figures.length[scored]
    tip = ["row:Q", "status:N", alt.Tooltip("effort:Q", title="score", format=".4g")]
    ticks = alt.Axis(tickCount=10)
    score_axis = {"title": "effort score of the speculative model", "axis": ticks}
    by_status = _colours(STATUSES, ["chosen", "other", "cut"])
    if len(both):
        specs["target"] = scatter("pairs").encode(
            x=alt.X("effort:Q", scale=_axis_scale(figures.effort[both]), **score_axis),
            y=alt.Y(
                "target:Q", scale=_axis_scale(figures.target[both]), title="effort score of the target", axis=ticks
            ),
            color=by_status,
            tooltip=[*tip, alt.Tooltip("target:Q", title="target score", format=".4g")],
        )
    if not np.isnan(length).any():
        specs["length"] = scatter("points").encode(
            x=alt.X("length:Q", scale=_axis_scale(length), title="response tokens", axis=ticks),
            y=alt.Y("effort:Q", scale=_axis_scale(effort), **score_axis),
            color=by_status,
            tooltip=[*tip, alt.Tooltip("length:Q", title="response tokens")],
        )
    if with_map:
        labels = fifths(figures.effort[scored])[1]
        colours = alt.Scale(domain=labels, range=[f"var(--fifth{i + 1})" for i in range(len(labels))])
        plane = alt.Scale(zero=False, nice=False, padding=8)
        marked = alt.condition("datum.status == 'chosen'", alt.value("var(--text)"), alt.value("transparent"))
        specs["map"] = scatter("points", size=38, height=440).encode(
            x=alt.X("x:Q", scale=plane, title="first principal component", axis=ticks),
            y=alt.Y("y:Q", scale=plane, title="second principal component", axis=ticks),
            color=alt.Color("fifth:N", scale=colours, legend=alt.Legend(title="score", orient="top", symbolOpacity=1)),
            stroke=marked,
            opacity=alt.condition("datum.status == 'chosen'", alt.value(1), alt.value(0.6)),
            tooltip=tip,
        )
    return {name: _finished(chart) for name, chart in specs.items()}


def fifths(effort: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Which fifth of the scores (n,) each one is in, and what each fifth is called, from low to high."""
    edges = np.unique(np.quantile(effort, np.linspace(0, 1, 6)))
    labels = [f"{number(low, 3)} to {number(high, 3)}" for low, high in itertools.pairwise(edges)]
    return np.searchsorted(edges[1:-1], effort, side="right"), labels or [number(edges[0], 3)]


def scatter(data: str, size: int = 30, height: int = 320) -> alt.Chart:
    chart = alt.Chart(alt.NamedData(name=data), width=WIDTH, height=height).add_params(_zoom(["x", "y"]))
    chart = chart.transform_calculate(above="datum.status == 'chosen' ? 1 : 0").encode(order="above:Q")
    return chart.mark_circle(size=size, opacity=0.75, strokeWidth=1.4, clip=True)


def _zoom(encodings: list[str]) -> alt.Parameter:
    """Drag to move; the wheel zooms with Ctrl alone, as it scrolls the page."""
    return alt.selection_interval(bind="scales", encodings=encodings, zoom="wheel![event.ctrlKey]")


def score_chart(with_strata: bool, stratified_by: str) -> alt.Chart | alt.VConcatChart:
    """Histogram; below it, on the same axis, V_i with its interval, and what each stratum has and gives."""
    title = f"{stratified_by} of the speculative model"
    labelled = {"title": title, "axis": alt.Axis(grid=False, tickCount=12, labelOverlap=True)}
    plain = {"title": None, "axis": alt.Axis(labels=False, ticks=False, grid=False)}

    def binned(like: dict[str, Any]) -> alt.X:
        return alt.X("low:Q", bin="binned", scale=alt.Scale(zero=False, nice=False), **like)

    def shaded(like: dict[str, Any]) -> alt.Chart:
        """The cut, with the panel's own axis: the library would join another to it."""
        cut = alt.Chart(alt.NamedData(name="cut")).mark_rect(opacity=0.13, color="var(--cut)", clip=True)
        return cut.encode(x=alt.X("low:Q", **like), x2="high:Q")

    whole = {"axis": alt.Axis(tickMinStep=1, format="~s")}
    zoom = _zoom(["x"])
    tip = [alt.Tooltip("low:Q", title="from", format=".4g"), alt.Tooltip("high:Q", title="to", format=".4g")]
    edges = alt.Chart(alt.NamedData(name="edges")).mark_rule(opacity=0.2, color="var(--text)", clip=True)
    edges = edges.encode(x=alt.X("low:Q", **plain))
    bars = (
        alt.Chart(alt.NamedData(name="bins"), width=WIDTH, height=210)
        .mark_bar(clip=True, binSpacing=0.5)
        .encode(
            x=binned(plain if with_strata else labelled),
            x2="high:Q",
            y=alt.Y("rows:Q", title="rows", **whole),
            color=_colours(STATUSES, ["chosen", "other", "cut"]),
            order="order:Q",
            tooltip=[*tip, "status:N", "rows:Q"],
        )
        .add_params(zoom)
    )
    if not with_strata:
        return bars
    # Without an interval the mark has no length: the library complains of a field that is empty in every row.
    known = "isValid(datum.ratio_low)"
    of_strata = alt.Chart(alt.NamedData(name="strata"), width=WIDTH, height=130).transform_calculate(
        low_end=f"{known} ? datum.ratio_low : datum.ratio",
        high_end=f"{known} ? datum.ratio_high : datum.ratio",
        interval=f"{known} ? format(datum.ratio_low, '.3g') + ' to ' + format(datum.ratio_high, '.3g') : 'not known'",
    )
    one = of_strata.mark_rule(strokeDash=[4, 4], opacity=0.6, color="var(--text)").encode(y=alt.datum(1))
    about = [
        "stratum:Q",
        alt.Tooltip("ratio:Q", title="V", format=".3g"),
        alt.Tooltip("interval:N", title="95 % interval"),
        "verified:Q",
    ]
    middle = alt.X("middle:Q", **plain)
    spread = of_strata.mark_rule(strokeWidth=2, color="var(--ratio)", clip=True)
    spread = spread.encode(x=middle, y=alt.Y("low_end:Q", title="V"), y2="high_end:Q", tooltip=about)
    ratio = of_strata.mark_point(filled=True, size=45, opacity=1, color="var(--ratio)", clip=True)
    ratio = ratio.encode(x=middle, y=alt.Y("ratio:Q", title="V"), tooltip=about).add_params(zoom)
    parts = (
        alt.Chart(alt.NamedData(name="budgets"), width=WIDTH, height=130)
        .mark_bar(clip=True, binSpacing=1)
        .encode(
            x=binned(labelled),
            x2="high:Q",
            y=alt.Y("rows:Q", title="rows of a stratum", **whole),
            color=_colours([DRAWN, FILLED, LEFT], ["chosen", "filled", "other"]),
            order="order:Q",
            tooltip=["stratum:Q", *tip, "status:N", "rows:Q"],
        )
        .add_params(zoom)
    )
    panels = (
        shaded(plain) + bars + edges,
        shaded(plain) + edges + one + spread + ratio,
        shaded(labelled) + parts,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Automatically deduplicated selection parameter"
        )  # one for all three is meant
        return alt.vconcat(*panels, spacing=14).resolve_scale(x="shared", color="independent")


def _finished(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """The chart as Vega-Lite, in the colours of the page, light or dark."""
    text, line = "var(--text)", "var(--line)"
    of_axis = {"labelColor": text, "titleColor": text, "domainColor": line, "tickColor": line, "gridColor": line}
    chart = (
        chart.configure(background="transparent", font="Arial, sans-serif")
        .configure_view(stroke=None)
        .configure_axis(**of_axis, titleFontWeight="normal", labelFontSize=11, titleFontSize=12, gridOpacity=0.6)
        .configure_legend(
            labelColor=text, titleColor=text, titleFontWeight="normal", labelFontSize=12, columnPadding=18
        )
    )
    return chart.to_dict()


def bar_data(shown: Shown) -> dict[str, list[dict[str, Any]]]:
    """The data of `score_chart` for a coreset: bins, cut, edges, strata, budgets."""
    scored = np.flatnonzero(np.isfinite(shown.score))
    if not len(scored):
        return {name: [] for name in ("bins", "cut", "edges", "strata", "budgets")}
    score, status = shown.score[scored], shown.status(scored)
    edges = bin_edges(score, shown.strata)
    place = np.clip(np.searchsorted(edges, score, side="right") - 1, 0, len(edges) - 2)
    drawn = shown.strata
    if drawn and not drawn[-1]["high"] > drawn[0]["low"]:  # all kept scores are equal: as wide as their bar
        drawn = [{**drawn[0], "low": edges[0], "high": edges[1]}]
    if drawn:  # the highest of the highest stratum lies on its edge
        last = int(np.abs(edges - drawn[-1]["high"]).argmin()) - 1
        kept = shown.stratum[scored] >= 0
        place[kept] = place[kept].clip(max=last)
    bins = []
    for number, name in enumerate(STATUSES):
        counts = np.bincount(place[status == number], minlength=len(edges) - 1)
        for i in np.flatnonzero(counts):
            bins.append({"low": edges[i], "high": edges[i + 1], "status": name, "order": number, "rows": counts[i]})
    strata = [{**s, "middle": (s["low"] + s["high"]) / 2} for s in drawn]
    budgets = []
    for s in drawn:
        parts = (s["budget"] - s["fill"], s["fill"], s["size"] - s["budget"])
        for order, (status_name, rows) in enumerate(zip((DRAWN, FILLED, LEFT), parts, strict=True)):
            place_of = {"low": s["low"], "high": s["high"], "stratum": s["stratum"]}
            budgets.append({**place_of, "status": status_name, "order": order, "rows": rows})
    return {
        "bins": bins,
        # Without width where nothing was dropped: the library complains of data without any entry.
        "cut": [{"low": drawn[-1]["high"], "high": max(drawn[-1]["high"], edges[-1])}] if drawn else [],
        "edges": [{"low": value} for value in sorted({s[end] for s in drawn for end in ("low", "high")})],
        "strata": strata,
        "budgets": budgets,
    }


def bin_edges(score: np.ndarray, strata: list[dict[str, Any]]) -> np.ndarray:
    """Edges of the histogram's bars: about BARS below the cut, on the edges of strata where these are few enough, and
    as wide ones above it, to half as far again. The last bar takes what lies beyond."""
    low, high = (strata[0]["low"], strata[-1]["high"]) if strata else (score.min(), score.max())
    if not high > low:
        half = abs(low) / 20 or 0.5
        return np.array([low - half, low + half] + ([low + 3 * half] if score.max() > high else []))
    cells = round((high - low) / (strata[0]["high"] - strata[0]["low"])) if strata else 1
    count = cells * max(1, round(BARS / cells)) if cells <= 2 * BARS else BARS
    width = (high - low) / count
    beyond = np.ceil((min(score.max(), high + (high - low) / 2) - high) / width - 1e-9)
    return low + width * np.arange(count + int(max(beyond, 0)) + 1)


def _columns(figures: Figures, rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: getattr(figures, name)[rows] for name in ("row", "effort", "target", "length")}


def with_points(bases: dict[str, dict[str, np.ndarray]], data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """All named data of the figures for a coreset; selection/report/page.js does the same."""
    named = {name: values for name, values in data.items() if name != "status"}
    for name, columns in bases.items():
        status = [STATUSES[number] for number in data["status"][name]]
        named[name] = [
            dict(zip([*columns, "status"], values, strict=True))
            for values in zip(*columns.values(), status, strict=True)
        ]
    return named


def svg(name: str, spec: dict[str, Any], datasets: dict[str, list[dict[str, Any]]]) -> str:
    """The figure as SVG, to stand inside of a page: its ids are its own."""
    drawn = vl_convert.vegalite_to_svg(json.loads(_json(spec | {"datasets": datasets})), allowed_base_urls=[])
    ids: dict[str, str] = {}  # the library counts them up from figure to figure

    def own(found: re.Match) -> str:
        return ids.setdefault(found[0], f"{name}-{len(ids)}")

    return re.sub(r'(?<= id=")[^"]+|(?<=url\(#)[^)]+', own, drawn)


@cache
def chart_script() -> str:
    """vega-embed with all it needs, by vl-convert; defines window.vegaEmbed."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


# Words


def number(value: float | None, digits: int = 4) -> str:
    """Like 0.01234, 12,345; – where it is not known."""
    if value is None or not np.isfinite(value):
        return "–"
    if float(value).is_integer():
        return f"{int(value):,}"
    text = f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"
    return text.replace("-", "−", 1) if value < 0 else text


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + "s" * (count != 1)


def correlation(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.2f}".replace("-", "−")


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def captions(
    figures: Figures,
    first: Shown,
    scored: np.ndarray,
    both: np.ndarray,
    points: np.ndarray,
    pairs: np.ndarray,
    explained: list[float],
) -> dict[str, str]:
    texts = {"target": _how_many(pairs, both)} | dict.fromkeys(("length", "map"), _how_many(points, scored))
    if len(scored):
        score = first.score[scored]
        *_, before, top = bin_edges(score, first.strata)
        beyond = int((score > top + 1e-9 * (top - before)).sum())
        if beyond:
            highest = number(score.max())
            texts["scores"] = (
                f"The last bar holds all that lies beyond: {counted(beyond, 'row')} up to a score of {highest}."
            )
    unknown = [s for s in first.strata if np.isnan(s["ratio_low"])]
    if unknown:
        why = (
            f"Of fewer than {FEWEST} verified rows with scores above 0 no interval is known, unless the stratum has no "
            "more."
        )
        if len(unknown) == len(first.strata) and any(s["verified"] >= min(FEWEST, s["size"]) for s in unknown):
            why = "The scores that V is made of are not in this run: no interval is known."
        texts["scores"] = f"{why} {texts.get('scores', '')}".strip()
    if explained:
        texts["map"] += (
            f" The two axes hold {percent(explained[0])} and {percent(explained[1])} of the features' variance."
        )
    return texts


def _how_many(shown: np.ndarray, all_rows: np.ndarray) -> str:
    if len(shown) == len(all_rows):
        return f"All {counted(len(all_rows), 'row')}."
    return f"{len(shown):,} of {counted(len(all_rows), 'row')}, drawn at random."


def table_note(table: dict[str, Any], figures: Figures, first: Shown, seed: int) -> str:
    count, num_rows = len(table["row"]), len(figures.row)
    if count == num_rows:
        return f"All {counted(num_rows, 'row')} of the training split."
    chosen = int(first.chosen[table["index"]].sum())
    which = "all" if chosen == first.m else f"{chosen:,} of the"
    return (
        f"{count:,} of {num_rows:,} rows of the training split: {which} {first.m:,} chosen by {first.name}, "
        f"the others drawn at random (seed {seed})."
    )


def static_rows(table: dict[str, Any], first: Shown) -> list[dict[str, Any]]:
    """The table's first rows, those chosen first, for readers without scripts."""
    order = np.argsort(~first.chosen[table["index"]], kind="stable")[:ROWS_WITHOUT_SCRIPT]
    rows = []
    for i in order:
        index = table["index"][i]
        stratum = int(first.stratum[index])
        rows.append(
            {
                **{name: values[i] for name, values in table.items()},
                "stratum": stratum if stratum >= 0 else None,
                "ratio": first.strata[stratum]["ratio"] if stratum >= 0 else None,
                "chosen": bool(first.chosen[index]),
                "reason": first.reason[index],
            }
        )
    return rows


# The page


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    return np.array(table[name].cast(pa.float64()).to_numpy(zero_copy_only=False))  # Arrow's own may not be changed


def _json(value: Any) -> str:
    """JSON with arrays as lists, six digits, and null for what is no number."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        rounded = float(f"{value:.7g}") if np.isfinite(value) else None
        return int(rounded) if rounded is not None and rounded.is_integer() and abs(rounded) < 2**53 else rounded
    return value


def as_data(value: Any) -> Markup:
    """JSON that can stand in a <script type="application/json">: no `<` can end or open anything there."""
    return Markup(_json(value).replace("<", "\\u003c"))


def _page(data: dict[str, Any], **values: Any) -> str:
    here = Path(__file__).parent
    scripts = [chart_script(), (here / "page.js").read_text(encoding="utf-8")]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "percent": percent, "correlation": correlation, "counted": counted}
    environment.filters["two_decimals"] = two_decimals
    template = environment.from_string((here / "page.html").read_text(encoding="utf-8"))
    return template.render(
        **values,
        about_metrics=ABOUT,
        data=as_data(data),
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup(text) for text in scripts],
        script_sources=" ".join(f"'sha256-{each}'" for each in hashes),
    )
