"""The effort score taken the plain way, one sample at a time by autograd alone, and the check of a run against it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import functional

from selection.method.effort import IGNORED_LABEL, IN_FOURS, EffortScorer, plan_batches, score_within_memory
from selection.method.phi import LinearMap
from selection.run.device import out_of_memory
from selection.run.errors import UserError

# Largest difference of a score that is the number format's own noise. Parity is better than 1e-5 in fp32, but the
# gradient of a sample known by heart, softmax − 1, cancels in plain autograd too.
# LLM.int8 rounds inputs to 8 bits, but for the columns in which any sample of the batch has an outlier: a score moves
# with its batch, on SmolLM2-135M-Instruct by 2 % (median) and at most 12 %.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "8 bit": 0.3}
_ADVICE = {
    "fp32": "please report this model",
    "bf16": "score in fp32 (selection.precision)",
    "8 bit": "score without selection.quantization_bit",
}


def scores_one_by_one(
    scorer: EffortScorer, input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Effort and loss (n,) float64 of each sample: the model's own loss, one backward pass, φ's gradient, its norm."""
    efforts, losses = [], []
    with _phi_as_parameters(scorer) as (parameters, of_interest):
        for ids, label in zip(input_ids, labels, strict=True):
            missing = -len(ids) % IN_FOURS  # no token sees what stands behind it
            rows = [*ids, *[0] * missing], [*label, *[IGNORED_LABEL] * missing]
            tokens, targets = (torch.tensor([row], device=scorer.device) for row in rows)
            loss = scorer.model(input_ids=tokens, labels=targets, use_cache=False).loss
            gradients = of_interest(torch.autograd.grad(loss, parameters, allow_unused=True))
            efforts.append(sum(float(g.double().square().sum()) for g in gradients if g is not None) ** 0.5)
            losses.append(loss.item())
    return torch.tensor(efforts, dtype=torch.double), torch.tensor(losses, dtype=torch.double)


@contextlib.contextmanager
def _phi_as_parameters(scorer: EffortScorer) -> Iterator[tuple[list[torch.Tensor], Callable]]:
    """φ as tensors that require a gradient, and what of their gradients counts."""
    phi, undo = scorer.phi, contextlib.ExitStack()

    def added(linear_map: LinearMap, a: torch.Tensor | None = None, scaling: float = 1.0) -> torch.Tensor:
        """A zero matrix whose product with the map's inputs x, or with A x, is added to its output."""
        width = linear_map.input_width if a is None else len(a)
        zero = torch.zeros((linear_map.output_width, width), device=linear_map.device)

        def add(module, inputs, output):
            seen = inputs[0].float() if a is None else functional.linear(inputs[0].float(), a)
            return output + (scaling * functional.linear(seen, zero)).to(output.dtype)

        undo.enter_context(linear_map.module.register_forward_hook(add))
        return zero

    matrices = [pair.module.lora_A[pair.adapter].weight for pair in phi.loras]
    matrices += [pair.module.lora_B[pair.adapter].weight for pair in phi.loras]
    if scorer.lora_a is not None:
        parameters = [added(phi.maps[0], scorer.lora_a, scorer.lora_scaling)]
    else:
        # What is added to a quantised weight has the gradient that the weight would have as plain numbers.
        weights = [each.weight if each.weight_at_hand else added(each) for each in phi.maps]
        parameters = weights + list(phi.others.values()) + matrices
    columns = phi.maps[0].columns if phi.maps else None
    transposed = columns is not None and phi.maps[0].transposed and parameters[0] is phi.maps[0].weight

    def of_interest(gradients: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        if columns is None:
            return gradients
        (gradient,) = gradients
        return [(gradient.T if transposed else gradient)[columns]]

    with undo, torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            yield parameters, of_interest
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)


def self_test(
    scorer: EffortScorer,
    input_ids: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    names: Sequence[str],
    precision: str,
    budget: int,
) -> float:
    """Score the samples in batches of at most `budget` tokens and one by one; the largest difference of effort or loss,
    relative to the sample's own or to the median of all, whichever is larger.

    `names` say what each sample is; `precision` is a key of TOLERANCE. Raises: UserError where that is exceeded.
    """
    batches = plan_batches(range(len(names)), [len(ids) for ids in input_ids], budget)
    scores = [
        score_within_memory(
            scorer, [input_ids[i] for i in batch], [labels[i] for i in batch], [names[i] for i in batch]
        )
        for batch in batches
    ]
    order = torch.tensor([i for batch in batches for i in batch]).argsort()
    batched = {name: torch.cat([each[name] for each in scores])[order] for name in ("effort", "loss")}
    try:
        effort, loss = scores_one_by_one(scorer, input_ids, labels)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            "self-test: out of memory on one sample by plain autograd, which takes more than scoring does: "
            "skip the test with --self_test 0"
        ) from None
    worst = 0.0
    # A sample that is not finite either way is left out of the run, which says so.
    finite = [torch.isfinite(each) for each in (batched["effort"], batched["loss"], effort, loss)]
    known = (finite[0] & finite[1]) | (finite[2] & finite[3])
    names = [name for name, k in zip(names, known.tolist(), strict=True) if k]
    for what, ours, plain in (
        ("effort", batched["effort"][known], effort[known]),
        ("loss", batched["loss"][known], loss[known]),
    ):
        if not names:
            break
        difference = (ours - plain).abs() / plain.clamp(min=max(float(plain.median()), 1e-30))
        if not (difference <= TOLERANCE[precision]).all():  # NaN too
            i = int(difference.nan_to_num(torch.inf).argmax())
            raise UserError(
                f"self-test: {names[i]} has {what} {ours[i]:.7g} in a batch and {plain[i]:.7g} by plain autograd, a "
                f"relative difference of {difference[i]:.2g} where {precision} allows {TOLERANCE[precision]:g}: "
                + _ADVICE[precision]
                + ", or skip the test with --self_test 0"
            )
        worst = max(worst, float(difference.max()))
    return worst
