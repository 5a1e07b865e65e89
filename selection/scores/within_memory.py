"""Score a batch in as many pieces as the device's memory asks for."""

import gc
from collections.abc import Sequence

import torch

from selection.method.effort import EffortScorer, plan_batches
from selection.run.device import out_of_memory
from selection.run.errors import UserError, refusals
from selection.run.log import say


def score_within_memory(
    scorer: EffortScorer, input_ids: Sequence, labels: Sequence, names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """`scorer.score` in batches of at most `scorer.largest_batch` tokens; `names` say what each sample is.

    Out of memory, that budget is halved from here on. A score's last bits depend on the batch's shape (under
    quantization_bit 8 more: see TOLERANCE in self_test.py). Raises: UserError where one sample does not fit."""
    lengths = [len(ids) for ids in input_ids]
    size = len(lengths) * max(lengths)
    if size <= scorer.largest_batch or len(lengths) == 1:
        try:
            with refusals():
                return scorer.score(input_ids, labels)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        # Only here is the failed pass's memory free: within the clause above the traceback holds its tensors.
        scorer.table = None
        gc.collect()
        torch.cuda.empty_cache()
        if len(lengths) == 1:
            raise UserError(
                f"out of memory on {names[0]}, {size} tokens, scored alone: lower cutoff_len, or, if this is the "
                "target, give selection.device_map auto or selection.quantization_bit"
            )
        scorer.largest_batch = size // 2
        say(f"out of memory: batches of at most {scorer.largest_batch} tokens from here on")
    parts = plan_batches(range(len(lengths)), lengths, scorer.largest_batch)
    pieces = [
        score_within_memory(scorer, *([each[i] for i in p] for each in (input_ids, labels, names))) for p in parts
    ]
    back = torch.tensor([i for part in parts for i in part]).argsort()
    return {name: torch.cat([piece[name] for piece in pieces])[back] for name in pieces[0]}
