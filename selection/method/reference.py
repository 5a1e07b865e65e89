"""The effort score S_d = ‖∇_φ L(θ; d)‖₂, one sample at a time: what tests and runs hold effort.py against."""

from collections.abc import Sequence

import torch
from torch import nn


def effort_score(
    model: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor, phi: Sequence[torch.Tensor]
) -> tuple[float, float]:
    """Effort score and loss L (in nats) of one sample.

    Args:
        model: a causal language model of transformers in eval mode; L is its own loss.
        input_ids, labels: (T,) token ids; the label is −100 where a token is not part of the response.
        phi: the parameters φ. They, and nothing else, require a gradient."""
    with torch.enable_grad():
        loss = model(input_ids=input_ids[None], labels=labels[None], use_cache=False).loss
        gradients = torch.autograd.grad(loss, phi, allow_unused=True)  # None for an expert that got no token
    squares = [float(gradient.double().square().sum()) for gradient in gradients if gradient is not None]
    return sum(squares) ** 0.5, loss.item()
