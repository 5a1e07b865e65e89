"""Find φ, the parameters that the gradient is taken for, in a model without knowing its family."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from selection.run.errors import UserError


@dataclass(frozen=True)
class LinearMap:
    """A linear map of the model, (B, T, d_in) -> (B, T, d_out), whose weight belongs to φ."""

    name: str
    module: nn.Module
    columns: torch.Tensor | None = None  # of the output that count; None: all

    @property
    def weight(self) -> nn.Parameter:
        return linear(self.module).weight

    @property
    def output_width(self) -> int:
        """d_out, of a fused projection all of it."""
        return self.weight.shape[1] if self.transposed else linear(self.module).out_features

    @property
    def device(self) -> torch.device:
        return device_of(linear(self.module))

    @property
    def weight_at_hand(self) -> bool:
        """Whether `weight` is what the map multiplies with, and not a quantised form or offloaded."""
        return self.weight.is_floating_point() and not self.weight.is_meta

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as (d_in, d_out), as in GPT-2."""
        return isinstance(linear(self.module), Conv1D)

    @property
    def input_width(self) -> int:
        """d_in."""
        return self.weight.shape[0] if self.transposed else linear(self.module).in_features


@dataclass(frozen=True)
class LoraPair:
    """A LoRA's A and B on one linear map."""

    name: str
    module: LoraLayer
    adapter: str


@dataclass(frozen=True)
class Phi:
    """The parameters that the gradient is taken for."""

    name: str  # as in the configuration: v_lora_b, v_weight, last_layer or all_lora
    maps: list[LinearMap] = field(default_factory=list)
    others: dict[str, nn.Parameter] = field(default_factory=dict)  # in no linear map: experts as one tensor, routers
    loras: list[LoraPair] = field(default_factory=list)

    @property
    def modules(self) -> list[str]:
        """Names, for the reader of a manifest."""
        return [*(each.name for each in (*self.maps, *self.loras)), *self.others]


def find_phi(model: nn.Module, name: str) -> Phi:
    """Raises: UserError naming the modules looked at where the model has no such parameters."""
    if name == "all_lora":
        return Phi(name, loras=_lora_pairs(model))
    if name == "last_layer":
        layer_name, layer = last_decoder_layer(model)
        found = projections(layer)
        inside = {id(parameter) for module in found.values() for parameter in module.parameters()}
        others = {
            f"{layer_name}.{key}": parameter
            for key, parameter in layer.named_parameters()
            if parameter.dim() >= 2 and id(parameter) not in inside and "lora_" not in key
        }
        for key, parameter in others.items():
            if parameter.is_meta:
                raise UserError(f"phi last_layer: {key} is offloaded from its device: use phi v_lora_b or v_weight")
        maps = [LinearMap(f"{layer_name}.{key}", linear(module)) for key, module in found.items()]
        return Phi(name, maps, others)
    return Phi(name, [find_value_projection(model)])


def _lora_pairs(model: nn.Module) -> list[LoraPair]:
    """Every A and B of the model's active LoRA."""
    found, in_decoder = [], set(decoder_of(model).modules())
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        active = [adapter for adapter in module.active_adapters if adapter in module.scaling]
        plain = len(active) == 1 and active[0] in module.lora_A and isinstance(module.lora_A[active[0]], nn.Linear)
        plain = plain and module.lora_B[active[0]].bias is None and not module.lora_variant
        as_it_stands = not isinstance(module, ParamWrapper) and not module.merged and not module.disable_adapters
        if not plain or not as_it_stands or module not in in_decoder:
            raise UserError(
                f"phi all_lora: {name} has no plain A and B in a decoder layer (but DoRA, a bias, several adapters, a "
                "merged or disabled one, or it stands on embedding, head or experts): use phi last_layer"
            )
        # The whole model would have to stay on its device until the backward pass has been through it.
        if any(parameter.is_meta for parameter in module.parameters()):
            raise UserError(f"phi all_lora: {name} is offloaded from its device: use phi last_layer or v_lora_b")
        found.append(LoraPair(name, module, active[0]))
    if not found:
        looked_at = ", ".join(projections(last_decoder_layer(model)[1])) or "no linear map"
        raise UserError(
            f"phi all_lora: found no LoRA in {type(unwrap(model)).__name__}: its last layer has {looked_at}"
        )
    return found


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper (its adapters stay in place)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model: nn.Module) -> nn.Module:
    """The text decoder, which answers with hidden states. (Llama 4 calls itself its decoder, head and all.)"""
    model = unwrap(model)
    found = model.get_decoder()
    return found if found is not model else getattr(model, "model", model)


def device_of(module: nn.Module) -> torch.device:
    """Where the module computes: its weights' device, or the one that accelerate brings them to for it."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        if getattr(each, "execution_device", None) is not None:
            return torch.device(each.execution_device)
    return next(module.parameters()).device


def last_decoder_layer(model: nn.Module) -> tuple[str, nn.Module]:
    """The last element of the decoder's layer list: the longest list of modules in the text decoder."""
    decoder = decoder_of(model)
    lists = [
        (name, module) for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    # Lists inside a layer (experts) are no candidates.
    outermost = [
        (name, layers) for name, layers in lists if not any(name.startswith(outer + ".") for outer, _ in lists)
    ]
    if not outermost:
        children = ", ".join(name for name, _ in decoder.named_children())
        raise UserError(f"found no list of decoder layers in {type(decoder).__name__}: it has {children}")
    name, layers = max(outermost, key=lambda item: len(item[1]))
    return f"{name}.{len(layers) - 1}", layers[-1]


def linear(module: nn.Module) -> nn.Module:
    """The linear map itself, under PEFT's wrapper if there is one."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def projections(layer: nn.Module) -> dict[str, nn.Module]:
    """The layer's linear maps by name (in GPT-2 they are Conv1D); a PEFT wrapper counts, what is inside it does not."""
    found: dict[str, nn.Module] = {}
    for name, module in layer.named_modules():
        if is_linear_map(linear(module)) and not any(name.startswith(outer + ".") for outer in found):
            found[name] = module
    return found


def is_linear_map(module: nn.Module) -> bool:
    """Whether it answers with its product. Some routers (Phi-3.5-MoE, Llama 4) are an nn.Linear that answers with a
    tuple: its parts may each be something else than the product."""
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    # A forward of its own: the only way to know is to call it. (bitsandbytes' answer with the product.)
    if type(module).forward in (nn.Linear.forward, Conv1D.forward) or not module.weight.is_floating_point():
        return True
    with torch.no_grad():
        row = torch.zeros((1, module.in_features), dtype=module.weight.dtype, device=device_of(module))
        return isinstance(module(row), torch.Tensor)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


@contextlib.contextmanager
def _noting_values(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Gives a list, which gets the values (B, heads, T, d) that attention inside of `layer` is called with.

    Most families call it through one interface of transformers; of the others the list stays empty.
    """
    noted, inside = [], set(layer.modules())

    def get_interface(*names):
        function = type(ALL_ATTENTION_FUNCTIONS).get_interface(ALL_ATTENTION_FUNCTIONS, *names)

        def attend(module, query, key, value, *args, **kwargs):
            if module in inside:
                noted.append(value)
            return function(module, query, key, value, *args, **kwargs)

        return attend

    ALL_ATTENTION_FUNCTIONS.get_interface = get_interface
    try:
        yield noted
    finally:
        del ALL_ATTENTION_FUNCTIONS.get_interface


def find_value_projection(model: nn.Module) -> LinearMap:
    """Find it by what it does, not by what it is called: the last map whose output reaches the values of attention.

    Where attention does not show its values: in a sequence of one token it has one weight, 1, whatever query and key
    say: their gradient vanishes and the values' does not. So the value projection is the one that reads the same input
    as a projection (or a part of itself, where query, key and value are fused) whose output has no gradient. (Not so
    with attention sinks, which take a part of that weight.)

    Raises: UserError naming the linear maps of the layer where none behaves so.
    """
    layer_name, layer = last_decoder_layer(model)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # name -> input and output (1, 1, d), in calling order

    def watch(name: str):
        def hook(module, inputs, output):
            output = output if output.requires_grad else output.detach().requires_grad_()
            seen[name] = inputs[0], output
            return output

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in projections(layer).items()]
    training = model.training
    model.eval()  # dropout would zero columns too
    try:
        # The composed softmax, whose gradient is exactly 0 here; fused attention kernels leave rounding noise.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _noting_values(layer) as noted:
            token = torch.ones((1, 1), dtype=torch.long, device=device_of(unwrap(model).get_input_embeddings()))
            hidden = decoder_of(model)(input_ids=token, use_cache=False).last_hidden_state
            reached = noted[-1] if noted else hidden
            direction = torch.randn(reached.shape, generator=torch.Generator().manual_seed(0)).to(reached)
            outputs = [output for _, output in seen.values()]
            gradients = torch.autograd.grad(reached, outputs, direction, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    alive = {  # which columns of each projection's output reach the values, or the hidden state; (d_out,)
        name: torch.zeros(output.shape[-1], dtype=torch.bool)
        if g is None
        else (g != 0).reshape(-1, g.shape[-1]).any(0).cpu()
        for (name, (_, output)), g in zip(seen.items(), gradients, strict=True)
    }
    values = [name for name, columns in alive.items() if columns.any()] if noted else _read_with_the_query(seen, alive)
    if not values:
        looked_at = ", ".join(seen) or "no linear map"
        raise UserError(
            f"found no value projection in {layer_name} of {type(unwrap(model)).__name__}: looked at {looked_at}"
        )
    name = values[-1]  # in compressed attention the last of the chain makes the values
    columns = None if alive[name].all() else alive[name].nonzero().squeeze(1).to(seen[name][1].device)
    return LinearMap(f"{layer_name}.{name}", layer.get_submodule(name), columns)


def _read_with_the_query(
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]], alive: dict[str, torch.Tensor]
) -> list[str]:
    """Names of those that read what the query's projection reads, and have columns that reach the hidden state."""
    # The first with dead columns is the query, alone or fused; what it stands in is the attention.
    query = next((name for name, columns in alive.items() if not columns.all()), None)
    return [
        name
        for name, columns in alive.items()
        if query is not None
        and name.rpartition(".")[0] == query.rpartition(".")[0]
        and columns.any()
        and (not columns.all() or _equal(seen[name][0], seen[query][0]))
    ]
