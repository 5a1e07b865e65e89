"""How long cutting a tenth from stored scores takes, how much memory, and how both grow with the number of rows.

    python scripts/bench/choice.py
    python scripts/bench/choice.py --method d2 --rows 115784 --features 576

Every point is a process of its own: it reads what the method needs from a score folder of random figures, chooses, and
writes the coreset. "CPU" is the choice's processor time. Needs nothing; prints a table.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args

sys.path[0] = str(Path(__file__).resolve().parents[2])
from selection.run.ending import run_stage

import numpy as np

from scripts.bench.apart import measure_apart, process_peak_gib
from selection.method.baselines import baseline, columns_of
from selection.method.staff import choose_staff, coreset_size
from selection.run.cli import argument_parser
from selection.run.config import Method, Selection
from selection.run.errors import UserError, refusals
from selection.run.products import write_sealed
from selection.scores.coresets import write_coreset
from selection.scores.folder import ScoreFolder, read_ids, read_scores
from selection.scores.verification import Settings, cut_strata, draw, verify

RATE, READ_FEATURES = 0.1, ("moderate", "d2")
FIGURES = {"reading": ".3f", "choice": ".4f", "CPU": ".4f", "writing": ".3f", "peak, GiB": ".2f"}  # the others seconds


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(measure(**json.loads(sys.argv[2]))))
        return
    parser, methods = argument_parser(__doc__), get_args(Method)
    parser.add_argument("--method", nargs="+", choices=methods, default=methods, help="default: all")
    parser.add_argument("--rows", type=int, nargs="+", help="N; default: 10^4 to 10^8, of moderate and d2 to 10^5")
    parser.add_argument("--features", type=int, default=576, help="d, for moderate and d2; default: 576")
    parser.add_argument("--folder", type=Path, help="where the score folders are made (10^8 rows: 6 GB); default: /tmp")
    arguments = parser.parse_args()
    if min(arguments.rows or [10]) < 10 or arguments.features < 1:
        raise UserError("--rows and --features: give at least 10 rows and one feature")
    print(f"{'method':<16}{'rows':>12}" + "".join(f"{name:>11}" for name in FIGURES))
    for rows in sorted(arguments.rows or [10**power for power in range(4, 9)]):
        # D2 grows with N² · d.
        methods = [m for m in arguments.method if arguments.rows or rows <= 10**5 or m not in READ_FEATURES]
        runs = [(m, mode) for m in methods for mode in ("paper", "released") if m == "staff" or mode == "paper"]
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            make_score_folder(Path(folder), rows, arguments.features if set(methods) & set(READ_FEATURES) else 0)
            for method, mode in runs:
                point = measure_apart(__file__, {"folder": folder, "method": method, "mode": mode})
                figures = "".join(f"{point[name]:>11{form}}" for name, form in FIGURES.items())
                name = f"staff, {mode}" if method == "staff" else method
                print(f"{name:<16}{rows:>12,}{figures}", flush=True)


@refusals()
def measure(folder: str, method: str, mode: str) -> dict[str, float]:
    """FIGURES of one choice."""
    path, selection, marks = Path(folder), Selection(mode=mode), [time.perf_counter()]
    columns = ("effort",) if method == "staff" else columns_of(method, selection.baseline_variant)
    scores = read_scores(path, columns, ids=False).check_complete()
    # Released: the target has scored everything too.
    target = read_scores(path, ids=False) if (method, mode) == ("staff", "released") else None
    m, cpu = coreset_size(RATE, len(scores.index)), -time.process_time()
    marks.append(time.perf_counter())
    if method == "staff":
        settings = Settings.of(selection)
        strata = cut_strata(scores.effort, settings)
        verified = target or scores.only(np.sort(np.concatenate(draw(strata, settings))))
        ratios = [record.verification_ratio for record in verify(scores.effort, verified, settings, strata)]
        choice = choose_staff(scores.effort, strata, ratios, m, mode, settings.seed)
    else:
        by = selection.baseline_variant, selection.num_strata, selection.hardest_cutoff, selection.seed
        choice = baseline(method, scores.columns, len(scores.index), mode, *by)(m, None)
    cpu += time.process_time()
    marks.append(time.perf_counter())
    scores.columns.clear()
    write_coreset(path, method, RATE, choice.rows, *read_ids(path, choice.rows), scores, {})
    reading, choosing, writing = np.diff([*marks, time.perf_counter()]).tolist()
    return dict(zip(FIGURES, (reading, choosing, cpu, writing, process_peak_gib()), strict=True))


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
