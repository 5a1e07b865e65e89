r"""What each choice in selection is worth, at the price of scoring only: nothing is tuned on a coreset.

    python scripts/paper/ablations.py --config_path configs/smollm2/go_biology.yaml --layers 16 12 20 --passes 3 1 0 \
        --set max_samples=500 --set eval_size=0.2 --set selection.num_strata=20 --set selection.verify_per_stratum=5 \
        --jobs 2

Needs the target (scripts/demo_models.sh). Cuts speculators of some sizes out of it, tunes each for some passes, and
scores the training split on all of them and on the target. Verification is that of the first. Writes speculator.csv,
verification.csv and ablations.md to data/results/ablations/ (--out). Finished models and scores are reused.
"""

import argparse
import json
import sys
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
from selection.run.ending import run_stage

import numpy as np
import pandas as pd

from scripts.paper.cells import Job, markdown_table, run_jobs, stage_flops
from selection.method.staff import choose_staff, coreset_size
from selection.report.agreement import agreement, overlap
from selection.run.cli import add_experiment_arguments, argument_parser
from selection.run.config import REPOSITORY, Experiment, load_experiment
from selection.run.errors import UserError, refusals
from selection.run.ledger import SPECULATIVE_SCORES, SPECULATIVE_TUNING, selection_costs
from selection.run.model_folder import model_path
from selection.run.products import atomic_path, code_version
from selection.scores.folder import Scores, read_scores
from selection.scores.models import parameters_of
from selection.scores.verification import Settings, cut_strata, draw, verify

COLUMNS = ("effort", "n_response_tokens")
NUMBERS = {  # option: (default, meaning)
    "layers": ([16], "decoder layers kept of the target"),
    "passes": ([3, 1, 0], "epochs of tuning"),
    "verify_per_stratum": ([5, 10, 20], "b_v, rows"),
    "num_strata": ([20, 50], "K"),
    "seeds": (list(range(1, 11)), "of draws, two or more"),
}


def main() -> None:
    parser = argument_parser(__doc__)
    add_experiment_arguments(parser)
    for name, (default, meaning) in NUMBERS.items():
        said = f"{meaning}; default: %(default)s"
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default, help=said)
    parser.add_argument("--jobs", type=int, default=1, help="speculators at a time; default: 1")
    for option, folder in (("runs", "runs/ablations"), ("out", "data/results/ablations")):
        said = f"folder of the {'run folders' if option == 'runs' else 'tables'}; default: {folder}"
        parser.add_argument(f"--{option}", type=Path, default=REPOSITORY / folder, help=said)
    arguments = parser.parse_args()
    arguments.runs = arguments.runs.resolve()
    if len(arguments.seeds) < 2:
        raise UserError("--seeds: give two or more, the differences between them are the yardstick")
    experiments = run_speculators(arguments)
    reference = next(iter(experiments.values()))
    small, target = read_scores(reference.small_scores).of_all_rows(), read_scores(reference.target_scores, COLUMNS)
    with refusals():
        verification = verification_table(reference, small, target, arguments)
    tables = {"speculator": speculator_table(experiments, target), "verification": verification}
    text = f"# What each choice in selection is worth\n\n{len(small)} rows, {code_version()}\n"
    for name, table in tables.items():
        table = table.round(4)
        with atomic_path(arguments.out / f"{name}.csv") as draft:
            table.to_csv(draft, index=False)
        heading, rows = [column.replace("_", " ") for column in table], table.astype(str).to_numpy().tolist()
        text += f"\n## {name}\n\n{markdown_table(heading, rows)}\n"
    with atomic_path(arguments.out / "ablations.md") as draft:
        draft.write_text(text, encoding="utf-8")
    print(text)


def run_speculators(arguments: argparse.Namespace) -> dict[tuple[int, int], Experiment]:
    """Scores of every speculator and, in the run folder of the first, of the target."""
    experiments, jobs = {}, []
    for layers, passes in product(arguments.layers, arguments.passes):
        model = str(arguments.runs / f"{layers}-layers")
        changes = [f"small_model={json.dumps(model)}", f"output_dir={json.dumps(f'{model}-{passes}-passes')}"]
        changes += [f"small_training.num_train_epochs={passes}", "speculative_run=null"]
        changes = [*arguments.set, *changes, "selection.mode=paper", "selection.verify=all"]
        options = ["--config_path", str(Path(arguments.config_path).resolve())]
        options += [part for change in changes for part in ("--set", change)]
        if passes == arguments.passes[0]:
            jobs.append(Job(f"{layers} layers", [["scripts/make_draft.py", *options, "--layers", str(layers)]]))
        stages = ["finetune/finetune.py", "selection/effort_score.py"] + ["selection/verify.py"] * (not experiments)
        commands = [[stage, *options] for stage in stages]
        jobs.append(Job(f"{layers} layers, {passes} passes", commands, needs=f"{layers} layers"))
        experiments[layers, passes] = load_experiment(arguments.config_path, changes)
    run_jobs(jobs, arguments.jobs, arguments.runs / "logs", lambda job: None)
    return experiments


def speculator_table(experiments: dict[tuple[int, int], Experiment], target: Scores) -> pd.DataFrame:
    """Agreement of each speculator's scores with the target's, and what tuning and scoring it cost, without cutting."""
    rows = []
    for (layers, passes), experiment in experiments.items():
        by, small = experiment.selection, read_scores(experiment.small_scores, COLUMNS)
        found = agreement(small, target, by.rates, by.num_strata, by.hardest_cutoff, by.seed)
        row = {"layers": layers, "passes": passes, "spearman": found.spearman}
        row |= {"spearman_length_fixed": found.partial_spearman, "adjusted_rand_index": found.adjusted_rand_index}
        names = {"overlap_highest": "highest", "overlap_staff": "staff", "by_chance": "staff_by_chance"}
        for name, figure in names.items():
            row |= {f"{name}_{one.rate:g}": getattr(one, figure) for one in found.overlaps}
        costs = [c for c in selection_costs(experiment, "staff") if c.stage in (SPECULATIVE_TUNING, SPECULATIVE_SCORES)]
        sizes = tuple(parameters_of(model_path(model)) for model in (experiment.small_model, experiment.target_model))
        flops = sum(stage_flops(cost, experiment, sizes) for cost in costs)
        rows.append(row | {"seconds": sum(cost.seconds for cost in costs), "flops": f"{flops:.3g}"})
    return pd.DataFrame(rows)


def verification_table(experiment: Experiment, small: np.ndarray, target: Scores, arguments) -> pd.DataFrame:
    """For each K and b_v: target gradients, and the coreset's overlap with the one whose V_i are of ALL samples of a
    stratum; beside it the overlap of two seeds' coresets. Means over seeds."""
    rows, asked = [], (arguments.num_strata, arguments.verify_per_stratum, experiment.selection.rates)
    for num_strata, per_stratum, rate in product(*asked):
        shared, gradients, chosen = [], [], []
        for seed in arguments.seeds:
            settings = replace(Settings.of(experiment.selection), num_strata=num_strata, seed=seed)
            settings, every = (replace(settings, verify_per_stratum=count) for count in (per_stratum, len(small)))
            chosen.append(coreset(small, target, settings, rate))
            shared.append(overlap(chosen[-1], coreset(small, target, every, rate, everything=True)))
            gradients.append(len(drawn(small, settings)))
        of_seeds = [overlap(*pair) for pair in combinations(chosen, 2)]
        rows.append((num_strata, per_stratum, rate, *map(np.mean, (gradients, shared, of_seeds))))
    figures = ["target_gradients", "overlap_with_all_verified", "overlap_of_two_seeds"]
    return pd.DataFrame(rows, columns=["num_strata", "verify_per_stratum", "rate", *figures])


def drawn(small: np.ndarray, by: Settings) -> np.ndarray:
    return np.sort(np.concatenate(draw(cut_strata(small, by), by)))


def coreset(small: np.ndarray, target: Scores, by: Settings, rate: float, everything: bool = False) -> np.ndarray:
    """STAFF's rows, with V_i from the drawn samples, normalised over all the target has scored where `everything`."""
    scored = target if everything else target.only(drawn(small, by))
    ratios = [record.verification_ratio for record in verify(small, scored, by)]
    return choose_staff(small, cut_strata(small, by), ratios, coreset_size(rate, len(small)), by.mode, by.seed).rows


if __name__ == "__main__":
    run_stage(main)
