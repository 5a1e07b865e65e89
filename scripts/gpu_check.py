"""Does the suite do on this GPU what its tests show on a CPU, and how fast?

    python scripts/gpu_check.py
    python scripts/gpu_check.py --parts parity speed

Needs one GPU, no network, about ten minutes: after nine no case is begun. Models are random. Prints a table and writes
--json. Ends with 1 where something failed, with 2 without a GPU. Parts: parity (every φ against autograd, in fp32 and
bf16, all tiny families), speed (the scorer beside a pass that computes the losses alone, and beside the published loop;
goals: 0.8 of that pass, and on an H100 or H200 25,000 tokens/s with 7B), demo (demo.sh --tiny), memory (a real out of
memory, halved), processes (two on this GPU), repeats (a second pass, the same bits), attention (sdpa and
flash_attention_2 against eager), quantised (8 and 4 bit, by bitsandbytes).
"""

import contextlib
import importlib.metadata
import itertools
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from selection.run.ending import run_stage

import torch
import transformers

from scripts.bench.contestants import CONTESTANTS
from scripts.bench.random_models import ARCHITECTURES, SHAPES, make_model, make_samples, random_model, random_rows
from selection.method.effort import EffortScorer, plan_batches, tokens_per_batch
from selection.run import log
from selection.run.cli import argument_parser
from selection.run.config import REPOSITORY, from_repository
from selection.run.device import device, device_name
from selection.run.errors import UserError
from selection.run.ledger import CORESETS, read_ledger
from selection.run.products import code_version, write_json
from selection.scores.models import DTYPES, load_for_scoring, with_fresh_lora
from selection.scores.self_test import TOLERANCE, plain_scores
from selection.scores.within_memory import score_within_memory

PHIS = ("v_lora_b", "v_weight", "last_layer", "all_lora")
SHARE_OF_BOUND, TOKENS_PER_SECOND = 0.8, 25_000
ROOM = 3 * 2**29  # bytes that `memory` leaves free: too few for its batch, enough for some samples
NINE_MINUTES = 540  # seconds; after that no case is begun
Found = tuple[bool, str, dict[str, float]]  # passed, what is said, figures
Cases = Iterator[tuple[str, Callable[[], Found] | str]]  # name; the trial, or why there is none


def parity(where: torch.device, families=tuple(ARCHITECTURES)) -> Cases:
    for name, precision, phi in itertools.product(families, ("fp32", "bf16"), PHIS):
        make = partial(_tiny_scorer, name, phi, where, precision)
        yield f"{name} {phi} {precision}", partial(_against_autograd, make, TOLERANCE[precision][0])


def repeats(where: torch.device, families=("llama", "gpt2-conv1d-fused", "qwen2-moe-shared-expert")) -> Cases:
    for name, phi in itertools.product(families, PHIS):
        yield f"{name} {phi} bf16", partial(_second_pass, partial(_tiny_scorer, name, phi, where, "bf16"))


def _second_pass(make: Callable[[], EffortScorer]) -> Found:
    scorer = make()
    first, second = (scorer.score(*make_samples())["effort"] for _ in range(2))
    return torch.equal(first, second), *_off(_difference(second, first), 0)


@contextlib.contextmanager
def filled(where: torch.device) -> Iterator[None]:
    """The GPU with ROOM bytes free."""
    torch.cuda.empty_cache()
    ballast = torch.empty(max(torch.cuda.mem_get_info(where)[0] - ROOM, 0), dtype=torch.uint8, device=where)
    yield
    del ballast


def memory(where: torch.device, config=SHAPES["135M"], samples: int = 512, length: int = 512, fill=filled) -> Cases:
    def halve() -> Found:
        ids, labels = random_rows(config.vocab_size, [length] * samples, response=8)
        scorer = EffortScorer(random_model(config, where))
        parts = [slice(i, i + 16) for i in range(0, samples, 16)]
        expected = torch.cat([scorer.score(ids[part], labels[part])["effort"] for part in parts])
        with fill(where):
            scores = score_within_memory(scorer, ids, labels, [*map(str, range(samples))])["effort"]
        off, halved = _difference(scores, expected), scorer.largest_batch < samples * length
        said = f"halved to {scorer.largest_batch} tokens" if halved else "memory did not run out"
        return halved and off <= TOLERANCE["bf16"][0], f"{said}, scores off by {off:.1e}", {"off": off}

    yield f"{samples} samples in one batch", halve


def quantised(where: torch.device) -> Cases:
    def load(bits: int, phi: str) -> EffortScorer:
        with tempfile.TemporaryDirectory() as folder:
            make_model("llama", hidden_size=128, intermediate_size=256).save_pretrained(folder)
            return EffortScorer(load_for_scoring(folder, None, "bf16", quantization_bit=bits), phi)

    absent = "" if find_spec("bitsandbytes") else "bitsandbytes is not installed"
    for bits, phi in itertools.product((8, 4), PHIS[:3]):
        allowed = TOLERANCE["8 bit" if bits == 8 else "bf16"][0]
        yield f"llama {phi} {bits} bit", absent or partial(_against_autograd, partial(load, bits, phi), allowed)


def attention(where: torch.device) -> Cases:
    def against_eager(name: str) -> Found:
        scorer = _tiny_scorer("llama", "v_lora_b", where, "bf16", hidden_size=256)  # heads of 64
        efforts = []
        for each in ("eager", name):
            scorer.model.set_attn_implementation(each)
            efforts.append(scorer.score(*make_samples())["effort"])
        off, allowed = _difference(efforts[1], efforts[0]), TOLERANCE["bf16"][0]
        return off <= allowed, *_off(off, allowed)

    for name, package in (("sdpa", "torch"), ("flash_attention_2", "flash_attn")):
        yield name, partial(against_eager, name) if find_spec(package) else f"{package} is not installed"


def processes(where: torch.device) -> Cases:
    def two() -> Found:
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            scores = [*pool.map(scores_alone, [str(where)] * 2)]
        same = scores == [scores_alone(str(where))] * 2
        return same, "the same bits as one alone" if same else "other scores than one alone", {}

    yield "two on one device", two


def scores_alone(where: str) -> list[float]:
    """What each of two processes computes, again and again."""
    scorer = _tiny_scorer("llama", "last_layer", torch.device(where), "bf16")
    return [scorer.score(*make_samples())["effort"] for _ in range(20)][-1].tolist()


def speed(where: torch.device, shapes=SHAPES, tokens: int = 131_072) -> Cases:
    for name, config in shapes.items():
        yield f"{name} v_lora_b bf16", partial(_speed_of, name, config, where, tokens)


def _speed_of(name: str, config: transformers.PretrainedConfig, where: torch.device, tokens: int) -> Found:
    """Tokens a second without padding, medians of three turns; the loop, on 16 samples, comes last: it adds a LoRA."""
    draw = random.Random(0)
    lengths = [draw.randint(64, 768) for _ in range(max(16, tokens // 416))]
    rows, model = random_rows(config.vocab_size, lengths), random_model(config, where)
    batches = plan_batches(range(len(lengths)), lengths, tokens_per_batch("v_lora_b", where))
    ways, taken = {way: CONTESTANTS[way](model, "v_lora_b") for way in ("suite", "bound")}, {"suite": [], "bound": []}
    for turn in range(4):
        for way in sorted(ways, reverse=turn % 2 == 1):
            taken[way].append(_timed(ways[way], rows, batches, where))
    rates = {way: sum(lengths) / statistics.median(seconds for seconds, _ in each[1:]) for way, each in taken.items()}
    loop, few = CONTESTANTS["loop"](model, "v_lora_b"), [[row] for row in range(16)]
    _timed(loop, rows, few[:2], where)
    rates["loop"] = sum(lengths[:16]) / _timed(loop, rows, few, where)[0]
    share, gib = rates["suite"] / rates["bound"], max(peak for _, peak in taken["suite"]) / 2**30
    promised = name == "7B" and any(card in device_name() for card in ("H100", "H200"))
    passed = share >= SHARE_OF_BOUND and (rates["suite"] >= TOKENS_PER_SECOND or not promised)
    said = f"{rates['suite']:,.0f} tokens/s, {share:.2f} of the bound, {rates['suite'] / rates['loop']:.1f} x the loop"
    figures = {f"{way}_tokens_per_second": rate for way, rate in rates.items()} | {"share_of_bound": share}
    return passed, f"{said}, {gib:.1f} GiB", figures | {"peak_memory_gib": gib}


def _timed(score, rows: tuple[list, list], batches: list[list[int]], where: torch.device) -> tuple[float, int]:
    """Seconds, and the GPU's peak of bytes."""
    gpu = torch.cuda if where.type == "cuda" else None
    if gpu:
        gpu.reset_peak_memory_stats()
    started = time.perf_counter()
    for batch in batches:
        score(*([each[row] for row in batch] for each in rows))
    if gpu:
        gpu.synchronize()
    return time.perf_counter() - started, gpu.max_memory_allocated() if gpu else 0


def demo(where: torch.device) -> Cases:
    def run() -> Found:
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "UV_OFFLINE": "1", "RUN": folder}
            command = ["bash", str(REPOSITORY / "scripts" / "demo.sh"), "--tiny", "--quiet"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise RuntimeError(done.stderr.strip() or f"exit code {done.returncode}")
            costs = read_ledger(Path(folder))
        seen = {cost.device for cost in costs if cost.stage != CORESETS}  # which a CPU cuts
        return seen == {device_name()}, f"ran on {', '.join(sorted(seen))}", {}

    there = (REPOSITORY / ".venv" / "installed").exists()
    yield "demo.sh --tiny", run if there else "no finished .venv: bash scripts/setup.sh"


PARTS = {each.__name__: each for each in (parity, speed, demo, memory, processes, repeats, attention, quantised)}


def _difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, relative to a sample's own value or the median of all."""
    return float(((ours - expected).abs() / torch.maximum(expected, expected.median(0).values)).max())


def _off(off: float, allowed: float) -> tuple[str, dict[str, float]]:
    return f"off by {off:.1e}, allowed {allowed:g}", {"off": off}


def _against_autograd(make: Callable[[], EffortScorer], allowed: float) -> Found:
    """Effort and loss in a batch, and by plain autograd of one sample, on the same device."""
    scorer = make()
    scores = scorer.score(*make_samples())
    off = _difference(torch.stack([scores["effort"], scores["loss"]], 1), plain_scores(scorer, *make_samples()))
    return off <= allowed, *_off(off, allowed)


def _tiny_scorer(name: str, phi: str, where: torch.device, precision: str, **changes) -> EffortScorer:
    model = make_model(name, **changes)
    if phi == "all_lora":
        model = with_fresh_lora(model, rank=4, alpha=8, target="all", seed=0)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:  # not zero, or A has no gradient
                parameter.data.normal_(std=0.1)
    return EffortScorer(model.to(where, DTYPES[precision]), phi)


def check(cases: dict[str, Cases]) -> dict:
    """What --json holds: the findings of each part's cases, and what they were found with."""
    findings, started = [], time.monotonic()
    for part in cases:
        log.say(f"{part} …")
        for case, trial in cases[part]:
            if time.monotonic() - started > NINE_MINUTES:
                trial = "nine minutes were over"
            try:
                passed, said, figures = (None, trial, {}) if isinstance(trial, str) else trial()
            except Exception as error:  # whatever fails on this device is what is looked for
                passed, said, figures = False, f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}", {}
            figures = {key: value for key, value in figures.items() if math.isfinite(value)}
            findings.append({"part": part, "case": case, "passed": passed, "said": said, "figures": figures})
    packages = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "flash_attn")
    versions = {name: importlib.metadata.version(name) for name in packages if find_spec(name)}
    about = {"device": device_name(), "driver": _driver(), "cuda": torch.version.cuda, "versions": versions}
    about |= {"date": datetime.now(UTC).date().isoformat(), "code_version": code_version()}
    return about | {"seconds": round(time.monotonic() - started, 1), "findings": findings}


def _driver() -> str:
    with contextlib.suppress(OSError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.partition("\n")[0]
    return "unknown"


def format_table(record: dict) -> str:
    verdicts = {True: "passed", False: "FAILED", None: "not tried"}
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [f"{record['device']}, driver {record['driver']}, CUDA {record['cuda']}, {versions}"]
    lines += [
        "{part:<11}{case:<46}".format(**x) + f"{verdicts[x['passed']]:<11}{x['said']}" for x in record["findings"]
    ]
    counts = [f"{sum(x['passed'] is each for x in record['findings'])} {text}" for each, text in verdicts.items()]
    return "\n".join([*lines, f"{', '.join(counts)}, {record['seconds']:.0f} s"])


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which; default: all")
    parser.add_argument("--json", default="runs/gpu_check.json", help="results; default: runs/gpu_check.json")
    arguments = parser.parse_args()
    if (where := device()).type != "cuda":
        raise UserError("torch sees no GPU here, and this checks one: see nvidia-smi and torch.version.cuda")
    record = check({part: PARTS[part](where) for part in arguments.parts})
    write_json(from_repository(arguments.json), record)
    print(format_table(record))
    if any(each["passed"] is False for each in record["findings"]):
        sys.exit(1)


if __name__ == "__main__":
    run_stage(main, one_gpu=True)
