"""Tables and curves of a grid that scripts/paper/reproduce.py ran, from its cells.csv and the paper's Table 1 alone.

    python scripts/paper/tables.py data/results/smollm2_cpu

Needs that folder. Writes tables.md, curves.png and curves.svg into it and prints the tables. Of an unfinished grid,
what is missing is counted and shown as an en dash.
"""

import itertools
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
from selection.run.ending import run_stage

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from scripts.paper.cells import METRICS, markdown_table, read_cells
from scripts.paper.worth import falling, worth
from selection.run.cli import argument_parser
from selection.run.config import REPOSITORY
from selection.run.errors import UserError
from selection.run.metrics import LLAMA_FACTORYS
from selection.run.products import atomic_path

TEMPLATE = Path(__file__).with_name("tables_template.md")
# The paper's ROUGE-L by target, task, method (the paper's names) and pruning rate in percent.
_KEY = ["target", "task", "method", "pruning_rate_percent"]
PAPER = pd.read_csv(REPOSITORY / "data" / "paper_table1.csv").set_index(_KEY).rouge_l.to_dict()

# In the order of the tables: the paper's name, then colour (told apart by the colour-blind) and marker in the curves.
METHODS = {
    "full": ("Full data", "#000000", ""),
    "random": ("Random", "#777777", "o"),
    "oracle": ("Oracle", "#000000", "*"),
    "cleaned": ("Random, suspects left out", "#000000", "X"),
    "rs2_cleaned": ("RS2, suspects left out", "#bbbbbb", "X"),
    "clusters_cleaned": ("Clusters, suspects left out", "#009e73", "X"),
    "easier_half": ("Easier half, suspects left out", "#56b4e9", "X"),
    "rs2": ("RS2", "#bbbbbb", "h"),
    "length": ("Length", "#ddaa33", "s"),
    "grand": ("GraNd", "#117733", "^"),
    "el2n": ("EL2N", "#88ccee", "v"),
    "ccs": ("CCS", "#332288", "D"),
    "d2": ("D2 Pruning", "#aa4499", "P"),
    "moderate": ("Moderate", "#44aa99", "X"),
    "entropy": ("Entropy", "#999933", "<"),
    "staff": ("STAFF", "#d55e00", "*"),
    "staff_length": ("STAFF, length control", "#882255", "p"),
    "staff_size": ("STAFF, budgets by size", "#cc6677", "p"),
    "staff_neyman": ("STAFF, Neyman's budgets", "#cc6677", "X"),
    "staff_calibrated": ("STAFF, calibrated V", "#cc6677", "D"),
    "staff_nearest": ("STAFF, nearest to centres", "#cc6677", "s"),
    "staff_ifd": ("STAFF, hardest by IFD", "#cc6677", "^"),
    "staff_direct": ("STAFF, scored by the target", "#cc6677", "D"),
    "ifd": ("IFD", "#0077bb", "o"),
    "middle": ("Middle of the losses", "#0077bb", "s"),
    "davir": ("DavIR", "#0077bb", "^"),
    "s2l": ("S2L", "#0077bb", "v"),
    "learning_percentage": ("Learning percentage", "#0077bb", "D"),
    "clusters": ("Clusters", "#0077bb", "P"),
}
AGAINST = ("random", "ccs", "length")
FRESH = ("rs2", "rs2_cleaned")  # other rows in each pass: worth counts the rows of one pass, as of Random
# Of every metric more is better: nll's is the log likelihood a response token, in nats.
NAMES = {"nll": "log likelihood", "rouge_l": "ROUGE-L", "bleu_4": "BLEU-4"}
PLACES = {"nll": 3, "rouge_l": 2, "bleu_4": 2}  # decimals
FEWEST_SIZES, FEWEST_SEEDS = 5, 3  # of Random's curve, for the worth of a coreset
UNITS = {"seconds": "{:.1f}".format, "tokens": "{:,.0f}".format}
UNITS["flops"] = lambda value: f"{value:.1e}".replace("e+", "e") if value else "0"
SELECTION = [f"selection_{unit}" for unit in UNITS]
MISSING = "–"


@dataclass(frozen=True)
class Grid:
    cells: pd.DataFrame  # the rows of cells.csv; scores by sample are lists
    tasks: list[str]
    methods: list[str]
    rates: list[float]  # of coresets, by ascending pruning rate
    seeds: list[int]
    metrics: list[str]  # that some cell has

    # Pools of one slice are evaluated on the same rows: every worth is then read from Random's curve on the clean one.
    curve = property(lambda self: "clean" if "clean" in self.tasks else None)

    def methods_of(self, task: str) -> list[str]:
        """Those that it has a cell of."""
        return [method for method in self.methods if ((self.cells.task == task) & (self.cells.method == method)).any()]

    def rates_of(self, method: str) -> list[float]:
        return [1.0] if method == "full" else self.rates


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("folder", type=Path, help="with the cells.csv of scripts/paper/reproduce.py, required")
    folder = parser.parse_args().folder
    grid = read_grid(folder / "cells.csv")
    estimates = estimate_grid(grid)
    text = format_tables(grid, estimates)
    curves = draw_curves(grid, estimates)
    with matplotlib.rc_context({"svg.hashsalt": "tables"}):  # else the SVG's ids are random
        for form, metadata in (("png", None), ("svg", {"Date": None})):
            with atomic_path(folder / f"curves.{form}") as draft:
                curves.savefig(draft, dpi=110, format=form, metadata=metadata)
    with atomic_path(folder / "tables.md") as draft:
        draft.write_text(text, encoding="utf-8")
    print(text)


def read_grid(path: Path) -> Grid:
    """cells.csv, checked. Raises: UserError naming column and row or cell."""
    rows = read_cells(path)
    if not rows:
        raise UserError(f"{path} holds no cells yet: let scripts/paper/reproduce.py finish one")
    cells = pd.DataFrame(rows.values())
    # The mode is among the settings; a row of STAFF with more than the published rules says extended.
    for column in ("target", "num_rows", "eval_rows", "precision", "settings", *SELECTION):
        group = ["task", "method", "seed"] if column in SELECTION else ["task"]
        differs = (cells[column] != cells.groupby(group)[column].transform("first")).to_numpy()
        if differs.any():
            raise UserError(f"{path}, column {column}: {list(rows)[differs.argmax()]} is of another run")
    names = set(zip(cells.paper_target, cells.paper_task, strict=True)) - {("", ""), *(key[:2] for key in PAPER)}
    if names:
        raise UserError(f"{path}, columns paper_target, paper_task: {names.pop()} is not in data/paper_table1.csv")
    methods = [method for method in METHODS if method in set(cells.method)]
    tasks, seeds = sorted(set(cells.task)), sorted(set(cells.seed))
    rates, metrics = sorted(set(cells.rate) - {1.0}, reverse=True), [m for m in METRICS if (cells[m] != "").any()]
    return Grid(cells, tasks, methods, rates, seeds, metrics)


def pruning_rate(rate: float) -> float:
    """Percent, as in the paper; `rate` is the fraction kept."""
    return round(100 * (1 - rate), 6)


def percent(rate: float) -> str:
    return f"{pruning_rate(rate):g}"


def bootstrap_means(values: np.ndarray, stream: int = 0, replicates: int = 10_000) -> np.ndarray:
    """Means over seeds and samples, resampled: (replicates, quantities); NaN for a quantity without a seed.

    Args: values (quantities, seeds, samples), scores or paired differences of scores; a seed that a quantity lacks is
    NaN throughout. The same `stream` and shape draw the same.

    Each replicate draws samples with replacement, the same for all quantities and seeds (all were evaluated on the same
    rows), then seeds out of those that a quantity has. Means over quantities can be taken inside a replicate. Intervals
    are too narrow where seeds differ much ((S − 1) / S of their variance), too wide where only samples do."""
    num_quantities, num_seeds, num_samples = values.shape
    rng = np.random.default_rng([stream, num_seeds, num_samples])
    position = rng.random((replicates, num_seeds))  # of each drawn seed, as a share of a quantity's seeds
    by_seed = np.empty((replicates, num_quantities, num_seeds))
    for replicate in range(replicates):
        times_drawn = np.bincount(rng.integers(num_samples, size=num_samples), minlength=num_samples)
        by_seed[replicate] = values @ (times_drawn / num_samples)
    means = np.full((replicates, num_quantities), np.nan)
    for quantity, here in enumerate(~np.isnan(values).any(axis=2)):
        if count := int(here.sum()):
            drawn = (position[:, :count] * count).astype(np.intp)
            means[:, quantity] = np.take_along_axis(by_seed[:, quantity, here], drawn, axis=1).mean(axis=1)
    return means


@dataclass(frozen=True)
class Estimate:
    mean: float
    replicates: np.ndarray  # of the mean: (replicates,)
    num_seeds: int

    @property
    def interval(self) -> tuple[float, float]:
        """The central 95 % of the replicates; its ends are values that occur, so that counts stay whole."""
        low, high = np.quantile(self.replicates, [0.025, 0.975], method="inverted_cdf")
        return float(low), float(high)

    @property
    def sign(self) -> int:
        """1 where the interval lies above 0, −1 where it lies below, 0 where it includes 0."""
        low, high = self.interval
        return (low > 0) - (high < 0)


# By (metric, method, other method or "") and then (task, rate): a mean score, or the mean difference from the other.
Estimates = dict[tuple[str, str, str], dict[tuple[str, float], Estimate]]


def estimate_grid(grid: Grid) -> Estimates:
    """Mean scores, and mean differences over the seeds that both methods have: STAFF's from each of AGAINST, every
    method's from Random. All figures of a task are resampled together; tasks apart, as their rows differ, unless they
    have a curve in common."""
    estimates: Estimates = defaultdict(dict)
    for stream, task in enumerate(grid.tasks):
        cells, values = grid.cells[grid.cells.task == task], {}
        empty = np.full((len(grid.seeds), cells.eval_rows.iloc[0]), np.nan)
        for cell, metric in itertools.product(cells.itertuples(), grid.metrics):
            if scores := getattr(cell, f"{metric}_by_sample"):
                by_seed = values.setdefault((metric, cell.method, "", cell.rate), empty.copy())
                by_seed[grid.seeds.index(cell.seed)] = np.negative(scores) if metric == "nll" else scores
        for metric, method, _, rate in list(values):
            for other in AGAINST if method == "staff" else ("random",):
                difference = values[metric, method, "", rate] - values.get((metric, other, "", rate), np.nan)
                if other != method and not np.isnan(difference).all():
                    values[metric, method, other, rate] = difference
        replicates = bootstrap_means(np.stack(list(values.values())), 0 if grid.curve else stream).T
        for ((*key, rate), scores), drawn in zip(values.items(), replicates, strict=True):
            num_seeds = int((~np.isnan(scores[:, 0])).sum())
            estimates[tuple(key)][task, rate] = Estimate(float(np.nanmean(scores)), drawn, num_seeds)
    return estimates


def pool(estimates: list[Estimate]) -> Estimate | None:
    """The mean of several estimates, replicate by replicate. None where there are no estimates."""
    if not estimates:
        return None
    mean, replicates = (np.mean([getattr(one, name) for one in estimates], axis=0) for name in ("mean", "replicates"))
    return Estimate(float(mean), replicates, min(one.num_seeds for one in estimates))


def format_tables(grid: Grid, estimates: Estimates) -> str:
    n, join, about = len(grid.seeds), "\n\n".join, []
    of_seeds = f"With {n} seeds the seeds' part is understated: their variance enters as {n - 1}/{n} of it on average."
    fewer = any(one.num_seeds < n for found in estimates.values() for one in found.values())
    size = len(grid.tasks) * n * sum(len(grid.rates_of(method)) for method in grid.methods)
    missing = size - len(grid.cells)
    some = f"{missing} of the {size} cells of this grid are missing (shown as {MISSING})."
    for task, cells in grid.cells.groupby("task"):
        first, commits = cells.iloc[0], ", ".join(sorted(set(cells.commit)))
        counts = f"{first.num_rows} training rows, {first.eval_rows} evaluation rows"
        where = "; ".join(sorted(set(cells.precision + " on " + cells.device)))
        mode = " and ".join(cells["mode"].unique())
        about.append(f"- {task}: target {first.target}, {counts}, mode {mode}, {where}, commit {commits}")
    return TEMPLATE.read_text(encoding="utf-8").format(
        about="\n".join(about),
        seeds=", ".join(map(str, grid.seeds)),
        state=some if missing else f"No cell of this grid is missing ({size}).",
        worth=join(dict.fromkeys(worth_table(grid, estimates, task) for task in grid.tasks)),
        first=join(score_table(grid, estimates, grid.metrics[0], task) for task in grid.tasks),
        verdicts="\n".join(f"- {verdict(grid, other, estimates)}" for other in AGAINST),
        fewer="† fewer seeds than the others. " * fewer,
        of_seeds=of_seeds if n > 1 else "With one seed the intervals know nothing of how seeds differ.",
        about_metrics=LLAMA_FACTORYS,
        others=join(score_table(grid, estimates, *of) for of in itertools.product(grid.metrics[1:], grid.tasks)),
        differences=join(difference_table(grid, estimates, metric) for metric in grid.metrics),
        from_random=random_table(grid, estimates),
        costs=join(cost_tables(grid, task) for task in grid.tasks),
    )


def score_table(grid: Grid, estimates: Estimates, metric: str, task: str) -> str:
    """Means ± half an interval; the best two coresets of a column are marked, by the mean as printed."""
    columns, rows, places = [1.0] * ("full" in grid.methods) + grid.rates, [], PLACES[metric]
    methods, first = grid.methods_of(task), grid.cells[grid.cells.task == task].iloc[0]
    found = {(m, r): estimates[metric, m, ""].get((task, r)) for m in methods for r in grid.rates_of(m)}
    for method in methods:
        rows.append([METHODS[method][0]])
        for rate in columns:
            if (one := found.get((method, rate))) is None:
                rows[-1].append(MISSING if (method, rate) in found else "")
                continue
            means = sorted({round(e.mean, places) for (_, r), e in found.items() if e and r == rate < 1}, reverse=True)
            mark = dict(zip(means, ("**{}**", "<u>{}</u>"), strict=False)).get(round(one.mean, places), "{}")
            low, high = one.interval
            dagger = "†" * (one.num_seeds < len(grid.seeds))
            mean, half = (f"{value:.{places}f}".replace("-", "−") for value in (one.mean, (high - low) / 2))
            text = f"{mark.format(mean)} ± {half}{dagger}"
            paper = PAPER.get((first.paper_target, first.paper_task, METHODS[method][0], pruning_rate(rate)))
            rows[-1].append(text if paper is None or metric != "rouge_l" else f"{text} [{paper:.1f}]")
    return markdown_table(["pruned, %", *map(percent, columns)], rows, f"{NAMES[metric]}, {task}")


def worth_table(grid: Grid, estimates: Estimates, task: str) -> str:
    """Worth of every coreset in rows (see worth.py), with its interval over seeds and answers together; below it at
    equal tokens."""
    random, of = estimates["nll", "random", ""], grid.curve or task
    rates = [rate for rate in sorted(grid.rates) if (of, rate) in random]
    seeds = min((random[of, rate].num_seeds for rate in rates), default=0)
    if len(rates) < FEWEST_SIZES or seeds < FEWEST_SEEDS:
        has = f"it has {len(rates)} and {seeds} with a log likelihood"
        return f"{of}: no worth, which needs Random at {FEWEST_SIZES} sizes and {FEWEST_SEEDS} seeds; {has}."
    losses = falling(np.array([-np.array([random[of, r].mean, *random[of, r].replicates]) for r in rates]).T)
    means, blocks = grid.cells.groupby(["task", "method", "rate"])[["size", "tuning_tokens"]].mean(), []
    for column, unit in (("size", "rows"), ("tuning_tokens", "tokens")):
        sizes, rows = np.array([means[column][of, "random", rate] for rate in rates]), []
        for method in grid.methods_of(task):
            row = [METHODS[method][0]]
            for rate in grid.rates if method != "full" and (method, task) != ("random", of) else []:
                one = estimates["nll", method, ""].get((task, rate))
                if one is None or (method in FRESH and rate not in rates):
                    row.append(MISSING)
                    continue
                size = sizes[rates.index(rate)] if method in FRESH else means[column][task, method, rate]
                found = worth(sizes, losses, -np.array([one.mean, *one.replicates]), size)
                low, high = np.quantile(found[1:], [0.025, 0.975], method="inverted_cdf")
                beyond = "≤ " if -one.mean > losses[0, 0] else "≥ " if -one.mean < losses[0, -1] else ""
                row.append(f"{beyond}{found[0]:.2f} ({low:.2f} to {high:.2f})")
            rows += [row] if len(row) > 1 else []
        title = f"Worth in {unit}, {task}" + f" (of {of})" * (of != task)
        blocks.append(markdown_table(["pruned, %", *map(percent, grid.rates)], rows, title))
    return "\n\n".join(blocks)


def verdict(grid: Grid, other: str, estimates: Estimates) -> str:
    """One sentence on the first metric over all tasks and rates."""
    label, metric = METHODS[other][0], grid.metrics[0]
    found = list(estimates[metric, "staff", other].values())
    if not found:
        return f"STAFF against {label}: no verdict, there is no task, rate and seed that both have."
    says = {0: "STAFF against {}: no difference can be shown", 1: "STAFF beats {}", -1: "STAFF is worse than {}"}
    whole, pairs = pool(found), len(grid.tasks) * len(grid.rates)
    over = f"{len(found)} of {pairs}" if len(found) < pairs else f"all {pairs}"
    counts = {one.num_seeds for one in found}
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    figure = f"{says[whole.sign].format(label)}: {with_interval(whole, PLACES[metric])} {NAMES[metric]}"
    return f"{figure}, mean over {over} pairs of task and rate, seeds of each: {seeds}."


def difference_table(grid: Grid, estimates: Estimates, metric: str) -> str:
    columns, rows, places = [estimates[metric, "staff", other] for other in AGAINST], [], PLACES[metric]
    pairs = grid.cells.groupby(["task", "rate"]).size().index
    for task, rate in (pair for pair in itertools.product(grid.tasks, grid.rates) if pair in pairs):
        rows.append([task, percent(rate), *(with_interval(found.get((task, rate)), places) for found in columns)])
    rows.append(["**all**", "**all**", *(with_interval(pool(list(found.values())), places) for found in columns)])
    heading = ["task", "pruned, %", *(f"STAFF − {METHODS[other][0]}" for other in AGAINST)]
    return markdown_table(heading, rows, NAMES[metric])


def random_table(grid: Grid, estimates: Estimates) -> str:
    """Every method against Random, which costs nothing."""
    rows, metric = [], grid.metrics[0]
    for method in grid.methods:
        for task in [task for task in grid.tasks if method in set(grid.methods_of(task)) - {"full", "random"}]:
            found = [estimates[metric, method, "random"].get((task, rate)) for rate in grid.rates]
            found.append(pool([one for one in found if one]))
            rows.append([METHODS[method][0], task, *(with_interval(one, PLACES[metric]) for one in found)])
    heading = ["method − Random", "task", *(f"{percent(rate)} %" for rate in grid.rates), "mean"]
    return markdown_table(heading, rows, f"{NAMES[metric]} of every method against Random, by pruning rate")


def cost_tables(grid: Grid, task: str) -> str:
    """Selection costs, STAFF's saving against GraNd over the seeds that both have, and selection-to-tuning ratios."""
    cells, rows, ratio_rows, savings, whole, ratios = grid.cells[grid.cells.task == task], [], [], [], {}, {}
    once = cells.groupby(["method", "seed"])[SELECTION].first()  # selection costs the same at every rate of a seed
    costs, means = once.groupby("method").mean(), cells.groupby(["method", "rate"]).mean(numeric_only=True)
    for unit, name in (("seconds", "seconds"), ("flops", "FLOPs")):
        both = once[f"selection_{unit}"].unstack("method").reindex(columns=["staff", "grand"]).dropna().sum()
        saved = _shown(100 * (1 - both.staff / both.grand) if both.grand else None, "{:.1f} %".format)
        savings.append(f"{saved.replace('-', '−')} in {name}")
        whole[unit] = means[f"tuning_{unit}"].get(("full", 1.0), math.nan)
        ratios[unit] = (means[f"selection_{unit}"] + means[f"tuning_{unit}"]) / (whole[unit] or math.nan)
    for method in (method for method in grid.methods_of(task) if method != "full"):
        label = METHODS[method][0]
        rows.append([label, *(_shown(costs[f"selection_{unit}"].get(method), form) for unit, form in UNITS.items())])
        shown = [[_shown(by.get((method, rate)), "{:.2f}".format) for by in ratios.values()] for rate in grid.rates]
        ratio_rows.append([label, *(" / ".join(pair).replace("– / –", MISSING) for pair in shown)])
    everything = f"{UNITS['seconds'](whole['seconds'])} s and {UNITS['flops'](whole['flops'])} FLOPs"
    costs_table = markdown_table(["selection", "seconds", "tokens", "FLOPs"], rows, f"Cost, {task}")
    ratio_table = markdown_table(["pruned, %", *map(percent, grid.rates)], ratio_rows)
    return (
        f"{costs_table}\n\nSTAFF saves {' and '.join(savings)} against GraNd (1 − cost of STAFF / cost of GraNd; the "
        "paper's best case: 70.5 %).\n\nSelection-to-tuning ratio, seconds / FLOPs, by pruning rate; tuning on "
        f"everything: {_shown(whole['seconds'], lambda _: everything)}.\n\n{ratio_table}"
    )


def with_interval(one: Estimate | None, places: int = 2) -> str:
    if one is None:
        return MISSING
    mean, low, high = (round(value, places) + 0.0 for value in (one.mean, *one.interval))  # + 0.0 makes −0.0 a 0.0
    return f"{mean:+.{places}f} ({low:.{places}f} to {high:.{places}f})".replace("-", "−")


def _shown(value: float | None, form) -> str:
    return MISSING if value is None or math.isnan(value) else form(value)


def draw_curves(grid: Grid, estimates: Estimates) -> Figure:
    """The first metric against pruning rate, a panel for each task."""
    figure = Figure(figsize=(4.2 * len(grid.tasks) + 1.6, 4.2), layout="constrained")
    panels, handles = figure.subplots(1, len(grid.tasks), squeeze=False)[0], {}
    for axes, task in zip(panels, grid.tasks, strict=True):
        for method in grid.methods:
            found = [estimates[grid.metrics[0], method, ""].get((task, rate)) for rate in grid.rates_of(method)]
            if any(found):
                _draw_method(axes, found, grid, method)
        axes.set(xlabel="pruning rate (%)", xticks=[pruning_rate(rate) for rate in grid.rates])
        axes.set_title(f"{task}, {grid.cells[grid.cells.task == task].target.iloc[0]}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    unit = "nats a token" if grid.metrics[0] == "nll" else "%"
    panels[0].set_ylabel(f"{NAMES[grid.metrics[0]]} ({unit})")
    shown = {label: handles[label] for label, *_ in METHODS.values() if label in handles}
    figure.legend(shown.values(), shown.keys(), loc="outside right upper", frameon=False, title="bands: 95 %")
    return figure


def _draw_method(axes, found: list[Estimate | None], grid: Grid, method: str) -> None:
    """A line with a gap where cells are missing; for the whole training split a horizontal one."""
    label, colour, marker = METHODS[method]
    if method == "full":
        axes.axhline(found[0].mean, color=colour, linewidth=1.2, linestyle="--", label=label)
        axes.axhspan(*found[0].interval, color=colour, alpha=0.07, linewidth=0)
        return
    pruned = [pruning_rate(rate) for rate in grid.rates]
    means, lows, highs = zip(*((one.mean, *one.interval) if one else [math.nan] * 3 for one in found), strict=True)
    style = {"linewidth": 1.2, "markersize": 5, "zorder": 2}
    if method == "staff":
        style = {"linewidth": 2.2, "markersize": 10, "zorder": 3}
    axes.plot(pruned, means, color=colour, marker=marker, label=label, **style)
    axes.fill_between(pruned, lows, highs, color=colour, alpha=0.08, linewidth=0)


if __name__ == "__main__":
    run_stage(main)
