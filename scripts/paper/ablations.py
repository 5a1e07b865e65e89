r"""What each choice in selection is worth, at the price of scoring only: nothing is tuned on a coreset.

    python scripts/paper/ablations.py --config_path configs/smollm2/go_biology.yaml --layers 16 12 20 --passes 3 1 0 \
        --set max_samples=500 --set eval_size=0.2 --set selection.num_strata=20 --set selection.verify_per_stratum=5 \
        --jobs 2 --baseline_scores runs/reproduce/smollm2_cpu/go_biology-seed-1/scores/target-full

Needs the target (scripts/demo_models.sh). Cuts speculators of some sizes out of it, tunes each for some passes, and
scores the training split on all of them and on the target. Verification and departures are those of the first. Writes
three CSVs and ablations.md to data/results/ablations/ (--out). Finished models and scores are reused.
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
from selection.method import staff
from selection.method.baselines import baseline
from selection.report.agreement import agreement, overlap
from selection.rows.split import training_split
from selection.run.cli import add_experiment_arguments, argument_parser
from selection.run.config import REPOSITORY, Experiment, load_experiment
from selection.run.errors import UserError, refusals
from selection.run.ledger import SPECULATIVE_SCORES, SPECULATIVE_TUNING, selection_costs
from selection.run.model_folder import model_path
from selection.run.products import atomic_path, code_version
from selection.scores.folder import Scores, read_scores
from selection.scores.models import parameters_of
from selection.scores.scoring import score_rows
from selection.scores.verification import Settings, cut_strata, draw, verify

COLUMNS = ("effort", "n_response_tokens")
RESET_SCORES = "speculative scores, adapters reset"  # a stage of its own in the ledger: no method pays for it
BASELINE_COLUMNS = ("el2n", "el2n_released", "hidden_state")
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
    said = "of the tuned target with all columns: EL2N, CCS and D2 too; default: none"
    parser.add_argument("--baseline_scores", type=Path, help=said)
    parser.add_argument("--jobs", type=int, default=1, help="speculators at a time; default: 1")
    for option, folder in (("runs", "runs/ablations"), ("out", "data/results/ablations")):
        said = f"folder of the {'run folders' if option == 'runs' else 'tables'}; default: {folder}"
        parser.add_argument(f"--{option}", type=Path, default=REPOSITORY / folder, help=said)
    arguments = parser.parse_args()
    arguments.runs, tuned_target = arguments.runs.resolve(), None
    if len(arguments.seeds) < 2:
        raise UserError("--seeds: give two or more, the differences between them are the yardstick")
    if arguments.baseline_scores:
        tuned_target = read_scores(arguments.baseline_scores, BASELINE_COLUMNS).check_complete()
        here = [*arguments.set, f"output_dir={json.dumps(str(arguments.runs / 'split'))}"]
        if tuned_target.fingerprint != training_split(load_experiment(arguments.config_path, here)).fingerprint:
            raise UserError(f"--baseline_scores {tuned_target.source}: scores of another training split than this one")
    experiments = run_speculators(arguments)
    reference = next(iter(experiments.values()))
    small, target = read_scores(reference.small_scores).of_all_rows(), read_scores(reference.target_scores, COLUMNS)
    with refusals():
        departures = departures_of_staff(reference, small, target, arguments.seeds)
        if tuned_target:
            departures += departures_of_baselines(reference, tuned_target, arguments.seeds)
        verification = verification_table(reference, small, target, arguments)
    means = pd.DataFrame(departures, columns=["departure", "rate", "shared"])
    means = means.pivot_table("shared", "departure", "rate", sort=False)[reference.selection.rates]
    tables = {"speculator": speculator_table(experiments, target), "verification": verification}
    tables["departures"] = means.rename(columns="rate_{:g}".format).reset_index()
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


def departures_of_staff(experiment: Experiment, small: np.ndarray, target: Scores, seeds: list[int]) -> list[tuple]:
    """Overlap with the published rule's coreset under ONE departure of the released code (its number in README.md), on
    the same scores and draws: (departure, rate, share) for each seed."""
    normalised, shared, split = staff.min_max_normalise(small, small), [], training_split(experiment)
    # Departure 1: other scores of the same tuned model.
    mode_released, folder = experiment.model_copy(deep=True), experiment.folder / "scores" / "small-released"
    mode_released.selection.mode, every = "released", np.arange(len(split.rows))
    score_rows(mode_released, split, experiment.small_model, experiment.tuned_small, every, folder, RESET_SCORES)
    reset = read_scores(folder).of_all_rows()
    for seed, rate in product(seeds, experiment.selection.rates):
        paper = replace(Settings.of(experiment.selection), seed=seed)
        released, draws = replace(paper, mode="released"), draw(cut_strata(small, paper), paper)
        known, extremes = target.at(np.concatenate(draws)), []
        for rows in draws:
            own = staff.min_max_normalise(target.at(rows), known)
            extremes.append(staff.verification_ratio(own, normalised[rows]))
        departures = {
            "1 tuned query and value adapters reset": {"small": reset},
            "2 target scores everything": {"everything": True},
            "3 budgets by the sum of V": {"v": ratios(small, target, released), "budgets": "released"},
            "4 highest scores inside a stratum": {"within": "released"},
            "5 scores doubled": {"small": 2 * small},
            "6 another seed": {"by": replace(paper, seed=seed + 1000)},
            "1 to 5, mode released": {"small": reset, "by": released, "everything": True},
            "V by the verified samples' extremes alone": {"v": extremes},
        }
        published = {"small": small, "target": target, "by": paper, "rate": rate}
        rows = coreset(**published)
        shared += [(name, rate, overlap(coreset(**published | made), rows)) for name, made in departures.items()]
    return shared


def departures_of_baselines(experiment: Experiment, tuned_target: Scores, seeds: list[int]) -> list[tuple]:
    """As `departures_of_staff`, on the tuned target's scores."""
    shared, by, columns, count = [], experiment.selection, tuned_target.columns, len(tuned_target.index)
    # CCS and D2 read one EL2N here, so that nothing but their own departure tells them apart.
    one_el2n = columns | {"el2n_released": columns["el2n"]}
    for name, method, read in (("7 EL2N", "el2n", columns), ("8 CCS", "ccs", one_el2n), ("9 D2", "d2", one_el2n)):
        for seed in seeds if method == "ccs" else seeds[:1]:
            settings = by.num_strata, by.hardest_cutoff, seed
            rules = [baseline(method, read, count, "paper", rule, *settings) for rule in ("published", "released")]
            for rate in by.rates:
                m = staff.coreset_size(rate, count)
                shared.append((name, rate, overlap(*(rule(m, None).rows for rule in rules))))
    return shared


def drawn(small: np.ndarray, by: Settings) -> np.ndarray:
    return np.sort(np.concatenate(draw(cut_strata(small, by), by)))


def ratios(small: np.ndarray, target: Scores, by: Settings, everything: bool = False) -> list[float | None]:
    """V_i from the drawn samples, normalised over all the target has scored where `everything`."""
    scored = target if everything else target.only(drawn(small, by))
    return [record.verification_ratio for record in verify(small, scored, by)]


def coreset(small, target, by: Settings, rate: float, everything=False, v=None, budgets=None, within=None):
    """STAFF's rows. `v`: other V_i; `budgets`, `within`: the mode of another rule for budgets or inside strata."""
    strata, m = cut_strata(small, by), staff.coreset_size(rate, len(small))
    sizes = staff.allocate_budgets(strata.sizes, v or ratios(small, target, by, everything), m, budgets or by.mode)
    return staff.choose_staff(small, strata, [], m, within or by.mode, by.seed, budgets=sizes).rows


if __name__ == "__main__":
    run_stage(main)
