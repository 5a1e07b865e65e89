"""The effort score S_d = ‖∇_φ L(θ; d)‖₂, for a batch of samples at once and exact for each of them.

L is the mean cross-entropy over a sample's response tokens. One forward pass without gradients up to φ, a backward
pass through the head and the part of the last layer above φ, and each sample's gradient norm from the projection's
inputs and output gradients: no sample's gradient depends on the others in its batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from selection.value_projection import find_value_projection, unwrap

IGNORED_LABEL = -100
_LOGITS_AT_ONCE = 2**24  # numbers of one chunk of logits: N × vocabulary never exists as a whole


@dataclass(frozen=True)
class SampleScores:
    """Per sample of a batch, float64, on the CPU."""

    loss: torch.Tensor  # (B,) nats per response token
    effort: torch.Tensor  # (B,)


class EffortScorer:
    """Scores batches on one model. The model is frozen and put into eval mode; its weights stay as they are.

    Args:
        phi: "v_lora_b", the B matrix (zero) of a fresh LoRA on the value projection of the last decoder layer, or
            "v_weight", that projection's own weight. In a fused projection only the values' part counts.
        rank, alpha: r and α of the fresh LoRA (as released: 81 and 16).
        seed: of its A matrix, drawn as PEFT draws it (Kaiming-uniform with a = √5).
    """

    def __init__(self, model: nn.Module, phi: str = "v_lora_b", rank: int = 81, alpha: int = 16, seed: int = 42):
        model.requires_grad_(False).eval()
        self.model, self.phi = unwrap(model), phi
        self.values = find_value_projection(model)
        self.lora_a, self.scaling = None, alpha / rank
        if phi == "v_lora_b":
            bound = 1 / math.sqrt(self.values.input_width)
            uniform = torch.rand((rank, self.values.input_width), generator=torch.Generator().manual_seed(seed))
            self.lora_a = ((2 * uniform - 1) * bound).to(self.device)  # (r, d_in)

    @property
    def device(self) -> torch.device:
        return self.values.weight.device

    def score(self, input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> SampleScores:
        """Score a batch of tokenised samples (labels as LLaMA-Factory makes them, −100 where there is no loss)."""
        tokens, targets = _pad(input_ids, 0, self.device), _pad(labels, IGNORED_LABEL, self.device)  # (B, T)
        sample, position = (targets[:, 1:] != IGNORED_LABEL).nonzero(as_tuple=True)  # (n,) each
        count = torch.bincount(sample, minlength=len(tokens))  # (B,) response tokens

        inputs, values, hidden = self._forward_to(tokens)
        token_loss, head_gradient = self._head(hidden.detach()[sample, position], targets[sample, position + 1])
        hidden_gradient = torch.zeros_like(hidden)
        hidden_gradient[sample, position] = head_gradient
        # Of the SUM of the token losses: one pass for all samples, each norm then divided by its own count.
        (gradient,) = torch.autograd.grad(hidden, values, hidden_gradient)
        norms = self._norms(inputs, gradient) / count
        loss = torch.zeros(len(tokens), device=self.device).index_add_(0, sample, token_loss) / count
        return SampleScores(*torch.stack([loss, norms]).double().cpu())

    def _forward_to(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The value projection's input (B, T, d_in) and output (B, T, d_out), and the last hidden state (B, T, d).

        The output is made the leaf of the graph: with every weight frozen, nothing below it is kept. Right padding
        under causal attention needs no mask.
        """
        seen = []

        def hook(module, inputs, output):
            seen.extend((inputs[0].detach(), output.detach().requires_grad_()))
            return seen[1]

        handle = self.values.module.register_forward_hook(hook)
        try:
            with torch.enable_grad():
                hidden = self.model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        finally:
            handle.remove()
        return *seen, hidden

    def _head(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of each response token (n,) float32, and its gradient on the hidden state (n, d)."""
        losses, gradients = [], []
        for rows, labels in _chunks(self.model, hidden, targets):
            rows = rows.detach().requires_grad_()
            with torch.enable_grad():
                logits = _logits(self.model, rows)
            scores = logits.detach().float()
            losses.append(functional.cross_entropy(scores, labels, reduction="none"))
            gradient = scores.softmax(-1)  # softmax − onehot, the gradient of the loss on the logits
            gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
            gradients.append(torch.autograd.grad(logits, rows, gradient.to(logits.dtype))[0])
        return torch.cat(losses), torch.cat(gradients)

    def _norms(self, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Per-sample norms (B,) of ∇_φ of the summed loss, accumulated in float32."""
        if self.values.value_columns is not None:
            gradient = gradient[..., self.values.value_columns.to(gradient.device)]
        inputs, gradient = inputs.float(), gradient.float()
        if self.lora_a is not None:  # ∇_B = (α/r) Σ_t g_t (A x_t)ᵀ
            projected = functional.linear(inputs, self.lora_a)  # (B, T, r)
            return self.scaling * torch.einsum("bto,btr->bor", gradient, projected).flatten(1).norm(dim=1)
        return torch.stack([(g.T @ x).norm() for g, x in zip(gradient, inputs, strict=True)])  # ∇_W = Σ_t g_t x_tᵀ


@torch.no_grad()
def response_losses(
    model: nn.Module, input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Mean cross-entropy per response token of each sample (B,): a forward pass and nothing else."""
    model = unwrap(model)
    tokens, targets = _pad(input_ids, 0, model.device), _pad(labels, IGNORED_LABEL, model.device)
    sample, position = (targets[:, 1:] != IGNORED_LABEL).nonzero(as_tuple=True)
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[sample, position]
    losses = [
        functional.cross_entropy(_logits(model, rows).float(), labels, reduction="none")
        for rows, labels in _chunks(model, hidden, targets[sample, position + 1])
    ]
    total = torch.zeros(len(tokens), device=tokens.device).index_add_(0, sample, torch.cat(losses))
    return total / torch.bincount(sample, minlength=len(tokens))


def _chunks(model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor):
    """Pieces of (n, d) hidden states and (n,) targets whose logits fit `_LOGITS_AT_ONCE`."""
    rows = max(1, _LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    return zip(hidden.split(rows), targets.split(rows), strict=True)


class _Hidden(BaseModelOutputWithPast):
    """A decoder's answer in which everything but the last hidden state is None, whatever the family asks for."""

    def __getattr__(self, name: str) -> None:
        return None


def _logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """The model's own way from last hidden states (n, d) to logits (n, V): head, scaling, soft-capping and all.

    The model runs with its decoder answering `hidden`, so nothing about its head has to be known here.
    """
    decoder = model.get_decoder()
    decoder.forward = lambda *args, **kwargs: _Hidden(last_hidden_state=hidden[None])
    try:
        return model(inputs_embeds=hidden[None], use_cache=False).logits[0]
    finally:
        del decoder.forward


def _pad(rows: Sequence[Sequence[int]], filler: int, device: torch.device) -> torch.Tensor:
    """Right-pad to the longest: (B, T) int64."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], dtype=torch.long, device=device)


def plan_batches(rows: Sequence[int], lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Cut `rows` into batches of similar length, the longest first (so memory's peak shows at once).

    A batch holds at most `tokens_per_batch` tokens, padding included, but at least one sample.
    """
    batches: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens_per_batch:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
