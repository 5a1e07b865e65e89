r"""How fast effort scores are made, against other ways to the same per-sample gradient norms.

    python scripts/bench/scoring.py --model models/smollm2-135m-instruct --data data/go_biology.jsonl --rows 96 \
        --phi v_lora_b all_lora --dtype fp32 bf16 --repeat 3 --json bench.json --out bench.png
    python scripts/bench/scoring.py --json data/results/bench/scoring.json --out bench.png

Every measurement is a fresh process, so its peak memory is its own. Contestants take turns, in an order that rotates.
`suite` is always measured; its batches of similar length are those of the others too, but `loop` and `released` take
one sample at a time. What cannot be measured is skipped with the reason. The contestants' packages:
scripts/bench/requirements.txt. Needs a model and data; writes --json and prints a table. --out draws a --json.
"""

import importlib.metadata
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import pandas as pd
import torch

from scripts.bench.apart import measure_apart, process_peak_gib
from scripts.bench.contestants import CONTESTANTS, ONE_AT_A_TIME, load
from selection.method.effort import IGNORED_LABEL, plan_batches, tokens_per_batch
from selection.run.cli import argument_parser, run_stage
from selection.run.config import from_repository
from selection.run.device import device, device_name
from selection.run.errors import UserError
from selection.run.log import say
from selection.run.products import atomic_path, code_version, read_json, write_json
from selection.scores.models import DTYPES

PHIS = ("v_lora_b", "all_lora")
# By contestant: `forward_backward` is otherwise nearly the bound.
ONLY_FOR = {"released": "v_lora_b", "forward_backward": "all_lora"}
YARDSTICKS = ("bound", "forward_backward", "loop", "released")  # every speed is put in relation to theirs
CUTOFF = 1024
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"  # where the tokenizer has none


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(measure(**json.loads(sys.argv[2]))))
        return
    parser = argument_parser(__doc__)
    parser.add_argument("--model", help="model folder; default: none, draw the --json that is there")
    parser.add_argument("--data", help="JSONL with instruction, input and output; required with --model")
    parser.add_argument("--rows", type=int, default=96, help="the first rows of the file; default: 96")
    parser.add_argument("--phi", nargs="+", choices=PHIS, default=["v_lora_b"], help="default: v_lora_b")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"], help="number formats; default: fp32")
    others = [name for name in CONTESTANTS if name != "suite"]
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
        print(f"results: {results}")
    if arguments.out:
        draw(read_json(results), from_repository(arguments.out))
        print(f"picture: {from_repository(arguments.out)}")


def compare(arguments) -> dict:
    """Measure every contestant in every round; what --json holds."""
    job = {key: str(from_repository(getattr(arguments, key))) for key in ("model", "data")} | {"rows": arguments.rows}
    ids, _ = tokenised_rows(**job)
    names, rounds, skipped = ["suite", *dict.fromkeys(arguments.against)], defaultdict(list), {}
    for turn, phi, dtype in itertools.product(range(arguments.repeat), arguments.phi, arguments.dtype):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            key = phi, dtype, name
            if reason := skipped.get(key) or reason_to_skip(name, phi):
                skipped[key] = reason
                continue
            try:
                outcome = measure_apart(__file__, job | {"phi": phi, "dtype": dtype, "contestant": name})
            except UserError as error:
                if name == "suite":
                    raise UserError(f"the suite itself failed on {phi} in {dtype}: {error}") from None
                skipped[key] = str(error)
            else:
                rounds[key].append(outcome)
                say(f"round {turn + 1}: {name} for {phi} in {dtype}: {outcome['seconds']:.2f} s")
    order = sorted(rounds, key=lambda key: (key[:2], list(CONTESTANTS).index(key[2])))
    results = [summarise(key, rounds) for key in order]
    for (phi, dtype, name), reason in skipped.items():
        print(f"skipped: {name} for {phi} in {dtype}: {reason}")
    print(pd.json_normalize(results).drop(columns="seconds_of_rounds").to_string(index=False, na_rep="-"))
    packages = [p for p in ("torch", "transformers", "peft", "opacus", "bergson") if importlib.util.find_spec(p)]
    return {
        "settings": {
            "model": Path(job["model"]).name,
            "data": Path(job["data"]).name,
            "rows": arguments.rows,
            "mean_tokens_per_sample": sum(map(len, ids)) / len(ids),
            "device": device_name(),
        },
        "date": datetime.now(UTC).date().isoformat(),
        "code_version": code_version(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "results": results,
        "skipped": [{"phi": p, "dtype": d, "contestant": c, "reason": r} for (p, d, c), r in skipped.items()],
    }


def reason_to_skip(contestant: str, phi: str) -> str | None:
    package = contestant.partition("_")[0]
    if package in ("opacus", "bergson") and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if contestant in ONLY_FOR and phi != ONLY_FOR[contestant]:
        return f"of interest for {ONLY_FOR[contestant]} alone"
    return None


def summarise(key: tuple[str, str, str], rounds: dict[tuple, list[dict]]) -> dict:
    """Speed against the yardsticks, as the median of the ratios within rounds: machines drift."""
    phi, dtype, contestant = key
    own, exact, difference = rounds[key], rounds.get((phi, "fp32", "loop")), None
    seconds, references = [m["seconds"] for m in own], {name: rounds.get((phi, dtype, name)) for name in YARDSTICKS}
    if exact and own[0]["norms"]:
        norms, exact_norms = np.array(own[0]["norms"]), np.array(exact[0]["norms"])
        difference = float(np.max(np.abs(norms - exact_norms) / exact_norms))
    return {
        "phi": phi,
        "dtype": dtype,
        "contestant": contestant,
        "seconds_of_rounds": seconds,
        "samples_per_second": len(own[0]["losses"]) / statistics.median(seconds),
        "peak_memory_gib": max(measured["peak_memory_gib"] for measured in own),
        "largest_relative_difference": difference,  # of the norms, to those of the loop in fp32
        "times_as_fast_as": {
            name: statistics.median(r["seconds"] / s for r, s in zip(reference, seconds, strict=False))
            for name, reference in references.items()
            if reference
        },
    }


def measure(model: str, data: str, rows: int, phi: str, dtype: str, contestant: str) -> dict:
    """Time a contestant once over all rows; memory of the process, or of the GPU where there is one."""
    ids, labels = tokenised_rows(model, data, rows)
    budget = 1 if contestant in ONE_AT_A_TIME else tokens_per_batch(phi, device())
    batches = plan_batches(range(len(ids)), [len(row) for row in ids], budget)
    score = CONTESTANTS[contestant](load(Path(model), dtype, phi), phi)
    gpu = torch.cuda if torch.cuda.is_available() else None
    # The peak of scoring is not to be hidden under that of loading.
    gpu.reset_peak_memory_stats() if gpu else Path("/proc/self/clear_refs").write_text("5")

    def score_all(batches: list[list[int]]) -> list:
        outcomes = [score([ids[row] for row in batch], [labels[row] for row in batch]) for batch in batches]
        if gpu:
            gpu.synchronize()
        return outcomes

    score_all(batches[-2:])  # the shortest: warm-up
    started = time.perf_counter()
    norms, losses = zip(*score_all(batches), strict=True)
    seconds = time.perf_counter() - started
    order = np.argsort([row for batch in batches for row in batch])
    return {
        "seconds": seconds,
        "peak_memory_gib": round(gpu.max_memory_allocated() / 2**30 if gpu else process_peak_gib(), 4),
        "norms": None if norms[0] is None else torch.cat(norms).double().cpu()[order].tolist(),
        "losses": torch.cat(losses).double().cpu()[order].tolist(),
    }


def tokenised_rows(model: str, data: str, rows: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and labels (−100 on the prompt) of the file's first rows, cut to 1,024 tokens.

    By transformers alone, as LLaMA-Factory is not on every machine that is measured: the tokenizer's chat template.
    """
    from transformers import AutoTokenizer

    ids, labels = [], []
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
        for record in map(json.loads, Path(data).read_text(encoding="utf-8").splitlines()[:rows]):
            question = f"{record['instruction']}\n{record.get('input', '')}".strip()
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
            prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
            response = tokenizer.apply_chat_template(turns, tokenize=False).removeprefix(prompt)
            before, after = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, response))
            ids.append((before + after)[:CUTOFF])
            labels.append(([IGNORED_LABEL] * len(before) + after)[:CUTOFF])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot tokenise {data} by {model}: {error!r}: give --model and --data") from None
    if len(ids) < rows:
        raise UserError(f"--rows {rows}: {data} has {len(ids)}")
    if empty := [number for number, row in enumerate(labels) if max(row[1:], default=IGNORED_LABEL) < 0]:
        raise UserError(f"row {empty[0]} of {data}: {CUTOFF} tokens leave nothing of the response")
    return ids, labels


def draw(record: dict, out: Path) -> None:
    """A panel for each φ and dtype: samples per second, the fastest on top; the line is the bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels, settings = defaultdict(list), record["settings"]
    for result in record["results"]:
        panels[result["phi"], result["dtype"]].append(result)
    figure, row = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), squeeze=False, layout="constrained")
    about = f"{settings['rows']} samples of {settings['mean_tokens_per_sample']:.0f} tokens, {settings['device']}"
    figure.suptitle(f"{settings['model']}, {about}", fontsize=10, weight="bold")
    for axes, ((phi, dtype), results) in zip(row[0], panels.items(), strict=True):
        bound = [r["samples_per_second"] for r in results if r["contestant"] == "bound"]
        results = sorted((r for r in results if "bound" not in r["contestant"]), key=lambda r: r["samples_per_second"])
        names, speeds = [r["contestant"].replace("_", " ") for r in results], [r["samples_per_second"] for r in results]
        bars = axes.barh(names, speeds, color=["#4477aa" if name == "suite" else "#bbbbbb" for name in names])
        texts = [f"{r['samples_per_second']:.3g}, {r['peak_memory_gib']:.2f} GiB" for r in results]
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # over the line
        axes.bar_label(bars, texts, padding=4, fontsize=8, bbox=white)
        for speed in bound:
            axes.axvline(speed, color="#cc6677", linewidth=1.2)
        axes.set_title(f"φ = {phi}, {dtype}", fontsize=10)
        axes.set_xlabel("samples per second" + (f" (line: the bound, {bound[0]:.3g})" if bound else ""), fontsize=9)
        axes.set_xlim(0, 1.5 * max(speeds + bound))
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(out) as draft:
        figure.savefig(draft, dpi=110, format="png")


if __name__ == "__main__":
    run_stage(main)
