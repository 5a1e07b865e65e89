"""Cut coresets from stored scores: pure arithmetic, no model.

    python coreset.py --config_path ../configs/demo.yaml
    python coreset.py --scores small.parquet --target_scores target.parquet --rate 0.1 0.2 --out coresets

The first form takes scores and verification from the experiment's run folder. The second takes score folders, or
Parquet or CSV files with columns index,effort (one row per row of the training split); each V_i comes from
--verify_per_stratum drawn samples also where the target's scores are complete. Writes OUT/METHOD-RATE.json.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, whatever the working directory

import numpy as np  # noqa: E402

from selection.config import Selection, validated  # noqa: E402
from selection.coreset_files import write_coreset  # noqa: E402
from selection.errors import UserError, run_stage  # noqa: E402
from selection.ledger import CORESETS, Cost, measured  # noqa: E402
from selection.score_files import Scores, read_scores  # noqa: E402
from selection.staff import Choice, choose_random, choose_staff  # noqa: E402
from selection.stage import add_experiment_arguments, load_experiment  # noqa: E402
from selection.verification import Settings, StratumRecord, cut_strata, read_verification, verify  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_experiment_arguments(parser, required=False)
    published = Selection()
    parser.add_argument("--scores", type=Path, help="speculative scores of the whole training split")
    parser.add_argument("--target_scores", type=Path, help="target scores, at least of the drawn samples")
    parser.add_argument("--verification", type=Path, help="verification.json instead of --target_scores")
    parser.add_argument("--method", nargs="+", choices=["staff", "random"], help="default: staff")
    parser.add_argument("--mode", choices=["paper", "released"], help=f"default: {published.mode}")
    parser.add_argument("--rate", type=float, nargs="+", help="fractions to keep")
    parser.add_argument("--num_strata", type=int, help=f"K, default {published.num_strata}")
    parser.add_argument("--verify_per_stratum", type=int, help=f"b_v, default {published.verify_per_stratum}")
    parser.add_argument("--hardest_cutoff", type=float, help=f"default {published.hardest_cutoff}")
    parser.add_argument("--seed", type=int, help=f"default {published.seed}")
    parser.add_argument("--out", type=Path, help="folder for the coresets")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.config_path:
        experiment = load_experiment(arguments.config_path, arguments.set)
        arguments.scores = arguments.scores or experiment.small_scores
        if not arguments.target_scores:
            arguments.verification = arguments.verification or experiment.verification
        arguments.out = arguments.out or experiment.coresets
        arguments.method = arguments.method or experiment.selection.methods
        arguments.rate = arguments.rate or experiment.selection.rates
        cost = Cost(CORESETS, f"rates {', '.join(map(str, arguments.rate))}", device="CPU")
        with measured(experiment.folder, cost):
            cost.samples = cut_coresets(arguments, experiment.selection)
    else:
        if arguments.set:
            raise UserError("--set overrides keys of an experiment: give --config_path with it")
        if arguments.scores is None or not arguments.rate or arguments.out is None:
            raise UserError("give --config_path, or --scores, --rate and --out (see --help)")
        arguments.method = arguments.method or ["staff"]
        cut_coresets(arguments, Selection())


def cut_coresets(arguments: argparse.Namespace, selection: Selection) -> int:
    """Cut and write every asked method at every asked rate; returns the number of rows they are cut from."""
    given = {name: getattr(arguments, name) for name in Selection.model_fields if hasattr(arguments, name)}
    settings = Settings.of(validated(selection, {k: v for k, v in given.items() if v is not None}))
    scores = read_scores(arguments.scores)
    speculative = scores.of_all_rows()

    cut: list[tuple[str, float, Choice, dict[str, Any]]] = []  # written once everything is known to be right
    if "random" in arguments.method:
        for rate in arguments.rate:
            cut.append(("random", rate, choose_random(len(speculative), rate, settings.seed), {"seed": settings.seed}))
    if "staff" in arguments.method:
        strata, records = cut_strata(speculative, settings), verified_strata(arguments, scores, speculative, settings)
        ratios = [record.verification_ratio for record in records]
        for rate in arguments.rate:
            choice = choose_staff(speculative, strata, ratios, rate, settings.mode, settings.seed)
            budgets = zip(records, choice.budgets, choice.filled, strict=True)
            table = [{**asdict(r), "budget": budget, "of_which_random_fill": filled} for r, budget, filled in budgets]
            record = {**asdict(settings), "strata": table, "from_hardest": choice.from_hardest}
            cut.append(("staff", rate, choice, record))
    for method, rate, choice, record in cut:
        path = write_coreset(arguments.out, method, rate, choice, scores, record)
        print(f"{method} at rate {rate:g}: {len(choice.rows)} of {len(speculative)} rows -> {path}")
    return len(speculative)


def verified_strata(
    arguments: argparse.Namespace, scores: Scores, speculative: np.ndarray, settings: Settings
) -> list[StratumRecord]:
    if (arguments.target_scores is None) == (arguments.verification is None):
        raise UserError("STAFF needs either --target_scores or --verification beside --scores")
    if arguments.target_scores is None:
        return read_verification(arguments.verification, settings, scores)
    target = read_scores(arguments.target_scores)
    if target.index[-1] >= len(speculative):
        raise UserError(
            f"{target.source} scores row {target.index[-1]}, {scores.source} only rows up to {len(speculative) - 1}: "
            "they are scores of different data"
        )
    if target.fingerprint != scores.fingerprint and None not in (target.fingerprint, scores.fingerprint):
        raise UserError(f"{target.source} and {scores.source} are scores of different data (fingerprints differ)")
    return verify(speculative, target, settings)


if __name__ == "__main__":
    run_stage(main)
