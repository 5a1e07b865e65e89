"""Score a batch in as many pieces as the device's memory asks for."""

import gc
from collections.abc import Sequence

import torch

from selection.method.effort import EffortScorer, plan_batches
from selection.run.device import out_of_memory
from selection.run.errors import UserError, refusals
from selection.run.log import say


def score_within_memory(
    scorer: EffortScorer, input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """`scorer.score`, in smaller batches where its device's memory does not hold this one; `names` say what each is.

    Out of memory, the token budget is halved for this batch and all that follow. A score does not depend on the other
    samples, but its last bits depend on the batch's shape: kernels sum up in another order. (Under quantization_bit 8
    it is more than the last bits: see TOLERANCE in self_test.py.)
    Raises: UserError where one sample alone does not fit.
    """
    lengths, pieces, order = [len(ids) for ids in input_ids], [], []
    pending = plan_batches(range(len(lengths)), lengths, scorer.largest_batch)
    while pending:
        batch, piece = pending[0], None
        try:
            with refusals():
                piece = scorer.score([input_ids[i] for i in batch], [labels[i] for i in batch])
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        # Only here is the failed pass's memory free: within the clause above the traceback holds its tensors.
        if piece is not None:
            pieces.append(piece)
            order += pending.pop(0)
            continue
        scorer.table = None
        gc.collect()
        torch.cuda.empty_cache()
        longest = lengths[batch[0]]
        if len(batch) == 1:
            raise UserError(
                f"out of memory on {names[batch[0]]}, {longest} tokens, scored alone: lower cutoff_len, or, if this is "
                "the target, give selection.device_map auto or selection.quantization_bit"
            )
        scorer.largest_batch = min(scorer.largest_batch, len(batch) * longest) // 2
        say(f"out of memory: batches of at most {scorer.largest_batch} tokens from here on")
        pending = plan_batches([i for batch in pending for i in batch], lengths, scorer.largest_batch)
    back = torch.tensor(order).argsort()
    return {name: torch.cat([piece[name] for piece in pieces])[back] for name in pieces[0]}
