"""What an evaluation leaves in its metrics.json, checked when it is read."""

from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import Field, NonNegativeInt, PositiveInt
from typing_extensions import TypedDict

from selection.run.products import read_json

# Said wherever the figures are shown.
LLAMA_FACTORYS = (
    "ROUGE-1/2/L and BLEU-4 are LLaMA-Factory's, as in the paper: words as jieba cuts them (Cyrillic and Arabic into "
    "letters, Latin words at accented ones), BLEU over characters."
)
ABOUT = f"{LLAMA_FACTORYS} Only those of rouge_score and sacreBLEU compare with other work."

NLL = "nll"  # the column of the held-out negative log likelihood, wherever figures are kept
_Percent = Annotated[float, Field(ge=0, le=100.001, allow_inf_nan=False)]
_Nats = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_OURS = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
_OF_OTHER_WORK = ("rouge_score-1", "rouge_score-2", "rouge_score-l", "sacrebleu")  # earlier evaluations have none
Metrics = TypedDict(
    "Metrics",
    dict.fromkeys((*_OURS, *_OF_OTHER_WORK), NotRequired[_Percent])  # none where no answers were generated
    | {NLL: NotRequired[_Nats]}
    | {"sacrebleu_signature": NotRequired[str], "samples": PositiveInt, "code_version": str}
    | {"copies_in_training": NotRequired[NonNegativeInt]}  # held-out rows of which the training split has a copy
    | {"by_sample": NotRequired[dict[str, list[_Nats]]]},  # of each answer
)


def read_metrics(folder: Path) -> Metrics:
    """The metrics of an evaluation's folder. Raises: UserError naming the key that is missing or no percentage."""
    return read_json(folder / "metrics.json", Metrics)


def shown_figure(metrics: Metrics, key: str) -> str:
    """A figure of an evaluation, percentages with two decimals; a dash where there is none."""
    return f"{metrics[key]:.{3 if key == NLL else 2}f}" if key in metrics else "–"
