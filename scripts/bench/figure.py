"""The picture of scripts/bench/scoring.py's results: samples per second of each contestant, with its peak memory.

    python scripts/bench/figure.py --json data/results/bench/scoring.json --out data/results/bench/scoring.png

One row of panels for each file, one panel for each φ and dtype. The line is the bound: a forward pass and nothing else.
Needs the results; writes the picture.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from selection.run.cli import argument_parser, run_stage
from selection.run.config import from_repository
from selection.run.errors import UserError
from selection.run.products import atomic_path, read_json


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--json", nargs="+", required=True, help="results of bench_scoring.py; required")
    parser.add_argument("--out", required=True, help="picture, .png; required")
    arguments = parser.parse_args()
    out = from_repository(arguments.out)
    draw([read_benchmark(from_repository(path)) for path in arguments.json], out)
    print(f"picture: {out}")


def read_benchmark(path: Path) -> dict:
    record = read_json(path)
    if not isinstance(record, dict) or not record.get("results"):
        raise UserError(f"{path} holds no results of bench_scoring.py")
    return record


def draw(records: list[dict], out: Path) -> None:
    rows = [_panels(record["results"]) for record in records]
    columns = max(map(len, rows))
    heights = [1.4 + 0.3 * max(map(len, row.values())) for row in rows]
    figure = plt.figure(figsize=(4.5 * columns, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for record, row, part in zip(records, rows, parts, strict=True):
        settings = record["settings"]
        part.suptitle(
            f"{settings['model']} ({settings['weights']} weights), {settings['rows']} samples of "
            f"{settings['mean_tokens_per_sample']:.0f} tokens, {settings['device']}",
            fontsize=10,
            weight="bold",
        )
        grid = part.subplots(1, columns, squeeze=False)[0]
        for axes in grid[len(row) :]:
            axes.set_visible(False)
        for axes, ((phi, dtype), results) in zip(grid, row.items(), strict=False):
            axes.set_title(f"φ = {phi}, {dtype}", fontsize=10)
            _draw_panel(axes, results)
    with atomic_path(out) as draft:
        figure.savefig(draft, dpi=110, format="png")
    plt.close(figure)


def _panels(results: list[dict]) -> dict[tuple[str, str], list[dict]]:
    panels: dict[tuple[str, str], list[dict]] = {}
    for result in results:
        panels.setdefault((result["phi"], result["dtype"]), []).append(result)
    return panels


def _draw_panel(axes: plt.Axes, results: list[dict]) -> None:
    """The fastest on top."""
    bars = sorted((r for r in results if "bound" not in r["contestant"]), key=lambda r: r["samples_per_second"])
    speeds = [r["samples_per_second"] for r in bars]
    bound = [r["samples_per_second"] for r in results if r["contestant"] == "bound"]
    colours = ["#4477aa" if r["contestant"] == "suite" else "#bbbbbb" for r in bars]
    names = [r["contestant"].replace("_", " ") for r in bars]
    axes.barh(names, speeds, color=colours)
    axes.set_xlabel("samples per second" + (f" (line: the bound, {bound[0]:.3g})" if bound else ""), fontsize=9)
    if bound:
        axes.axvline(bound[0], color="#cc6677", linewidth=1.2)
    for name, speed, result in zip(names, speeds, bars, strict=True):
        text = f"{speed:.3g}, {result['peak_memory_gib']:.2f} GiB"
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # over the line
        axes.annotate(text, (speed, name), (4, 0), textcoords="offset points", va="center", fontsize=8, bbox=white)
    axes.set_xlim(0, 1.5 * max(speeds + bound))
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    run_stage(main)
