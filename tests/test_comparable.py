"""ROUGE and BLEU of other work beside the paper's: against the packages themselves, in several scripts."""

import importlib
import json
import sys

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from finetune.comparable import UnicodeWords, comparable_scores
from selection.run.config import load_experiment
from selection.run.metrics import read_metrics, shown_figure

ENGLISH = [
    ("The cell divides into two cells.", "The cell, it divides into two daughter cells!"),
    ("p53 regulates 2 genes", "P53 regulates two genes"),
    ("", "an answer"),
    ("nothing in common", "wholly other words"),
]
OTHERS = [  # answer, reference, words in common, words of the answer, of the reference
    ("Жасуша екіге бөлінеді.", "Жасуша бөлінеді", 2, 3, 2),
    ("تنقسم الخلية، إلى خليتين", "الخلية تنقسم إلى خليتين", 4, 4, 4),
    ("La cellule naïve à côté", "la cellule naive, à CÔTÉ", 4, 5, 5),
    ("nai\u0308ve", "na\u00efve", 1, 1, 1),  # the same letter, composed or not
    ("कोशिका विभाजित होती है", "कोशिका होती है", 3, 4, 3),  # vowel signs belong to their words
]


def test_ascii_text_has_the_packages_own_figures():
    answers, references = map(list, zip(*ENGLISH, strict=True))
    overall, by_sample = comparable_scores(answers, references)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])  # its own tokenizer, no stemmer
    for key, kind in {"rouge_score-1": "rouge1", "rouge_score-2": "rouge2", "rouge_score-l": "rougeL"}.items():
        theirs = [100 * scorer.score(reference, answer)[kind].fmeasure for answer, reference in ENGLISH]
        assert by_sample[key] == theirs and theirs[0] > 0 and theirs[2:] == [0, 0]
        assert overall[key] == pytest.approx(np.mean(theirs))
    assert overall["sacrebleu"] == sacrebleu.corpus_bleu(answers, [references]).score > 0
    assert by_sample["sacrebleu-sentence"] == [sacrebleu.sentence_bleu(a, [r]).score for a, r in ENGLISH]
    version = sacrebleu.__version__
    assert overall["sacrebleu_signature"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}"


def test_words_of_other_scripts_count_as_words():
    for answer, reference, common, of_answer, of_reference in OTHERS:
        overall, _ = comparable_scores([answer], [reference])
        assert overall["rouge_score-1"] == pytest.approx(100 * 2 * common / (of_answer + of_reference))
        assert overall["sacrebleu"] == sacrebleu.corpus_bleu([answer], [[reference]]).score
    assert UnicodeWords().tokenize("Ёлка_2, «à-côté» x²!") == ["ёлка", "2", "à", "côté", "x²"]


def test_metrics_hold_both_kinds_and_those_without_are_read(make_experiment, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    evaluation = importlib.import_module("finetune.eval")
    answers, references = map(list, zip(*(pair[:2] for pair in [*ENGLISH, *OTHERS]), strict=True))
    lines = [json.dumps({"predict": a, "label": r}) for a, r in zip(answers, references, strict=True)]
    (tmp_path / "predictions.jsonl").write_text("\n".join(lines))
    computed = {f"predict_{metric}": 1.0 for metric in evaluation.METRICS}
    metrics = {"samples": len(answers), "code_version": "1", "by_sample": {}}
    evaluation.add_answers(metrics, load_experiment(make_experiment(rows)), tmp_path, computed)
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    metrics = read_metrics(tmp_path)
    overall, by_sample = comparable_scores(answers, references)
    assert {key: metrics[key] for key in overall} == pytest.approx(overall, abs=1e-4)
    assert {*metrics["by_sample"]} == {*evaluation.METRICS, *by_sample}
    assert all(metrics["by_sample"][key] == pytest.approx(values, abs=1e-4) for key, values in by_sample.items())
    earlier = {key: value for key, value in metrics.items() if key not in overall}
    (tmp_path / "metrics.json").write_text(json.dumps(earlier))
    assert shown_figure(read_metrics(tmp_path), "sacrebleu") == "–"
