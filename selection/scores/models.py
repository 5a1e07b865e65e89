"""Load a model for scoring: plain transformers and PEFT, all weights in the asked number format, adapters unmerged."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

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
_ACTIVE = ("num_experts_per_tok", "moe_topk", "top_k_experts")  # names in configs for experts per token
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # fp16: evaluation alone


@contextlib.contextmanager
def model_errors(what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a model folder of a stranger makes transformers and PEFT raise anything
        raise UserError(f"{what}: {error}") from error


def load_for_scoring(
    model: str, tuned: Path | None, precision: str, reset_query_value=False, device_map=None, quantization_bit=None
) -> nn.Module:
    """Load `model` (a folder or hub name) with what its tuning made: an adapter, or a whole model.

    `reset_query_value` (released): zero the tuned adapters of query and value projection, as the released code puts its
    scoring LoRA on the tuned model under the adapter's own name. `device_map`, `quantization_bit`: see Selection.
    Raises: UserError where the folder cannot be loaded, or bitsandbytes is asked for and not installed."""
    transformers.utils.logging.disable_progress_bar()  # "loading weights", a bar of a second
    placed, room = {}, {}
    if device_map:  # 15 % of a GPU's bytes are left for batches
        free = {place: size if place == "cpu" else int(0.85 * size) for place, size in get_max_memory().items()}
        room = {"max_memory": free}  # PEFT places an offloaded model anew
        placed = {"device_map": device_map, **room}
    elif quantization_bit is not None or device().type != "cpu":
        placed = {"device_map": {"": device()}}  # not through the host's memory, which many processes share
    if quantization_bit is not None:
        check_bitsandbytes(quantization_bit)
        keys = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}  # as LLaMA-Factory loads
        keys |= {f"load_in_{quantization_bit}bit": True, "bnb_4bit_compute_dtype": DTYPES[precision]}
        placed["quantization_config"] = BitsAndBytesConfig(**keys)
    source = str(tuned) if tuned is not None and not (tuned / "adapter_config.json").exists() else model
    with model_errors(f"cannot load model {source}"):
        config = AutoConfig.from_pretrained(source, **NO_CODE).get_text_config()
        # Fused attention leaves the soft-capping of attention logits out; LLaMA-Factory does not tune with it either.
        placed["attn_implementation"] = "eager" if getattr(config, "attn_logit_softcapping", None) else None
        loaded, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[precision], use_safetensors=True, output_loading_info=True, **NO_CODE, **placed
        )
        if absent := sorted(info["missing_keys"]):  # transformers would fill these with random numbers
            raise UserError(f"model {source} has no weights for {absent[0]} ({len(absent)} in all): get it again")
        if tuned is not None and source == model:
            with incomplete_adapters_refused():
                keys = {"autocast_adapter_dtype": False, "torch_device": str(device()), **room}
                loaded = PeftModel.from_pretrained(loaded, tuned, **keys)
    replaced = default_lora_targets(unwrap(loaded).config) if reset_query_value else ()
    for name, module in loaded.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes' 4-bit product for CPUs that has no gradient
            module.support_avx512bf16_for_cpu = False
        if name.endswith(tuple(f".{target}" for target in replaced)) and hasattr(module, "lora_B"):
            for matrix in module.lora_B.values():
                nn.init.zeros_(matrix.weight)
    return loaded.eval()


def check_bitsandbytes(bits: int) -> None:
    if not is_bitsandbytes_available():
        version = f"bitsandbytes from {BITSANDBYTES_MIN_VERSION} on"
        raise UserError(f"selection.quantization_bit {bits} needs {version}: pip install bitsandbytes")


def default_lora_targets(config: PretrainedConfig) -> list[str]:
    """PEFT's for this kind of model: query and value projection. Raises: UserError where it names none."""
    model_type = config.get_text_config().model_type
    if model_type not in QUERY_AND_VALUE:
        raise UserError(f"mode released: PEFT names no default LoRA targets for {model_type} models: use mode paper")
    return QUERY_AND_VALUE[model_type]


def with_fresh_lora(model: nn.Module, rank: int, alpha: int, target: str, seed: int) -> PeftModel:
    """`model` with a plain LoRA (B zero) on `target`, LLaMA-Factory's lora_target. Raises: UserError if it has none."""
    modules = "all-linear" if target == "all" else [name.strip() for name in target.split(",")]
    # As LLaMA-Factory, but PEFT would take routers for linear maps that answer with a tuple.
    routers = [name for name, each in model.named_modules() if isinstance(each, nn.Linear) and not is_linear_map(each)]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, exclude_modules=routers or None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config, autocast_adapter_dtype=False).eval()
        except ValueError as error:
            raise UserError(f"no LoRA can be put on lora_target {target}: {error}") from None


def active_experts(config: PretrainedConfig) -> float | None:
    """Experts that a token passes through in a layer, their mean where layers differ; None: unknown, or no mixture."""
    active = next(filter(None, (getattr(config, key, None) for key in _ACTIVE)), None)
    active = active or getattr(getattr(config, "ffn_config", None), "moe_top_k", None)  # DBRX
    return sum(active) / len(active) if isinstance(active, list) else active  # Hunyuan: one a layer


def count_parameters(model: nn.Module) -> int:
    """Weights that a forward pass multiplies a token with, tied ones once; of experts the active ones, where known."""
    active, experts = active_experts(unwrap(model).config.get_text_config()), {}  # parameter -> number of experts in it
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and name.endswith("experts"):
            experts |= dict.fromkeys(module.parameters(), len(module))
        else:
            experts |= _stacked_experts(module)
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)  # two numbers of a 4-bit weight are packed into a byte
        numbers = (parameter.shape if state is None else state.shape).numel()
        total += numbers * (min(active / experts[parameter], 1) if active and parameter in experts else 1)
    return round(total)


def _stacked_experts(module: nn.Module) -> dict[nn.Parameter, int]:
    """The module's own tensors that stack several experts' weights or biases, each with the number of experts."""
    own = list(module.parameters(recurse=False))
    if count := getattr(module, "moe_num_experts", None):  # DBRX: the experts' rows below each other
        return {each: count for each in own if each.ndim == 2}
    stacks = {} if isinstance(module, nn.Conv1d) else {each: len(each) for each in own if each.ndim == 3}
    return stacks | {each: len(each) for each in own if each.ndim == 2 and len(each) in stacks.values()}


def parameters_of(model: str) -> int:
    """`count_parameters` of a model folder or hub name, without its weights. Raises: UserError if none is built."""
    with model_errors(f"cannot build model {model} from its configuration"):
        config = AutoConfig.from_pretrained(model, **NO_CODE)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, **NO_CODE)
    return count_parameters(empty)
