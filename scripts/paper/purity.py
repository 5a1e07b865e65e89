"""Which score finds the faults of a pool? Nothing is tuned: one pass of a model over every distinct row, and a trial.

    python scripts/paper/purity.py --config_path configs/pools/go_biology.yaml --pools runs/pools/go_biology --out OUT

Needs the pools of scripts/paper/pools.py and the configuration's target model. Writes OUT/purity.csv: for each seed,
pool and score the AUC (chance that a faulty row has a higher score than a clean one) and the purity (share of faulty
rows among the tenth with the highest score, which STAFF drops of effort); OUT/suspects.csv: how many rows
check_pool.py would suspect, and of what; OUT/purity.md with means over seeds. A stopped run goes on where it was.
"""

import itertools
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
from selection.run.ending import run_stage

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from scripts.paper.cells import markdown_table
from scripts.paper.pools import POOLS, is_faulty, read_rows
from selection.method.length_control import length_residual
from selection.rows.split import training_split
from selection.rows.tokens import empty_turn, tokenised_split
from selection.run.cli import add_experiment_arguments, argument_parser
from selection.run.config import load_experiment
from selection.run.errors import UserError, refusals
from selection.run.log import say
from selection.run.products import atomic_path, code_version
from selection.scores.row_figures import load_row_scorer, row_figures
from selection.scores.suspects import KINDS, find_suspects


def main() -> None:
    parser = argument_parser(__doc__)
    add_experiment_arguments(parser)
    parser.add_argument("--pools", type=Path, required=True, help="folder that pools.py wrote; required")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables; required")
    arguments = parser.parse_args()
    seeds = sorted(int(folder.name.removeprefix("seed-")) for folder in arguments.pools.glob("seed-*"))
    if not seeds:
        raise UserError(f"{arguments.pools} has no pools: run scripts/paper/pools.py first")
    known, scorer, paths = {}, None, [arguments.out / f"{name}.csv" for name in ("purity", "suspects")]
    purity, suspects = (pd.read_csv(path).to_dict("records") if path.exists() else [] for path in paths)
    done = {(row["seed"], row["pool"]) for row in suspects}
    purity = [row for row in purity if (row["seed"], row["pool"]) in done]  # stopped between the two files
    for seed, pool in itertools.product(seeds, sorted(POOLS, key="clean".__eq__)):  # the clean one has no AUC: last
        if (seed, pool) in done:
            continue
        source = (arguments.pools / f"seed-{seed}" / f"{pool}.jsonl").resolve()
        folder = arguments.pools.resolve() / "purity" / f"{pool}-{seed}"
        changes = [*arguments.set, f"dataset={json.dumps(str(source))}", f"output_dir={json.dumps(str(folder))}"]
        experiment = load_experiment(arguments.config_path, changes)
        rows = tokenised_split(experiment, experiment.target_model, training_split(experiment))
        scorer = scorer or load_row_scorer(experiment.target_model, experiment.selection.precision)
        faulty = is_faulty(source)
        columns = row_figures(rows, scorer, empty_turn(experiment, experiment.target_model), known)
        about = {"pool": pool, "seed": seed}
        for name, values in suspicions(columns).items() if faulty.any() else ():
            worst = np.argsort(-values, kind="stable")[: len(values) // 10]
            auc, pure = roc_auc_score(faulty, values), faulty[worst].mean()
            purity.append(about | {"score": name, "auc": round(auc, 4), "purity": round(pure, 4)})
        texts = [(f"{row['instruction']} {row['input']}", row["output"]) for row in read_rows(source)]
        found, _ = find_suspects(*map(list, zip(*texts, strict=True)), columns)
        for kind in KINDS:
            own = found.row[found.kind == kind]
            suspects.append(about | {"kind": kind, "rows": len(own), "faulty": int(faulty[own].sum())})
        for path, table in zip(paths, (purity, suspects), strict=True):
            with atomic_path(path) as draft:
                pd.DataFrame(table).to_csv(draft, index=False)
        say(f"seed {seed}, {pool}: {len(known)} distinct rows scored so far")
    model, table = Path(load_experiment(arguments.config_path, arguments.set).target_model).name, pd.DataFrame(purity)
    text = f"# Which score finds the faults of a pool\n\n{model}, untuned; {table.seed.nunique()} seeds, "
    text += f"{code_version()}. Mean over seeds ± their standard deviation.\n"
    for figure in ("auc", "purity"):
        text += f"\n## {figure}\n\n{means_with_deviation(table, figure)}\n"
    text += f"\n## Suspects of check_pool.py\n\n{suspects_table(pd.DataFrame(suspects))}\n"
    with atomic_path(arguments.out / "purity.md") as draft:
        draft.write_text(text, encoding="utf-8")
    print(text)


def suspects_table(table: pd.DataFrame) -> str:
    """By pool and kind: suspect rows, and how many of them are faulty, means over seeds."""
    means = table.groupby(["pool", "kind"], sort=False)[["rows", "faulty"]].mean().round(1).astype(str)
    cells = (means["faulty"] + " of " + means["rows"]).unstack()[list(KINDS)].loc[table.pool.unique()]
    return markdown_table(["faulty of suspect rows", *KINDS], cells.reset_index().to_numpy().tolist())


def suspicions(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores (N,) of `row_figures` by name, each so that a higher one is more suspect."""
    tokens, unexplained = columns["n_response_tokens"], columns["loss"] - columns["loss_without_prompt"]
    hidden = columns["hidden_state"] / np.linalg.norm(columns["hidden_state"], axis=1, keepdims=True)
    nearest = hidden @ hidden.T
    np.fill_diagonal(nearest, -1)
    with refusals():
        without_length = length_residual(columns["effort"], tokens)
    return {
        "effort": columns["effort"],
        "effort, length held fixed": without_length,
        "EL2N": columns["el2n"],
        "entropy": columns["entropy"],
        "loss": columns["loss"],
        "IFD": np.exp(unexplained),  # Li et al. 2024 (2402.00530): perplexity with the prompt / without it
        "loss difference, summed over tokens": tokens * unexplained,
        "loss of the end": columns["end_loss"],
        "response tokens": tokens,
        "similarity to the nearest row": nearest.max(1),
        "distance from the mean row": -(hidden @ hidden.mean(0)),
    }


def means_with_deviation(table: pd.DataFrame, figure: str) -> str:
    """A table of score x pool: mean over seeds ± standard deviation."""
    by = table.groupby(["score", "pool"], sort=False)[figure]
    cells = (by.mean().map("{:.2f}".format) + " ± " + by.std().map("{:.2f}".format)).unstack()
    cells = cells[[pool for pool in POOLS if pool in cells]].loc[table.score.unique()]
    return markdown_table([figure, *cells.columns], cells.reset_index().to_numpy().tolist())


if __name__ == "__main__":
    run_stage(main)
