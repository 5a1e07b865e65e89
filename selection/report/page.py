"""One HTML page about a run. It holds all that it shows and fetches nothing; its figures are drawn once, as SVG."""

import base64
import hashlib
import json
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment
from markupsafe import Markup

from selection.method.interval import FEWEST
from selection.method.staff import lowest
from selection.report.charts import bin_edges, data_map, scatter, score_figure
from selection.report.run_data import (
    Shown,
    against_all,
    correlations,
    evaluations,
    interval,
    number,
    percent,
    project,
    read_pool,
    read_run,
    side_by_side,
    transcript,
)
from selection.rows.conversation import as_messages
from selection.rows.cut import cut_rows
from selection.rows.split import rows_of
from selection.run.config import REPOSITORY, Experiment
from selection.run.errors import UserError
from selection.run.ledger import TARGET_TUNING, Cost, CostSummary, format_summary, read_ledger, summarise
from selection.run.metrics import ABOUT, shown_figure
from selection.run.products import atomic_path, code_version
from selection.run.yaml_file import to_yaml

MOST_ROWS = 20_000  # in the table
MOST_POINTS = 3_000  # in a figure
MOST_CLUSTERED = 1_000  # rows whose features are clustered
MOST_TEXT = 16_000_000  # characters of all prompts and responses; where there are more, long ones are cut
ROWS_WITHOUT_SCRIPT = 100
PHI = {
    "v_lora_b": "B of a fresh LoRA on the last layer's value projection",
    "v_weight": "the last layer's value projection",
    "last_layer": "all weight matrices of the last layer",
    "all_lora": "every A and B of the tuned LoRA",
}
MODES = {
    "paper": "as published",
    "released": "as the authors' code",
    "extended": "as published, with additions",
    "recommended": "as published, with additions and without suspect rows",
}


def write_report(experiment: Experiment) -> Path:
    """Write <run folder>/report.html; returns it. Raises: UserError where there is no coreset that can be shown."""
    page = render(experiment)
    path = experiment.folder / "report.html"
    with atomic_path(path) as draft:
        draft.write_text(page, encoding="utf-8")
    return path


def render(experiment: Experiment) -> str:
    """The page's HTML."""
    figures, shown, refused = read_run(experiment)
    first, seed = shown[0], experiment.selection.seed
    scored = np.flatnonzero(figures["effort"].notna())
    both = scored[figures["target"].notna()[scored]]
    points, pairs = sample(scored, MOST_POINTS, seed), sample(both, MOST_POINTS, seed)
    of_points, of_pairs = (figures.loc[rows].assign(status=first.status(rows)) for rows in (points, pairs))
    drawn, projected = {}, project(experiment, points)
    if len(both):
        drawn["target"] = scatter(of_pairs, "effort", "target")
    if len(scored) and figures["length"][scored].notna().all():
        drawn["length"] = scatter(of_points, "length", "effort")
    if projected:
        x, y = projected[0].T
        drawn["map"] = data_map(of_points.assign(x=x, y=y), figures["effort"][scored])
    table = table_rows(experiment, figures, first, seed)
    chosen_first = np.argsort(~first.chosen[table.index], kind="stable")
    try:
        summary, costs, no_costs = summarise(experiment), read_ledger(experiment.folder), ""
    except UserError as error:
        summary, costs, no_costs = None, [], str(error)
    evaluated, unread = evaluations(experiment, [each.name for each in shown])
    compared, answers, why_not = side_by_side(experiment, evaluated)
    folder, record = experiment.folder, experiment.record
    template, style, script = (
        Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    filters = (number, percent, shown_figure, counted, interval, format_summary, score_note, ratios_say, verdict)
    environment.filters |= {function.__name__: function for function in filters}
    return environment.from_string(template).render(
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=as_data(table, shown),
        experiment=experiment,
        run=(run := folder.relative_to(REPOSITORY) if folder.is_relative_to(REPOSITORY) else folder),
        quoted=lambda path: shlex.quote(f"{run}/{path}".rstrip("/")),
        configuration=record.read_text(encoding="utf-8") if record.exists() else to_yaml(experiment),
        version=code_version(),
        pool=read_pool(experiment),
        num_rows=len(figures),
        held_out=len(rows_of(experiment, "eval")),
        cut=0 if (cut := cut_rows(experiment)) is None else len(cut),
        unscored=int(figures["effort"].isna().sum()),
        shown=shown,
        refused=refused,
        correlations=(found := correlations(figures)),
        rank={name: number(each and each.value, 2) for name, each in found.items()},
        phi=PHI[experiment.selection.phi],
        modes=MODES,
        against_all=against_all(experiment, figures, shown, sample(scored, MOST_CLUSTERED, seed)),
        clustered=min(len(scored), MOST_CLUSTERED),
        stratified_by=first.about.get("stratified_by", "effort").replace("effort", "effort score"),
        score_figure=score_figure if len(scored) else None,
        drawn=drawn,
        counts={"target": (len(pairs), len(both)), "points": (len(points), len(scored))},
        explained=projected and projected[1],
        table=table,
        scored_turns=bool(table["prompt"].str.contains(" (scored): ", regex=False).any()),
        static_rows=list(table.iloc[chosen_first[:ROWS_WITHOUT_SCRIPT]].itertuples()),
        evaluated=evaluated,
        unread=[*unread, *[why_not] * bool(why_not)],
        compared=compared,
        answers=answers,
        about_metrics=ABOUT,
        tuned_on={cost.what: cost.samples for cost in costs if cost.stage == TARGET_TUNING},
        costs=costs,
        no_costs=no_costs,
        summary=summary,
    )


def sample(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most `most` of `rows`, drawn at random; ascending where `rows` are."""
    return rows[lowest(np.random.default_rng(seed).random(len(rows)), most)]


def table_rows(experiment: Experiment, figures: pd.DataFrame, first: Shown, seed: int) -> pd.DataFrame:
    """`figures`, prompt and response of the rows in the table: those that the first coreset chose, then others."""
    order = np.random.default_rng(seed).random(len(figures)) - first.chosen
    table = figures.loc[lowest(order, MOST_ROWS)].sort_values("row")
    entry, texts = experiment.row_format.entry, []
    for row in rows_of(experiment, "train").select(table.index):
        messages = as_messages(row, entry)
        texts += [transcript(messages), messages[-1]["content"]]
    if sum(map(len, texts)) > MOST_TEXT:
        longest = MOST_TEXT // len(texts)
        texts = [text if len(text) <= longest else f"{text[: longest - 1]}…" for text in texts]
    return table.assign(prompt=texts[::2], response=texts[1::2])


def as_data(table: pd.DataFrame, shown: list[Shown]) -> Markup:
    """What the page's script reads: JSON without `<`, so that nothing in it can end the <script> element."""
    index = table.index
    numbers, reasons = pd.factorize(np.concatenate([each.reason[index] for each in shown]))
    coresets = []
    for each, reason in zip(shown, np.split(numbers, len(shown)), strict=True):
        own = {"name": each.name, "reason": reason.tolist(), "stratum": each.stratum[index].tolist()}
        coresets.append(own | {"ratio": [stratum["ratio"] for stratum in each.strata]})
    rows = table.astype(object).where(table.notna(), None).to_dict("list")
    data = {"rows": rows, "reasons": list(reasons), "coresets": coresets}
    return Markup(json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"))


def verdict(summary: CostSummary, costs: list[Cost], name: str) -> str:
    """What choosing the coreset `name` cost against tuning the target on everything, in one sentence."""
    spent, full = summary.selection_total, summary.full_tuning_seconds
    text, basis = f"Selection took {spent:,.1f} s", summary.full_tuning_basis
    if not full:
        return f"{text}; what tuning the target on everything takes is {basis}."
    takes = "took" if basis == "measured" else f"would take ({basis})"
    text += f", {percent(spent / full)} of the {full:,.1f} s that tuning the target on everything {takes}"
    if tuned := [cost.seconds for cost in costs if cost.stage == TARGET_TUNING and cost.what == name]:
        text += f"; with tuning the target on {name}, {tuned[-1]:,.1f} s, it is {percent((spent + tuned[-1]) / full)}"
    return f"{text}."


def score_note(shown: Shown) -> str:
    """What the figure of scores leaves out."""
    score, text = shown.score[np.isfinite(shown.score)], ""
    if unknown := [s for s in shown.strata if np.isnan(s["ratio_low"])]:
        text = f"A stratum with fewer than {FEWEST} verified rows has no interval, unless all its rows are verified. "
        if len(unknown) == len(shown.strata) and any(s["verified"] >= min(FEWEST, s["size"]) for s in unknown):
            text = "The scores that V is made of are not in this run: no interval is known. "
    *_, before, top = bin_edges(score, shown.strata)
    if beyond := int((score > top + 1e-9 * (top - before)).sum()):
        text += f"The last bar also holds the rows beyond it: {beyond:,}, up to a score of {number(score.max())}."
    return text


def ratios_say(shown: Shown) -> str:
    """Whether the V_i of the strata say anything that they would not say of a target that knows nothing."""
    known = [s for s in shown.strata if np.isfinite(s["ratio_low"]) and s["verified"] < s["size"]]
    apart = sum(not s["ratio_low"] <= s["null_ratio"] <= s["ratio_high"] for s in known)
    if not known:
        return ""
    text = f"In {apart} of {len(known)} strata V differs from that by more than chance (95 %)"
    return f"{text}." if apart else f"{text}: nothing can be shown that verification tells of the target."


def counted(count: int, what: str) -> str:
    """Like 1 row, 2,000 rows."""
    return f"{count:,} {what}" + "s" * (count != 1)
