"""The effort score S_d = ‖∇_φ L(θ; d)‖₂ (see reference.py), for a batch of samples at once and exact for each of them.

Every weight is frozen: the forward pass keeps nothing below φ, and the backward pass ends there. Each sample's gradient
norm comes from the inputs and output gradients of φ's linear maps (norms.py).
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from selection.method import norms
from selection.method.phi import NoPhi, decoder_of, device_of, find_phi, unwrap

IGNORED_LABEL = -100
# The head gets its rows in fours: a CPU adds up one to three left-over rows in sequence, which over a vocabulary of
# 49,152 leaves four digits.
IN_FOURS = 4
_LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**27}  # numbers of a chunk of logits; a GPU needs more rows to be busy
# On a CPU composed attention is faster than fused up to this length (bf16, 90 tokens, with the backward pass: 4 times).
_COMPOSED_ATTENTION_UP_TO = 256
_Tokens = Sequence[Sequence[int]]


class EffortScorer:
    """Scores batches on one model. The model is frozen and put into eval mode; its weights stay as they are.

    Args:
        phi: "v_lora_b", the B matrix (zero) of a fresh LoRA on the value projection of the last decoder layer;
            "v_weight", that projection's own weight; "last_layer", every weight matrix of the last decoder layer;
            "all_lora", every A and B of the model's LoRA. In a fused projection "v_…" means the part of the values.
        rank, alpha: r and α of the fresh LoRA (as released: 81 and 16).
        seed: of its A matrix, drawn as PEFT draws it (Kaiming-uniform with a = √5).
        columns: names of what else to return: "el2n", "el2n_released", "entropy", "hidden_state".
    Raises: NoPhi, a ValueError, where the model has no such φ."""

    def __init__(
        self, model: nn.Module, phi: str = "v_lora_b", rank: int = 81, alpha: int = 16, seed: int = 42, columns=()
    ):
        model.requires_grad_(False).eval()
        self.model, self.columns = unwrap(model), columns
        self.phi, self.lora_a, self.lora_scaling = find_phi(model, phi), None, alpha / rank
        self.device = device_of(self.model.get_input_embeddings())  # tokens start here
        self.largest_batch = math.inf  # padded tokens that fit: selection/scores/within_memory.py lowers it
        self.table: torch.Tensor | None = None  # (n, V), see `_head`
        if phi == "v_lora_b":
            width, _ = self.phi.maps[0].width
            uniform = torch.rand((rank, width), generator=torch.Generator().manual_seed(seed))
            self.lora_a = ((2 * uniform - 1) / math.sqrt(width)).to(device_of(self.phi.maps[0].module))  # (r, d_in)

    def score(self, input_ids: _Tokens, labels: _Tokens) -> dict[str, torch.Tensor]:
        """Score a batch of tokenised samples (labels as LLaMA-Factory makes them, −100 where there is no loss).

        Returns, on the CPU: effort (B,) and loss (B,) in nats, float64; and where asked
            el2n (B,): ‖softmax(logits) − onehot‖₂, mean over the response tokens (published);
            el2n_released (B,): root mean square, over response tokens and vocabulary, of the raw logits AT a response
                token against the one-hot of that token itself (unshifted, as released);
            entropy (B,) of the predicted distribution in nats, mean over the response tokens;
            hidden_state (B, d) float32: mean last hidden state of the response tokens.
        Raises: NoPhi where the norms of single samples cannot be told apart."""
        batch = _Batch.of(input_ids, labels, self.device, unshifted="el2n_released" in self.columns)
        return self._pass(batch) or self._pass(batch)  # None: it moved a weight to `others`

    def _pass(self, batch: "_Batch") -> dict[str, torch.Tensor] | None:
        squares = torch.zeros(len(batch.tokens), device=self.device)
        with self._listening(squares, batch.tokens.shape[1]) as ends:
            hidden = _last_hidden_state(self.model, batch.tokens)  # (B, T, d)
            if self._set_aside(hidden):
                return None
            batch = batch.to(hidden.device)  # the last layer's, where a model lies on several
            by_token, head_gradient = self._head(hidden.detach().flatten(0, 1)[batch.head_rows], batch)
            gradient = torch.zeros_like(hidden)
            gradient.flatten(0, 1)[batch.head_rows] = head_gradient
            # Gradients of the SUM of the token losses; each sample's norm is divided by its own count below.
            others = self._squares_of_others(hidden, gradient)
            squares.zero_()  # the passes for the others may have added to it
            if ends:
                torch.autograd.grad(hidden, ends, gradient, allow_unused=True)  # fills `squares`

        means = {name: batch.per_sample(values) / batch.counts for name, values in by_token.items()}
        means["effort"] = (squares.to(hidden.device) + others).sqrt() / batch.counts
        of_response = (batch.labels != IGNORED_LABEL).float()  # (B, T)
        own_counts = of_response.sum(1)
        if "el2n_released" in means:
            means["el2n_released"] = (means["el2n_released"] * batch.counts / own_counts).sqrt()
        columns = [torch.stack(list(means.values()), 1)]  # (B, number of means)
        if "hidden_state" in self.columns:
            columns.append(torch.einsum("bt,btd->bd", of_response, hidden.detach().float()) / own_counts[:, None])
        on_cpu = torch.cat(columns, 1).cpu()  # the only transfer from the device
        scores = {name: on_cpu[:, i].double() for i, name in enumerate(means)}
        return scores | ({"hidden_state": on_cpu[:, len(means) :]} if "hidden_state" in self.columns else {})

    @contextlib.contextmanager
    def _listening(self, squares: torch.Tensor, length: int) -> Iterator[list[torch.Tensor]]:
        """Let φ add its squared norms to `squares` (B,) in the backward pass; yields the tensors where that ends."""
        ends: list[torch.Tensor] = []
        with contextlib.ExitStack() as stack:
            # After `enable_input_require_grads` everything above the embeddings would be kept.
            embeddings = self.model.get_input_embeddings()
            stack.callback(embeddings.register_forward_hook(lambda module, inputs, output: output.detach()).remove)
            # ∇_B = (α/r) Σ_t g_t (A x_t)ᵀ
            fresh = None if self.lora_a is None else lambda x: self.lora_scaling * functional.linear(x, self.lora_a)
            for each in self.phi.maps:
                record = norms.Recorder(each.name, squares, length)
                norms.listen_to_linear(each, record, ends, stack, fresh, always_end=bool(self.phi.others))
            if self.phi.loras:
                ends.append(torch.zeros((), device=self.device, requires_grad=True))
            for name, (layer, adapter) in self.phi.loras.items():
                norms.listen_to_lora(layer, adapter, norms.Recorder(name, squares, length), ends[0], stack)
            for other in self.phi.others.values():
                stack.callback(other.requires_grad_, False)
                other.requires_grad_(True)
            stack.enter_context(torch.enable_grad())
            yield ends

    def _set_aside(self, hidden: torch.Tensor) -> bool:
        """Move to `others` the maps whose weight was used outside their call (DeepSeek-V2's router); True if any."""
        if self.lora_a is not None or not self.phi.maps:
            return False
        in_graph = norms.weights_in_graph(hidden)
        aside = [each for each in self.phi.maps if id(each.weight) in in_graph]
        for each in aside:
            if each.columns is not None:
                raise NoPhi(f"{each.name} is used twice in one pass, and only a part of it is φ: take another phi")
            self.phi.maps.remove(each)
            self.phi.others[each.name] = each.weight
        return bool(aside)

    def _head(self, hidden: torch.Tensor, batch: "_Batch") -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Loss and columns by head row, (n,) float32, 0 where one does not apply; the loss gradient on `hidden` (n, d).

        One float32 table, kept from batch to batch, holds logits, log-probabilities, probabilities and their gradient
        in turn: fresh memory of that size costs more than what is computed in it."""
        count, figures, gradients = len(hidden), [], []
        for rows, targets, own in _chunks(self.model, hidden, batch.targets, batch.own):
            rows = rows.detach().requires_grad_()
            with torch.enable_grad():
                logits = _logits(self.model, rows)
            if self.table is None or len(self.table) < len(rows):
                self.table = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
            scores = self.table[: len(rows)]
            raw = logits.detach() if logits.dtype == torch.float32 else scores.copy_(logits.detach())
            predicts = (targets != IGNORED_LABEL).float()
            target, own_token = targets.clamp(min=0)[:, None], own.clamp(min=0)[:, None]
            figure = {}
            if "el2n_released" in self.columns:
                squared = norms.sum_of_squares(raw, -1) - 2 * raw.gather(1, own_token).squeeze(1) + 1
                figure["el2n_released"] = squared / scores.shape[1] * (own != IGNORED_LABEL)
            torch.log_softmax(raw, -1, out=scores)
            loss = -scores.gather(1, target).squeeze(1)
            figure["loss"] = loss * predicts
            scores.exp_()
            if "entropy" in self.columns:
                figure["entropy"] = torch.special.entr(scores).sum(-1) * predicts
            scores.scatter_(1, target, torch.expm1(-loss)[:, None])  # softmax − onehot, the gradient on the logits
            if "el2n" in self.columns:
                figure["el2n"] = norms.sum_of_squares(scores, -1).sqrt() * predicts
            if "el2n_released" in self.columns:  # only then is there a row without a token to predict
                scores.mul_(predicts[:, None])
            gradients.append(torch.autograd.grad(logits, rows, scores.to(logits.dtype))[0])
            figures.append(figure)
        by_token = {name: torch.cat([figure[name] for figure in figures])[:count] for name in figures[0]}
        return by_token, torch.cat(gradients)[:count]

    def _squares_of_others(self, hidden: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Squared norms (B,) of φ outside linear maps: nothing tells samples apart but a backward pass for each."""
        squares, others = torch.zeros(len(hidden), device=gradient.device), list(self.phi.others.values())
        for sample in range(len(hidden) if others else 0):
            alone = torch.zeros_like(gradient)
            alone[sample] = gradient[sample]
            for part in torch.autograd.grad(hidden, others, alone, retain_graph=True, allow_unused=True):
                squares[sample] += 0 if part is None else norms.sum_of_squares(part).to(gradient.device)
        return squares


def token_losses(model: nn.Module, input_ids: _Tokens, labels: _Tokens) -> torch.Tensor:
    """Cross-entropy (B, T) in nats of each response token, at the place that predicts it, else 0."""
    batch, losses = _losses(model, input_ids, labels)
    return batch.by_place(losses)


def response_losses(model: nn.Module, input_ids: _Tokens, labels: _Tokens) -> torch.Tensor:
    """Mean cross-entropy per response token of each sample (B,), by one forward pass."""
    batch, losses = _losses(model, input_ids, labels)
    return batch.per_sample(losses) / batch.counts


def _losses(model: nn.Module, input_ids: _Tokens, labels: _Tokens) -> tuple["_Batch", torch.Tensor]:
    """The batch, and the cross-entropy (n,) of each head row in nats: a forward pass and nothing else."""
    model = unwrap(model)
    batch = _Batch.of(input_ids, labels, device_of(model.get_input_embeddings()))
    hidden = _last_hidden_state(model, batch.tokens).flatten(0, 1)
    batch = batch.to(hidden.device)
    losses = [
        functional.cross_entropy(_logits(model, rows).float(), targets, reduction="none")
        for rows, targets in _chunks(model, hidden[batch.head_rows], batch.targets)
    ]
    return batch, torch.cat(losses)[: len(batch.targets)]


@dataclass(frozen=True)
class _Batch:
    """Right-padded samples (causal attention needs no mask), and the rows of hidden states that the head reads."""

    tokens: torch.Tensor  # (B, T)
    labels: torch.Tensor  # (B, T)
    head_rows: torch.Tensor  # (n,) in the states flattened to (B·T, d)
    targets: torch.Tensor  # (n,) the next token where the loss counts it, else IGNORED_LABEL
    own: torch.Tensor  # (n,) the row's own token where it is of a response, else IGNORED_LABEL
    counts: torch.Tensor  # (B,) float32, response tokens that the loss counts

    @classmethod
    def of(cls, input_ids: _Tokens, labels: _Tokens, device: torch.device, unshifted: bool = False) -> "_Batch":
        """`unshifted`: the head reads response tokens' own rows too. On the CPU: a GPU asked for sizes has to wait."""
        shape = len(input_ids), max(map(len, input_ids))
        tokens, own, targets = np.zeros(shape, int), np.full(shape, IGNORED_LABEL), np.full(shape, IGNORED_LABEL)
        for i, (ids, label) in enumerate(zip(input_ids, labels, strict=True)):
            tokens[i, : len(ids)] = ids
            own[i, : len(label)] = label
        targets[:, :-1] = own[:, 1:]
        wanted = targets != IGNORED_LABEL
        counts = wanted.sum(1).astype(np.float32)
        if unshifted:
            wanted |= own != IGNORED_LABEL
        arrays = tokens, own, wanted.ravel().nonzero()[0], targets[wanted], own[wanted], counts
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))

    def to(self, device: torch.device) -> "_Batch":
        return _Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def by_place(self, values: torch.Tensor) -> torch.Tensor:
        """(n,) by head row, at their places (B, T); 0 elsewhere."""
        table = torch.zeros(self.tokens.shape, device=values.device)
        table.view(-1)[self.head_rows] = values
        return table

    def per_sample(self, values: torch.Tensor) -> torch.Tensor:
        """(n,) by head row, summed by sample (B,): over a dense table, as a GPU's `index_add_` has no order."""
        return self.by_place(values).sum(1)


def _last_hidden_state(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The decoder's answer (B, T, d) to tokens (B, T), with the attention that suits their length."""
    chosen = model.config._attn_implementation
    # Fused attention leaves soft-capping out, so composed attention would be another model.
    soft_capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    short = tokens.device.type == "cpu" and tokens.shape[1] <= _COMPOSED_ATTENTION_UP_TO
    composed = chosen == "sdpa" and short and not soft_capped
    if composed:
        model.set_attn_implementation("eager")
    try:
        return decoder_of(model)(input_ids=tokens, use_cache=False).last_hidden_state
    finally:
        if composed:
            model.set_attn_implementation(chosen)


def _chunks(model: nn.Module, hidden: torch.Tensor, *labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Rows of hidden states (n, d) and labels (n,) by call of the head, the last filled up with unlabelled zeros."""
    missing, vocabulary = -len(hidden) % IN_FOURS, model.config.get_text_config().vocab_size
    size = _LOGITS_AT_ONCE.get(hidden.device.type, 2**24) // vocabulary // IN_FOURS * IN_FOURS
    filled = [functional.pad(each, (0, missing), value=IGNORED_LABEL) for each in labels]
    columns = functional.pad(hidden, (0, 0, 0, missing)), *filled
    return zip(*(each.split(max(IN_FOURS, size)) for each in columns), strict=True)


class _Answer(list):
    """A decoder's answer: the last hidden state, and None for all else that a family asks for."""

    def __getattr__(self, name: str) -> torch.Tensor | None:
        return self[0] if name == "last_hidden_state" else None


def _logits(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (n, V) of `hidden` (n, d): the model is called with a decoder that answers `hidden`, whatever its head."""
    with norms.replaced_forward(decoder_of(model), lambda *args, **kwargs: _Answer([hidden[None]])):
        logits = model(inputs_embeds=hidden[None], use_cache=False).logits
    return logits.squeeze(0).to(hidden.device)  # [0] would copy in its backward; the head may lie on another device


def tokens_per_batch(phi: str, device: torch.device) -> int:
    """The default: fewer on a CPU, where more are no faster, and under all_lora, where all layers keep activations."""
    return (2048 if device.type == "cpu" else 16384) // (4 if phi == "all_lora" else 1)


def plan_batches(rows: Sequence[int], lengths: Sequence[int], tokens_per_batch: float) -> list[list[int]]:
    """Cut `rows` into batches of at most `tokens_per_batch` tokens, padding included, or one sample, longest first."""
    batches: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens_per_batch:
            batches.append([])
        batches[-1].append(row)
    return batches
