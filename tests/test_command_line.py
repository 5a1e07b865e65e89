"""Command lines: --help of every script, its examples, errors, and what goes to stdout, to stderr and nowhere."""

import contextlib
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import termios
from pathlib import Path

from selection.run.ending import run_stage

import pytest
from conftest import REPOSITORY

from finetune.tuning import _logs_to, tune_once
from selection.rows.split import training_split
from selection.run import cli, log
from selection.run.config import load_experiment
from selection.run.errors import UserError
from selection.run.ledger import SPECULATIVE_SCORES, SPECULATIVE_TUNING

STAGES = ["finetune/finetune.py", "finetune/finetune-select.py", "finetune/eval.py"]
STAGES += [f"selection/{name}.py" for name in ("start", "effort_score", "verify", "coreset")]
SCRIPTS = STAGES + sorted(f"scripts/{path.name}" for path in (REPOSITORY / "scripts").glob("*.py"))


@pytest.fixture(autouse=True)
def signals_and_quiet_as_before():
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)
    log.be_quiet(False)


def main_of(script: str):
    return runpy.run_path(str(REPOSITORY / script))["main"]


@pytest.fixture
def parser_of(monkeypatch):
    """A function that gives a script's parser as the script makes it."""

    class Parsed(Exception):
        pass

    def stop(self, *arguments):
        raise Parsed(self)

    def parser(script: str):
        with monkeypatch.context() as patch, pytest.raises(Parsed) as stopped:
            patch.setattr(cli._Parser, "parse_args", stop)
            main_of(script)()
        return stopped.value.args[0]

    return parser


@pytest.fixture
def call(monkeypatch, capfd):
    """A function that calls a stage in this process on a configuration and gives what came to stdout and stderr."""

    def run(script: str, config: Path, *arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [script, "--config_path", str(config), *map(str, arguments)])
        capfd.readouterr()
        main_of(script)()
        return capfd.readouterr()

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_enough_to_call_a_script(script, parser_of):
    parser = parser_of(script)
    text = parser.format_help()
    about = text.split("\noptions:\n")[0]
    first, blank, example, *_ = about.splitlines()
    assert first.endswith((".", "?")) and blank == "" and "usage:" not in text
    assert re.match(r"    (CUDA_VISIBLE_DEVICES=0 )?python \S+\.py", example)
    assert re.search(r"\bNeeds\b", about) and re.search(r"\b([Ww]rites|[Pp]rints|written|Ends as)\b", about)
    for option in parser._actions:
        said = option.help or ""
        assert said, option
        if option.nargs != 0 and said != "==SUPPRESS==":
            assert re.search("default: .|require", said), option
            assert ("require" in said) >= option.required, option

    examples = re.findall(r"^    (?:\S+=\S+ )?python (?:\\\n|.)*", parser.description, re.MULTILINE)
    here = REPOSITORY if script.startswith("scripts") else (REPOSITORY / script).parent
    for words in (shlex.split(each.replace("\\\n", " "), comments=True) for each in examples):
        called, *arguments = words[words.index("python") + 1 :]
        for named in (called, *re.findall(r"\S+\.yaml", " ".join(arguments))):
            assert (here / named).exists(), named
        if (here / called).samefile(REPOSITORY / script):
            parser.parse_args(arguments)  # or UserError


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_command_line_is_one_line(script, monkeypatch, capsys):
    wrong = [] if script == "scripts/launch.py" else ["--no_such_option"]  # what follows a stage is the stage's own
    monkeypatch.setattr(sys, "argv", [script, *wrong])
    with pytest.raises(SystemExit) as stopped:
        run_stage(main_of(script))
    out, error = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert re.fullmatch(r"error: .* \(--help says how to call this\)\n", error)


def test_options_are_not_abbreviated(parser_of):
    parser = parser_of("selection/effort_score.py")
    assert parser.parse_args(["--config_path", "a"]).config_path == "a"
    with pytest.raises(UserError, match="config_path"):
        parser.parse_args(["--config", "a"])


@pytest.mark.parametrize("script", ["selection/selection.sh", "scripts/demo.sh"])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_of_the_shell_scripts(script, option):
    done = subprocess.run(["bash", REPOSITORY / script, "--quiet", option], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[1].startswith("    bash ") and "--quiet" in done.stdout and "set -euo" not in done.stdout
    header = (REPOSITORY / script).read_text(encoding="utf-8").split("\nset -euo")[0].splitlines()[1:]
    assert lines == [line.removeprefix("# ") for line in header]


@contextlib.contextmanager
def terminal():
    """stderr, as a file and as descriptor 2, is a terminal; gives a function that reads what it has shown."""
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 120))
    os.set_blocking(master, False)
    kept = os.dup(2)
    os.dup2(slave, 2)

    def shown() -> str:
        stream.flush()
        text = b""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(master, 65536):
                text += piece
        return text.decode()

    try:
        with os.fdopen(slave, "w", encoding="utf-8") as stream, contextlib.redirect_stderr(stream):
            yield shown
    finally:
        os.dup2(kept, 2)
        os.close(master)
        os.close(kept)


@pytest.fixture
def score(make_experiment, rows, call):
    """A function that scores with a small model that is not tuned, and gives what came to stdout and to stderr."""
    config = make_experiment(rows, small_training={"num_train_epochs": 0})
    return lambda *arguments: call("selection/effort_score.py", config, *arguments)


def test_results_on_stdout_and_plain_lines_on_stderr(score, tmp_path):
    folder = tmp_path / "run" / "scores" / "small"
    out, said = score()
    assert out == f"{SPECULATIVE_SCORES}: 24 rows -> {folder}\n"
    for text in ("split experiment.jsonl: 24 training", "self-test: 4 samples", f"{SPECULATIVE_SCORES} of "):
        assert text in said
    assert not re.search("\r|\x1b|%\\|", said)  # no bar in a pipe
    out, said = score()
    assert out == "" and f"{SPECULATIVE_SCORES}: reusing {folder}\n" in said


def test_a_terminal_gets_bars_without_colour(score, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    with terminal() as shown:
        score()
        text = shown()
    assert "24/24" in text and "self-test: " in text
    assert "\x1b" not in text


def test_quiet_leaves_results_and_warnings_alone(score):
    with terminal() as shown:
        out, _ = score("--quiet")
        assert (out.count("\n"), shown()) == (1, "")
        log.say("this not")
        log.warn("this")
        assert shown() == "this\r\n"


@pytest.fixture
def tune(make_experiment, rows, tmp_path):
    """A function that tunes the small model for a step, with more keys under `training:`; gives its folder."""

    def call(**training) -> Path:
        keys = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3} | training
        experiment = load_experiment(make_experiment(rows, training=keys))
        folder, split = tmp_path / "run" / "small", training_split(experiment)
        arguments = (folder, experiment.small_training, SPECULATIVE_TUNING, {})
        tune_once(experiment, experiment.small_model, "train", split.rows, *arguments)
        return folder

    return call


def test_tensorboard_writes_into_the_run_folder_and_logging_is_no_identity(tune, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    folder = tune(report_to="tensorboard", logging_steps=1)
    assert not (tmp_path / "runs").exists() and "TENSORBOARD_LOGGING_DIR" not in os.environ
    (events,) = (tmp_path / "run" / "tensorboard" / "small").glob("events.out.tfevents.*")
    log_file = EventAccumulator(str(events)).Reload()
    assert log_file.Scalars("train/loss")[0].step == 1
    events.unlink()  # the user's to remove: no part of the tuned model
    said = capsys.readouterr()
    for changes in ({}, {"report_to": "none"}, {"logging_steps": 7, "run_name": "b", "logging_first_step": True}):
        assert tune(**changes) == folder
        said = capsys.readouterr()
        assert said.out == "" and "reusing" in said.err
    with pytest.raises(UserError, match="keys\\.learning_rate: stored"):
        tune(learning_rate=1e-4)


@pytest.mark.parametrize("name", ["no_such_logger", "../x", ["tensorboard", "no_such_logger"]])
def test_a_logger_that_is_missing_is_one_error_before_anything_costs(tune, tmp_path, name):
    with pytest.raises(UserError, match=r"report_to .*: not installed: pip install"):
        tune(report_to=name)
    assert not (tmp_path / "run" / "costs.jsonl").exists() and not (tmp_path / "run" / "small").exists()


def test_the_command_line_adds_a_logger():
    assert _logs_to({"report_to": "json"}, {"report_to": "csv", "run_name": "a"}) == ["json", "csv"]
    assert _logs_to({"report_to": ["json"]}, {"report_to": "json"}) == ["json"]
    assert _logs_to({"report_to": None}, {}) == _logs_to({}, {}) == ["none"]


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_a_dry_run_says_what_the_run_then_does_and_writes_nothing(make_experiment, rows, tmp_path, call, monkeypatch):
    training = {"max_steps": 1, "per_device_train_batch_size": 2}
    config, run = make_experiment(rows, training=training), tmp_path / "run"
    dry = [
        ("finetune/finetune.py", rf"speculative tuning: would split .* and tune .* -> {run}/small\n"),
        ("selection/effort_score.py", rf"speculative scores: would score every row .* -> {run}/scores/small\n"),
        ("selection/verify.py", rf"verification: would score at most 4 x 2 rows .* -> {run}/scores/target\n"),
        ("selection/coreset.py", r"staff: would be cut at 1 rates, not yet: .*\nrandom: would be .*\n"),
    ]
    for script, said in dry:
        assert re.fullmatch(said, call(script, config, "--dry_run")[0]), script
    assert not run.exists()
    for script, before, after in (  # each stage, dry before it and after it; loading a model would be seen
        ("finetune/finetune.py", "", "speculative tuning: reusing"),
        ("selection/effort_score.py", "would score 24 of 24 rows", "speculative scores: reusing"),
        ("selection/verify.py", r"would score \d of \d rows", "verification: reusing"),
        ("selection/coreset.py", r"staff at rate 0.5: would choose 12 of 24 rows -> \S+\n", r"\(is there already\)"),
    ):
        for expected in (before, after):
            kept = contents(run)
            with monkeypatch.context() as patch:
                patch.setattr("selection.scores.models.AutoModelForCausalLM", None)
                said, _ = call(script, config, "--dry_run")
            assert re.search(expected, said) and contents(run) == kept, said
            if expected == before:
                call(script, config)
    coreset = run / "coresets" / "staff-0.5.json"
    kept = contents(run)
    said, _ = call("finetune/finetune-select.py", config, "--select_path", coreset, "--dry_run")
    model = load_experiment(config).target_model
    assert said == f"target tuning: would tune {model} on staff-0.5 (12 rows) -> {run}/target/staff-0.5\n"
    said, _ = call("finetune/eval.py", config, "--tuned", "untuned", "--dry_run")
    assert said == f"evaluation of untuned: would answer 6 held-out rows -> {run}/eval/untuned\n"
    assert contents(run) == kept


def test_a_dry_selection_ends_with_the_plan_and_touches_nothing(make_experiment, rows, tmp_path):
    config = make_experiment(rows, selection={"rates": [0.5], "quantization_bit": 8, "precision": "fp32"})
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = ["bash", REPOSITORY / "selection" / "selection.sh", config, "--quiet", "--dry_run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "run").exists()
    for line in ("speculative tuning: would split", "verification: would score", "selection in all", "at rate 0.5 sel"):
        assert f"\n{line}" in f"\n{done.stdout}"
    assert done.stdout.endswith("\ntimes are of one process on one device, without device_map and quantization_bit\n")


def test_a_plan_refuses_a_template_beyond_the_embedding(make_experiment, rows, call):
    with pytest.raises(UserError, match=r"template llama3 makes a token that .* has no embedding for"):
        call("scripts/plan.py", make_experiment(rows, template="llama3"), "--seconds", 0.1)
