"""Rows that are longer than cutoff_len: said once, and noted in the run folder for what leaves it."""

from pathlib import Path

import numpy as np
from pydantic import NonNegativeInt
from typing_extensions import TypedDict

from selection.run.config import Experiment
from selection.run.log import say
from selection.run.products import locked, read_json, write_json


class _Cut(TypedDict):
    template: str
    cutoff_len: int
    longest: NonNegativeInt
    rows: list[NonNegativeInt]


def note_cut(experiment: Experiment, model: str, lengths: list[int]) -> None:
    """Note which rows of the training split are cut, by the tokens (N,) that `model`'s tokenizer makes of them whole.

    Says so where no other model's tokenizer had the same to say."""
    rows, longest, path = np.flatnonzero(np.array(lengths) > experiment.cutoff_len), max(lengths), _path(experiment)
    own = _settings(experiment) | {"longest": longest, "rows": rows.tolist()}
    with locked(experiment.data_folder):
        known = read_json(path, dict[str, _Cut]) if path.exists() else {}
        if len(rows) and own not in known.values():
            cut = f"{len(rows):,} of {len(lengths):,} training rows are longer than cutoff_len {experiment.cutoff_len}"
            say(f"{cut} and are cut to it (the longest has {longest:,} tokens): raise cutoff_len to keep them whole")
        if known.get(model) != own:
            write_json(path, known | {model: own})


def cut_rows(experiment: Experiment) -> np.ndarray | None:
    """The rows of the training split that cutoff_len cuts, as the small model, else the target, was given them.

    None: not known, as nothing was tokenised, or by an earlier version."""
    known = read_json(path, dict[str, _Cut]) if (path := _path(experiment)).exists() else {}
    for model in (experiment.small_model, experiment.target_model):
        if (cut := known.get(model)) and cut | _settings(experiment) == cut:
            return np.array(cut["rows"], dtype=np.int64)
    return None


def _path(experiment: Experiment) -> Path:
    return experiment.data_folder / "cut.json"


def _settings(experiment: Experiment) -> dict[str, str | int]:
    return {"template": experiment.template, "cutoff_len": experiment.cutoff_len}
