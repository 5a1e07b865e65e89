"""Targets that one device does not hold: placement on several, quantised weights, and batches that fit."""

import itertools
import weakref

import accelerate
import peft
import pytest
import torch
import transformers
from conftest import REPOSITORY
from test_effort import PHIS, assert_close, make_model, make_samples, with_tuned_adapter

from selection.method.effort import EffortScorer, response_losses
from selection.method.phi import NoPhi
from selection.run.config import load_experiment
from selection.run.device import out_of_memory
from selection.run.errors import UserError
from selection.scores import models
from selection.scores.identity import placement
from selection.scores.models import count_parameters, load_for_scoring, with_fresh_lora
from selection.scores.self_test import plain_scores, self_test
from selection.scores.within_memory import score_within_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


def on_disk(model, folder):
    layers = next(name for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList))
    leaves = [name for name, part in model.named_modules() if not list(part.children())]
    places = {name: "cpu" for name in leaves if not name.startswith(layers)}
    places |= {f"{layers}.{i}": "disk" if i else "cpu" for i in range(3)}
    return accelerate.dispatch_model(model, places, offload_dir=str(folder))


PLACES = {
    "hooked": lambda model, folder: accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "offloaded": lambda model, folder: accelerate.cpu_offload(model, execution_device=CPU),
    "on-disk": on_disk,
}


TIED, FUSED = "llama-tied-head", "gpt2-conv1d-fused"
PLACED = [(TIED, "hooked", "all_lora"), (TIED, "on-disk", "last_layer"), (FUSED, "offloaded", "v_weight")]
PLACED += [(FUSED, "on-disk", "v_lora_b")]


@pytest.mark.parametrize(("name", "place", "phi"), PLACED)
def test_a_placed_model_scores_as_without_and_stays_placed(name, place, phi, tmp_path):
    def make():
        return with_tuned_adapter(make_model(name)) if phi == "all_lora" else make_model(name)

    def state(model):
        forwards = {key: module.__dict__.get("forward") for key, module in model.named_modules()}
        return forwards, {key for key, parameter in model.named_parameters() if parameter.is_meta}

    samples = make_samples()
    plain, model = EffortScorer(make(), phi), PLACES[place](make(), tmp_path)
    expected, before = plain.score(*samples), state(model)
    assert any(before[0].values()) and bool(before[1]) == (place != "hooked")
    scorer = EffortScorer(model, phi)
    for _ in range(2):  # the second pass finds what the first has left
        torch.testing.assert_close(scorer.score(*samples), expected, rtol=1e-6, atol=0)
    assert_close(*(response_losses(each.model, *samples) for each in (scorer, plain)))
    assert_close(plain_scores(scorer, *samples)[:, 0], expected["effort"])
    assert state(model) == before


def test_what_would_have_to_stay_on_the_device_is_refused_where_offloaded(tmp_path):
    llama, mixtral = with_tuned_adapter(make_model("llama")), make_model("mixtral")
    for model, phi, name, other in ((mixtral, "last_layer", ".2.", "v_lora_b"), (llama, "all_lora", "q_proj", "last_")):
        with pytest.raises(NoPhi, match=f"{phi}: .*{name}.* is offloaded .* use phi {other}"):
            EffortScorer(PLACES["offloaded"](model, tmp_path), phi)


@pytest.fixture(scope="module")
def on_disk_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_model("llama").save_pretrained(folder / "model")
    with_tuned_adapter(make_model("llama")).save_pretrained(folder / "tuned")
    return str(folder / "model"), folder / "tuned"


def test_a_loaded_model_scores_as_the_one_that_was_saved_and_released_resets_query_and_value(on_disk_models):
    folder, tuned = on_disk_models
    for key, parameter in load_for_scoring(folder, tuned, "fp32", reset_query_value=True).named_parameters():
        if "lora_B" in key:
            assert (parameter == 0).all() == ("q_proj" in key or "v_proj" in key), key
    for adapter, model in ((None, make_model("llama")), (tuned, with_tuned_adapter(make_model("llama")))):
        expected = EffortScorer(model).score(*make_samples())["effort"]
        for device_map, most in ((None, 0), ("auto", 1e-6)):
            loaded = load_for_scoring(folder, adapter, "fp32", device_map=device_map)
            found = EffortScorer(loaded).score(*make_samples())["effort"]
            torch.testing.assert_close(found, expected, rtol=most, atol=0)


def test_weights_go_straight_to_the_gpu_and_leave_it_room_for_batches(monkeypatch, on_disk_models):
    """What is asked of transformers and PEFT is watched, and then done on the CPU."""
    asked = []

    def watch(owner, *keys):
        def on_cpu(*args, load=owner.from_pretrained, **kwargs):
            asked.append(tuple(kwargs.pop(key, None) for key in keys))
            return load(*args, **kwargs)

        monkeypatch.setattr(owner, "from_pretrained", on_cpu)

    watch(transformers.AutoModelForCausalLM, "device_map", "max_memory")
    watch(peft.PeftModel, "torch_device", "max_memory")
    monkeypatch.setattr(models, "get_max_memory", lambda: {0: 1000, 1: 2000, "cpu": 500})
    monkeypatch.setattr(models, "device", lambda: GPU)
    for device_map in (None, "auto"):
        load_for_scoring(*on_disk_models, "fp32", device_map=device_map)
    memory = {0: 850, 1: 1700, "cpu": 500}
    assert asked == [({"": GPU}, None), ("cuda:1", None), ("auto", memory), ("cuda:1", memory)]


def test_a_model_that_lacks_a_weight_is_refused(tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path, state_dict=dict(list(model.state_dict().items())[1:]))
    with pytest.raises(UserError, match=r"has no weights for model\.embed_tokens\.weight \(1 in all\)"):
        load_for_scoring(str(tmp_path), None, "fp32")


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


@pytest.mark.parametrize("holds", [20, 40, 10**6])
def test_out_of_memory_scores_smaller_batches_to_the_same_scores(holds):
    ids, labels = make_samples((5, 12, 9, 20, 7, 20, 3), (2, 5, 8, 3, 1, 2, 1))
    expected = EffortScorer(make_model("llama"), columns=("hidden_state",)).score(ids, labels)
    scorer = Small(holds, columns=("hidden_state",))
    torch.testing.assert_close(score_within_memory(scorer, ids, labels, "abcdefg"), expected, rtol=1e-5, atol=1e-6)
    failed, scorer.tried = [size for size in scorer.tried if size > holds], []
    assert all(later <= earlier // 2 for earlier, later in itertools.pairwise(failed))
    score_within_memory(scorer, ids, labels, "abcdefg")
    assert all(size <= holds for size in scorer.tried)  # the budget found is kept


def test_out_of_memory_is_known_whoever_says_it_and_what_the_failed_pass_held_is_let_go(monkeypatch):
    for said in ("CUBLAS_STATUS_ALLOC_FAILED when calling", "_DEVICE_ALLOCATION_FAILED", "CUDA error: out of memory"):
        assert out_of_memory(RuntimeError(said))
    assert not out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    score, held = EffortScorer.score, []

    def full_once(self, ids, labels):
        if not held:
            activations = torch.zeros(1)
            held.append(weakref.ref(activations))
            torch.empty(2**60)  # which raises torch's own error on a CPU
        assert held[0]() is None
        return score(self, ids, labels)

    monkeypatch.setattr(EffortScorer, "score", full_once)
    scores = score_within_memory(EffortScorer(make_model("llama")), *make_samples(), "abcd")
    assert len(scores["effort"]) == 4 and held


def test_what_does_not_fit_alone_is_named_and_the_self_test_fits_too(monkeypatch):
    said = r"out of memory on row 3, 20 tokens, scored alone: lower cutoff_len, .*device_map auto or .*quantization_bit"
    with pytest.raises(UserError, match=said):
        score_within_memory(Small(19), *make_samples(), [f"row {i}" for i in range(4)])  # 5, 12, 9 and 20 tokens
    assert self_test(Small(20), *make_samples(), "abcd", "fp32") <= 1e-5

    monkeypatch.setattr("selection.scores.self_test.plain_scores", lambda *_: torch.empty(2**60))
    with pytest.raises(UserError, match=r"self-test: out of memory .* --self_test 0"):
        self_test(Small(20), *make_samples(), "abcd", "fp32")


def test_the_keys_concern_the_target_alone():
    path, keys = REPOSITORY / "configs/demo.yaml", ["selection.device_map=auto", "selection.quantization_bit=4"]
    experiment = load_experiment(path, ["small_model=models/small", "target_model=models/large", *keys])
    for tuned in (None, experiment.tuned_target("full")):
        assert placement(experiment, "models/large", tuned) == {"device_map": "auto", "quantization_bit": 4}
    same = experiment.model_copy(update={"small_model": "models/large"})
    for each in (experiment, same):
        assert placement(each, each.small_model, experiment.tuned_small) == {}
    for wrong in ("quantization_bit=16", "device_map=balanced"):
        with pytest.raises(UserError, match=f"key selection.{wrong.partition('=')[0]}"):
            load_experiment(path, [f"selection.{wrong}"])


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_scores_are_autograd_on_the_quantised_model(bits, phi, on_disk_models):
    pytest.importorskip("bitsandbytes")
    samples, whole = make_samples(), make_model("llama")
    model = load_for_scoring(on_disk_models[0], None, "fp32", quantization_bit=bits)
    assert count_parameters(model) == count_parameters(whole)
    with torch.no_grad():  # bitsandbytes changes its weights in a first pass without gradients
        assert not torch.equal(*(response_losses(each, *samples) for each in (model, whole)))
    scorer = EffortScorer(with_fresh_lora(model, 4, 8, "all", 0) if phi == "all_lora" else model, phi)
    scores, alone = scorer.score(*samples)["effort"], plain_scores(scorer, *samples)[:, 0]
    torch.testing.assert_close(scores, alone, rtol=1e-4 if bits == 4 else 0.05, atol=0)  # LLM.int8 rounds inputs too
