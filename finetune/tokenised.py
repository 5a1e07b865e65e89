"""The tokenised training split on disk (Arrow, memory-mapped), and what can be asked of it without loading its rows."""

import json
from importlib.metadata import version

import numpy as np
import pyarrow.compute as pc

from finetune import llama_factory
from finetune.data_split import TrainingSplit
from selection.config import Experiment
from selection.errors import UserError
from selection.files import building, digest, locked, model_fingerprint, reuse


def tokenised_split(experiment: Experiment, model: str, split: TrainingSplit):
    """The training split as LLaMA-Factory tokenises it for `model`: a `datasets.Dataset`, made on the first call.

    Raises: as `llama_factory.tokenised_rows`.
    """
    from datasets import load_from_disk

    identity = {
        "model": model_fingerprint(llama_factory.model_path(model), experiment.folder),
        "data_fingerprint": split.fingerprint,
        "template": experiment.template,
        "cutoff_len": experiment.cutoff_len,
        "llamafactory": version("llamafactory"),
    }
    folder = experiment.folder / "tokenised" / digest(json.dumps(identity).encode())[:16]
    with locked(folder.parent):  # two stages may come to need it at a time
        if not reuse(folder, identity):
            with building(folder, identity) as draft:
                llama_factory.tokenised_rows(experiment, model, "train", split.rows).save_to_disk(draft)
    return load_from_disk(folder)


def lengths(tokenised) -> np.ndarray:
    """Tokens of each row (N,)."""
    return pc.list_value_length(tokenised.data.column("input_ids")).to_numpy()


def check_embeddings(experiment: Experiment, model: str, loaded, tokenised) -> None:
    """Raises: UserError where rows have a token that `loaded`, the model, has no embedding for."""
    if highest_token(tokenised) >= loaded.get_input_embeddings().num_embeddings:
        raise UserError(
            f"template {experiment.template} makes a token that {model} has no embedding for: give the model's own "
            "template"
        )


def highest_token(tokenised) -> int:
    return max(pc.max(chunk.flatten()).as_py() for chunk in tokenised.data.column("input_ids").chunks)
