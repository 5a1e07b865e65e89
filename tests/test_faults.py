"""What may happen to a run: kills, damage, a second run, a full disk, rows without a finite score, many processes."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, assert_one_line_error, run_script
from safetensors.torch import load_file

from selection.method.effort import EffortScorer
from selection.rows.llama_factory import import_llama_factory
from selection.rows.split import training_split
from selection.run.config import load_experiment
from selection.run.errors import UserError
from selection.run.ledger import VERIFICATION, read_ledger
from selection.run.products import held, made_from, read_json, read_sealed, write_sealed
from selection.scores.folder import read_scores
from selection.scores.scoring import score_rows
from tests.chaos import fork, run_processes

UNTUNED = ("--set", "small_training.num_train_epochs=0", "--set", "selection.tokens_per_batch=300")


@pytest.fixture
def stage(tmp_path):
    """A function that runs a stage in `count` processes, as torchrun would; returns exit code and output."""
    import_llama_factory()  # once, for all the processes that are forked from this one

    def run(script: str, *arguments: object, count: int = 1) -> tuple[int, str]:
        log = tmp_path / "log"
        return run_processes([[script, *map(str, arguments)]] * count, log), log.read_text(errors="replace")

    return run


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """Where `selected` keeps the run folder that it copies."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def selected(make_experiment, rows, stage, tmp_path, finished_run) -> Path:
    """The configuration of a finished selection, its speculator untuned."""
    config = make_experiment(rows, small_training={"num_train_epochs": 0})
    if finished_run.exists():
        shutil.copytree(finished_run, tmp_path / "run", symlinks=True)
        return config
    for script in ("selection/effort_score.py", "selection/verify.py", "selection/coreset.py"):
        code, said = stage(script, "--config_path", config)
        assert code == 0, said
    shutil.copytree(tmp_path / "run", finished_run, symlinks=True)
    return config


def flip(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


# Many processes


def test_scores_and_coresets_do_not_depend_on_the_number_of_processes(make_experiment, rows, stage, tmp_path):
    config, scores, coresets = make_experiment(rows), {}, {}
    for count in (1, 2, 4):
        run = tmp_path / f"run-{count}"
        at = ("--config_path", config, "--set", f"output_dir={run}", *UNTUNED)
        for script in ("selection/effort_score.py", "selection/verify.py"):
            code, said = stage(script, *at, count=count)
            assert code == 0, said
        assert stage("selection/coreset.py", *at)[0] == 0
        scores[count] = [read_scores(run / "scores" / which) for which in ("small", "target")]
        coresets[count] = [(path.name, read_json(path)["indices"]) for path in sorted((run / "coresets").iterdir())]
        assert len(list((run / "scores" / "small").glob("part-*"))) >= 4
        entries = read_ledger(run)[:2]
        assert [(entry.samples, entry.processes) for entry in entries] == [
            (24, count),
            (len(scores[1][1].index), count),
        ]
    for count in (2, 4):
        assert coresets[count] == coresets[1]
        for one, many in zip(scores[1], scores[count], strict=True):
            assert np.array_equal(one.index, many.index)
            np.testing.assert_allclose(many.effort, one.effort, rtol=1e-6)


def test_two_processes_tune_and_evaluate_as_one_does(make_experiment, rows, stage, tmp_path):
    config, tuned = make_experiment(rows), {}
    torch.save(list(range(24)), tmp_path / "all.pt")
    torch.save(list(range(8)), tmp_path / "some.pt")
    for count in (1, 2):
        at = ("--config_path", config, "--set", f"output_dir={tmp_path / str(count)}")
        # More than one in a call: each has a process group of its own.
        tune = ("finetune/finetune-select.py", *at, "--select_path", tmp_path / "all.pt", tmp_path / "some.pt")
        for command in (tune, ("finetune/eval.py", *at)):
            code, said = stage(*command, count=count)
            assert code == 0, said
        tuned[count] = load_file(tmp_path / str(count) / "target" / "all" / "adapter_model.safetensors")
        assert made_from(tmp_path / str(count) / "eval" / "some")
    # 24 rows are 6 full steps of 4 samples: the same samples in every step.
    for name, weight in tuned[1].items():
        torch.testing.assert_close(tuned[2][name], weight, rtol=1e-3, atol=1e-5)
    answers = [(tmp_path / str(count) / "eval" / "all" / "predictions.jsonl").read_text() for count in (1, 2)]
    assert len(answers[0].splitlines()) == 6
    assert [json.loads(line)["label"] for line in answers[1].splitlines()] == [
        json.loads(line)["label"] for line in answers[0].splitlines()
    ]


def test_torchrun_is_started_by_nproc_and_ends_as_the_stage_ends(make_experiment, rows, monkeypatch, tmp_path):
    monkeypatch.setenv("NPROC", "2")
    config = make_experiment(rows)

    def launch(script: str, *more: object) -> subprocess.CompletedProcess:
        arguments = (REPOSITORY / script, "--config_path", config, *more)
        return run_script("scripts/launch.py", *arguments, check=False)

    assert_one_line_error(launch("scripts/costs.py"), "no cost ledger yet")  # both say it, one is heard
    done = launch("selection/effort_score.py", *UNTUNED)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_ledger(tmp_path / "run")[0].processes == 2


# Kills and signals


def test_killed_stages_go_on_to_the_same_result():
    done = run_script("tests/chaos.py", "--count", 5, "--seed", 1)
    assert re.search(r"\d+ kills in 5 trials \(seed 1\): 0 failed", done.stdout), done.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_stage_with_a_line_and_nothing_half_written(make_experiment, rows, number, code, tmp_path):
    config, log = make_experiment(rows * 40), tmp_path / "log"
    import_llama_factory()
    child = fork(["selection/effort_score.py", "--config_path", str(config), *UNTUNED], 0, 1, None, log)
    ends = time.monotonic() + 120
    while not list((tmp_path / "run" / "scores" / "small").glob("part-*")) and time.monotonic() < ends:
        time.sleep(0.02)
    os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    said = log.read_text()
    assert said.count("interrupted: call the same command again to go on\n") == 1 and "Traceback" not in said
    assert not list((tmp_path / "run").rglob("*.partial"))
    assert 0 < len(read_scores(tmp_path / "run" / "scores" / "small").index) < 960
    assert read_ledger(tmp_path / "run")[0].samples > 0


# Damage


def test_a_damaged_part_is_named_then_scored_again_and_the_result_is_the_same(selected, stage, tmp_path):
    folder = tmp_path / "run" / "scores" / "small"
    before, part = read_scores(folder), sorted(folder.glob("part-*"))[0]
    flip(part)
    with pytest.raises(UserError, match=f"{part.name} is damaged"):
        read_scores(folder)
    code, said = stage("selection/coreset.py", "--config_path", selected)
    assert code == 2 and f"{part.name} is damaged" in said and said.count("error:") == 1
    code, said = stage("selection/effort_score.py", "--config_path", selected)
    assert code == 0 and f"{part.name} is damaged: its rows are scored again" in said
    after = read_scores(folder)
    assert after.effort.tobytes() == before.effort.tobytes() and after.ids == before.ids
    code, said = stage("selection/verify.py", "--config_path", selected)
    assert code == 0 and "verification: reusing" in said


@pytest.mark.parametrize("name", ["scores/small/manifest.json", "verification.json", "data/split.json"])
def test_a_record_that_does_not_say_what_was_written_is_refused_by_name(selected, stage, tmp_path, name):
    path = tmp_path / "run" / name
    text = path.read_text()
    digit = next(match.start() for match in re.finditer(r"[1-8](?=[,\n])", text))
    path.write_text(text[:digit] + str(int(text[digit]) + 1) + text[digit + 1 :])
    script = "selection/coreset.py" if name == "verification.json" else "selection/verify.py"
    code, said = stage(script, "--config_path", selected)
    assert code == 2 and f"{name} is damaged (its checksum does not fit)" in said and said.count("error:") == 1


def test_a_record_comes_back_as_it_was_written_and_one_without_a_checksum_is_refused(tmp_path):
    record, path = {"a": [1, 2], "b": None, "c": 0.1 + 0.2, "d": "ö"}, tmp_path / "record.json"
    write_sealed(path, record)
    assert read_sealed(path) == record
    path.write_text('{"a": 3}')
    with pytest.raises(UserError, match=r"record\.json is damaged"):
        read_sealed(path)


def test_a_damaged_adapter_is_refused(make_experiment, rows, stage, tmp_path):
    config = make_experiment(rows, selection={"precision": "fp32", "self_test": 0})
    assert stage("finetune/finetune.py", "--config_path", config)[0] == 0
    flip(tmp_path / "run" / "small" / "adapter_model.safetensors", 0.7)
    for script in ("finetune/finetune.py", "selection/effort_score.py"):
        code, said = stage(script, "--config_path", config)
        assert code == 2 and "adapter_model.safetensors is damaged or missing: remove" in said


def test_a_plan_that_cannot_be_read_is_made_again(make_experiment, rows, tmp_path):
    experiment = load_experiment(make_experiment(rows), ["selection.tokens_per_batch=300", "selection.self_test=0"])
    split, folder, score = training_split(experiment), tmp_path / "scores", EffortScorer.score

    def run(path):
        score_rows(experiment, split, experiment.target_model, None, np.arange(24), path, VERIFICATION)

    run(tmp_path / "unbroken")
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EffortScorer, "score", interrupted)
        run(folder)
    (folder / "plan.json").write_text('{"parts": [[')
    run(folder)
    np.testing.assert_allclose(read_scores(folder).effort, read_scores(tmp_path / "unbroken").effort, rtol=1e-6)


@pytest.mark.parametrize(
    ("command", "sent", "code"),
    [
        ("true", None, 0),
        ("exit 7", None, 7),
        ("no_such_command", None, 127),
        ("sleep 60", "INT", 130),
        ("sleep 60", "TERM", 143),
        ("source environment.sh; run sleep 60", "INT", 130),
    ],
)
def test_the_shell_scripts_end_as_their_stages_end(command, sent, code):
    script = f'set -e; source environment.sh; echo ready; run bash -c "{command}"; echo on'
    process = subprocess.Popen(["bash", "-c", script], cwd=REPOSITORY / "scripts", stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "ready\n"
    if sent:
        time.sleep(0.5)
        process.send_signal(getattr(signal, f"SIG{sent}"))
    assert process.communicate(timeout=20)[0] == ("on\n" if code == 0 else "")
    assert process.returncode == code


# A second run, a full disk


def test_a_second_run_says_who_holds_the_folder(selected, stage, tmp_path):
    with held(tmp_path / "run" / "scores" / "small"):
        code, said = stage("selection/effort_score.py", "--config_path", selected)
    assert code == 2 and said.count("error:") == 1
    assert re.search(rf"scores/small is held by process {os.getpid()} on \S+ since 20\d\d-", said), said
    assert stage("selection/effort_score.py", "--config_path", selected)[0] == 0


def test_a_full_disk_is_one_line_and_what_was_finished_stays_usable(selected, stage, tmp_path):
    coresets = {path.name: path.read_bytes() for path in (tmp_path / "run" / "coresets").iterdir()}

    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))

    command = [sys.executable, "selection/coreset.py", "--config_path", str(selected), "--rate", "0.25"]
    done = subprocess.run(command, cwd=REPOSITORY, preexec_fn=no_room, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and "File too large" in done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "coresets").iterdir()} == coresets
    assert stage("selection/coreset.py", "--config_path", selected, "--rate", "0.25")[0] == 0


# Rows without a finite score


def test_a_row_without_a_finite_score_is_in_no_coreset(make_experiment, rows, tmp_path, stage, monkeypatch):
    varied = [row | {"output": f"{row['output']} {i}."} for i in range(5) for row in rows]
    config = make_experiment(varied, small_training={"num_train_epochs": 0}, cutoff_len=1024)
    experiment = load_experiment(config)
    split, score, every = training_split(experiment), EffortScorer.score, np.arange(120)
    odd = split.ids[7]
    tokens = []

    def with_nan(self, input_ids, labels):
        scores = score(self, input_ids, labels)
        for i, ids in enumerate(input_ids):
            if ids == tokens[0]:
                scores["loss"][i] = np.inf
        return scores

    from selection.rows.tokens import tokenised_split

    tokens.append(tokenised_split(experiment, experiment.small_model, split)[7]["input_ids"])
    monkeypatch.setattr(EffortScorer, "score", with_nan)
    score_rows(experiment, split, experiment.small_model, None, every, experiment.small_scores, VERIFICATION)
    assert read_json(experiment.small_scores / "manifest.json")["left_out"] == [7]
    scores = read_scores(experiment.small_scores)
    assert len(scores.check_complete().effort) == 119 and 7 not in scores.index and odd not in scores.ids
    score_rows(experiment, split, experiment.target_model, None, every, experiment.target_scores, VERIFICATION)
    monkeypatch.undo()
    # Killed before the last word, the run says it when called again.
    path, plan = experiment.small_scores / "manifest.json", experiment.small_scores / "plan.json"
    write_sealed(plan, {"parts": []})
    write_sealed(path, read_sealed(path) | {"left_out": []})
    assert read_scores(experiment.small_scores, columns=()).left_out.tolist() == [7]
    score_rows(experiment, split, experiment.small_model, None, every, experiment.small_scores, VERIFICATION)
    assert read_sealed(path)["left_out"] == [7] and not plan.exists()
    code, said = stage("selection/verify.py", "--config_path", config)
    assert code == 0, said
    assert all(7 not in stratum["verified"] for stratum in read_json(experiment.verification)["strata"])
    methods = ("staff", "random", "length")
    code, said = stage("selection/coreset.py", "--config_path", config, "--method", *methods, "--rate", 0.5, 1.0)
    assert code == 0, said
    for method in methods:
        half, whole = (read_json(experiment.coresets / f"{method}-{rate}.json") for rate in ("0.5", "1"))
        assert whole["indices"] == [row for row in range(120) if row != 7]
        assert len(half["indices"]) == 59 and 7 not in half["indices"]
        for coreset in (half, whole):
            assert coreset["num_rows"] == 120 and coreset["ids"] == [split.ids[row] for row in coreset["indices"]]
