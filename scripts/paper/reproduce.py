"""Tune and evaluate a grid of task x method x rate x seed, into a table with every cell.

    python scripts/paper/reproduce.py --config configs/reproduce/smollm2_cpu.yaml --jobs 2
    python scripts/paper/tables.py data/results/smollm2_cpu

Needs the models and data of its tasks. Writes data/results/<name of the YAML>/cells.csv after every cell. A stopped run
goes on: cells of that file are kept, and what run folders (runs/reproduce/<name>/) hold of others is reused.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
from selection.run.ending import run_stage

from scripts.paper import cells as grids
from selection.rows.split import training_split
from selection.run.cli import add_config_argument, argument_parser
from selection.run.config import REPOSITORY, load_grid
from selection.run.errors import UserError
from selection.run.log import say
from selection.run.model_folder import model_fingerprint, model_path
from selection.run.products import held
from selection.scores.models import parameters_of


def main() -> None:
    parser = argument_parser(__doc__)
    add_config_argument(parser, "the grid, of configs/reproduce/", True, None, "--config")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time; default: 1")
    parser.add_argument("--results", type=Path, help="folder of cells.csv; default: data/results/<name of the YAML>")
    parser.add_argument("--runs", type=Path, help="folder of run folders; default: runs/reproduce/<name of the YAML>")
    arguments = parser.parse_args()
    grid, name = load_grid(arguments.config_path), Path(arguments.config_path).stem
    results = (arguments.results or REPOSITORY / "data" / "results" / name) / "cells.csv"
    runs = (arguments.runs or REPOSITORY / "runs" / "reproduce" / name).resolve()

    cells, done, jobs, known, last = grids.cells_of(grid), grids.read_cells(results), [], {}, {}
    for run in dict.fromkeys(cell.run for cell in cells):
        own = [cell for cell in cells if cell.run == run]
        command_line = grids.stage_arguments(grid, runs, own[0])
        # `settings` are the task's, also for a variant (STAFF, length control), whose name says what it adds.
        task = grids.load(grids.stage_arguments(grid, runs, replace(own[0], method="random")))
        split, paths = training_split(task), [*map(model_path, (task.small_model, task.target_model))]
        fingerprints = [model_fingerprint(path, task.folder) for path in paths]
        about = {"num_rows": len(split.rows), "settings": grids.settings_digest(task, split.fingerprint, fingerprints)}
        for cell, row in done.items():
            if cell.task == own[0].task and row["settings"] != about["settings"]:
                raise UserError(f"{results} was made otherwise ({cell}: other settings, data or models): move it away")
        known[run] = grids.load(command_line), about, tuple(map(parameters_of, paths))
        if missing := [cell for cell in own if cell not in done]:
            base = own[0].lender
            new = grids.jobs_of(missing, command_line, grids.stage_arguments(grid, runs, base), last.get(base.run))
            jobs += new
            for job in new:
                if job.name.endswith(" small"):
                    last[base.run] = job.name
    say(f"{name}: {len(cells)} cells, {sum(cell in done for cell in cells)} of them there")

    def finished(job: grids.Job) -> None:
        if job.cell:
            row = done[job.cell] = grids.finished_cell(job.cell, grid, *known[job.cell.run])
            grids.write_cells(results, done, cells)
            count = sum(cell in done for cell in cells)
            figures = ", ".join(f"{metric} {row[metric]:.3f}" for metric in grids.METRICS if row[metric] != "")
            say(f"{job.cell}: {figures} ({count} of {len(cells)} cells)")

    with held(runs):
        grids.run_jobs(jobs, arguments.jobs, runs / "logs", finished)
    print(f"{len(cells)} cells -> {results}")


if __name__ == "__main__":
    run_stage(main)
