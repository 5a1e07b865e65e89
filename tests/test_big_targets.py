"""Targets that one device does not hold: placement on several, quantised weights, and batches that fit."""

import itertools
import weakref

import accelerate
import peft
import pytest
import torch
import transformers
from conftest import REPOSITORY
from test_effort import PHIS, assert_close, autograd, make_model, make_samples, with_tuned_adapter

from selection.method.effort import EffortScorer, response_losses
from selection.method.phi import NoPhi
from selection.run.config import load_experiment
from selection.run.errors import UserError
from selection.scores import models
from selection.scores.identity import placement
from selection.scores.models import count_parameters, load_for_scoring, with_fresh_lora
from selection.scores.self_test import plain_scores, self_test
from selection.scores.within_memory import score_within_memory


def on_disk(model, folder):
    layers = next(name for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList))
    leaves = [name for name, part in model.named_modules() if not list(part.children())]
    places = {name: "cpu" for name in leaves if not name.startswith(layers)}
    places |= {f"{layers}.{i}": "disk" if i else "cpu" for i in range(3)}
    return accelerate.dispatch_model(model, places, offload_dir=str(folder))


PLACES = {
    "hooked": lambda model, folder: accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "offloaded": lambda model, folder: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "on-disk": on_disk,
}


@pytest.mark.parametrize(
    ("place", "phi"),
    [*itertools.product(PLACES, ["v_lora_b", "v_weight", "last_layer"]), ("hooked", "all_lora")],
)
@pytest.mark.parametrize("name", ["llama-tied-head", "gpt2-conv1d-fused"])
def test_a_placed_model_scores_as_without_and_stays_placed(name, place, phi, tmp_path):
    def make():
        return with_tuned_adapter(make_model(name)) if phi == "all_lora" else make_model(name)

    def state(model):
        forwards = {key: module.__dict__.get("forward") for key, module in model.named_modules()}
        return forwards, {key for key, parameter in model.named_parameters() if parameter.is_meta}

    ids, labels = make_samples()
    plain, model = EffortScorer(make(), phi), PLACES[place](make(), tmp_path)
    expected, losses = plain.score(ids, labels), response_losses(plain.model, ids, labels)
    before = state(model)
    assert any(before[0].values()) and bool(before[1]) == (place != "hooked")
    scorer = EffortScorer(model, phi)
    for _ in range(2):  # the second pass finds what the first has left
        scores = scorer.score(ids, labels)
        for column in ("effort", "loss"):
            torch.testing.assert_close(scores[column], expected[column], rtol=1e-6, atol=0)
    torch.testing.assert_close(response_losses(model, ids, labels), losses, rtol=1e-6, atol=0)
    assert_close(plain_scores(scorer, ids, labels)[:, 0], expected["effort"])
    assert state(model) == before


def test_what_would_have_to_stay_on_the_device_is_refused_where_offloaded(tmp_path):
    for model, phi, said in (
        (make_model("mixtral"), "last_layer", r"last_layer: .*layers\.2\..* is offloaded .* use phi v_lora_b"),
        (with_tuned_adapter(make_model("llama")), "all_lora", r"all_lora: .*q_proj is offloaded .* use phi last_layer"),
    ):
        with pytest.raises(NoPhi, match=said):
            EffortScorer(PLACES["offloaded"](model, tmp_path), phi)


@pytest.fixture
def on_disk_models(tmp_path):
    """Folders of a model and of an adapter tuned from it."""
    make_model("llama").save_pretrained(tmp_path / "model")
    with_tuned_adapter(make_model("llama")).save_pretrained(tmp_path / "tuned")
    return str(tmp_path / "model"), tmp_path / "tuned"


@pytest.mark.parametrize("device_map", [None, "auto"])
def test_a_loaded_model_scores_as_the_one_that_was_saved(device_map, on_disk_models):
    folder, tuned = on_disk_models
    for loaded, model in (
        (load_for_scoring(folder, None, "fp32", device_map=device_map), make_model("llama")),
        (load_for_scoring(folder, tuned, "fp32", device_map=device_map), with_tuned_adapter(make_model("llama"))),
    ):
        efforts = [EffortScorer(each).score(*make_samples())["effort"] for each in (loaded, model)]
        torch.testing.assert_close(*efforts, rtol=1e-6 if device_map else 0, atol=0)
        assert device_map or not any(hasattr(module, "_hf_hook") for module in loaded.modules())


def test_weights_go_straight_to_the_gpu_and_leave_it_room_for_batches(monkeypatch, on_disk_models):
    """What is asked of transformers and PEFT is watched, and then done on the CPU."""
    asked, gpu = [], torch.device("cuda", 1)

    def watched(name, load, *keys):
        def on_cpu(*args, **kwargs):
            asked.append(tuple(kwargs.pop(key, None) for key in keys))
            return load(*args, **kwargs)

        monkeypatch.setattr(name, on_cpu)

    auto, lora = transformers.AutoModelForCausalLM.from_pretrained, peft.PeftModel.from_pretrained
    watched("transformers.AutoModelForCausalLM.from_pretrained", auto, "device_map", "max_memory")
    watched("peft.PeftModel.from_pretrained", lora, "torch_device", "max_memory")
    monkeypatch.setattr(models, "get_max_memory", lambda: {0: 1000, 1: 2000, "cpu": 500})
    memory = {0: 850, 1: 1700, "cpu": 500}
    for place, device_map, expected in (
        (gpu, None, [({"": gpu}, None), ("cuda:1", None)]),
        (torch.device("cpu"), None, [(None, None), ("cpu", None)]),
        (gpu, "auto", [("auto", memory), ("cuda:1", memory)]),
    ):
        monkeypatch.setattr(models, "device", lambda place=place: place)
        load_for_scoring(*on_disk_models, "fp32", device_map=device_map)
        assert asked == expected
        asked.clear()


def test_a_model_that_lacks_a_weight_is_refused(tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path, state_dict=dict(list(model.state_dict().items())[1:]))
    with pytest.raises(UserError, match=r"has no weights for model\.embed_tokens\.weight \(1 in all\)"):
        load_for_scoring(str(tmp_path), None, "fp32")


# --- out of memory ---------------------------------------------------------------------------------------------------


class Small(EffortScorer):
    """A scorer on a device whose memory holds batches of at most `holds` tokens, padding included."""

    def __init__(self, holds, **options):
        super().__init__(make_model("llama"), **options)
        self.holds, self.tried = holds, []

    def score(self, input_ids, labels):
        self.tried.append(len(input_ids) * max(map(len, input_ids)))
        if self.tried[-1] > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().score(input_ids, labels)


@pytest.mark.parametrize("holds", [20, 25, 40, 79, 10**6])
def test_out_of_memory_scores_smaller_batches_to_the_same_scores(holds):
    ids, labels = make_samples((5, 12, 9, 20, 7, 20, 3), (2, 5, 8, 3, 1, 2, 1))
    columns = ("entropy", "hidden_state")
    expected = EffortScorer(make_model("llama"), columns=columns).score(ids, labels)
    scorer = Small(holds, columns=columns)
    scores = score_within_memory(scorer, ids, labels, "abcdefg")
    assert scores.keys() == expected.keys()
    for name, values in expected.items():
        exactly = {"rtol": 0, "atol": 0} if holds == 10**6 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(scores[name], values, **exactly, msg=name)
    failed = [size for size in scorer.tried if size > holds]
    assert all(later <= earlier // 2 for earlier, later in itertools.pairwise(failed))
    scorer.tried = []
    score_within_memory(scorer, ids, labels, "abcdefg")
    assert all(size <= holds for size in scorer.tried)  # the budget found is kept


NO_MEMORY = {
    "torch": torch.OutOfMemoryError("CUDA out of memory."),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn-9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "cuda": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported at some other API call"),
    "torch-on-a-cpu": None,
}


@pytest.mark.parametrize("error", NO_MEMORY)
def test_out_of_memory_is_known_whoever_says_it_and_what_the_failed_pass_held_is_let_go(error, monkeypatch):
    scorer, score, held, sizes = EffortScorer(make_model("llama")), EffortScorer.score, [], []

    def full_once(self, ids, labels):
        sizes.append(len(ids))
        if not held:
            activations = torch.zeros(1)
            held.append(weakref.ref(activations))
            torch.empty(1 if NO_MEMORY[error] else 2**60)
            raise type(NO_MEMORY[error])(str(NO_MEMORY[error]))
        assert held[0]() is None
        return score(self, ids, labels)

    monkeypatch.setattr(EffortScorer, "score", full_once)
    assert len(score_within_memory(scorer, *make_samples(), "abcd")["effort"]) == 4
    assert sizes[0] == 4 > max(sizes[1:])


def test_another_error_of_torch_is_none_of_memory(monkeypatch):
    def fails(self, ids, labels):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(EffortScorer, "score", fails)
    with pytest.raises(RuntimeError, match="device-side assert"):
        score_within_memory(EffortScorer(make_model("llama")), *make_samples(), "abcd")


def test_a_sample_that_does_not_fit_alone_is_named():
    said = r"out of memory on row 3, 20 tokens, scored alone: lower cutoff_len, .*device_map auto or .*quantization_bit"
    with pytest.raises(UserError, match=said):
        score_within_memory(Small(19), *make_samples(), [f"row {i}" for i in range(4)])  # 5, 12, 9 and 20 tokens


def test_the_self_test_fits_in_memory_too(monkeypatch):
    assert self_test(Small(20), *make_samples(), "abcd", "fp32", 10**6) <= 1e-5

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("selection.scores.self_test.plain_scores", full)
    with pytest.raises(UserError, match=r"self-test: out of memory .* --self_test 0"):
        self_test(Small(20), *make_samples(), "abcd", "fp32", 10**6)


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


def dequantised(model):
    """The model with what its quantised maps stand for in their place, in fp32."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and type(module) is not torch.nn.Linear:
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight.data = module(torch.eye(module.in_features)).detach().T.contiguous()
            model.set_submodule(name, plain)
    return model


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_scores_are_autograd_on_the_dequantised_weights(bits, phi, on_disk_models):
    pytest.importorskip("bitsandbytes")
    ids, labels = make_samples()
    model, plain = (load_for_scoring(on_disk_models[0], None, "fp32", quantization_bit=bits) for _ in range(2))
    assert count_parameters(model) == count_parameters(make_model("llama"))
    with torch.no_grad():  # bitsandbytes changes its weights in a first pass without gradients
        response_losses(model, ids, labels)
    plain = dequantised(plain)
    assert not torch.equal(*(response_losses(each, ids, labels) for each in (plain, make_model("llama"))))
    if phi == "all_lora":
        model, plain = (with_fresh_lora(each, 4, 8, "all", 0) for each in (model, plain))
    scorer, expected = EffortScorer(model, phi), EffortScorer(plain, phi)
    others = [expected.score(ids, labels)["effort"], plain_scores(scorer, ids, labels)[:, 0]]
    if phi == "v_weight":
        others.append(autograd(plain, [expected.phi.maps[0].weight], ids, labels)[0])
    for other in others:  # LLM.int8 rounds the inputs to 8 bits too
        torch.testing.assert_close(scorer.score(ids, labels)["effort"], other, rtol=1e-4 if bits == 4 else 0.05, atol=0)
