"""export.py --lm_eval: the held-out rows as lm_eval's tasks, whose log likelihood is eval.py's."""

import importlib.util
import json

import pytest
import torch
from conftest import biology, run_main
from test_export import SHAREGPT, conversations
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.likelihood import held_out_losses
from finetune.lm_eval_tasks import write_tasks
from selection.rows.split import training_split
from selection.run.config import load_experiment
from selection.run.errors import UserError


@pytest.fixture
def tasks(finished_run, tmp_path):
    run_main("scripts.export", finished_run.folder, "--lm_eval", "--out", tmp_path)
    return tmp_path / "lm_eval"


@pytest.fixture
def held_out(tasks):
    """The module that lm_eval calls, loaded as lm_eval does."""
    spec = importlib.util.spec_from_file_location("exported", tasks / "held_out.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def rows_of(tasks) -> list[dict]:
    return [json.loads(line) for line in (tasks / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]


def test_log_likelihoods_of_the_exported_texts_are_eval_pys(tasks, held_out, finished_run):
    """By what lm_eval does with two texts (`TemplateLM._encode_pair`): blanks between them count as continuation."""
    model = AutoModelForCausalLM.from_pretrained(finished_run.target_model)
    tokenizer = AutoTokenizer.from_pretrained(finished_run.target_model)

    @torch.no_grad()
    def log_likelihood(context: str, continuation: str) -> float:
        before, tokens = (tokenizer.encode(text) for text in (context.rstrip(), context + continuation))
        odds = model(torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)
        return float(odds[range(len(odds)), tokens[1:]][len(before) - 1 :].sum())

    def nll(row: dict) -> float:
        context, both = held_out.context(row), held_out.continuations(row)
        assert (context + both[0], both[1]) == (row["prompt"], both[0] + row["response"])
        return held_out.nll(row, [(log_likelihood(context, text), False) for text in both])["nll"]

    assert "for 30 of them lm_eval counts exactly" in (tasks / "README.md").read_text(encoding="utf-8")
    ours = held_out_losses(finished_run, None, "fp32")
    assert len(ours) == 30 and [nll(row) for row in rows_of(tasks)] == pytest.approx(ours, abs=1e-5)


def test_lm_eval_itself_prints_eval_pys_figures(tasks, finished_run, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tasks)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": finished_run.target_model, "dtype": "float32"},
        tasks=["held_out_nll", "held_out_answers"],
        task_manager=TaskManager(include_path=str(tasks)),
        device="cpu",
        bootstrap_iters=0,
    )["results"]
    ours = held_out_losses(finished_run, None, "fp32")
    assert found["held_out_nll"]["nll,none"] == pytest.approx(sum(ours) / len(ours), abs=1e-5)
    assert found["held_out_answers"]["rouge_score-l,none"] >= 0


def test_rows_of_which_it_counts_less_are_counted_and_cut_ones_are_cut(make_experiment, tmp_path):
    talks = load_experiment(make_experiment(conversations(), "talks", dataset_format=SHAREGPT, eval_size=0.5))
    long = load_experiment(make_experiment(biology(10), "long", cutoff_len=40, output_dir=str(tmp_path / "long")))
    for experiment in (talks, long):
        training_split(experiment)
    single = sum(row["prompt"].count("assistant\n") == 1 for row in rows_of(written(talks, tmp_path / "a")))
    assert f"5 rows; for {single} of them" in (tmp_path / "a" / "README.md").read_text() and single < 5
    assert {row["tokens"] < 40 for row in rows_of(written(long, tmp_path / "b"))} == {True}
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match="holds no tasks of a run"):
        write_tasks(long, tmp_path / "c")


def written(experiment, folder):
    write_tasks(experiment, folder)
    return folder
