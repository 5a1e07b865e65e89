"""Look at a pool before paying for it: which rows are probably wrong, repeated or odd, and what selection could gain.

    python scripts/check_pool.py --config_path configs/demo.yaml --out runs/check
    python scripts/check_pool.py --target Qwen/Qwen2.5-7B --data my.jsonl --out runs/check

Needs the small model (the target where there is none yet) and the data; nothing is tuned. One pass over all rows,
held-out ones too. Prints what was found; writes OUT/suspects.jsonl, a line for each suspect row, worst first (row: its
number in the data, from 0), and OUT/pool.json with the counts.
"""

import json
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

import numpy as np
import pandas as pd
from datasets import concatenate_datasets

from selection.method.effort import EffortScorer
from selection.report.agreement import spearman
from selection.rows.conversation import as_messages
from selection.rows.split import rows_of, split_numbers, training_split
from selection.rows.tokens import empty_turn, tokenised_rows
from selection.run.cli import add_experiment_arguments, argument_parser
from selection.run.config import Experiment, load_experiment
from selection.run.device import choose_precision
from selection.run.errors import UserError
from selection.run.log import say
from selection.run.model_folder import model_path
from selection.run.products import atomic_path, code_version, write_json
from selection.scores.models import load_for_scoring
from selection.scores.row_figures import COLUMNS, row_figures
from selection.scores.suspects import KINDS, find_suspects
from selection.start import start

STARTED = time.monotonic()
_SHOWN, _LETTERS = 3, 100  # rows of each kind that are printed, and letters of each


def main() -> None:
    experiment, cut, out = load()
    split = training_split(experiment)
    out = out or experiment.folder / "pool"
    parts = {"train": split.rows} | ({} if experiment.eval_data else {"eval": rows_of(experiment, "eval")})
    numbers = np.concatenate([split_numbers(experiment)[name] for name in parts])
    model = small_or_target(experiment, cut)
    tokenised = concatenate_datasets([tokenised_rows(experiment, model, *part) for part in parts.items()])
    scorer = EffortScorer(
        load_for_scoring(model_path(model), None, choose_precision(experiment.selection.precision)), columns=COLUMNS
    )
    columns = row_figures(tokenised, scorer, empty_turn(experiment, model))
    entry = experiment.row_format.entry
    turns = [as_messages(row, entry) for rows in parts.values() for row in rows]
    prompts = ["\n".join(turn["content"] for turn in messages[:-1]) for messages in turns]
    answers = [messages[-1]["content"] for messages in turns]
    order = np.argsort(numbers)  # as the rows stand in the data
    columns = {name: values[order] for name, values in columns.items()}
    prompts, answers = ([texts[row] for row in order] for texts in (prompts, answers))
    found = find_suspects(prompts, answers, columns)
    write_suspects(out / "suspects.jsonl", found, prompts, answers)
    summary = {"rows": len(order), "model": model, "code_version": code_version(), "suspects": len(found)}
    summary |= {"kinds": {kind: int((found.kind == kind).sum()) for kind in KINDS}}
    by_length = spearman(columns["effort"], columns["n_response_tokens"])
    summary |= {"effort_by_length": round(by_length, 3), "seconds": round(time.monotonic() - STARTED, 1)}
    write_json(out / "pool.json", summary)
    print(f"{len(found)} of {len(order)} rows are suspect -> {out / 'suspects.jsonl'}")
    for kind, about in KINDS.items():
        rows = found[found.kind == kind]
        if len(rows):
            print(f"\n{kind}: {len(rows)} rows ({about})")
            for row in rows.row.head(_SHOWN):
                print(f"  row {row}: {shortened(prompts[row])} -> {shortened(answers[row])}")
    print(f"\neffort score against response length: rank correlation {by_length:+.2f} (±1: the score is the length)")


def load() -> tuple[Experiment, bool, Path | None]:
    """The experiment, whether its small model is still to be cut, and --out."""
    parser = argument_parser(__doc__)
    add_experiment_arguments(parser, required=False)
    parser.add_argument("--target", metavar="MODEL", help="instead of --config_path, as selection.sh takes it")
    parser.add_argument("--data", nargs="+", type=Path, metavar="FILE", help="with --target: data files")
    parser.add_argument("--small", metavar="MODEL", help="with --target: speculative model; default: the family's")
    parser.add_argument("--template", metavar="NAME", help="with --target: chat template; default: the family's")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: the folder pool of the run folder")
    given = parser.parse_args()
    if bool(given.config_path) == bool(given.target) or bool(given.target) != bool(given.data):
        raise UserError("give --config_path, or --target and --data")
    if given.config_path:
        return load_experiment(given.config_path, given.set), False, given.out
    path, cut = start(given.target, given.data, given.small, given.template, overrides=given.set)
    return load_experiment(path), bool(cut), given.out


def small_or_target(experiment: Experiment, cut: bool) -> str:
    try:
        if not cut:
            model_path(experiment.small_model)
            return experiment.small_model
    except UserError:
        pass
    say(f"small model {experiment.small_model} is not there yet: the target looks at the rows")
    return experiment.target_model


def write_suspects(path: Path, found: pd.DataFrame, prompts: list[str], answers: list[str]) -> None:
    with atomic_path(path) as draft, draft.open("w", encoding="utf-8") as file:
        for suspect in found.round(4).to_dict("records"):
            suspect |= {"prompt": prompts[suspect["row"]], "answer": answers[suspect["row"]]}
            file.write(json.dumps(suspect, ensure_ascii=False) + "\n")


def shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS - 2]} …"


if __name__ == "__main__":
    run_stage(main)
