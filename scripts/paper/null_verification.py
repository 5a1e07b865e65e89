"""Does verification measure the target? V_i of finished runs beside what it would be if the target knew nothing.

    python scripts/paper/null_verification.py runs/demo --rate 0.2 --out data/results/ablations/null_verification.csv

Needs run folders of mode paper up to verify.py. For each stratum: V_i, its mean over all shuffles of the target's
scores among the verified rows (null), and V_i against what the small model's scores lead to expect (calibrated); the
budgets that each gives at --rate. Prints the table and how much of the coreset by V_i the others share.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
from selection.run.ending import run_stage

import pandas as pd

from scripts.paper.cells import markdown_table
from selection.method.staff import coreset_size
from selection.report.agreement import overlap
from selection.run.cli import argument_parser
from selection.run.config import load_run
from selection.run.errors import UserError, refusals
from selection.run.products import atomic_path
from selection.scores.folder import read_scores
from selection.scores.verification import (
    Settings,
    calibrated_ratios_of,
    cut_strata,
    null_ratios_of,
    read_verification,
    staff_rule,
)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders; required")
    parser.add_argument("--rate", type=float, default=0.2, help="fraction of the rows to keep; default: 0.2")
    parser.add_argument("--out", type=Path, required=True, help="CSV file for the table; required")
    arguments = parser.parse_args()
    tables = [of_run(folder, arguments.rate) for folder in arguments.runs]
    table = pd.concat(tables, ignore_index=True).round(3)
    with atomic_path(arguments.out) as draft:
        table.to_csv(draft, index=False)
    print(markdown_table(list(table), table.astype(str).to_numpy().tolist()))


def of_run(folder: Path, rate: float) -> pd.DataFrame:
    experiment = load_run(folder)
    settings = Settings.of(experiment.selection)
    scores = read_scores(experiment.small_scores, settings.columns).check_complete()
    records, _ = read_verification(experiment.verification, settings, scores)
    if any(record.verification_ratio is None for record in records):
        raise UserError(f"{folder} has strata without a verified row, as mode released leaves them: give mode paper")
    nulls, calibrated = null_ratios_of(records), calibrated_ratios_of(records)
    strata, chosen = cut_strata(scores.effort, settings), {}
    with refusals():
        m = coreset_size(rate, len(scores.index))
    for name, ratios in {
        "V": [record.verification_ratio for record in records],
        "null": nulls,
        "calibrated": calibrated,
        "even": [1.0] * len(records),
    }.items():
        by = [replace(record, verification_ratio=ratio) for record, ratio in zip(records, ratios, strict=True)]
        chosen[name] = staff_rule(scores, strata, by, settings)(m, None)
    shared = {name: overlap(chosen["V"].rows, choice.rows) for name, choice in chosen.items()}
    print(f"{folder}: {m} rows; shared with the coreset by V: {', '.join(f'{k} {v:.2f}' for k, v in shared.items())}")
    table = pd.DataFrame({"run": folder.name, "stratum": range(len(records)), "size": strata.sizes})
    table["V"], table["null"] = [record.verification_ratio for record in records], nulls
    table["calibrated"] = calibrated
    return table.assign(**{f"budget by {name}": choice.budgets for name, choice in chosen.items()})


if __name__ == "__main__":
    run_stage(main)
