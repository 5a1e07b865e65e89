"""Tables and curves of a grid that scripts/paper/reproduce.py ran, from its cells.csv and the paper's Table 1 alone.

    python scripts/paper/tables.py data/results/smollm2_cpu

Needs that folder. Writes tables.md, curves.png and curves.svg into that folder and prints the tables. The grid may be
unfinished: what is missing is counted and shown as an en dash.
"""

import csv
import math
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from selection.run.ending import end_on_signals

end_on_signals()

import matplotlib

from selection.run.cli import run_stage
from selection.run.errors import UserError

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from scripts.paper.intervals import bootstrap_means, percentile_interval
from selection.run.cli import argument_parser
from selection.run.config import REPOSITORY
from selection.run.metrics import LLAMA_FACTORYS
from selection.run.products import atomic_path

PAPER_TABLE = REPOSITORY / "data" / "paper_table1.csv"

# In the order of the tables: the paper's name, then colour (Okabe and Ito's and Tol's, told apart by the colour-blind)
# and marker in the curves.
METHODS = {
    "full": ("Full data", "#000000", ""),
    "random": ("Random", "#777777", "o"),
    "length": ("Length", "#ddaa33", "s"),
    "grand": ("GraNd", "#117733", "^"),
    "el2n": ("EL2N", "#88ccee", "v"),
    "ccs": ("CCS", "#332288", "D"),
    "d2": ("D2 Pruning", "#aa4499", "P"),
    "moderate": ("Moderate", "#44aa99", "X"),
    "entropy": ("Entropy", "#999933", "<"),
    "staff": ("STAFF", "#d55e00", "*"),
    "staff_length": ("STAFF, length control", "#882255", "p"),
}
AGAINST = ("random", "ccs", "length")
METRICS = {"rouge_l": "ROUGE-L", "bleu_4": "BLEU-4"}
UNITS = ("seconds", "tokens", "flops")
PRICES = {"seconds": "seconds", "flops": "FLOPs"}

_WORDS = ("task", "target", "method", "mode", "device", "precision", "commit", "settings", "paper_target", "paper_task")
_COUNTS = ("seed", "size", "num_rows", "eval_rows")
_COSTS = tuple(f"{what}_{unit}" for what in ("selection", "tuning") for unit in UNITS)
_MEASURES = ("rate", "rouge_l", "bleu_4", "rouge_1", "rouge_2", *_COSTS, "peak_memory_gb")
_BY_SAMPLE = tuple(f"{metric}_by_sample" for metric in METRICS)
COLUMNS = (*_WORDS, *_COUNTS, *_MEASURES, *_BY_SAMPLE)
# Its mode too, which is among its settings; a row of STAFF with more than the published rules says extended.
_SAME_WITHIN_A_TASK = ("target", "num_rows", "eval_rows", "precision", "settings")
_SAME_AT_EVERY_RATE = tuple(column for column in _COSTS if column.startswith("selection"))
_ROUNDING = 0.05  # between a stored mean and the mean of stored values, in percentage points

MISSING = "–"
COST_CAPTION = (
    "Means over seeds, without intervals. *Selection* is every stage that a method needs for its coresets, tuning and "
    "scoring models included (and cutting the speculator, where it was cut out of the target), whatever the number of "
    "rates; a stage that several methods need counts for each. The one pass over the tuned target collects what all "
    "methods read, a little more than any of them needs. The ratio is (selection + tuning on the coreset) / tuning on "
    "everything: above 1 a method costs more than it saves, where one coreset is wanted. Seconds hold for the device "
    "named on top and depend on what else ran there; tokens and FLOPs do not."
)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("folder", type=Path, help="with the cells.csv of scripts/paper/reproduce.py, required")
    folder = parser.parse_args().folder
    paper = read_paper(PAPER_TABLE)
    grid = read_cells(folder / "cells.csv", paper)
    estimates = estimate_scores(grid)
    text = format_tables(grid, estimates, paper)
    outputs = [folder / name for name in ("tables.md", "curves.png", "curves.svg")]
    with ExitStack() as stack:  # all three are written before the first is renamed
        tables, *pictures = (stack.enter_context(atomic_path(path)) for path in outputs)
        tables.write_text(text, encoding="utf-8")
        draw_curves(grid, estimates, dict(zip(("png", "svg"), pictures, strict=True)))
    print(text)
    print("written: " + ", ".join(map(str, outputs)))


# What was measured


@dataclass(frozen=True)
class Grid:
    """cells[task, method, rate, seed] holds one row of cells.csv: words, numbers and (eval_rows,) arrays by column."""

    cells: dict[tuple[str, str, float, int], dict]

    def values(self, position: int) -> list:
        return sorted({key[position] for key in self.cells})

    @property
    def tasks(self) -> list[str]:
        return self.values(0)

    @property
    def methods(self) -> list[str]:
        return [method for method in METHODS if method in self.values(1)]

    @property
    def seeds(self) -> list[int]:
        return self.values(3)

    @property
    def rates(self) -> list[float]:
        """Of coresets, by ascending pruning rate."""
        return [rate for rate in reversed(self.values(2)) if rate < 1]

    def rates_of(self, method: str) -> list[float]:
        return [1.0] if method == "full" else self.rates

    @property
    def columns(self) -> list[float]:
        """`rates`, after the whole training split where a model was tuned on it."""
        return [1.0] * ("full" in self.methods) + self.rates

    @property
    def size(self) -> int:
        """How many cells the finished grid has."""
        return len(self.tasks) * len(self.seeds) * sum(len(self.rates_of(method)) for method in self.methods)

    def by_seed(self, task: str, method: str, rate: float) -> dict[int, dict]:
        found = {seed: self.cells.get((task, method, rate, seed)) for seed in self.seeds}
        return {seed: cell for seed, cell in found.items() if cell is not None}

    def of_task(self, task: str) -> list[dict]:
        return [cell for key, cell in self.cells.items() if key[0] == task]


def pruning_rate(rate: float) -> float:
    """Percent, as in the paper; `rate` is the fraction kept."""
    return round(100 * (1 - rate), 6)


def read_cells(path: Path, paper: dict) -> Grid:
    """cells.csv, checked. Rows are counted as in a spreadsheet: the header is row 1.

    Raises: UserError naming row and column.
    """
    grid, at, earlier = Grid({}), {}, {}
    known = {key[:2] for key in paper}
    for row, words in _read_rows(path, COLUMNS):
        cell = {column: words[column] for column in _WORDS}
        for column in (*_COUNTS, *_MEASURES, *_BY_SAMPLE):
            cell[column] = _parse(path, row, column, words[column])
        _check_cell(path, row, cell)
        if (names := (cell["paper_target"], cell["paper_task"])) != ("", "") and names not in known:
            raise UserError(
                f"{path}, row {row}, columns paper_target, paper_task: {names} is not in {PAPER_TABLE.name}: leave "
                "both empty where the paper has no such cell"
            )
        task, selected = (cell["task"],), (cell["task"], cell["method"], cell["seed"])
        for group, columns in ((task, _SAME_WITHIN_A_TASK), (selected, _SAME_AT_EVERY_RATE)):
            other_row, other = earlier.setdefault(group, (row, cell))
            if differ := [column for column in columns if cell[column] != other[column]]:
                raise UserError(
                    f"{path}, row {row}, column {differ[0]}: {cell[differ[0]]!r}, where row {other_row} of the same "
                    f"{', '.join(map(str, group))} has {other[differ[0]]!r}: they belong to different runs"
                )
        key = (cell["task"], cell["method"], cell["rate"], cell["seed"])
        if key in grid.cells:
            raise UserError(
                f"{path}, row {row}, columns task, method, rate, seed: the cell {', '.join(map(str, key))} is in row "
                f"{at[key]} already: remove one of them"
            )
        grid.cells[key], at[key] = cell, row
    if not grid.cells:
        raise UserError(f"{path} holds no cells yet: let scripts/paper/reproduce.py finish one")
    return grid


def _check_cell(path: Path, row: int, cell: dict) -> None:
    if cell["method"] not in METHODS:
        raise UserError(f"{path}, row {row}, column method: {cell['method']!r} is none of {', '.join(METHODS)}")
    if not 0 < cell["rate"] <= 1 or (cell["rate"] == 1) != (cell["method"] == "full"):
        raise UserError(
            f"{path}, row {row}, column rate: {cell['rate']:g} for {cell['method']}: full has 1, coresets less, above 0"
        )
    if negative := [column for column in _COSTS if cell[column] < 0]:
        raise UserError(f"{path}, row {row}, column {negative[0]}: {cell[negative[0]]:g} is below 0")
    for metric in METRICS:
        values = cell[f"{metric}_by_sample"]
        if len(values) != cell["eval_rows"] or not len(values):
            raise UserError(
                f"{path}, row {row}, column {metric}_by_sample: {len(values)} values, where column eval_rows says "
                f"{cell['eval_rows']}: one for each evaluation row is needed"
            )
        if abs(values.mean() - cell[metric]) > _ROUNDING:
            raise UserError(
                f"{path}, row {row}, column {metric}: {cell[metric]:g}, where the values in {metric}_by_sample have "
                f"the mean {values.mean():.4g}"
            )


def read_paper(path: Path) -> dict[tuple[str, str, str, float], float]:
    """The paper's ROUGE-L by target, task, method (the paper's names) and pruning rate in percent."""
    columns = ("target", "task", "method", "pruning_rate_percent", "rouge_l")
    table = {}
    for row, words in _read_rows(path, columns):
        pruned, score = (_parse(path, row, column, words[column]) for column in columns[3:])
        table[words["target"], words["task"], words["method"], pruned] = score
    return table


def _read_rows(path: Path, columns: Iterable[str]) -> list[tuple[int, dict[str, str]]]:
    csv.field_size_limit(2**31 - 1)  # scores by sample are one long field
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if missing := [column for column in columns if column not in (reader.fieldnames or [])]:
                raise UserError(f"{path}, row 1: column {missing[0]} is missing")
            rows = []
            for words in reader:
                if None in words or None in words.values():
                    last = "after" if None in words else "before"
                    raise UserError(
                        f"{path}, row {reader.line_num}: ends {last} the last column, {reader.fieldnames[-1]}"
                    )
                rows.append((reader.line_num, words))
            return rows
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no readable CSV: {error}") from None


def _parse(path: Path, row: int, column: str, text: str) -> int | float | np.ndarray:
    """A count, a number, or the numbers of a column by sample."""
    try:
        if column in _COUNTS:
            return int(text)
        numbers = [float(part) for part in (text.split() if column in _BY_SAMPLE else [text])]
        if not all(map(math.isfinite, numbers)):
            raise ValueError
        return np.array(numbers) if column in _BY_SAMPLE else numbers[0]
    except ValueError:
        short = text if len(text) <= 40 else text[:40] + "…"
        kind = {True: "whole number", False: "finite number"}[column in _COUNTS]
        some = f"holds something that is no {kind}" if column in _BY_SAMPLE else f"is no {kind}"
        raise UserError(f"{path}, row {row}, column {column}: {short!r} {some}") from None


# Means and intervals


@dataclass(frozen=True)
class Estimate:
    mean: float
    replicates: np.ndarray  # of the mean: (replicates,)
    num_seeds: int

    @property
    def interval(self) -> tuple[float, float]:
        return percentile_interval(self.replicates)

    @property
    def half_width(self) -> float:
        low, high = self.interval
        return (high - low) / 2

    @property
    def sign(self) -> int:
        """1 where the interval lies above 0, −1 where it lies below, 0 where it includes 0."""
        low, high = self.interval
        return (low > 0) - (high < 0)


def estimate(grid: Grid, task: str, quantities: dict[tuple, dict[int, np.ndarray]]) -> dict[tuple, Estimate]:
    """Quantities of one task, each given as one (eval_rows,) array by seed, under one draw; empty ones are left out.

    Tasks have evaluation rows and tuning runs of their own, so each gets a draw of its own.
    """
    quantities = {name: by_seed for name, by_seed in quantities.items() if by_seed}
    if not quantities:
        return {}
    values = np.full((len(quantities), len(grid.seeds), grid.of_task(task)[0]["eval_rows"]), np.nan)
    for of_quantity, by_seed in zip(values, quantities.values(), strict=True):
        for seed, scores in by_seed.items():
            of_quantity[grid.seeds.index(seed)] = scores
    replicates = bootstrap_means(values, stream=grid.tasks.index(task)).T
    return {
        name: Estimate(float(np.mean(list(by_seed.values()))), of_quantity, len(by_seed))
        for (name, by_seed), of_quantity in zip(quantities.items(), replicates, strict=True)
    }


def estimate_scores(grid: Grid) -> dict[tuple[str, str, str, float], Estimate]:
    """The mean score of each metric, task, method and rate."""
    estimates = {}
    for task in grid.tasks:
        quantities = {
            (metric, task, method, rate): {
                seed: cell[f"{metric}_by_sample"] for seed, cell in grid.by_seed(task, method, rate).items()
            }
            for metric in METRICS
            for method in grid.methods
            for rate in grid.rates_of(method)
        }
        estimates |= estimate(grid, task, quantities)
    return estimates


def estimate_differences(grid: Grid, other: str, method: str = "staff") -> dict[tuple[str, str, float], Estimate]:
    """`method` − `other` of each metric, task and rate, over the seeds that both have."""
    estimates = {}
    for task in grid.tasks:
        quantities = {}
        for metric in METRICS:
            for rate in grid.rates:
                ours, others = grid.by_seed(task, method, rate), grid.by_seed(task, other, rate)
                column = f"{metric}_by_sample"
                quantities[metric, task, rate] = {
                    seed: ours[seed][column] - others[seed][column] for seed in ours if seed in others
                }
        estimates |= estimate(grid, task, quantities)
    return estimates


def pool(estimates: list[Estimate], together: Callable = np.mean) -> Estimate:
    """A figure of several estimates, by default the mean of all with equal weight, taken inside of each replicate."""
    return Estimate(
        float(together([one.mean for one in estimates], axis=0)),
        together([one.replicates for one in estimates], axis=0),
        min(one.num_seeds for one in estimates),
    )


def count_above_zero(values: list, axis: int) -> np.ndarray:
    return np.sum(np.array(values) > 0, axis=axis)


# Tables


def format_tables(grid: Grid, estimates: dict, paper: dict) -> str:
    differences = {other: estimate_differences(grid, other) for other in AGAINST}
    blocks = [
        "# Tables",
        *describe(grid),
        "## 1. Scores by pruning rate",
        *(block for task in grid.tasks for block in score_table(grid, estimates, paper, "rouge_l", task)),
        "\n".join(f"- {verdict(grid, other, differences[other])}" for other in AGAINST),
        score_caption(grid, estimates),
        *(block for task in grid.tasks for block in score_table(grid, estimates, paper, "bleu_4", task)),
        "Read as the tables of ROUGE-L; the paper gives no BLEU-4.",
        "## 2. STAFF against Random, CCS and Length",
        *difference_tables(grid, differences),
        *random_table(grid),
        "## 3. What selection costs",
        *(block for task in grid.tasks for block in cost_tables(grid, task)),
        COST_CAPTION,
    ]
    return "\n\n".join(blocks) + "\n"


def describe(grid: Grid) -> list[str]:
    """What was run, and how much of it is missing."""
    lines = []
    for task in grid.tasks:
        cells = grid.of_task(task)
        modes = " and ".join(dict.fromkeys(cell["mode"] for cell in cells))
        where = "; ".join(sorted({f"{cell['precision']} on {cell['device']}" for cell in cells}))
        commits = ", ".join(sorted({cell["commit"] for cell in cells}))
        lines.append(
            f"- {task}: target {cells[0]['target']}, {cells[0]['num_rows']} training rows, {cells[0]['eval_rows']} "
            f"evaluation rows, mode {modes}, {where}, commit {commits}"
        )
    seeds = f"Seeds: {', '.join(map(str, grid.seeds))}."
    missing = grid.size - len(grid.cells)
    state = f"{missing} of the {grid.size} cells of this grid are missing (shown as {MISSING})."
    return ["\n".join(lines), f"{seeds} {state if missing else f'No cell of this grid is missing ({grid.size}).'}"]


def score_table(grid: Grid, estimates: dict, paper: dict, metric: str, task: str) -> list[str]:
    ranks = {
        rate: ranking({method: estimates.get((metric, task, method, rate)) for method in grid.methods})
        for rate in grid.rates  # of coresets, so full has no place
    }
    rows = []
    for method in grid.methods:
        row = [METHODS[method][0]]
        for rate in grid.columns:
            if rate not in grid.rates_of(method):
                row.append("")
            elif (found := estimates.get((metric, task, method, rate))) is None:
                row.append(MISSING)
            else:
                text = mark(f"{found.mean:.2f}", ranks.get(rate, {}).get(method)) + f" ± {found.half_width:.2f}"
                text += "†" * (found.num_seeds < len(grid.seeds))
                published = paper_value(grid, paper, task, method, rate) if metric == "rouge_l" else None
                row.append(text + (f" [{published:.1f}]" if published is not None else ""))
        rows.append(row)
    heading = ["pruned, %", *(f"{pruning_rate(rate):g}" for rate in grid.columns)]
    return [f"### {METRICS[metric]}, {task}", markdown_table(heading, rows)]


def ranking(column: dict[str, Estimate | None]) -> dict[str, int]:
    """Place of each method by its mean as printed: 1 the best, 2 the next; equal ones share a place."""
    printed = {method: round(found.mean, 2) for method, found in column.items() if found is not None}
    places = sorted(set(printed.values()), reverse=True)
    return {method: places.index(mean) + 1 for method, mean in printed.items()}


def mark(text: str, place: int | None) -> str:
    return {1: f"**{text}**", 2: f"<u>{text}</u>"}.get(place, text)


def paper_value(grid: Grid, paper: dict, task: str, method: str, rate: float) -> float | None:
    for cell in grid.by_seed(task, method, rate).values():
        key = (cell["paper_target"], cell["paper_task"], METHODS[method][0], pruning_rate(rate))
        if key in paper:
            return paper[key]
    return None


def score_caption(grid: Grid, estimates: dict) -> str:
    fewer = "† fewer seeds than the others. " if any(e.num_seeds < len(grid.seeds) for e in estimates.values()) else ""
    return (
        "Mean over seeds and evaluation rows, in percent, by the share of the training split that was pruned; "
        "**best** and <u>second best</u> coreset of each column, by the mean alone. "
        f"{fewer}± is half of a 95 % percentile bootstrap interval (10,000 replicates) over evaluation rows, the same "
        f"for all seeds, and over seeds. {seed_caveat(grid)} The intervals are about this model, this training split "
        "and this held-out split, not about others; two that overlap can still belong to methods that differ: compare "
        "methods in section 2. [In brackets] the paper's ROUGE-L, given there without seeds or intervals. The held-out "
        "split is a part of all pooled rows, so figures cannot be compared with results on official test sets. "
        f"{LLAMA_FACTORYS}"
    )


def seed_caveat(grid: Grid) -> str:
    count = len(grid.seeds)
    if count == 1:
        return "With one seed the intervals know nothing of how seeds differ."
    share = f"{count - 1}/{count}"
    return f"With {count} seeds the seeds' part is understated: their variance enters as {share} of it on average."


def verdict(grid: Grid, other: str, differences: dict) -> str:
    """One plain sentence on ROUGE-L over all tasks and rates."""
    label = METHODS[other][0]
    found = [one for (metric, _, _), one in differences.items() if metric == "rouge_l"]
    if not found:
        return f"STAFF against {label}: no verdict, there is no task, rate and seed that both have."
    whole = pool(found)
    say = {
        1: f"STAFF beats {label}",
        0: f"STAFF against {label}: no difference can be shown",
        -1: f"STAFF is worse than {label}",
    }[whole.sign]
    pairs = len(grid.tasks) * len(grid.rates)
    over = f"{len(found)} of {pairs}" if len(found) < pairs else f"all {pairs}"
    seeds = " to ".join(map(str, sorted({one.num_seeds for one in found})))
    return f"{say}: {signed_interval(whole)} ROUGE-L, mean over {over} pairs of task and rate, seeds of each: {seeds}."


def difference_tables(grid: Grid, differences: dict[str, dict]) -> list[str]:
    blocks = []
    for metric, name in METRICS.items():
        columns = {o: {key[1:]: one for key, one in differences[o].items() if key[0] == metric} for o in AGAINST}
        rows = [
            [task, f"{pruning_rate(rate):g}", *(_shown(columns[o].get((task, rate)), signed_interval) for o in AGAINST)]
            for task in grid.tasks
            for rate in grid.rates
        ]
        rows.append(["**all**", "**all**", *(_shown(_pool_any(columns[o]), signed_interval) for o in AGAINST)])
        rows.append(["above 0", "", *(_count_text(list(columns[o].values())) for o in AGAINST)])
        for say, sign in (("interval above 0", 1), ("interval below 0", -1)):
            counts = [sum(one.sign == sign for one in columns[o].values()) for o in AGAINST]
            texts = [
                f"{n} of {len(columns[o])}" if columns[o] else MISSING for n, o in zip(counts, AGAINST, strict=True)
            ]
            rows.append([say, "", *texts])
        heading = ["task", "pruned, %", *(f"STAFF − {METHODS[o][0]}" for o in AGAINST)]
        blocks += [f"### {name}", markdown_table(heading, rows)]
    caption = (
        "Mean difference in percentage points over the seeds that both methods have, with its 95 % percentile "
        "bootstrap interval (10,000 replicates) over evaluation rows and seeds. Both methods always have the same "
        "rows and the same seed; rates of one task share a draw, tasks do not. **All**: every task and rate with equal "
        "weight. *Above 0*: at how many tasks and rates STAFF's mean is higher, with the 95 % interval of that count "
        "in the same replicates; these add noise to means that are noisy already, so it leans to the middle. *Interval "
        "above 0*, *below 0*: at how many the interval excludes 0. "
        f"{seed_caveat(grid)} Nothing is corrected for the number of comparisons: of 20 true differences of 0, one may "
        "be expected to have an interval without it. Nothing here is about other models or data."
    )
    return [*blocks, caption]


def random_table(grid: Grid) -> list[str]:
    """Every method against Random, which costs nothing."""
    rows = []
    for method in grid.methods:
        if method in ("full", "random"):
            continue
        found = estimate_differences(grid, "random", method)
        for task in grid.tasks:
            of_task = [found.get(("rouge_l", task, rate)) for rate in grid.rates]
            mean = _pool_any({i: one for i, one in enumerate(of_task) if one is not None})
            texts = [_shown(one, signed_interval) for one in (*of_task, mean)]
            rows.append([METHODS[method][0], task, *texts])
    heading = ["method − Random", "task", *(f"{pruning_rate(rate):g} %" for rate in grid.rates), "mean"]
    return [
        "### ROUGE-L of every method against Random, by pruning rate",
        markdown_table(heading, rows),
        "Differences and intervals as above.",
    ]


def _pool_any(estimates: dict) -> Estimate | None:
    return pool(list(estimates.values())) if estimates else None


def _count_text(estimates: list[Estimate]) -> str:
    if not estimates:
        return MISSING
    count = pool(estimates, count_above_zero)
    low, high = count.interval
    return f"{count.mean:.0f} of {len(estimates)} ({low:.0f} to {high:.0f})"


def cost_tables(grid: Grid, task: str) -> list[str]:
    """Selection costs, STAFF's saving against GraNd, and selection-to-tuning ratios of one task."""
    methods = [method for method in grid.methods if method != "full"]
    costs = {method: selection_cost(grid, task, method) for method in methods}
    rows = [
        [
            METHODS[m][0],
            *(_shown(costs[m].get(u), f) for u, f in zip(UNITS, (_one_decimal, _thousands, _flops), strict=True)),
        ]
        for m in methods
    ]
    saving = [f"{_shown(saving_against_grand(grid, task, unit), percent)} in {name}" for unit, name in PRICES.items()]
    whole = {unit: tuning_cost(grid, task, "full", 1.0, unit) for unit in PRICES}
    ratios = []
    for method in methods:
        row = [METHODS[method][0]]
        for rate in grid.rates:
            parts = [
                _shown(selection_to_tuning(grid, task, method, rate, unit), lambda x: f"{x:.2f}") for unit in PRICES
            ]
            row.append(MISSING if set(parts) == {MISSING} else " / ".join(parts))
        ratios.append(row)
    on_everything = (
        f"{_shown(whole['seconds'], _one_decimal)} s and {_shown(whole['flops'], _flops)} FLOPs"
        if whole["seconds"] is not None
        else f"not run yet ({MISSING})"
    )
    return [
        f"### Cost, {task}",
        markdown_table(["selection", "seconds", "tokens", "FLOPs"], rows),
        f"STAFF saves {' and '.join(saving)} against GraNd (1 − cost of STAFF / cost of GraNd; the paper's best case: "
        "70.5 %).",
        f"Selection-to-tuning ratio, seconds / FLOPs, by pruning rate; tuning on everything: {on_everything}.",
        markdown_table(["pruned, %", *(f"{pruning_rate(rate):g}" for rate in grid.rates)], ratios),
    ]


def selection_cost(grid: Grid, task: str, method: str) -> dict[str, float]:
    """By unit, mean over seeds; empty without a cell."""
    by_seed = _cost_by_seed(grid, task, method)
    return {unit: _mean(cell[f"selection_{unit}"] for cell in by_seed.values()) for unit in UNITS} if by_seed else {}


def saving_against_grand(grid: Grid, task: str, unit: str) -> float | None:
    """1 − cost of STAFF / cost of GraNd, over the seeds that both have."""
    staff, grand = (_cost_by_seed(grid, task, method) for method in ("staff", "grand"))
    both = staff.keys() & grand.keys()
    total = sum(grand[seed][f"selection_{unit}"] for seed in both)
    return 1 - sum(staff[seed][f"selection_{unit}"] for seed in both) / total if total else None


def _cost_by_seed(grid: Grid, task: str, method: str) -> dict[int, dict]:
    """A cell of each seed; selection costs the same at every rate of a seed."""
    return {seed: cell for rate in grid.rates for seed, cell in grid.by_seed(task, method, rate).items()}


def tuning_cost(grid: Grid, task: str, method: str, rate: float, unit: str) -> float | None:
    by_seed = grid.by_seed(task, method, rate)
    return _mean(cell[f"tuning_{unit}"] for cell in by_seed.values()) if by_seed else None


def selection_to_tuning(grid: Grid, task: str, method: str, rate: float, unit: str) -> float | None:
    """(selection + tuning on the coreset) / tuning on everything, of means over the seeds that each has."""
    by_seed = grid.by_seed(task, method, rate)
    whole = tuning_cost(grid, task, "full", 1.0, unit)
    if not by_seed or not whole:
        return None
    return _mean(cell[f"selection_{unit}"] + cell[f"tuning_{unit}"] for cell in by_seed.values()) / whole


def markdown_table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def signed_interval(one: Estimate) -> str:
    low, high = one.interval
    return f"{_signed(one.mean, '+')} ({_signed(low)} to {_signed(high)})"


def _signed(value: float, sign: str = "") -> str:
    return f"{round(value, 2) + 0.0:{sign}.2f}".replace("-", "−")  # + 0.0 makes −0.0 a 0.0


def percent(share: float) -> str:
    return f"{100 * share:.1f} %".replace("-", "−")


def _one_decimal(value: float) -> str:
    return f"{value:.1f}"


def _thousands(value: float) -> str:
    return f"{value:,.0f}"


def _flops(value: float) -> str:
    return f"{value:.1e}".replace("e+", "e") if value else "0"


def _shown(value: object, form: Callable) -> str:
    return MISSING if value is None else form(value)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


# Curves


def draw_curves(grid: Grid, estimates: dict, pictures: dict[str, Path]) -> None:
    """ROUGE-L against pruning rate, a panel for each task. `pictures`: format ("png", "svg") to path."""
    with matplotlib.rc_context({"svg.hashsalt": "tables"}):  # else the SVG's ids are random
        width = 4.2 * len(grid.tasks) + 1.6
        figure, panels = plt.subplots(1, len(grid.tasks), figsize=(width, 4.2), squeeze=False, layout="constrained")
        for axes, task in zip(panels[0], grid.tasks, strict=True):
            for method in grid.methods:
                _draw_method(
                    axes, grid, [estimates.get(("rouge_l", task, method, r)) for r in grid.rates_of(method)], method
                )
            axes.set_title(f"{task}, {grid.of_task(task)[0]['target']}", fontsize=10)
            axes.set_xlabel("pruning rate (%)")
            axes.set_xticks([pruning_rate(rate) for rate in grid.rates])
            axes.spines[["top", "right"]].set_visible(False)
        panels[0, 0].set_ylabel("ROUGE-L (%)")
        handles = {}
        for axes in panels[0]:
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        order = [METHODS[method][0] for method in grid.methods]
        figure.legend(
            [handles[label] for label in order if label in handles],
            [label for label in order if label in handles],
            loc="outside right upper",
            frameon=False,
            title="bands: 95 %",
        )
        for form, path in pictures.items():
            figure.savefig(path, dpi=110, format=form, metadata={"Date": None} if form == "svg" else None)
        plt.close(figure)


def _draw_method(axes: plt.Axes, grid: Grid, found: list[Estimate | None], method: str) -> None:
    """A line with a gap where cells are missing; for the whole training split a horizontal one."""
    label, colour, marker = METHODS[method]
    if not any(found):
        return
    if method == "full":
        axes.axhline(found[0].mean, color=colour, linewidth=1.2, linestyle="--", label=label)
        axes.axhspan(*found[0].interval, color=colour, alpha=0.07, linewidth=0)
        return
    nothing = (math.nan, math.nan)
    means = [one.mean if one else math.nan for one in found]
    lows, highs = zip(*(one.interval if one else nothing for one in found), strict=True)
    pruned = [pruning_rate(rate) for rate in grid.rates]
    ours = method == "staff"
    style = {"linewidth": 2.2 if ours else 1.2, "markersize": 10 if ours else 5, "zorder": 3 if ours else 2}
    axes.plot(pruned, means, color=colour, marker=marker, label=label, **style)
    axes.fill_between(pruned, lows, highs, color=colour, alpha=0.08, linewidth=0)


if __name__ == "__main__":
    run_stage(main)
