"""Command lines: --help of every script, its examples, errors, and what goes to stdout, to stderr and nowhere."""

import contextlib
import os
import re
import runpy
import shlex
import subprocess
import sys
import termios

import pytest
from conftest import REPOSITORY

from selection import log, stage
from selection.errors import UserError, run_stage
from selection.ledger import SPECULATIVE_SCORES

STAGES = ["finetune/finetune.py", "finetune/finetune-select.py", "finetune/eval.py"]
STAGES += [f"selection/{name}.py" for name in ("effort_score", "verify", "coreset", "costs", "launch")]
SCRIPTS = STAGES + sorted(f"scripts/{path.name}" for path in (REPOSITORY / "scripts").glob("*.py"))


@pytest.fixture(autouse=True)
def signals_and_quiet_as_before():
    import signal

    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)
    log.be_quiet(False)


def main_of(script: str):
    return runpy.run_path(str(REPOSITORY / script))["main"]


class _Parsed(Exception):
    pass


@pytest.fixture
def parser_of(monkeypatch):
    """A function that gives a script's parser as the script makes it."""

    def parser(script: str):
        def stop(self, *arguments):
            raise _Parsed(self)

        with monkeypatch.context() as patch:
            patch.setattr(stage._Parser, "parse_args", stop)
            patch.setattr(sys, "argv", [script])
            with pytest.raises(_Parsed) as stopped:
                main_of(script)()
        return stopped.value.args[0]

    return parser


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_enough_to_call_a_script(script, parser_of, monkeypatch, capsys):
    parser = parser_of(script)
    text = parser.format_help()
    about = text.split("\noptions:\n")[0]
    first, blank, example, *_ = about.splitlines()
    assert first.endswith((".", "?")) and blank == ""
    assert re.match(r"    (CUDA_VISIBLE_DEVICES=0 )?python \S+\.py", example)
    assert re.search(r"\bNeeds\b", about) and re.search(r"\b([Ww]rites|[Pp]rints|written|Ends as)\b", about)
    for option in parser._actions:
        if option.nargs == 0:
            assert option.help, option.option_strings
        elif option.help != "==SUPPRESS==":
            said = option.help or ""
            assert re.search("default: .|require", said), option
            assert ("require" in said) >= option.required, option
            if option.default and "%(default)s" not in said and "; default: " in said:
                values = option.default if isinstance(option.default, list) else [option.default]
                known = "all" in said or any(str(value)[-8:].strip("/") in said for value in values)
                assert known or "1 to 10" in said, option
    assert "usage:" not in text

    examples = re.findall(r"^    (?:\S+=\S+ )?python (?:\\\n|.)*", parser.description, re.MULTILINE)
    here = REPOSITORY if script.startswith("scripts") or script.endswith("launch.py") else REPOSITORY / script
    here = here if here.is_dir() else here.parent
    for words in (shlex.split(each.replace("\\\n", " "), comments=True) for each in examples):
        called, *arguments = words[words.index("python") + 1 :]
        assert (here / called).exists()
        for named in re.findall(r"\S+\.yaml", " ".join(arguments)):
            assert (here / named).exists(), named
        if (here / called).samefile(REPOSITORY / script):
            parser.parse_args(arguments)  # or UserError


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_command_line_is_one_line(script, monkeypatch, capsys):
    wrong = [] if script == "selection/launch.py" else ["--no_such_option"]  # what follows a stage is the stage's own
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
    kept = os.dup(2)
    os.dup2(slave, 2)
    stream = os.fdopen(slave, "w", encoding="utf-8")

    def shown() -> str:
        stream.flush()
        os.set_blocking(master, False)
        text = b""
        try:
            while piece := os.read(master, 65536):
                text += piece
        except BlockingIOError:
            pass
        return text.decode()

    try:
        with contextlib.redirect_stderr(stream):
            yield shown
    finally:
        os.dup2(kept, 2)
        stream.close()
        os.close(master)
        os.close(kept)


@pytest.fixture
def score(make_experiment, rows, tmp_path, monkeypatch, capfd):
    """A function that scores with a small model that is not tuned, and gives what came to stdout and to stderr."""

    def call(name: str, *arguments: str) -> tuple[str, str]:
        path = make_experiment(rows, output_dir=str(tmp_path / name), small_training={"num_train_epochs": 0})
        monkeypatch.setattr(sys, "argv", ["effort_score.py", "--config_path", str(path), *arguments])
        capfd.readouterr()
        main_of("selection/effort_score.py")()
        return capfd.readouterr()

    return call


def test_results_on_stdout_and_plain_lines_on_stderr(score, tmp_path):
    folder = tmp_path / "run" / "scores" / "small"
    out, said = score("run")
    assert out == f"{SPECULATIVE_SCORES}: 24 rows -> {folder}\n"
    for text in ("split experiment.jsonl: 24 training", "self-test: 4 samples", f"{SPECULATIVE_SCORES} of "):
        assert text in said
    assert not re.search("\r|\x1b|%\\|", said)  # no bar in a pipe
    out, said = score("run")
    assert out == "" and f"{SPECULATIVE_SCORES}: reusing {folder}\n" in said


def test_a_terminal_gets_bars_without_colour(score, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    with terminal() as shown:
        score("run")
        text = shown()
    assert "24/24" in text and "self-test: " in text
    assert "\x1b" not in text


def test_quiet_leaves_results_and_warnings_alone(score):
    with terminal() as shown:
        out, _ = score("run", "--quiet")
        assert (out.count("\n"), shown()) == (1, "")
        log.say("this not")
        log.warn("this")
        assert shown() == "this\r\n"
