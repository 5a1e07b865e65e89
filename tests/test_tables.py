"""Tables of a grid: intervals that cover, differences that pair, numbers that are the means of their rows."""

import csv
import importlib.util
import re
import sys

import numpy as np
import pytest
from conftest import REPOSITORY, assert_one_line_error, run_script

from scripts.paper.intervals import bootstrap_means, percentile_interval
from selection.run.errors import UserError

OUTPUTS = ("tables.md", "curves.png", "curves.svg")
EVAL_ROWS = 30


@pytest.fixture(scope="module")
def tables():
    """The script as a module."""
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("tables", REPOSITORY / "scripts" / "paper" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def fake_cell(task="biology", method="staff", rate=0.5, seed=0, lead=0.0, **changes) -> dict[str, str]:
    """A row of cells.csv: rows of a task differ by 10 points, tuning runs by 1, methods by `lead`."""
    rng = np.random.default_rng([ord(task[0]), ord(method[0]), int(100 * rate), seed])
    rows = np.random.default_rng(ord(task[0])).normal(40, 10, EVAL_ROWS)
    rouge = np.round(rows + lead + rng.normal(0, 1, EVAL_ROWS), 4)
    bleu = np.round(rouge + rng.normal(5, 1, EVAL_ROWS), 4)
    selection = {"random": 0, "full": 0, "staff": 100, "grand": 400}.get(method, 300)
    return {
        "task": task,
        "target": "tiny-135M",
        "method": method,
        "mode": "paper",
        "rate": rate,
        "seed": seed,
        "size": int(200 * rate),
        "num_rows": 200,
        "eval_rows": EVAL_ROWS,
        "rouge_l": round(rouge.mean(), 4),
        "bleu_4": round(bleu.mean(), 4),
        "rouge_1": 41.0,
        "rouge_2": 12.0,
        "rouge_l_by_sample": " ".join(map(str, rouge)),
        "bleu_4_by_sample": " ".join(map(str, bleu)),
        "selection_seconds": selection * (1 + seed),
        "selection_tokens": 10_000 * selection,
        "selection_flops": 1e12 * selection,
        "tuning_seconds": 500 * rate + seed,
        "tuning_tokens": 50_000 * rate,
        "tuning_flops": 2e15 * rate,
        "peak_memory_gb": 3.2,
        "device": "cpu",
        "precision": "fp32",
        "commit": "abc1234",
        "settings": "0f3a",
        "paper_target": "",
        "paper_task": "",
    } | changes


def fake_grid(methods=("full", "random", "length", "grand", "ccs", "staff"), rates=(0.5, 0.1), **lead) -> list[dict]:
    return [
        fake_cell(task, method, rate, seed, lead.get(method, 0.0))
        for task in ("biology", "kazakh")
        for method in methods
        for rate in ((1.0,) if method == "full" else rates)
        for seed in (0, 1)
    ]


def write_cells(folder, cells: list[dict]):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "cells.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, cells[0].keys(), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(cells)
    return folder


def make(tables, folder, cells, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tables.py", str(write_cells(folder, cells))])
    tables.main()


def read_grid(tables, folder, cells):
    return tables.read_cells(write_cells(folder, cells) / "cells.csv", tables.read_paper(tables.PAPER_TABLE))


def text_of(tables, folder, cells) -> str:
    """tables.md, without the time that curves take."""
    grid = read_grid(tables, folder, cells)
    return tables.format_tables(grid, tables.estimate_scores(grid), tables.read_paper(tables.PAPER_TABLE))


def by_sample(cell: dict, metric="rouge_l") -> np.ndarray:
    return np.array(cell[f"{metric}_by_sample"].split(), float)


def table_after(text: str, heading: str) -> dict[str, dict[str, str]]:
    """The first table below a line: {first cell of a row: {heading of a column: cell}}."""
    below = text.split(heading + "\n", 1)[1].splitlines()
    lines = [line for line in below[: _end_of_table(below)] if line.startswith("|")]
    head, _, *rows = ([part.strip() for part in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def _end_of_table(lines: list[str]) -> int:
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    return next((i for i, line in enumerate(lines) if i > start and not line.startswith("|")), len(lines))


# Intervals


def test_intervals_cover_the_mean_they_are_for():
    """Samples and seeds that differ as scores do: 95 % intervals over 5 seeds and 50 samples."""
    rng = np.random.default_rng(0)
    repetitions = 400
    shape = (repetitions, 5, 50)
    seeds, samples = rng.normal(0, 0.5, (*shape[:2], 1)), rng.normal(0, 15, (repetitions, 1, 50))
    replicates = bootstrap_means(seeds + samples + rng.normal(0, 8, shape) + 40, replicates=1000)
    intervals = [percentile_interval(one) for one in replicates.T]
    assert 0.88 <= np.mean([low <= 40 <= high for low, high in intervals]) <= 0.99


@pytest.mark.parametrize("varies", ["seeds", "samples"])
def test_spread_of_the_replicates_is_that_of_resampled_seeds_and_samples(varies):
    rng = np.random.default_rng(1)
    values = np.zeros((1, 4, 60)) + rng.normal(size=(1, 4, 1) if varies == "seeds" else (1, 1, 60))
    units = values[0, :, 0] if varies == "seeds" else values[0, 0]
    replicates = bootstrap_means(values)[:, 0]
    assert replicates.mean() == pytest.approx(values.mean(), abs=0.03)
    assert replicates.std() == pytest.approx(units.std() / np.sqrt(len(units)), rel=0.05)


def test_replicates_are_those_of_a_literal_bootstrap(monkeypatch):
    """The same draws, one replicate after the other; also across the parts in which they are drawn."""
    monkeypatch.setattr("scripts.paper.intervals._DRAWS_AT_A_TIME", 40)  # 5 replicates at a time
    rng = np.random.default_rng(2)
    values = rng.normal(size=(3, 3, 8))
    values[1, 1], values[2] = np.nan, np.nan
    replicates = bootstrap_means(values, stream=4, replicates=12)

    rng = np.random.default_rng([4, 3, 8])
    position = rng.random((12, 3))
    for replicate, shares in enumerate(position):
        rows = rng.integers(8, size=8)
        for quantity, has in enumerate([[0, 1, 2], [0, 2]]):
            seeds = [has[int(share * len(has))] for share in shares[: len(has)]]
            literal = np.mean([values[quantity, seed, row] for seed in seeds for row in rows])
            assert replicates[replicate, quantity] == pytest.approx(literal)
    assert np.isnan(replicates[:, 2]).all()


def test_streams_draw_independently_and_repeat():
    values = np.random.default_rng(3).normal(size=(1, 2, 20))
    first, again, other = (bootstrap_means(values, stream)[:, 0] for stream in (0, 0, 1))
    assert (first == again).all()
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.05


def test_ends_of_an_interval_are_replicates():
    """A count of differences has no fractions."""
    assert percentile_interval(np.array([4.0, *[2.0] * 38, 0.0])) == (0, 2)


# Table 1


def test_every_number_of_table_1_is_the_mean_of_its_rows(tables, tmp_path):
    cells = fake_grid(staff=2.0)
    text = text_of(tables, tmp_path, cells)
    checked = 0
    for task in ("biology", "kazakh"):
        for metric, name in (("rouge_l", "ROUGE-L"), ("bleu_4", "BLEU-4")):
            table = table_after(text, f"### {name}, {task}")
            assert list(table) == ["Full data", "Random", "Length", "GraNd", "CCS", "STAFF"]
            assert list(table["Random"]) == ["pruned, %", "0", "50", "90"]
            for method in ("full", "random", "length", "grand", "ccs", "staff"):
                for rate, pruned in ((1.0, "0"), (0.5, "50"), (0.1, "90")):
                    shown = table[tables.METHODS[method][0]][pruned]
                    mine = [c for c in cells if (c["task"], c["method"], c["rate"]) == (task, method, rate)]
                    if not mine:
                        assert shown == ""
                        continue
                    mean, half = map(float, re.findall(r"\d+\.\d\d", shown))
                    values = np.array([by_sample(cell, metric) for cell in mine])
                    assert mean == pytest.approx(values.mean(), abs=0.00501)
                    of_rows = 1.96 * values.mean(axis=0).std() / np.sqrt(EVAL_ROWS)
                    assert half == pytest.approx(of_rows, rel=0.15)
                    checked += 1
    assert checked == 2 * 2 * (1 + 5 * 2)
    assert "No cell of this grid is missing (44)." in text
    assert "†" not in text
    assert "With 2 seeds the seeds' part is understated" in text


def test_best_and_second_best_are_marked_without_full(tables, tmp_path):
    text = text_of(tables, tmp_path, fake_grid(full=20.0, staff=5.0, ccs=10.0))
    for task in ("biology", "kazakh"):
        table = table_after(text, f"### ROUGE-L, {task}")
        for pruned in ("50", "90"):
            assert re.match(r"\*\*\d\d\.\d\d\*\* ± ", table["CCS"][pruned])
            assert re.match(r"<u>\d\d\.\d\d</u> ± ", table["STAFF"][pruned])
            assert not any("*" in table[m][pruned] or "<u>" in table[m][pruned] for m in ("Random", "Length", "GraNd"))
        assert re.match(r"\d\d\.\d\d ± ", table["Full data"]["0"])


def test_methods_that_print_the_same_share_a_place(tables):
    column = {"random": 40.0011, "ccs": 39.9989, "length": 39.5, "staff": 39.0}
    estimates = {method: tables.Estimate(mean, np.full(3, mean), 2) for method, mean in column.items()}
    places = tables.ranking(estimates | {"grand": None})
    assert places == {"random": 1, "ccs": 1, "length": 2, "staff": 3}


def test_papers_values_stand_beside_the_cells_that_reproduce_them(tables, tmp_path):
    paper = {"paper_target": "Gemma-7b", "paper_task": "BioInstruct"}
    cells = [cell | paper if cell["task"] == "biology" else cell for cell in fake_grid()]
    text = text_of(tables, tmp_path, cells)
    table = table_after(text, "### ROUGE-L, biology")
    assert table["Full data"]["0"].endswith("[41.8]")
    assert table["Random"]["50"].endswith("[40.6]")
    assert table["Random"]["90"].endswith("[38.5]")
    assert table["GraNd"]["50"].endswith(f"[{published('Gemma-7b', 'BioInstruct', 'GraNd', '50')}]")
    assert "[" not in table["Length"]["50"]  # the paper has no such method
    for heading in ("### ROUGE-L, kazakh", "### BLEU-4, biology"):
        rows = table_after(text, heading).values()
        assert not any("[" in shown for row in rows for shown in row.values())


def published(*key: str) -> str:
    with (REPOSITORY / "data" / "paper_table1.csv").open(encoding="utf-8", newline="") as file:
        (found,) = [row["rouge_l"] for row in csv.DictReader(file) if tuple(row.values())[:4] == key]
    return found


def test_missing_cells_are_counted_and_shown(tables, tmp_path):
    gone = [("biology", "staff", 0.1, 0), ("biology", "staff", 0.1, 1), ("biology", "random", 0.5, 1)]
    gone += [("kazakh", "full", 1.0, 0), ("kazakh", "full", 1.0, 1)]
    cells = [c for c in fake_grid() if (c["task"], c["method"], c["rate"], c["seed"]) not in gone]
    text = text_of(tables, tmp_path, cells)
    assert "5 of the 44 cells of this grid are missing (shown as –)." in text
    table = table_after(text, "### ROUGE-L, biology")
    assert table["STAFF"]["90"] == "–"
    assert table["Random"]["50"].endswith("†")
    assert "†" not in table["Random"]["90"] + table["Full data"]["0"]
    assert table_after(text, "### ROUGE-L, kazakh")["Full data"]["0"] == "–"
    assert "† fewer seeds than the others." in text
    assert "tuning on everything: not run yet (–)" in text.split("### Cost, kazakh")[1]
    ratios = table_after(text.split("### Cost, kazakh")[1], "tuning on everything: not run yet (–).")
    assert ratios["STAFF"] == {"pruned, %": "STAFF", "50": "–", "90": "–"}
    rows = text.split("## 2.")[1].splitlines()
    assert next(row for row in rows if row.startswith("| biology | 90 |")) == "| biology | 90 | – | – | – |"
    assert "mean over 3 of 4 pairs of task and rate, seeds of each: 1 to 2." in text


@pytest.mark.parametrize("method", ["staff", "full"])
def test_one_cell_makes_tables_and_curves(tables, tmp_path, monkeypatch, method):
    make(tables, tmp_path, [fake_cell(method=method, rate=1.0 if method == "full" else 0.5)], monkeypatch)
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "No cell of this grid is missing (1)." in text
    assert "With one seed the intervals know nothing of how seeds differ." in text
    assert "- STAFF against Random: no verdict, there is no task, rate and seed that both have." in text
    assert all((tmp_path / name).stat().st_size for name in OUTPUTS)


# Differences


def test_paired_difference_is_the_difference_of_means_over_common_seeds(tables, tmp_path):
    cells = [c for c in fake_grid(staff=1.0) if (c["method"], c["rate"], c["seed"]) != ("random", 0.1, 1)]
    grid = read_grid(tables, tmp_path, cells)
    differences = tables.estimate_differences(grid, "random")
    assert differences.keys() == {
        (metric, task, rate)
        for metric in ("rouge_l", "bleu_4")
        for task in ("biology", "kazakh")
        for rate in (0.5, 0.1)
    }
    for (metric, task, rate), found in differences.items():
        seeds = (0, 1) if rate == 0.5 else (0,)
        means = {
            method: np.mean(
                [by_sample(c, metric) for c in cells for seed in seeds if of(c) == (task, method, rate, seed)]
            )
            for method in ("staff", "random")
        }
        assert found.mean == pytest.approx(means["staff"] - means["random"])
        assert found.num_seeds == len(seeds)
        low, high = found.interval
        assert low < found.mean < high
        assert high - low < 2  # rows differ by 10 points and cancel; unpaired it would be about 10


def of(cell: dict) -> tuple:
    return cell["task"], cell["method"], cell["rate"], cell["seed"]


def test_rates_of_a_task_share_a_draw_and_tasks_do_not(tables, tmp_path):
    """The same differences everywhere: their mean over rates is no surer than one, over two tasks by √2."""
    cells = fake_grid(methods=("random", "staff"))
    for cell in cells:
        values = np.random.default_rng(0 if cell["method"] == "staff" else 1).normal(40, 5, EVAL_ROWS)
        cell |= {"rouge_l": values.mean(), "rouge_l_by_sample": " ".join(map(str, values))}
    grid = read_grid(tables, tmp_path, cells)
    found = {key[1:]: one for key, one in tables.estimate_differences(grid, "random").items() if key[0] == "rouge_l"}
    one = found["biology", 0.5].replicates.std()
    of_a_task = tables.pool([found["biology", 0.5], found["biology", 0.1]])
    assert of_a_task.replicates.std() == pytest.approx(one)
    assert tables.pool(list(found.values())).replicates.std() == pytest.approx(one / np.sqrt(2), rel=0.05)


@pytest.mark.parametrize(
    ("lead", "said", "counts"),
    [
        (3.0, "STAFF beats {}: +", ["4 of 4 (4 to 4)", "4 of 4", "0 of 4"]),
        (0.0, "STAFF against {}: no difference can be shown: ", None),
        (-3.0, "STAFF is worse than {}: −", ["0 of 4 (0 to 0)", "0 of 4", "4 of 4"]),
    ],
)
def test_verdict_is_the_first_line_under_table_1(tables, tmp_path, lead, said, counts):
    cells = fake_grid(staff=lead)
    if not lead:  # no difference at all: the same values, in another order
        cells = [
            c | {"rouge_l_by_sample": " ".join(map(str, np.roll(range(EVAL_ROWS), len(c["method"]))))} for c in cells
        ]
        cells = [c | {"rouge_l": (EVAL_ROWS - 1) / 2} for c in cells]
    text = text_of(tables, tmp_path, cells)
    under = text.split("### ROUGE-L, kazakh\n")[1].split("\n\n")[1].splitlines()
    assert len(under) == 3
    for line, method in zip(under, ("Random", "CCS", "Length"), strict=True):
        assert line.startswith("- " + said.format(method))
        assert line.endswith(" ROUGE-L, mean over all 4 pairs of task and rate, seeds of each: 2.")
    section = text.split("## 2.")[1].split("### BLEU-4")[0]
    shown = dict(zip(("Random", "CCS", "Length"), all_row(section, "**all**")[2:], strict=True))
    for line, method in zip(under, shown, strict=True):
        assert shown[method] in line  # the verdict's numbers are those of section 2
        mean, low, high = (float(x) for x in re.findall(r"[+-]?\d+\.\d\d", shown[method].replace("−", "-")))
        assert low <= mean <= high
        assert ("no difference" in line) == (low <= 0 <= high)
    if counts:
        names = ("above 0", "interval above 0", "interval below 0")
        assert [all_row(section, name)[2] for name in names] == counts


def all_row(section: str, name: str) -> list[str]:
    (line,) = [line for line in section.splitlines() if line.startswith(f"| {name} |")]
    return [part.strip() for part in line.strip("|").split("|")]


@pytest.mark.parametrize(("values", "expected"), [([1, 2], 1), ([0, 1], 0), ([-1, 0], 0), ([0, 0], 0), ([-2, -1], -1)])
def test_interval_that_touches_0_includes_it(tables, values, expected):
    replicates = np.repeat(np.array(values, float), 50)
    assert tables.Estimate(float(np.mean(values)), replicates, 2).sign == expected


def test_count_above_0_has_the_interval_of_its_replicates(tables):
    flips = np.repeat([-1.0, 1.0], 50)
    estimates = [
        tables.Estimate(1.0, flips, 2),
        tables.Estimate(0.0, np.zeros(100), 2),
        tables.Estimate(2.0, flips + 2, 2),
    ]
    count = tables.pool(estimates, tables.count_above_zero)
    assert (count.mean, count.interval) == (2, (1, 2))
    assert tables._count_text(estimates) == "2 of 3 (1 to 2)"


# Costs


def test_costs_ratios_and_saving(tables, tmp_path):
    text = text_of(tables, tmp_path, fake_grid())
    section = text.split("### Cost, biology")[1].split("### Cost")[0]
    costs = table_after("\n" + section, "")
    assert costs["STAFF"] == {"selection": "STAFF", "seconds": "150.0", "tokens": "1,000,000", "FLOPs": "1.0e14"}
    assert costs["Random"] == {"selection": "Random", "seconds": "0.0", "tokens": "0", "FLOPs": "0"}
    assert "STAFF saves 75.0 % in seconds and 75.0 % in FLOPs against GraNd" in section
    heading = (
        "Selection-to-tuning ratio, seconds / FLOPs, by pruning rate; tuning on everything: 500.5 s and 2.0e15 FLOPs."
    )
    ratios = table_after(section, heading)
    assert ratios["STAFF"]["50"] == f"{(150 + 250.5) / 500.5:.2f} / {(1e14 + 1e15) / 2e15:.2f}"
    assert ratios["Random"]["90"] == f"{50.5 / 500.5:.2f} / {0.1:.2f}"
    assert "full" not in " ".join(ratios).lower()


def test_saving_takes_the_seeds_that_both_have(tables, tmp_path):
    cells = [c for c in fake_grid() if (c["method"], c["seed"]) != ("grand", 1)]
    grid = read_grid(tables, tmp_path, cells)
    assert tables.saving_against_grand(grid, "biology", "seconds") == pytest.approx(1 - 100 / 400)
    free = [c | {"selection_flops": 0} for c in cells]
    grid = read_grid(tables, tmp_path, free)
    assert tables.saving_against_grand(grid, "biology", "flops") is None


# Files


def test_two_calls_write_the_same_bytes(tables, tmp_path, monkeypatch):
    """Whatever the process and the order of the rows."""
    cells = fake_grid()
    done = run_script("scripts/paper/tables.py", write_cells(tmp_path / "one", cells))
    make(tables, tmp_path / "two", cells[::-1], monkeypatch)
    for name in OUTPUTS:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(["cells.csv", *OUTPUTS])
    assert (tmp_path / "one" / "tables.md").read_text(encoding="utf-8") in done.stdout


def test_nothing_is_written_where_the_curves_fail(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "draw_curves", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(tables, tmp_path, [fake_cell()], monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["cells.csv"]


def test_curves_show_every_method_and_leave_gaps(tables, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(tables.plt, "close", figures.append)
    cells = [c for c in fake_grid(rates=(0.8, 0.5, 0.1)) if of(c)[:3] != ("biology", "staff", 0.5)]
    grid = read_grid(tables, tmp_path, cells)
    tables.draw_curves(grid, tables.estimate_scores(grid), {"png": tmp_path / "curves.png"})
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == ["biology, tiny-135M", "kazakh, tiny-135M"]
    for axes, task in zip(figure.axes, ("biology", "kazakh"), strict=True):
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert list(lines) == ["Full data", "Random", "Length", "GraNd", "CCS", "STAFF"]
        for method in ("random", "staff"):
            line = lines[tables.METHODS[method][0]]
            wanted = [
                np.mean([c["rouge_l"] for c in cells if of(c)[:3] == (task, method, rate)] or [np.nan])
                for rate in (0.8, 0.5, 0.1)
            ]
            assert list(line.get_xdata()) == [20, 50, 90]
            np.testing.assert_allclose(line.get_ydata(), wanted, atol=1e-3)
    estimates = tables.estimate_scores(grid)
    full, random = figure.axes[0].patches[0], figure.axes[0].collections[0]
    low, high = estimates["rouge_l", "biology", "full", 1.0].interval
    assert (full.get_y(), full.get_height()) == pytest.approx((low, high - low))
    (band,) = (path.vertices for path in random.get_paths())
    for rate, pruned in ((0.8, 20), (0.5, 50), (0.1, 90)):
        at_rate = band[np.isclose(band[:, 0], pruned), 1]
        expected = estimates["rouge_l", "biology", "random", rate].interval
        assert (at_rate.min(), at_rate.max()) == pytest.approx(expected)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(lines)


def damaged(row: int, **changes):
    """`row` as a spreadsheet counts."""

    def damage(cells: list[dict]) -> list[dict]:
        return [cell | changes if i == row else cell for i, cell in enumerate(cells, start=2)]

    return damage


def short_values(cell: dict) -> dict:
    return {"rouge_l_by_sample": " ".join(cell["rouge_l_by_sample"].split()[:-1])}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda cells: [{k: v for k, v in c.items() if k != "seed"} for c in cells], ["row 1", "seed is missing"]),
        (
            lambda cells: [{k: v for k, v in c.items() if k != "bleu_4_by_sample"} for c in cells],
            ["row 1", "bleu_4_by_"],
        ),
        (damaged(4, tuning_seconds="fast"), ["row 4, column tuning_seconds", "'fast'"]),
        (damaged(4, selection_flops="nan"), ["row 4, column selection_flops", "'nan'"]),
        (damaged(4, selection_tokens=-1), ["row 4, column selection_tokens", "below 0"]),
        (damaged(3, seed="1.5"), ["row 3, column seed", "'1.5'", "whole number"]),
        (damaged(5, rouge_l_by_sample="1 2 x"), ["row 5, column rouge_l_by_sample", "'1 2 x'"]),
        (damaged(5, **short_values(fake_cell())), ["row 5, column rouge_l_by_sample", "29 values"]),
        (
            damaged(5, eval_rows=2, bleu_4_by_sample="1 2", bleu_4=1.5, rouge_l_by_sample="1 2", rouge_l=1.5),
            ["row 5, column eval_rows", "2", "row 2", "30"],
        ),
        (
            damaged(6, selection_flops=1),
            ["row 6, column selection_flops", "1.0", "row 4 of the same biology, random, 0"],
        ),
        (damaged(5, target="other"), ["row 5, column target", "'other'", "row 2"]),
        (damaged(5, rouge_l=80), ["row 5, column rouge_l", "80", "mean"]),
        (damaged(5, method="magic"), ["row 5, column method", "'magic'"]),
        (damaged(2, rate=0.5), ["row 2, column rate", "0.5 for full"]),
        (damaged(5, rate=1), ["row 5, column rate", "1 for random"]),
        (lambda cells: [*cells, cells[3]], ["row 46", "biology, random, 0.5, 1", "row 5"]),
        (damaged(5, paper_target="Gemma-7b"), ["row 5, columns paper_target, paper_task", "Gemma-7b"]),
        (lambda cells: [{"task": "biology"}], ["row 1", "missing"]),
    ],
)
def test_damaged_cells_are_one_line_with_row_and_column(tables, tmp_path, monkeypatch, damage, said):
    with pytest.raises(UserError) as error:
        make(tables, tmp_path, damage(fake_grid()), monkeypatch)
    assert "\n" not in str(error.value)
    for text in ["cells.csv", *said]:
        assert text in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["cells.csv"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (lambda text: text.splitlines()[0] + "\n", "no cells yet"),
        (lambda text: text[: text.rindex(",fp32")], "row 3: ends before the last column"),
        (lambda text: text.replace("\n", ",0\n").replace(",0\n", "\n", 1), "row 2: ends after the last column"),
        (lambda text: text.replace("\n", "\n\n", 1) + "1,", "row 5: ends before the last column"),
        (lambda text: text + "1,", "row 4: ends before the last column"),
        (lambda text: text.replace("abc1234", '"abc', 1), "no readable CSV"),
        (lambda text: text.replace("abc1234", "\udcff", 1), "no readable CSV"),
    ],
)
def test_unreadable_file_is_one_line(tables, tmp_path, monkeypatch, content, said):
    path = write_cells(tmp_path, [fake_cell(), fake_cell(seed=1)]) / "cells.csv"
    text = path.read_text(encoding="utf-8")
    path.unlink()
    if content:
        path.write_bytes(content(text).encode(errors="surrogateescape"))
    monkeypatch.setattr(sys, "argv", ["tables.py", str(tmp_path)])
    with pytest.raises(UserError, match=said):
        tables.main()


def test_error_reaches_the_shell_as_one_line(tmp_path):
    cells = [fake_cell(), fake_cell(seed=1) | {"rate": "half"}]
    done = run_script("scripts/paper/tables.py", write_cells(tmp_path, cells), check=False)
    assert_one_line_error(done, "cells.csv, row 3, column rate: 'half' is no finite number")


def test_every_method_stands_against_random(tables, tmp_path):
    cells = [
        fake_cell(method=m, seed=s, lead=lead) for m, lead in (("random", 0), ("grand", 5), ("ccs", -5)) for s in (0, 1)
    ]
    grid = tables.read_cells(write_cells(tmp_path, cells) / "cells.csv", {})
    text = tables.random_table(grid)[1]
    found = tables.estimate_differences(grid, "random", "grand")["rouge_l", "biology", 0.5]
    means = {m: np.mean([float(c["rouge_l"]) for c in cells if c["method"] == m]) for m in ("random", "grand", "ccs")}
    assert found.mean == pytest.approx(means["grand"] - means["random"], abs=1e-3) and found.sign == 1
    assert f"| GraNd | biology | {tables.signed_interval(found)} | {tables.signed_interval(found)} |" in text
    assert tables.estimate_differences(grid, "random", "ccs")["rouge_l", "biology", 0.5].sign == -1
    assert "| CCS |" in text and "| Random |" not in text


COMMITTED = sorted((REPOSITORY / "data" / "results").glob("*/cells.csv"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_tables_are_those_of_the_committed_cells_and_readme_shows_them(tables, path):
    paper = tables.read_paper(tables.PAPER_TABLE)
    grid = tables.read_cells(path, paper)
    committed = (path.parent / "tables.md").read_text(encoding="utf-8")
    assert committed == tables.format_tables(grid, tables.estimate_scores(grid), paper)
    readme = (REPOSITORY / "data" / "results" / "README.md").read_text(encoding="utf-8")
    shown = readme.partition(f"<!-- {path.parent.name}/tables.md -->")[2].partition("<!-- end -->")[0]
    lines = [line for line in shown.splitlines() if line.startswith(("|", "- STAFF", "STAFF saves"))]
    assert len(lines) > 8
    assert [line for line in lines if line not in committed.splitlines()] == []
