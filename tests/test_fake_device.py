"""What a GPU would refuse or wait for, without one: scoring on a device of torch's that has no numbers.

Fake tensors know their shape and device alone. An operation on tensors of two devices raises, and so does all for which
a program would have to wait for the device: `.item()`, a branch on a value, a shape that depends on values.
(torch's CPU build cannot index fake tensors on "cuda", so the device is one that a library may register.)
"""

import json
import os
import subprocess
import sys
import traceback
from dataclasses import replace
from functools import partial

import torch
from conftest import REPOSITORY
from test_effort import PHIS, make_model, make_samples, with_tuned_adapter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from selection.method.effort import EffortScorer, _Batch, response_losses

DEVICE = "fakegpu:0"
# Every φ on one model, and what else there is: fused projections, soft-capping, experts and their routers.
MODELS = [("llama-tied-head", phi) for phi in PHIS]
MODELS += [("phi3-fused", "v_weight"), ("gpt2-conv1d-fused", "v_lora_b"), ("gemma2-soft-capping", "v_lora_b")]
MODELS += [("qwen2-moe-shared-expert", "all_lora"), ("llama4-router-answers-a-tuple", "last_layer")]
IN_BF16 = ("qwen2-moe-shared-expert",)  # the shapes of torch's grouped product are known for bf16 alone


class ToTheHost(TorchDispatchMode):
    """Notes the operations that bring a tensor from the device to the CPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        answer = operation(*args, **(kwargs or {}))
        if _devices((args, kwargs)) & {DEVICE, "meta"} and "cpu" in _devices(answer):
            self.seen.append(str(operation))
        return answer


def _devices(values) -> set[str]:
    return {str(value.device) for value in tree_leaves(values) if isinstance(value, torch.Tensor)}


def on_one(name: str) -> str:
    return DEVICE


# The device of a module where device_map auto spreads a model over two; "meta" is another one without numbers.
SPREAD = [
    lambda name: "meta" if name.startswith(("model.layers.2", "model.norm")) else DEVICE,  # head on the first
    lambda name: "meta" if name.startswith(("model.layers.2", "model.norm", "lm_head")) else DEVICE,
]


def move_to_device(scorer: EffortScorer, fake: FakeTensorMode, place) -> None:
    """The model and what the scorer keeps of it; tied weights stay tied."""
    there = {}

    def moved(tensor, name):
        if tensor is not None and id(tensor) not in there:
            value = fake.from_tensor(tensor.detach()).to(place(name))
            parameter = isinstance(tensor, torch.nn.Parameter)
            there[id(tensor)] = torch.nn.Parameter(value, requires_grad=False) if parameter else value, tensor
        return None if tensor is None else there[id(tensor)][0]

    for name, module in scorer.model.named_modules():
        for kept in (module._parameters, module._buffers):
            kept.update({key: moved(tensor, name) for key, tensor in kept.items()})
        if name and place is not on_one:
            to = partial(torch.Tensor.to, device=place(name))
            hook = lambda module, *inputs, to=to: tree_map_only(torch.Tensor, to, inputs)  # noqa: E731
            module.register_forward_pre_hook(hook, with_kwargs=True)
    last = "model.layers.2"
    maps = [replace(each, columns=moved(each.columns, last)) for each in scorer.phi.maps]
    others = {key: moved(value, last) for key, value in scorer.phi.others.items()}
    scorer.phi = replace(scorer.phi, maps=maps, others=others)
    scorer.lora_a, scorer.device = moved(scorer.lora_a, last), torch.device(DEVICE)


def score_there(name: str, phi: str, place) -> None:
    """One copy to the host a batch, none for the losses alone, and nothing that the fake tensors refuse."""
    model, columns = make_model(name), ("el2n", "el2n_released", "entropy", "hidden_state")
    model = with_tuned_adapter(model) if phi == "all_lora" else model
    model = model.to(torch.bfloat16) if name in IN_BF16 else model
    scorer = EffortScorer(model, phi, columns=columns)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        move_to_device(scorer, fake, place)
        with ToTheHost() as copies:
            scores = scorer.score(*make_samples())
        assert copies.seen == ["aten._to_copy.default"], f"copies to the host: {copies.seen}"
        shapes = {name: tuple(values.shape) for name, values in scores.items() if values.device.type == "cpu"}
        assert shapes == dict.fromkeys(("loss", "effort", *columns), (4,)) | {"hidden_state": (4, 32)}
        with ToTheHost() as copies:
            assert _devices(response_losses(model, *make_samples())) == {place("model.norm")}
        assert copies.seen == [], f"copies to the host: {copies.seen}"


CASES = [(name, phi, on_one, lambda sums: sums, "") for name, phi in MODELS]
CASES += [("llama", phi, place, lambda sums: sums, "") for place in SPREAD for phi in PHIS[::2]]
CASES += [  # mistakes in what the scorer sums by sample, and what is said then
    ("llama", "v_lora_b", on_one, lambda sums: sums + torch.ones(4), "FakeTensorDeviceMismatchError"),
    ("llama", "v_lora_b", on_one, lambda sums: sums / sums.sum().item(), "DataDependentOutputException"),
    ("llama", "v_lora_b", on_one, lambda sums: sums[sums > 0], "DynamicOutputShapeException"),
    ("llama", "v_lora_b", on_one, lambda sums: sums.cpu().to(sums.device), "AssertionError: copies to the host: "),
]


def tracebacks() -> list[str]:
    """The traceback of every case; "" where it passes."""
    backend_registration._setup_privateuseone_for_python_backend(DEVICE.partition(":")[0])
    said, per_sample = [], _Batch.per_sample
    for *model, mistake, _ in CASES:
        _Batch.per_sample = lambda self, values, mistake=mistake: mistake(per_sample(self, values))
        try:
            score_there(*model)
            said.append("")
        except Exception:
            said.append(traceback.format_exc())
    return said


def test_scoring_stays_on_its_device_copies_once_a_batch_and_a_mistake_would_be_found():
    """In a process of its own: a device is registered before the first backward pass, and stays."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for (*_, expected), found in zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert expected in found.splitlines()[-1] if expected else found == ""


if __name__ == "__main__":
    print(json.dumps(tracebacks()))
