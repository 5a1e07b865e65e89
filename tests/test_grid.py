"""A whole grid of cells on the demo's tiny random model, its table, and the ablations beside it."""

import csv
import shutil

import pandas as pd
import pytest
from conftest import REPOSITORY, assert_one_line_error, run_script

METHODS = ["full", "random", "length", "grand", "el2n", "ccs", "d2", "moderate", "entropy", "staff"]


def reproduce(results, runs) -> str:
    command = ["--config", REPOSITORY / "configs" / "reproduce" / "tiny.yaml", "--jobs", 2]
    done = run_script("scripts/paper/reproduce.py", *command, "--results", results, "--runs", runs)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory, demo_models):
    """cells.csv and run folders of the tiny grid, on the demo's two models."""
    folder = tmp_path_factory.mktemp("grid")
    assert "20 cells, 0 of them there" in reproduce(folder / "results", folder / "runs")
    return folder


def cells(results) -> list[dict[str, str]]:
    with (results / "results" / "cells.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_grid_has_every_method_with_its_figures_and_costs(results):
    rows = cells(results)
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for s in "12" for m in METHODS]
    for row in rows:
        for metric in ("rouge_l", "rouge_score_l"):
            by_sample = [float(value) for value in row[f"{metric}_by_sample"].split()]
            assert sum(by_sample) / 10 == pytest.approx(float(row[metric]), abs=1e-3)  # the library's own mean
        assert len(by_sample) == len(row["sacrebleu_sentence_by_sample"].split()) == int(row["eval_rows"]) == 10
        assert 0 <= float(row["sacrebleu"]) <= 100 and float(row["tuning_flops"]) > 0
        assert (int(row["size"]), int(row["num_rows"])) == (50 if row["method"] == "full" else 15, 50)
        free = row["method"] in ("full", "random", "length")
        assert (float(row["selection_flops"]) == 0) == (int(row["selection_tokens"]) == 0) == free
    by_method = {row["method"]: float(row["selection_flops"]) for row in rows if row["seed"] == "1"}
    assert len({by_method[m] for m in ("grand", "el2n", "ccs", "d2", "moderate", "entropy")}) == 1
    assert by_method["staff"] not in (0, by_method["grand"])


def test_a_grid_that_was_stopped_makes_what_is_missing_and_nothing_else(results):
    def figures() -> list[dict[str, str]]:
        return [{**row, "selection_seconds": ""} for row in cells(results)]  # coreset.py runs again for the lost cell

    table, all_figures = results / "results" / "cells.csv", figures()
    lost = results / "runs" / "go_biology-seed-2" / "eval" / "ccs-0.3"
    answers, lines = (lost / "predictions.jsonl").read_bytes(), table.read_text().splitlines(keepends=True)
    table.write_text("".join(line for line in lines if ",ccs,paper,0.3,2," not in line))
    shutil.rmtree(lost)
    others = {path: path.stat().st_mtime_ns for path in results.rglob("metrics.json")}
    assert "20 cells, 19 of them there" in reproduce(results / "results", results / "runs")
    assert figures() == all_figures
    assert (lost / "predictions.jsonl").read_bytes() == answers
    assert {path: path.stat().st_mtime_ns for path in others} == others


def test_the_grid_becomes_a_table(results):
    shown = run_script("scripts/paper/tables.py", results / "results").stdout
    for name in ("Full data", "Random", "Length", "GraNd", "EL2N", "CCS", "D2 Pruning", "Moderate", "Entropy", "STAFF"):
        assert f"\n| {name} |" in shown
    assert all((results / "results" / name).stat().st_size > 10_000 for name in ("curves.png", "curves.svg"))


def test_ablations_refuse_foreign_scores_first_and_end_in_three_tables(results):
    def ablations(*more, check=True):
        command = ["--config_path", REPOSITORY / "configs" / "tiny.yaml", "--layers", 2, "--passes", 1, 0]
        command += ["--seeds", 1, 2, "--num_strata", 3, "--verify_per_stratum", 2, "--runs", results / "ablations"]
        return run_script("scripts/paper/ablations.py", *command, "--out", results / "tables", *more, check=check)

    scores = ["--baseline_scores", results / "runs" / "go_biology-seed-1" / "scores" / "target-full"]
    foreign = ablations(*scores, "--set", "max_samples=50", "--runs", results / "other", check=False)
    assert_one_line_error(foreign, "scores of another training split")
    assert not (results / "tables").exists() and not list(results.glob("other/*layers*"))

    shown = ablations(*scores).stdout
    assert (results / "tables" / "ablations.md").read_text() in shown
    tables = {}
    for name in ("speculator", "verification", "departures"):
        tables[name] = pd.read_csv(results / "tables" / f"{name}.csv").to_dict("records")
    assert [(row["layers"], row["passes"]) for row in tables["speculator"]] == [(2, 1), (2, 0)]
    flops = [row["flops"] for row in tables["speculator"]]
    # A pass of LoRA tuning takes twice what scoring takes; the tuned model is scored with its adapter.
    assert 3 * flops[1] < flops[0] < 3.3 * flops[1]
    assert [row["target_gradients"] for row in tables["verification"]] == [6]
    by_name = {row["departure"][:1]: row["rate_0.2"] for row in tables["departures"]}
    assert by_name["5"] == 1 and len(tables["departures"]) == 11
    assert all(0 <= shared <= 1 for shared in by_name.values())
