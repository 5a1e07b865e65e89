"""The grid of cells: what is run for it and in what order, and what cells.csv keeps. (The run itself: test_grid.py.)"""

import json
import os
from dataclasses import replace

import pytest
from conftest import REPOSITORY, assert_one_line_error, run_script

from finetune.trainer import scores_by_sample
from scripts.paper import cells as grids
from scripts.paper.cells import COLUMNS, Cell, Job, cells_of, jobs_of, load, read_cells, run_jobs, stage_arguments
from scripts.paper.tables import PAPER
from selection.run.config import Grid, check_keys, load_grid
from selection.run.errors import UserError

CELL = Cell("biology", "random", 0.1, 3)
TASKS = {"biology": {"config": "configs/tiny.yaml", "set": ["max_samples=40"]}}
GRID = {"tasks": TASKS, "methods": ["full", "random", "staff", "ccs"], "rates": [0.1, 0.5], "seeds": [3, 4]}


def grid(**changes) -> Grid:
    return check_keys(Grid, GRID | changes, "grid.yaml")


def jobs(grid, runs, wanted=lambda cell: True):
    own = [cell for cell in cells_of(grid) if cell.seed == 3 and wanted(cell)]
    return jobs_of(own, *[stage_arguments(grid, runs, CELL)] * 2) if own else []


def scripts(job: Job) -> list[str]:
    return [command[0].rsplit("/")[-1] for command in job.commands]


def test_every_task_method_rate_and_seed_is_a_cell_and_full_has_one_a_seed(tmp_path):
    cells = cells_of(grid())
    assert len(cells) == len(set(cells)) == 2 * (1 + 3 * 2)
    assert [cell for cell in cells if cell.method == "full"] == [Cell("biology", "full", 1.0, seed) for seed in (3, 4)]
    assert str(cells[1]) == "biology-seed-3 random-0.1"
    experiment = load(stage_arguments(grid(), tmp_path, cells[-1]))
    assert experiment.folder == tmp_path / "biology-seed-4"
    assert (experiment.selection.seed, experiment.training["seed"], experiment.split_seed) == (4, 4, 42)
    assert (experiment.selection.rates, experiment.max_samples) == ([0.1, 0.5], 40)


def test_jobs_run_the_needed_stages_in_order_and_cells_wait_for_their_coresets(tmp_path):
    unscored, small, full, *cells = jobs(grid(), tmp_path)
    assert scripts(unscored) == ["coreset.py"]
    assert scripts(small) == ["finetune.py", "effort_score.py", "verify.py", "coreset.py"]
    assert small.commands[-1][-2:] == ["--method", "staff"]
    assert scripts(full) == ["finetune.py", "effort_score.py", "coreset.py", "eval.py"]
    assert full.commands[0][-2:] == full.commands[1][-2:] == ["--model", "target"]
    assert full.commands[2][-2:] == ["--method", "ccs"] and full.cell == Cell("biology", "full", 1.0, 3)
    assert [scripts(job) for job in cells] == [["finetune-select.py", "eval.py"]] * 6
    needed = {"random": unscored.name, "staff": small.name, "ccs": full.name}
    assert {job.cell.method: job.needs for job in cells} == needed
    # Only what the methods need and what is not there is run.
    selection = ["finetune.py", "effort_score.py", "coreset.py"]
    for methods, stages in (("full", ["finetune.py", "eval.py"]), ("ifd", selection), ("grand", selection)):
        made = jobs(grid(methods=[methods]), tmp_path)
        assert [scripts(job) for job in made if job.needs is None] == [stages]
    assert jobs(grid(), tmp_path, lambda cell: False) == []
    cleaned = {"biology": {"config": "configs/tiny.yaml", "set": ["selection.leave_out=suspects"]}}
    for method, stages in (("random", ["coreset.py"]), ("grand", selection)):
        made = jobs(grid(tasks=cleaned, methods=[method]), tmp_path)
        assert scripts(made[0]) == ["check_pool.py", *stages]
    for method, rule in (("cleaned", "random"), ("rs2_cleaned", "rs2")):
        cell = Cell("biology", method, 0.1, 3)
        arguments = stage_arguments(grid(methods=[method]), tmp_path, cell)
        look, tuned = jobs_of([cell], arguments, arguments)
        assert scripts(look) == ["check_pool.py", "coreset.py"] and tuned.needs == look.name
        assert look.commands[1][-1] == rule and cell.tuned == f"{rule}-0.1"
        assert load(arguments).small_model == load(arguments).target_model
    for method, stages in (
        ("clusters_cleaned", selection),
        ("easier_half", [*selection[:2], "verify.py", "coreset.py"]),
    ):
        cell = Cell("biology", method, 0.1, 3)  # effort_score.py looks, by what it has scored
        arguments = stage_arguments(grid(methods=[method]), tmp_path, cell)
        assert scripts(jobs_of([cell], arguments, arguments)[0]) == stages
    only = jobs(grid(), tmp_path, lambda cell: cell.method == "ccs" and cell.rate == 0.5)
    assert [scripts(job) for job in only] == [selection, ["finetune-select.py", "eval.py"]]


def test_a_variant_of_staff_takes_the_scores_of_its_run_and_waits_for_them(tmp_path):
    both = grid(methods=["staff", "staff_nearest", "staff_size"])
    cell = Cell("biology", "staff_nearest", 0.1, 3)
    arguments, lender = (stage_arguments(both, tmp_path, c) for c in (cell, replace(cell, method="staff")))
    small, tuned = jobs_of([cell], arguments, lender, "biology-seed-3 small")
    assert scripts(small) == ["finetune.py", "effort_score.py", "verify.py", "coreset.py"]
    assert [lender[0] in command and command[1:] == lender for command in small.commands] == [True, True, False, False]
    assert (small.needs, tuned.needs) == ("biology-seed-3 small", small.name)
    variant, base = load(arguments), load(lender)
    assert (variant.selection.mode, variant.selection.within_stratum) == ("extended", "nearest")
    assert variant.folder != variant.speculative_folder == base.folder and "clusters" in base.selection.methods


def test_the_settings_of_a_cell_change_with_what_its_figures_depend_on(tmp_path):
    def digest(*changes, data="data", target="target", seed=3, folder=tmp_path, **grid_changes):
        arguments = stage_arguments(grid(**grid_changes), folder, Cell("biology", "random", 0.1, seed))
        more = [part for change in changes for part in ("--set", change)]
        return grids.settings_digest(load([*arguments, *more]), data, ["small", target])

    same = {digest(), digest(rates=[0.2], methods=["random"], folder=tmp_path / "elsewhere"), digest(seed=4)}
    same |= {digest("selection.self_test=0", "evaluation.batch_size=3")}
    others = {digest(data="other"), digest(target="other")}
    others |= {digest(c) for c in ("selection.num_strata=3", "training.learning_rate=0.1", "precision=bf16")}
    assert (len(same), len(same | others)) == (1, 6)
    # Of before split, skip_bad_rows and speculation: keys that come later leave begun grids what they are.
    assert digest("precision=fp32", "selection.precision=fp32") == "052ad803c966d7fa"


def row_of(cell: Cell, **changes) -> dict:
    """A row with one answer that scores 0."""
    row = {name: "" if kind is str else [0.0] if name.endswith("_by_sample") else 0 for name, kind in COLUMNS.items()}
    return row | {"eval_rows": 1, "settings": "x"} | vars(cell) | changes


def test_cells_are_read_as_they_were_written_in_the_grids_order(tmp_path):
    names, other = (("staff", 0.1), ("staff", 0.2), ("random", 0.1)), Cell("of a larger grid", "d2", 0.1, 1)
    cells = [Cell("a", method, rate, 1) for method, rate in names]
    costs = {other: 1, **dict(zip(cells[::-1], (0.1, 8.5, 7.5), strict=True))}
    done = {cell: row_of(cell, selection_seconds=cost) for cell, cost in costs.items()}
    grids.write_cells(tmp_path / "cells.csv", done, cells)
    read = read_cells(tmp_path / "cells.csv")
    assert list(read) == [*cells, other] and read == done
    # Selection has one cost for a method and seed, the first: a resumed run must not make two of it.
    assert [read[cell]["selection_seconds"] for cell in cells] == [7.5, 7.5, 0.1]
    assert read_cells(tmp_path / "none.csv") == {}


def test_a_wrong_key_of_a_grid_is_named():
    for changes, key in (
        ({"methods": ["best"]}, "methods.0"),
        ({"tasks": {"a/b": TASKS["biology"]}}, "tasks.a/b"),
        ({"tasks": {}}, "tasks"),
        ({"rates": [1.0]}, "rates.0"),
        ({"rates": [0.1, 0.2, 0.1]}, "each may be given once"),
        ({"seed": 1}, "unknown key seed"),
    ):
        with pytest.raises(UserError, match=key):
            grid(**changes)


def test_the_committed_grids_are_readable_and_their_experiments_too(tmp_path):
    known = {key[:2] for key in PAPER} | {(None, None)}
    for path in (REPOSITORY / "configs" / "reproduce").glob("*.yaml"):
        grid = load_grid(path)
        assert {(task.paper_target, task.paper_task) for task in grid.tasks.values()} <= known
        for task in grid.tasks:
            assert load(stage_arguments(grid, tmp_path, Cell(task, "random", 0.1, 5))).selection.seed == 5


def test_jobs_wait_for_what_they_need_and_a_failed_one_is_named_with_its_log(tmp_path):
    finished, fails = [], ["scripts/costs.py", "--config_path", "none.yaml"]
    jobs = [Job("late", [], needs="early"), Job("early", []), Job("free", [], needs="done long ago")]
    jobs += [Job("a bad", [fails, ["never.py"]]), Job("second", [], needs="a bad")]
    said = r"a bad: --config_path none\.yaml: No such .* \(log: .*a-bad\.log\)"
    with pytest.raises(UserError, match=said):
        run_jobs(jobs, 1, tmp_path, lambda job: finished.append(job.name))
    assert sorted(finished) == ["early", "free", "late"] and finished.index("early") < finished.index("late")
    log = (tmp_path / "a-bad.log").read_text()
    assert "$ scripts/costs.py --config_path none.yaml" in log and "never.py" not in log
    with pytest.raises(UserError, match=r"a first: tests/none\.py: FileNotFoundError: "):
        run_jobs([Job("a first", [["tests/none.py"]])], 1, tmp_path, print)
    with pytest.raises(UserError, match="--jobs 0"):
        run_jobs([], 0, tmp_path, print)


def test_jobs_get_the_visible_gpus_in_turn_from_the_start_of_their_processes(tmp_path, monkeypatch):
    """What was in a process's environment when it began: a library may ask for the GPUs while it is imported."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-1f")
    script = tmp_path / "job.py"
    script.write_text(
        "import re, sys, time\n"
        "began_with = open('/proc/self/environ').read()\n"
        "print(*re.findall('CUDA_VISIBLE_DEVICES=([^\\0]*)', began_with), file=open(sys.argv[1], 'a'), flush=True)\n"
        "while len(open(sys.argv[1]).readlines()) < 2: time.sleep(0.05)\n"  # so that each job has a process of its own
    )
    run_jobs([Job(f"job {i}", [[str(script), str(tmp_path / "seen")]]) for i in range(2)], 2, tmp_path, print)
    assert sorted((tmp_path / "seen").read_text().split()) == ["3", "GPU-1f"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,GPU-1f"


def test_scores_by_sample_are_llama_factorys_own():
    """Known by hand: equal texts have 100, texts without a common word 0; BLEU counts characters."""
    scores = scores_by_sample(["the cell divides", "xyz", "the cell"], ["the cell divides"] * 3)
    assert scores["rouge-l"][:2] == pytest.approx([100, 0], abs=1e-3)
    assert scores["rouge-1"][2] == pytest.approx(100 * 2 * 1 * (2 / 3) / (1 + 2 / 3), abs=0.1)
    assert scores["bleu-4"][0] == pytest.approx(100, abs=1e-3) and scores["bleu-4"][1] < 5
    assert {len(values) for values in scores.values()} == {3}


def test_reproduce_refuses_cells_of_other_settings(make_experiment, rows, tmp_path):
    grid = {"tasks": {"a": {"config": str(make_experiment(rows))}}, "methods": ["random"], "rates": [0.5], "seeds": [1]}
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    results, other_seed = tmp_path / "results", Cell("a", "random", 0.5, 2)  # a table would put both into one mean
    grids.write_cells(results / "cells.csv", {other_seed: row_of(other_seed)}, [])
    before = (results / "cells.csv").read_bytes()
    command = ["--config", tmp_path / "grid.yaml", "--results", results, "--runs", tmp_path / "runs"]
    done = run_script("scripts/paper/reproduce.py", *command, check=False)
    assert_one_line_error(done, "cells.csv was made otherwise (a-seed-2 random-0.5")
    assert (results / "cells.csv").read_bytes() == before
