"""Coresets of a pool whose faults are known: rows drawn at random among the clean ones, the most a rule can gain.

    python scripts/paper/oracle.py --config_path configs/pools/go_biology.yaml \
        --set dataset=runs/pools/go_biology/seed-1/swapped_30.jsonl

Needs a pool of scripts/paper/pools.py, with its kinds beside it. Writes oracle-RATE.json for every rate of the
experiment into the run folder.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
from selection.run.ending import run_stage

import numpy as np

from scripts.paper.pools import is_faulty
from selection.method.staff import RANDOM, coreset_size, random_ranks
from selection.rows.split import training_split
from selection.run.cli import argument_parser, load_experiment_from_arguments
from selection.run.config import from_repository
from selection.run.errors import UserError, refusals
from selection.run.products import write_json
from selection.scores.coresets import coreset_name


def main() -> None:
    experiment, _ = load_experiment_from_arguments(argument_parser(__doc__))
    split, pool = training_split(experiment), from_repository(experiment.data_sets[0].path)
    faulty, settings = is_faulty(pool), experiment.selection
    if len(faulty) != len(split.rows):
        raise UserError(f"{pool} has {len(faulty)} kinds, the split {len(split.rows)} training rows: give eval_data")
    # Random's own draw, the faulty rows put last.
    ranks = random_ranks(len(faulty), settings.seed, RANDOM) + len(faulty) * faulty
    for rate in settings.rates:
        with refusals():
            m = coreset_size(rate, len(faulty))
        if m > (~faulty).sum():
            raise UserError(f"rate {rate:g}: {m} rows, {pool} has {(~faulty).sum()} clean ones")
        rows = np.sort(np.argsort(ranks)[:m])
        path = experiment.coresets / f"{coreset_name('oracle', rate)}.json"
        about = {"method": "oracle", "rate": rate, "seed": settings.seed, "num_rows": len(faulty), "size": m}
        about |= {"data_fingerprint": split.fingerprint, "indices": rows.tolist(), "ids": [split.ids[i] for i in rows]}
        write_json(path, about)
        print(f"oracle at rate {rate:g}: {m} of {len(faulty)} rows -> {path}")


if __name__ == "__main__":
    run_stage(main)
