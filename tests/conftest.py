"""Shared by the tests: a tiny model on disk, experiments on small data, and the scripts, each in its own process."""

import fcntl
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from forks import REPOSITORY, start

# One thread, as in the scripts' processes: those are forked from this one, and OpenMP's threads do not survive that.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_PATIENCE = 900  # seconds after which a script counts as hung, on a busy machine too

# Files of more than 20 s, longest first: else one process may wait for the other at the end.
_LONG = (
    "test_grid.py",
    "test_demo.py",
    "test_faults.py",
    "test_stages.py",
    "test_architectures.py",
    "test_effort.py",
    "test_fake_device.py",
    "test_bench.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files, then the others in the order of names."""
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))


def run_script(
    script: str | Path, *arguments: object, cwd: Path | None = None, check: bool = True
) -> subprocess.CompletedProcess:
    """Run a script as a user would; `cwd` defaults to the script's own folder.

    A Python script runs in a fork of this process (tests/forks.py). Fresh processes are in test_demo.py, and in
    test_faults.py for full disks and torchrun.
    """
    path, said = REPOSITORY / script, []
    command = [str(path), *map(str, arguments)]
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        if path.suffix == ".sh":
            options = {"cwd": cwd or path.parent, "stdout": stdout, "stderr": stderr, "timeout": _PATIENCE}
            code = subprocess.run(["bash", *command], **options).returncode
        else:
            process = start(command, stdout.fileno(), stderr.fileno(), cwd or path.parent)
            process.join(_PATIENCE)
            process.kill()
            process.join()
            code = process.exitcode
        for file in (stdout, stderr):
            file.seek(0)
            said.append(file.read().decode())
    done = subprocess.CompletedProcess(command, code, *said)
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


def by_rate(rule, num_rows: int, quotas=None):
    """A rule's coreset as a function of the rate."""
    from selection.method.quotas import choose_by_rule

    return lambda rate: choose_by_rule(rule, rate, num_rows, quotas)


def baseline_by_rate(method: str, columns: dict, num_rows: int, selection, quotas=None):
    """A baseline's coreset, under the settings of `selection`, as a function of the rate."""
    from selection.method.baselines import baseline

    settings = selection.num_strata, selection.hardest_cutoff, selection.seed
    rule = baseline(method, columns, num_rows, selection.rules, selection.baseline_variant, *settings)
    return by_rate(rule, num_rows, quotas)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Llama of 4 layers with a small tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    run_script("scripts/make_tiny_model.py", "--out", folder)
    return folder


@pytest.fixture(scope="session")
def demo_models(tmp_path_factory) -> None:
    """The tiny demo's two models, in their place; one process of the tests makes them, the others wait."""
    models = REPOSITORY / "models"
    models.mkdir(exist_ok=True)
    with (models / ".tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run_script("scripts/make_tiny_model.py", "--out", models / "tiny")
        draft = ["--config_path", REPOSITORY / "configs" / "tiny.yaml"]
        draft += ["--set", f"output_dir={tmp_path_factory.mktemp('draft') / 'run'}"]
        draft += ["--target", models / "tiny", "--layers", 2, "--out", models / "tiny-2-layers"]
        run_script("scripts/make_draft.py", *draft)


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


@pytest.fixture
def stage(monkeypatch, capsys):
    """Runs a stage script in this process on a configuration; gives exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "path", sys.path.copy())  # the scripts change it

    def call(name: str, config: Path, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, "--config_path", str(config), *map(str, arguments)])
        code = 0
        try:
            from selection.run.cli import run_stage

            run_stage(importlib.import_module(name).main)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
