"""Cut coresets from stored scores: pure arithmetic, no model.

    python coreset.py --config_path ../configs/demo.yaml        # in selection/
    python coreset.py --config_path ../configs/demo.yaml --method grand el2n ccs d2 --rate 0.1 0.2
    python coreset.py --scores small.parquet --target_scores target.parquet --rate 0.1 0.2 --out coresets
    python coreset.py --config_path ../configs/demo.yaml --method rds --dev my_task.jsonl --rate 0.1
    python coreset.py --method d2 --scores target.parquet --features F.npy --rate 0.1 --out coresets

Needs scores: with --config_path those of the experiment's run folder, and its verification (random and rs2: the data
alone); without, score folders, or Parquet or CSV files, one row per row of the training split: a column index, and
effort for staff and grand; el2n for el2n, ccs and d2; hidden_state for d2 and moderate; entropy; n_response_tokens for
length; nothing more for random. Each V_i comes from --verify_per_stratum drawn samples also where the target's scores
are complete. configs/README.md explains the keys of `selection:`. Writes OUT/METHOD-RATE.json.
"""

import argparse
import contextlib
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

import numpy as np

from selection.method.baselines import baseline, columns_of, rs2
from selection.method.quotas import Rule, choose_by_rule
from selection.method.staff import coreset_size
from selection.rows.split import training_split
from selection.run.cli import add_dry_run_argument, add_experiment_arguments, argument_parser
from selection.run.config import (
    ANY_SCORES,
    NO_SCORES,
    SMALL_RULES,
    Experiment,
    Method,
    Selection,
    load_experiment,
    validated,
)
from selection.run.errors import UserError, refusals
from selection.run.ledger import CORESETS, Cost, measured
from selection.scores.coresets import coreset_name, quotas_of, write_coreset
from selection.scores.folder import Scores, check_features, is_finished, read_ids, read_scores
from selection.scores.identity import check_run, write_experiment
from selection.scores.pool import LeftOut, all_rows, rows_left_out, without
from selection.scores.verification import (
    Settings,
    cut_strata,
    read_verification,
    staff_rule,
    stratified_score,
    verify,
)

# Options that are keys of `selection:`.
_KEYS = ("mode", "variant", "num_strata", "verify_per_stratum", "hardest_cutoff", "seed")


def parse_arguments() -> tuple[argparse.Namespace, Experiment | None, Selection]:
    parser = argument_parser(__doc__)
    add_experiment_arguments(parser, required=False)
    for name, text in {
        "scores": "scores of the whole training split that the method reads; default: the run folder's",
        "target_scores": "staff: target scores, at least of the drawn samples; default: none",
        "verification": "staff: verification.json instead of --target_scores; default: the run folder's",
        "features": "d2, moderate: N x d array (.npy) instead of the column hidden_state; default: none",
        "dev": "rds: rows of the task that is meant, a file in the form of dataset_format; required by rds",
        "out": "folder for the coresets; default: coresets/ in the run folder; required without --config_path",
    }.items():
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help=text)
    methods, rates = "default: the YAML's, else staff", "default: the YAML's; required without one"
    parser.add_argument("--method", nargs="+", choices=get_args(Method), metavar="METHOD", help=methods)
    parser.add_argument("--rate", type=float, nargs="+", help=f"fractions of the rows to keep; {rates}")
    for name in _KEYS:
        key = Selection.model_fields[name]
        choices = [choice for choice in get_args(key.annotation) if choice != "recommended"] or None  # of a whole run
        text = f"selection.{name}; default: the YAML's, else {key.default}"
        parser.add_argument(f"--{name}", type=str if choices else key.annotation, choices=choices, help=text)
    add_dry_run_argument(parser)
    arguments = parser.parse_args()
    if arguments.features and not {"d2", "moderate"} & set(arguments.method or []):
        raise UserError("--features is read by --method d2 and moderate alone: leave it out or ask for one of them")
    if arguments.dev and not arguments.config_path:
        raise UserError("--dev is read with the models of an experiment: give --config_path with it")
    experiment, selection = None, Selection(methods=["staff"])
    if arguments.config_path:
        experiment = load_experiment(arguments.config_path, arguments.set)
        selection = experiment.selection
        arguments.out, arguments.rate = arguments.out or experiment.coresets, arguments.rate or selection.rates
        if not arguments.target_scores:
            arguments.verification = arguments.verification or experiment.verification
    elif arguments.set:
        raise UserError("--set overrides keys of an experiment: give --config_path with it")
    elif arguments.scores is None or not arguments.rate or arguments.out is None:
        raise UserError("give --config_path, or --scores, --rate and --out (see --help)")
    arguments.method = arguments.method or selection.methods
    if ("rds" in arguments.method) != bool(arguments.dev):
        raise UserError("rds chooses by the rows of --dev FILE, and nothing else reads it: give both or neither")
    given = {name: value for name in _KEYS if (value := getattr(arguments, name)) is not None}
    return arguments, experiment, validated(selection, given)


def main() -> None:
    arguments, experiment, selection = parse_arguments()
    if experiment is not None and arguments.scores is None:
        in_run = "staff" in arguments.method and arguments.verification == experiment.verification
        check_run(experiment, verified=in_run)
    coresets = []  # written once everything is known to be right
    for method in arguments.method:
        if method == "rds" and arguments.dry_run:
            print(f"rds: would score the rows of {arguments.dev} on the small model, and choose by them")
            continue
        cost = Cost(CORESETS, method, device="CPU")
        counted = experiment is not None and not arguments.dry_run
        try:
            with measured(experiment.folder, cost) if counted else contextlib.nullcontext():
                coresets += cut_coresets(arguments, experiment, method, selection)
                cost.samples = coresets[-1]["scores"].num_rows
        except UserError as error:
            if not arguments.dry_run:
                raise
            print(f"{method}: would be cut at {len(arguments.rate)} rates, not yet: {error}")
    if experiment is not None and arguments.scores is None and not (arguments.dry_run or experiment.record.exists()):
        write_experiment(experiment)  # no stage has run before a coreset that needs no scores
    for each in coresets:
        path = arguments.out / f"{coreset_name(each['method'], each['rate'])}.json"
        gone, there = len(all_rows(each["record"].get("left_out"))), ""
        suspects = f", {gone} suspects left out" if gone else ""
        count = f"{len(each['rows'])} of {each['scores'].num_rows} rows{suspects} -> {path}"
        if arguments.dry_run:
            count, there = f"would choose {count}", " (is there already)" * path.exists()
        else:
            write_coreset(arguments.out, **each)
        print(f"{each['method']} at rate {each['rate']:g}: {count}{there}")


def cut_coresets(arguments: argparse.Namespace, experiment: Experiment | None, method: str, selection: Selection):
    """One method's coresets at every rate, as the arguments of `write_coreset`."""
    source, settings = arguments.scores or scores_of(experiment, method), Settings.of(selection)
    columns = settings.columns if method == "staff" else columns_of(method, selection.baseline_variant)
    given = arguments.features if method in ("d2", "moderate") else None
    read = [name for name in columns if name != "hidden_state" or not given]
    scores = (
        read_scores(source, read, ids=False).check_complete() if source else unscored(experiment, arguments.dry_run)
    )
    left_out, count = rows_left_out(experiment), len(scores.index)
    scores = without(scores, left_out)
    if given:
        features = read_features(given, scores.num_rows)
        scores.columns["hidden_state"] = features[scores.index] if len(scores.left_out) else features
    if method == "rds":
        from selection.scores.dev_set import features_of_rows  # the only rule that loads a model

        scores.columns["dev"] = features_of_rows(experiment, arguments.dev)
    quotas, strata, coresets = quotas_of(experiment, scores), None, []
    with refusals():
        if method == "staff":
            rule, record, strata = staff_and_record(arguments, scores, settings, left_out)
        else:
            rule, record = baseline_rule(method, scores, selection)
        record |= {} if left_out is None else {"left_out": left_out}
        for rate in arguments.rate:
            about, share = dict(record), rate
            if method == "rs2":
                share, about["num_train_epochs"] = rs2(rate, passes_of(experiment))
            wanted = coreset_size(share, count)
            m = min(wanted, len(scores.index))  # suspects count for the rate, and are not chosen
            if method == "rs2":
                about["num_train_epochs"] *= wanted / m  # as many steps on fewer rows
            choice = choose_by_rule(rule, m, quotas)
            if strata is not None:
                parts = zip(strata, choice.budgets, choice.filled, strict=True)
                about["strata"] = [asdict(s) | {"budget": m, "of_which_random_fill": fill} for s, m, fill in parts]
                about["from_hardest"] = choice.from_hardest
            if quotas is not None:
                about["data_sets"] = quotas.record(choice.rows)
            rows = scores.index[choice.rows]  # a rule counts the rows that have scores
            coresets.append({"method": method, "rate": rate, "rows": rows, "record": about})
    del rule  # and with it what all rates share
    chosen = [each["rows"] for each in coresets]
    ids_of = read_ids(source, *chosen) if source else [[scores.ids[row] for row in rows] for rows in chosen]
    for each, ids in zip(coresets, ids_of, strict=True):
        each |= {"scores": replace(scores, columns={}), "ids": ids}
    return coresets


def unscored(experiment: Experiment, dry_run: bool = False) -> Scores:
    """The rows of the training split, without a score. Raises: UserError where a dry run finds no split."""
    if (split := training_split(experiment, dry_run)) is None:
        raise UserError(f"there is no split in {experiment.data_folder} yet")
    count = len(split.rows)
    return Scores(np.arange(count), {}, split.ids, split.fingerprint, count, str(experiment.data_folder))


def passes_of(experiment: Experiment | None) -> float:
    """Passes of the target's tuning."""
    if experiment is None:
        raise UserError("rs2 counts the passes of target_training.num_train_epochs: give --config_path")
    return experiment.passes(experiment.target_training)


def scores_of(experiment: Experiment, method: str) -> Path | None:
    """The scores of a run folder that a method reads. Random and Length only count rows and tokens: any will do, and
    for Random none (None), as where they are still being made."""
    small, tuned = experiment.small_scores, experiment.tuned_target_scores
    if method in ("staff", *SMALL_RULES):
        return small
    if method in NO_SCORES:
        return next((folder for folder in (small, tuned) if is_finished(folder)), None)
    if method in ANY_SCORES and (small.exists() or not tuned.exists()):
        return small
    if not tuned.exists():
        how = "run finetune.py and effort_score.py with --model target"
        raise UserError(f"{method} reads the scores of the tuned target, and there is no {tuned}: {how}")
    return tuned


def staff_and_record(
    arguments: argparse.Namespace, scores: Scores, settings: Settings, left_out: LeftOut | None
) -> tuple[Rule, dict, list]:
    """STAFF's rule, what a coreset's file keeps of its settings, and the strata's `StratumRecord`s."""
    target_scores, verified = arguments.target_scores, arguments.verification
    if (target_scores is None) == (verified is None):
        raise UserError("STAFF needs either --target_scores or --verification beside --scores")
    by = stratified_score(scores, settings)
    speculative, strata = by.effort, cut_strata(by.effort, settings, by.columns)
    if verified is not None:
        records, of_target = read_verification(verified, settings, scores)
        if [record.size for record in records] != list(map(len, strata.members)):
            raise UserError(f"{verified} is damaged: its strata are not those of the scores: run verify.py again")
    else:
        target = read_scores(target_scores, settings.target_columns, ids=False)
        same = target.fingerprint == scores.fingerprint or None in (target.fingerprint, scores.fingerprint)
        if not same or target.index[-1] >= scores.num_rows:
            why = f"it scores row {target.index[-1]} of {scores.num_rows}" if same else "fingerprints differ"
            raise UserError(f"{target.source} and {scores.source} are scores of different data ({why})")
        target = without(target, left_out)
        records, of_target = verify(speculative, target, settings, strata, scores.index), target.made_by
    return staff_rule(by, strata, records, settings), {**settings.record, "target": of_target}, records


def baseline_rule(method: str, scores: Scores, selection: Selection) -> tuple[Rule, dict]:
    """A baseline's rule, and what a coreset's file keeps of its settings."""
    if method == "length" and len(empty := np.flatnonzero(scores.columns["n_response_tokens"] < 1)):
        raise UserError(f"{scores.source}: row {scores.index[empty[0]]} has no response token: remove the row")
    keys = selection.model_dump() | {"variant": selection.baseline_variant}
    read = {  # the keys that a rule goes by
        "length": ("mode", "num_strata", "hardest_cutoff"),
        "el2n": ("variant",),
        "ccs": ("variant", "num_strata", "hardest_cutoff"),
        "d2": ("variant", "hardest_cutoff"),
    }
    record = {key: keys[key] for key in ("seed", *read.get(method, ()))}
    settings = [keys[key] for key in ("variant", "num_strata", "hardest_cutoff", "seed")]
    return baseline(method, scores.columns, len(scores.index), selection.rules, *settings), record


def read_features(path: Path, num_rows: int) -> np.ndarray:
    """Features (N, d) from a .npy file. Raises: UserError where it is no such array, or not of N finite rows."""
    try:
        features = np.load(path, allow_pickle=False)
    except Exception as error:  # whatever a damaged file makes numpy raise
        raise UserError(f"cannot read features from {path}: {error}") from None
    if not isinstance(features, np.ndarray) or features.ndim != 2 or features.dtype.kind not in "fiu":
        raise UserError(f"{path} holds no two-dimensional array of numbers: give N rows of d features")
    if len(features) != num_rows:
        raise UserError(f"{path} has {len(features)} rows, the scores have {num_rows}: they are of different data")
    return check_features(features, np.arange(num_rows), str(path))


if __name__ == "__main__":
    run_stage(main)
