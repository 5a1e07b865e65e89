"""The benchmark: every way makes the same norms, nothing is measured twice, what is missing is skipped by name."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from conftest import REPOSITORY, assert_one_line_error, run_script

from selection.run.products import read_json

DATA = REPOSITORY / "data" / "go_biology.jsonl"


@pytest.fixture(scope="module")
def bench():
    """The script as a module."""
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("bench_scoring", REPOSITORY / "scripts" / "bench" / "scoring.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.mark.parametrize("phi", ["v_lora_b", "v_weight", "last_layer", "all_lora"])
def test_every_contestant_makes_the_norms_and_losses_of_plain_autograd(bench, tiny_model, phi, monkeypatch):
    monkeypatch.setattr("selection.method.effort._COMPOSED_ATTENTION_UP_TO", 256)  # one of the bounds changes it
    job = {"model": str(tiny_model), "data": str(DATA), "rows": 4, "tokens_per_batch": 400, "phi": phi, "dtype": "fp32"}

    def measure(contestant):
        outcome = bench.measure(job | {"contestant": contestant})
        return [np.array(outcome[kind].split(), float) if outcome[kind] else None for kind in ("norms", "losses")]

    norms, losses = measure("loop")
    for contestant in bench.CONTESTANTS:
        if bench.reason_to_skip(contestant, phi) is None:
            its_norms, its_losses = measure(contestant)
            np.testing.assert_allclose(its_losses, losses, rtol=1e-5, err_msg=contestant)
            assert (its_norms is None) == (contestant in ("bound", "bound_fused_attention", "forward_backward"))
            if its_norms is not None:
                np.testing.assert_allclose(its_norms, norms, rtol=1e-5, err_msg=contestant)


def test_results_go_on_from_what_is_measured(bench, tiny_model, tmp_path, monkeypatch, capsys):
    results = tmp_path / "scoring.json"
    arguments = "--model", tiny_model, "--data", DATA, "--rows", 4, "--repeat", 1, "--json", results
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "opacus" else find(name, *a))
    monkeypatch.setattr(
        sys, "argv", ["bench_scoring.py", *map(str, arguments), "--against", "loop", "opacus", "forward_backward"]
    )
    # The suite in a fresh process, its contestant in a fork of this one, which has imported everything.
    apart, worker = bench.measure_apart, "scripts/bench/scoring.py"

    def forked(job: dict) -> dict:
        return json.loads(run_script(worker, "--worker", json.dumps(job)).stdout.splitlines()[-1])

    monkeypatch.setattr(bench, "measure_apart", lambda job: (apart if job["contestant"] == "suite" else forked)(job))
    bench.main()
    record = read_json(results)
    suite, loop = record["results"]
    assert (suite["contestant"], loop["contestant"]) == ("suite", "loop")
    assert suite["largest_relative_difference"] <= 1e-5
    assert suite["compared_with"] == "loop, fp32"
    assert suite["times_as_fast_as"]["loop"]["ratio_of_medians"] == loop["seconds"] / suite["seconds"]
    assert {s["contestant"]: s["reason"] for s in record["skipped"]}["opacus"] == "opacus is not installed"
    text = json.dumps(record)
    assert not any(str(path) in text for path in (tmp_path, tiny_model, REPOSITORY))
    capsys.readouterr()

    monkeypatch.setattr(bench, "measure_apart", lambda job: pytest.fail(f"measured again: {job}"))
    bench.main()
    assert "skipped: opacus for v_lora_b in fp32: opacus is not installed" in capsys.readouterr().out
    assert read_json(results) == record


def test_missing_data_is_one_line(tiny_model, tmp_path):
    results = tmp_path / "scoring.json"
    arguments = "--model", tiny_model, "--data", tmp_path / "none.jsonl", "--json", results
    done = run_script("scripts/bench/scoring.py", *arguments, check=False)
    assert_one_line_error(done, "none.jsonl", "No such file")
    assert not results.exists()
