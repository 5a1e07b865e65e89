"""The grid of cells: what is run for it and in what order, and what cells.csv keeps. (The run itself: test_demo.py.)"""

import csv
import json
import os
import subprocess
import sys

import pytest
import yaml
from conftest import REPOSITORY, assert_one_line_error, run_script

from finetune.trainer import scores_by_sample
from scripts.paper import cells
from scripts.paper.cells import (
    Cell,
    Job,
    cells_of,
    experiment_arguments,
    jobs_of,
    load,
    read_cells,
    run_jobs,
    settings_digest,
    write_cells,
)
from selection.run.config import load_grid
from selection.run.errors import UserError
from selection.run.products import held

TASKS = {"biology": {"config": "configs/tiny.yaml", "set": ["max_samples=40"]}}
GRID = {"tasks": TASKS, "methods": ["full", "random", "staff", "ccs"], "rates": [0.1, 0.5], "seeds": [3, 4]}


@pytest.fixture
def grid(tmp_path):
    def make(**changes):
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump(GRID | changes))
        return load_grid(path)

    return make


def jobs(grid, tmp_path, cells=None):
    arguments = experiment_arguments(grid, tmp_path, "biology", 3)
    own = [cell for cell in cells_of(grid) if cell.seed == 3] if cells is None else cells
    return jobs_of("biology", 3, own, load(arguments), arguments, 100)


def scripts(job: Job) -> list[str]:
    return [command[0].rsplit("/")[-1] for command in job.commands]


def test_every_task_method_rate_and_seed_is_a_cell_and_full_has_one_a_seed(grid):
    cells = cells_of(grid())
    assert len(cells) == len(set(cells)) == 2 * (1 + 3 * 2)
    assert [cell for cell in cells if cell.method == "full"] == [Cell("biology", "full", 1.0, seed) for seed in (3, 4)]
    assert str(cells[1]) == "biology, seed 3, random-0.1"


def test_an_experiment_of_the_grid_has_its_own_folder_and_seeds(grid, tmp_path):
    experiment = load(experiment_arguments(grid(), tmp_path, "biology", 4))
    assert experiment.folder == tmp_path / "biology-seed-4"
    assert (experiment.selection.seed, experiment.training["seed"], experiment.split_seed) == (4, 4, 42)
    assert (experiment.selection.rates, experiment.max_samples) == ([0.1, 0.5], 40)


def test_jobs_run_the_stages_in_order_and_cells_wait_for_their_coresets(grid, tmp_path):
    made = jobs(grid(), tmp_path)
    small, full, *cells = made
    assert scripts(small) == ["finetune.py", "effort_score.py", "verify.py", "coreset.py"]
    assert small.commands[-1][-3:] == ["--method", "random", "staff"]
    assert scripts(full) == ["finetune.py", "effort_score.py", "coreset.py", "eval.py"]
    assert full.commands[0][-2:] == full.commands[1][-2:] == ["--model", "target"]
    assert full.commands[2][-2:] == ["--method", "ccs"]
    assert full.cell == Cell("biology", "full", 1.0, 3)
    assert [scripts(job) for job in cells] == [["finetune-select.py", "eval.py"]] * 6
    assert {job.cell.method: job.needs for job in cells} == {
        "random": small.name,
        "staff": small.name,
        "ccs": full.name,
    }
    assert [job.rows for job in made] == [100, 100, 10, 50, 10, 50, 10, 50]  # one pass each in configs/tiny.yaml


@pytest.mark.parametrize(
    "methods, stages",
    [
        (["full"], [["finetune.py", "eval.py"]]),
        (["random"], [["finetune.py", "effort_score.py", "coreset.py"]]),
        (["length", "grand"], [["finetune.py", "effort_score.py", "coreset.py"]]),
    ],
)
def test_only_what_the_methods_need_is_run(grid, tmp_path, methods, stages):
    assert [scripts(job) for job in jobs(grid(methods=methods), tmp_path) if job.needs is None] == stages


def test_what_is_there_already_asks_for_nothing(grid, tmp_path):
    cells = [cell for cell in cells_of(grid()) if cell.seed == 3]
    assert jobs(grid(), tmp_path, []) == []
    only = jobs(grid(), tmp_path, [cell for cell in cells if cell.method == "ccs" and cell.rate == 0.5])
    assert [scripts(job) for job in only] == [
        ["finetune.py", "effort_score.py", "coreset.py"],
        ["finetune-select.py", "eval.py"],
    ]


def test_the_settings_of_a_cell_change_with_what_its_figures_depend_on(grid, tmp_path):
    arguments = experiment_arguments(grid(), tmp_path, "biology", 3)
    experiment = load(arguments)
    same = load(experiment_arguments(grid(rates=[0.2], methods=["random"]), tmp_path / "elsewhere", "biology", 3))
    digests = {settings_digest(each, "data", ["small", "target"]) for each in (experiment, same)}
    digests.add(
        settings_digest(load(experiment_arguments(grid(), tmp_path, "biology", 4)), "data", ["small", "target"])
    )
    free = [*arguments, "--set", "selection.self_test=0", "--set", "evaluation.batch_size=3"]
    digests.add(settings_digest(load(free), "data", ["small", "target"]))
    assert len(digests) == 1
    changes = ("selection.num_strata=3", "training.learning_rate=0.1", "precision=bf16")
    others = [load([*arguments, "--set", change]) for change in changes]
    digests |= {settings_digest(each, "data", ["small", "target"]) for each in others}
    digests |= {settings_digest(experiment, "other", ["small", "target"])}
    digests |= {settings_digest(experiment, "data", ["small", "other"])}
    assert len(digests) == 6


def row_of(cell: Cell, **changes) -> dict:
    return {"task": cell.task, "method": cell.method, "rate": cell.rate, "seed": cell.seed, "settings": "x"} | changes


def test_cells_are_read_as_they_were_written_in_the_grids_order(tmp_path):
    cells = [Cell("a", "staff", rate, 1) for rate in (0.1, 0.2)] + [Cell("a", "random", 0.1, 1)]
    rows = {cell: row_of(cell, selection_seconds=seconds) for cell, seconds in zip(cells, (7.5, 8.5, 0.1), strict=True)}
    other = Cell("of a larger grid", "staff", 0.1, 1)
    done = {other: row_of(other, selection_seconds=1)} | dict(reversed(rows.items()))
    write_cells(tmp_path / "cells.csv", done, cells)
    read = read_cells(tmp_path / "cells.csv")
    assert list(read) == [*cells, other]
    # One figure for a method and seed, the first: a resumed run must not make two of it.
    assert [read[cell]["selection_seconds"] for cell in cells] == ["7.5", "7.5", "0.1"]
    assert read_cells(tmp_path / "none.csv") == {}


@pytest.mark.parametrize("text", ["task,method\na,b\n", "task,method,rate,seed,settings\na,b,c,1,x\n", 'task\n"a'])
def test_a_file_that_holds_no_cells_is_refused(tmp_path, text):
    (tmp_path / "cells.csv").write_text(text)
    with pytest.raises(UserError, match=r"cannot read cells from .*cells\.csv"):
        read_cells(tmp_path / "cells.csv")


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"methods": ["best"]}, "methods.0"),
        ({"tasks": {"a/b": TASKS["biology"]}}, "tasks.a/b"),
        ({"tasks": {}}, "tasks"),
        ({"rates": [0]}, "rates.0"),
        ({"rates": [1.0]}, "rates.0"),
        ({"rates": [0.1, 0.2, 0.1]}, "each may be given once"),
        ({"seeds": []}, "seeds"),
        ({"seed": 1}, "unknown key seed"),
    ],
)
def test_a_wrong_key_of_a_grid_is_named(grid, changes, key):
    with pytest.raises(UserError, match=key):
        grid(**changes)


def test_the_committed_grids_are_readable_and_their_experiments_too(tmp_path):
    paths = sorted((REPOSITORY / "configs" / "reproduce").glob("*.yaml"))
    with (REPOSITORY / "data" / "paper_table1.csv").open(newline="") as file:
        paper = {(row["target"], row["task"]) for row in csv.DictReader(file)} | {(None, None)}
    assert len(paths) >= 4
    for path in paths:
        grid = load_grid(path)
        assert {(task.paper_target, task.paper_task) for task in grid.tasks.values()} <= paper
        for task in grid.tasks:
            assert load(experiment_arguments(grid, tmp_path, task, grid.seeds[0])).selection.seed == grid.seeds[0]


def test_commands_run_in_one_process_and_what_a_failing_one_said_is_returned(tmp_path):
    """In a process of its own, as its output goes into the log for good."""
    log = tmp_path / "job.log"
    code = (
        "import sys; from pathlib import Path; from scripts.paper.cells import run_commands\n"
        "commands = [['scripts/costs.py', '--config_path', 'none.yaml'], ['never.py']]\n"
        f"said = run_commands(commands, Path({str(log)!r}))\n"
        f"Path({str(tmp_path / 'said')!r}).write_text(said)\n"
    )
    (tmp_path / "run.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, tmp_path / "run.py"], env=environment, timeout=120, check=True)
    assert (tmp_path / "said").read_text() == "--config_path none.yaml: No such file or directory"
    assert "$ scripts/costs.py --config_path none.yaml" in log.read_text()
    assert "never.py" not in log.read_text()


def test_a_failed_job_is_named_with_its_log_and_stops_what_needs_it(tmp_path):
    finished = []
    failing = Job("a, first", [["scripts/costs.py", "--config_path", "none.yaml"]], 1)
    with pytest.raises(UserError, match=r"a, first: --config_path none\.yaml: .* \(log: .*a-first\.log\)"):
        run_jobs([failing, Job("second", [], 1, needs="a, first")], 2, tmp_path, finished.append)
    assert finished == []
    crash = Job("crash", [["tests/none.py"]], 1)
    with pytest.raises(UserError, match=r"crash: tests/none\.py: FileNotFoundError: "):
        run_jobs([crash, Job("second", [], 1, needs="crash")], 1, tmp_path, finished.append)
    assert finished == []
    with pytest.raises(UserError, match="--jobs 0"):
        run_jobs([], 0, tmp_path, finished.append)
    order = [Job("late", [], 1, needs="early"), Job("early", [], 1), Job("free", [], 1, needs="done long ago")]
    run_jobs(order, 1, tmp_path, lambda job: finished.append(job.name))
    assert finished.index("early") < finished.index("late") and len(finished) == 3


def test_workers_get_the_visible_gpus_in_turn():
    names = [each["CUDA_VISIBLE_DEVICES"] for each in cells.gpus_of_workers(5, ["2", "GPU-1f", "7"])]
    assert names == ["2", "GPU-1f", "7", "2", "GPU-1f"]
    assert cells.gpus_of_workers(2, []) == [{}, {}]


def test_a_job_sees_its_gpu_from_the_start_of_its_process(tmp_path, monkeypatch):
    """What was in a process's environment when it began: a library may ask for the GPUs while it is imported."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    script = tmp_path / "job.py"
    script.write_text(
        "import sys, time\n"
        "began_with = open('/proc/self/environ').read().split(chr(0))\n"
        "gpu = [each for each in began_with if each.startswith('CUDA_VISIBLE_DEVICES=')]\n"
        "open(sys.argv[1], 'a').write(','.join(gpu) + chr(10))\n"
        "while len(open(sys.argv[1]).readlines()) < 2: time.sleep(0.05)\n"  # so that each job has a process of its own
    )
    run_jobs([Job(f"job {i}", [[str(script), str(tmp_path / "seen")]], 1) for i in range(2)], 2, tmp_path, print)
    seen = sorted((tmp_path / "seen").read_text().split())
    assert seen == ["CUDA_VISIBLE_DEVICES=3", "CUDA_VISIBLE_DEVICES=5"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"


def test_a_second_runner_of_the_same_run_folders_is_refused(tmp_path):
    with held(tmp_path), pytest.raises(UserError, match="is held by process"), held(tmp_path):
        pass
    with held(tmp_path):  # the first is done
        pass


def test_scores_by_sample_are_llama_factorys_own():
    """Known by hand: equal texts have 100, texts without a common word 0; BLEU counts characters."""
    answers = ["the cell divides", "xyz", "the cell"]
    references = ["the cell divides", "the cell divides", "the cell divides"]
    scores = scores_by_sample(answers, references)
    assert scores["rouge-l"][:2] == pytest.approx([100, 0], abs=1e-3)
    assert scores["rouge-1"][2] == pytest.approx(100 * 2 * 1 * (2 / 3) / (1 + 2 / 3), abs=0.1)
    assert scores["bleu-4"][0] == pytest.approx(100, abs=1e-3) and scores["bleu-4"][1] < 5
    assert {len(values) for values in scores.values()} == {3}


def test_reproduce_refuses_cells_of_other_settings(make_experiment, rows, tmp_path):
    config = make_experiment(rows)
    (tmp_path / "grid.yaml").write_text(
        json.dumps({"tasks": {"a": {"config": str(config)}}, "methods": ["random"], "rates": [0.5], "seeds": [1]})
    )
    results = tmp_path / "results"
    results.mkdir()
    other_seed = Cell("a", "random", 0.5, 2)  # not of this grid, but a table would put both into one mean
    write_cells(results / "cells.csv", {other_seed: row_of(other_seed)}, [])
    before = (results / "cells.csv").read_bytes()
    command = ["--config", tmp_path / "grid.yaml", "--results", results, "--runs", tmp_path / "runs"]
    done = run_script("scripts/paper/reproduce.py", *command, check=False)
    assert_one_line_error(done, "cells.csv was made otherwise (a, seed 2, random-0.5")
    assert (results / "cells.csv").read_bytes() == before
