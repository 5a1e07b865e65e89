r"""How fast effort scores are made, against other ways to the same per-sample gradient norms.

    python scripts/bench/scoring.py --model models/smollm2-135m-instruct --data data/go_biology.jsonl --rows 96 \
        --phi v_lora_b all_lora --dtype fp32 bf16 --repeat 3 --json data/results/bench/scoring.json

Every measurement is a fresh process, so its peak memory is its own. Contestants take turns; the order is rotated each
round. `suite` is always measured, on batches of similar length; so are the same batches by `func`, `opacus`,
`opacus_ghost`, `bergson`, the bounds and `forward_backward`; `loop` and `released` take one sample at a time. What
cannot be measured is skipped by name, with the reason. A second call with the same --json measures what is missing.
Other packages run as their users would write it: all logits, transformers' own choice of attention, the same batches. A
model folder without weights gets random ones of its shape. The contestants' installs: scripts/bench/requirements.txt.
Needs a model and data; writes the --json and prints a table.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

import selection.method.effort
from selection.method.effort import IGNORED_LABEL, EffortScorer, plan_batches, response_losses, tokens_per_batch
from selection.method.phi import last_decoder_layer, projections, unwrap
from selection.run.cli import argument_parser, run_stage
from selection.run.config import from_repository
from selection.run.device import choose_precision, device, device_name
from selection.run.errors import UserError
from selection.run.log import say
from selection.run.model_folder import model_fingerprint
from selection.run.products import code_version, first_difference, read_json, write_json
from selection.scores.models import DTYPES, load_for_scoring

PHIS = ("v_lora_b", "v_weight", "last_layer", "all_lora")
RANK, ALPHA, SEED = 81, 16, 42  # of v_lora_b, as released
CUTOFF = 1024
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Every contestant's speed is put in relation to these.
YARDSTICKS = ("bound", "bound_fused_attention", "forward_backward", "loop", "released")
Score = Callable[[list, list], tuple[torch.Tensor | None, torch.Tensor]]  # ids, labels -> norms (B,), losses (B,)


def tokenised_rows(model: Path, data: Path, rows: int) -> tuple[list[list[int]], list[list[int]], str]:
    """Token ids and labels (−100 on the prompt) of the file's first rows, and the name of the chat template.

    By transformers alone, as LLaMA-Factory is not on every machine that is measured: the tokenizer's own chat template
    over instruction, input and output, ChatML where it has none; prompt and response tokenised apart and cut to 1,024
    tokens together.
    """
    from transformers import AutoTokenizer

    try:
        text = data.read_text(encoding="utf-8")
        records = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    except OSError as error:
        raise UserError(f"--data: cannot read {data}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"--data: {data} is neither JSON nor JSONL: {error}") from None
    if len(records) < rows:
        raise UserError(f"--rows {rows}: {data} has {len(records)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"--model: no tokenizer in {model}: {error}") from None
    template = "its own" if tokenizer.chat_template else "ChatML"
    tokenizer.chat_template = tokenizer.chat_template or CHATML
    samples = [_tokenise(tokenizer, record) for record in records[:rows]]
    for number, (_, labels) in enumerate(samples):
        if all(label == IGNORED_LABEL for label in labels[1:]):
            raise UserError(f"row {number} of {data}: {CUTOFF} tokens leave nothing of the response")
    return [ids for ids, _ in samples], [labels for _, labels in samples], template


def _tokenise(tokenizer, record: dict) -> tuple[list[int], list[int]]:
    try:
        question = record["instruction"] + ("\n" + record["input"] if record.get("input") else "")
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
    except (KeyError, TypeError):
        raise UserError("--data: each row needs texts instruction, output and, if any, input") from None
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    if not whole.startswith(prompt):
        raise UserError("the tokenizer's chat template does not put the response behind the prompt")
    before, response = (tokenizer.encode(t, add_special_tokens=False) for t in (prompt, whole[len(prompt) :]))
    return (before + response)[:CUTOFF], ([IGNORED_LABEL] * len(before) + response)[:CUTOFF]


def _padded(rows: list[list[int]], filler: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filler).to(device())


def has_weights(model: Path) -> bool:
    return any(model.glob("*.safetensors")) or any(model.glob("pytorch_model*.bin"))


def load(folder: Path, dtype: str, phi: str) -> nn.Module:
    """The model on its device; under all_lora with the LoRA that is φ, its B off zero so that A has a gradient."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(SEED)
    if has_weights(folder):
        model = load_for_scoring(str(folder), None, dtype)
    else:
        with torch.device(device()):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=DTYPES[dtype])
        for parameter in model.parameters():
            if parameter.dim() > 1:  # drawn in fp32 in every dtype, so that norms can be compared
                parameter.data.copy_(torch.randn(parameter.shape, device=parameter.device).mul_(0.02))
    if phi == "all_lora":
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape).mul_(0.02))  # in fp32, as above
    return model.requires_grad_(False).eval()


def with_phi(model: nn.Module, phi: str, lora_everywhere: bool = False) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The model and φ's parameters by name in it: nothing else requires a gradient.

    v_lora_b: a LoRA of PEFT's on the last value projection alone, or `lora_everywhere`, on every query and value
    projection; A of the last one is the suite's, so that norms can be compared.
    """
    if phi.startswith("v_"):
        scorer = EffortScorer(model, phi, RANK, ALPHA, SEED)
        if scorer.phi.maps[0].columns is not None:
            raise UserError("a fused projection: its values alone are the suite's φ, which peers cannot single out")
    if phi == "v_lora_b":
        from peft import LoraConfig, get_peft_model

        name = next(name for name, module in model.named_modules() if module is scorer.phi.maps[0].module)
        targets = None if lora_everywhere else [name]  # None: PEFT's own choice, query and value projections
        fresh = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
        model = get_peft_model(model, fresh, autocast_adapter_dtype=False)
        lora = model.get_base_model().get_submodule(name)
        with torch.no_grad():
            lora.lora_A["default"].weight.copy_(scorer.lora_a)
        wanted = [lora.lora_B["default"].weight]
    elif phi == "v_weight":
        wanted = [scorer.phi.maps[0].weight]
    elif phi == "last_layer":
        wanted = [linear.weight for linear in projections(last_decoder_layer(model)[1]).values()]
    else:
        wanted = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    model.requires_grad_(False).eval()
    identities = {id(parameter.requires_grad_(True)) for parameter in wanted}
    return model, {name: p for name, p in model.named_parameters() if id(p) in identities}


def _modules_of(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Module]:
    return {name.removesuffix(".weight"): model.get_submodule(name.removesuffix(".weight")) for name in parameters}


# The contestants: each gets the model and φ, gets ready, and returns the function that scores a batch.


def _suite(model: nn.Module, phi: str) -> Score:
    scorer = EffortScorer(model, phi, RANK, ALPHA, SEED)

    def score(ids, labels):
        scores = scorer.score(ids, labels)
        return scores["effort"], scores["loss"]

    return score


def _bound(model: nn.Module, phi: str, fused_attention: bool = False) -> Score:
    """A forward pass without gradients that computes the response losses: the suite's own trunk and nothing more.

    `fused_attention`: with the attention that transformers chooses, where the suite takes the faster one.
    """
    if fused_attention:
        selection.method.effort._COMPOSED_ATTENTION_UP_TO = 0
    return lambda ids, labels: (None, response_losses(model, ids, labels))


def _forward_backward(model: nn.Module, phi: str) -> Score:
    """A plain backward pass, no norms: gradients of activations down to the first layer that holds φ."""
    inner, (name, layer) = unwrap(model), last_decoder_layer(model)
    if phi == "all_lora":
        layer = inner.get_decoder().get_submodule(name.rpartition(".")[0])[0]
    leaf = []

    def start_here(module, arguments):
        leaf[:] = [arguments[0].detach().requires_grad_()]
        return (*leaf, *arguments[1:])

    layer.register_forward_pre_hook(start_here)

    def score(ids, labels):
        tokens, targets = _padded(ids, 0), _padded(labels, IGNORED_LABEL)
        sample, position = (targets[:, 1:] != IGNORED_LABEL).nonzero(as_tuple=True)
        hidden = selection.method.effort._last_hidden_state(inner, tokens)[sample, position]
        logits = inner.get_output_embeddings()(hidden).float()
        token_loss = functional.cross_entropy(logits, targets[sample, position + 1], reduction="none")
        loss = token_loss.new_zeros(len(tokens)).index_add(0, sample, token_loss) / sample.bincount()
        torch.autograd.grad(loss.sum(), leaf)
        return None, loss.detach()

    return score


def _loop(model: nn.Module, phi: str, released: bool = False) -> Score:
    """Plain autograd of one sample: the model's own loss, one backward pass, one norm.

    `released`: as in the published code. A LoRA on every query and value projection and two backward passes, the
    gradient adding up (halved here). Only the last value projection's B requires a gradient: of the readings of that
    code it is the one kindest to it.
    """
    model, parameters = with_phi(model, phi, lora_everywhere=released)

    def score(ids, labels):
        for parameter in parameters.values():
            parameter.grad = None
        loss = model(input_ids=_padded(ids, 0), labels=_padded(labels, IGNORED_LABEL), use_cache=False).loss
        if released:
            loss.backward(retain_graph=True)
        loss.backward()
        norm = torch.stack([p.grad.float().norm() for p in parameters.values()]).norm()
        return norm[None] / (2 if released else 1), loss.detach()[None]

    return score


def _mean_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (B,) of the response tokens; logits (B, T, V), targets (B, T)."""
    targets = targets[:, 1:]
    token_loss = functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED_LABEL
    )
    return token_loss.view(targets.shape).sum(1) / (targets != IGNORED_LABEL).sum(1)


def _sample_norms(gradients) -> torch.Tensor:
    """Norms (B,) over all of φ of per-sample gradients, one (B, …) for each parameter."""
    return torch.stack([g.flatten(1).float().norm(dim=1) for g in gradients]).norm(dim=0)


def _func(model: nn.Module, phi: str) -> Score:
    """torch.func: the gradient of one sample's loss, vectorised over the batch."""
    model, parameters = with_phi(model, phi)
    parameters = {name: parameter.detach() for name, parameter in parameters.items()}

    def loss_of_one(phi_values, tokens, targets):
        inputs = {"input_ids": tokens[None], "use_cache": False}
        logits = torch.func.functional_call(model, phi_values, (), inputs).logits
        return _mean_losses(logits, targets[None])[0]

    per_sample = torch.func.vmap(torch.func.grad_and_value(loss_of_one), in_dims=(None, 0, 0))

    def score(ids, labels):
        with sdpa_kernel(SDPBackend.MATH):  # vmap would run the fused kernels a sample at a time
            gradients, losses = per_sample(parameters, _padded(ids, 0), _padded(labels, IGNORED_LABEL))
        return _sample_norms(gradients.values()), losses

    return score


def _opacus(model: nn.Module, phi: str, ghost: bool = False) -> Score:
    """Opacus' hooks make per-sample gradients; its `ghost` hooks norms alone, from T × T products of tokens."""
    from opacus import GradSampleModule
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model, parameters = with_phi(model, phi)
    for module in _modules_of(model, parameters).values():
        module.train()  # the hooks ask for it; a linear map alone does not change
    hooked = (GradSampleModuleFastGradientClipping if ghost else GradSampleModule)(model, loss_reduction="sum")

    def score(ids, labels):
        losses = _mean_losses(hooked(input_ids=_padded(ids, 0), use_cache=False).logits, _padded(labels, IGNORED_LABEL))
        losses.sum().backward()
        norms = hooked.get_norm_sample() if ghost else _sample_norms(p.grad_sample for p in parameters.values())
        hooked.zero_grad()
        return norms, losses.detach()

    return score


def _bergson(model: nn.Module, phi: str) -> Score:
    """Bergson's hooks and forward-backward pass, unprojected and unnormalised.

    The collector keeps a norm and drops the gradient, which is kinder than Bergson's own: they copy it to the CPU.
    """
    from bergson import IndexConfig
    from bergson.collector.collector import HookCollectorBase, fwd_bwd_factory
    from bergson.data import pad_and_tensor

    class Norms(HookCollectorBase):
        def setup(self):
            self.of_modules = []

        def backward_hook(self, module, g):
            self.of_modules.append(self._compute_gradient(module, g).float().norm(dim=1))

        def process_batch(self, indices, **kwargs):
            pass

        def teardown(self):
            pass

    model, parameters = with_phi(model, phi)
    unwrap(model).config.use_cache = False
    forward_backward = fwd_bwd_factory(IndexConfig(run_path="unused", loss_reduction="mean"))
    collector = Norms(model=model, target_modules=set(_modules_of(model, parameters)))

    def score(ids, labels):
        tokens, targets, _, real = pad_and_tensor(ids, labels=labels, device=device())
        collector.of_modules.clear()
        with collector.with_batch(real):
            losses = forward_backward(model, tokens, targets, {})
        return torch.stack(collector.of_modules).norm(dim=0), losses.detach()

    return score


CONTESTANTS = {
    "suite": _suite,
    "bound": _bound,
    "bound_fused_attention": partial(_bound, fused_attention=True),
    "forward_backward": _forward_backward,
    "loop": _loop,
    "released": partial(_loop, released=True),
    "func": _func,
    "opacus": _opacus,
    "opacus_ghost": partial(_opacus, ghost=True),
    "bergson": _bergson,
}


def reason_to_skip(contestant: str, phi: str) -> str | None:
    package = contestant.partition("_")[0]
    if package in ("opacus", "bergson") and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if contestant == "released" and phi != "v_lora_b":
        return "the released code scores v_lora_b"
    if contestant == "bound_fused_attention" and torch.cuda.is_available():
        return "on a GPU it is `bound`"
    if contestant == "forward_backward" and phi.startswith("v_"):
        return "φ is at the top of the model: `bound` is its yardstick"
    return None


def measure(job: dict) -> dict:
    """Time a contestant once over all rows; sizes are GiB of the process, or of GPU memory where there is a GPU."""
    ids, labels, _ = tokenised_rows(Path(job["model"]), Path(job["data"]), job["rows"])
    lengths = [len(row) for row in ids]
    one_at_a_time = job["contestant"] in ("loop", "released")
    budget = 1 if one_at_a_time else job["tokens_per_batch"] or tokens_per_batch(job["phi"], device())
    batches = plan_batches(range(len(ids)), lengths, budget)
    score = CONTESTANTS[job["contestant"]](load(Path(job["model"]), job["dtype"], job["phi"]), job["phi"])
    before_scoring = peak_memory_gib()
    forget_peak_memory()
    for batch in batches[-2:] if one_at_a_time else batches[-1:]:  # the shortest: warm-up
        score([ids[row] for row in batch], [labels[row] for row in batch])

    outcomes, synchronise = [], torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronise()
    started = time.perf_counter()
    for batch in batches:
        outcomes.append(score([ids[row] for row in batch], [labels[row] for row in batch]))
    synchronise()
    seconds = time.perf_counter() - started

    norms, losses = zip(*outcomes, strict=True)
    order = np.argsort([row for batch in batches for row in batch])
    return {
        "seconds": seconds,
        "samples": len(ids),
        "tokens": sum(lengths),
        "peak_memory_gib": round(peak_memory_gib(), 4),
        "peak_memory_before_scoring_gib": round(before_scoring, 4),
        "norms": None if norms[0] is None else _as_text(norms, order),
        "losses": _as_text(losses, order),
    }


def _as_text(parts: tuple[torch.Tensor, ...], order: np.ndarray) -> str:
    """Numbers in the rows' order, as one text: a list would take a line of the JSON for each."""
    values = torch.cat(parts).double().cpu()
    if not values.isfinite().all():
        raise UserError(f"{int((~values.isfinite()).sum())} norms or losses are not finite")
    return " ".join(f"{value:.8g}" for value in values[order].tolist())


def peak_memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    # getrusage's ru_maxrss would count the parent's memory too, which this process was forked from.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def forget_peak_memory() -> None:
    """So that the peak of scoring is not hidden under that of loading."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def measure_apart(job: dict) -> dict:
    """`measure` in a fresh process; {"failed": reason} where it ends with an error."""
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0:
        return {"failed": f"ended by signal {-done.returncode} (9: most likely out of memory)"}
    reason = ([line for line in done.stderr.splitlines() if line.strip()] or ["no message"])[-1][:300]
    return {"failed": re.sub(r"/\S*/", "", reason.removeprefix("error: "))}  # no paths of this machine in the results


def _median(rounds: dict[int, dict]) -> float:
    return statistics.median(m["seconds"] for m in rounds.values())


def _times_as_fast(reference: dict[int, dict], own: dict[int, dict]) -> dict[str, float]:
    """Measurements by round. Machines drift: the ratios within rounds are the ones to go by."""
    ratios = [reference[r]["seconds"] / own[r]["seconds"] for r in own if r in reference]
    return {
        "median_of_ratios_within_rounds": statistics.median(ratios) if ratios else None,
        "ratio_of_medians": _median(reference) / _median(own),
    }


def _place(phi: str, dtype: str, contestant: str) -> tuple[int, str, int]:
    return PHIS.index(phi), dtype, list(CONTESTANTS).index(contestant)


def _norms(rounds: dict[int, dict]) -> np.ndarray | None:
    return np.array(rounds[0]["norms"].split(), dtype=float) if 0 in rounds and rounds[0]["norms"] else None


def summarise(measurements: list[dict], auto: str) -> tuple[list[dict], dict | None]:
    """One entry for each (φ, dtype, contestant), and the suite in `auto` precision against `released` in fp32."""
    groups: dict[tuple, dict[int, dict]] = {}
    for m in measurements:
        groups.setdefault((m["phi"], m["dtype"], m["contestant"]), {})[m["round"]] = m
    results = []
    for (phi, dtype, contestant), own in sorted(groups.items(), key=lambda group: _place(*group[0])):
        seconds, any_round = _median(own), next(iter(own.values()))
        result = {
            "phi": phi,
            "dtype": dtype,
            "contestant": contestant,
            "seconds": seconds,
            "seconds_of_rounds": [own[r]["seconds"] for r in sorted(own)],
            "samples_per_second": any_round["samples"] / seconds,
            "tokens_per_second": any_round["tokens"] / seconds,
        }
        for key in ("peak_memory_gib", "peak_memory_before_scoring_gib"):
            result[key] = max(m[key] for m in own.values())
        references = [name for name in YARDSTICKS if (phi, dtype, name) in groups]
        result["times_as_fast_as"] = {name: _times_as_fast(groups[phi, dtype, name], own) for name in references}
        norms = _norms(own)
        exact = next(
            (name for name in ("loop", "suite") if _norms(groups.get((phi, "fp32", name), {})) is not None), None
        )
        if exact and norms is not None and (contestant, dtype) != (exact, "fp32"):
            exact_norms = _norms(groups[phi, "fp32", exact])
            result["compared_with"] = f"{exact}, fp32"
            result["largest_relative_difference"] = float(np.max(np.abs(norms - exact_norms) / exact_norms))
            if dtype != "fp32" and len(norms) > 1:
                ranks = [np.argsort(np.argsort(n)) for n in (norms, exact_norms)]
                result["spearman"] = float(np.corrcoef(*ranks)[0, 1])
        results.append(result)
    suite, released = groups.get(("v_lora_b", auto, "suite")), groups.get(("v_lora_b", "fp32", "released"))
    across = {"suite": auto, "released": "fp32"} | _times_as_fast(released, suite) if suite and released else None
    return results, across


def print_results(results: list[dict], across: dict | None, skipped: list[dict]) -> None:
    for entry in skipped:
        print(f"skipped: {entry['contestant']} for {entry['phi']} in {entry['dtype']}: {entry['reason']}")
    print("\ntimes as fast as …: median of the ratios within rounds; difference: largest relative one of the norms")
    header = "".join(f"{'× ' + name:>24}" for name in YARDSTICKS)
    print(f"{'φ':<12}{'dtype':<7}{'contestant':<18}{'samples/s':>11}{'GiB':>8}{header}{'difference':>12}")
    for r in results:
        ratios = [r["times_as_fast_as"].get(name, {}).get("median_of_ratios_within_rounds") for name in YARDSTICKS]
        difference = r.get("largest_relative_difference")
        print(
            f"{r['phi']:<12}{r['dtype']:<7}{r['contestant']:<18}{r['samples_per_second']:>11.2f}"
            f"{r['peak_memory_gib']:>8.2f}"
            + "".join(f"{'-' if x is None else format(x, '.2f'):>24}" for x in ratios)
            + f"{'-' if difference is None else format(difference, '.1e'):>12}"
        )
    if across:
        ratio = across["median_of_ratios_within_rounds"]
        print(f"v_lora_b: suite in {across['suite']} is {ratio:.2f} times as fast as released in fp32")


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(measure(json.loads(sys.argv[2]))))
        return
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--model", required=True, help="model folder; without weights: a random model of its shape; required"
    )
    parser.add_argument("--data", required=True, help="JSON or JSONL with instruction, input and output; required")
    parser.add_argument("--rows", type=int, default=96, help="the first rows of the file; default: %(default)s")
    parser.add_argument("--phi", nargs="+", choices=PHIS, default=["v_lora_b"], help="default: v_lora_b")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"], help="number formats; default: fp32")
    others = [name for name in CONTESTANTS if name != "suite"]
    parser.add_argument(
        "--against", nargs="*", choices=others, default=others, help="contestants beside suite; default: all"
    )
    parser.add_argument("--repeat", type=int, default=3, help="rounds; default: %(default)s")
    parser.add_argument(
        "--tokens_per_batch",
        type=int,
        help="with the padding; default: the suite's own on this device",
    )
    parser.add_argument(
        "--json", type=Path, required=True, help="results; measurements in it are not repeated; required"
    )
    arguments = parser.parse_args()
    if arguments.rows < 1 or arguments.repeat < 1:
        raise UserError("--rows and --repeat: give at least 1")

    job, record = prepare(arguments)
    done = {(m["phi"], m["dtype"], m["contestant"], m["round"]) for m in record["measurements"]}
    names = ["suite", *dict.fromkeys(arguments.against)]
    auto, skipped = choose_precision("auto"), {}
    for turn, phi, dtype in product(
        range(arguments.repeat), dict.fromkeys(arguments.phi), dict.fromkeys(arguments.dtype)
    ):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            key = (phi, dtype, name)
            if key in skipped or (*key, turn) in done:
                continue
            if reason := reason_to_skip(name, phi):
                skipped[key] = reason
                continue
            measurement = {"phi": phi, "dtype": dtype, "contestant": name, "round": turn}
            measurement |= {"date": datetime.now(UTC).date().isoformat(), "code_version": code_version()}
            outcome = measure_apart(job | measurement)
            if "failed" in outcome:
                if name == "suite":
                    raise UserError(f"the suite itself failed on {phi} in {dtype}: {outcome['failed']}")
                skipped[key] = outcome["failed"]
                continue
            if turn:  # the same norms again
                outcome |= {"norms": None, "losses": None}
            record["measurements"].append(measurement | outcome)
            say(f"round {turn + 1}: {name} for {phi} in {dtype}: {outcome['seconds']:.2f} s")
            write(arguments.json, record, auto, skipped)
    print_results(*write(arguments.json, record, auto, skipped), record["skipped"])
    print(f"results: {arguments.json}")


def prepare(arguments: argparse.Namespace) -> tuple[dict, dict]:
    """A job without φ, dtype and contestant; and the record so far, checked to have been made with these settings."""
    from transformers import AutoConfig

    model, data = from_repository(arguments.model), from_repository(arguments.data)
    arguments.json = from_repository(str(arguments.json))
    if not (model / "config.json").exists():
        raise UserError(f"--model {arguments.model}: {model} has no config.json: give the folder of a model")
    ids, _, template = tokenised_rows(model, data, arguments.rows)
    vocabulary = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    if max(map(max, ids)) >= vocabulary:
        raise UserError(f"--model {arguments.model}: its tokenizer makes tokens beyond its vocabulary of {vocabulary}")
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(errors="replace"))
    settings = {
        "model": model.name,
        "model_fingerprint": model_fingerprint(model),
        "weights": "its own" if has_weights(model) else "random",
        "data": data.name,
        "rows": arguments.rows,
        "mean_tokens_per_sample": sum(map(len, ids)) / len(ids),
        "chat_template": template,
        "tokens_per_batch": arguments.tokens_per_batch or {phi: tokens_per_batch(phi, device()) for phi in PHIS},
        "device": device_name(),
        "processor": processor[1] if processor else "unknown",
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "peft")},
    }
    record = {"settings": settings, "measurements": []}
    if arguments.json.exists():
        stored = read_json(arguments.json)
        if difference := first_difference(stored["settings"], settings):
            raise UserError(f"{arguments.json} was made otherwise ({difference}): give another --json")
        record["measurements"] = stored["measurements"]
    job = {"model": str(model), "data": str(data), "rows": arguments.rows}
    job["tokens_per_batch"] = arguments.tokens_per_batch
    return job, record


def write(path: Path, record: dict, auto: str, skipped: dict[tuple, str]) -> tuple[list[dict], dict | None]:
    """Bring the record up to date and write it; returns what `summarise` says."""
    packages = ("torch", "transformers", "peft", "opacus", "bergson")
    results, across = summarise(record["measurements"], auto)
    record |= {
        "date": max((m["date"] for m in record["measurements"]), default=None),
        "code_version": sorted({m["code_version"] for m in record["measurements"]}),
        "versions": {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(p)},
        "results": results,
        "suite_against_released_across_dtypes": across,
        "skipped": [
            {"phi": phi, "dtype": dtype, "contestant": name, "reason": reason}
            for (phi, dtype, name), reason in skipped.items()
        ],
    }
    write_json(path, {key: record[key] for key in sorted(record, key=lambda key: key == "measurements")})
    return results, across


if __name__ == "__main__":
    run_stage(main)
