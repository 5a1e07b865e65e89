"""How much of a GPU's memory scoring and tuning will need, by formula: an estimate, without weights and before any run.

(Not run on a GPU: scripts/gpu_check.py measures the peak of scoring.)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from selection.method.phi import is_linear_map
from selection.scores.models import NO_CODE, active_experts, model_errors, with_fresh_lora

_LOGITS_AT_ONCE = 2**27  # numbers of a chunk of logits on a GPU, as in selection/method/effort.py


@dataclass(frozen=True)
class Shape:
    """What a model's memory depends on, numbers of parameters with every expert's."""

    parameters: int
    linear: int  # of them in the layers' linear maps, which quantization_bit packs
    lora: int  # those of the LoRA that tunes it
    width: int  # d, of the hidden states
    inner: int  # f, of the MLP; of a mixture the active experts' together
    layers: int
    vocabulary: int
    number: int  # bytes of a number in the checkpoint


@dataclass(frozen=True)
class Memory:
    """Bytes. `states`: what tuning keeps of trained parameters; `activations` of one batch, with logits."""

    weights: int
    states: int
    activations: int

    total = property(lambda self: self.weights + self.states + self.activations)


def shape_of(model: str, lora: dict[str, Any]) -> Shape:
    """The shape of a model folder or hub name, and of `lora` (rank, alpha, target) on it. Raises: UserError."""
    with model_errors(f"cannot build model {model} from its configuration"):
        whole = AutoConfig.from_pretrained(model, **NO_CODE)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(whole, **NO_CODE)
            count = sum(each.numel() for each in empty.parameters())
            head = empty.get_output_embeddings()
            maps = [each for each in empty.modules() if isinstance(each, nn.Linear) and is_linear_map(each)]
            linear = sum(each.weight.numel() for each in maps if each is not head)
            tuned = with_fresh_lora(empty, **lora, seed=0).named_parameters()
    config = whole.get_text_config()
    size = torch.finfo(whole.dtype or torch.float32).bits // 8
    trained = sum(each.numel() for name, each in tuned if "lora_" in name)
    width = config.hidden_size
    return Shape(count, linear, trained, width, _inner(config), config.num_hidden_layers, config.vocab_size, size)


def _inner(config: PretrainedConfig) -> int:
    names = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner")
    inner = next(filter(None, (getattr(config, name, None) for name in names)), 4 * config.hidden_size)
    inner = max(inner) if isinstance(inner, list) else inner
    return round(inner * (active_experts(config) or 1))


def layer_bytes(shape: Shape, tokens: int, number: int) -> int:
    """What a decoder layer keeps for its backward pass: (8·d + 4·f) numbers a token.

    The count of Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1) done for a layer with RMSNorm, fused attention
    (no T² part) and a gated MLP: inputs of two norms, of query, key and value and of the output projection; the four
    tensors of the MLP."""
    return tokens * (8 * shape.width + 4 * shape.inner) * number


def _weights(shape: Shape, number: int, bits: int | None) -> int:
    """`bits` of the quantised linear maps, with 0.127 more in 4 bit (double quantisation: Dettmers et al. 2023, arXiv
    2305.14314, section 3); the others, as all without, of `number` bytes."""
    packed = shape.linear * (bits + 0.127 * (bits == 4)) / 8 if bits else 0
    return round(packed + (shape.parameters - (shape.linear if bits else 0)) * number)


def scoring_memory(shape: Shape, tokens: int, number: int, every_layer: bool, bits: int | None = None) -> Memory:
    """A batch of `tokens` with padding, `number` bytes a number; `bits` of quantised linear maps.

    Activations: those of the last layer, under all_lora (`every_layer`) of all; two hidden states; and of each logit,
    in chunks, a float32 and copies in the model's format, 8 bytes (selection/method/effort.py, `_head`)."""
    activations = (shape.layers if every_layer else 1) * layer_bytes(shape, tokens, number)
    logits = 8 * min(tokens * shape.vocabulary, max(_LOGITS_AT_ONCE, shape.vocabulary))
    return Memory(_weights(shape, number, bits), 0, activations + 2 * tokens * shape.width * number + logits)


def tuning_memory(
    shape: Shape, tokens: int, number: int, full: bool, checkpointing: bool, bits: int | None = None
) -> Memory:
    """A batch of `tokens` with padding, in arithmetic of `number` bytes; `bits` of quantised linear maps under a LoRA.

    Weights as the checkpoint has them; of every trained parameter, in float32, weight, gradient and two of Adam's, 16
    bytes (Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1; LLaMA-Factory trains in float32). Activations: with
    checkpointing each layer's input and one layer's own, else all layers'; of each logit the model's, its float32 copy
    and the gradients of both (transformers' ForCausalLMLoss), 8 + 2 · `number` bytes."""
    layers = layer_bytes(shape, tokens, number) * (1 if checkpointing else shape.layers)
    inputs = tokens * shape.width * number * shape.layers if checkpointing else 0
    logits = tokens * shape.vocabulary * (8 + 2 * number)
    weights = 0 if full else _weights(shape, shape.number, bits)
    return Memory(weights, 16 * (shape.parameters if full else shape.lora), layers + inputs + logits)
