"""tests/stored_run is a run folder that version 0.1.0 made, before the code was divided into folders."""

import json
import shutil

import pytest
from conftest import REPOSITORY

from selection.report.annotated import annotated
from selection.run.config import load_experiment
from selection.run.ledger import read_ledger

STORED = REPOSITORY / "tests" / "stored_run"


@pytest.fixture
def run(tmp_path):
    """A copy of the stored run; its models exist nowhere, its data are in the repository."""
    return shutil.copytree(STORED, tmp_path / "run")


def coreset(folder, name):
    record = json.loads((folder / "coresets" / f"{name}.json").read_text(encoding="utf-8"))
    return {key: value for key, value in record.items() if key != "code_version"}


def test_coresets_are_cut_again_as_they_were(run, stage):
    for path in (run / "coresets").iterdir():
        path.unlink()
    code, _, error = stage(
        "selection.coreset", run / "experiment.yaml", "--rate", "0.25", "0.5", "--set", f"output_dir={run}"
    )
    assert code == 0, error
    for name in ("staff-0.25", "staff-0.5", "random-0.25", "random-0.5"):
        assert coreset(run, name) == coreset(STORED, name)


def test_its_ledger_report_and_annotated_rows_are_read(run, stage):
    experiment = load_experiment(run / "experiment.yaml", [f"output_dir={run}"])
    assert len(read_ledger(run)) == len((STORED / "costs.jsonl").read_text().splitlines())
    rows = annotated(experiment, run / "coresets" / "staff-0.5.json")
    assert sum(rows["chosen"].to_pylist()) == 12
    code, out, error = stage("scripts.report", run / "experiment.yaml", "--set", f"output_dir={run}")
    assert code == 0 and out.strip() == str(run / "report.html"), error
