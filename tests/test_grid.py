"""A whole grid of cells on the demo's tiny random model, its table, and the ablations beside it."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, run_script

from scripts.paper import frontier
from selection.report.agreement import partial_spearman, spearman
from selection.run.config import load_experiment
from selection.run.yaml_file import read_yaml
from selection.scores.folder import Scores

METHODS = ["full", "random", "clusters_cleaned", "grand", "staff", "staff_ifd", "staff_direct"]


def reproduce(folder) -> str:
    places = ["--results", folder / "results", "--runs", folder / "runs"]
    return run_script("scripts/paper/reproduce.py", "--config", folder / "tiny.yaml", "--jobs", 2, *places).stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory, demo_models):
    """cells.csv and run folders of a part of the tiny grid, on the demo's two models."""
    folder = tmp_path_factory.mktemp("grid")
    grid = read_yaml(REPOSITORY / "configs" / "reproduce" / "tiny.yaml") | {"methods": METHODS, "seeds": [1]}
    (folder / "tiny.yaml").write_text(json.dumps(grid))
    assert f"{len(METHODS)} cells, 0 of them there" in reproduce(folder)
    return folder


def cells(results) -> pd.DataFrame:
    return pd.read_csv(results / "results" / "cells.csv")


def test_the_grid_has_every_method_with_its_figures_and_costs(results):
    table = cells(results)
    assert table.method.tolist() == METHODS and (table.seed == 1).all()
    for metric in ("rouge_l", "rouge_score_l", "sacrebleu_sentence"):
        by_sample = table[f"{metric}_by_sample"].str.split(expand=True).astype(float)
        assert by_sample.shape == (len(METHODS), 10) and by_sample.notna().all(axis=None)
        if metric in table:  # the library's own mean
            assert by_sample.mean(axis=1).tolist() == pytest.approx(table[metric].tolist(), abs=1e-3)
    assert table.sacrebleu.between(0, 100).all() and (table.tuning_flops > 0).all() and (table.num_rows == 50).all()
    assert (table["size"] == table.method.map({"full": 50}).fillna(15)).all()
    free = table.method.isin(["full", "random"])
    assert ((table.selection_flops == 0) == free).all() and ((table.selection_tokens == 0) == free).all()
    flops = table.set_index("method").selection_flops
    assert flops.staff not in (0, flops.grand)
    assert flops.staff_direct < flops.staff  # one pass of the target, and nothing is tuned
    assert flops.staff_ifd == pytest.approx(flops.staff, rel=0.02)  # other rows are verified


def test_a_grid_that_was_stopped_makes_what_is_missing_and_nothing_else(results):
    def figures() -> str:
        return cells(results).drop(columns="selection_seconds").to_csv()  # coreset.py runs again for the lost cell

    table, all_figures = results / "results" / "cells.csv", figures()
    lost = results / "runs" / "go_biology-seed-1" / "eval" / "grand-0.3"
    answers, lines = (lost / "predictions.jsonl").read_bytes(), table.read_text().splitlines(keepends=True)
    table.write_text("".join(line for line in lines if ",grand,paper,0.3,1," not in line))
    shutil.rmtree(lost)
    others = {path: path.stat().st_mtime_ns for path in results.rglob("metrics.json")}
    assert f"{len(METHODS)} cells, {len(METHODS) - 1} of them there" in reproduce(results)
    assert figures() == all_figures
    assert (lost / "predictions.jsonl").read_bytes() == answers
    assert {path: path.stat().st_mtime_ns for path in others} == others


def test_the_grid_becomes_a_table(results):
    shown = run_script("scripts/paper/tables.py", results / "results").stdout
    for name in ("Full data", "Random", "GraNd", "STAFF"):
        assert f"\n| {name} |" in shown


def test_the_frontier_has_every_way_with_its_price_and_verification_its_table(demo_models, tmp_path):
    common = ["--config_path", REPOSITORY / "configs" / "tiny.yaml", "--layers", 2, "--seeds", 1, "--runs", tmp_path]
    shown = run_script("scripts/paper/frontier.py", *common, "--out", tmp_path / "frontier").stdout
    assert (tmp_path / "frontier" / "frontier.md").read_text() in shown
    table = pd.read_csv(tmp_path / "frontier" / "frontier.csv").set_index(["seed", "way", "scored"])
    assert (tmp_path / "frontier" / "frontier.png").stat().st_size > 10_000
    assert len(table) == (1 + len(frontier.SPECULATIONS)) * len(frontier.SCORED)
    price = table.flops_share.loc[1]
    published, share = price["published, 2 layers", 1.0], price["share: 0.5, passes: 1, 2 layers", 1.0]
    # A pass of LoRA tuning takes twice what scoring takes; the target is tuned for some passes.
    passes = load_experiment(REPOSITORY / "configs" / "tiny.yaml").target_training["num_train_epochs"]
    assert price["direct", 1.0] == pytest.approx(1 / (2 * passes), rel=0.05)
    assert price["direct", 0.5] == pytest.approx(price["direct", 1.0] / 2)
    assert published > share > price["untuned, 2 layers", 1.0]
    assert (table.spearman_untuned_target.xs(("direct", 1.0), level=(1, 2)) == 1).all()

    run = tmp_path / "seed-1" / "untuned,-2-layers"
    run_script("selection/verify.py", "--config_path", run / "experiment.yaml", "--set", "selection.verify=all")
    command = [run, "--seeds", 1, 2, "--num_strata", 3, "--verify_per_stratum", 2, "--out", tmp_path / "tables"]
    run_script("scripts/paper/ablations.py", *command)
    assert pd.read_csv(tmp_path / "tables" / "verification.csv").target_gradients.tolist() == [6]


def test_fewer_scored_rows_are_filled_in_from_what_is_free_and_differences_have_intervals():
    rng = np.random.default_rng(0)
    free = rng.normal(size=(200, 3))
    effort = np.exp(free @ [1, -1, 0] + 0.1 * rng.normal(size=200))
    filled = frontier.filled_in(effort, free, 0.2, seed=1)
    assert (filled == effort).sum() == 40 and spearman(filled, effort) > 0.95
    tokens = rng.integers(5, 90, 200)
    stack = np.array([effort, rng.permutation(effort)])
    literal = [[spearman(e, free[:, 0]) for e in stack], [partial_spearman(e, free[:, 0], tokens) for e in stack]]
    assert np.allclose(frontier.rank_correlations(stack, free[:, 0], tokens), literal)
    target = {1: Scores(np.arange(200), {"effort": effort, "n_response_tokens": tokens}, None, None, None, "")}
    table = pd.DataFrame({"seed": 1, "way": ["a", "b"], "scored": 1.0, "rows": 200, "flops_share": [2, 1]})
    table["spearman"], table["spearman_length_fixed"] = frontier.rank_correlations(stack, effort, tokens)
    found = frontier.summarise(table, {(1, "a", 1.0): stack[0], (1, "b", 1.0): stack[1]}, target, "a").set_index("way")
    assert found["as good"].to_dict() == {"a": "yes", "b": "no"} and list(found.index) == ["b", "a"]
    assert found["spearman − published"]["a"] == "+0.000 (+0.000 to +0.000)"
