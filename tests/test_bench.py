"""The benchmark: every way makes the same norms; what is missing is skipped by name."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from conftest import REPOSITORY, assert_one_line_error, run_script

from scripts.bench import scoring
from scripts.bench.contestants import CONTESTANTS
from selection.run.products import read_json

DATA = REPOSITORY / "data" / "go_biology.jsonl"


@pytest.mark.parametrize("phi", scoring.PHIS)
def test_every_contestant_makes_the_norms_and_losses_of_plain_autograd(tiny_model, phi):
    def measure(contestant):
        return scoring.measure(str(tiny_model), str(DATA), 4, phi, "fp32", contestant)

    exact = measure("loop")
    for contestant in CONTESTANTS:
        if scoring.reason_to_skip(contestant, phi) is None:
            own = measure(contestant)
            np.testing.assert_allclose(own["losses"], exact["losses"], rtol=1e-5, err_msg=contestant)
            assert (own["norms"] is None) == (contestant in ("bound", "forward_backward"))
            if own["norms"]:
                np.testing.assert_allclose(own["norms"], exact["norms"], rtol=1e-5, err_msg=contestant)


def test_results_name_no_path_and_what_is_skipped_and_are_drawn(tiny_model, tmp_path, monkeypatch, capsys):
    results, picture = tmp_path / "scoring.json", tmp_path / "scoring.png"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "opacus" else find(name, *a))
    arguments = "--model", tiny_model, "--data", DATA, "--rows", 4, "--repeat", 1, "--json", results, "--out", picture
    against = ["--against", "loop", "opacus", "forward_backward"]
    monkeypatch.setattr(sys, "argv", ["scoring.py", *map(str, arguments), *against])
    apart = scoring.measure_apart  # the suite in a fresh process, the loop in a fork, which has imported everything

    def forked(script: str, job: dict) -> dict:
        return json.loads(run_script(script, "--worker", json.dumps(job)).stdout.splitlines()[-1])

    measure = lambda script, job: (apart if job["contestant"] == "suite" else forked)(script, job)  # noqa: E731
    monkeypatch.setattr(scoring, "measure_apart", measure)
    scoring.main()
    assert "skipped: opacus for v_lora_b in fp32: opacus is not installed" in capsys.readouterr().out
    record = read_json(results)
    suite, loop = record["results"]
    assert (suite["contestant"], loop["contestant"]) == ("suite", "loop")
    assert suite["largest_relative_difference"] <= 1e-5
    assert suite["times_as_fast_as"]["loop"] == loop["seconds_of_rounds"][0] / suite["seconds_of_rounds"][0]
    assert {s["contestant"]: s["reason"] for s in record["skipped"]}["opacus"] == "opacus is not installed"
    assert not any(str(path) in json.dumps(record) for path in (tmp_path, tiny_model, REPOSITORY))
    assert picture.stat().st_size > 5_000


def test_missing_data_is_one_line_and_the_committed_results_are_drawn(tiny_model, tmp_path):
    results = tmp_path / "scoring.json"
    arguments = "--model", tiny_model, "--data", tmp_path / "none.jsonl", "--json", results
    done = run_script("scripts/bench/scoring.py", *arguments, check=False)
    assert_one_line_error(done, "none.jsonl", "No such file")
    assert not results.exists()
    committed, picture = REPOSITORY / "data" / "results" / "bench" / "scoring.json", tmp_path / "scoring.png"
    run_script("scripts/bench/scoring.py", "--json", committed, "--out", picture)
    assert picture.stat().st_size > 10_000
