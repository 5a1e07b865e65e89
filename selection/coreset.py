"""Cut coresets from stored scores: pure arithmetic, no model.

    python coreset.py --config_path ../configs/demo.yaml        # in selection/
    python coreset.py --config_path ../configs/demo.yaml --method grand el2n ccs d2 --rate 0.1 0.2
    python coreset.py --scores small.parquet --target_scores target.parquet --rate 0.1 0.2 --out coresets
    python coreset.py --method d2 --scores target.parquet --features F.npy --rate 0.1 --out coresets

Needs scores: with --config_path those of the experiment's run folder, and its verification; without, score folders, or
Parquet or CSV files with a column index and those that a method reads (one row per row of the training split): staff
effort; length n_response_tokens; grand effort; el2n and ccs el2n; d2 el2n and hidden_state; moderate hidden_state;
entropy entropy; random none. Each V_i comes from --verify_per_stratum drawn samples also where the target's scores are
complete. Writes OUT/METHOD-RATE.json.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

sys.path[0] = str(Path(__file__).resolve().parents[1])

from selection.run.ending import end_on_signals

end_on_signals()

import numpy as np

from selection.method.baselines import baseline, columns_of
from selection.method.quotas import Rule, choose_by_rule
from selection.method.staff import Choice, Strata, choose_staff
from selection.run.cli import (
    add_dry_run_argument,
    add_experiment_arguments,
    argument_parser,
    load_experiment,
    run_stage,
)
from selection.run.config import Experiment, Method, Mode, Selection, validated
from selection.run.errors import UserError, refusals
from selection.run.ledger import CORESETS, Cost, measured
from selection.scores.coresets import coreset_name, write_coreset
from selection.scores.folder import Scores, check_features, read_scores
from selection.scores.identity import check_run
from selection.scores.quotas import quotas_of
from selection.scores.verification import (
    Settings,
    StratumRecord,
    cut_strata,
    read_verification,
    stratified_score,
    verify,
)

# A method's scores, its rule, and what a coreset's file keeps of a choice.
Rules = tuple[Scores, Rule, Callable[[Choice], dict[str, Any]]]


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add_experiment_arguments(parser, required=False)
    published, of_yaml = Selection(), "the YAML's"
    parser.add_argument(
        "--scores",
        type=Path,
        help="scores of the whole training split that the method reads; default: the run folder's",
    )
    parser.add_argument(
        "--target_scores", type=Path, help="staff: target scores, at least of the drawn samples; default: none"
    )
    parser.add_argument(
        "--verification",
        type=Path,
        help="staff: verification.json instead of --target_scores; default: the run folder's",
    )
    parser.add_argument(
        "--features",
        type=Path,
        help="d2, moderate: N x d array (.npy) instead of the column hidden_state; default: none",
    )
    parser.add_argument(
        "--method", nargs="+", choices=get_args(Method), metavar="METHOD", help=f"default: {of_yaml}, else staff"
    )
    parser.add_argument("--mode", choices=get_args(Mode), help=f"of staff; default: {of_yaml}, else {published.mode}")
    parser.add_argument(
        "--variant", choices=["published", "released"], help="whose el2n, ccs and d2; default: as --mode says"
    )
    parser.add_argument(
        "--rate", type=float, nargs="+", help=f"fractions of the rows to keep; default: {of_yaml}; required without one"
    )
    parser.add_argument("--num_strata", type=int, help=f"K; default: {of_yaml}, else {published.num_strata}")
    parser.add_argument(
        "--verify_per_stratum", type=int, help=f"b_v, rows; default: {of_yaml}, else {published.verify_per_stratum}"
    )
    parser.add_argument(
        "--hardest_cutoff",
        type=float,
        help=f"fraction with the highest scores, dropped first; default: {of_yaml}, else {published.hardest_cutoff}",
    )
    parser.add_argument("--seed", type=int, help=f"of every random choice; default: {of_yaml}, else {published.seed}")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the coresets; default: coresets/ in the run folder; required without --config_path",
    )
    add_dry_run_argument(parser)
    return parser.parse_args()


def main() -> None:
    arguments, experiment, selection = parse_arguments(), None, Selection()
    if arguments.features and not {"d2", "moderate"} & set(arguments.method or []):
        raise UserError("--features is read by --method d2 and moderate alone: leave it out or ask for one of them")
    if arguments.config_path:
        experiment = load_experiment(arguments.config_path, arguments.set)
        selection = experiment.selection
        arguments.out = arguments.out or experiment.coresets
        arguments.method = arguments.method or selection.methods
        arguments.rate = arguments.rate or selection.rates
    else:
        if arguments.set:
            raise UserError("--set overrides keys of an experiment: give --config_path with it")
        if arguments.scores is None or not arguments.rate or arguments.out is None:
            raise UserError("give --config_path, or --scores, --rate and --out (see --help)")
        arguments.method = arguments.method or ["staff"]
    given = {name: getattr(arguments, name) for name in Selection.model_fields if hasattr(arguments, name)}
    selection = validated(selection, {k: v for k, v in given.items() if v is not None})

    if experiment is not None and arguments.scores is None:
        in_run = "staff" in arguments.method and not (arguments.target_scores or arguments.verification)
        check_run(experiment, verified=in_run)
    if arguments.dry_run:
        for method in arguments.method:
            say_what_would_be_cut(arguments, experiment, method, selection)
        return
    cut: list[tuple[str, float, Choice, Scores, dict[str, Any]]] = []  # written once everything is known to be right
    for method in arguments.method:
        if experiment is None:
            cut += cut_coresets(arguments, None, method, selection)
        else:
            with measured(experiment.folder, Cost(CORESETS, method, device="CPU")) as cost:
                cut += cut_coresets(arguments, experiment, method, selection)
                cost.samples = cut[-1][3].num_rows
    for method, rate, choice, scores, record in cut:
        path = write_coreset(arguments.out, method, rate, choice, scores, record)
        print(f"{method} at rate {rate:g}: {len(choice.rows)} of {scores.num_rows} rows -> {path}")


def say_what_would_be_cut(
    arguments: argparse.Namespace, experiment: Experiment | None, method: str, selection: Selection
) -> None:
    paths = [str(arguments.out / f"{coreset_name(method, rate)}.json") for rate in arguments.rate]
    try:
        cut = cut_coresets(arguments, experiment, method, selection)
    except UserError as error:
        print(f"{method}: would be cut at {len(paths)} rates, not yet: {error}")
        return
    for (_, rate, choice, scores, _), path in zip(cut, paths, strict=True):
        there = " (is there already)" if Path(path).exists() else ""
        print(f"{method} at rate {rate:g}: would choose {len(choice.rows)} of {scores.num_rows} rows -> {path}{there}")


def cut_coresets(
    arguments: argparse.Namespace, experiment: Experiment | None, method: str, selection: Selection
) -> list[tuple[str, float, Choice, Scores, dict[str, Any]]]:
    """One method's coresets at every asked rate, with what is to be known of the chosen rows alone."""
    source = arguments.scores or scores_of(experiment, method)
    with refusals():
        scores, rule, record_of = (cut_staff if method == "staff" else cut_baseline)(
            arguments, experiment, method, source, selection
        )
        quotas, choices = quotas_of(experiment, scores), []
        any_rate = np.zeros(scores.index[-1] + 1, dtype=bool)
        for rate in arguments.rate:
            choice = choose_by_rule(rule, rate, len(scores.index), quotas)
            record = record_of(choice) | ({} if quotas is None else {"data_sets": quotas.record(choice.rows)})
            if len(scores.left_out):  # the rules count the rows that have scores, 0 to n − 1
                choice.rows = scores.index[choice.rows]
            any_rate[choice.rows] = True
            choices.append((rate, choice, record))
    del rule, record_of  # they hold what all rates share
    chosen = scores.chosen(np.flatnonzero(any_rate))
    return [(method, rate, choice, chosen, record) for rate, choice, record in choices]


def scores_of(experiment: Experiment, method: str) -> Path:
    """Which scores of a run folder a method reads. Random and Length only count rows and tokens: any will do."""
    tuned_there = experiment.tuned_target_scores.exists()
    if method == "staff" or (method in ("random", "length") and (experiment.small_scores.exists() or not tuned_there)):
        return experiment.small_scores
    if not tuned_there:
        raise UserError(
            f"{method} reads the scores of the tuned target, and there is no {experiment.tuned_target_scores}: run "
            "finetune.py and effort_score.py with --model target"
        )
    return experiment.tuned_target_scores


def cut_staff(arguments, experiment: Experiment | None, method: str, source: Path, selection: Selection) -> Rules:
    settings = Settings.of(selection)
    scores = read_scores(source, settings.columns, ids=False)
    speculative = stratified_score(scores.check_complete(), settings).effort
    verification = arguments.verification
    if experiment is not None and not arguments.target_scores:
        verification = verification or experiment.verification
    strata = cut_strata(speculative, settings)
    records, of_target = verified_strata(arguments.target_scores, verification, scores, speculative, settings, strata)
    ratios = [record.verification_ratio for record in records]

    def rule(m: int, within: np.ndarray | None) -> Choice:
        return choose_staff(speculative, strata.within(within), ratios, m, settings.rules, settings.seed)

    def record_of(choice: Choice) -> dict[str, Any]:
        budgets = zip(records, choice.budgets, choice.filled, strict=True)
        table = [{**asdict(r), "budget": budget, "of_which_random_fill": filled} for r, budget, filled in budgets]
        return {**settings.record, "target": of_target, "strata": table, "from_hardest": choice.from_hardest}

    return scores, rule, record_of


def verified_strata(
    target_scores: Path | None,
    verification: Path | None,
    scores: Scores,
    speculative: np.ndarray,
    settings: Settings,
    strata: Strata,
) -> tuple[list[StratumRecord], dict | None]:
    """The strata with their V_i, and what made the target's scores, where that is known."""
    if (target_scores is None) == (verification is None):
        raise UserError("STAFF needs either --target_scores or --verification beside --scores")
    if target_scores is None:
        records, of_target = read_verification(verification, settings, scores)
        if len(records) != len(strata.members):
            raise UserError(
                f"{verification} has {len(records)} strata, the scores {len(strata.members)}: run verify.py"
            )
        return records, of_target
    target, num_rows = read_scores(target_scores, settings.columns, ids=False), len(scores.index) + len(scores.left_out)
    if target.index[-1] >= num_rows:
        raise UserError(
            f"{target.source} scores row {target.index[-1]}, {scores.source} only rows up to {num_rows - 1}: "
            "they are scores of different data"
        )
    if target.fingerprint != scores.fingerprint and None not in (target.fingerprint, scores.fingerprint):
        raise UserError(f"{target.source} and {scores.source} are scores of different data (fingerprints differ)")
    return verify(speculative, target, settings, strata, scores.index), target.made_by


def cut_baseline(arguments, experiment: Experiment | None, method: str, source: Path, selection: Selection) -> Rules:
    rules, variant = selection.rules, selection.baseline_variant
    columns = columns_of(method, variant)
    elsewhere = arguments.features is not None and "hidden_state" in columns
    read = [name for name in columns if not (elsewhere and name == "hidden_state")]
    scores = read_scores(source, read, ids=False)
    scores.check_complete()
    if elsewhere:
        features = read_features(arguments.features, len(scores.index) + len(scores.left_out))
        scores.columns["hidden_state"] = features[scores.index] if len(scores.left_out) else features
    if method == "length" and len(empty := np.flatnonzero(scores.columns["n_response_tokens"] < 1)):
        raise UserError(f"{scores.source}: row {scores.index[empty[0]]} has no response token: remove the row")
    settings = selection.num_strata, selection.hardest_cutoff, selection.seed
    rule = baseline(method, scores.columns, len(scores.index), rules, variant, *settings)
    record: dict[str, Any] = {"seed": selection.seed}
    if method in ("el2n", "ccs", "d2"):
        record["variant"] = variant
    if method == "length":
        record["mode"] = selection.mode
    if method in ("length", "ccs"):
        record["num_strata"] = selection.num_strata
    if method in ("length", "ccs", "d2"):
        record["hardest_cutoff"] = selection.hardest_cutoff
    return scores, rule, lambda choice: record


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
