"""The demo from end to end on a tiny random model, in processes as a user starts them. Reuse: test_command_line.py."""

import json
import os
import subprocess

from conftest import REPOSITORY


def test_the_demo(tmp_path, demo_models):
    run = tmp_path / "run"
    command, environment = ["bash", REPOSITORY / "scripts" / "demo.sh", "--tiny"], os.environ | {"RUN": str(run)}
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("reusing") >= 3  # .venv and two models
    head = "coreset         rows     nll   ROUGE-L   BLEU-4   rouge_score   sacreBLEU    selection     tuning"
    assert head in done.stdout
    table = done.stdout.partition(head)[2].split("(nll: ")[0]
    assert [line.split()[:2] for line in table.splitlines()[1:]] == [
        ["staff-0.2", "10"],
        ["random-0.2", "10"],
        ["untuned", "0"],
    ]
    for name in ("staff-0.2", "random-0.2", "untuned"):
        assert (run / "eval" / name / "predictions.jsonl").read_text().count("\n") == 10
    assert "selection costs" in done.stdout and done.stdout.splitlines()[-1] == str(run / "report.html")
    found = json.loads((run / "pool" / "pool.json").read_text())["suspects"]
    assert done.stdout.startswith(f"{found} of 60 rows are suspect") and done.stdout.count("rows are suspect") == 1
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f"<p>{found} of 60 rows of the data" in page
    assert page.count('<div class="chart"') >= 4 and len(page) < 3e6  # scores, target, length, map
