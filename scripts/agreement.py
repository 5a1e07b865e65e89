"""How far two sets of scores agree: in rank, in strata, and in the coresets cut from them. Needs no model.

    python scripts/agreement.py runs/demo/scores/small runs/demo/scores/target --rate 0.2 0.1

Both are score folders, or Parquet or CSV files with columns index,effort and, where known, n_response_tokens. All is
counted over the rows that both have scores for. Needs two of them; prints a table and writes nothing.
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
    options = {
        "--rate": {"dest": "rates", "type": float, "nargs": "+", "help": "fractions of the rows to keep"},
        "--num_strata": {"type": int, "help": "K"},
        "--hardest_cutoff": {"type": float, "help": "fraction with the highest scores that is dropped first"},
        "--seed": {"type": int, "help": "of the rows drawn in each stratum"},
    }
    for flag, about in options.items():
        about["default"] = getattr(default, about.get("dest", flag[2:]))
        parser.add_argument(flag, **about | {"help": f"{about['help']}; default: %(default)s"})
    arguments = vars(parser.parse_args())
    settings = validated(default, {name: arguments[name] for name in arguments.keys() & Selection.model_fields.keys()})
    scores = []
    for path in arguments["scores"]:  # one that is not there, read_scores names
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
