"""How far two sets of scores agree: in rank, in strata, and in the coresets cut from them. Needs no model.

    python scripts/agreement.py runs/demo/scores/small runs/demo/scores/target --rate 0.2 0.1

Both are score folders, or Parquet or CSV files with columns index,effort and, where known, n_response_tokens. All is
counted over the rows that both have scores for. Needs two of them; prints a table and writes nothing.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from selection.run.ending import end_on_signals

end_on_signals()

from selection.report.agreement import agreement, format_agreement
from selection.run.cli import argument_parser, run_stage
from selection.run.config import Selection, validated
from selection.scores.folder import has_column, read_scores


def main() -> None:
    parser = argument_parser(__doc__)
    published = Selection()
    parser.add_argument("scores", type=Path, nargs=2, metavar="SCORES", help="two score folders or files; required")
    parser.add_argument(
        "--rate",
        type=float,
        nargs="+",
        default=published.rates,
        help="fractions of the rows to keep; default: %(default)s",
    )
    parser.add_argument("--num_strata", type=int, default=published.num_strata, help="K; default: %(default)s")
    parser.add_argument(
        "--hardest_cutoff",
        type=float,
        default=published.hardest_cutoff,
        help="fraction with the highest scores that is dropped first; default: %(default)s",
    )
    parser.add_argument(
        "--seed", type=int, default=published.seed, help="of the rows drawn in each stratum; default: %(default)s"
    )
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in ("num_strata", "hardest_cutoff", "seed")}
    settings = validated(published, given | {"rates": arguments.rate})
    scores = []
    for path in arguments.scores:
        columns = ["effort"]
        # A path that is not there is read_scores' to name.
        if path.exists() and has_column(path, "n_response_tokens"):
            columns.append("n_response_tokens")
        scores.append(read_scores(path, columns))
    result = agreement(*scores, settings.rates, settings.num_strata, settings.hardest_cutoff, settings.seed)
    print(format_agreement(result))


if __name__ == "__main__":
    run_stage(main)
