"""How long cutting a coreset from stored scores takes, how much memory, and how both grow with the number of rows.

    python scripts/bench/choice.py
    python scripts/bench/choice.py --method d2 --rows 115784 --features 576

Every point is a process of its own, so its peak memory is its own: it reads what the method needs from a score folder
of random figures, as the scoring stage leaves it (parts in no order of rows), chooses, and writes the coreset with its
ids. "CPU" are the processor seconds of the choice: other work on the machine hardly touches them. "growth" is their
exponent between a size and the one before it: 1 is linear. Features are made as hidden states are: clusters around a
large common mean. The folders are made under --folder and removed.
Needs nothing; prints a table.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from selection.method.baselines import baseline, columns_of
from selection.method.staff import choose_staff, coreset_size
from selection.run.cli import argument_parser, run_stage
from selection.run.config import Method, Selection
from selection.run.errors import UserError
from selection.run.products import file_digest, write_sealed
from selection.scores.coresets import write_coreset
from selection.scores.folder import MORE_COLUMNS, SCHEMA, read_scores
from selection.scores.verification import Settings, cut_strata, draw, verify

CLUSTERS = 300
ROWS_PER_PART, MOST_PARTS = 256, 10_000  # as scoring writes them, but for larger parts beyond 2.56 million rows
READ_FEATURES = ("moderate", "d2")
MOST_ROWS_WITH_FEATURES = 10**5  # of these where no --rows are given: D2 grows with N² · d


def main() -> None:
    parser = argument_parser(__doc__)
    methods = get_args(Method)
    parser.add_argument("--method", nargs="+", choices=methods, default=methods, help="default: all")
    parser.add_argument("--rows", type=int, nargs="+", help="N; default: 10^4 to 10^8, of moderate and d2 to 10^5")
    parser.add_argument(
        "--features", type=int, default=576, help="d, of the methods that read features; default: %(default)s"
    )
    parser.add_argument("--rate", type=float, default=0.1, help="fraction of the rows to keep; default: %(default)s")
    parser.add_argument("--folder", type=Path, help="where the score folders are made (10^8 rows: 6 GB); default: /tmp")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(**json.loads(arguments.worker))))
        return
    if min(arguments.rows or [10]) < 10 or arguments.features < 1:
        raise UserError("--rows and --features: give at least 10 rows and one feature")
    print(
        f"{'method':<16}{'rows':>12}{'reading, s':>12}{'choice, s':>12}{'CPU, s':>10}{'growth':>8}{'writing, s':>12}"
        f"{'peak, GiB':>11}"
    )
    before: dict[str, tuple[int, float]] = {}
    for rows in sorted(arguments.rows or [10**power for power in range(4, 9)]):
        few_enough = arguments.rows or rows <= MOST_ROWS_WITH_FEATURES
        methods = [method for method in arguments.method if few_enough or method not in READ_FEATURES]
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            width = arguments.features if set(methods) & set(READ_FEATURES) else None
            make_score_folder(Path(folder) / "scores", rows, width)
            for method in methods:
                for mode in ("paper", "released") if method == "staff" else ("paper",):
                    name = f"staff, {mode}" if method == "staff" else method
                    job = {"folder": folder, "method": method, "mode": mode, "rate": arguments.rate}
                    point = measure_apart(job)
                    growth = ""
                    if name in before:
                        fewer, seconds = before[name]
                        growth = f"{math.log(point['cpu'] / seconds) / math.log(rows / fewer):.2f}"
                    before[name] = rows, point["cpu"]
                    print(
                        f"{name:<16}{rows:>12,}{point['reading']:>12.3f}{point['choice']:>12.4f}"
                        f"{point['cpu']:>10.4f}{growth:>8}"
                        f"{point['writing']:>12.3f}{point['peak']:>11.2f}",
                        flush=True,
                    )


def measure_apart(job: dict) -> dict[str, float]:
    """`measure` in a fresh process."""
    done = subprocess.run([sys.executable, __file__, "--worker", json.dumps(job)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode} (9: out of memory)"])[-1]
        raise UserError(f"{job['method']} failed: {reason.removeprefix('error: ')}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: str, method: str, mode: str, rate: float) -> dict[str, float]:
    """Seconds of reading, choice (the median of up to 5 within a second) and writing; peak memory in GiB."""
    path, selection = Path(folder) / "scores", Selection(mode=mode)
    started = time.perf_counter()
    columns = ("effort",) if method == "staff" else columns_of(method, selection.baseline_variant)
    scores = read_scores(path, columns, ids=False).check_complete()
    # Released: the target has scored everything too.
    target = read_scores(path, ids=False) if (method, mode) == ("staff", "released") else None
    reading = time.perf_counter() - started
    choices, cpu = [], []
    while len(choices) < 5 and sum(choices) < 1:
        started, cpu_before = time.perf_counter(), time.process_time()
        if method == "staff":
            choice = choose_by_staff(scores, target, selection, rate)
        else:
            settings = selection.num_strata, selection.hardest_cutoff, selection.seed
            given = scores.columns, len(scores.index), mode, selection.baseline_variant
            choice = baseline(method, *given, *settings)(coreset_size(rate, len(scores.index)), None)
        choices.append(time.perf_counter() - started)
        cpu.append(time.process_time() - cpu_before)
    started = time.perf_counter()
    scores.columns.clear()
    write_coreset(Path(folder), method, rate, choice, scores.chosen(choice.rows), {})
    return {
        "reading": reading,
        "choice": statistics.median(choices),
        "cpu": statistics.median(cpu),
        "writing": time.perf_counter() - started,
        "peak": int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20,
    }


def choose_by_staff(scores, target, selection: Selection, rate: float):
    """Steps 3 to 5: strata, draws, V_i and choice."""
    settings = Settings.of(selection)
    strata = cut_strata(scores.effort, settings)
    if target is None:
        target = scores.only(np.sort(np.concatenate(draw(strata, settings))))
    ratios = [record.verification_ratio for record in verify(scores.effort, target, settings, strata)]
    m = coreset_size(rate, len(scores.effort))
    return choose_staff(scores.effort, strata, ratios, m, settings.mode, settings.seed)


def make_score_folder(path: Path, rows: int, width: int | None) -> None:
    """Random figures for every row, with features of `width` where it is given."""
    rng = np.random.default_rng(0)
    manifest = {"identity": {"data_fingerprint": "random"}, "num_rows": rows, "columns": [], "left_out": []}
    write_sealed(path / "manifest.json", manifest)
    names = [*SCHEMA.names, "el2n", "entropy"] + (["hidden_state"] if width else [])
    centres = 10 + 3 * rng.standard_normal((CLUSTERS, width or 0), dtype=np.float32)
    index = rng.permutation(rows)
    per_part = max(ROWS_PER_PART, -(-rows // MOST_PARTS))
    for start in range(0, rows, per_part):
        part = index[start : start + per_part]
        columns = {name: part if name == "index" else random_column(rng, name, len(part), centres) for name in names}
        types = {field.name: field.type for field in SCHEMA} | MORE_COLUMNS
        table = pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
        part_path = path / "part.parquet"
        pa.parquet.write_table(table, part_path)
        part_path.rename(path / f"part-{start:016x}-{file_digest(part_path)[:16]}.parquet")


def random_column(rng: np.random.Generator, name: str, rows: int, centres: np.ndarray) -> np.ndarray | list[np.ndarray]:
    if name == "id":  # 16 hex digits
        digits = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)[rng.integers(16, size=(rows, 16), dtype=np.uint8)]
        return digits.view("S16")[:, 0].astype("U16")
    if name in ("n_prompt_tokens", "n_response_tokens"):
        return rng.integers(1, 200, rows, dtype=np.int32)
    if name != "hidden_state":
        return rng.lognormal(size=rows)
    features = rng.standard_normal((rows, centres.shape[1]), dtype=np.float32)
    return list(features + centres[rng.integers(CLUSTERS, size=rows)])


if __name__ == "__main__":
    run_stage(main)
