"""Find φ, the parameters that the gradient is taken for, in a model of any family."""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_CONV1D = "Conv1D"  # GPT-2's linear map, which stores its weight as (d_in, d_out)


class NoPhi(ValueError):
    """The model has no such φ, or hides the gradient norms of single samples."""


@dataclass(frozen=True)
class LinearMap:
    """A linear map of the model, (B, T, d_in) -> (B, T, d_out), whose weight belongs to φ."""

    name: str
    module: nn.Module  # under PEFT its wrapper
    columns: torch.Tensor | None = None  # of the output, where only these belong to φ

    @property
    def weight(self) -> nn.Parameter:
        return linear(self.module).weight

    @property
    def width(self) -> tuple[int, int]:
        """d_in, d_out of the whole map, fused or not."""
        inner = linear(self.module)
        return tuple(inner.weight.shape) if type(inner).__name__ == _CONV1D else (inner.in_features, inner.out_features)

    @property
    def weight_at_hand(self) -> bool:
        """Whether the map multiplies with `weight` itself: not quantised, not offloaded."""
        return self.weight.is_floating_point() and not self.weight.is_meta


@dataclass(frozen=True)
class Phi:
    """The parameters that the gradient is taken for."""

    maps: list[LinearMap] = field(default_factory=list)
    others: dict[str, nn.Parameter] = field(default_factory=dict)  # in no linear map: experts as one tensor, routers
    loras: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)  # PEFT's layer and its adapter

    @property
    def modules(self) -> list[str]:
        return [*(each.name for each in self.maps), *self.loras, *self.others]


def find_phi(model: nn.Module, name: str) -> Phi:
    """The parameters φ of that name in a model. Raises: NoPhi naming what was looked at where it has none."""
    if name == "all_lora":
        return Phi(loras=_loras(model))
    if name != "last_layer":
        return Phi([find_value_projection(model)])
    layer_name, layer = last_decoder_layer(model)
    found = projections(layer)
    inside = {id(parameter) for module in found.values() for parameter in module.parameters()}
    others = {
        f"{layer_name}.{key}": parameter
        for key, parameter in layer.named_parameters()
        if parameter.dim() >= 2 and id(parameter) not in inside and "lora_" not in key
    }
    if offloaded := [key for key, parameter in others.items() if parameter.is_meta]:
        raise NoPhi(f"phi last_layer: {offloaded[0]} is offloaded from its device: use phi v_lora_b or v_weight")
    return Phi([LinearMap(f"{layer_name}.{key}", linear(module)) for key, module in found.items()], others)


def _loras(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """PEFT's layers with their active adapter. Refuse what is more than a plain A and B in a decoder layer."""
    found, in_decoder = {}, set(decoder_of(model).modules())
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):  # PEFT's LoraLayer
            continue
        active = [adapter for adapter in module.active_adapters if adapter in module.scaling]
        plain = len(active) == 1 and isinstance(dict(module.lora_A).get(active[0]), nn.Linear)
        plain = plain and module.lora_B[active[0]].bias is None and not module.lora_variant
        plain = plain and not hasattr(module, "parameter_name")  # PEFT's ParamWrapper, for experts
        if not plain or module.merged or module.disable_adapters or module not in in_decoder:
            raise NoPhi(
                f"phi all_lora: {name} is no plain A and B in a decoder layer (but DoRA, with a bias, one of several "
                "adapters, merged, disabled, or on embedding, head or experts): use phi last_layer"
            )
        # The whole model would have to stay on its device until the backward pass has been through it.
        if any(parameter.is_meta for parameter in module.parameters()):
            raise NoPhi(f"phi all_lora: {name} is offloaded from its device: use phi last_layer or v_lora_b")
        found[name] = module, active[0]
    if not found:
        looked_at = ", ".join(projections(last_decoder_layer(model)[1])) or "no linear map"
        raise NoPhi(f"phi all_lora: found no LoRA in {type(unwrap(model)).__name__}: its last layer has {looked_at}")
    return found


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper (its adapters stay in place)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model: nn.Module) -> nn.Module:
    """The text decoder, which answers with hidden states. (get_decoder of Llama 4 returns the model with its head.)"""
    model = unwrap(model)
    found = model.get_decoder()
    return found if found is not model else getattr(model, "model", model)


def device_of(module: nn.Module) -> torch.device:
    """Where the module computes: its weights' device, or the one that accelerate brings them to for it."""
    module = linear(module)
    hook = getattr(module, "_hf_hook", None)
    devices = [getattr(each, "execution_device", None) for each in getattr(hook, "hooks", [hook])]
    return torch.device(next((each for each in devices if each is not None), next(module.parameters()).device))


def last_decoder_layer(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the last layer in the text decoder's longest list of modules."""
    decoder = decoder_of(model)
    lists: dict[str, nn.ModuleList] = {}
    for name, module in decoder.named_modules():
        inside_another = name.startswith(tuple(f"{outer}." for outer in lists))  # experts of a layer
        if isinstance(module, nn.ModuleList) and len(module) and not inside_another:
            lists[name] = module
    if not lists:
        raise NoPhi(f"found no list of decoder layers in {type(decoder).__name__}, only {', '.join(decoder._modules)}")
    name = max(lists, key=lambda name: len(lists[name]))
    return f"{name}.{len(lists[name]) - 1}", lists[name][-1]


def linear(module: nn.Module) -> nn.Module:
    """The linear map itself, under PEFT's wrapper if there is one."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def projections(layer: nn.Module) -> dict[str, nn.Module]:
    """The layer's linear maps by name; a PEFT wrapper counts, what is inside it does not."""
    found: dict[str, nn.Module] = {}
    for name, module in layer.named_modules():
        if is_linear_map(linear(module)) and not name.startswith(tuple(f"{outer}." for outer in found)):
            found[name] = module
    return found


def is_linear_map(module: nn.Module) -> bool:
    """Whether the module returns x Wᵀ: some routers (Phi-3.5-MoE, Llama 4) are an nn.Linear that returns more."""
    if not isinstance(module, nn.Linear):
        return type(module).__name__ == _CONV1D
    # A subclass with its own forward has to be called to know. (Those of bitsandbytes return x Wᵀ.)
    if type(module).forward is nn.Linear.forward or not module.weight.is_floating_point():
        return True
    with torch.no_grad():
        row = torch.zeros((1, module.in_features), dtype=module.weight.dtype, device=device_of(module))
        return isinstance(module(row), torch.Tensor)


def _noting(get_interface: Callable, layer: nn.Module, noted: list[torch.Tensor]) -> Callable:
    """transformers' `get_interface`, whose attention adds its values (B, heads, T, d) to `noted` inside of `layer`."""
    inside = set(layer.modules())

    def attend(names, module, query, key, value, *args, **kwargs):
        if module in inside:
            noted.append(value)
        return get_interface(*names)(module, query, key, value, *args, **kwargs)

    return lambda *names: partial(attend, names)


def find_value_projection(model: nn.Module) -> LinearMap:
    """Find the last map whose output reaches the values of attention, whatever it is called.

    Where attention does not show its values, one token is enough: its only attention weight is 1, whatever query and
    key say, so their gradient vanishes and the values' does not. (Not so with attention sinks.)
    Raises: NoPhi naming the linear maps of the layer where none behaves so."""
    layer_name, layer = last_decoder_layer(model)
    seen: dict[str, tuple] = {}  # name -> input and output (1, 1, d), in calling order
    noted: list[torch.Tensor] = []

    def watch(name, module, inputs, output):
        output = output if output.requires_grad else output.detach().requires_grad_()
        seen[name] = inputs[0], output
        return output

    with contextlib.ExitStack() as undo:
        for name, module in projections(layer).items():
            undo.callback(module.register_forward_hook(partial(watch, name)).remove)
        undo.callback(model.train, model.training)
        model.eval()  # dropout would zero columns too
        undo.enter_context(torch.enable_grad())
        undo.enter_context(sdpa_kernel(SDPBackend.MATH))  # its gradient is exactly 0 here, fused kernels leave noise
        # Most families of transformers take their attention from this table, under this name in their own module.
        if table := getattr(sys.modules[type(layer).__module__], "ALL_ATTENTION_FUNCTIONS", None):
            table.get_interface = _noting(table.get_interface, layer, noted)
            undo.callback(delattr, table, "get_interface")
        token = torch.ones((1, 1), dtype=torch.long, device=device_of(unwrap(model).get_input_embeddings()))
        hidden = decoder_of(model)(input_ids=token, use_cache=False).last_hidden_state
        reached = noted[-1] if noted else hidden
        direction = torch.randn(reached.shape, generator=torch.Generator().manual_seed(0)).to(reached)
        outputs = [output for _, output in seen.values()]
        gradients = torch.autograd.grad(reached, outputs, direction, allow_unused=True)
    alive = {  # which columns (d_out,) of each map's output reach the values, or the hidden state
        name: torch.zeros(output.shape[-1], dtype=torch.bool) if g is None else (g != 0).flatten(0, -2).any(0).cpu()
        for name, output, g in zip(seen, outputs, gradients, strict=True)
    }
    values = [name for name, columns in alive.items() if columns.any()]
    if not noted:
        values = _beside_the_query(values, seen, alive)
    if not values:
        kind, looked_at = type(unwrap(model)).__name__, ", ".join(seen) or "no linear map"
        raise NoPhi(f"found no value projection in {layer_name} of {kind}: looked at {looked_at}")
    name = values[-1]  # compressed attention has a chain of maps: the last one makes the values
    columns = None if alive[name].all() else alive[name].nonzero().squeeze(1).to(seen[name][1].device)
    return LinearMap(f"{layer_name}.{name}", layer.get_submodule(name), columns)


def _beside_the_query(names: list[str], seen: dict[str, tuple], alive: dict[str, torch.Tensor]) -> list[str]:
    """Those that read the same input as the query's projection (the first with a dead column) or are fused with it."""
    query = next((name for name, columns in alive.items() if not columns.all()), "")
    names = [name for name in names if query and name.rpartition(".")[0] == query.rpartition(".")[0]]
    return [name for name in names if not alive[name].all() or torch.equal(seen[name][0], seen[query][0])]
