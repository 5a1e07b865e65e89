"""What may happen to a run: kills, damage, a second run, a full disk, rows without a finite score, many processes."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, assert_one_line_error, copy_of, everything_in, run_script
from safetensors.torch import load_file

from selection.method.effort import EffortScorer
from selection.rows.split import training_split
from selection.rows.tokens import tokenised_split
from selection.run.config import load_experiment
from selection.run.errors import UserError
from selection.run.ledger import VERIFICATION, read_ledger
from selection.run.products import held, read_json, read_sealed, write_sealed
from selection.run.yaml_file import to_yaml
from selection.scores.folder import read_scores
from selection.scores.scoring import score_rows
from tests.forks import run_processes, start

UNTUNED = ("--set", "small_training.num_train_epochs=0", "--set", "selection.tokens_per_batch=300")


@pytest.fixture
def stage(tmp_path):
    """Runs a stage in `count` processes, as torchrun would, to exit code `code`; returns what it said."""

    def run(script: str, *arguments: object, count: int = 1, code: int = 0) -> str:
        ended = run_processes([[script, *arguments]] * count, tmp_path / "log")
        said = (tmp_path / "log").read_text(errors="replace")
        assert (ended, said.count("error:")) == (code, code == 2), said
        return said

    return run


@pytest.fixture
def selected(finished_run, tmp_path) -> Path:
    """The configuration of a copy of a finished selection, its speculator untuned."""
    (tmp_path / "selected.yaml").write_text(to_yaml(copy_of(finished_run, tmp_path / "run")))
    return tmp_path / "selected.yaml"


def flip(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def test_scores_and_coresets_do_not_depend_on_the_number_of_processes(make_experiment, rows, stage, tmp_path):
    config, scores, coresets = make_experiment(rows), {}, {}
    for count in (1, 3):
        run = tmp_path / f"run-{count}"
        at = ("--config_path", config, "--set", f"output_dir={run}", *UNTUNED)
        for script, processes in (("effort_score", count), ("verify", count), ("coreset", 1)):
            stage(f"selection/{script}.py", *at, count=processes)
        scores[count] = [read_scores(run / "scores" / which) for which in ("small", "target")]
        coresets[count] = [(path.name, read_json(path)["indices"]) for path in sorted((run / "coresets").iterdir())]
        assert len(list((run / "scores" / "small").glob("part-*"))) >= 3
        assert {entry.processes for entry in read_ledger(run)[:2]} == {count}
    assert coresets[1] == coresets[3]
    for one, many in zip(scores[1], scores[3], strict=True):
        assert np.array_equal(one.index, many.index)
        assert many.effort.tobytes() == one.effort.tobytes()


def test_two_processes_tune_and_evaluate_as_one_does(make_experiment, rows, stage, tmp_path):
    config, tuned, labels = make_experiment(rows), {}, {}
    paths = [tmp_path / "all.pt", tmp_path / "some.pt"]
    for path, size in zip(paths, (24, 8), strict=True):
        torch.save(list(range(size)), path)
    for count in (1, 2):  # of two processes two data sets in a call: each has a process group of its own
        run = tmp_path / str(count)
        at = ("--config_path", config, "--set", f"output_dir={run}")
        stage("finetune/finetune-select.py", *at, "--select_path", *paths[:count], count=count)
        stage("finetune/eval.py", *at, count=count)
        tuned[count] = load_file(run / "target" / "all" / "adapter_model.safetensors")
        answers = (run / "eval" / "all" / "predictions.jsonl").read_text().splitlines()
        labels[count] = [json.loads(line)["label"] for line in answers]
    # 24 rows are 6 full steps of 4 samples: the same samples in every step.
    for name, weight in tuned[1].items():
        torch.testing.assert_close(tuned[2][name], weight, rtol=1e-3, atol=1e-5)
    assert len(labels[1]) == 6 and labels[1] == labels[2]


STAGE = """import sys
sys.path[0] = "{}"
from selection.run import ending, errors, processes

def main():
    group = processes.processes()
    raise errors.UserError(f"ranks {{group.gather(group.rank)}}")

ending.run_stage(main)
"""


def test_torchrun_is_started_by_nproc_and_ends_as_the_stage_ends_and_one_of_two_errors_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("NPROC", "2")
    (tmp_path / "stage.py").write_text(STAGE.format(REPOSITORY))
    assert_one_line_error(run_script("scripts/launch.py", tmp_path / "stage.py", check=False), "ranks [0, 1]")


def test_killed_stages_go_on_to_the_same_result():
    done = run_script("tests/chaos.py", "--seed", 1, "--only", 13, 24, 32)
    assert re.search(r"\d+ kills in \d trials \(seed 1\): 0 failed", done.stdout), done.stdout


@pytest.mark.parametrize(("number", "launcher"), [(signal.SIGINT, []), (signal.SIGTERM, ["scripts/launch.py"])])
def test_a_signal_ends_a_stage_with_a_line_and_nothing_half_written(
    make_experiment, rows, stage, number, launcher, tmp_path
):
    config, log, folder = make_experiment(rows * 10), tmp_path / "log", tmp_path / "run" / "scores" / "small"
    with log.open("ab") as file:
        command = ["selection/effort_score.py", "--config_path", config, *UNTUNED]
        process = start([*launcher, *command], file.fileno(), file.fileno())
    ends = time.monotonic() + 120
    while not list(folder.glob("part-*")) and time.monotonic() < ends:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number
    said = log.read_text()
    assert said.count("interrupted: call the same command again to go on\n") == 1 and "Traceback" not in said
    assert not list((tmp_path / "run").rglob("*.partial"))
    assert 0 < len(read_scores(folder).index) < 240
    assert read_ledger(tmp_path / "run")[0].samples > 0
    (folder / "plan.json").write_text('{"parts": [[')  # one that cannot be read
    stage(*command)
    read_scores(folder).check_complete()


def test_a_stage_ends_with_its_launcher(make_experiment, rows, tmp_path):
    config, folder = make_experiment(rows * 10), tmp_path / "run" / "scores" / "small"
    with (tmp_path / "log").open("ab") as file:
        command = ["scripts/launch.py", "selection/effort_score.py", "--config_path", config, *UNTUNED]
        launcher = start(command, file.fileno(), file.fileno())
    ends = time.monotonic() + 120
    while not list(folder.glob("part-*")) and time.monotonic() < ends:
        time.sleep(0.01)
    (child,) = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    launcher.kill()
    launcher.join()
    ends = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < ends:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists() and len(read_scores(folder).index) < 240


def test_a_damaged_part_is_named_then_scored_again_and_the_result_is_the_same(selected, stage, tmp_path):
    folder = tmp_path / "run" / "scores" / "small"
    before, part = read_scores(folder), sorted(folder.glob("part-*"))[0]
    flip(part)
    with pytest.raises(UserError, match=f"{part.name} is damaged"):
        read_scores(folder)
    assert f"{part.name} is damaged" in stage("selection/coreset.py", "--config_path", selected, code=2)
    said = stage("selection/effort_score.py", "--config_path", selected)
    assert f"{part.name} is damaged: its rows are scored again" in said
    assert read_scores(folder).effort.tobytes() == before.effort.tobytes()
    assert "verification: reusing" in stage("selection/verify.py", "--config_path", selected)


def test_a_record_that_does_not_say_what_was_written_is_refused_by_name(selected, tmp_path):
    for path in (tmp_path / "run" / "scores" / "small" / "manifest.json", tmp_path / "run" / "verification.json"):
        path.write_text(re.sub(r"[1-8](?=[,\n])", lambda digit: str(int(digit[0]) + 1), path.read_text(), count=1))
        with pytest.raises(UserError, match=rf"{path.name} is damaged \(its checksum does not fit\)"):
            read_sealed(path)


def test_a_damaged_adapter_is_refused(make_experiment, rows, stage, tmp_path):
    config = make_experiment(rows, selection={"precision": "fp32", "self_test": 0})
    stage("finetune/finetune.py", "--config_path", config)
    flip(tmp_path / "run" / "small" / "adapter_model.safetensors", 0.7)
    said = stage("selection/effort_score.py", "--config_path", config, code=2)
    assert "adapter_model.safetensors is damaged or missing: remove" in said


ENDS = [("true", None, 0), ("exit 7", None, 7), ("sleep 60", "TERM", 143)]
ENDS += [("source environment.sh; run sleep 60", "INT", 130)]


@pytest.mark.parametrize(("command", "sent", "code"), ENDS)
def test_the_shell_scripts_end_as_their_stages_end(command, sent, code):
    script = f'set -e; source environment.sh; echo ready; run bash -c "{command}"; echo on'
    process = subprocess.Popen(["bash", "-c", script], cwd=REPOSITORY / "scripts", stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "ready\n"
    if sent:
        time.sleep(0.3)
        process.send_signal(getattr(signal, f"SIG{sent}"))
    assert process.communicate(timeout=20)[0] == ("on\n" if code == 0 else "")
    assert process.returncode == code


def test_a_second_run_says_who_holds_the_folder(selected, stage, tmp_path):
    with held(tmp_path / "run" / "scores" / "small"):
        said = stage("selection/effort_score.py", "--config_path", selected, code=2)
    assert re.search(rf"scores/small is held by process {os.getpid()} on \S+ since 20\d\d-", said), said


def test_a_full_disk_is_one_line_and_what_was_finished_stays_usable(selected, stage, tmp_path):
    coresets = everything_in(tmp_path / "run" / "coresets")
    command = [sys.executable, "selection/coreset.py", "--config_path", str(selected), "--rate", "0.25"]
    small = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)), "cwd": REPOSITORY}
    full = subprocess.run(command, **small, capture_output=True, text=True)
    assert full.returncode == 2 and re.fullmatch("error: .*File too large.*\n", full.stderr), full.stderr
    assert everything_in(tmp_path / "run" / "coresets") == coresets
    stage(*command[1:])


def test_a_row_without_a_finite_score_is_in_no_coreset(make_experiment, rows, tmp_path, stage, monkeypatch):
    varied = [row | {"output": f"{row['output']} {i}."} for i in range(5) for row in rows]  # 1 % is a row
    config = make_experiment(varied, small_training={"num_train_epochs": 0}, cutoff_len=1024)
    experiment = load_experiment(config)
    split, score, every = training_split(experiment), EffortScorer.score, np.arange(120)
    tokens = tokenised_split(experiment, experiment.small_model, split)[7]["input_ids"]

    def with_nan(self, input_ids, labels):
        scores = score(self, input_ids, labels)
        if tokens in input_ids:
            scores["loss"][input_ids.index(tokens)] = np.inf
        return scores

    monkeypatch.setattr(EffortScorer, "score", with_nan)
    small = (experiment, split, experiment.small_model, None, every, experiment.small_scores, VERIFICATION)
    score_rows(*small)
    monkeypatch.undo()
    assert read_json(experiment.small_scores / "manifest.json")["left_out"] == [7]
    scores = read_scores(experiment.small_scores)
    assert len(scores.check_complete().effort) == 119 and 7 not in scores.index and split.ids[7] not in scores.ids
    # Killed before the last word, the run says it when called again.
    path, plan = experiment.small_scores / "manifest.json", experiment.small_scores / "plan.json"
    write_sealed(plan, {"parts": []})
    write_sealed(path, read_sealed(path) | {"left_out": []})
    assert read_scores(experiment.small_scores, columns=()).left_out.tolist() == [7]
    score_rows(*small)
    assert read_sealed(path)["left_out"] == [7] and not plan.exists()
    stage("selection/verify.py", "--config_path", config)
    assert all(7 not in stratum["verified"] for stratum in read_json(experiment.verification)["strata"])
    stage("selection/coreset.py", "--config_path", config, "--method", "staff", "length", "--rate", 0.5, 1.0)
    for name, size in (("staff-0.5", 59), ("staff-1", 119), ("length-0.5", 59), ("length-1", 119)):
        coreset = read_json(experiment.coresets / f"{name}.json")
        assert len(coreset["indices"]) == size and 7 not in coreset["indices"] and coreset["num_rows"] == 120
        assert coreset["ids"] == [split.ids[row] for row in coreset["indices"]]
