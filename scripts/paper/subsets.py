r"""What is each score worth? Tune on random subsets of a pool once, and regress held-out log likelihood on the subsets.

    python scripts/paper/subsets.py --config_path configs/pools/go_biology.yaml --jobs 2 \
        --set dataset=runs/pools/go_biology/seed-1/swapped_30.jsonl --set output_dir=runs/subsets/swapped_30 \
        --out data/results/subsets/swapped_30

Needs the configuration's target model; a pool's kinds (scripts/paper/pools.py) are read where they lie beside the data.
Every subset is drawn at random with weights that lean to a random direction of all scores (--lean), so that the
subsets' mean scores differ by more than chance; no rule chooses. Writes OUT/subsets.csv after each subset, and
OUT/subsets.md. A stopped run goes on where it was.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
from selection.run.ending import run_stage

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans

from scripts.paper.cells import Job, markdown_table, run_jobs
from scripts.paper.pools import is_faulty
from scripts.paper.purity import suspicions
from selection.rows.split import TrainingSplit, training_split
from selection.rows.tokens import empty_turn, tokenised_split
from selection.run.cli import add_experiment_arguments, argument_parser
from selection.run.config import Experiment, from_repository, load_experiment
from selection.run.errors import UserError
from selection.run.ledger import TARGET_TUNING, read_ledger
from selection.run.log import say
from selection.run.metrics import NLL, read_metrics
from selection.run.products import atomic_path, code_version, held, write_json
from selection.scores.row_figures import load_row_scorer, row_figures

_REPLICATES = 10_000


def main() -> None:
    parser = argument_parser(__doc__)
    add_experiment_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables; required")
    parser.add_argument("--subsets", type=int, default=80, help="how many; default: 80")
    parser.add_argument("--rows", type=int, default=60, help="in each; default: 60")
    parser.add_argument("--lean", type=float, default=0.7, help="deviation of a row's log weight; default: 0.7")
    parser.add_argument("--jobs", type=int, default=1, help="subsets at a time; default: 1")
    arguments = parser.parse_args()
    experiment = load_experiment(arguments.config_path, arguments.set)
    split, table = training_split(experiment), arguments.out / "subsets.csv"
    if arguments.rows >= len(split.rows):
        raise UserError(f"--rows {arguments.rows}: the training split has {len(split.rows)} rows, give fewer")
    figures, tokens = figures_of_rows(experiment, split)
    values = (figures - figures.mean()) / figures.std(ddof=0).replace(0, 1)
    done = pd.read_csv(table).to_dict("records") if table.exists() else []
    if others := [row["rows"] for row in done if row["rows"] != arguments.rows]:
        raise UserError(f"{table} has subsets of {others[0]} rows: give --rows {others[0]}, or another --out")
    jobs, subsets = [], {}
    options = ["--config_path", str(Path(arguments.config_path).resolve())]
    options += [part for change in arguments.set for part in ("--set", change)]
    with held(experiment.folder / "subsets"):
        for number in range(arguments.subsets):
            rows = lean_subset(values.to_numpy(), arguments.rows, arguments.lean, number)
            name = f"subset-{number}"
            path = experiment.folder / "subsets" / f"{name}.json"
            write_json(path, {"method": "subset", "indices": rows.tolist()})
            subsets[name] = rows
            select = ["finetune/finetune-select.py", *options, "--select_path", str(path)]
            if not any(row["subset"] == name for row in done):
                jobs.append(Job(name, [select, ["finetune/eval.py", *options, "--tuned", name]]))

        def finished(job: Job) -> None:
            metrics, rows = read_metrics(experiment.folder / "eval" / job.name), subsets[job.name]
            ledger = read_ledger(experiment.folder)
            cost = [each for each in ledger if (each.stage, each.what) == (TARGET_TUNING, job.name)][-1]
            row = {"subset": job.name, "rows": len(rows), "tokens": int(tokens[rows].sum()), NLL: metrics[NLL]}
            row |= about_subset(split, figures, rows)
            row |= {"seconds": round(cost.seconds, 1), "device": cost.device, "precision": cost.precision}
            row |= {"commit": metrics["code_version"]}
            row["nll_by_sample"] = " ".join(f"{loss:.4f}" for loss in metrics["by_sample"][NLL])
            done.append(row)
            with atomic_path(table) as draft:
                pd.DataFrame(done).to_csv(draft, index=False)
            say(f"{job.name}: {metrics[NLL]:.4f} ({len(done)} of {arguments.subsets})")

        run_jobs(jobs, arguments.jobs, experiment.folder / "logs", finished)
    text = format_table(pd.DataFrame(done), list(figures), experiment)
    with atomic_path(arguments.out / "subsets.md") as draft:
        draft.write_text(text, encoding="utf-8")
    print(text)


def figures_of_rows(experiment: Experiment, split: TrainingSplit) -> tuple[pd.DataFrame, np.ndarray]:
    """Scores of every row by the untuned target, its cluster and, where known, whether it is faulty; its tokens."""
    rows = tokenised_split(experiment, experiment.target_model, split)
    scorer = load_row_scorer(experiment.target_model, experiment.selection.precision)
    columns = row_figures(rows, scorer, empty_turn(experiment, experiment.target_model))
    found = pd.DataFrame(suspicions(columns))
    found["IFD"] = np.log(found["IFD"])  # as the mean over rows is read
    found["response tokens"] = np.log(found["response tokens"])
    hidden = columns["hidden_state"] / np.linalg.norm(columns["hidden_state"], axis=1, keepdims=True)
    clusters = KMeans(max(2, round(len(rows) ** 0.5)), n_init=3, random_state=0).fit_predict(hidden)
    pool = from_repository(experiment.data_sets[0].path)
    if pool.with_suffix(".kinds.json").exists():
        found["faulty"] = is_faulty(pool).astype(float)
    found.attrs["clusters"] = clusters
    return found, np.array([len(row) for row in rows["input_ids"]])


def lean_subset(values: np.ndarray, count: int, lean: float, number: int) -> np.ndarray:
    """`count` row numbers, ascending, drawn without replacement with weights exp(lean · a random direction).

    Args: `values` (N, scores), standardised. The direction's values have mean 0 and deviation 1 over the rows.
    """
    rng = np.random.default_rng([number, len(values)])
    direction = values @ rng.normal(size=values.shape[1])
    direction = (direction - direction.mean()) / direction.std()
    return np.sort(np.argsort(-(lean * direction + rng.gumbel(size=len(values))))[:count])  # Gumbel's top


def about_subset(split: TrainingSplit, figures: pd.DataFrame, rows: np.ndarray) -> dict[str, float]:
    means = figures.iloc[rows].mean().round(5).to_dict()
    clusters = np.bincount(figures.attrs["clusters"][rows]) / len(rows)
    # Effective number of clusters: 1 / Σ share².
    return means | {"unique rows": len({split.ids[row] for row in rows}), "clusters": round(1 / (clusters**2).sum(), 3)}


def format_table(found: pd.DataFrame, scores: list[str], experiment: Experiment) -> str:
    """For each figure the change of held-out negative log likelihood with one standard deviation of the subsets' means,
    alone and with response tokens and (where known) the faulty share held fixed; 95 % intervals over subsets and
    answers together."""
    losses = np.array([list(map(float, text.split())) for text in found["nll_by_sample"]])  # (subsets, answers)
    names = [name for name in [*scores, "tokens", "unique rows", "clusters"] if found[name].std() > 0]
    fixed = [name for name in ("response tokens", "faulty") if name in names]
    rng, slopes = np.random.default_rng(0), {name: [] for name in names}
    for replicate in range(_REPLICATES + 1):
        subsets, answers = np.arange(len(losses)), np.arange(losses.shape[1])
        if replicate:
            subsets, answers = (rng.integers(count, size=count) for count in losses.shape)
        outcome = losses[np.ix_(subsets, answers)].mean(1)
        drawn = found[names].to_numpy()[subsets]
        drawn = (drawn - drawn.mean(0)) / np.where(drawn.std(0) > 0, drawn.std(0), 1)
        controls = drawn[:, [names.index(name) for name in fixed]]
        for number, name in enumerate(names):
            both = np.column_stack([drawn[:, number], controls]) if name not in fixed else controls
            one = np.linalg.lstsq(drawn[:, [number]], outcome - outcome.mean(), rcond=None)[0][0]
            held_fixed = np.linalg.lstsq(both, outcome - outcome.mean(), rcond=None)[0]
            slopes[name].append((one, held_fixed[fixed.index(name) if name in fixed else 0]))
    rows = []
    for name, each in slopes.items():
        each = 1000 * np.array(each)
        low, high = np.quantile(each[1:], [0.025, 0.975], axis=0)
        cells = [f"{each[0][k]:+.1f} ({low[k]:.1f} to {high[k]:.1f})".replace("-", "−") for k in (0, 1)]
        rows.append([name, f"{np.corrcoef(found[name], found[NLL])[0, 1]:+.2f}".replace("-", "−"), *cells])
    heading = ["mean of the subset", "correlation", "alone", f"with {' and '.join(fixed)} held fixed"]
    pool, model = Path(experiment.data_sets[0].path).name, Path(experiment.target_model).name
    about = f"{len(found)} subsets of {found['rows'].iloc[0]} rows; {model}; {losses.shape[1]} held-out answers"
    spread = f"mean {losses.mean():.4f}, standard deviation of the subsets {losses.mean(1).std(ddof=1):.4f}"
    return (
        f"# Random subsets of {pool}\n\n{about}; {code_version()}. Held-out negative log likelihood a response token: "
        f"{spread}. The columns give its change, in thousandths of a nat, with one standard deviation of a figure's "
        "mean over the subset's rows, and 95 % bootstrap intervals over subsets and answers; below 0 is better.\n\n"
        f"{markdown_table(heading, rows)}\n"
    )


if __name__ == "__main__":
    run_stage(main)
