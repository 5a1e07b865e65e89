"""How long a method takes to cut a coreset from stored scores, and how much memory: arithmetic alone, random data.

    python scripts/bench_selection.py --method d2 --rows 115784 --features 576

Features are made as hidden states are: clusters around a large common mean.
"""

import argparse
import resource
import sys
import time
from pathlib import Path
from typing import get_args

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root, whatever the working directory

import numpy as np  # noqa: E402

from selection.baselines import baseline, columns_of  # noqa: E402
from selection.config import Method, Selection  # noqa: E402
from selection.errors import UserError, run_stage  # noqa: E402

CLUSTERS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = [method for method in get_args(Method) if method != "staff"]
    parser.add_argument("--method", nargs="+", choices=methods, required=True)
    parser.add_argument("--rows", type=int, nargs="+", required=True, help="N")
    parser.add_argument("--features", type=int, default=576, help="d, of the methods that read features")
    parser.add_argument("--rate", type=float, default=0.1, help="fraction to keep")
    arguments = parser.parse_args()
    if min(arguments.rows) < 10 or arguments.features < 1:
        raise UserError("--rows and --features: give at least 10 rows and one feature")
    print(f"{'method':<10}{'rows':>12}{'seconds':>10}{'peak GiB so far':>17}")
    for rows in sorted(arguments.rows):
        for method in arguments.method:
            selection = Selection()
            names = columns_of(method, selection.baseline_variant)
            columns = {name: random_column(name, rows, arguments.features) for name in names}
            started = time.perf_counter()
            baseline(method, columns, rows, selection)(arguments.rate)
            seconds = time.perf_counter() - started
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
            print(f"{method:<10}{rows:>12,}{seconds:>10.2f}{peak:>17.2f}", flush=True)


def random_column(name: str, rows: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    if name == "n_response_tokens":
        return rng.integers(1, 200, rows).astype(np.float64)
    if name != "hidden_state":
        return rng.lognormal(size=rows)
    centres = 10 + 3 * rng.standard_normal((CLUSTERS, width), dtype=np.float32)
    features = rng.standard_normal((rows, width), dtype=np.float32)
    features += centres[rng.integers(CLUSTERS, size=rows)]
    return features


if __name__ == "__main__":
    run_stage(main)
