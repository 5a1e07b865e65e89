"""Which score finds the faults of a pool? Nothing is tuned: one pass of a model over every distinct row.

    python scripts/paper/purity.py --config_path configs/pools/go_biology.yaml --pools runs/pools/go_biology --out OUT

Needs the pools of scripts/paper/pools.py and the configuration's target model. Writes OUT/purity.csv: for each seed,
pool and score the AUC (chance that a faulty row has a higher score than a clean one) and the purity (share of faulty
rows among the tenth with the highest score, which STAFF drops of effort); and OUT/purity.md with means over seeds.
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
from selection.run.ending import run_stage

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from scripts.paper.cells import markdown_table
from scripts.paper.pools import POOLS, is_faulty
from selection.method.effort import EffortScorer
from selection.rows.split import training_split
from selection.rows.tokens import empty_turn, tokenised_split
from selection.run.cli import add_experiment_arguments, argument_parser
from selection.run.config import Experiment, load_experiment
from selection.run.device import choose_precision
from selection.run.errors import UserError
from selection.run.log import say
from selection.run.model_folder import model_path
from selection.run.products import atomic_path, code_version
from selection.scores.models import load_for_scoring
from selection.scores.row_figures import COLUMNS, row_figures, suspicions


def main() -> None:
    parser = argument_parser(__doc__)
    add_experiment_arguments(parser)
    parser.add_argument("--pools", type=Path, required=True, help="folder that pools.py wrote; required")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables; required")
    arguments = parser.parse_args()
    found, known, scorer = [], {}, None
    seeds = sorted(int(folder.name.removeprefix("seed-")) for folder in arguments.pools.glob("seed-*"))
    if not seeds:
        raise UserError(f"{arguments.pools} has no pools: run scripts/paper/pools.py first")
    for seed in seeds:
        for pool in POOLS:
            source = (arguments.pools / f"seed-{seed}" / f"{pool}.jsonl").resolve()
            folder = arguments.pools.resolve() / "purity" / f"{pool}-{seed}"
            changes = [*arguments.set, f"dataset={json.dumps(str(source))}", f"output_dir={json.dumps(str(folder))}"]
            experiment = load_experiment(arguments.config_path, changes)
            rows = tokenised_split(experiment, experiment.target_model, training_split(experiment))
            scorer = scorer or load_scorer(experiment)
            faulty = is_faulty(source)
            columns = row_figures(rows, scorer, empty_turn(experiment, experiment.target_model), known)
            for name, values in suspicions(columns).items() if faulty.any() else ():
                worst = np.argsort(-values, kind="stable")[: len(values) // 10]
                auc, purity = roc_auc_score(faulty, values), faulty[worst].mean()
                found.append({"pool": pool, "seed": seed, "score": name, "auc": auc, "purity": purity})
            say(f"seed {seed}, {pool}: {len(known)} distinct rows scored so far")
    table, model = pd.DataFrame(found).round(4), Path(experiment.target_model).name
    arguments.out.mkdir(parents=True, exist_ok=True)
    with atomic_path(arguments.out / "purity.csv") as draft:
        table.to_csv(draft, index=False)
    text = f"# Which score finds the faults of a pool\n\n{model}, untuned; "
    text += (
        f"{len(rows)} rows a pool, {len(seeds)} seeds, {code_version()}. Mean over seeds ± their standard deviation.\n"
    )
    for figure in ("auc", "purity"):
        text += f"\n## {figure}\n\n{means_with_deviation(table, figure)}\n"
    with atomic_path(arguments.out / "purity.md") as draft:
        draft.write_text(text, encoding="utf-8")
    print(text)


def load_scorer(experiment: Experiment) -> EffortScorer:
    """The untuned target, with the columns that `row_figures` reads."""
    precision = choose_precision(experiment.selection.precision)
    return EffortScorer(load_for_scoring(model_path(experiment.target_model), None, precision), columns=COLUMNS)


def means_with_deviation(table: pd.DataFrame, figure: str) -> str:
    """A table of score x pool: mean over seeds ± standard deviation."""
    by = table.groupby(["score", "pool"], sort=False)[figure]
    cells = (by.mean().map("{:.2f}".format) + " ± " + by.std().map("{:.2f}".format)).unstack()
    cells = cells[[pool for pool in POOLS if pool in cells]].loc[table.score.unique()]
    return markdown_table([figure, *cells.columns], cells.reset_index().to_numpy().tolist())


if __name__ == "__main__":
    run_stage(main)
