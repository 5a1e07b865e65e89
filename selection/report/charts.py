"""The report's figures, drawn as SVG in the page's own colours, so that they follow light and dark mode."""

import itertools
import re

import altair as alt
import numpy as np
import pandas as pd
import vl_convert
from markupsafe import Markup

from selection.report.run_data import CHOSEN, STATUSES, Shown, interval, number

WIDTH = 1000  # of a figure, pixels
BARS = 60  # of the histogram below the cut, about
BUDGETS = ["chosen by budget", "chosen by random fill", "not chosen"]
TITLES = {  # of axes, by column
    "effort": "effort score of the speculative model",
    "target": "effort score of the target",
    "length": "response tokens",
    "x": "first principal component",
    "y": "second principal component",
}


def scatter(points: pd.DataFrame, x: str, y: str) -> Markup:
    """Draw a point for each line of `points`: columns row, effort, status, `x` and `y`."""
    return _svg(_scatter(points, x, y, height=320).mark_circle(size=30, opacity=0.75))


def data_map(points: pd.DataFrame, effort: np.ndarray) -> Markup:
    """Draw `points` (columns row, effort, status, x, y) in the colour of their fifth of all scores `effort` (n,)."""
    edges = np.unique(np.quantile(effort, np.linspace(0, 1, 6)))
    names = [f"{number(a, 3)} to {number(b, 3)}" for a, b in itertools.pairwise(edges)] or [number(edges[0], 3)]
    points = points.assign(fifth=np.array(names)[np.searchsorted(edges[1:-1], points["effort"], side="right")])
    colours = alt.Scale(domain=names, range=[f"var(--fifth{i + 1})" for i in range(len(names))])
    is_chosen = f"datum.status == '{CHOSEN}'"
    chart = _scatter(points, "x", "y", height=440).mark_circle(size=38, strokeWidth=1.4)
    chart = chart.encode(
        color=alt.Color("fifth:N", scale=colours, legend=alt.Legend(title="score", orient="top", symbolOpacity=1)),
        stroke=alt.condition(is_chosen, alt.value("var(--text)"), alt.value("transparent")),
        opacity=alt.condition(is_chosen, alt.value(1), alt.value(0.6)),
    )
    return _svg(chart)


def _scatter(points: pd.DataFrame, x: str, y: str, height: int) -> alt.Chart:
    points = points.sort_values("status", key=lambda status: status == CHOSEN, kind="stable")  # chosen on top
    points["said"] = [
        f"row {row}, {status}: {number(a)} {TITLES[x]}, {number(b)} {TITLES[y]}"
        for row, status, a, b in points[["row", "status", x, y]].itertuples(index=False)
    ]
    axes = []
    for channel, name in ((alt.X, x), (alt.Y, y)):
        low, high = points[name].min(), points[name].max()
        kind = {"type": "log"} if low > 0 and high > 30 * low else {"zero": False}
        scale = alt.Scale(nice=False, padding=8, **kind)
        axes.append(channel(f"{name}:Q", scale=scale, title=TITLES[name], axis=alt.Axis(tickCount=10)))
    chart = alt.Chart(points, width=WIDTH, height=height)
    return chart.encode(*axes, color=_colours(STATUSES, ["chosen", "other", "cut"]), description="said:N")


def _colours(domain: list[str], names: list[str]) -> alt.Color:
    scale = alt.Scale(domain=domain, range=[f"var(--{name})" for name in names])
    return alt.Color("status:N", scale=scale, legend=alt.Legend(title=None, orient="top", symbolType="circle"))


def score_figure(shown: Shown, stratified_by: str) -> Markup:
    """Draw the histogram of scores; below it, on the same axis, V_i with its interval, and the budgets."""
    bins, strata, budgets = bars(shown)
    labelled = {"title": f"{stratified_by} of the speculative model"}
    labelled["axis"] = alt.Axis(grid=False, tickCount=12, labelOverlap=True)
    plain = {"title": None, "axis": alt.Axis(labels=False, ticks=False, grid=False)} if len(strata) else labelled
    histogram = _stacked(bins, plain, 210, "rows", _colours(STATUSES, ["chosen", "other", "cut"]))
    if strata.empty:
        return _svg(histogram)
    top = strata["high"].max()
    cut = pd.DataFrame({"low": [top], "high": [max(top, bins["high"].max())]})

    def shaded(axis: dict) -> alt.Chart:
        """The range of the dropped rows, shaded; with the panel's own axis: altair would add another."""
        return alt.Chart(cut).mark_rect(opacity=0.13, color="var(--cut)").encode(x=alt.X("low:Q", **axis), x2="high:Q")

    ends = alt.Chart(strata.melt(value_vars=["low", "high"]))
    edges = ends.mark_rule(opacity=0.2, color="var(--text)").encode(x=alt.X("value:Q", **plain))
    strata = strata.assign(
        middle=(strata["low"] + strata["high"]) / 2,
        said=[
            f"stratum {s['stratum']}: V {number(s['ratio'], 3)}, 95 % interval {interval(s)}, "
            f"{number(s['null_ratio'], 3)} if the models had nothing in common"
            for s in shown.strata
        ],
    )
    panel = alt.Chart(strata, width=WIDTH, height=130).encode(x=alt.X("middle:Q", **plain), description="said:N")
    one = alt.Chart(pd.DataFrame({"ratio": [1]})).mark_rule(strokeDash=[4, 4], opacity=0.6, color="var(--text)")
    lines = panel.properties(data=strata.dropna(subset="ratio_low")).mark_rule(strokeWidth=2, color="var(--ratio)")
    ratios = panel.mark_point(filled=True, size=45, opacity=1, color="var(--ratio)")
    one, ratios = (chart.encode(y=alt.Y("ratio:Q", title="V")) for chart in (one, ratios))
    null = panel.mark_tick(thickness=2, width=14, orient="horizontal", opacity=0.8, color="var(--text)")
    null = null.encode(y=alt.Y("null_ratio:Q", title="V"))
    lines = lines.encode(y=alt.Y("ratio_low:Q", title="V"), y2="ratio_high:Q")
    parts = _stacked(budgets, labelled, 130, "rows of a stratum", _colours(BUDGETS, ["chosen", "filled", "other"]))
    ratios = shaded(plain) + edges + one + lines + null + ratios
    panels = (shaded(plain) + histogram + edges, ratios, shaded(labelled) + parts)
    return _svg(alt.vconcat(*panels, spacing=14).resolve_scale(x="shared", color="independent"))


def _stacked(data: pd.DataFrame, axis: dict, height: int, title: str, colours: alt.Color) -> alt.Chart:
    named = data[["low", "high", "rows", "status"]].itertuples(index=False)
    data = data.assign(said=[f"{number(a)} to {number(b)}: {rows} {status}" for a, b, rows, status in named])
    return (
        alt.Chart(data, width=WIDTH, height=height)
        .mark_bar(binSpacing=0.5)
        .encode(
            x=alt.X("low:Q", bin="binned", scale=alt.Scale(zero=False, nice=False), **axis),
            x2="high:Q",
            y=alt.Y("rows:Q", title=title, axis=alt.Axis(tickMinStep=1, format="~s")),
            color=colours,
            order="status:N",
            description="said:N",
        )
    )


def bars(shown: Shown) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The data of `score_figure`: bins (low, high, status, rows), strata, and budgets, as bins."""
    scored = np.flatnonzero(np.isfinite(shown.score))
    score, strata = shown.score[scored], pd.DataFrame(shown.strata)
    edges = bin_edges(score, shown.strata)
    place = np.clip(np.searchsorted(edges, score, side="right") - 1, 0, len(edges) - 2)
    budgets = strata
    if len(strata):
        if not strata["high"].max() > strata["low"].min():  # all kept scores are equal: as wide as their bar
            strata["low"], strata["high"] = edges[0], edges[1]
        kept = shown.stratum[scored] >= 0  # the highest of them lies on the highest stratum's edge
        place[kept] = place[kept].clip(max=np.abs(edges - strata["high"].max()).argmin() - 1)
        fill = strata["of_which_random_fill"]
        parts = (strata["budget"] - fill, fill, strata["size"] - strata["budget"])
        both = zip(BUDGETS, parts, strict=True)
        budgets = pd.concat([strata[["low", "high"]].assign(status=status, rows=rows) for status, rows in both])
    bins = pd.DataFrame({"low": edges[place], "high": edges[place + 1], "status": shown.status(scored)})
    bins = bins.groupby(["low", "high", "status"], as_index=False).size().rename(columns={"size": "rows"})
    return bins, strata, budgets


def bin_edges(score: np.ndarray, strata: list[dict]) -> np.ndarray:
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


def _svg(chart: alt.TopLevelMixin) -> Markup:
    """The chart as SVG; what the library says of a mark becomes its <title>, which browsers show at the pointer."""
    text, line = "var(--text)", "var(--line)"
    words = {"labelColor": text, "titleColor": text, "titleFontWeight": "normal"}
    lines = {"domainColor": line, "tickColor": line, "gridColor": line, "gridOpacity": 0.6}
    chart = chart.configure(
        background="transparent",
        font="Arial, sans-serif",
        view=alt.ViewConfig(stroke=None),
        axis=alt.AxisConfig(**words, **lines, labelFontSize=11, titleFontSize=12),
        legend=alt.LegendConfig(**words, labelFontSize=12, columnPadding=18),
    )
    drawn = vl_convert.vegalite_to_svg(chart.to_dict(), allowed_base_urls=[])
    return Markup(re.sub(r'<path aria-label="([^"]*)"([^>]*)/>', r"<path\2><title>\1</title></path>", drawn))
