"""The benchmark: every way makes the same norms; what cannot be measured is skipped by name."""

import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from conftest import REPOSITORY, assert_one_line_error, run_script

from scripts.bench import scoring
from scripts.bench.contestants import CONTESTANTS
from selection.run.errors import UserError
from selection.run.products import read_json

DATA = REPOSITORY / "data" / "go_biology.jsonl"


@pytest.mark.parametrize("phi", scoring.PHIS)
def test_every_contestant_makes_the_norms_and_losses_of_plain_autograd(tiny_model, phi):
    def measure(contestant):
        return scoring.measure(str(tiny_model), str(DATA), 4, phi, "fp32", contestant)

    exact = measure("loop")
    for contestant in CONTESTANTS:
        package = contestant.partition("_")[0]
        if package not in ("opacus", "bergson") or find_spec(package):
            own = measure(contestant)
            np.testing.assert_allclose(own["losses"], exact["losses"], rtol=1e-5, err_msg=contestant)
            assert (own["norms"] == []) == (contestant in ("bound", "forward_backward"))
            if own["norms"]:
                np.testing.assert_allclose(own["norms"], exact["norms"], rtol=1e-5, err_msg=contestant)


def test_results_name_no_path_and_what_is_skipped_and_are_drawn(tiny_model, tmp_path, monkeypatch):
    results, picture = tmp_path / "scoring.json", tmp_path / "scoring.png"
    arguments = "--model", tiny_model, "--data", DATA, "--rows", 4, "--repeat", 1, "--json", results, "--out", picture
    monkeypatch.setattr(sys, "argv", ["scoring.py", *map(str, arguments), "--against", "loop", "opacus"])

    def measure(job: dict) -> dict:
        if job["contestant"] == "opacus":
            raise UserError("No module named 'opacus'")
        return json.loads(run_script("scripts/bench/scoring.py", "--worker", json.dumps(job)).stdout.splitlines()[-1])

    monkeypatch.setattr(scoring, "measure_apart", measure)
    scoring.main()
    record = read_json(results)
    by_name = {result["contestant"]: result for result in record["results"]}
    assert set(by_name) == {"suite", "loop"}
    assert by_name["suite"]["largest_relative_difference"] <= 1e-5
    assert by_name["suite"]["samples_per_second"] == 4 / by_name["suite"]["seconds_of_rounds"][0]
    assert record["skipped"] == {"opacus for v_lora_b in fp32": "No module named 'opacus'"}
    assert not any(str(path) in json.dumps(record) for path in (tmp_path, tiny_model, REPOSITORY))
    assert picture.stat().st_size > 5_000


def test_missing_data_is_one_line(tiny_model, tmp_path):
    results = tmp_path / "scoring.json"
    arguments = "--model", tiny_model, "--data", tmp_path / "none.jsonl", "--json", results
    done = run_script("scripts/bench/scoring.py", *arguments, check=False)
    assert_one_line_error(done, "none.jsonl", "No such file")
    assert not results.exists()
