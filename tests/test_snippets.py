"""Every snippet of a README: Python runs on the tiny model, command lines name scripts and options that exist."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import yaml
from conftest import REPOSITORY, biology, run_main, write_jsonl

from selection.run import cli
from selection.run.config import Experiment

PAGES = [REPOSITORY / name for name in ("README.md", "data/results/README.md")]
PAGES += sorted(REPOSITORY.glob("*/README.md"))
OUTPUT = ("coreset         rows", "selection/           the stages")  # what a script prints, and the list of folders
OURS = ("python", "bash", "torchrun", "CUDA_VISIBLE_DEVICES")
EXTERNAL = ("pip", "source", "llamafactory-cli", "cd")  # train.yaml: test_export.py


def blocks(page: Path) -> list[str]:
    """Blocks indented by four spaces or fenced, less deeper ones of a list; blank lines do not end one."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    parts = re.findall(r"(?:^ {4,}\S.*\n(?:\n(?= {4}))*)+", text, re.M)
    return found + [re.sub(r"^ {4}(?: {3}(?! ))?", "", part, flags=re.M) for part in parts]


def commands(block: str) -> list[list[str]]:
    joined = block.replace("\\\n", " ").replace("&&", "\n")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def kind(block: str) -> str:
    if block.startswith(OUTPUT):
        return "output"
    if re.search(r"^(?:from|import) ", block, re.M):
        return "python"
    return "commands" if commands(block)[0][0].partition("=")[0] in (*OURS, *EXTERNAL, "FUZZ_CASES") else "yaml"


ALL = [(page, block, kind(block)) for page in PAGES for block in blocks(page)]


def check_command(words: list[str], here: Path, monkeypatch) -> Path:
    """Whether what a command line names is there and takes its options, called in `here`; the next one's folder."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[0] == "cd" and not words[1].startswith("runs/"):
        return (here / words[1]).resolve()
    if words[0] in EXTERNAL:
        assert all((here / word).exists() for word in words if word.endswith(".txt")), words
        return here
    script, *arguments = words[next(n for n, word in enumerate(words) if word.endswith((".py", ".sh"))) :]
    here = here if (here / script).exists() else REPOSITORY
    assert words[0] in OURS and (here / script).exists(), words
    for named in (word for word in arguments if re.match(r"(?:\.\./)?(?:configs|data)/\S+\.\w+$", word)):
        assert (here / named).exists(), named
    if script.endswith("selection.sh"):
        assert ("--target" in arguments) != arguments[0].endswith(("CONFIG", ".yaml")), words
        script = "start.py" if "--target" in arguments else "coreset.py"
        arguments = arguments if "--target" in arguments else ["--config_path", *arguments]
        script = f"{REPOSITORY}/selection/{script}"
    if script.endswith(".py") and "tests/" not in script:
        parser_of(here / script, monkeypatch).parse_args(arguments)  # or UserError
    return here


def parser_of(script: Path, monkeypatch):
    main, made = runpy.run_path(str(script))["main"], []
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(cli._Parser, "parse_args", lambda self, *_: made.append(self) or made[1])
        main()
    return made[0]


def test_every_block_is_of_a_kind_that_a_test_tries():
    kinds = [kind for *_, kind in ALL]
    assert (kinds.count("python"), kinds.count("yaml"), kinds.count("output")) == (4, 1, 2)
    keys = {"small_model": "a", "target_model": "b", "template": "c", "output_dir": "d"}
    for block in (block for _, block, kind in ALL if kind == "yaml"):
        assert len(Experiment.model_validate(keys | yaml.safe_load(block)).data_sets) == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_command_lines_are_taken_by_the_scripts_they_name(page, monkeypatch):
    here = page.parent
    for words in (words for at, block, kind in ALL if at == page and kind == "commands" for words in commands(block)):
        here = check_command(words, here, monkeypatch)


def test_python_of_the_exports_runs_as_printed(finished_run, tiny_model, tmp_path, monkeypatch):
    """That of the notebook: test_library.py."""
    tuning, loading = [block for _, block, kind in ALL if kind == "python" and "from selection" not in block]
    run_main("scripts.export", finished_run.folder, "--coreset", "staff-0.2", "--out", tmp_path)
    monkeypatch.chdir(tmp_path / "staff-0.2")
    shutil.copy(finished_run.dataset, "my.jsonl")
    exec(compile(tuning.replace("my-target", str(tiny_model)), "selection/README.md", "exec"), {})
    assert list(Path("trainer_output").glob("checkpoint-*/model.safetensors"))
    space = {}
    exec(compile(loading.replace("rows = my_data", "same = my_data"), "selection/README.md", "exec"), space)
    assert space["same"].to_list() == space["rows"].to_list() and len(space["rows"]) == 24


def test_the_notebook_runs_on_the_users_own_by_two_edits(tiny_model, tmp_path, monkeypatch):
    """Its scripts in this process, selection.sh as the stages that it calls."""
    target = tmp_path / "SmolLM2-360M-Instruct"
    for name in (target.name, "SmolLM2-135M-Instruct"):
        (tmp_path / name).symlink_to(tiny_model)
    write_jsonl(tmp_path / "my.jsonl", biology(40))
    (tmp_path / "scripts").mkdir()
    monkeypatch.chdir(tmp_path / "scripts")
    called, really_run = [], subprocess.run
    shell = (REPOSITORY / "selection" / "selection.sh").read_text(encoding="utf-8")
    stages_of_selection = " ".join(re.findall(r"stages\+?=\((.*)\)", shell)).split()
    quick = ["precision=fp32", "small_training.num_train_epochs=1", "evaluation.max_new_tokens=4"]

    def run(command: list, **keys):
        if command[0] == "git":
            return really_run(command, **keys)
        script, arguments = Path(command[1]).relative_to(tmp_path), command[2:]
        assert keys["check"] and (REPOSITORY / script).exists()
        called.append(script.name)
        stages = [str(script)]
        if script.suffix == ".sh":
            run_main("selection.start", *arguments, *(word for key in quick for word in ("--set", key)))
            stages, arguments = stages_of_selection, ["--config_path", arguments[5] / "start.yaml"]
        for stage in stages:
            run_main(stage.removesuffix(".py").replace("/", "."), *arguments)

    monkeypatch.setattr("subprocess.run", run)
    display = ModuleType("IPython.display")
    display.HTML = str
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    book = json.loads((REPOSITORY / "scripts" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    edits = {"HuggingFaceTB/SmolLM2-360M-Instruct": target, "my.jsonl": tmp_path / "my.jsonl"}
    space = {}
    for mine, own in edits.items():
        assert cells[0].count(f'"{mine}"') == 1
        cells[0] = cells[0].replace(mine, str(own))
    for cell in cells:
        exec(compile(cell, "quickstart.ipynb", "exec"), space)
    assert called == ["selection.sh", "export.py", "finetune-select.py", "eval.py"]
    assert space["rows"].staff_chosen.sum() == len(space["chosen"]) == 28 and "&lt;html" in space["page"]
    assert space["RUN"] == tmp_path / "runs" / "my-SmolLM2-360M-Instruct"
    assert list((space["RUN"] / "trl").glob("checkpoint-*/adapter_model.safetensors"))


def test_the_readme_quotes_the_papers_table():
    table = pd.read_csv(REPOSITORY / "data" / "paper_table1.csv")
    of = table[(table.target == "Gemma-7b") & (table.task == "DialogSum") & table.pruning_rate_percent.isin([0, 90])]
    said = of.set_index("method").rouge_l
    quoted = (
        f"90 % pruned: ROUGE-L {said['STAFF']} by STAFF, {said['Random']} at random, {said['Full data']} on all rows"
    )
    assert quoted in PAGES[0].read_text(encoding="utf-8")
