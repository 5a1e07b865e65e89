"""How far two sets of scores agree: in rank, in strata, and in the coresets cut from them. Needs no model.

    python scripts/agreement.py runs/demo/scores/small runs/demo/scores/target --rate 0.2 0.1

Needs two score folders, or Parquet or CSV files with columns index, effort and, where known, n_response_tokens.
Compares the rows that both have; prints a table.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

from selection.report.agreement import agreement
from selection.run.cli import argument_parser
from selection.run.config import Selection, validated
from selection.scores.folder import has_column, read_scores


def main() -> None:
    parser, default = argument_parser(__doc__), Selection()
    parser.add_argument("scores", type=Path, nargs=2, metavar="SCORES", help="two score folders or files; required")
    said = "fractions of the rows to keep; default: %(default)s"
    parser.add_argument("--rate", dest="rates", type=float, nargs="+", default=default.rates, help=said)
    for name, kind, about in (
        ("num_strata", int, "K"),
        ("hardest_cutoff", float, "fraction with the highest scores that is dropped first"),
        ("seed", int, "of the rows drawn in each stratum"),
    ):
        value, said = getattr(default, name), f"{about}; default: %(default)s"
        parser.add_argument(f"--{name}", type=kind, default=value, help=said)
    arguments = vars(parser.parse_args())
    settings = validated(default, {name: arguments[name] for name in ("rates", "num_strata", "hardest_cutoff", "seed")})
    scores = []
    for path in arguments["scores"]:  # read_scores refuses a missing one
        known = path.exists() and has_column(path, "n_response_tokens")
        scores.append(read_scores(path, ["effort", "n_response_tokens"] if known else ["effort"]))
    result = agreement(*scores, settings.rates, settings.num_strata, settings.hardest_cutoff, settings.seed)
    partial = "unknown" if result.partial_spearman is None else f"{result.partial_spearman:.4f}"
    for said, value in (
        ("rows with both scores", result.num_rows),
        ("Spearman", f"{result.spearman:.4f}"),
        ("Spearman, number of response tokens held fixed", partial),
        ("Rand index of the strata", f"{result.rand_index:.4f}"),
        ("adjusted Rand index", f"{result.adjusted_rand_index:.4f}\n"),
    ):
        print(f"{said:<48}{value}")
    print("overlap of the coresets, |A ∩ B| / m, and by chance (STAFF without verification: B's scores shuffled)")
    print(f"{'rate':>6}{'m':>9}{'highest scores':>17}{'by chance':>12}{'STAFF':>12}{'by chance':>12}")
    for o in result.overlaps:
        print(f"{o.rate:>6g}{o.m:>9}{o.highest:>17.3f}{o.rate:>12.3f}{o.staff:>12.3f}{o.staff_by_chance:>12.3f}")


if __name__ == "__main__":
    run_stage(main)
