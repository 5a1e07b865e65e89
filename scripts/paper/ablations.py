r"""What each choice in selection is worth, at the price of scoring only: nothing is tuned on a coreset.

    python scripts/paper/ablations.py --config_path configs/smollm2/go_biology.yaml --layers 16 12 20 --passes 3 1 0 \
        --set max_samples=500 --set eval_size=0.2 --set selection.num_strata=20 --set selection.verify_per_stratum=5 \
        --jobs 2 --baseline_scores runs/reproduce/smollm2_cpu/go_biology-seed-1/scores/target-full

Needs the target (scripts/demo_models.sh). Cuts speculators of some sizes out of the target, tunes each for some passes,
and scores the training split on all of them and on the target. The first of each is the one that verification and
departures are looked at with. Writes data/results/ablations/ (--out): speculator.csv, verification.csv and
departures.csv, and ablations.md with all three as tables. Finished models and scores are reused.
"""

import argparse
import csv
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from selection.run.ending import end_on_signals

end_on_signals()

import numpy as np

from scripts.paper.cells import Job, run_jobs, stage_flops
from scripts.paper.tables import markdown_table
from selection.method.baselines import baseline
from selection.method.staff import (
    Strata,
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
BASELINE_COLUMNS = ("el2n", "el2n_released", "hidden_state")


def main() -> None:
    parser = argument_parser(__doc__)
    add_experiment_arguments(parser)
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[16], help="decoder layers kept of the target; default: %(default)s"
    )
    parser.add_argument(
        "--passes", type=int, nargs="+", default=[3, 1, 0], help="epochs of tuning; default: %(default)s"
    )
    parser.add_argument(
        "--verify_per_stratum", type=int, nargs="+", default=[5, 10, 20], help="b_v, rows; default: %(default)s"
    )
    parser.add_argument("--num_strata", type=int, nargs="+", default=[20, 50], help="K; default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1, 11)), help="of draws; default: 1 to 10")
    parser.add_argument(
        "--baseline_scores", type=Path, help="of the tuned target with all columns: EL2N, CCS and D2 too; default: none"
    )
    parser.add_argument("--jobs", type=int, default=1, help="speculators at a time; default: %(default)s")
    parser.add_argument(
        "--runs",
        type=Path,
        default=REPOSITORY / "runs" / "ablations",
        help="folder of the run folders; default: runs/ablations",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=REPOSITORY / "data" / "results" / "ablations",
        help="folder of the tables; default: data/results/ablations",
    )
    arguments = parser.parse_args()
    if len(arguments.seeds) < 2:
        raise UserError("--seeds: give two or more, the differences between them are the yardstick")
    tuned_target = None
    if arguments.baseline_scores:
        tuned_target = read_scores(arguments.baseline_scores, BASELINE_COLUMNS).check_complete()
        experiment = load_experiment(arguments.config_path, arguments.set)
        if tuned_target.fingerprint != fingerprint_of(experiment, arguments.runs):
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
    about = f"{names[0]}, {len(target.index)} rows, {names[1]}, {code_version()}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        with atomic_path(arguments.out / f"{name}.csv") as draft, draft.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    with atomic_path(arguments.out / "ablations.md") as draft:
        draft.write_text(as_markdown(tables, about), encoding="utf-8")
    print(as_markdown(tables, about))


def run_speculators(arguments: argparse.Namespace) -> dict[tuple[int, int], Experiment]:
    """Scores of every speculator and, in the run folder of the first, of the target."""
    arguments.runs = arguments.runs.resolve()
    experiments, jobs = {}, []
    for layers, passes in itertools.product(arguments.layers, arguments.passes):
        target = load_experiment(arguments.config_path, arguments.set).target_model
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
        experiment = experiments[layers, passes] = load_experiment(arguments.config_path, changes)
        rows = len(training_split(experiment).rows)
        cut = f"{layers} layers"
        if passes == arguments.passes[0]:
            where = REPOSITORY / target
            more = ["--target", str(where.resolve()) if where.exists() else target, "--out", model]
            jobs.append(Job(cut, [["scripts/make_draft.py", *options, "--layers", str(layers), *more]], 0))
        commands = [["finetune/finetune.py", *options], ["selection/effort_score.py", *options]]
        if len(experiments) == 1:
            commands.append(["selection/verify.py", *options])
        jobs.append(Job(f"{cut}, {passes} passes", commands, rows * passes, needs=cut))
    run_jobs(jobs, arguments.jobs, arguments.runs / "logs", lambda job: None)
    return experiments


def speculator_table(experiments: dict[tuple[int, int], Experiment], target: Scores) -> list[dict]:
    """Agreement of each speculator's scores with those of the fully scored target, and what tuning and scoring it cost
    (cutting it comes on top, the same for all passes)."""
    rows = []
    for (layers, passes), experiment in experiments.items():
        settings = experiment.selection
        small = read_scores(experiment.small_scores, MORE)
        found = agreement(small, target, settings.rates, settings.num_strata, settings.hardest_cutoff, settings.seed)
        costs = [c for c in selection_costs(experiment, "staff") if c.stage in (SPECULATIVE_TUNING, SPECULATIVE_SCORES)]
        models = (model_path(model) for model in (experiment.small_model, experiment.target_model))
        sizes = tuple(map(parameters_of, models))
        rows.append(
            {
                "layers": layers,
                "passes": passes,
                "spearman": round(found.spearman, 4),
                "spearman_length_fixed": round(found.partial_spearman, 4),
                "adjusted_rand_index": round(found.adjusted_rand_index, 4),
                **{f"overlap_highest_{o.rate:g}": round(o.highest, 4) for o in found.overlaps},
                **{f"overlap_staff_{o.rate:g}": round(o.staff, 4) for o in found.overlaps},
                **{f"by_chance_{o.rate:g}": round(o.staff_by_chance, 4) for o in found.overlaps},
                "seconds": round(sum(c.seconds for c in costs), 1),
                "flops": f"{sum(stage_flops(c, experiment, sizes) for c in costs):.3g}",
            }
        )
    return rows


def verification_table(experiment: Experiment, target: Scores, arguments: argparse.Namespace) -> list[dict]:
    """For each K and b_v: target gradients, and the overlap of the coreset with the one of the same strata and draws
    whose V_i are of ALL samples of a stratum. Beside it the overlap of two seeds' coresets. Means over seeds."""
    small, rows = read_scores(experiment.small_scores).of_all_rows(), []
    for num_strata, per_stratum in itertools.product(arguments.num_strata, arguments.verify_per_stratum):
        for rate in experiment.selection.rates:
            shared, gradients, chosen = [], [], []
            for seed in arguments.seeds:
                settings = Settings("paper", num_strata, per_stratum, experiment.selection.hardest_cutoff, seed)
                gradients.append(len(sampled(target, cut_strata(small, settings), settings).index))
                coreset = staff_coreset(small, target, settings, rate)
                everything = replace(settings, verify_per_stratum=len(small))
                best = staff_coreset(small, target, everything, rate, everything=True)
                shared.append(overlap(coreset, best))
                chosen.append(coreset)
            rows.append(
                {
                    "num_strata": num_strata,
                    "verify_per_stratum": per_stratum,
                    "rate": rate,
                    "target_gradients": _mean(gradients),
                    "overlap_with_all_verified": _mean(shared),
                    "overlap_of_two_seeds": _mean(overlap(a, b) for a, b in itertools.combinations(chosen, 2)),
                }
            )
    return rows


def departure_table(
    experiment: Experiment, target: Scores, tuned_target: Scores | None, seeds: list[int]
) -> list[dict]:
    """Overlap with the published rule's coreset when ONE departure of the released code is made (README's numbers),
    on the same stored scores and draws. Means over seeds (of draws)."""
    selection = experiment.selection
    small, reset = read_scores(experiment.small_scores).of_all_rows(), released_scores(experiment)
    shared: dict[str, dict[float, list[float]]] = {}
    for seed, rate in itertools.product(seeds, selection.rates):
        cutoff = selection.hardest_cutoff
        paper = Settings("paper", selection.num_strata, selection.verify_per_stratum, cutoff, seed)
        released = replace(paper, mode="released")
        m, strata = coreset_size(rate, len(small)), cut_strata(small, paper)
        by_v, by_sum = (
            allocate_budgets(strata.sizes, ratios(small, sampled(target, strata, by), by), m, by.mode)
            for by in (paper, released)
        )
        own_extremes = ratios_by_own_extremes(small, target, strata, paper)
        published = staff_coreset(small, target, paper, rate)
        variants = {
            "1 tuned query and value adapters reset": staff_coreset(reset, target, paper, rate),
            "2 target scores everything": staff_coreset(small, target, paper, rate, everything=True),
            "3 budgets by the sum of V": choose_within_strata(small, strata, by_sum, m, "paper", seed).rows,
            "4 highest scores inside a stratum": choose_within_strata(small, strata, by_v, m, "released", seed).rows,
            "5 scores doubled": staff_coreset(2 * small, target, paper, rate),
            "6 another seed": staff_coreset(small, target, replace(paper, seed=seed + 1000), rate),
            "1 to 5, mode released": staff_coreset(reset, target, released, rate, everything=True),
            "V by the verified samples' extremes alone": choose_staff(
                small, strata, own_extremes, rate, "paper", seed
            ).rows,
        }
        for name, rows in variants.items():
            shared.setdefault(name, {}).setdefault(rate, []).append(overlap(rows, published))
    if tuned_target is not None:
        # CCS and D2 read one EL2N here, so that nothing but their own departure tells them apart.
        columns = tuned_target.columns
        one_el2n = columns | {"el2n_released": columns["el2n"]}
        for name, method, read in (("7 EL2N", "el2n", columns), ("8 CCS", "ccs", one_el2n), ("9 D2", "d2", one_el2n)):
            for seed in seeds if method == "ccs" else seeds[:1]:
                published, released = (
                    baseline(method, read, len(small), selection.model_copy(update={"variant": by, "seed": seed}))
                    for by in ("published", "released")
                )
                for rate in selection.rates:
                    rows = released(rate).rows, published(rate).rows
                    shared.setdefault(name, {}).setdefault(rate, []).append(overlap(*rows))
    return [
        {"departure": name, **{f"rate_{rate:g}": _mean(values) for rate, values in by_rate.items()}}
        for name, by_rate in shared.items()
    ]


def fingerprint_of(experiment: Experiment, runs: Path) -> str:
    """Of the training split that every experiment of this run will have."""
    experiment.output_dir = str(runs.resolve() / "split")
    return training_split(experiment).fingerprint


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
    strata = cut_strata(small, settings)
    v = ratios(small, target if everything else sampled(target, strata, settings), settings)
    return choose_staff(small, strata, v, rate, settings.mode, settings.seed).rows


def sampled(target: Scores, strata: Strata, settings: Settings) -> Scores:
    """What verification would have scored."""
    return target.only(np.sort(np.concatenate(draw(strata, settings))))


def ratios(small: np.ndarray, target: Scores, settings: Settings) -> list[float | None]:
    return [record.verification_ratio for record in verify(small, target, settings)]


def ratios_by_own_extremes(small: np.ndarray, target: Scores, strata: Strata, settings: Settings) -> list[float]:
    """V_i where the target's minimum and maximum are simply those of the verified samples."""
    drawn = draw(strata, settings)
    known = target.at(np.concatenate(drawn))
    return [
        verification_ratio(
            min_max_normalise(target.at(rows), reference=known), min_max_normalise(small[rows], reference=small)
        )
        for rows in drawn
    ]


def _mean(values) -> float:
    return round(float(np.mean(list(values))), 4)


def as_markdown(tables: dict[str, list[dict]], about: str) -> str:
    blocks = ["# What each choice in selection is worth", about]
    for name, rows in tables.items():
        heading = [key.replace("_", " ") for key in rows[0]]
        blocks += [f"## {name}", markdown_table(heading, [[f"{value}" for value in row.values()] for row in rows])]
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    run_stage(main)
