"""Per-sample gradient norms of linear maps and LoRA, taken inside the model's own forward and backward pass.

Each adds to `squares` (B,), the squared norms by sample, as soon as the backward pass reaches it: no gradient of a
sample outlives its module.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional

from selection.errors import UserError
from selection.phi import LinearMap, LoraPair


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
    """In float32, by pairwise summation: `vector_norm` adds up in sequence, and a million terms cost it four digits."""
    return values.float().square().sum(dim)


def by_sample(rows: torch.Tensor, squares: torch.Tensor, name: str) -> torch.Tensor:
    """As (B, T, d): some families flatten samples and tokens inside a layer."""
    if rows.dim() == 3 and len(rows) == len(squares):
        return rows
    if rows.dim() == 2 and len(rows) % len(squares) == 0:
        return rows.unflatten(0, (len(squares), -1))
    raise UserError(
        f"{name} gets {tuple(rows.shape)} for {len(squares)} samples: its tokens have no sample, choose another phi"
    )


@contextlib.contextmanager
def listening_to_linear(
    linear_map: LinearMap, squares: torch.Tensor, leaves: list[torch.Tensor], projected: Callable | None = None
) -> Iterator[None]:
    """Add the norms of a linear map's weight gradient. Where its output needs no gradient yet, it becomes a leaf of
    the graph and joins `leaves`: there the backward pass ends, and below nothing was kept.

    `projected`: applied to the inputs first (the A of a fresh LoRA, whose B the gradient is then taken for).
    """

    def listen(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_()
            leaves.append(output)
        seen = by_sample(inputs[0].detach(), squares, linear_map.name)

        def add(gradient: torch.Tensor) -> None:
            if linear_map.columns is not None:
                gradient = gradient[..., linear_map.columns.to(gradient.device)]
            gradient = by_sample(gradient, squares, linear_map.name)
            if projected is None:
                squares.add_(squared_norms(seen, gradient))
            else:
                squares.add_(squared_norms(projected(seen.float()), gradient.float()))

        output.register_hook(add)
        return output

    handle = linear_map.module.register_forward_hook(listen)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def listening_to_lora(pair: LoraPair, squares: torch.Tensor, start: torch.Tensor) -> Iterator[None]:
    """Add the norms of the gradients of A and B of one LoRA module.

    Its forward pass is taken over: the same sum W x + (α/r) B A x, without the copies that PEFT's way of writing it
    makes (a tenth to a fifth of a whole pass on a CPU). `start` requires a gradient, so that the backward pass comes
    here even where the inputs require none.
    """
    layer, adapter = pair.module, pair.adapter
    scaling = layer.scaling[adapter]

    def forward(inputs: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        output = layer.base_layer(inputs, *args, **kwargs)
        a, b = layer.lora_A[adapter].weight.to(output.dtype), layer.lora_B[adapter].weight.to(output.dtype)
        return _AddLora.apply(output, inputs, start, a, b, scaling, squares, pair.name)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


class _AddLora(torch.autograd.Function):
    """output += (α/r) B A x; backward takes the norms of ∇_B = (α/r) Σ g (A x)ᵀ and ∇_A = (α/r) Σ (Bᵀ g) xᵀ."""

    @staticmethod
    def forward(ctx, output, inputs, start, a, b, scaling, squares, name):
        hidden = functional.linear(inputs, a)
        output.flatten(0, -2).addmm_(hidden.flatten(0, -2), b.T, alpha=scaling)
        ctx.mark_dirty(output)
        ctx.save_for_backward(inputs, hidden)
        ctx.constants = a, b, scaling, squares, name
        return output

    @staticmethod
    def backward(ctx, gradient):
        inputs, hidden = ctx.saved_tensors
        a, b, scaling, squares, name = ctx.constants
        hidden_gradient = (gradient @ b).mul_(scaling)
        seen, g, seen_hidden, g_hidden = (
            by_sample(each, squares, name) for each in (inputs, gradient, hidden, hidden_gradient)
        )
        squares.add_(squared_norms(seen_hidden, g), alpha=scaling**2).add_(squared_norms(seen, g_hidden))
        return gradient, hidden_gradient @ a if ctx.needs_input_grad[1] else None, *[None] * 6
