"""Per-sample gradient norms of linear maps and LoRA, taken inside the model's own forward and backward pass.

Each module adds its squared norms to `squares` (B,) as the backward pass reaches it: no gradient outlives its module.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional

from selection.method.phi import LinearMap, NoPhi


def squared_norms(inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """‖Σ_t g_t x_tᵀ‖² (B,) float32, from a map's inputs x (B, T, d_in) and output gradients g (B, T, d_out)."""
    (_, length, wide), high = inputs.shape, gradient.shape[2]
    if length * (wide + high) < wide * high:  # the gradient is larger than what it is made of: Σ (XXᵀ ∘ GGᵀ) instead
        inputs, gradient = inputs.float(), gradient.float()
        return ((inputs @ inputs.mT) * (gradient @ gradient.mT)).sum((1, 2)).clamp(min=0)
    # The narrow side as rows: on a CPU up to 5 times faster than its transpose.
    narrow, broad = (inputs, gradient) if wide <= high else (gradient, inputs)
    return sum_of_squares(narrow.mT @ broad, dim=(1, 2))


def sum_of_squares(values: torch.Tensor, dim: tuple[int, ...] | None = None) -> torch.Tensor:
    """In float32, summed pairwise: `vector_norm` adds up in sequence, and a million terms leave it four digits."""
    return values.float().square().sum(dim)


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Give the module another forward inside the `with`. One that accelerate put there is put back at the end."""
    before = {key: value for key, value in module.__dict__.items() if key == "forward"}
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        module.__dict__.update(before)


class Recorder:
    """Adds one module's squared norms to `squares` (B,); the batch is padded to `length` tokens."""

    def __init__(self, name: str, squares: torch.Tensor, length: int):
        self.name, self.squares, self.length, self.used = name, squares, length, False

    def once(self) -> None:
        """Called at each use of the module. A second one is refused: the norm of a sum is not known from its parts."""
        if self.used:
            raise NoPhi(f"{self.name} is used twice in one forward pass: its norm is not known, take another phi")
        self.used = True

    def norms(self, *pair: torch.Tensor) -> torch.Tensor:
        """`squared_norms` of inputs and output gradients; some families flatten samples and tokens inside a layer."""
        shape = len(self.squares), self.length
        if any(rows.shape[:-1] not in (shape, (shape[0] * shape[1],)) for rows in pair):
            raise NoPhi(f"{self.name} gets {tuple(pair[0].shape)} for {shape} tokens: take another phi")
        return squared_norms(*(rows.reshape(*shape, rows.shape[-1]) for rows in pair))

    def add(self, norms: torch.Tensor) -> None:
        self.squares.add_(norms.to(self.squares.device))  # a model's layers may lie on several devices


def listen_to_linear(
    linear_map: LinearMap, record: Recorder, ends: list, undo: contextlib.ExitStack, projected=None, always_end=False
) -> None:
    """Record the norms of a linear map's weight gradient until `undo` is closed.

    An output that needs no gradient yet (or `always_end`) joins `ends`: the backward pass ends there. The weight
    requires a gradient except in the module's first call, so any other use of it shows in the graph (weights_in_graph).
    `projected`: a function of the inputs: the A of a fresh LoRA, whose B the gradient is taken for."""
    weight = linear_map.weight if projected is None and linear_map.weight_at_hand else None

    def before(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        weight.requires_grad_(record.used)

    def after(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor | None:
        if weight is not None:
            weight.requires_grad_(True)
            if record.used:
                return None
        record.once()
        if starts := not output.requires_grad:
            output = output.detach().requires_grad_()
        if starts or always_end:
            ends.append(output)
        seen = inputs[0].detach()

        def add(gradient: torch.Tensor) -> None:
            gradient = gradient if linear_map.columns is None else gradient[..., linear_map.columns]
            pair = (seen, gradient) if projected is None else (projected(seen.float()), gradient.float())
            record.add(record.norms(*pair))

        output.register_hook(add)
        return output

    undo.callback(linear_map.module.register_forward_hook(after).remove)
    if weight is not None:
        undo.callback(linear_map.module.register_forward_pre_hook(before).remove)
        undo.callback(weight.requires_grad_, False)
        weight.requires_grad_(True)


def weights_in_graph(output: torch.Tensor) -> set[int]:
    """`id` of every parameter and other leaf that `output` was computed from."""
    seen, nodes = {None}, [output.grad_fn]
    while nodes:
        if (node := nodes.pop()) not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return {id(getattr(node, "variable", None)) for node in seen}


def listen_to_lora(
    layer: nn.Module, adapter: str, record: Recorder, start: torch.Tensor, undo: contextlib.ExitStack
) -> None:
    """Record the norms of the gradients of one LoRA's A and B until `undo` is closed.

    Takes over its forward pass, without PEFT's copies (a tenth of a whole pass on a CPU). `start` requires a gradient,
    so the backward pass comes here even if the inputs require none."""

    def forward(inputs: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        record.once()
        output = layer.base_layer(inputs, *args, **kwargs)
        output = output.clone() if output._is_view() else output  # as bitsandbytes answers; not to be added to in place
        a, b = layer.lora_A[adapter].weight.to(output.dtype), layer.lora_B[adapter].weight.to(output.dtype)
        return _AddLora.apply(output, inputs, start, a, b, layer.scaling[adapter], record)

    undo.enter_context(replaced_forward(layer, forward))


class _AddLora(torch.autograd.Function):
    """output += (α/r) B A x; backward takes the norms of ∇_B = (α/r) Σ g (A x)ᵀ and ∇_A = (α/r) Σ (Bᵀ g) xᵀ."""

    @staticmethod
    def forward(ctx, output, inputs, start, a, b, scaling, record):
        hidden = functional.linear(inputs, a)
        output.flatten(0, -2).addmm_(hidden.flatten(0, -2), b.T, alpha=scaling)
        ctx.mark_dirty(output)
        ctx.save_for_backward(inputs, hidden)
        ctx.constants = a, b, scaling, record
        return output

    @staticmethod
    def backward(ctx, gradient):
        inputs, hidden = ctx.saved_tensors
        a, b, scaling, record = ctx.constants
        hidden_gradient = (gradient @ b).mul_(scaling)
        record.add(scaling**2 * record.norms(hidden, gradient) + record.norms(inputs, hidden_gradient))
        return gradient, hidden_gradient @ a if ctx.needs_input_grad[1] else None, *[None] * 5
