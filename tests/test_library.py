"""The library in a notebook: selection/README.md's example runs, and chooses what the stages choose."""

import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY, write_jsonl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from selection import select_coreset
from selection.rows.split import training_split
from selection.rows.tokens import tokenised_split
from selection.run.config import load_experiment
from selection.run.errors import UserError
from selection.run.products import read_json
from selection.scores.folder import read_scores


def test_import_is_light():
    code = "import sys; from selection import EffortScorer, select_coreset; print('llamafactory' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_the_notebook_of_the_readme_runs(tiny_model, rows, monkeypatch, tmp_path, capsys):
    page = (REPOSITORY / "selection" / "README.md").read_text(encoding="utf-8")
    section = page.partition("## In a notebook")[2].partition("\n## ")[0]
    code = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    for name in re.findall(r'from_pretrained\("([^"]+)"', code):
        code = code.replace(name, str(tiny_model))
    write_jsonl(tmp_path / "my.jsonl", [{"prompt": row["instruction"], "completion": row["output"]} for row in rows])
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(compile(code, "selection/README.md", "exec"), space)
    coreset = space["coreset"]
    assert len(coreset.rows) == len(coreset.indices) == 3 and capsys.readouterr().out
    assert [reason.startswith("chosen") for reason in coreset.reasons] == np.isin(range(30), coreset.indices).tolist()


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_it_chooses_what_the_stages_choose(mode, make_experiment, rows, stage, tiny_model):
    config = make_experiment(rows, small_training={"num_train_epochs": 0})
    changes = ["--set", f"selection.mode={mode}", "--set", "selection.methods=[staff]"]
    for name in ("finetune.finetune", "selection.effort_score", "selection.verify", "selection.coreset"):
        code, _, error = stage(name, config, *changes)
        assert code == 0, error
    experiment = load_experiment(config, changes[1::2])
    split = training_split(experiment)
    tokens = tokenised_split(experiment, experiment.small_model, split)
    small, target = (AutoModelForCausalLM.from_pretrained(tiny_model) for _ in range(2))
    keys = {key: getattr(experiment.selection, key) for key in ("mode", "num_strata", "verify_per_stratum")}
    found = select_coreset(tokens, small, target, rate=0.5, **keys)
    stored = read_json(experiment.coresets / "staff-0.5.json")
    assert found.indices.tolist() == stored["indices"]
    factor = 2 if mode == "released" else 1
    assert np.allclose(factor * found.effort, read_scores(experiment.small_scores).effort, rtol=1e-5)
    assert found.verification_ratios == pytest.approx([s["verification_ratio"] for s in stored["strata"]], nan_ok=True)


def test_what_is_wrong_is_one_line(tiny_model, rows):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    data = Dataset.from_list([{"prompt": row["instruction"], "completion": row["output"]} for row in rows])
    for options, said in (
        ({}, "a tokenizer"),
        ({"tokenizer": tokenizer, "num_strata": 0}, "num_strata"),
        ({"tokenizer": tokenizer, "cutoff_len": 2}, "row 0 of the data set"),
    ):
        with pytest.raises(UserError, match=said):
            select_coreset(data, model, model, rate=0.1, **options)
