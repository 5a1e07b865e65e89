"""Installing: what scripts/setup.sh records, --help that starts nothing, packages that are missing or do not load."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import REPOSITORY, assert_one_line_error


@pytest.fixture
def clone(tmp_path) -> Path:
    """A clone with nothing installed."""
    folder = tmp_path / "clone"
    shutil.copytree(REPOSITORY / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "requirements.txt", folder)
    stand_in(tmp_path / "bin" / "uv", "exit 1")  # which `shell` finds before a real one
    return folder


def stand_in(path: Path, text: str) -> None:
    """A program of these lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def shell(clone: Path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = ["bash", str(clone / "scripts" / script), *arguments]
    # No interpreter: a script that begins to install ends at once.
    environment = os.environ | {"PYTHON": "false", "PATH": f"{clone.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_help_is_the_scripts_own_and_starts_nothing(clone):
    for script in ("setup.sh", "test.sh", "demo_models.sh", "demo.sh"):
        for option in ("--help", "-h"):
            done = shell(clone, script, option)
            assert (done.returncode, done.stderr) == (0, "")
            assert f"bash scripts/{script}" in done.stdout and "set -euo" not in done.stdout
    assert_one_line_error(shell(clone, "setup.sh", "wandb", "--dry-run"), "unknown argument --dry-run")  # not for pip
    assert_one_line_error(shell(clone, "demo.sh", "--big"), "unknown argument --big: there are --tiny, --quiet")
    assert sorted(path.name for path in clone.iterdir()) == ["requirements.txt", "scripts"]


def test_only_what_is_installed_is_recorded(clone):
    """With a pip that ends well and does nothing."""
    python = clone / ".venv" / "bin" / "python"
    stand_in(python, f'case "$*" in *"-m pip "*) exit 0 ;; esac\nexec {sys.executable} "$@"')
    (clone / "requirements.txt").write_text("# a comment\npytest>=1\nnever_heard-of.it==1.0\n")
    for _ in range(2):
        done = shell(clone, "setup.sh")
        assert done.returncode == 2 and "did not install never_heard-of.it:" in done.stderr
        assert not (clone / ".venv" / "installed").exists()
    (clone / "requirements.txt").write_text("pytest>=1\n")
    assert "installed the stack" in shell(clone, "setup.sh").stderr
    assert "reusing .venv" in shell(clone, "setup.sh").stderr


@pytest.mark.parametrize("works", [True, False])
def test_uv_installs_where_it_is_there_and_pip_what_it_cannot(clone, tmp_path, works):
    """With stand-ins that note what they are asked to install."""
    python, calls = clone / ".venv" / "bin" / "python", tmp_path / "calls"
    note = f'case "$*" in *"pip install"*) echo "$(basename "$0") $*" >> {calls}; exit'
    stand_in(tmp_path / "bin" / "uv", f"{note} {int(not works)} ;; esac")
    stand_in(python, f'{note} 0 ;; *"-m pip"*) exit 0 ;; esac\nexec {sys.executable} "$@"')
    (clone / "requirements.txt").write_text("pytest>=1\n")
    done = shell(clone, "setup.sh", "hypothesis")
    assert (done.returncode, done.stdout) == (0, "") and done.stderr.endswith("setup: installed the stack into .venv\n")
    first, *then = calls.read_text().splitlines()
    options = "--quiet --compile-bytecode --python .venv/bin/python"
    assert first == f"uv pip install {options} --requirement requirements.txt hypothesis"
    assert then == [] if works else ["python -m pip install --quiet --requirement requirements.txt hypothesis"]


def test_a_missing_package_is_named_with_the_command_that_installs_it(make_experiment, rows, tmp_path):
    given = ["--config_path", str(make_experiment(rows))]
    for package, script, arguments in (
        ("llamafactory", "finetune/finetune.py", given),
        ("tqdm", "scripts/report.py", ["--help"]),
    ):
        command = [str(REPOSITORY / script), *arguments]
        code = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = {command!r}; sys.path.insert(0, '')\n"
        code += f"runpy.run_path({command[0]!r}, run_name='__main__')"
        done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
        assert_one_line_error(done, f"the package {package} is not installed", "pip install -r requirements.txt")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_dir() and path.name != "data"]


def with_fakes(tmp_path: Path, code: str, **fakes: tuple[str, str]) -> list[str]:
    """What a fresh process prints that finds packages installed, each in a version and with code of its own."""
    for package, (release, text) in fakes.items():
        about = tmp_path / f"{package}-{release}.dist-info"
        for path, content in (
            (tmp_path / package / "__init__.py", text),
            (about / "METADATA", f"Name: {package}\nVersion: {release}\n"),
        ):
            path.parent.mkdir(parents=True)
            path.write_text(content)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def test_builds_for_another_torch_count_as_missing_and_one_that_loads_is_left_alone(tmp_path):
    """As pip leaves them beside a CPU torch: installed, and broken when they are imported."""
    code = """
from finetune.trainer import import_llama_factory
import_llama_factory()
import peft, torchaudio
from transformers.models.llama import modeling_llama
from transformers.utils import is_torchvision_available
print(is_torchvision_available(), torchaudio.__file__)
"""
    vision = ("0.28.0+another", "raise RuntimeError('operator torchvision::nms does not exist')")
    audio = ("2.11.0", "raise RuntimeError('undefined symbol')")
    stand_in = REPOSITORY / "selection" / "rows" / "no_torchaudio" / "torchaudio.py"
    assert with_fakes(tmp_path, code, torchvision=vision, torchaudio=audio) == ["False", str(stand_in)]
    good, label = tmp_path / "good", "".join(version("torch").partition("+")[1:])
    code = "import selection, torchvision; print(torchvision.__file__)"
    assert with_fakes(good, code, torchvision=(f"0.28.0{label}", "")) == [str(good / "torchvision" / "__init__.py")]
