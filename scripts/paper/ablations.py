"""What verification is worth: by K and b_v, how much of a coreset stays if every row of every stratum is verified.

    python scripts/paper/ablations.py runs/smollm2_go_biology --out data/results/ablations

Needs a run folder whose target has scored every row (selection.verify: all). Writes verification.csv and
verification.md to --out. No model is loaded.
"""

import sys
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
from selection.run.ending import run_stage

import numpy as np
import pandas as pd

from scripts.paper.cells import markdown_table
from selection.method.staff import choose_staff, coreset_size
from selection.report.agreement import overlap
from selection.run.cli import argument_parser
from selection.run.config import Experiment, load_run
from selection.run.errors import UserError, refusals
from selection.run.products import atomic_path, code_version
from selection.scores.folder import Scores, read_scores
from selection.scores.verification import Settings, cut_strata, draw, verify

NUMBERS = {  # option: (default, meaning)
    "verify_per_stratum": ([5, 10, 20], "b_v, rows"),
    "num_strata": ([20, 50], "K"),
    "seeds": (list(range(1, 11)), "of draws, two or more"),
}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("run", type=Path, help="run folder; required")
    for name, (default, meaning) in NUMBERS.items():
        said = f"{meaning}; default: %(default)s"
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default, help=said)
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables; required")
    arguments = parser.parse_args()
    if len(arguments.seeds) < 2:
        raise UserError("--seeds: give two or more, the differences between them are the yardstick")
    experiment = load_run(arguments.run)
    small, target = (read_scores(each) for each in (experiment.small_scores, experiment.target_scores))
    efforts = small.of_all_rows()
    target.of_all_rows()
    with refusals():
        table = verification_table(experiment, efforts, target, arguments).round(4)
    with atomic_path(arguments.out / "verification.csv") as draft:
        table.to_csv(draft, index=False)
    heading, rows = [column.replace("_", " ") for column in table], table.astype(str).to_numpy().tolist()
    text = f"# Verification\n\n{len(efforts)} rows, {code_version()}\n\n{markdown_table(heading, rows)}\n"
    with atomic_path(arguments.out / "verification.md") as draft:
        draft.write_text(text, encoding="utf-8")
    print(text)


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
