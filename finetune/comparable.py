"""ROUGE and BLEU of answers as other work computes them, by the packages rouge-score and sacreBLEU."""

import unicodedata

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics import BLEU


class UnicodeWords(Tokenizer):
    """Words of any script: lower-cased runs of letters, their marks and digits; without blanks (Thai) all is one word.

    rouge_score's own tokenizer knows a to z and 0 to 9 alone; on ASCII text the two are the same."""

    def tokenize(self, text: str) -> list[str]:
        text = unicodedata.normalize("NFC", text.lower())
        return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()


def comparable_scores(answers: list[str], references: list[str]) -> tuple[dict, dict[str, list[float]]]:
    """Scores of all answers together, and lists of each answer's, in percent; each answer has one reference.

    `rouge_score-1`, `-2` and `-l`: F-measures over `UnicodeWords`, without stemmer, and their means; `sacrebleu`: the
    corpus BLEU, which is not the mean of `sacrebleu-sentence`; `sacrebleu_signature`."""
    kinds = {"rouge_score-1": "rouge1", "rouge_score-2": "rouge2", "rouge_score-l": "rougeL"}
    scorer = RougeScorer([*kinds.values()], tokenizer=UnicodeWords())
    corpus, sentence = BLEU(), BLEU(effective_order=True)
    pairs = list(zip(answers, references, strict=True))
    rouge = [scorer.score(target=reference, prediction=answer) for answer, reference in pairs]
    by_sample = {key: [100 * each[kind].fmeasure for each in rouge] for key, kind in kinds.items()}
    overall = {key: float(np.mean(values)) for key, values in by_sample.items()}
    overall["sacrebleu"] = corpus.corpus_score(answers, [references]).score
    overall["sacrebleu_signature"] = str(corpus.get_signature())
    by_sample["sacrebleu-sentence"] = [sentence.sentence_score(answer, [label]).score for answer, label in pairs]
    return overall, by_sample
