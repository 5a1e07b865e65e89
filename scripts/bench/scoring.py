r"""How fast effort scores are made, against other ways to the same per-sample gradient norms.

    python scripts/bench/scoring.py --model models/smollm2-135m-instruct --data data/go_biology.jsonl --rows 96 \
        --phi v_lora_b all_lora --dtype fp32 bf16 --repeat 3 --json bench.json --out bench.png
    python scripts/bench/scoring.py --json data/results/bench/scoring.json --out bench.png

Every measurement is a fresh process. Contestants take turns, in an order that rotates, on the same batches of similar
length; `loop` and `released` take one sample at a time. What cannot be measured is skipped with the reason. Needs a
model, data and scripts/bench/requirements.txt; writes --json and prints a table. --out draws a --json.
"""

import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
from selection.run.ending import run_stage

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import AutoTokenizer

from scripts.bench.contestants import CONTESTANTS, load
from selection.method.effort import plan_batches, tokens_per_batch
from selection.run.cli import argument_parser
from selection.run.config import from_repository
from selection.run.device import device, device_name
from selection.run.errors import UserError
from selection.run.log import say
from selection.run.products import atomic_path, code_version, read_json, write_json
from selection.scores.in_memory import tokens_of
from selection.scores.models import DTYPES

PHIS, KEY = ("v_lora_b", "all_lora"), ["phi", "dtype", "contestant"]


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(measure(**json.loads(sys.argv[2]))))
        return
    parser, others = argument_parser(__doc__), [name for name in CONTESTANTS if name != "suite"]
    parser.add_argument("--model", help="model folder; default: none, draw the --json that is there")
    parser.add_argument("--data", help="JSONL with instruction, input and output; required with --model")
    parser.add_argument("--rows", type=int, default=96, help="the first rows of the file; default: 96")
    parser.add_argument("--phi", nargs="+", choices=PHIS, default=["v_lora_b"], help="default: v_lora_b")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"], help="number formats; default: fp32")
    parser.add_argument("--against", nargs="*", choices=others, default=others, help="beside suite; default: all")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; default: 3")
    parser.add_argument("--json", required=True, help="results; required")
    parser.add_argument("--out", help="picture, .png; default: none")
    arguments = parser.parse_args()
    results = from_repository(arguments.json)
    if arguments.model:
        if arguments.rows < 1 or arguments.repeat < 1 or not arguments.data:
            raise UserError("give --data, and at least 1 for --rows and --repeat")
        write_json(results, compare(arguments))
    if arguments.out:
        draw(read_json(results), from_repository(arguments.out))


def compare(arguments) -> dict:
    """Measure every contestant in every round; what --json holds."""
    job = {key: str(from_repository(getattr(arguments, key))) for key in ("model", "data")} | {"rows": arguments.rows}
    ids, _ = tokenised_rows(**job)
    names, measured, skipped = ["suite", *arguments.against], [], {}
    for turn, phi, dtype in itertools.product(range(arguments.repeat), arguments.phi, arguments.dtype):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            key, about = dict(zip(KEY, (phi, dtype, name), strict=True)), f"{name} for {phi} in {dtype}"
            try:
                measured += [] if about in skipped else [key | measure_apart(job | key)]
            except UserError as error:
                skipped[about] = str(error)
                say(f"skipped: {about}: {error}")
    if not measured:
        raise UserError(f"nothing could be measured: {skipped}")
    rounds, results = dict(list(pd.DataFrame(measured).groupby(KEY))), []
    for key, own in rounds.items():
        result = dict(zip(KEY, key, strict=True)) | {"seconds_of_rounds": own.seconds.tolist()}
        result["samples_per_second"] = arguments.rows / own.seconds.median()
        result["peak_memory_gib"] = own.peak_memory_gib.max()
        exact = rounds.get((key[0], "fp32", "loop"))
        if exact is not None and (norms := own.norms.iloc[0]):
            difference = np.abs(np.array(norms) / np.array(exact.norms.iloc[0]) - 1)
            result["largest_relative_difference"] = float(difference.max())  # of the norms
        results.append(result)
    print(pd.DataFrame(results).drop(columns="seconds_of_rounds").to_string(index=False, na_rep="-"))
    settings = {"model": Path(job["model"]).name, "data": Path(job["data"]).name, "rows": arguments.rows}
    settings |= {"mean_tokens_per_sample": sum(map(len, ids)) / len(ids), "device": device_name()}
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft")}
    record = {"settings": settings, "date": datetime.now(UTC).date().isoformat(), "code_version": code_version()}
    return record | {"versions": versions, "results": results, "skipped": skipped}


def measure_apart(job: dict) -> dict:
    """`measure` in a fresh process, so that its peak memory is its own. Raises: UserError, without paths."""
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        said = done.stderr.strip().splitlines() if done.returncode > 0 else ["killed, most likely out of memory"]
        raise UserError(re.sub(r"/\S*/", "", said[-1][:300].removeprefix("error: ")))
    return json.loads(done.stdout.splitlines()[-1])


def measure(model: str, data: str, rows: int, phi: str, dtype: str, contestant: str) -> dict:
    """Time a contestant once over all rows; memory of the process, or of the GPU where there is one."""
    ids, labels = tokenised_rows(model, data, rows)
    budget = 1 if contestant in ("loop", "released") else tokens_per_batch(phi, device())
    batches = plan_batches(range(len(ids)), list(map(len, ids)), budget)
    score = CONTESTANTS[contestant](load(model, dtype, phi), phi)
    gpu = torch.cuda if torch.cuda.is_available() else None
    # Forget the peak of loading.
    gpu.reset_peak_memory_stats() if gpu else Path("/proc/self/clear_refs").write_text("5")

    def score_all(batches: list[list[int]]) -> list:
        outcomes = [score([ids[row] for row in batch], [labels[row] for row in batch]) for batch in batches]
        if gpu:
            gpu.synchronize()
        return outcomes

    score_all(batches[-2:])  # the shortest: warm-up
    started = time.perf_counter()
    outcomes = score_all(batches)
    seconds, order = time.perf_counter() - started, np.argsort(list(itertools.chain(*batches)))
    norms, losses = (torch.cat(of) if of[0] is not None else None for of in zip(*outcomes, strict=True))
    return {
        "seconds": seconds,
        "peak_memory_gib": round(gpu.max_memory_allocated() / 2**30 if gpu else process_peak_gib(), 4),
        "norms": [] if norms is None else norms.double().cpu()[order].tolist(),
        "losses": losses.double().cpu()[order].tolist(),
    }


def process_peak_gib() -> float:
    """Not getrusage's ru_maxrss: it counts the memory of the parent, which this process was forked from, too."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def tokenised_rows(model: str, data: str, rows: int) -> tuple[tuple, tuple]:
    """Token ids and labels (−100 on the prompt) of the file's first rows, cut to 1,024 tokens, by the tokenizer's own
    chat template: LLaMA-Factory is not on every machine that is measured."""
    samples = []
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        for record in map(json.loads, Path(data).read_text(encoding="utf-8").splitlines()[:rows]):
            prompt, answer = f"{record['instruction']}\n{record.get('input', '')}".strip(), record["output"]
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            plain = {"prompt": f"{prompt}\n", "completion": answer}
            samples.append({"messages": turns} if tokenizer.chat_template else plain)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot tokenise {data} by {model}: {error!r}: give --model and --data") from None
    if len(samples) < rows:
        raise UserError(f"--rows {rows}: {data} has {len(samples)}")
    return tuple(zip(*tokens_of(Dataset.from_list(samples), tokenizer, 1024), strict=True))


def draw(record: dict, out: Path) -> None:
    """A panel for each φ and dtype: samples per second, the fastest on top."""
    panels = pd.DataFrame(record["results"]).groupby(["phi", "dtype"])
    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    figure.suptitle(", ".join(str(record["settings"][key]) for key in ("model", "device")))
    for axes, (names, results) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        bars = results.sort_values("samples_per_second")
        axes.bar_label(axes.barh(bars.contestant, bars.samples_per_second), fmt="%.3g")
        axes.set(title=", ".join(names), xlabel="samples per second")
    with atomic_path(out) as draft:
        figure.savefig(draft, dpi=110, format="png")


if __name__ == "__main__":
    run_stage(main)
