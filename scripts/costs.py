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
from selection.run.metrics import read_metrics, two_decimals
from selection.scores.coresets import coreset_name
from selection.scores.identity import check_run


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--tuned", action="store_true", help="first a table of the tuned targets at the first rate")
    experiment, arguments = load_experiment_from_arguments(parser)
    check_run(experiment, verified=arguments.tuned)
    summary = format_summary(summarise(experiment))
    if arguments.tuned:
        print_tuned(experiment, experiment.selection.rates[0])
    print(summary if arguments.tuned else f"costs so far:\n{summary}")


def print_tuned(experiment: Experiment, rate: float) -> None:
    tuning = {cost.what: cost for cost in read_ledger(experiment.folder) if cost.stage == TARGET_TUNING}
    print("\ncoreset         rows   ROUGE-L   BLEU-4   rouge_score   sacreBLEU    selection     tuning")
    for method in experiment.selection.methods:
        name = coreset_name(method, rate)
        if name not in tuning:
            raise UserError(f"{experiment.folder} has no tuned target {name}: run finetune-select.py first")
        metrics = read_metrics(experiment.folder / "eval" / name)
        selection = sum(cost.seconds for cost in selection_costs(experiment, method))
        figures = f"{metrics['rouge-l']:>10.2f}{metrics['bleu-4']:>9.2f}"
        figures += f"{two_decimals(metrics, 'rouge_score-l'):>14}{two_decimals(metrics, 'sacrebleu'):>12}"
        print(f"{name:<14}{tuning[name].samples:>6}{figures}{selection:>11.1f} s{tuning[name].seconds:>9.1f} s")
    print("(ROUGE-L over words that jieba cuts and BLEU-4 over characters, as in the paper; rouge_score's ROUGE-L and")
    print("sacreBLEU are those of other work)")
    print(f"({metrics['samples']} evaluation rows and one seed: a demonstration, no evidence)\n")


if __name__ == "__main__":
    run_stage(main)
