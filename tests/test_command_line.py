"""Command lines: --help of every script, its examples, errors, and what goes to stdout, to stderr and nowhere."""

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys

from selection.run.ending import run_stage

import pytest
from conftest import REPOSITORY, everything_in

import selection
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
def not_quiet():
    yield
    log.be_quiet(False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_the_version_before_it_asks_for_anything(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / script))["main"]()
    assert stop.value.code == 0 and capsys.readouterr().out == f"{selection.__version__}\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_enough_to_call_a_script_and_a_wrong_command_line_is_one_line(script, monkeypatch, capsys):
    main, made = runpy.run_path(str(REPOSITORY / script))["main"], []
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(cli._Parser, "parse_args", lambda self, *_: made.append(self) or made[1])
        main()
    parser = made[0]
    text = parser.format_help()
    about = text.split("\noptions:\n")[0]
    assert re.match(r".*[.?]\n\n    (CUDA_VISIBLE_DEVICES=0 )?python \S+\.py", about) and "usage:" not in text
    assert re.search(r"\bNeeds\b", about) and re.search(r"\b([Ww]rites|[Pp]rints|written|Ends as)\b", about)
    for option in parser._actions:
        said = option.help
        assert said and ("require" in said) >= option.required, option
        assert option.nargs == 0 or re.search("default: .|require|==SUPPRESS==", said), option

    examples = re.findall(r"^    (?:\S+=\S+ )?python (?:\\\n|.)*", parser.description, re.MULTILINE)
    here = REPOSITORY if script.startswith("scripts") else (REPOSITORY / script).parent
    for words in (shlex.split(each.replace("\\\n", " "), comments=True) for each in examples):
        called, *arguments = words[words.index("python") + 1 :]
        for named in (called, *re.findall(r"\S+\.yaml", " ".join(arguments))):
            assert (here / named).exists(), named
        if (here / called).samefile(REPOSITORY / script):
            parsed = parser.parse_args(arguments)  # or UserError
            takes_it_alone = {action.dest for action in parser._actions if not action.option_strings} == {"config_path"}
            if "--config_path" in arguments and takes_it_alone:
                place = arguments.index("--config_path")
                config, rest = arguments[place + 1], arguments[:place] + arguments[place + 2 :]
                alone = [config, *(re.sub("(?<=[a-z])_", "-", each) if each[:2] == "--" else each for each in rest)]
                assert parser.parse_args(alone) == parsed
                with pytest.raises(UserError, match="not allowed with"):
                    parser.parse_args([config, *arguments])

    wrong = [] if script == "scripts/launch.py" else ["--quie"]  # no abbreviations; a stage's arguments are its own
    monkeypatch.setattr(sys, "argv", [script, *wrong])
    with pytest.raises(SystemExit) as stopped:
        run_stage(main)
    (out, error), said = capsys.readouterr(), r"error: .* \(--help says how to call this\)\n"
    assert stopped.value.code == 2 and out == "" and re.fullmatch(said, error)


@pytest.mark.parametrize(("script", "option"), [("selection/selection.sh", "--help"), ("scripts/demo.sh", "-h")])
def test_help_of_the_shell_scripts(script, option):
    done = subprocess.run(["bash", REPOSITORY / script, "--quiet", option], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    header = (REPOSITORY / script).read_text(encoding="utf-8").split("\nset -euo")[0].splitlines()[1:]
    assert done.stdout.splitlines() == [line.removeprefix("# ") for line in header] and "--quiet" in done.stdout


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def score(make_experiment, rows, stage):
    """A function that scores with a small model that is not tuned, and gives what came to stdout and to stderr."""
    config = make_experiment(rows, small_training={"num_train_epochs": 0})
    return lambda *arguments: stage("selection.effort_score", config, *arguments)[1:]


def test_results_on_stdout_and_plain_lines_on_stderr(score, tmp_path):
    folder = tmp_path / "run" / "scores" / "small"
    out, said = score()
    assert out == f"{SPECULATIVE_SCORES}: 24 rows -> {folder}\n"
    assert "split experiment.jsonl: 24 training" in said and "self-test: 4 samples" in said
    assert not re.search("\r|\x1b|%\\|", said)  # no bar in a pipe
    out, said = score()
    assert out == "" and f"{SPECULATIVE_SCORES}: reusing {folder}\n" in said


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_gets_bars_without_colour_but_quiet_leaves_results_and_warnings_alone(score, monkeypatch, quiet):
    monkeypatch.setenv("NO_COLOR", "1")
    with contextlib.redirect_stderr(Terminal()) as shown:
        out, _ = score(*["--quiet"] * quiet)
        log.say("this not")
        log.warn("this")
    assert out.count("\n") == 1 and "\x1b" not in shown.getvalue()
    assert shown.getvalue() == "this\n" if quiet else re.search("self-test: (.|\n)*24/24", shown.getvalue())


@pytest.fixture
def tune(make_experiment, rows, tmp_path):
    """A function that tunes the small model for a step, with more keys under `training:`."""

    def call(**training) -> None:
        keys = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3} | training
        experiment = load_experiment(make_experiment(rows, training=keys))
        arguments = (tmp_path / "run" / "small", experiment.small_training, SPECULATIVE_TUNING, {})
        tune_once(experiment, experiment.small_model, "train", training_split(experiment).rows, *arguments)

    return call


def test_tensorboard_writes_into_the_run_folder_and_logging_is_no_identity(tune, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    tune(report_to="tensorboard", logging_steps=1)
    assert not (tmp_path / "runs").exists() and "TENSORBOARD_LOGGING_DIR" not in os.environ
    (events,) = (tmp_path / "run" / "tensorboard" / "small").glob("events.out.tfevents.*")
    assert EventAccumulator(str(events)).Reload().Scalars("train/loss")[0].step == 1
    events.unlink()  # the user's to remove: no part of the tuned model
    capsys.readouterr()
    tune(report_to="none", logging_steps=7, run_name="b", logging_first_step=True)
    assert "reusing" in capsys.readouterr().err
    with pytest.raises(UserError, match="keys\\.learning_rate: stored"):
        tune(learning_rate=1e-4)


def test_the_command_line_adds_a_logger_and_a_missing_one_is_one_error_before_anything_costs(tune, tmp_path):
    assert _logs_to({"report_to": "json"}, {"report_to": "csv", "run_name": "a"}) == ["json", "csv"]
    with pytest.raises(UserError, match=r"report_to .*: not installed: pip install"):
        tune(report_to=["json", "no_such_logger"])
    assert not (tmp_path / "run" / "costs.jsonl").exists() and not (tmp_path / "run" / "small").exists()


def test_a_dry_run_says_what_the_run_then_does_and_writes_nothing(make_experiment, rows, tmp_path, stage, monkeypatch):
    training = {"max_steps": 1, "per_device_train_batch_size": 2}
    config, run = make_experiment(rows, training=training), tmp_path / "run"

    def dry(name: str, *arguments: object) -> str:
        kept = everything_in(run)
        with monkeypatch.context() as patch:  # loading a model would be seen
            patch.setattr("selection.scores.models.AutoModelForCausalLM", None)
            code, said, error = stage(name, config, *arguments, "--dry_run")
        assert code == 0 and everything_in(run) == kept, error
        return said

    stages = {  # what is said on an empty run folder, before the stage and after it
        "finetune.finetune": ("would split .* and tune .* -> ", "would split", "speculative tuning: reusing"),
        "selection.effort_score": ("would score every row", "would score 24 of 24 rows", "reusing"),
        "selection.verify": ("would score at most 4 x 2 rows", r"would score \d of \d rows", "verification: reusing"),
        "selection.coreset": ("staff: would be cut at 1 rates, not yet", "choose 12 of 24 rows", "is there already"),
    }
    coreset = run / "coresets" / "staff-0.5.json"
    for name, (at_first, _, _) in stages.items():
        assert re.search(at_first, dry(name))
    said = dry("finetune.finetune-select", "--select_path", coreset)
    assert said == f"target tuning: would tune the target on staff-0.5, once there is {coreset}\n"
    assert re.fullmatch("evaluation: would split .* and evaluate every tuned target\n", dry("finetune.eval"))
    assert not run.exists()
    for name, (_, before, after) in stages.items():
        assert re.search(before, dry(name))
        assert stage(name, config)[0] == 0
        assert re.search(after, dry(name))
    said = dry("finetune.finetune-select", "--select_path", coreset)
    assert re.fullmatch(rf"target tuning: would tune .* on staff-0.5 \(12 rows\) -> {run}/target/staff-0.5\n", said)
    said = dry("finetune.eval", "--tuned", "untuned", "staff-0.5").splitlines()
    assert said[0] == "evaluation of staff-0.5: would answer 6 held-out rows, once it is tuned"
    assert said[1] == f"evaluation of untuned: would answer 6 held-out rows -> {run}/eval/untuned"
