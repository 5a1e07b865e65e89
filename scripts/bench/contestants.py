"""The suite's scorer and other ways to the same per-sample gradient norms, for scripts/bench/scoring.py.

Other packages run as their users write it: all logits, transformers' own choice of attention.
"""

from collections.abc import Callable
from functools import partial
from operator import itemgetter

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from selection.method.effort import IGNORED_LABEL, EffortScorer, response_losses
from selection.method.phi import unwrap
from selection.run.device import device
from selection.run.errors import UserError
from selection.scores.models import load_for_scoring

RANK, ALPHA, SEED = 81, 16, 42  # of v_lora_b, as released
Score = Callable[[list, list], tuple[torch.Tensor | None, torch.Tensor]]  # ids and labels -> norms (B,), losses (B,)


def load(folder: str, dtype: str, phi: str) -> nn.Module:
    """The model on its device; under all_lora with the LoRA that is φ, B not zero so that A has a gradient."""
    torch.manual_seed(SEED)
    model = load_for_scoring(folder, None, dtype)
    if phi == "all_lora":
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # drawn in fp32 for every dtype: norms can be compared
                parameter.data.copy_(torch.randn(parameter.shape).mul_(0.02))
    return model.requires_grad_(False).eval()


def with_phi(model: nn.Module, phi: str, lora_everywhere: bool = False) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The model and φ's parameters by name in it: nothing else requires a gradient.

    v_lora_b: PEFT's LoRA on the last value projection, or on every query and value projection (`lora_everywhere`). The
    last A is the suite's, so that norms can be compared."""
    last = ""
    if phi == "v_lora_b":
        scorer = EffortScorer(model, phi, RANK, ALPHA, SEED)
        if scorer.phi.maps[0].columns is not None:
            raise UserError("a fused projection: its values alone are the suite's φ, which peers cannot single out")
        last = next(name for name, module in model.named_modules() if module is scorer.phi.maps[0].module)
        targets = None if lora_everywhere else [last]  # None: PEFT's own choice, query and value projections
        fresh = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
        model = get_peft_model(model, fresh, autocast_adapter_dtype=False)
        model.get_base_model().get_submodule(last).lora_A["default"].weight.data.copy_(scorer.lora_a)
    wanted = f"{last}.lora_B" if last else "lora_"
    model.requires_grad_(False).eval()
    return model, {name: p.requires_grad_(True) for name, p in model.named_parameters() if wanted in name}


def _padded(rows: list[list[int]], filler: int = IGNORED_LABEL) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filler).to(device())


def _mean_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (B,) of the response tokens; logits (B, T, V), targets (B, T)."""
    targets = targets[:, 1:]
    token_loss = functional.cross_entropy(logits[:, :-1].float().mT, targets, reduction="none")  # −100: 0
    return token_loss.sum(1) / (targets != IGNORED_LABEL).sum(1)


def _sample_norms(gradients) -> torch.Tensor:
    """Norms (B,) over φ of per-sample gradients, (B, …) for each parameter."""
    return torch.stack([g.flatten(1).float().norm(dim=1) for g in gradients]).norm(dim=0)


def _suite(model: nn.Module, phi: str) -> Score:
    scorer = EffortScorer(model, phi, RANK, ALPHA, SEED)
    return lambda ids, labels: itemgetter("effort", "loss")(scorer.score(ids, labels))


def _bound(model: nn.Module, phi: str) -> Score:
    """The suite's forward pass alone: nothing requires a gradient."""
    return lambda ids, labels: (None, response_losses(model, ids, labels))


def _forward_backward(model: nn.Module, phi: str) -> Score:
    """The suite's forward pass and a plain backward pass down to the embeddings, no norms."""
    unwrap(model).enable_input_require_grads()

    def score(ids, labels):
        losses = response_losses(model, ids, labels)
        losses.sum().backward()
        return None, losses.detach()

    return score


def _loop(model: nn.Module, phi: str, released: bool = False) -> Score:
    """Plain autograd of one sample: the model's own loss, one backward pass, one norm.

    `released`: as in the published code, a LoRA on every query and value projection and two backward passes, whose
    gradients add up (halved here). Only the last B requires a gradient: the fastest reading of that code."""
    model, parameters = with_phi(model, phi, lora_everywhere=released)

    def score(ids, labels):
        model.zero_grad()
        loss = model(input_ids=_padded(ids, 0), labels=_padded(labels), use_cache=False).loss
        if released:
            loss.backward(retain_graph=True)
        loss.backward()
        norms = _sample_norms(p.grad[None] for p in parameters.values())
        return norms / (2 if released else 1), loss.detach()[None]

    return score


def _func(model: nn.Module, phi: str) -> Score:
    """torch.func: the gradient of one sample's loss, vectorised over the batch."""
    model, parameters = with_phi(model, phi)
    parameters = {name: parameter.detach() for name, parameter in parameters.items()}

    def loss_of_one(phi_values, tokens, targets):
        inputs = {"input_ids": tokens[None], "use_cache": False}
        return _mean_losses(torch.func.functional_call(model, phi_values, (), inputs).logits, targets[None])[0]

    per_sample = torch.func.vmap(torch.func.grad_and_value(loss_of_one), in_dims=(None, 0, 0))

    def score(ids, labels):
        with sdpa_kernel(SDPBackend.MATH):  # vmap would run the fused kernels a sample at a time
            gradients, losses = per_sample(parameters, _padded(ids, 0), _padded(labels))
        return _sample_norms(gradients.values()), losses

    return score


def _opacus(model: nn.Module, phi: str, ghost: bool = False) -> Score:
    """Opacus' hooks make per-sample gradients; its `ghost` hooks norms alone, from T × T products of tokens."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping

    model, parameters = with_phi(model, phi)
    for name in parameters:
        model.get_submodule(name.removesuffix(".weight")).train()  # Opacus wants it; a linear map does not change
    hooked = (GradSampleModuleFastGradientClipping if ghost else GradSampleModule)(model, loss_reduction="sum")

    def score(ids, labels):
        losses = _mean_losses(hooked(input_ids=_padded(ids, 0), use_cache=False).logits, _padded(labels))
        losses.sum().backward()
        norms = hooked.get_norm_sample() if ghost else _sample_norms(p.grad_sample for p in parameters.values())
        hooked.zero_grad()
        return norms, losses.detach()

    return score


def _bergson(model: nn.Module, phi: str) -> Score:
    """Bergson's hooks and forward-backward pass, unprojected and unnormalised. Keeps norms alone, which is faster than
    Bergson's own collectors: they copy gradients to the CPU."""
    from bergson import IndexConfig
    from bergson.collector.collector import HookCollectorBase, fwd_bwd_factory
    from bergson.data import pad_and_tensor

    class Norms(HookCollectorBase):
        def setup(self):
            self.of_modules = []

        def backward_hook(self, module, g):
            self.of_modules.append(self._compute_gradient(module, g).float().norm(dim=1))

        def process_batch(self, *args, **kwargs): ...

        teardown = process_batch

    model, parameters = with_phi(model, phi)
    unwrap(model).config.use_cache = False
    forward_backward = fwd_bwd_factory(IndexConfig(run_path="unused", loss_reduction="mean"))
    collector = Norms(model=model, target_modules={name.removesuffix(".weight") for name in parameters})

    def score(ids, labels):
        tokens, targets, _, real = pad_and_tensor(ids, labels=labels, device=device())
        collector.of_modules.clear()
        with collector.with_batch(real):
            losses = forward_backward(model, tokens, targets, {})
        return torch.stack(collector.of_modules).norm(dim=0), losses.detach()

    return score


# Each gets the model and φ, and returns the function that scores a batch.
CONTESTANTS: dict[str, Callable[[nn.Module, str], Score]] = {
    "suite": _suite,
    "bound": _bound,
    "forward_backward": _forward_backward,
    "loop": _loop,
    "released": partial(_loop, released=True),
    "func": _func,
    "opacus": _opacus,
    "opacus_ghost": partial(_opacus, ghost=True),
    "bergson": _bergson,
}
