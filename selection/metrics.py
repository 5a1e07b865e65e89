"""What an evaluation leaves in its metrics.json, checked when it is read."""

from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import Field, PositiveInt
from typing_extensions import TypedDict

from selection.files import checked, read_json

_Percent = Annotated[float, Field(ge=0, le=100.001, allow_inf_nan=False)]
Metrics = TypedDict(
    "Metrics",
    {
        "rouge-1": _Percent,
        "rouge-2": _Percent,
        "rouge-l": _Percent,
        "bleu-4": _Percent,
        "samples": PositiveInt,
        "code_version": str,
        "by_sample": NotRequired[dict[str, list[_Percent]]],  # of each answer
    },
)


def read_metrics(folder: Path) -> Metrics:
    """The metrics of an evaluation's folder. Raises: UserError naming the key that is missing or no percentage."""
    path = folder / "metrics.json"
    return checked(Metrics, read_json(path), path)
