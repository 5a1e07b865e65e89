"""How long cutting a tenth from stored scores takes, how much memory, and how both grow with the number of rows.

    python scripts/bench/choice.py
    python scripts/bench/choice.py --method d2 --rows 115784 --features 576

Each point is a call of coreset.py on a score folder of random figures: reading, choice and writing together, with some
seconds of imports. Needs nothing; prints a table.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args

sys.path[0] = str(Path(__file__).resolve().parents[2])
from selection.run.ending import run_stage

import numpy as np

from selection.run.cli import argument_parser
from selection.run.config import REPOSITORY, Method
from selection.run.errors import UserError
from selection.run.products import write_sealed
from selection.scores.folder import ScoreFolder

READ_FEATURES = ("moderate", "d2")


def main() -> None:
    parser, methods = argument_parser(__doc__), get_args(Method)
    parser.add_argument("--method", nargs="+", choices=methods, default=methods, help="default: all")
    parser.add_argument("--rows", type=int, nargs="+", help="N; default: 10^4 to 10^8, of moderate and d2 to 10^5")
    parser.add_argument("--features", type=int, default=576, help="d, for moderate and d2; default: 576")
    parser.add_argument("--folder", type=Path, help="where the score folders are made (10^8 rows: 6 GB); default: /tmp")
    arguments = parser.parse_args()
    if min(arguments.rows or [10]) < 10 or arguments.features < 1:
        raise UserError("--rows and --features: give at least 10 rows and one feature")
    print(f"{'method':<16}{'rows':>12}{'seconds':>11}{'CPU':>11}{'peak, GiB':>11}")
    for rows in sorted(arguments.rows or [10**power for power in range(4, 9)]):
        # D2 takes time in proportion to N² · d, so by default it stops at 10^5 rows, and Moderate with it.
        methods = [m for m in arguments.method if arguments.rows or rows <= 10**5 or m not in READ_FEATURES]
        runs = [(m, mode) for m in methods for mode in ("paper", "released") if m == "staff" or mode == "paper"]
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            make_score_folder(Path(folder), rows, arguments.features if set(methods) & set(READ_FEATURES) else 0)
            for method, mode in runs:
                seconds, processor, peak = cut(folder, method, mode)
                name = f"staff, {mode}" if method == "staff" else method
                print(f"{name:<16}{rows:>12,}{seconds:>11.2f}{processor:>11.2f}{peak:>11.2f}", flush=True)


def cut(folder: str, method: str, mode: str) -> tuple[float, float, float]:
    """Seconds passed, processor seconds and peak memory (GiB) of one call; staff: the target's scores are the same."""
    command = [sys.executable, REPOSITORY / "selection" / "coreset.py", "--scores", folder, "--rate", "0.1", "--quiet"]
    command += ["--method", method, "--mode", mode, "--out", Path(folder) / "coresets"]
    command += ["--target_scores", folder] if method == "staff" else []
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{method} on {folder} failed; its message stands above")
    return time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20  # Linux counts in KiB


def make_score_folder(path: Path, rows: int, width: int) -> None:
    """Random figures in parts of 256 rows, at most 10,000; features (rows, width) in clusters, like hidden states."""
    rng, columns = np.random.default_rng(0), ["el2n", "entropy"] + ["hidden_state"] * (width > 0)
    centres = 10 + 3 * rng.standard_normal((300, width), dtype=np.float32)
    folder = ScoreFolder(path, {"data_fingerprint": "random"}, rows, columns)
    write_sealed(folder.manifest_path, folder.manifest)
    for part in np.array_split(rng.permutation(rows), min(10_000, -(-rows // 256))):
        count = len(part)
        features = rng.standard_normal((count, width), dtype=np.float32) + centres[rng.integers(300, size=count)]
        columns = {name: rng.lognormal(size=count) for name in ("loss", "effort", "el2n", "entropy")}
        columns |= {name: rng.integers(1, 200, count) for name in ("n_prompt_tokens", "n_response_tokens")}
        ids = [f"{number:016x}" for number in rng.integers(2**63, size=count)]
        folder.write_part([part.tolist()], columns | {"index": part, "id": ids, "hidden_state": features})


if __name__ == "__main__":
    run_stage(main)
