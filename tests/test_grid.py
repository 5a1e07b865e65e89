"""A whole grid of cells on the demo's tiny random model, its table, and the ablations beside it."""

import json
import shutil

import pandas as pd
import pytest
from conftest import REPOSITORY, run_script

from selection.run.yaml_file import read_yaml

METHODS = ["full", "random", "length", "grand", "ccs", "d2", "staff", "staff_ifd", "s2l"]


def reproduce(folder) -> str:
    places = ["--results", folder / "results", "--runs", folder / "runs"]
    return run_script("scripts/paper/reproduce.py", "--config", folder / "tiny.yaml", "--jobs", 2, *places).stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory, demo_models):
    """cells.csv and run folders of a part of the tiny grid, on the demo's two models."""
    folder = tmp_path_factory.mktemp("grid")
    grid = read_yaml(REPOSITORY / "configs" / "reproduce" / "tiny.yaml") | {"methods": METHODS, "seeds": [1]}
    (folder / "tiny.yaml").write_text(json.dumps(grid))
    assert "9 cells, 0 of them there" in reproduce(folder)
    return folder


def cells(results) -> pd.DataFrame:
    return pd.read_csv(results / "results" / "cells.csv")


def test_the_grid_has_every_method_with_its_figures_and_costs(results):
    table = cells(results)
    assert table.method.tolist() == METHODS and (table.seed == 1).all()
    for metric in ("rouge_l", "rouge_score_l", "sacrebleu_sentence"):
        by_sample = table[f"{metric}_by_sample"].str.split(expand=True).astype(float)
        assert by_sample.shape == (9, 10) and by_sample.notna().all(axis=None)
        if metric in table:  # the library's own mean
            assert by_sample.mean(axis=1).tolist() == pytest.approx(table[metric].tolist(), abs=1e-3)
    assert table.sacrebleu.between(0, 100).all() and (table.tuning_flops > 0).all() and (table.num_rows == 50).all()
    assert (table["size"] == table.method.map({"full": 50}).fillna(15)).all()
    free = table.method.isin(["full", "random", "length"])
    assert ((table.selection_flops == 0) == free).all() and ((table.selection_tokens == 0) == free).all()
    flops = table.set_index("method").selection_flops
    assert flops[["grand", "ccs", "d2"]].nunique() == 1
    assert flops.staff not in (0, flops.grand) and flops.s2l not in (0, flops.staff)
    assert flops.staff_ifd == pytest.approx(flops.staff, rel=0.02)  # other rows are verified


def test_a_grid_that_was_stopped_makes_what_is_missing_and_nothing_else(results):
    def figures() -> str:
        return cells(results).drop(columns="selection_seconds").to_csv()  # coreset.py runs again for the lost cell

    table, all_figures = results / "results" / "cells.csv", figures()
    lost = results / "runs" / "go_biology-seed-1" / "eval" / "ccs-0.3"
    answers, lines = (lost / "predictions.jsonl").read_bytes(), table.read_text().splitlines(keepends=True)
    table.write_text("".join(line for line in lines if ",ccs,paper,0.3,1," not in line))
    shutil.rmtree(lost)
    others = {path: path.stat().st_mtime_ns for path in results.rglob("metrics.json")}
    assert "9 cells, 8 of them there" in reproduce(results)
    assert figures() == all_figures
    assert (lost / "predictions.jsonl").read_bytes() == answers
    assert {path: path.stat().st_mtime_ns for path in others} == others


def test_the_grid_becomes_a_table(results):
    shown = run_script("scripts/paper/tables.py", results / "results").stdout
    for name in ("Full data", "Random", "Length", "GraNd", "CCS", "D2 Pruning", "STAFF"):
        assert f"\n| {name} |" in shown


def test_ablations_end_in_two_tables(results):
    command = ["--config_path", REPOSITORY / "configs" / "tiny.yaml", "--layers", 2, "--passes", 1, 0]
    command += ["--seeds", 1, 2, "--num_strata", 3, "--verify_per_stratum", 2, "--runs", results / "ablations"]
    shown = run_script("scripts/paper/ablations.py", *command, "--out", results / "tables").stdout
    assert (results / "tables" / "ablations.md").read_text() in shown
    names = ("speculator", "verification")
    speculator, verification = (pd.read_csv(results / "tables" / f"{name}.csv") for name in names)
    assert speculator[["layers", "passes"]].to_numpy().tolist() == [[2, 1], [2, 0]]
    # A pass of LoRA tuning takes twice what scoring takes; the tuned model is scored with its adapter.
    assert 3 < speculator.flops[0] / speculator.flops[1] < 3.3
    assert verification.target_gradients.tolist() == [6]
