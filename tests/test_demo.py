"""The demo from end to end on a tiny random model, fresh and again, in processes as a user starts them."""

import os
import subprocess

from conftest import REPOSITORY, everything_in


def demo(run_folder) -> str:
    """What came to stderr and stdout."""
    command, environment = ["bash", REPOSITORY / "scripts" / "demo.sh", "--tiny"], os.environ | {"RUN": str(run_folder)}
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr + done.stdout


def test_demo_fresh_and_again(tmp_path, demo_models):
    run = tmp_path / "run"
    out = demo(run)
    assert "coreset         rows   ROUGE-L   BLEU-4   rouge_score   sacreBLEU    selection     tuning" in out
    for name in ("staff-0.2", "random-0.2"):
        assert f"\n{name}" in out
        assert (run / "eval" / name / "predictions.jsonl").read_text().count("\n") == 10
    assert "selection costs" in out and out.splitlines()[-1] == str(run / "report.html")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count('<div class="chart"') >= 4 and len(page) < 3e6  # scores, target, length, map

    before = everything_in(run / "coresets")
    assert demo(run).count("reusing") >= 9  # .venv, 2 models, tuned small, 2 scores, 2 targets, 2 evaluations
    assert everything_in(run / "coresets") == before
