"""What a GPU would refuse or wait for, without one: scoring on a device of torch's that has no numbers.

Fake tensors know their shape and their device alone. An operation on tensors of two devices raises, and so does all for
which a program would have to wait for the device: `.item()`, a branch on a value, a shape that depends on values.
(torch's CPU build cannot index fake tensors on "cuda", so the device is one that a library may register.)
"""

import json
import os
import subprocess
import sys
import traceback
from dataclasses import replace

import pytest
import torch
from conftest import REPOSITORY
from test_effort import ARCHITECTURES, PHIS, make_model, make_samples, with_tuned_adapter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selection.method.effort import EffortScorer, _Batch, response_losses

DEVICE = "fakegpu"
SIMILAR = ("llama", "gemma", "mistral", "qwen2", "qwen3", "smollm3")  # to "llama-tied-head" and to others below
# Falcon and gpt-oss make a mask by torch.vmap, which needs a device with kernels; JetMoE's experts wait for the host.
LEFT_OUT = (*SIMILAR, "falcon-fused", "gpt-oss-attention-sinks", "jetmoe-query-in-experts")
NAMES = [name for name in ARCHITECTURES if name not in LEFT_OUT]
# The shapes of torch's grouped product are known for bf16 alone.
IN_BF16 = ("mixtral", "qwen2-moe-shared-expert", "phimoe-router-answers-a-tuple")


class ToTheHost(TorchDispatchMode):
    """Notes the operations that bring a tensor from the device to the CPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        answer = operation(*args, **(kwargs or {}))
        if DEVICE in _devices((args, kwargs)) and "cpu" in _devices(answer):
            self.seen.append(str(operation))
        return answer


def _devices(values) -> set[str]:
    return {value.device.type for value in tree_leaves(values) if isinstance(value, torch.Tensor)}


def move_to_device(scorer: EffortScorer, fake: FakeTensorMode) -> None:
    """The model and what the scorer keeps of it; tied weights stay tied."""
    device, there = torch.device(DEVICE, 0), {}

    def moved(tensor):
        if tensor is not None and id(tensor) not in there:
            value = fake.from_tensor(tensor.detach()).to(device)
            parameter = isinstance(tensor, torch.nn.Parameter)
            there[id(tensor)] = torch.nn.Parameter(value, requires_grad=False) if parameter else value, tensor
        return None if tensor is None else there[id(tensor)][0]

    for module in scorer.model.modules():
        for kept in (module._parameters, module._buffers):
            kept.update({key: moved(tensor) for key, tensor in kept.items()})
    maps = [replace(each, columns=moved(each.columns)) for each in scorer.phi.maps]
    scorer.phi = replace(scorer.phi, maps=maps, others={key: moved(value) for key, value in scorer.phi.others.items()})
    scorer.lora_a, scorer.device = moved(scorer.lora_a), device


def score_there(name: str, phi: str) -> None:
    """One copy to the host a batch, none for the losses alone, and nothing that the fake tensors refuse."""
    model = make_model(name)
    model = with_tuned_adapter(model) if phi == "all_lora" else model
    model = model.to(torch.bfloat16) if name in IN_BF16 else model
    scorer = EffortScorer(model, phi, columns=("el2n", "el2n_released", "entropy", "hidden_state"))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        move_to_device(scorer, fake)
        with ToTheHost() as copies:
            scores = scorer.score(*make_samples())
        assert copies.seen == ["aten._to_copy.default"], f"copies to the host: {copies.seen}"
        assert _devices(scores) == {"cpu"}
        with ToTheHost() as copies:
            assert _devices(response_losses(model, *make_samples())) == {DEVICE}
        assert copies.seen == [], f"copies to the host: {copies.seen}"


# Mistakes in what the scorer sums by sample, and what these tests say then.
MISTAKES = {
    "a tensor that stays on the CPU": (lambda sums: sums + torch.ones(4), "FakeTensorDeviceMismatchError"),
    "a number that is waited for": (lambda sums: sums / sums.sum().item(), "DataDependentOutputException"),
    "a shape that depends on values": (lambda sums: sums[sums > 0], "DynamicOutputShapeException"),
    "a branch on a value": (lambda sums: sums if sums.sum() > 0 else -sums, "DataDependentOutputException"),
    "one more copy": (lambda sums: sums.cpu().to(sums.device), "AssertionError: copies to the host: "),
}


def main() -> None:
    """In a process of its own, as a device once registered stays: the traceback of every case, "" where it passes."""
    backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    said, per_sample = {}, _Batch.per_sample
    cases = [(f"{name} {phi}", lambda sums: sums, name, phi) for name in NAMES for phi in PHIS]
    cases += [(case, mistake, "llama", "v_lora_b") for case, (mistake, _) in MISTAKES.items()]
    for case, mistake, name, phi in cases:
        _Batch.per_sample = lambda self, values, mistake=mistake: mistake(per_sample(self, values))
        try:
            score_there(name, phi)
            said[case] = ""
        except Exception:
            said[case] = traceback.format_exc()
    print(json.dumps(said))


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("name", NAMES)
def test_scoring_stays_on_its_device_and_copies_once_a_batch(name, phi, said):
    assert said[f"{name} {phi}"] == ""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_be_found(mistake, said):
    assert MISTAKES[mistake][1] in said[mistake].splitlines()[-1]


if __name__ == "__main__":
    main()
