r"""What do scores cost, and how well do they agree with the target's? Every kind of speculation, cut and share of rows.

    python scripts/paper/frontier.py --config_path configs/pools/go_biology.yaml --set max_samples=300 \
        --layers 16 20 10 --seeds 1 2 3 --jobs 2 --out data/results/frontier/go_biology

Needs the target. For each seed the target is tuned on everything and scores every row: that is the reference. Then it
scores every row untuned (direct), and speculators of some layers, cut out of it, are tuned by each kind and score every
row. Where only a share of the rows is scored, a ridge regression on what is free fills in the others. Nothing is tuned
on a coreset, and verification is left out of all prices: the same for all but direct, which has none. Writes
OUT/frontier.csv, a line for each seed and way, OUT/frontier.md and frontier.png. Finished models and scores are reused.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
from selection.run.ending import run_stage

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import rankdata
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scripts.paper.cells import Job, markdown_table, run_jobs, stage_flops
from scripts.paper.pools import is_faulty
from selection.method.effort import IGNORED_LABEL
from selection.report.agreement import agreement, spearman
from selection.rows.split import split_numbers, training_split
from selection.rows.tokens import tokenised_split
from selection.run import ledger
from selection.run.cli import add_experiment_arguments, argument_parser
from selection.run.config import REPOSITORY, Experiment, from_repository, load_experiment
from selection.run.model_folder import model_path
from selection.run.products import atomic_path, code_version
from selection.scores.folder import read_scores
from selection.scores.models import parameters_of

SPECULATIONS = "published", "{share: 0.5, passes: 1}", "{share: 0.2, passes: 1}", "untuned"
SCORED = 1.0, 0.5, 0.2, 0.1  # shares of the rows
_COLUMNS, _REPLICATES, _MARGIN = ("effort", "n_response_tokens"), 2000, -0.03
_CLUSTERS = 10


def main() -> None:
    parser = argument_parser(__doc__)
    add_experiment_arguments(parser)
    layers = "decoder layers of the speculators, the published one's first; default: 16"
    parser.add_argument("--layers", type=int, nargs="+", default=[16], help=layers)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of tuning and scores; default: 1 2 3")
    parser.add_argument("--jobs", type=int, default=1, help="at a time; default: 1")
    parser.add_argument("--runs", type=Path, help="folder of run folders; default: runs/frontier/<name of --out>")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables; required")
    arguments = parser.parse_args()
    runs = (arguments.runs or REPOSITORY / "runs" / "frontier" / arguments.out.name).resolve()
    ways, jobs = plan_runs(arguments, runs)
    run_jobs(jobs, arguments.jobs, runs / "logs", lambda job: None)
    rows, efforts = [], {}
    for (seed, way), experiment in ways.items():
        for row, effort in measured(experiment, ways[seed, "direct"], way, seed):
            rows.append(row)
            efforts[seed, row["way"], row["scored"]] = effort
    table = pd.DataFrame(rows)
    with atomic_path(arguments.out / "frontier.csv") as draft:
        table.round(4).to_csv(draft, index=False)
    references = {seed: read_scores(ways[seed, "direct"].tuned_target_scores, _COLUMNS) for seed in arguments.seeds}
    summary = summarise(table, efforts, references, f"published, {arguments.layers[0]} layers")
    target, seeds = Path(ways[arguments.seeds[0], "direct"].target_model).name, len(arguments.seeds)
    text = f"# Price against agreement\n\n{target}, {table.rows.max()} rows, {seeds} seeds, {code_version()}\n\n"
    text += markdown_table(list(summary), summary.astype(str).to_numpy().tolist()) + "\n"
    with atomic_path(arguments.out / "frontier.md") as draft:
        draft.write_text(text, encoding="utf-8")
    with atomic_path(arguments.out / "frontier.png") as draft:
        draw(summary).savefig(draft, dpi=110, format="png")
    print(text)


def draw(summary: pd.DataFrame) -> Figure:
    """Both rank correlations against the price; a line joins the shares of scored rows of one way."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    panels, names = figure.subplots(1, 2), {"spearman": "Spearman", "spearman_length_fixed": "Spearman, length fixed"}
    for axes, (name, said) in zip(panels, names.items(), strict=True):
        for way, own in summary.groupby("way", sort=True):
            axes.plot(100 * own.flops_share, own[name], marker="o", markersize=4, linewidth=1, label=way)
        axes.set(xscale="log", xlabel="FLOPs of selection, % of tuning on everything", ylabel=said)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def plan_runs(arguments: argparse.Namespace, runs: Path) -> tuple[dict[tuple[int, str], Experiment], list[Job]]:
    """The experiment of each seed and way, and the jobs that score its rows."""
    ways, jobs = {}, []
    for count in arguments.layers:
        folder, cut = runs / f"cut-{count}", ["--layers", str(count), "--out", str(runs / f"{count}-layers")]
        options = options_of(arguments, folder, arguments.seeds[0], runs / f"{count}-layers", "published")
        jobs.append(Job(f"cut {count}", [["scripts/make_draft.py", *options, *cut]]))
    for seed in arguments.seeds:
        kinds = [("direct", "direct", None)]
        kinds += [(f"{kind.strip('{}')}, {n} layers", kind, n) for n in arguments.layers for kind in SPECULATIONS]
        for way, kind, count in kinds:
            folder = runs / f"seed-{seed}" / way.replace(" ", "-")
            options = options_of(arguments, folder, seed, runs / f"{count}-layers", kind)
            stages = [["finetune/finetune.py"], ["selection/effort_score.py"]]
            if kind == "direct":
                stages += [[*stage, "--model", "target"] for stage in stages]
            needs = None if count is None else f"cut {count}"
            jobs.append(Job(f"{seed} {way}", [[stage, *options, *more] for stage, *more in stages], needs))
            ways[seed, way] = load_experiment(arguments.config_path, options[3::2])
    return ways, jobs


def options_of(arguments: argparse.Namespace, folder: Path, seed: int, small: Path, kind: str) -> list[str]:
    changes = [f"output_dir={json.dumps(str(folder))}", f"small_model={json.dumps(str(small))}"]
    changes += ["selection.mode=extended", f"selection.speculation={kind}", f"selection.seed={seed}"]
    changes += [f"training.seed={seed}", "selection.methods=[staff]"]
    options = ["--config_path", str(Path(arguments.config_path).resolve())]
    return options + [part for change in [*arguments.set, *changes] for part in ("--set", change)]


def measured(experiment: Experiment, reference: Experiment, way: str, seed: int) -> Iterator[tuple[dict, np.ndarray]]:
    """A line of the table for each share of scored rows, and the efforts (N,) behind it."""
    target, scores = (read_scores(each, _COLUMNS) for each in (reference.tuned_target_scores, experiment.small_scores))
    untuned, by = read_scores(reference.small_scores, _COLUMNS), experiment.selection
    sizes = tuple(parameters_of(model_path(name)) for name in (experiment.small_model, experiment.target_model))
    paid = [cost for cost in ledger.selection_costs(experiment, "staff") if cost.stage != ledger.VERIFICATION]
    full = [cost for cost in ledger.read_ledger(reference.folder) if cost.stage == ledger.TARGET_TUNING][-1]
    flops = {cost.stage: stage_flops(cost, experiment, sizes) for cost in paid}
    seconds = {cost.stage: cost.seconds for cost in paid}
    whole, free, faulty = stage_flops(full, experiment, sizes), free_figures(reference), faulty_rows(reference)
    for share in SCORED:
        effort = filled_in(scores.effort, free, share, seed)
        known = replace(scores, columns=scores.columns | {"effort": effort})
        found = agreement(known, target, [0.1], by.num_strata, by.hardest_cutoff, seed)
        (tenth,) = found.overlaps
        row = {"seed": seed, "way": way, "scored": share, "rows": len(effort)}
        for name, costs, of_all in (("flops", flops, whole), ("seconds", seconds, full.seconds)):
            scoring = costs.get(ledger.SPECULATIVE_SCORES, 0)
            row[f"{name}_share"] = (sum(costs.values()) - scoring * (1 - share)) / of_all
        row |= {"spearman": found.spearman, "spearman_length_fixed": found.partial_spearman}
        row |= {"spearman_untuned_target": spearman(effort, untuned.effort)}
        row |= {"overlap_highest": tenth.highest, "overlap_staff_above_chance": tenth.staff - tenth.staff_by_chance}
        if faulty is not None:
            row["purity"] = faulty[np.argsort(-effort, kind="stable")[: len(effort) // 10]].mean()
        yield row, effort


def free_figures(experiment: Experiment) -> np.ndarray:
    """What a row says without any pass of a model, (N, d): its lengths, its loss by the tokens' counts, its cluster."""
    tokenised = tokenised_split(experiment, experiment.target_model, split := training_split(experiment))
    responses = [[label for label in labels if label != IGNORED_LABEL] for labels in tokenised["labels"]]
    counts = np.bincount(np.concatenate(responses).astype(int))
    unlikely = -np.log(counts / counts.sum(), where=counts > 0, out=np.zeros(len(counts)))
    lengths = np.array([(len(answer), len(ids)) for answer, ids in zip(responses, tokenised["input_ids"], strict=True)])
    texts = [" ".join(str(value) for value in row.values()) for row in split.rows]
    words = TfidfVectorizer(sublinear_tf=True, min_df=2).fit_transform(texts)
    clusters = KMeans(_CLUSTERS, n_init=1, random_state=0).fit_predict(words)
    unigram = [unlikely[answer].mean() for answer in responses]
    return np.column_stack([np.log(lengths), unigram, np.eye(_CLUSTERS)[clusters]])


def filled_in(effort: np.ndarray, free: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Efforts (N,) of which only a random `share` is known; the others by a ridge regression of their logarithm."""
    if share == 1:
        return effort
    known = np.random.default_rng(seed).choice(len(effort), int(share * len(effort)), replace=False)
    logs = np.log(np.maximum(effort[known], effort[effort > 0].min()))  # an effort may be 0
    fit = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 3, 11))).fit(free[known], logs)
    filled = np.exp(fit.predict(free))
    filled[known] = effort[known]
    return filled


def faulty_rows(experiment: Experiment) -> np.ndarray | None:
    """Whether each training row is faulty (N,), where a pool's kinds lie beside the data."""
    path = from_repository(experiment.data_sets[0].path)
    if not path.with_suffix(".kinds.json").exists():
        return None
    faulty = is_faulty(path)[split_numbers(experiment)["train"]]
    return faulty if faulty.any() else None


def summarise(table: pd.DataFrame, efforts: dict, references: dict, published: str) -> pd.DataFrame:
    """Means over seeds of each way and share, cheapest first, with 95 % intervals of the difference of both rank
    correlations from the published way's, over rows and seeds together; `as good`: above −0.03 both."""
    figures = table.drop(columns=["seed", "rows"]).groupby(["way", "scored"], sort=False).mean().reset_index()
    keys = list(zip(figures.way, figures.scored, strict=True))
    rng, base, differences = np.random.default_rng(0), keys.index((published, 1.0)), []
    stacks = {seed: np.array([efforts[seed, *key] for key in keys]) for seed in references}
    for _ in range(_REPLICATES):
        found = []
        for seed in rng.choice(list(references), len(references)):
            target = references[seed]
            rows = rng.integers(len(target.index), size=len(target.index))
            tokens = target.columns["n_response_tokens"][rows]
            both = rank_correlations(stacks[seed][:, rows], target.effort[rows], tokens)
            found.append(both - both[:, base : base + 1])
        differences.append(np.mean(found, axis=0))
    low, high = np.percentile(differences, [2.5, 97.5], axis=0)
    for number, name in enumerate(("spearman", "spearman_length_fixed")):
        difference = figures[name] - figures[name][base]
        said = zip(difference, low[number], high[number], strict=True)
        figures[f"{name} − published"] = [f"{mean:+.3f} ({least:+.3f} to {most:+.3f})" for mean, least, most in said]
    figures["as good"] = np.where((low >= _MARGIN).all(axis=0), "yes", "no")
    return figures.sort_values("flops_share").round(3)


def rank_correlations(efforts: np.ndarray, target: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """`spearman` and `partial_spearman`, (2, W), of W sets of `efforts` (W, N) with those of the target (N,)."""
    ranks = rankdata(np.vstack([efforts, target, tokens]), axis=1)
    *ab, bc = np.corrcoef(ranks)[:-1, -2:]
    (r_ab, r_ac), r_bc = np.transpose(ab), bc[1]
    return np.array([r_ab, (r_ab - r_ac * r_bc) / np.sqrt((1 - r_ac**2) * (1 - r_bc**2))])


if __name__ == "__main__":
    run_stage(main)
