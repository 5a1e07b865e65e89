"""Evaluate tuned targets on the held-out split: log likelihood of the reference answers; ROUGE and BLEU of greedy ones.

    CUDA_VISIBLE_DEVICES=0 python eval.py --config_path ../configs/demo.yaml      # in finetune/

Needs a tuned target (finetune-select.py). Evaluates all of the run folder, or those named with --tuned ("untuned" is
the target as it is; once evaluated, it stays a row of the table). Prints a table; writes
<run folder>/eval/<name>/predictions.jsonl and metrics.json, which has every answer's figures too. nll is the negative
log likelihood a response token in nats, averaged over the answers: lower is better. `evaluation.generate: false` leaves
the answers out, which takes most of the time.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

import numpy as np

from finetune import trainer, vllm_engine
from finetune.comparable import comparable_scores
from finetune.likelihood import held_out_losses
from selection.rows.split import held_out_copies, held_out_ids, rows_of, training_split
from selection.rows.tokens import lengths, tokenised_rows
from selection.run.cli import add_dry_run_argument, argument_parser, load_experiment_from_arguments
from selection.run.config import Experiment
from selection.run.device import choose_precision, device_name
from selection.run.errors import UserError
from selection.run.ledger import EVALUATION, Cost, measured
from selection.run.log import say
from selection.run.metrics import ABOUT, NLL, read_metrics, shown_figure
from selection.run.model_folder import check_base, model_fingerprint
from selection.run.processes import processes
from selection.run.products import (
    building_together,
    check_same_everywhere,
    checked,
    code_version,
    read_record,
    reuse,
    write_json,
)
from selection.scores.identity import KEYS_OF_ITS_OWN, check_run, digest_of_ids, fingerprint_of, write_experiment

METRICS = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
_EVERY = "every tuned target"
COMPARABLE = ("rouge_score-1", "rouge_score-2", "rouge_score-l", "sacrebleu")


def main() -> None:
    parser = argument_parser(__doc__)
    add_dry_run_argument(parser)
    about = "e.g. staff-0.2 full untuned; default: all there are"
    parser.add_argument("--tuned", nargs="+", metavar="NAME", help=about)
    experiment, arguments = load_experiment_from_arguments(parser)
    names = arguments.tuned or processes().from_leader(lambda: all_there(experiment))
    waiting = [name for name in names if name != "untuned" and not experiment.tuned_target(name).exists()]
    if waiting and not arguments.dry_run:
        missing = experiment.tuned_target(waiting[0])
        raise UserError(f"--tuned {waiting[0]}: no {missing}: run finetune-select.py first")
    if not names and not arguments.dry_run:
        raise UserError(f"no tuned target in {experiment.tuned_target('')}: run finetune-select.py first")
    split = training_split(experiment, arguments.dry_run)
    if split is None:
        print(f"evaluation: would split {experiment.dataset_paths} and evaluate {', '.join(names) or _EVERY}")
        return
    check_run(experiment, split, verified=True)
    if arguments.dry_run:
        would = f"would answer {len(rows_of(experiment, 'eval'))} held-out rows"
        for name in waiting or [_EVERY] * (not names):
            print(f"evaluation of {name}: {would}, once it is tuned")
        names = [name for name in names if name not in waiting]
    experiments = {name: as_tuned(experiment, name) for name in names}
    for each in experiments.values():
        vllm_engine.check_vllm(each)
    with processes().leader_first():
        identities = {name: identity_of(experiments[name], name) for name in names}
    check_same_everywhere(identities)
    folders = {name: experiment.folder / "eval" / name for name in names}
    # Refuses other evaluations of these names.
    there = processes().from_leader(lambda: {name: reuse(folders[name], identities[name]) for name in names})
    if arguments.dry_run:
        for name in names:
            what = "evaluation: reusing" if there[name] else f"evaluation of {name}: {would} ->"
            print(what, folders[name])
        return
    write_experiment(experiment)
    copies = processes().from_leader(lambda: held_out_copies(experiment))
    results = {
        name: evaluate(experiments[name], name, folders[name], identities[name], there[name], copies) for name in names
    }
    widths = {metric: max(8, len(metric) + 3) for metric in (NLL, *METRICS, *COMPARABLE)}
    print(f"\n{'':<16}" + "".join(f"{metric:>{width}}" for metric, width in widths.items()))
    for name, metrics in results.items():
        print(f"{name:<16}" + "".join(f"{shown_figure(metrics, key):>{width}}" for key, width in widths.items()))
    print(f"({ABOUT})")
    if copies:
        print(f"{copies} of {len(rows_of(experiment, 'eval'))} held-out rows have an exact copy in the training split")


def as_tuned(experiment: Experiment, name: str) -> Experiment:
    """The experiment with the training keys of a target with keys of its own: it has to answer as it was tuned."""
    record = {} if name == "untuned" else read_record(path := experiment.tuned_target(name) / "made_from.json")
    if KEYS_OF_ITS_OWN not in record:
        return experiment
    return experiment.model_copy(update={"training": {}, "target_training": checked(dict, record.get("keys"), path)})


def all_there(experiment: Experiment) -> list[str]:
    """Tuned targets of the run folder, and the untuned one where it was evaluated."""
    tuned = sorted(path.name for path in experiment.tuned_target("").glob("[!.]*"))
    return tuned + ["untuned"] * (experiment.folder / "eval" / "untuned").exists()


def identity_of(experiment: Experiment, name: str) -> dict[str, Any]:
    """All that the answers of a tuned target depend on. Raises: UserError where it was tuned from another model."""
    tuned = None if name == "untuned" else experiment.tuned_target(name)
    if tuned is not None:
        check_base(tuned, experiment.target_model, experiment.folder)
    identity = {"model": fingerprint_of(experiment, experiment.target_model)}
    identity |= {"tuned": tuned and model_fingerprint(tuned, experiment.folder)}
    identity |= {"rows": digest_of_ids(held_out_ids(experiment)), "dataset_format": experiment.row_format.entry}
    identity |= {"template": experiment.template, "cutoff_len": experiment.cutoff_len}
    identity |= {"max_new_tokens": experiment.evaluation.max_new_tokens, "model_keys": trainer.model_keys(experiment)}
    identity |= {} if experiment.evaluation.generate else {"generate": False}  # earlier evaluations do not say
    identity |= {"engine": "vllm"} if vllm_engine.asked(experiment) else {}
    return identity | {"precision": choose_precision(experiment.precision)}


def evaluate(
    experiment: Experiment, name: str, folder: Path, identity: dict[str, Any], there: bool, copies: int
) -> dict:
    """Metrics of one tuned target, from its folder if they are `there`; `copies`: held-out rows that training has."""
    if there:
        say(f"evaluation: reusing {folder}")
        return read_metrics(folder)
    held_out, together, precision = rows_of(experiment, "eval"), processes(), identity["precision"]
    tuned = experiment.tuned_target(name) if identity["tuned"] else None
    cost = Cost(EVALUATION, name, len(held_out), device=device_name(), precision=precision, processes=together.count)
    if together.leads:  # tokens of prompts and references
        cost.tokens = int(lengths(tokenised_rows(experiment, experiment.target_model, "eval", held_out)).sum())
    with building_together(folder, identity) as draft, measured(experiment.folder, cost):
        losses = held_out_losses(experiment, tuned, precision)
        predict = vllm_engine.predict if vllm_engine.asked(experiment) else trainer.predict
        computed = predict(experiment, tuned, draft, precision) if experiment.evaluation.generate else {}
        if together.leads:
            metrics = {NLL: round(float(np.mean(losses)), 6), "samples": len(losses), "target": experiment.target_model}
            metrics |= {"tuned": name, "code_version": code_version(), "copies_in_training": copies}
            metrics["by_sample"] = {NLL: [round(loss, 6) for loss in losses]}
            if computed:
                add_answers(metrics, experiment, draft, computed)
            write_json(draft / "metrics.json", metrics)
    metrics = read_metrics(folder)
    names = {NLL: "negative log likelihood", "rouge-l": "ROUGE-L", "bleu-4": "BLEU-4"}
    figures = ", ".join(f"{text} {shown_figure(metrics, key)}" for key, text in names.items() if key in metrics)
    print(f"evaluation of {name}: {figures} -> {folder}")
    return metrics


def add_answers(metrics: dict[str, Any], experiment: Experiment, folder: Path, computed: dict[str, float]) -> None:
    """Add the figures of `folder`'s predictions.jsonl and what `trainer.predict` returned."""
    with (folder / "predictions.jsonl").open(encoding="utf-8") as file:
        answers = [json.loads(line) for line in file]
    texts = [answer["predict"] for answer in answers], [answer["label"] for answer in answers]
    of_paper, (overall, comparable) = trainer.scores_by_sample(*texts), comparable_scores(*texts)
    metrics |= {metric: round(computed[f"predict_{metric}"], 4) for metric in METRICS}
    metrics["max_new_tokens"] = experiment.evaluation.max_new_tokens
    metrics |= {key: round(value, 4) if key in COMPARABLE else value for key, value in overall.items()}
    metrics["by_sample"] |= {metric: of_paper[metric] for metric in METRICS}
    metrics["by_sample"] |= {key: [round(value, 4) for value in values] for key, values in comparable.items()}


if __name__ == "__main__":
    run_stage(main, one_gpu=True)
