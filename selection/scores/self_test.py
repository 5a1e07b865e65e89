"""Check a run's scorer on its first rows against plain autograd, one sample at a time."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional

from selection.method.effort import IGNORED_LABEL, IN_FOURS, EffortScorer
from selection.method.phi import LinearMap, device_of
from selection.method.reference import effort_score
from selection.run.device import out_of_memory
from selection.run.errors import UserError
from selection.run.log import say
from selection.scores.within_memory import score_within_memory

# The largest relative difference that comes from the number format alone, and what to do beyond it. In fp32 softmax − 1
# of a sample known by heart cancels. LLM.int8 rounds by the outliers of the batch: SmolLM2's scores move by 2 to 12 %.
TOLERANCE = {
    "fp32": (1e-4, "please report this model"),
    "bf16": (0.1, "score in fp32 (selection.precision)"),
    "8 bit": (0.3, "score without selection.quantization_bit"),
}


def self_test(
    scorer: EffortScorer, input_ids: Sequence, labels: Sequence, names: Sequence[str], precision: str
) -> float:
    """Score tokenised samples in batches and one by one, and say how far they agree; `names` say what each sample is.

    Returns the largest difference of effort or loss, relative to the sample's own or to the median of all, whichever is
    larger. Raises: UserError where it exceeds TOLERANCE[precision]."""
    scores = score_within_memory(scorer, input_ids, labels, names)
    batched = torch.stack([scores["effort"], scores["loss"]], 1)  # (n, 2)
    skip = "skip the test with --self_test 0"
    try:
        plain = plain_scores(scorer, input_ids, labels)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"self-test: out of memory on one sample by plain autograd: {skip}") from None
    # A sample that is not finite either way is no failure: scoring leaves it out and says so.
    known = batched.isfinite().all(1) | plain.isfinite().all(1)
    floor = plain[known].median(0).values if known.any() else plain.new_zeros(2)
    difference = (batched - plain).abs() / torch.maximum(plain, floor.clamp(min=1e-30))
    difference[~known] = 0
    allowed, advice = TOLERANCE[precision]
    if not (difference <= allowed).all():  # NaN too
        i, column = divmod(int(difference.nan_to_num(torch.inf).argmax()), 2)
        raise UserError(
            f"self-test: {names[i]} has {('effort', 'loss')[column]} {batched[i, column]:.7g} in a batch and "
            f"{plain[i, column]:.7g} by plain autograd, a relative difference of {difference[i, column]:.2g} where "
            f"{precision} allows {allowed:g}: {advice}, or {skip}"
        )
    worst, count = float(difference.max()), len(names)
    say(f"self-test: {count} samples in a batch and one by one agree to {worst:.2g} ({precision} allows {allowed:g})")
    return worst


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
    """φ as tensors that require a gradient: where no whole weight is at hand, zeros whose product joins the output."""
    a, undo = scorer.lora_a, contextlib.ExitStack()

    def parameter(each: LinearMap) -> torch.Tensor:
        if a is None and each.columns is None and each.weight_at_hand:
            return each.weight
        wide, high = each.width
        where = device_of(each.module)
        columns = torch.arange(high, device=where) if each.columns is None else each.columns
        zero = torch.zeros((len(columns), wide if a is None else len(a)), device=where)

        def add(module, inputs, output):
            x = inputs[0].float() if a is None else scorer.lora_scaling * functional.linear(inputs[0].float(), a)
            return output.index_add(-1, columns, functional.linear(x, zero).to(output.dtype))

        undo.callback(each.module.register_forward_hook(add).remove)
        return zero

    with undo:
        parameters = [*map(parameter, scorer.phi.maps), *scorer.phi.others.values()]
        for layer, adapter in scorer.phi.loras.values():
            parameters += [layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
        for each in parameters:
            undo.callback(each.requires_grad_(True).requires_grad_, False)
        yield parameters
