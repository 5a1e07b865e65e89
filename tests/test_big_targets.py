"""Targets that one device does not hold: placement on several, quantised weights, and batches that fit."""

import itertools
import weakref

import accelerate
import peft
import pytest
import torch
import transformers
from conftest import REPOSITORY
from test_effort import assert_close, autograd, make_model, make_samples, with_tuned_adapter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from transformers.utils import is_bitsandbytes_available

from selection.method.effort import EffortScorer, response_losses
from selection.method.phi import NoPhi
from selection.run.config import load_experiment
from selection.run.errors import UserError
from selection.scores import models
from selection.scores.identity import placement
from selection.scores.models import count_parameters, load_for_scoring, with_fresh_lora
from selection.scores.self_test import plain_scores, self_test
from selection.scores.within_memory import score_within_memory


def hooked(model, tmp_path):
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def offloaded(model, tmp_path):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(model, tmp_path):
    layers = next(name for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList))
    places = {name: "cpu" for name, part in model.named_modules() if not list(part.children())}
    places = {name: place for name, place in places.items() if not name.startswith(layers)}
    places |= {f"{layers}.{i}": "disk" if i else "cpu" for i in range(3)}
    return accelerate.dispatch_model(model, places, offload_dir=str(tmp_path / "offload"))


@pytest.mark.parametrize("phi", ["v_lora_b", "v_weight", "last_layer"])
@pytest.mark.parametrize("place", [hooked, offloaded, on_disk])
@pytest.mark.parametrize("name", ["llama-tied-head", "gpt2-conv1d-fused"])
def test_a_placed_model_scores_as_without_and_stays_placed(name, place, phi, tmp_path):
    ids, labels = make_samples()
    plain = EffortScorer(make_model(name), phi)
    expected, losses = plain.score(ids, labels), response_losses(plain.model, ids, labels)
    model = place(make_model(name), tmp_path)
    forwards = {key: module.__dict__.get("forward") for key, module in model.named_modules()}
    assert any(forwards.values())
    meta = {key for key, parameter in model.named_parameters() if parameter.is_meta}
    assert bool(meta) == (place is not hooked)
    scorer = EffortScorer(model, phi)
    for _ in range(2):  # the second pass finds what the first has left
        scores = scorer.score(ids, labels)
        for column in ("effort", "loss"):
            torch.testing.assert_close(scores[column], expected[column], rtol=1e-6, atol=0)
    torch.testing.assert_close(response_losses(model, ids, labels), losses, rtol=1e-6, atol=0)
    assert_close(plain_scores(scorer, ids, labels)[:, 0], expected["effort"])
    assert forwards == {key: module.__dict__.get("forward") for key, module in model.named_modules()}
    assert meta == {key for key, parameter in model.named_parameters() if parameter.is_meta}


def test_all_lora_scores_through_hooks_and_refuses_offloaded_layers(tmp_path):
    ids, labels = make_samples()
    expected = EffortScorer(with_tuned_adapter(make_model("llama")), "all_lora").score(ids, labels)["effort"]
    model = accelerate.dispatch_model(with_tuned_adapter(make_model("llama")), {"": "cpu"}, force_hooks=True)
    scorer = EffortScorer(model, "all_lora")
    for _ in range(2):
        torch.testing.assert_close(scorer.score(ids, labels)["effort"], expected, rtol=1e-6, atol=0)
    assert all("forward" in module.__dict__ for module in model.modules() if hasattr(module, "_hf_hook"))
    model = accelerate.cpu_offload(with_tuned_adapter(make_model("llama")), execution_device=torch.device("cpu"))
    with pytest.raises(NoPhi, match=r"phi all_lora: .*q_proj is offloaded .* use phi last_layer or v_lora_b"):
        EffortScorer(model, "all_lora")


@pytest.mark.parametrize("phi", ["v_lora_b", "v_weight", "last_layer", "all_lora"])
@pytest.mark.parametrize("head", ["cpu", "meta"])
def test_no_step_mixes_tensors_of_two_devices(head, phi):
    """torch's tensors without numbers, which still know their device and refuse to be mixed: the last layer and the
    final norm lie on "meta", everything before on "cpu", the head on either, as device_map auto spreads a model."""
    model = make_model("llama")
    scorer = EffortScorer(with_tuned_adapter(model) if phi == "all_lora" else model, phi)
    scorer.columns = ("el2n", "el2n_released", "entropy", "hidden_state")

    def device_for(name):
        return head if "lm_head" in name else "meta" if name.startswith(("model.layers.2", "model.norm")) else "cpu"

    def moved(values, device):
        return tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, values)

    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for name, module in scorer.model.named_modules():
            device = device_for(name)
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    value = fake.from_tensor(parameter.data).to(device)
                    module._parameters[key] = torch.nn.Parameter(value, requires_grad=False)
            if name:
                module.register_forward_pre_hook(
                    lambda module, args, kwargs, device=device: (moved(args, device), moved(kwargs, device)),
                    with_kwargs=True,
                )
        if scorer.lora_a is not None:
            scorer.lora_a = scorer.lora_a.to(scorer.phi.maps[0].device)
        scores = scorer.score(*make_samples())
        assert {name: tuple(values.shape) for name, values in scores.items()} == {
            **dict.fromkeys(("loss", "effort", "el2n", "el2n_released", "entropy"), (4,)),
            "hidden_state": (4, 32),
        }
        assert response_losses(model, *make_samples()).shape == (4,)


def test_experts_as_one_tensor_are_refused_where_offloaded(tmp_path):
    with pytest.raises(NoPhi, match=r"phi last_layer: .*layers\.2\..* is offloaded .* use phi v_lora_b"):
        EffortScorer(offloaded(make_model("mixtral"), tmp_path), "last_layer")


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "with-adapter"])
def test_device_map_auto_loads_the_same_model(adapter, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "model")
    tuned = tmp_path / "tuned" if adapter else None
    if adapter:
        with_tuned_adapter(make_model("llama")).save_pretrained(tuned)
    ids, labels = make_samples()
    expected, auto = (
        EffortScorer(load_for_scoring(str(tmp_path / "model"), tuned, "fp32", device_map=place)).score(ids, labels)
        for place in (None, "auto")
    )
    torch.testing.assert_close(auto["effort"], expected["effort"], rtol=1e-6, atol=0)


def test_weights_go_straight_to_the_gpu(monkeypatch, tmp_path):
    """No process holds the whole model in the host's memory first; what is asked of transformers and PEFT is watched,
    and then done on the CPU."""
    make_model("llama").save_pretrained(tmp_path / "model")
    with_tuned_adapter(make_model("llama")).save_pretrained(tmp_path / "tuned")
    asked = []

    def watched(name, load):
        def on_cpu(*args, **kwargs):
            asked.append((kwargs.pop("device_map", None), kwargs.pop("torch_device", None)))
            return load(*args, **kwargs)

        monkeypatch.setattr(name, on_cpu)

    watched("transformers.AutoModelForCausalLM.from_pretrained", transformers.AutoModelForCausalLM.from_pretrained)
    watched("peft.PeftModel.from_pretrained", peft.PeftModel.from_pretrained)
    gpu = torch.device("cuda", 1)
    for place, map_of_place in ((gpu, {"": gpu}), (torch.device("cpu"), None)):
        monkeypatch.setattr(models, "device", lambda place=place: place)
        load_for_scoring(str(tmp_path / "model"), tmp_path / "tuned", "fp32")
        assert asked == [(map_of_place, None), (None, str(place))]
        asked.clear()


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "a-weight-is-missing"])
def test_a_model_loaded_to_one_device_is_whole_scores_the_same_and_has_no_hooks(broken, monkeypatch, tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path / "model", state_dict=dict(list(model.state_dict().items())[broken:]))
    ids, labels = make_samples()
    monkeypatch.setattr(models, "straight_to_device", lambda: {"device_map": {"": torch.device("cpu")}})
    if broken:
        with pytest.raises(UserError, match=r"has no weights for model\.embed_tokens\.weight \(1 in all\)"):
            load_for_scoring(str(tmp_path / "model"), None, "fp32")
        return
    loaded = load_for_scoring(str(tmp_path / "model"), None, "fp32")
    assert not any(hasattr(module, "_hf_hook") for module in loaded.modules())
    assert torch.equal(
        EffortScorer(loaded).score(ids, labels)["effort"], EffortScorer(model).score(ids, labels)["effort"]
    )


def test_placement_leaves_a_gpu_room_for_batches(monkeypatch):
    monkeypatch.setattr(models, "get_max_memory", lambda: {0: 1000, 1: 2000, "cpu": 500})
    assert models._room_for_weights() == {0: 850, 1: 1700, "cpu": 500}


# --- out of memory ---------------------------------------------------------------------------------------------------


class Small(EffortScorer):
    """A scorer on a device whose memory holds batches of at most `holds` tokens, padding included."""

    holds, tried = 0, ()

    def score(self, input_ids, labels):
        size = len(input_ids) * max(map(len, input_ids))
        self.tried = [*self.tried, size]
        if size > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().score(input_ids, labels)


NO_MEMORY = [
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
]


@pytest.mark.parametrize("said", [*NO_MEMORY, None], ids=["cublas", "cudnn", "cudnn-9", "cuda", "torch-on-a-cpu"])
def test_out_of_memory_is_known_whoever_says_it(said, monkeypatch):
    ids, labels = make_samples()
    scorer, score, sizes = EffortScorer(make_model("llama")), EffortScorer.score, []

    def full_once(self, ids, labels):
        sizes.append(len(ids))
        if len(sizes) == 1:
            if said is None:
                torch.empty(2**60)
            raise RuntimeError(said)
        return score(self, ids, labels)

    monkeypatch.setattr(EffortScorer, "score", full_once)
    assert len(score_within_memory(scorer, ids, labels, "abcdefg")["effort"]) == 4
    assert sizes[0] == 4 > max(sizes[1:])


def test_another_error_of_torch_is_none_of_memory(monkeypatch):
    def fails(self, ids, labels):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(EffortScorer, "score", fails)
    with pytest.raises(RuntimeError, match="device-side assert"):
        score_within_memory(EffortScorer(make_model("llama")), *make_samples(), "abcd")


@pytest.mark.parametrize("holds", [20, 25, 40, 79, 10**6])
def test_out_of_memory_scores_smaller_batches_to_the_same_scores(holds):
    ids, labels = make_samples((5, 12, 9, 20, 7, 20, 3), (2, 5, 8, 3, 1, 2, 1))
    columns = ("entropy", "hidden_state")
    expected = EffortScorer(make_model("llama"), columns=columns).score(ids, labels)
    scorer = Small(make_model("llama"), columns=columns)
    scorer.holds = holds
    scores = score_within_memory(scorer, ids, labels, "abcdefg")
    assert scores.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(scores[name], values, rtol=1e-5, atol=1e-6, msg=name)
    failed = [size for size in scorer.tried if size > holds]
    assert all(later <= earlier // 2 for earlier, later in itertools.pairwise(failed))
    scorer.tried = ()
    score_within_memory(scorer, ids, labels, "abcdefg")
    assert all(size <= holds for size in scorer.tried)  # the budget found is kept


def test_a_batch_that_fits_is_scored_as_it_is():
    ids, labels = make_samples()
    scorer = EffortScorer(make_model("llama"))
    together, expected = score_within_memory(scorer, ids, labels, "abcdefg"), scorer.score(ids, labels)
    assert all(torch.equal(together[name], expected[name]) for name in expected)


def test_a_sample_that_does_not_fit_alone_is_named():
    ids, labels = make_samples()  # 5, 12, 9 and 20 tokens
    scorer = Small(make_model("llama"))
    scorer.holds = 19
    said = r"out of memory on row 3, 20 tokens, scored alone: lower cutoff_len, .*device_map auto or .*quantization_bit"
    with pytest.raises(UserError, match=said):
        score_within_memory(scorer, ids, labels, [f"row {i}" for i in range(4)])


def test_the_self_test_fits_in_memory_too(monkeypatch):
    ids, labels = make_samples()
    scorer = Small(make_model("llama"))
    scorer.holds = 20
    assert self_test(scorer, ids, labels, "abcd", "fp32", 10**6) <= 1e-5

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("selection.scores.self_test.plain_scores", full)
    with pytest.raises(UserError, match=r"self-test: out of memory .* --self_test 0"):
        self_test(scorer, ids, labels, "abcd", "fp32", 10**6)


def test_what_the_failed_pass_held_is_let_go_before_the_next(monkeypatch):
    ids, labels = make_samples()
    scorer, right, held = EffortScorer(make_model("llama")), EffortScorer.score, []

    def full_once(self, ids, labels):
        if not held:
            activations = torch.zeros(1)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        assert held[0]() is None
        return right(self, ids, labels)

    monkeypatch.setattr(EffortScorer, "score", full_once)
    assert len(score_within_memory(scorer, ids, labels, "abcdefg")["effort"]) == 4


# --- keys and quantised weights --------------------------------------------------------------------------------------


def test_the_keys_concern_the_target_alone():
    path = str(REPOSITORY / "configs/demo.yaml")
    keys = {"device_map": "auto", "quantization_bit": 4}
    changes = ["small_model=models/small", "target_model=models/large"]
    experiment = load_experiment(path, [*changes, *(f"selection.{key}={value}" for key, value in keys.items())])
    assert placement(experiment, "models/large", None) == keys
    assert placement(experiment, "models/large", experiment.tuned_target("full")) == keys
    assert placement(experiment, "models/small", experiment.tuned_small) == {}
    same = experiment.model_copy(update={"small_model": "models/large"})
    assert placement(same, "models/large", experiment.tuned_small) == {}
    for wrong in ("quantization_bit=16", "device_map=balanced"):
        with pytest.raises(UserError, match=f"key selection.{wrong.partition('=')[0]}"):
            load_experiment(path, [f"selection.{wrong}"])


def test_without_bitsandbytes_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(models, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match=r"quantization_bit 4 needs bitsandbytes .*pip install bitsandbytes"):
        load_for_scoring("no/model", None, "fp32", quantization_bit=4)


@pytest.fixture
def plain_weights(monkeypatch):
    """A function that puts what quantised maps stand for in their place, in fp32."""
    if not is_bitsandbytes_available():
        pytest.skip("bitsandbytes is not installed")
    import bitsandbytes

    def plain(model):
        for name, module in list(model.named_modules()):
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
                state = module.state
                scale = module.weight.SCB if state.SCB is None else state.SCB
                weight = (module.weight.data if state.CB is None else state.CB).float() * scale[:, None] / 127
            else:
                continue
            replacement = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
            replacement.weight.data = weight.float()
            if module.bias is not None:
                replacement.bias.data = module.bias.data.float()
            model.set_submodule(name, replacement)
        return model

    return plain


@pytest.mark.parametrize("phi", ["v_lora_b", "v_weight", "last_layer", "all_lora"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_scores_are_autograd_on_the_dequantised_weights(bits, phi, plain_weights, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "model")
    ids, labels = make_samples()
    losses = response_losses(load_for_scoring(str(tmp_path / "model"), None, "fp32"), ids, labels)

    def scorer(model):
        return EffortScorer(with_fresh_lora(model, 4, 8, "all", 0) if phi == "all_lora" else model, phi)

    quantised, dequantised = (
        load_for_scoring(str(tmp_path / "model"), None, "fp32", quantization_bit=bits) for _ in range(2)
    )
    assert count_parameters(quantised) == count_parameters(make_model("llama"))
    response_losses(quantised, ids, labels)  # a pass without gradients first: bitsandbytes changes its weights in one
    dequantised = plain_weights(dequantised)
    assert not torch.equal(response_losses(dequantised, ids, labels), losses)
    quantised, dequantised = scorer(quantised), scorer(dequantised)
    scores, expected = quantised.score(ids, labels), dequantised.score(ids, labels)
    tolerance = 1e-4 if bits == 4 else 0.05  # LLM.int8 rounds the inputs to 8 bits too
    torch.testing.assert_close(scores["effort"], expected["effort"], rtol=tolerance, atol=0)
    torch.testing.assert_close(plain_scores(quantised, ids, labels)[:, 0], scores["effort"], rtol=tolerance, atol=0)
    if phi == "v_weight":
        norms, _ = autograd(dequantised.model, [dequantised.phi.maps[0].weight], ids, labels)
        torch.testing.assert_close(scores["effort"], norms, rtol=tolerance, atol=0)
