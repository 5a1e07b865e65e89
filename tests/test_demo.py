"""The demo from end to end on a tiny random model, fresh and again, in processes as a user starts them."""

import os
import subprocess

import pytest
from conftest import REPOSITORY, run_script


def demo(run_folder) -> str:
    """What came to stderr and stdout."""
    command = ["bash", str(REPOSITORY / "scripts" / "demo.sh"), "--tiny"]
    environment = os.environ | {"RUN": str(run_folder)}
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr + done.stdout


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, demo_models):
    return tmp_path_factory.mktemp("demo") / "run"


def test_demo_fresh_and_again(run_folder):
    out = demo(run_folder)
    assert "coreset         rows   ROUGE-L   BLEU-4   rouge_score   sacreBLEU    selection     tuning" in out
    for name in ("staff-0.2", "random-0.2"):
        assert f"\n{name}" in out
        assert (run_folder / "eval" / name / "predictions.jsonl").read_text().count("\n") == 10
    assert "selection costs" in out and out.splitlines()[-1] == str(run_folder / "report.html")
    page = (run_folder / "report.html").read_text(encoding="utf-8")
    assert page.count('<div class="chart"') >= 4 and len(page) < 3e6  # scores, target, length, map

    before = {path: path.read_bytes() for path in (run_folder / "coresets").iterdir()}
    assert demo(run_folder).count("reusing") >= 9  # .venv, 2 models, tuned small, 2 scores, 2 targets, 2 evaluations
    assert {path: path.read_bytes() for path in (run_folder / "coresets").iterdir()} == before


def test_demo_refuses_unknown_arguments():
    done = run_script("scripts/demo.sh", "--big", check=False)
    assert done.returncode == 2
    assert done.stderr == "error: unknown argument --big: there are --tiny, --quiet and --help\n"
