"""The demo's table and picture, from a run folder in which everything is done.

    python scripts/demo_report.py --config_path configs/demo.yaml

Needs all stages of that run folder. Prints ROUGE-L, BLEU-4 and costs of each tuned target; writes <run
folder>/selection.png: the histogram of the speculative scores with strata, verification ratios V_i and budgets.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, whatever the working directory

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from selection.config import Experiment  # noqa: E402
from selection.coreset_files import coreset_name  # noqa: E402
from selection.errors import UserError, run_stage  # noqa: E402
from selection.files import read_json  # noqa: E402
from selection.ledger import TARGET_TUNING, format_summary, read_ledger, selection_costs, summarise  # noqa: E402
from selection.metrics import read_metrics  # noqa: E402
from selection.score_files import read_scores  # noqa: E402
from selection.stage import argument_parser, load_experiment_from_arguments  # noqa: E402


def main() -> None:
    experiment = load_experiment_from_arguments(argument_parser(__doc__))
    rate = experiment.selection.rates[0]
    picture = draw_selection(experiment, read_json(experiment.coresets / f"{coreset_name('staff', rate)}.json"))
    print_table(experiment, rate)
    print(f"picture: {picture}")


def print_table(experiment: Experiment, rate: float) -> None:
    summary = summarise(experiment)
    tuning = {cost.what: cost for cost in read_ledger(experiment.folder) if cost.stage == TARGET_TUNING}
    print(f"\n{'coreset':<14}{'rows':>6}{'ROUGE-L':>10}{'BLEU-4':>9}{'selection':>13}{'tuning':>11}")
    for method in experiment.selection.methods:
        name = coreset_name(method, rate)
        if name not in tuning:
            raise UserError(f"{experiment.folder} has no tuned target {name}: run finetune-select.py first")
        metrics = read_metrics(experiment.folder / "eval" / name)
        selection = sum(cost.seconds for cost in selection_costs(experiment, method))
        print(
            f"{name:<14}{tuning[name].samples:>6}{metrics['rouge-l']:>10.2f}{metrics['bleu-4']:>9.2f}"
            f"{selection:>11.1f} s{tuning[name].seconds:>9.1f} s"
        )
    print(f"({metrics['samples']} evaluation rows and one seed: a demonstration, no evidence)\n")
    print(format_summary(summary))


def draw_selection(experiment: Experiment, coreset: dict) -> Path:
    """One picture: where the scores lie, how they are cut, what the target says of each stratum and what it gets."""
    scores = read_scores(experiment.small_scores, ids=False).effort
    strata = coreset["strata"]
    edges = np.array([s["score_range"] for s in strata])
    centres, widths = edges.mean(axis=1), (edges[:, 1] - edges[:, 0]) * 0.9
    figure, (top, middle, bottom) = plt.subplots(3, 1, sharex=True, figsize=(8, 7), height_ratios=(3, 2, 2))

    cut = edges[-1, 1]
    bins = np.linspace(scores.min(), scores.max(), 60)
    top.hist(scores[scores <= cut], bins=bins, color="#4477aa", label="strata")
    top.hist(scores[scores > cut], bins=bins, color="#bbbbbb", label="hardest, dropped")
    top.set_ylabel("samples")
    top.legend(frameon=False)
    top.set_title(f"{len(scores)} samples, {len(coreset['indices'])} chosen, mode {coreset['mode']}")

    verified = [(x, s["verification_ratio"]) for x, s in zip(centres, strata, strict=True) if s["verified"]]
    middle.plot(*zip(*verified, strict=True), "o-", color="#cc6677")
    middle.axhline(1, color="#999999", linewidth=0.8)
    middle.set_ylabel("verification ratio $V_i$")

    bottom.bar(centres, [s["size"] for s in strata], widths, color="#dddddd", label="stratum")
    bottom.bar(centres, [s["budget"] for s in strata], widths, color="#228833", label="budget")
    bottom.set_ylabel("samples")
    bottom.set_xlabel("effort score of the speculative model")
    bottom.legend(frameon=False)
    for axes in (top, middle, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        for edge in np.unique(edges):
            axes.axvline(edge, color="#000000", alpha=0.12, linewidth=0.6)
    path = experiment.folder / "selection.png"
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


if __name__ == "__main__":
    run_stage(main)
