"""Load a model for scoring: plain transformers and PEFT, all weights in the asked number format, adapters unmerged."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import get_max_memory
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as QUERY_AND_VALUE
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig
from transformers.utils import is_bitsandbytes_available
from transformers.utils.import_utils import BITSANDBYTES_MIN_VERSION

from selection.method.phi import is_linear_map, unwrap
from selection.run.device import device
from selection.run.errors import UserError
from selection.run.model_folder import incomplete_adapters_refused

NO_CODE = {"trust_remote_code": False}  # left out, transformers asks on the terminal whether to run a model's code
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@contextlib.contextmanager
def model_errors(what: str) -> Iterator[None]:
    """A model folder of a stranger makes transformers and PEFT raise anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {error}") from error


def straight_to_device() -> dict[str, Any]:
    """For from_pretrained: weights go to the GPU without passing the host's memory, which many processes share."""
    return {} if device().type == "cpu" else {"device_map": {"": device()}}


def load_for_scoring(
    model: str,
    tuned: Path | None,
    precision: str,
    reset_query_value: bool = False,
    device_map: str | None = None,
    quantization_bit: int | None = None,
) -> nn.Module:
    """`model` (a folder or hub name), with the outcome of its tuning: an adapter, or a whole model.

    `reset_query_value` (released): take the tuned adapters of query and value projection out again. The released
    code puts its scoring LoRA on the tuned model under the adapter's own name, which re-initialises them.
    `device_map`, `quantization_bit`: as in selection/run/config.py; the head is never quantised.
    Raises: UserError where the folder cannot be loaded, or bitsandbytes is asked for and not installed.
    """
    transformers.utils.logging.disable_progress_bar()  # "loading weights", a bar of a second
    placed = {"device_map": device_map, "max_memory": _room_for_weights()} if device_map else straight_to_device()
    if quantization_bit is not None:
        check_bitsandbytes(quantization_bit)
        placed = (
            {"device_map": {"": device()}} | placed | {"quantization_config": _quantised(quantization_bit, precision)}
        )
    source = str(tuned) if tuned is not None and not (tuned / "adapter_config.json").exists() else model
    with model_errors(f"cannot load model {source}"):
        config = AutoConfig.from_pretrained(source, **NO_CODE).get_text_config()
        # Fused attention leaves the soft-capping of attention logits out; LLaMA-Factory does not tune with it either.
        attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
        loaded, said = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=DTYPES[precision],
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            **NO_CODE,
            **placed,
        )
        if absent := sorted(said["missing_keys"]):  # transformers would draw them at random
            raise UserError(f"model {source} has no weights for {absent[0]} ({len(absent)} in all): get it again")
        if tuned is not None and source == model:
            again = {"max_memory": placed["max_memory"]} if device_map else {}  # PEFT places an offloaded model anew
            with incomplete_adapters_refused():
                loaded = PeftModel.from_pretrained(
                    loaded, tuned, autocast_adapter_dtype=False, torch_device=str(device()), **again
                )
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes' 4-bit product for CPUs that has no gradient
            module.support_avx512bf16_for_cpu = False
    if reset_query_value:
        _reset_query_value(loaded)
    return loaded.eval()


def check_bitsandbytes(bits: int) -> None:
    """Raises: UserError where it is not installed."""
    if not is_bitsandbytes_available():
        raise UserError(
            f"selection.quantization_bit {bits} needs bitsandbytes from {BITSANDBYTES_MIN_VERSION} on: "
            "pip install bitsandbytes, or leave the key out"
        )


def _room_for_weights() -> dict[int | str, int]:
    """Bytes by device for accelerate's placement: 85 % of what a GPU has free, the rest for batches."""
    return {where: free if where == "cpu" else int(0.85 * free) for where, free in get_max_memory().items()}


def _quantised(bits: int, precision: str) -> BitsAndBytesConfig:
    """As LLaMA-Factory loads under the same `quantization_bit`."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[precision],
    )


def _reset_query_value(model: nn.Module) -> None:
    """Zero B of the adapters that the released LoRA replaces: PEFT's default targets, query and value projection."""
    targets = default_lora_targets(unwrap(model).config)
    for name, module in model.named_modules():
        if name.endswith(tuple(f".{target}" for target in targets)) and hasattr(module, "lora_B"):
            for matrix in module.lora_B.values():
                nn.init.zeros_(matrix.weight)


def default_lora_targets(config: PretrainedConfig) -> list[str]:
    """PEFT's, for models of this kind: query and value projection. Raises: UserError where it names none."""
    model_type = config.get_text_config().model_type
    if model_type not in QUERY_AND_VALUE:
        raise UserError(f"mode released: PEFT names no default LoRA targets for {model_type} models: use mode paper")
    return QUERY_AND_VALUE[model_type]


def with_fresh_lora(model: nn.Module, rank: int, alpha: int, target: str, seed: int) -> PeftModel:
    """`model` with a plain LoRA of tuning's rank and α: A random, B zero. `target`: LLaMA-Factory's lora_target.

    Raises: UserError where the model has no such module.
    """
    modules = "all-linear" if target == "all" else [name.strip() for name in target.split(",")]
    # As LLaMA-Factory, but PEFT would take routers for linear maps that answer with a tuple.
    routers = [name for name, each in model.named_modules() if isinstance(each, nn.Linear) and not is_linear_map(each)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, exclude_modules=routers or None)
        try:
            return get_peft_model(model, config, autocast_adapter_dtype=False).eval()
        except ValueError as error:
            raise UserError(f"no LoRA can be put on lora_target {target}: {error}") from None


def count_parameters(model: nn.Module) -> int:
    """Weights that a forward pass multiplies a token with, tied ones once. Of a mixture of experts the active ones:
    what all tokens pass, shared experts and router included, and as many experts as a token is sent to.

    Where the configuration does not say how many that is, all experts count. How a model's code goes about it does
    not: that of Llama 4 multiplies every token with every expert, nearly all of them by 0.
    """
    experts, active = {}, _active_experts(unwrap(model).config.get_text_config())
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and name.endswith("experts"):
            experts |= dict.fromkeys(module.parameters(), len(module))
        else:
            experts |= _stacked_experts(module)
    shares = {parameter: min(active / count, 1) for parameter, count in experts.items()} if active else {}
    return round(sum(_shape(parameter).numel() * shares.get(parameter, 1) for parameter in model.parameters()))


def _active_experts(config: PretrainedConfig) -> float | None:
    """Routed experts for each token; None: no mixture of experts, or it does not say."""
    for key in ("num_experts_per_tok", "moe_topk", "top_k_experts"):
        if found := getattr(config, key, None):
            return sum(found) / len(found) if isinstance(found, list) else found  # Hunyuan: one a layer
    return getattr(getattr(config, "ffn_config", None), "moe_top_k", None)  # DBRX


def _stacked_experts(module: nn.Module) -> dict[nn.Parameter, int]:
    """The module's own tensors that hold the weights or biases of several experts, and of how many."""
    own = list(module.parameters(recurse=False))
    if count := getattr(module, "moe_num_experts", None):  # DBRX: their rows below each other
        return {each: count for each in own if each.ndim == 2}
    stacks = {} if isinstance(module, nn.Conv1d) else {each: len(each) for each in own if each.ndim == 3}
    return stacks | {each: len(each) for each in own if each.ndim == 2 and len(each) in stacks.values()}


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of the weight itself where two of its numbers are packed into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.shape if state is None else state.shape


def parameters_of(model: str) -> int:
    """`count_parameters` of a model folder or hub name, from its configuration alone: no weights are loaded.

    Raises: UserError where the configuration cannot be read or names no causal language model.
    """
    with model_errors(f"cannot build model {model} from its configuration"):
        config = AutoConfig.from_pretrained(model, **NO_CODE)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, **NO_CODE)
    return count_parameters(empty)
