r"""What each choice in selection is worth, at the price of scoring only: nothing is tuned on a coreset.

    python scripts/paper/ablations.py --config_path configs/smollm2/go_biology.yaml --layers 16 12 20 --passes 3 1 0 \
        --set max_samples=500 --set eval_size=0.2 --set selection.num_strata=20 --set selection.verify_per_stratum=5 \
        --jobs 2 --baseline_scores runs/reproduce/smollm2_cpu/go_biology-seed-1/scores/target-full

Needs the target (scripts/demo_models.sh). Cuts speculators of some sizes out of the target, tunes each for some passes,
and scores the training split on all of them and on the target. Verification and departures are those of the first.
Writes data/results/ablations/ (--out): speculator.csv, verification.csv, departures.csv, and ablations.md with all
three. Finished models and scores are reused.
"""

import argparse
import json
import sys
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from selection.run.ending import end_on_signals

end_on_signals()

import numpy as np
import pandas as pd

from scripts.paper.cells import Job, markdown_table, run_jobs, stage_flops
from selection.method.baselines import baseline
from selection.method.staff import (
    allocate_budgets,
    choose_staff,
    choose_within_strata,
    coreset_size,
    min_max_normalise,
    verification_ratio,
)
from selection.report.agreement import agreement, overlap
from selection.rows.split import training_split
from selection.run.cli import add_experiment_arguments, argument_parser, run_stage
from selection.run.config import REPOSITORY, Experiment, load_experiment
from selection.run.errors import UserError
from selection.run.ledger import SPECULATIVE_SCORES, SPECULATIVE_TUNING, selection_costs
from selection.run.model_folder import model_path
from selection.run.products import atomic_path, code_version
from selection.scores.folder import Scores, read_scores
from selection.scores.models import parameters_of
from selection.scores.scoring import score_rows
from selection.scores.verification import Settings, cut_strata, draw, verify

MORE = ("effort", "n_response_tokens")
RESET_SCORES = "speculative scores, adapters reset"  # a stage of its own in the ledger: no method pays for it
EXTREMES = "V by the verified samples' extremes alone"
BASELINE_COLUMNS = ("el2n", "el2n_released", "hidden_state")


def main() -> None:
    parser = argument_parser(__doc__)
    add_experiment_arguments(parser)
    for name, default, meaning in (
        ("layers", [16], "decoder layers kept of the target"),
        ("passes", [3, 1, 0], "epochs of tuning"),
        ("verify_per_stratum", [5, 10, 20], "b_v, rows"),
        ("num_strata", [20, 50], "K"),
        ("seeds", list(range(1, 11)), "of draws"),
    ):
        said = f"{meaning}; default: {' '.join(map(str, default))}"
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default, help=said)
    said = "of the tuned target with all columns: EL2N, CCS and D2 too; default: none"
    parser.add_argument("--baseline_scores", type=Path, help=said)
    parser.add_argument("--jobs", type=int, default=1, help="speculators at a time; default: 1")
    runs, out = REPOSITORY / "runs" / "ablations", REPOSITORY / "data" / "results" / "ablations"
    parser.add_argument("--runs", type=Path, default=runs, help="folder of the run folders; default: runs/ablations")
    parser.add_argument("--out", type=Path, default=out, help="folder of the tables; default: data/results/ablations")
    arguments = parser.parse_args()
    arguments.runs = arguments.runs.resolve()
    if len(arguments.seeds) < 2:
        raise UserError("--seeds: give two or more, the differences between them are the yardstick")
    tuned_target = None
    if arguments.baseline_scores:
        tuned_target = read_scores(arguments.baseline_scores, BASELINE_COLUMNS).check_complete()
        here = [*arguments.set, f"output_dir={json.dumps(str(arguments.runs / 'split'))}"]
        if tuned_target.fingerprint != training_split(load_experiment(arguments.config_path, here)).fingerprint:
            raise UserError(f"--baseline_scores {tuned_target.source}: scores of another training split than this one")
    experiments = run_speculators(arguments)
    reference = next(iter(experiments.values()))
    target = read_scores(reference.target_scores, MORE)
    tables = {
        "speculator": speculator_table(experiments, target),
        "verification": verification_table(reference, target, arguments),
        "departures": departure_table(reference, target, tuned_target, arguments.seeds),
    }
    names = Path(reference.small_model).name, Path(arguments.config_path).name
    blocks = ["# What each choice in selection is worth"]
    blocks.append(f"{names[0]}, {len(target.index)} rows, {names[1]}, {code_version()}")
    for name, table in tables.items():
        with atomic_path(arguments.out / f"{name}.csv") as draft:
            table.to_csv(draft, index=False)
        heading = [column.replace("_", " ") for column in table]
        blocks += [f"## {name}", markdown_table(heading, table.astype(str).to_numpy().tolist())]
    text = "\n\n".join(blocks) + "\n"
    with atomic_path(arguments.out / "ablations.md") as draft:
        draft.write_text(text, encoding="utf-8")
    print(text)


def run_speculators(arguments: argparse.Namespace) -> dict[tuple[int, int], Experiment]:
    """Scores of every speculator and, in the run folder of the first, of the target."""
    experiments, jobs = {}, []
    target = load_experiment(arguments.config_path, arguments.set).target_model
    local = (REPOSITORY / target).resolve()
    for layers, passes in product(arguments.layers, arguments.passes):
        model = str(arguments.runs / f"{layers}-layers")
        changes = [
            *arguments.set,
            f"small_model={json.dumps(model)}",
            f"output_dir={json.dumps(str(arguments.runs / f'{layers}-layers-{passes}-passes'))}",
            f"small_training.num_train_epochs={passes}",
            "speculative_run=null",
            "selection.mode=paper",
            "selection.verify=all",
        ]
        options = ["--config_path", str(Path(arguments.config_path).resolve())]
        options += [part for change in changes for part in ("--set", change)]
        if passes == arguments.passes[0]:
            cut = ["--layers", str(layers), "--target", str(local) if local.exists() else target, "--out", model]
            jobs.append(Job(f"{layers} layers", [["scripts/make_draft.py", *options, *cut]]))
        stages = ["finetune/finetune.py", "selection/effort_score.py"]
        stages += [] if experiments else ["selection/verify.py"]
        commands = [[stage, *options] for stage in stages]
        jobs.append(Job(f"{layers} layers, {passes} passes", commands, needs=f"{layers} layers"))
        experiments[layers, passes] = load_experiment(arguments.config_path, changes)
    run_jobs(jobs, arguments.jobs, arguments.runs / "logs", lambda job: None)
    return experiments


def speculator_table(experiments: dict[tuple[int, int], Experiment], target: Scores) -> pd.DataFrame:
    """Agreement of each speculator's scores with the target's, and what tuning and scoring it cost (cutting it comes on
    top, the same for all passes)."""
    rows = []
    for (layers, passes), experiment in experiments.items():
        by, small = experiment.selection, read_scores(experiment.small_scores, MORE)
        found = agreement(small, target, by.rates, by.num_strata, by.hardest_cutoff, by.seed)
        row = {"layers": layers, "passes": passes, "spearman": found.spearman}
        row |= {"spearman_length_fixed": found.partial_spearman, "adjusted_rand_index": found.adjusted_rand_index}
        columns = {"highest": "overlap_highest", "staff": "overlap_staff", "staff_by_chance": "by_chance"}
        for figure, column in columns.items():
            row |= {f"{column}_{one.rate:g}": getattr(one, figure) for one in found.overlaps}
        costs = [c for c in selection_costs(experiment, "staff") if c.stage in (SPECULATIVE_TUNING, SPECULATIVE_SCORES)]
        sizes = tuple(parameters_of(model_path(model)) for model in (experiment.small_model, experiment.target_model))
        row["seconds"] = round(sum(cost.seconds for cost in costs), 1)
        rows.append(row | {"flops": f"{sum(stage_flops(cost, experiment, sizes) for cost in costs):.3g}"})
    return pd.DataFrame(rows).round(4)


def verification_table(experiment: Experiment, target: Scores, arguments: argparse.Namespace) -> pd.DataFrame:
    """For each K and b_v: target gradients, and the overlap of the coreset with that of the same strata and draws whose
    V_i are of ALL samples of a stratum. Beside it the overlap of two seeds' coresets. Means over seeds."""
    small, rows = read_scores(experiment.small_scores).of_all_rows(), []
    asked, cutoff = (arguments.num_strata, arguments.verify_per_stratum), experiment.selection.hardest_cutoff
    for num_strata, per_stratum, rate in product(*asked, experiment.selection.rates):
        shared, gradients, chosen = [], [], []
        for seed in arguments.seeds:
            settings = Settings("paper", num_strata, per_stratum, cutoff, seed)
            chosen.append(staff_coreset(small, target, settings, rate))
            every = replace(settings, verify_per_stratum=len(small))
            shared.append(overlap(chosen[-1], staff_coreset(small, target, every, rate, everything=True)))
            gradients.append(len(sampled(target, small, settings).index))
        of_seeds = [overlap(*pair) for pair in combinations(chosen, 2)]
        rows.append((num_strata, per_stratum, rate, *map(np.mean, (gradients, shared, of_seeds))))
    figures = ["target_gradients", "overlap_with_all_verified", "overlap_of_two_seeds"]
    return pd.DataFrame(rows, columns=["num_strata", "verify_per_stratum", "rate", *figures]).round(4)


def departure_table(
    experiment: Experiment, target: Scores, tuned_target: Scores | None, seeds: list[int]
) -> pd.DataFrame:
    """Overlap with the published rule's coreset when ONE departure of the released code is made (by its number in
    selection/README.md), on the same stored scores and draws. Means over seeds of draws."""
    selection, shared = experiment.selection, []
    small, reset = read_scores(experiment.small_scores).of_all_rows(), released_scores(experiment)
    for seed, rate in product(seeds, selection.rates):
        paper = Settings("paper", selection.num_strata, selection.verify_per_stratum, selection.hardest_cutoff, seed)
        released, strata, m = replace(paper, mode="released"), cut_strata(small, paper), coreset_size(rate, len(small))
        by_v, by_sum = (
            allocate_budgets(strata.sizes, ratios(small, target, by), m, by.mode) for by in (paper, released)
        )
        drawn = draw(strata, paper)
        known = target.at(np.concatenate(drawn))  # its minimum and maximum are those of the verified samples
        v_by_extremes = [
            verification_ratio(min_max_normalise(target.at(some), known), min_max_normalise(small[some], small))
            for some in drawn
        ]
        coresets = {
            "1 tuned query and value adapters reset": staff_coreset(reset, target, paper, rate),
            "2 target scores everything": staff_coreset(small, target, paper, rate, everything=True),
            "3 budgets by the sum of V": choose_within_strata(small, strata, by_sum, m, "paper", seed).rows,
            "4 highest scores inside a stratum": choose_within_strata(small, strata, by_v, m, "released", seed).rows,
            "5 scores doubled": staff_coreset(2 * small, target, paper, rate),
            "6 another seed": staff_coreset(small, target, replace(paper, seed=seed + 1000), rate),
            "1 to 5, mode released": staff_coreset(reset, target, released, rate, everything=True),
            EXTREMES: choose_staff(small, strata, v_by_extremes, m, "paper", seed).rows,
        }
        published = staff_coreset(small, target, paper, rate)
        shared += [(name, rate, overlap(coreset, published)) for name, coreset in coresets.items()]
    columns = tuned_target.columns if tuned_target else {}
    # CCS and D2 read one EL2N here, so that nothing but their own departure tells them apart.
    one_el2n = columns | {"el2n_released": columns.get("el2n")}
    for name, method, read in (("7 EL2N", "el2n", columns), ("8 CCS", "ccs", one_el2n), ("9 D2", "d2", one_el2n)):
        for seed in (seeds if method == "ccs" else seeds[:1]) if tuned_target else []:
            settings = selection.num_strata, selection.hardest_cutoff, seed
            rules = [baseline(method, read, len(small), "paper", by, *settings) for by in ("published", "released")]
            for rate in selection.rates:
                rows = [rule(coreset_size(rate, len(small)), None).rows for rule in rules]
                shared.append((name, rate, overlap(*rows)))
    means = pd.DataFrame(shared, columns=["departure", "rate", "shared"])
    means = means.pivot_table("shared", "departure", "rate", sort=False).round(4)[selection.rates]
    return means.rename(columns="rate_{:g}".format).reset_index()


def released_scores(experiment: Experiment) -> np.ndarray:
    """The speculator's scores with departure 1, from the same tuned model."""
    released = experiment.model_copy(deep=True)
    released.selection.mode = "released"
    split, folder = training_split(experiment), experiment.folder / "scores" / "small-released"
    every, tuned = np.arange(len(split.rows)), experiment.tuned_small
    score_rows(released, split, experiment.small_model, tuned, every, folder, RESET_SCORES)
    return read_scores(folder).of_all_rows()


def staff_coreset(
    small: np.ndarray, target: Scores, settings: Settings, rate: float, everything: bool = False
) -> np.ndarray:
    """STAFF's rows; V_i from the drawn samples, normalised over all the target has scored where `everything`."""
    v, m = ratios(small, target, settings, everything), coreset_size(rate, len(small))
    return choose_staff(small, cut_strata(small, settings), v, m, settings.mode, settings.seed).rows


def sampled(target: Scores, small: np.ndarray, settings: Settings) -> Scores:
    """What verification would have scored."""
    return target.only(np.sort(np.concatenate(draw(cut_strata(small, settings), settings))))


def ratios(small: np.ndarray, target: Scores, settings: Settings, everything: bool = False) -> list[float | None]:
    scored = target if everything else sampled(target, small, settings)
    return [record.verification_ratio for record in verify(small, scored, settings)]


if __name__ == "__main__":
    run_stage(main)
