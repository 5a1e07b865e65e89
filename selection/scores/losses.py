"""Losses that other rules of the small model's price read (method/rules.py): untuned, and after each tuning pass."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from selection.method.effort import IGNORED_LABEL, EffortScorer, response_losses, token_losses
from selection.run.errors import UserError

LOSSES = ("loss_untuned", "loss_without_prompt", "loss_by_pass")


def passes_of(tuned: Path, count: float) -> list[Path]:
    """The LoRA after each of `count` passes of a tuning that kept them. Raises: UserError where it did not."""
    found = sorted(tuned.glob("checkpoint-[0-9]*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    if len(found) == math.ceil(count):  # others are those of a save_strategy of the user's own
        return found
    todo = "remove it and tune again with s2l or learning_percentage in selection.methods"
    raise UserError(f"{tuned} has not kept the model after each pass: {todo}")


class LossScorer(EffortScorer):
    """An EffortScorer whose `score` also gives, in nats a response token, float64:

        loss_untuned (B,): L0, of the model without its tuned LoRA;
        loss_without_prompt (B,): the same of the response behind an empty prompt;
        loss_by_pass (B, P), where `passes` are given: L_1 to L_P.

    Args: `model`, with or without a LoRA; `around`: `empty_turn`'s tokens; `passes`: folders of the LoRA after each."""

    def __init__(self, model: nn.Module, *phi, columns, around: tuple[list[int], list[int]], passes: Sequence[Path]):
        super().__init__(model, *phi, columns=columns)
        self.around, self.whole, self.passes = around, model, [f"pass_{number}" for number, _ in enumerate(passes, 1)]
        for name, folder in zip(self.passes, passes, strict=True):
            model.load_adapter(folder, name, autocast_adapter_dtype=False, torch_device=str(self.device))
        model.requires_grad_(False).eval()

    def score(self, input_ids, labels) -> dict[str, torch.Tensor]:
        scores = super().score(input_ids, labels)
        with torch.no_grad():
            with self._untuned():
                scores["loss_untuned"] = response_losses(self.model, input_ids, labels).double().cpu()
                alone = losses_without_prompt(self.model, labels, self.around)
                scores["loss_without_prompt"] = alone["loss_without_prompt"].cpu()
            if self.passes:
                by_pass = [self._after(name, input_ids, labels) for name in self.passes]
                scores["loss_by_pass"] = torch.stack(by_pass, 1).double().cpu()
        return scores

    @contextlib.contextmanager
    def _untuned(self) -> Iterator[None]:
        try:
            with self.whole.disable_adapter() if isinstance(self.whole, PeftModel) else contextlib.nullcontext():
                yield
        finally:  # also out of memory
            self.whole.requires_grad_(False)  # PEFT makes an adapter that it switches on trainable

    def _after(self, name: str, input_ids, labels) -> torch.Tensor:
        before = self.whole.active_adapter
        self.whole.set_adapter(name)
        try:
            return response_losses(self.model, input_ids, labels)
        finally:
            self.whole.set_adapter(before)
            self.whole.requires_grad_(False)


def losses_without_prompt(model: nn.Module, labels: Sequence, around: tuple[list[int], list[int]]) -> dict:
    """Losses of the responses behind an empty prompt, by one forward pass, in nats.

    Args: `labels` of B samples; `around`: `empty_turn`'s tokens. Returns, float64:
        loss_without_prompt (B,): mean over the response tokens;
        end_loss (B,): of the template's tokens after the response, all together."""
    before, end = around[0], max(1, len(around[1]))
    responses = [[label for label in own if label != IGNORED_LABEL] for own in labels]
    ignored = [IGNORED_LABEL] * len(before)
    losses = token_losses(model, [before + own for own in responses], [ignored + own for own in responses]).double()
    lengths = torch.tensor([len(own) for own in responses], device=losses.device)
    ends = [len(before) + len(own) - 1 for own in responses]  # the place that predicts nothing more
    end_loss = torch.stack([each[n - end : n].sum() for each, n in zip(losses, ends, strict=True)])
    return {"loss_without_prompt": losses.sum(1) / lengths, "end_loss": end_loss}
