"""Look at a pool before paying for it: which rows are probably wrong, repeated or odd, and what selection could gain.

    python scripts/check_pool.py --config_path configs/demo.yaml
    python scripts/check_pool.py --target Qwen/Qwen2.5-7B --data my.jsonl

Needs the small model (the target where there is none yet) and the data; nothing is tuned. One pass over all rows,
held-out ones too. Writes <run folder>/pool/suspects.jsonl, a line for each suspect row, worst first (row: its number in
the data, from 0), pool.json beside it, and <run folder>/coresets/clean.json, a coreset of all training rows that are
not suspect; with --out all three go there. A second call takes the list as it is: delete the lines of rows that are
right, call again, and clean.json has them. `selection.leave_out: suspects` keeps the listed rows out of every choice.
"""

import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import one_line, run_stage

import numpy as np
import pandas as pd
from datasets import concatenate_datasets

from selection.coreset import unscored
from selection.report.agreement import spearman
from selection.rows.conversation import as_messages
from selection.rows.split import TrainingSplit, rows_of, split_numbers, training_split
from selection.rows.tokens import empty_turn, tokenised_rows
from selection.run.cli import add_dry_run_argument, add_experiment_arguments, argument_parser
from selection.run.config import Experiment, load_experiment
from selection.run.errors import UserError
from selection.run.log import say
from selection.run.model_folder import model_path
from selection.run.products import atomic_path, code_version, locked, read_json, refuse_difference, write_json
from selection.scores.coresets import write_coreset
from selection.scores.identity import check_run, fingerprint_of, write_experiment
from selection.scores.pool import Pool, read_suspects, suspects_in_training, without
from selection.scores.row_figures import load_row_scorer, row_figures
from selection.scores.suspects import KINDS, find_suspects, possible_gain
from selection.start import start

_SHOWN, _LETTERS = 3, 100  # rows of each kind that are said, and letters of each


def main() -> None:
    experiment, out, dry_run = load()
    split, folder = training_split(experiment, dry_run), out or experiment.pool
    check_run(experiment, split)
    model = small_or_target(experiment, folder)
    if dry_run:
        would = "take the list of" if (folder / "suspects.jsonl").exists() else f"look at every row with {model} ->"
        print(f"would {would} {folder / 'suspects.jsonl'}")
        return
    about = {"data_fingerprint": split.fingerprint, "template": experiment.template}
    about |= {"cutoff_len": experiment.cutoff_len, "model_fingerprint": fingerprint_of(experiment, model)}
    paths = [folder / name for name in ("pool.json", "suspects.jsonl")]
    with locked(folder):  # two jobs of a grid may ask at the same time
        if all(path.exists() for path in paths):
            stored = read_json(paths[0], Pool)
            refuse_difference(folder, stored, stored | about, "remove it, or give another --out")
            say(f"reusing {paths[1]}: remove it to look again")
        else:
            look(experiment, split, folder, model, about)
    write_experiment(experiment)
    pool, suspects = read_json(paths[0], Pool), read_suspects(paths[1])
    counts = Counter(suspect.get("kind", "listed") for suspect in suspects)
    kinds = f" ({', '.join(f'{kind} {count}' for kind, count in counts.items())})" if counts else ""
    print(f"{len(suspects)} of {pool['rows']} rows are suspect{kinds} -> {paths[1]}")
    left_out = suspects_in_training(experiment, folder)
    clean = without(unscored(experiment), left_out)
    ids = [split.ids[row] for row in clean.index]
    about = {"left_out": left_out}
    path = write_coreset(out or experiment.coresets, "clean", None, clean.index, ids, clean, about)
    print(f"clean: {len(clean.index)} of {len(split.rows)} training rows -> {path}")
    for kind, count in counts.items():
        say(f"\n{kind}: {count} rows ({KINDS.get(kind, 'not of check_pool.py')})")
        for suspect in [each for each in suspects if each.get("kind", "listed") == kind][:_SHOWN]:
            prompt, answer = (shortened(suspect.get(name, "")) for name in ("prompt", "answer"))
            say(f"  row {suspect['row']}: {prompt} -> {answer}")
    if (by_length := pool["effort_by_length"]) is not None:
        say(f"\neffort score against response length: rank correlation {by_length:+.2f} (±1: the score is the length)")
    print(f"what selection can gain here: {possible_gain(counts, pool['rows'])}")


def load() -> tuple[Experiment, Path | None, bool]:
    """The experiment, --out and --dry_run."""
    parser = argument_parser(__doc__)
    add_experiment_arguments(parser, required=False)
    parser.add_argument("--target", metavar="MODEL", help="instead of --config_path; default: none")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="with --target: as start.py's; default: none")
    parser.add_argument("--small", metavar="MODEL", help="with --target: speculative model; default: the family's")
    parser.add_argument("--template", metavar="NAME", help="with --target: chat template; default: the family's")
    parser.add_argument("--out", type=Path, metavar="DIR", help="instead of the run folder; default: none")
    add_dry_run_argument(parser)
    given = parser.parse_args()
    if bool(given.config_path) == bool(given.target) or bool(given.target) != bool(given.data):
        raise UserError("give --config_path, or --target and --data")
    if given.config_path:
        return load_experiment(given.config_path, given.set), given.out, given.dry_run
    with tempfile.TemporaryDirectory() as nowhere:
        dry = Path(nowhere) if given.dry_run else None
        path, _ = start(given.target, given.data, given.small, given.template, overrides=given.set, dry=dry)
        return load_experiment(path), given.out, given.dry_run


def small_or_target(experiment: Experiment, folder: Path) -> str:
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


def look(experiment: Experiment, split: TrainingSplit, folder: Path, model: str, about: dict) -> None:
    """Write suspects.jsonl, then pool.json, which says that both are whole."""
    started = time.monotonic()
    parts = {"train": split.rows} | ({} if experiment.eval_data else {"eval": rows_of(experiment, "eval")})
    numbers = np.concatenate([split_numbers(experiment)[name] for name in parts])
    tokenised = concatenate_datasets([tokenised_rows(experiment, model, *part) for part in parts.items()])
    scorer = load_row_scorer(model, experiment.selection.precision)
    columns = row_figures(tokenised, scorer, empty_turn(experiment, model))
    entry = experiment.row_format.entry
    turns = [as_messages(row, entry) for rows in parts.values() for row in rows]
    prompts = ["\n".join(turn["content"] for turn in messages[:-1]) for messages in turns]
    answers = [messages[-1]["content"] for messages in turns]
    order = np.argsort(numbers)  # as the rows stand in the data
    columns = {name: values[order] for name, values in columns.items()}
    prompts, answers = ([texts[row] for row in order] for texts in (prompts, answers))
    found = find_suspects(prompts, answers, columns)
    write_suspects(folder / "suspects.jsonl", found, prompts, answers, numbers[order].tolist())
    by_length = spearman(columns["effort"], columns["n_response_tokens"])
    about |= {"model": model, "rows": len(order), "suspects": len(found)}
    about |= {"kinds": {kind: int((found.kind == kind).sum()) for kind in KINDS}}
    about |= {"effort_by_length": None if np.isnan(by_length) else round(by_length, 3)}
    about |= {"seconds": round(time.monotonic() - started, 1), "code_version": code_version()}
    write_json(folder / "pool.json", about)


def write_suspects(path: Path, found: pd.DataFrame, prompts: list[str], answers: list[str], rows: list[int]) -> None:
    """`rows`: the rows' numbers in the data, where some may be left out."""
    found = found.round(4).replace([np.inf, -np.inf], np.nan).astype(object)
    with atomic_path(path) as draft, draft.open("w", encoding="utf-8") as file:
        for suspect in found.where(found.notna(), None).to_dict("records"):
            own, first = suspect["row"], suspect["group"]
            suspect |= {"row": rows[own], "group": rows[first] if first >= 0 else first}
            suspect |= {"prompt": prompts[own], "answer": answers[own]}
            file.write(json.dumps(suspect, ensure_ascii=False) + "\n")


def shortened(text: str) -> str:
    text = one_line(text)
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS - 2]} …"


if __name__ == "__main__":
    run_stage(main)
