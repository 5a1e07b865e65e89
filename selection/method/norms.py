"""Per-sample gradient norms of linear maps and LoRA, taken inside the model's own forward and backward pass.

Each adds to `squares` (B,), the squared norms by sample, as soon as the backward pass reaches it: no gradient of a
sample outlives its module.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional

from selection.method.phi import LinearMap, LoraPair
from selection.run.errors import UserError


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


def by_sample(rows: torch.Tensor, shape: tuple[int, int], name: str) -> torch.Tensor:
    """As (B, T, d), where `shape` is B, T: some families flatten samples and tokens inside a layer."""
    if rows.shape[:-1] not in (shape, (shape[0] * shape[1],)):
        raise UserError(f"{name} gets {tuple(rows.shape)} for {shape} tokens: whose they are is lost, take another phi")
    return rows.reshape(*shape, rows.shape[-1])


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Another forward for a while; what accelerate put in its place (it moves inputs between devices) comes back."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class _Once:
    """Called at each use of a module: of a gradient that is the sum over two uses the norms do not add up."""

    def __init__(self, name: str):
        self.name, self.used = name, False

    def __call__(self) -> None:
        if self.used:
            raise UserError(f"{self.name} is used twice in one forward pass: its norm is not known, take another phi")
        self.used = True


@contextlib.contextmanager
def listening_to_linear(
    linear_map: LinearMap,
    squares: torch.Tensor,
    length: int,
    ends: list[torch.Tensor],
    projected: Callable | None = None,
    always_end: bool = False,
) -> Iterator[None]:
    """Add the norms of a linear map's weight gradient. Where its output needs no gradient yet, it becomes a leaf of
    the graph and joins `ends`: there the backward pass ends, and below nothing was kept.

    `always_end`: it joins them in any case, as what needs a gradient below may be none of the `ends`.
    `projected`: applied to the inputs first (the A of a fresh LoRA, whose B the gradient is then taken for). Without
    it the weight requires a gradient but while the module is called the first time: whatever else is made of it, by a
    second call or past the module, shows in the graph (see weights_in_graph).
    """
    shape, once = (len(squares), length), _Once(linear_map.name)
    watched = projected is None and linear_map.weight_at_hand

    def before(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if watched:
            linear_map.weight.requires_grad_(once.used)

    def listen(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor | None:
        if watched:
            linear_map.weight.requires_grad_(True)
            if once.used:
                return None
        once()
        starts = not output.requires_grad
        if starts:
            output = output.detach().requires_grad_()
        if starts or always_end:
            ends.append(output)
        seen = by_sample(inputs[0].detach(), shape, linear_map.name)

        def add(gradient: torch.Tensor) -> None:
            if linear_map.columns is not None:
                gradient = gradient[..., linear_map.columns]
            gradient = by_sample(gradient, shape, linear_map.name)
            if projected is None:
                norms = squared_norms(seen, gradient)
            else:
                norms = squared_norms(projected(seen.float()), gradient.float())
            squares.add_(norms.to(squares.device))  # a model's layers may lie on several devices

        output.register_hook(add)
        return output

    handles = [linear_map.module.register_forward_hook(listen), linear_map.module.register_forward_pre_hook(before)]
    try:
        if watched:
            linear_map.weight.requires_grad_(True)
        yield
    finally:
        for handle in handles:
            handle.remove()
        if watched:
            linear_map.weight.requires_grad_(False)


def weights_in_graph(output: torch.Tensor) -> set[int]:
    """`id` of every parameter and other leaf that `output` was computed from."""
    leaves, seen, nodes = set(), set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaves.add(id(getattr(node, "variable", None)))
        nodes += [following for following, _ in node.next_functions]
    return leaves


@contextlib.contextmanager
def listening_to_lora(pair: LoraPair, squares: torch.Tensor, length: int, start: torch.Tensor) -> Iterator[None]:
    """Add the norms of the gradients of A and B of one LoRA module.

    Its forward pass is taken over: the same sum W x + (α/r) B A x, without the copies that PEFT's way of writing it
    makes (a tenth of a whole pass on a CPU). `start` requires a gradient, so that the backward pass comes
    here even where the inputs require none.
    """
    layer, adapter = pair.module, pair.adapter
    scaling, shape, once = layer.scaling[adapter], (len(squares), length), _Once(pair.name)

    def forward(inputs: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        once()
        output = layer.base_layer(inputs, *args, **kwargs)
        output = output.clone() if output._is_view() else output  # as bitsandbytes answers; not to be added to in place
        a, b = layer.lora_A[adapter].weight.to(output.dtype), layer.lora_B[adapter].weight.to(output.dtype)
        return _AddLora.apply(output, inputs, start, a, b, scaling, squares, shape, pair.name)

    with replaced_forward(layer, forward):
        yield


class _AddLora(torch.autograd.Function):
    """output += (α/r) B A x; backward takes the norms of ∇_B = (α/r) Σ g (A x)ᵀ and ∇_A = (α/r) Σ (Bᵀ g) xᵀ."""

    @staticmethod
    def forward(ctx, output, inputs, start, a, b, scaling, squares, shape, name):
        hidden = functional.linear(inputs, a)
        output.flatten(0, -2).addmm_(hidden.flatten(0, -2), b.T, alpha=scaling)
        ctx.mark_dirty(output)
        ctx.save_for_backward(inputs, hidden)
        ctx.constants = a, b, scaling, squares, shape, name
        return output

    @staticmethod
    def backward(ctx, gradient):
        inputs, hidden = ctx.saved_tensors
        a, b, scaling, squares, shape, name = ctx.constants
        hidden_gradient = (gradient @ b).mul_(scaling)
        seen, g, seen_hidden, g_hidden = (
            by_sample(each, shape, name) for each in (inputs, gradient, hidden, hidden_gradient)
        )
        norms = scaling**2 * squared_norms(seen_hidden, g) + squared_norms(seen, g_hidden)
        squares.add_(norms.to(squares.device))
        return gradient, hidden_gradient @ a if ctx.needs_input_grad[1] else None, *[None] * 7
