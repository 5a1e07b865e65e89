"""Tables of a grid: a literal bootstrap, differences that pair, numbers that are the means of their rows."""

import re
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, run_main, run_script

from scripts.paper import tables
from scripts.paper.tables import Estimate, bootstrap_means, pool
from selection.run.errors import UserError

EVAL_ROWS = 30
TASKS = ("biology", "kazakh")
METHODS = ("full", "random", "length", "grand", "ccs", "staff")
WITH_FULL = ((1.0, "0"), (0.5, "50"), (0.1, "90"))
CURVES = ("curves.png", "curves.svg")


@pytest.fixture
def few_replicates(monkeypatch):
    monkeypatch.setattr(tables, "bootstrap_means", partial(bootstrap_means, replicates=500))


def fake_cell(task="biology", method="staff", rate=0.5, seed=0, lead=0.0, **changes) -> dict:
    """A row of cells.csv: rows of a task differ by 10 points, tuning runs by 1, methods by `lead`."""
    rng = np.random.default_rng([ord(task[0]), ord(method[0]), int(100 * rate), seed])
    rouge = np.random.default_rng(ord(task[0])).normal(40, 10, EVAL_ROWS) + lead + rng.normal(0, 1, EVAL_ROWS)
    bleu = rouge + rng.normal(5, 1, EVAL_ROWS)
    selection = {"random": 0, "full": 0, "staff": 100, "grand": 400}.get(method, 300)
    return {
        "task": task, "target": "tiny-135M", "method": method, "mode": "paper", "rate": rate, "seed": seed,
        "size": int(200 * rate), "num_rows": 200, "eval_rows": EVAL_ROWS,
        "rouge_l": rouge.mean(), "bleu_4": bleu.mean(), "rouge_1": 41.0, "rouge_2": 12.0,
        "rouge_l_by_sample": " ".join(map(str, rouge)), "bleu_4_by_sample": " ".join(map(str, bleu)),
        "selection_seconds": selection * (1 + seed), "selection_tokens": 10_000 * selection,
        "selection_flops": 1e12 * selection, "tuning_seconds": 500 * rate + seed, "tuning_tokens": int(50_000 * rate),
        "tuning_flops": 2e15 * rate, "peak_memory_gb": 3.2, "device": "cpu", "precision": "fp32",
        "commit": "abc1234", "settings": "0f3a", "paper_target": "", "paper_task": "",
    } | changes  # fmt: skip


def fake_grid(methods=METHODS, rates=(0.5, 0.1), without=(), **lead) -> list[dict]:
    each = ((m, rate) for m in methods for rate in ((1.0,) if m == "full" else rates))
    cells = [fake_cell(task, m, rate, seed, lead.get(m, 0.0)) for task, (m, rate), seed in product(TASKS, each, (0, 1))]
    return [cell for cell in cells if key(cell) not in without]


def key(cell: dict) -> tuple:
    return cell["task"], cell["method"], cell["rate"], cell["seed"]


def write_cells(folder, cells: list[dict]):
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(cells).to_csv(folder / "cells.csv", index=False)
    return folder


def estimated(folder, cells):
    grid = tables.read_grid(write_cells(folder, cells) / "cells.csv")
    return grid, tables.estimate_grid(grid)


def text_of(folder, cells) -> str:
    return tables.format_tables(*estimated(folder, cells))


def mean_score(cells: list[dict], metric: str, *keys: tuple) -> float:
    return np.mean([np.array(c[f"{metric}_by_sample"].split(), float) for c in cells if key(c) in keys])


def table_after(text: str, heading: str) -> dict[str, dict[str, str]]:
    """The first table below a heading: {first cell of a row: {heading of a column: cell}}."""
    lines = re.search(r"(?:\|.*\n)+", text.split(heading, 1)[1])[0].splitlines()
    head, _, *rows = ([part.strip() for part in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_replicates_are_those_of_a_literal_bootstrap():
    values = np.random.default_rng(2).normal(size=(3, 3, 8))
    values[1, 1], values[2] = np.nan, np.nan
    replicates, other = (bootstrap_means(values, stream=stream, replicates=12) for stream in (4, 5))
    rng = np.random.default_rng([4, 3, 8])
    for replicate, shares in enumerate(rng.random((12, 3))):
        rows = rng.integers(8, size=8)
        for quantity, has in enumerate([[0, 1, 2], [0, 2]]):
            seeds = [has[int(share * len(has))] for share in shares[: len(has)]]
            assert replicates[replicate, quantity] == pytest.approx(values[quantity][np.ix_(seeds, rows)].mean())
    assert np.isnan(replicates[:, 2]).all()
    assert not np.isclose(replicates[:, :2], other[:, :2]).all(axis=0).any()


def test_interval_that_touches_0_includes_it():
    for values, expected in (([1, 2], 1), ([0, 1], 0), ([-2, -1], -1)):
        one = Estimate(0.0, np.repeat(np.array(values, float), 50), 2)
        assert (one.sign, one.interval) == (expected, tuple(values))


def test_every_number_of_table_1_is_the_mean_of_its_rows(tmp_path, few_replicates):
    cells = fake_grid(staff=2.0)
    text = text_of(tmp_path, cells)
    assert "No cell of this grid is missing (44)." in text and "†" not in text
    for task, (metric, name) in product(TASKS, {"rouge_l": "ROUGE-L", "bleu_4": "BLEU-4"}.items()):
        table = table_after(text, f"### {name}, {task}\n")
        assert list(table) == [tables.METHODS[method][0] for method in METHODS]
        for method, (rate, pruned) in product(METHODS, WITH_FULL):
            shown = table[tables.METHODS[method][0]][pruned]
            if (rate == 1) != (method == "full"):
                assert shown == ""
            else:
                expected = mean_score(cells, metric, *((task, method, rate, seed) for seed in (0, 1)))
                assert float(re.match(r"\W*(?:<u>)?([\d.]+)", shown)[1]) == pytest.approx(expected, abs=0.00501)


def test_the_best_two_are_marked_and_the_papers_values_stand_beside(tmp_path, few_replicates):
    means = {"full": 60, "random": 40.0011, "ccs": 39.9989, "length": 39.5, "staff": 39.0}
    values = {m: {"rouge_l": mean, "rouge_l_by_sample": " ".join([str(mean)] * EVAL_ROWS)} for m, mean in means.items()}
    paper = {"biology": {"paper_target": "Gemma-7b", "paper_task": "BioInstruct"}, "kazakh": {}}
    text = text_of(tmp_path, [c | values[c["method"]] | paper[c["task"]] for c in fake_grid(means)])
    biology, kazakh = (table_after(text, f"### ROUGE-L, {task}\n") for task in TASKS)
    shown = [kazakh[label]["50"] for label in ("Random", "CCS", "Length", "STAFF")]
    assert shown == ["**40.00** ± 0.00", "**40.00** ± 0.00", "<u>39.50</u> ± 0.00", "39.00 ± 0.00"]
    assert kazakh["Full data"]["0"] == "60.00 ± 0.00" and biology["Full data"]["0"] == "60.00 ± 0.00 [41.8]"
    assert [biology["Random"][pruned][-6:] for pruned in ("50", "90")] == ["[40.6]", "[38.5]"]
    assert biology["Length"] == kazakh["Length"]
    assert not any("[" in cell for row in table_after(text, "### BLEU-4, biology\n").values() for cell in row.values())


def test_missing_cells_are_counted_and_shown(tmp_path, few_replicates):
    gone = [("biology", "staff", 0.1, 0), ("biology", "staff", 0.1, 1), ("biology", "random", 0.5, 1)]
    text = text_of(tmp_path, fake_grid(without=[*gone, ("kazakh", "full", 1.0, 0), ("kazakh", "full", 1.0, 1)]))
    biology, kazakh = (table_after(text, f"### ROUGE-L, {task}\n") for task in TASKS)
    assert biology["STAFF"]["90"] == "–" and "Full data" not in kazakh and biology["Random"]["50"].endswith("†")
    assert "†" not in biology["Random"]["90"] + biology["Full data"]["0"]
    for said in ("5 of the 44 cells", "† fewer seeds", "\n| biology | 90 | – | – | – |\n", "mean over 3 of 4 pairs"):
        assert said in text


@pytest.mark.parametrize("method", ["staff", "full"])
def test_one_cell_makes_tables_and_curves(tmp_path, few_replicates, method):
    cell = fake_cell(method=method, rate=1.0 if method == "full" else 0.5)
    run_main("scripts.paper.tables", write_cells(tmp_path, [cell]))
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    for said in ("No cell of this grid is missing (1).", "With one seed the", "STAFF against Random: no verdict"):
        assert said in text
    assert all((tmp_path / name).stat().st_size for name in CURVES)


def test_paired_difference_is_the_difference_of_means_over_common_seeds(tmp_path, few_replicates):
    cells = fake_grid(staff=1.0, grand=5, without=[(task, "random", 0.1, 1) for task in TASKS])
    estimates = estimated(tmp_path, cells)[1]
    for method, metric in (("staff", "rouge_l"), ("staff", "bleu_4"), ("grand", "rouge_l"), ("ccs", "rouge_l")):
        for task, rate in product(TASKS, (0.5, 0.1)):
            one, seeds = estimates[metric, method, "random"][task, rate], (0, 1) if rate == 0.5 else (0,)
            ours, others = (mean_score(cells, metric, *((task, m, rate, s) for s in seeds)) for m in (method, "random"))
            assert (one.mean, one.num_seeds) == (pytest.approx(ours - others), len(seeds))
            low, high = one.interval
            assert low < one.mean < high < low + 2  # rows differ by 10 points and cancel; unpaired it would be about 10


def test_rates_of_a_task_share_a_draw_and_tasks_do_not(tmp_path):
    """The same differences everywhere: their mean over rates is no surer than one, over two tasks by √2."""
    cells = fake_grid(methods=("random", "staff"))
    for cell in cells:
        values = np.random.default_rng(0 if cell["method"] == "staff" else 1).normal(40, 5, EVAL_ROWS)
        cell |= {"rouge_l": values.mean(), "rouge_l_by_sample": " ".join(map(str, values))}
    found = estimated(tmp_path, cells)[1]["rouge_l", "staff", "random"]
    one = found["biology", 0.5].replicates.std()
    assert pool([found["biology", 0.5], found["biology", 0.1]]).replicates.std() == pytest.approx(one)
    assert pool(list(found.values())).replicates.std() == pytest.approx(one / np.sqrt(2), rel=0.05)


VERDICTS = {3.0: "STAFF beats {}: +", 0.0: "STAFF against {}: no difference can be shown: "}
VERDICTS |= {-3.0: "STAFF is worse than {}: −"}


@pytest.mark.parametrize(("lead", "said"), VERDICTS.items())
def test_verdict_is_the_first_line_under_table_1(tmp_path, few_replicates, lead, said):
    cells = fake_grid(staff=lead)
    for cell in [] if lead else cells:  # no difference at all: the same values, in another order
        values = np.roll(range(EVAL_ROWS), len(cell["method"]))
        cell |= {"rouge_l_by_sample": " ".join(map(str, values)), "rouge_l": (EVAL_ROWS - 1) / 2}
    text = text_of(tmp_path, cells)
    under = text.split("### ROUGE-L, kazakh\n")[1].split("\n\n")[1].splitlines()
    section = table_after(text.split("## 2.")[1], "### ROUGE-L\n")
    for line, label in zip(under, ("Random", "CCS", "Length"), strict=True):
        column = {name: row[f"STAFF − {label}"] for name, row in section.items()}
        assert line.startswith("- " + said.format(label)) and column["**all**"] in line
        assert line.endswith(" ROUGE-L, mean over all 4 pairs of task and rate, seeds of each: 2.")


def test_costs_ratios_and_saving_over_the_seeds_that_both_have(tmp_path, few_replicates):
    section = text_of(tmp_path, fake_grid()).split("### Cost, biology")[1]
    assert list(table_after(section, "\n")["STAFF"].values()) == ["STAFF", "150.0", "1,000,000", "1.0e14"]
    assert "STAFF saves 75.0 % in seconds and 75.0 % in FLOPs against GraNd" in section
    ratios = table_after(section, "by pruning rate; tuning on everything: 500.5 s and 2.0e15 FLOPs.\n")
    assert ratios["STAFF"]["50"] == f"{(150 + 250.5) / 500.5:.2f} / {(1e14 + 1e15) / 2e15:.2f}"
    assert ratios["Random"]["90"] == f"{50.5 / 500.5:.2f} / {0.1:.2f}" and "Full data" not in ratios
    cells = [c | {"selection_flops": 0} for c in fake_grid() if (c["method"], c["seed"]) != ("grand", 1)]
    assert "STAFF saves 75.0 % in seconds and – in FLOPs" in text_of(tmp_path, cells)


def test_two_calls_write_the_same_bytes_and_nothing_where_the_curves_fail(tmp_path, monkeypatch):
    cells, names = fake_grid(), ("tables.md", *CURVES)
    done = run_script("scripts/paper/tables.py", write_cells(tmp_path / "one", cells))
    run_main("scripts.paper.tables", write_cells(tmp_path / "two", cells[::-1]))
    one, two = ([(tmp_path / folder / name).read_bytes() for name in names] for folder in ("one", "two"))
    assert one == two and one[0].decode() in done.stdout
    monkeypatch.setattr(tables, "draw_curves", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_main("scripts.paper.tables", write_cells(tmp_path / "three", cells))
    assert [path.name for path in (tmp_path / "three").iterdir()] == ["cells.csv"]


def test_curves_show_every_method_and_leave_gaps(tmp_path, few_replicates):
    rates, gap = (0.8, 0.5, 0.1), [("biology", "staff", 0.5, seed) for seed in (0, 1)]
    grid, estimates = estimated(tmp_path, fake_grid(rates=rates, without=gap))
    for axes, task in zip(tables.draw_curves(grid, estimates).axes, TASKS, strict=True):
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert list(lines) == [tables.METHODS[method][0] for method in METHODS]
        for method in ("random", "staff"):
            found = (estimates["rouge_l", method, ""].get((task, rate)) for rate in rates)
            pruned, means = lines[tables.METHODS[method][0]].get_data()
            assert list(pruned) == [20, 50, 90]
            np.testing.assert_allclose(means, [one.mean if one else np.nan for one in found])


def test_damaged_cells_are_one_line_with_row_and_column(tmp_path):
    for row, changes, said in (  # rows as a spreadsheet counts
        (4, {"tuning_seconds": "fast"}, "row 4, column tuning_seconds: .*number"),
        (4, {"selection_flops": "nan"}, "row 4, column selection_flops: .*finite"),
        (5, {"rouge_l": 80}, "row 5: .*column rouge_l_by_sample"),
        (5, {"rate": 1}, "row 5: .*column rate"),
        (5, {"seed": 0}, "has a cell twice"),
        (6, {"selection_flops": 1}, "column selection_flops: biology-seed-0 random-0.1"),
        (5, {"paper_target": "Gemma-7b"}, "columns paper_target, paper_task: .*Gemma-7b"),
    ):
        cells = fake_grid(METHODS[:2])
        cells[row - 2] |= changes
        with pytest.raises(UserError, match=rf"^[^\n]*cells\.csv.*{said}[^\n]*$"):
            run_main("scripts.paper.tables", write_cells(tmp_path, cells))
    text = (write_cells(tmp_path, [fake_cell(), fake_cell(seed=1)]) / "cells.csv").read_text(encoding="utf-8")
    for damaged, said in (
        (text.splitlines()[0] + "\n", "no cells yet"),
        (text.replace(",seed,", ",sead,"), "row 2, column seed: .*required"),
        (text.rstrip() + ",1,1\n", "no readable CSV: .*line 3"),
        (text.replace("abc1234", "\udcff", 1), "no readable CSV"),
    ):
        (tmp_path / "cells.csv").write_bytes(damaged.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=rf"^[^\n]*{said}[^\n]*$"):
            run_main("scripts.paper.tables", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cells.csv"]


COMMITTED = sorted((REPOSITORY / "data" / "results").glob("*/cells.csv"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_tables_are_those_of_the_committed_cells_and_readme_shows_them(path):
    grid = tables.read_grid(path)
    committed = (path.parent / "tables.md").read_text(encoding="utf-8")
    assert committed == tables.format_tables(grid, tables.estimate_grid(grid))
    readme = (REPOSITORY / "data" / "results" / "README.md").read_text(encoding="utf-8")
    shown = readme.partition(f"<!-- {path.parent.name}/tables.md -->")[2].partition("<!-- end -->")[0]
    lines = [line for line in shown.splitlines() if line.startswith(("|", "- STAFF", "STAFF saves"))]
    assert len(lines) > 8 and set(lines) <= set(committed.splitlines())
