"""Adaptive verification against fixed b_v, on stored scores of all rows on both models: nothing is scored here.

    python scripts/paper/adaptive_verification.py runs/mine

Needs run folders with scores/small and scores/target, the latter made under verify: all. Prints a table and writes it
as adaptive.csv: what the coreset shares with the one of the same strata and draws whose V_i are of all rows. Means over
seeds of the draws with 95 % t intervals, each seed's value being a mean over rates.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from selection.run.ending import end_on_signals

end_on_signals()

import numpy as np
from scipy.stats import t

from scripts.paper.tables import markdown_table
from selection.method.adaptive import budget_widths, first_counts, next_counts, ratio_widths
from selection.method.staff import allocate_budgets, choose_within_strata, coreset_size, verification_ratio
from selection.method.staff import draw_verification_samples as draw
from selection.report.agreement import overlap
from selection.run.cli import argument_parser, run_stage
from selection.run.config import REPOSITORY
from selection.run.errors import UserError
from selection.run.products import atomic_path
from selection.scores.folder import Scores, read_scores
from selection.scores.verification import Settings, cut_strata, pairs_of

FIGURES = ("target_gradients", "overlap", "overlap_same_extremes", "rows_moved")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders; required")
    parser.add_argument("--num_strata", type=int, nargs="+", default=[20], help="K; default: %(default)s")
    parser.add_argument(
        "--verify_per_stratum",
        type=int,
        nargs="+",
        default=[1, 2, 3, 5, 10, 20],
        help="fixed b_v; default: %(default)s",
    )
    parser.add_argument(
        "--rate", type=float, nargs="+", default=[0.8, 0.5, 0.3, 0.2, 0.1], help="kept; default: %(default)s"
    )
    parser.add_argument("--hardest_cutoff", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1, 21)), help="of draws; default: 1 to 20")
    results = REPOSITORY / "data" / "results" / "ablations"
    parser.add_argument("--out", type=Path, default=results, help="folder of adaptive.csv; default: %(default)s")
    arguments = parser.parse_args()
    if len(arguments.seeds) < 2:
        raise UserError("--seeds: give two or more, the intervals are over them")
    table = []
    for run in arguments.runs:
        small, target = (read_scores(run / "scores" / name, ids=False).check_complete() for name in ("small", "target"))
        for num_strata in arguments.num_strata:
            found: dict[str, list[dict]] = {}
            for seed in arguments.seeds:
                settings = Settings("paper", num_strata, 1, arguments.hardest_cutoff, seed)
                for way, figures in compare(small.of_all_rows(), target, settings, arguments):
                    found.setdefault(way, []).append(figures)
            about = {"data": run.name, "rows": len(small.index), "num_strata": num_strata}
            for way, by_seed in found.items():
                row = about | {"draws": way}
                for figure in FIGURES:
                    values = np.array([figures[figure] for figures in by_seed])
                    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
                    row |= {figure: round(values.mean(), 4), f"{figure}_interval": round(half, 4)}
                table.append(row)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with atomic_path(arguments.out / "adaptive.csv") as draft, draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    heading = ["data", "K", "draws", "target gradients", "overlap", "overlap, same extremes", "rows moved, %"]
    print(markdown_table(heading, [as_text(row) for row in table]))


def as_text(row: dict) -> list[str]:
    gradients = f"{row['target_gradients']:.0f}"
    shares = [f"{row[name]:.3f} ± {row[f'{name}_interval']:.3f}" for name in FIGURES[1:3]]
    moved = f"{100 * row['rows_moved']:.1f} ± {100 * row['rows_moved_interval']:.1f}"
    return [row["data"], str(row["num_strata"]), row["draws"], gradients, *shares, moved]


def compare(
    small: np.ndarray, target: Scores, settings: Settings, arguments: argparse.Namespace
) -> Iterator[tuple[str, dict[str, float]]]:
    """Each way of drawing and what came of it: target gradients; the share of the coreset that is in the one of V_i of
    all rows, the target's extremes known (as in ablations.py's verification table), or known of all but the hardest;
    and the share of rows that the budgets give to other strata than the latter's budgets do. Means over rates."""
    strata, rates = cut_strata(small, settings), arguments.rate
    ms = [coreset_size(rate, len(small)) for rate in rates]

    def ratios(draws: list[np.ndarray], known: Scores) -> list[float]:
        return [verification_ratio(theirs, ours) for _, ours, theirs in pairs_of(draws, small, known, settings)]

    def alone(draws: list[np.ndarray]) -> Scores:
        return target.only(np.sort(np.concatenate(draws)))

    def coresets(v: list[float]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rows, and budgets with the random fill as one more."""
        cut = []
        for m in ms:
            budgets = allocate_budgets(strata.sizes, v, m, "paper")
            rows = choose_within_strata(small, strata, budgets, m, "paper", settings.seed).rows
            cut.append((rows, np.array([*budgets, m - sum(budgets)])))
        return cut

    best = coresets(ratios(strata.members, target))
    nearly = coresets(ratios(strata.members, alone(strata.members)))

    def figures(draws: list[np.ndarray]) -> dict[str, float]:
        cut = coresets(ratios(draws, alone(draws)))
        moved = [np.abs(ours - theirs).sum() / 2 / m for (_, ours), (_, theirs), m in zip(cut, nearly, ms, strict=True)]
        return {
            "target_gradients": sum(map(len, draws)),
            "overlap": np.mean([overlap(ours[0], theirs[0]) for ours, theirs in zip(cut, best, strict=True)]),
            "overlap_same_extremes": np.mean(
                [overlap(ours[0], theirs[0]) for ours, theirs in zip(cut, nearly, strict=True)]
            ),
            "rows_moved": np.mean(moved),
        }

    def adaptive(limit: int, widths: Callable, **options) -> list[np.ndarray]:
        following, draws = first_counts(strata.sizes, limit), []
        while following is not None:
            counts, draws = following, draw(strata, following, "paper", settings.seed)
            pairs = [pair[1:] for pair in pairs_of(draws, small, alone(draws), settings)]
            following = next_counts(counts, pairs, strata.sizes, limit, ms, settings.seed, widths=widths, **options)
        return draws

    for per_stratum in arguments.verify_per_stratum:
        fixed = draw(strata, per_stratum, "paper", settings.seed)
        yield f"b_v = {per_stratum}", figures(fixed)
        limit = sum(map(len, fixed))
        if limit > sum(first_counts(strata.sizes, limit)):
            for name, widths in (("budget", budget_widths), ("V_i", ratio_widths)):
                yield (
                    f"as many as b_v = {per_stratum}, widest {name} first",
                    figures(adaptive(limit, widths, settled=0)),
                )
    for per_stratum in (10, 20):
        draws = adaptive(settings.num_strata * per_stratum, budget_widths)
        yield f"adaptive, b_v = {per_stratum}", figures(draws)


if __name__ == "__main__":
    run_stage(main)
