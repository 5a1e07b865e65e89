"""The demo's table, from a run folder in which everything is done.

    python scripts/demo_report.py --config_path configs/demo.yaml

Needs all stages of that run folder. Prints ROUGE-L, BLEU and costs of each tuned target.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from selection.run.ending import end_on_signals

end_on_signals()

from selection.run.cli import argument_parser, load_experiment_from_arguments, run_stage
from selection.run.config import Experiment
from selection.run.errors import UserError
from selection.run.ledger import TARGET_TUNING, format_summary, read_ledger, selection_costs, summarise
from selection.run.metrics import read_metrics, two_decimals
from selection.scores.coresets import coreset_name
from selection.scores.identity import check_run


def main() -> None:
    experiment = load_experiment_from_arguments(argument_parser(__doc__))
    check_run(experiment, verified=True)
    print_table(experiment, experiment.selection.rates[0])


def print_table(experiment: Experiment, rate: float) -> None:
    summary = summarise(experiment)
    tuning = {cost.what: cost for cost in read_ledger(experiment.folder) if cost.stage == TARGET_TUNING}
    headings = f"{'rouge_score':>14}{'sacreBLEU':>12}{'selection':>13}{'tuning':>11}"
    print(f"\n{'coreset':<14}{'rows':>6}{'ROUGE-L':>10}{'BLEU-4':>9}{headings}")
    for method in experiment.selection.methods:
        name = coreset_name(method, rate)
        if name not in tuning:
            raise UserError(f"{experiment.folder} has no tuned target {name}: run finetune-select.py first")
        metrics = read_metrics(experiment.folder / "eval" / name)
        selection = sum(cost.seconds for cost in selection_costs(experiment, method))
        print(
            f"{name:<14}{tuning[name].samples:>6}{metrics['rouge-l']:>10.2f}{metrics['bleu-4']:>9.2f}"
            f"{two_decimals(metrics, 'rouge_score-l'):>14}{two_decimals(metrics, 'sacrebleu'):>12}"
            f"{selection:>11.1f} s{tuning[name].seconds:>9.1f} s"
        )
    print("(ROUGE-L over words that jieba cuts and BLEU-4 over characters, as in the paper; rouge_score's ROUGE-L and")
    print("sacreBLEU are those of other work)")
    print(f"({metrics['samples']} evaluation rows and one seed: a demonstration, no evidence)\n")
    print(format_summary(summary))


if __name__ == "__main__":
    run_stage(main)
