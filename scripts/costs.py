"""Sum up the cost ledger: what selection took, against tuning the target on everything.

    python scripts/costs.py --config_path configs/demo.yaml
    python scripts/costs.py --config_path configs/demo.yaml --tuned

Needs the ledger of a run folder in which a stage was run; with --tuned all stages. Writes nothing.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

from selection.run.cli import argument_parser, load_experiment_from_arguments
from selection.run.config import Experiment
from selection.run.errors import UserError
from selection.run.ledger import TARGET_TUNING, format_summary, read_ledger, selection_costs, summarise
from selection.run.metrics import NLL, read_metrics, shown_figure
from selection.scores.coresets import coreset_name
from selection.scores.identity import check_run


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--tuned", action="store_true", help="first a table of the targets, tuned at the first rate")
    experiment, arguments = load_experiment_from_arguments(parser)
    check_run(experiment, verified=arguments.tuned)
    summary = format_summary(summarise(experiment))
    if arguments.tuned:
        print_tuned(experiment, experiment.selection.rates[0])
    print(summary if arguments.tuned else f"costs so far:\n{summary}")


def print_tuned(experiment: Experiment, rate: float) -> None:
    tuning = {cost.what: cost for cost in read_ledger(experiment.folder) if cost.stage == TARGET_TUNING}
    print("\ncoreset         rows     nll   ROUGE-L   BLEU-4   rouge_score   sacreBLEU    selection     tuning")
    evaluated, methods = experiment.folder / "eval", {coreset_name(m, rate): m for m in experiment.selection.methods}
    for name in [*methods, *(name for name in ("full", "untuned") if (evaluated / name).exists())]:
        if name in methods and name not in tuning:
            raise UserError(f"{experiment.folder} has no tuned target {name}: run finetune-select.py first")
        metrics, tuned = read_metrics(evaluated / name), tuning.get(name)
        selection = sum(cost.seconds for cost in selection_costs(experiment, methods[name])) if name in methods else 0
        widths = {NLL: 8, "rouge-l": 10, "bleu-4": 9, "rouge_score-l": 14, "sacrebleu": 12}
        figures = "".join(f"{shown_figure(metrics, key):>{width}}" for key, width in widths.items())
        rows, seconds = (tuned.samples, tuned.seconds) if tuned else (0, 0)
        print(f"{name:<14}{rows:>6}{figures}{selection:>11.1f} s{seconds:>9.1f} s")
    print("(nll: negative log likelihood a response token of the held-out answers, in nats, lower is better; ROUGE-L")
    print("over words that jieba cuts and BLEU-4 over characters, as in the paper; rouge_score's ROUGE-L and sacreBLEU")
    print("are those of other work)")
    print(f"({metrics['samples']} evaluation rows and one seed: a demonstration, no evidence)\n")


if __name__ == "__main__":
    run_stage(main)
