"""Check a run's scorer on its first rows against plain autograd, one sample at a time."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional

from selection.method.effort import IGNORED_LABEL, IN_FOURS, EffortScorer, plan_batches
from selection.method.phi import LinearMap
from selection.method.reference import effort_score
from selection.run.device import out_of_memory
from selection.run.errors import UserError
from selection.scores.within_memory import score_within_memory

# The largest relative difference that comes from the number format alone. Parity is better than 1e-5 in fp32, but the
# gradient of a sample known by heart, softmax − 1, cancels in plain autograd too. LLM.int8 rounds inputs to 8 bits,
# except for columns in which any sample of the batch has an outlier: a score moves with its batch, on
# SmolLM2-135M-Instruct by 2 % (median) and at most 12 %.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "8 bit": 0.3}
_ADVICE = {
    "fp32": "please report this model",
    "bf16": "score in fp32 (selection.precision)",
    "8 bit": "score without selection.quantization_bit",
}


def self_test(
    scorer: EffortScorer,
    input_ids: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    names: Sequence[str],
    precision: str,
    budget: int,
) -> float:
    """Score the samples in batches of at most `budget` tokens and one by one. Returns the largest difference of effort
    or loss, relative to the sample's own or to the median of all, whichever is larger.

    `names` say what each sample is; `precision` is a key of TOLERANCE. Raises: UserError where that is exceeded.
    """
    batched = torch.zeros((len(names), 2), dtype=torch.double)  # effort, loss
    for batch in plan_batches(range(len(names)), [len(ids) for ids in input_ids], budget):
        scores = score_within_memory(scorer, *([each[i] for i in batch] for each in (input_ids, labels, names)))
        batched[batch] = torch.stack([scores["effort"], scores["loss"]], 1)
    try:
        plain = plain_scores(scorer, input_ids, labels)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            "self-test: out of memory on one sample by plain autograd, which takes more than scoring does: "
            "skip the test with --self_test 0"
        ) from None
    # A sample that is finite in neither is left out of the run, which says so.
    known = (batched.isfinite().all(1) | plain.isfinite().all(1)).nonzero().flatten()
    if not len(known):
        return 0.0
    floor = plain[known].median(0).values.clamp(min=1e-30)
    difference = (batched - plain).abs() / torch.maximum(plain, floor)  # (n, 2)
    for i in known.tolist():
        for column, what in enumerate(("effort", "loss")):
            if not difference[i, column] <= TOLERANCE[precision]:  # NaN too
                raise UserError(
                    f"self-test: {names[i]} has {what} {batched[i, column]:.7g} in a batch and {plain[i, column]:.7g} "
                    f"by plain autograd, a relative difference of {difference[i, column]:.2g} where {precision} allows "
                    f"{TOLERANCE[precision]:g}: {_ADVICE[precision]}, or skip the test with --self_test 0"
                )
    return float(difference[known].max())


def plain_scores(scorer: EffortScorer, input_ids: Sequence, labels: Sequence) -> torch.Tensor:
    """Effort and loss (n, 2) float64 of each sample by `effort_score`."""
    scores = []
    with _phi_as_parameters(scorer) as parameters:
        for ids, label in zip(input_ids, labels, strict=True):
            missing = -len(ids) % IN_FOURS  # no token sees what stands behind it
            rows = [*ids, *[0] * missing], [*label, *[IGNORED_LABEL] * missing]
            tokens, targets = (torch.tensor(row, device=scorer.device) for row in rows)
            scores.append(effort_score(scorer.model, tokens, targets, parameters))
    return torch.tensor(scores, dtype=torch.double)


@contextlib.contextmanager
def _phi_as_parameters(scorer: EffortScorer) -> Iterator[list[torch.Tensor]]:
    """φ as tensors that require a gradient.

    A matrix of zeros stands in for what is no whole weight of the model (B of the fresh LoRA, a part of a fused
    projection, a quantised or offloaded weight): its product with the inputs is added to the map's output.
    """
    phi, undo = scorer.phi, contextlib.ExitStack()

    def added(each: LinearMap) -> torch.Tensor:
        a, (wide, high) = scorer.lora_a, each.width
        columns = slice(None) if each.columns is None else each.columns
        zero = torch.zeros((len(torch.arange(high)[columns]), wide if a is None else len(a)), device=each.device)

        def add(module, inputs, output):
            x = inputs[0].float()
            x = x if a is None else scorer.lora_scaling * functional.linear(x, a)
            output = output.clone()
            output[..., columns] += functional.linear(x, zero).to(output.dtype)
            return output

        undo.callback(each.module.register_forward_hook(add).remove)
        return zero

    whole = [each for each in phi.maps if scorer.lora_a is None and each.columns is None and each.weight_at_hand]
    parameters = [each.weight if each in whole else added(each) for each in phi.maps] + list(phi.others.values())
    for matrices in ("lora_A", "lora_B"):
        parameters += [getattr(pair.module, matrices)[pair.adapter].weight for pair in phi.loras]
    with undo:
        for parameter in parameters:
            parameter.requires_grad_(True)
            undo.callback(parameter.requires_grad_, False)
        yield parameters
