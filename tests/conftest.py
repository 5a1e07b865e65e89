"""Shared by the tests: a tiny model on disk, experiments on small data, and the stage scripts as subprocesses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def run_script(
    script: str, *arguments: object, cwd: Path | None = None, check: bool = True
) -> subprocess.CompletedProcess:
    """Run a stage script as a user would; `cwd` defaults to the script's own folder."""
    path = REPOSITORY / script
    command = ["bash" if path.suffix == ".sh" else sys.executable, str(path), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd or path.parent, env=environment, capture_output=True, text=True, timeout=300)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def assert_one_line_error(done: subprocess.CompletedProcess, *said: str) -> None:
    """Exit code 2, and the last line of stderr is the one `error:` line, which says all of `said`."""
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    for text in said:
        assert text in errors[0], errors[0]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Llama of 4 layers with a small tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    run_script("scripts/make_tiny_model.py", "--out", folder)
    return folder


@pytest.fixture
def make_experiment(tiny_model, tmp_path):
    """A function that writes a configuration for the tiny model and given rows, and returns its path."""

    def make(rows: list[dict], name: str = "experiment", **changes) -> Path:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        keys = {
            "output_dir": str(tmp_path / "run"),
            "small_model": str(tiny_model),
            "target_model": str(tiny_model),
            "template": "chatml",
            "dataset": str(data),
            "eval_size": 0.2,
            "cutoff_len": 256,
            "precision": "fp32",
            "selection": {"rates": [0.5], "num_strata": 4, "verify_per_stratum": 2, "precision": "fp32"},
            "training": {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "seed": 7},
            "small_training": {"num_train_epochs": 1},
            "target_training": {"num_train_epochs": 1},
            "evaluation": {"max_new_tokens": 4},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(keys | changes), encoding="utf-8")  # JSON is YAML
        return path

    return make


@pytest.fixture
def rows() -> list[dict]:
    """30 rows of biology question answering."""
    lines = (REPOSITORY / "data" / "go_biology.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:30]]
