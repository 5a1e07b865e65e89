"""Look at every row of a pool with an untuned model, and list the suspect ones in <run folder>/pool."""

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from selection.report.agreement import spearman
from selection.rows.conversation import as_messages
from selection.rows.split import TrainingSplit, rows_of, split_numbers
from selection.rows.tokens import empty_turn, tokenised_rows
from selection.run.config import Experiment
from selection.run.device import choose_precision, device_name
from selection.run.errors import UserError
from selection.run.ledger import LOOK, Cost, measured
from selection.run.log import say
from selection.run.model_folder import model_path
from selection.run.products import atomic_path, code_version, locked, read_json, refuse_difference, write_json
from selection.scores.folder import has_column, is_finished, read_scores
from selection.scores.identity import fingerprint_of, placement
from selection.scores.models import count_parameters
from selection.scores.pool import Pool, Suspect, read_suspects, suspects_in_training
from selection.scores.row_figures import load_row_scorer, row_figures
from selection.scores.suspects import KINDS, find_suspects, how_far_to_trust

_FILES = "pool.json", "suspects.jsonl"
_COLUMNS = ("hidden_state",)  # beside loss and effort, all that find_suspects reads of a whole pass


def look_at_rows(
    experiment: Experiment, split: TrainingSplit | None, folder: Path, dry_run: bool = False
) -> tuple[Pool, list[Suspect]] | None:
    """What is wrong with the rows of the data, held-out ones too: suspects.jsonl and pool.json in `folder`, made where
    they are not there yet. Returns both as they are now; None under `dry_run`, which only says what would be done.
    Raises: UserError where they are of other data or another model, or damaged."""
    about, path = (folder / name for name in _FILES)
    if dry_run:
        there = about.exists() and path.exists()
        model = _small_or_target(experiment, folder)
        print(f"{LOOK}: would {'take the list of' if there else f'list suspect rows with {model} ->'} {path}")
        return None
    with locked(folder):  # two jobs of a grid may ask at the same time
        if _is_listed(experiment, split, folder):
            say(f"reusing {path}: remove it to look again")
        else:
            _look(experiment, split, folder)
    pool, suspects = read_json(about, Pool), read_suspects(path)
    counts = Counter(suspect.get("kind", "listed") for suspect in suspects)
    kinds = f" ({', '.join(f'{kind} {count}' for kind, count in counts.items())})" if counts else ""
    print(f"{len(suspects)} of {pool['rows']} rows are suspect{kinds} -> {path}")
    if trust := how_far_to_trust(pool.get("tried", {})):
        say(trust)
    return pool, suspects


def check_list(experiment: Experiment, split: TrainingSplit) -> None:
    """Raises: UserError for a list that `selection.leave_out` asks for and cannot be taken: before anything is paid."""
    if experiment.selection.leave_out == "suspects":
        _is_listed(experiment, split, experiment.pool)


def _is_listed(experiment: Experiment, split: TrainingSplit, folder: Path) -> bool:
    if not all((folder / name).exists() for name in _FILES):
        return False
    stored, model = read_json(folder / _FILES[0], Pool), _small_or_target(experiment, folder)
    todo = "give the settings it was made with, or remove it to have the rows looked at again"
    refuse_difference(folder, stored, stored | _made_from(experiment, split, model), todo)
    suspects_in_training(experiment, folder)
    return True


def _made_from(experiment: Experiment, split: TrainingSplit, model: str) -> dict:
    about = {"data_fingerprint": split.fingerprint, "template": experiment.template}
    return about | {"cutoff_len": experiment.cutoff_len, "model_fingerprint": fingerprint_of(experiment, model)}


def _small_or_target(experiment: Experiment, folder: Path) -> str:
    """The model that looks at the rows; the one that did so before, also where the small model has come since."""
    models = experiment.small_model, experiment.target_model
    if (path := folder / "pool.json").exists() and (before := read_json(path, Pool)["model"]) in models:
        return before
    try:
        model_path(experiment.small_model)
        return experiment.small_model
    except UserError:
        say(f"small model {experiment.small_model} is not there yet: the target looks at the rows")
        return experiment.target_model


def _look(experiment: Experiment, split: TrainingSplit, folder: Path) -> None:
    """Write suspects.jsonl, then pool.json, which says that both are whole."""
    started, model = time.monotonic(), _small_or_target(experiment, folder)
    about, precision = _made_from(experiment, split, model), choose_precision(experiment.selection.precision)
    parts = {"train": split.rows} | ({} if experiment.eval_data else {"eval": rows_of(experiment, "eval")})
    numbers = np.concatenate([split_numbers(experiment)[name] for name in parts])
    tokenised = [tokenised_rows(experiment, model, *part) for part in parts.items()]
    around = empty_turn(experiment, model)
    with measured(experiment.folder, Cost(LOOK, model, device=device_name(), precision=precision)) as cost:
        tokens, placed = experiment.selection.tokens_per_batch, placement(experiment, model, None)
        scorer = load_row_scorer(model, precision, _COLUMNS, tokens, **placed)
        cost.parameters = count_parameters(scorer.model)
        figures, known = [], {}
        for rows, stored in zip(tokenised, [_stored_figures(experiment, model), None], strict=False):
            figures.append(row_figures(rows, scorer, around, known, stored, cost))
    columns = {name: np.concatenate([each[name] for each in figures]) for name in figures[0]}
    entry = experiment.row_format.entry
    turns = [as_messages(row, entry) for rows in parts.values() for row in rows]
    prompts = ["\n".join(turn["content"] for turn in messages[:-1]) for messages in turns]
    answers = [messages[-1]["content"] for messages in turns]
    order = np.argsort(numbers)  # as the rows stand in the data
    columns = {name: values[order] for name, values in columns.items()}
    prompts, answers = ([texts[row] for row in order] for texts in (prompts, answers))
    found, tried = find_suspects(prompts, answers, columns)
    write_suspects(folder / "suspects.jsonl", found, prompts, answers, numbers[order].tolist())
    by_length = spearman(columns["effort"], columns["n_response_tokens"])
    about |= {"model": model, "rows": len(order), "suspects": len(found)}
    about |= {"kinds": {kind: int((found.kind == kind).sum()) for kind in KINDS}}
    about |= {"tried": tried}
    about |= {"effort_by_length": None if np.isnan(by_length) else round(by_length, 3)}
    about |= {"seconds": round(time.monotonic() - started, 1), "code_version": code_version()}
    write_json(folder / "pool.json", about)


def _stored_figures(experiment: Experiment, model: str) -> dict[str, np.ndarray] | None:
    """Of the training rows, from the untuned target's scores; None where it has not scored all of them with these
    figures, or another `model` looks."""
    folder = experiment.small_scores
    if not (experiment.direct and model == experiment.target_model and is_finished(folder)):
        return None
    if not all(has_column(folder, name) for name in _COLUMNS):
        return None
    scores = read_scores(folder, ("loss", "effort", *_COLUMNS), ids=False).check_complete()
    return None if len(scores.left_out) else scores.columns


def write_suspects(path: Path, found: pd.DataFrame, prompts: list[str], answers: list[str], rows: list[int]) -> None:
    """`rows`: the rows' numbers in the data, where some may be left out."""
    found = found.round(4).replace([np.inf, -np.inf], np.nan).astype(object)
    with atomic_path(path) as draft, draft.open("w", encoding="utf-8") as file:
        for suspect in found.where(found.notna(), None).to_dict("records"):
            own, first = suspect["row"], suspect["group"]
            suspect |= {"row": rows[own], "group": rows[first] if first >= 0 else first}
            suspect |= {"prompt": prompts[own], "answer": answers[own]}
            file.write(json.dumps(suspect, ensure_ascii=False) + "\n")
