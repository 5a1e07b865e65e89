"""The effort score of a batch equals plain autograd on one sample at a time, on any decoder."""

import itertools
import re

import peft
import pytest
import torch
import transformers
from torch.nn import functional

from scripts.bench.random_models import ARCHITECTURES, VOCABULARY, WEIGHT_WITHOUT_CALL, make_model, make_samples
from selection.method import effort
from selection.method.effort import IN_FOURS, EffortScorer, response_losses
from selection.method.phi import NoPhi
from selection.method.reference import effort_score
from selection.run.errors import UserError
from selection.scores.models import with_fresh_lora
from selection.scores.self_test import plain_scores, self_test

PHIS = ("v_lora_b", "v_weight", "last_layer", "all_lora")


def with_tuned_adapter(model):
    """A LoRA on every linear map, with a B that is not zero."""
    routers = [name for name, each in model.named_modules() if name.endswith("router") and hasattr(each, "in_features")]
    linear = peft.LoraConfig(r=4, target_modules="all-linear", exclude_modules=routers or None)
    model = peft.get_peft_model(model, linear)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(std=0.1)
    return model.eval()


def autograd(model, phi, ids, labels, mask=1):
    """Efforts and losses (2, n) by the reference; of φ's gradients count those under `mask`."""
    hooks = [parameter.requires_grad_(True).register_hook(lambda gradient: gradient * mask) for parameter in phi]
    samples = zip(map(torch.tensor, ids), map(torch.tensor, labels), strict=True)
    found = [effort_score(model, *sample, phi) for sample in samples]
    for hook, parameter in zip(hooks, phi, strict=True):
        hook.remove()
        parameter.requires_grad_(False)
    return torch.tensor(found, dtype=torch.double).T


def assert_close(ours, reference):
    assert torch.all((ours - reference).abs() <= 1e-5 * reference), (ours, reference)


def assert_is_autograd(scorer, model, phi, ids, labels, mask=1):
    scores, expected = scorer.score(ids, labels), autograd(model, phi, ids, labels, mask)
    assert_close(torch.stack([scores["effort"], scores["loss"]]), expected)
    assert_close(plain_scores(scorer, ids, labels).T, expected)
    assert_close(response_losses(model, ids, labels).double(), expected[1])


def last_layer(model):
    matrices = [(key, parameter) for key, parameter in model.named_parameters() if parameter.dim() >= 2]
    return [p for key, p in matrices if re.search(r"\b(layers|h)\.2\.", key) and "lora_" not in key]


@pytest.mark.parametrize(("name", "phi"), [*itertools.product(ARCHITECTURES, PHIS[1:])])
def test_a_batch_scores_as_autograd_of_one_sample(name, phi):
    model, samples, mask = make_model(name), make_samples(), 1
    if name in ("llama", "gpt2-conv1d-fused", "mixtral"):
        model = with_tuned_adapter(model)
    elif phi == "all_lora":
        model = with_fresh_lora(model, rank=4, alpha=8, target="all", seed=0)
    scorer = EffortScorer(model, phi)
    if phi == "v_weight":
        matrices, columns = [scorer.phi.maps[0].weight], scorer.phi.maps[0].columns
        mask = torch.zeros_like(matrices[0])
        by_output = mask.T if "conv1d" in name else mask  # GPT-2 keeps its weights transposed
        by_output[slice(None) if columns is None else columns] = 1
        assert mask.sum() == ARCHITECTURES[name][2] * 32
    elif phi == "last_layer":
        matrices = last_layer(model)
        assert len(matrices) >= 4
    else:
        matrices = [parameter for key, parameter in model.named_parameters() if "lora_" in key]
        assert len(matrices) == 2 * len(scorer.phi.modules) >= 3 * 2 * 2
    assert_is_autograd(scorer, model, matrices, *samples, mask)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_b_gradient_of_a_batch_equals_a_real_fresh_lora(name):
    model, (ids, labels) = make_model(name), make_samples()
    scorer = EffortScorer(model, "v_lora_b", rank=81, alpha=16, seed=3)
    ours = torch.stack([scorer.score(ids, labels)["effort"], plain_scores(scorer, ids, labels)[:, 0]])
    target = next(key for key, module in model.named_modules() if module is scorer.phi.maps[0].module)
    fresh = peft.LoraConfig(r=81, lora_alpha=16, target_modules=[target], fan_in_fan_out="conv1d" in name)
    wrapped = peft.get_peft_model(model, fresh).eval()
    lora_a, lora_b = (parameter for key, parameter in wrapped.named_parameters() if "lora_" in key)
    torch.testing.assert_close(lora_a.abs().max(), scorer.lora_a.abs().max(), rtol=0.05, atol=0)  # PEFT's bounds
    lora_a.data.copy_(scorer.lora_a)
    mask, columns = torch.zeros_like(lora_b), scorer.phi.maps[0].columns
    mask[slice(None) if columns is None else columns] = 1
    wrapped.requires_grad_(False)
    assert_close(ours, autograd(wrapped, [lora_b], ids, labels, mask)[0])


class Experts(torch.nn.ModuleList):
    """In the place of an MLP: the third expert gets no token, and long sequences use the router without calling it."""

    def forward(self, x):
        first, second, _, router = self
        even = (torch.arange(x.shape[1]) % 2 == 0)[:, None]
        weight = functional.linear(x, router.weight) if x.shape[1] > 10 else router(x)
        return torch.where(even, first(x), second(x)) * weight.sigmoid()


def test_an_expert_without_a_token_and_a_router_that_is_called_only_sometimes():
    model = make_model("llama")
    model.model.layers[2].mlp = Experts(torch.nn.Linear(32, 32, bias=False) for _ in range(4))
    scorer, (ids, labels) = EffortScorer(model, "last_layer"), make_samples((5, 9, 20, 15))
    for rows, aside in ((slice(2), []), (slice(2, 4), ["layers.2.mlp.3"]), (slice(2), ["layers.2.mlp.3"])):
        assert_is_autograd(scorer, model, last_layer(model), ids[rows], labels[rows])
        assert list(scorer.phi.others) == aside


@pytest.mark.parametrize("name", WEIGHT_WITHOUT_CALL)
def test_a_weight_used_without_its_module_counts(name):
    model = make_model(name)
    for key, parameter in model.named_parameters():
        if ".mlp." in key:  # the initial weights are so small that a router's gradient is none of the sum
            parameter.data.mul_(10)
    scorer = EffortScorer(model, "last_layer")
    for _ in range(2):
        assert_is_autograd(scorer, model, last_layer(model), *make_samples())


def test_a_weight_used_twice_has_the_gradient_of_both_uses_and_a_part_or_an_added_matrix_is_refused():
    for shared, phi in (("layer", "last_layer"), ("weight", "v_weight")):
        model = make_model("llama")
        layers = model.model.layers
        matrices = [layers[2].self_attn.v_proj.weight]
        if shared == "layer":
            layers[1], matrices = layers[2], [p for p in layers[2].parameters() if p.dim() >= 2]
        else:
            layers[1].self_attn.v_proj.weight = matrices[0]
        assert_is_autograd(EffortScorer(model, phi), model, matrices, *make_samples())
    model = make_model("gpt2-conv1d-fused")
    model.transformer.h[1] = model.transformer.h[2]
    for phi in ("v_weight", "v_lora_b"):
        with pytest.raises(NoPhi, match=r"h\.2\.attn\.c_attn is used twice .* take another phi"):
            EffortScorer(model, phi).score(*make_samples())


def test_more_columns_are_what_their_formulas_say():
    model, (ids, labels) = make_model("gemma2-soft-capping"), make_samples()
    labels[1] = [-100] * 3 + ids[1][3:6] + [-100] * 2 + ids[1][8:]  # two responses in one sample
    scores = EffortScorer(model, columns=("el2n", "el2n_released", "entropy", "hidden_state")).score(ids, labels)
    plain = EffortScorer(model).score(ids, labels)
    assert all(torch.equal(scores[name], plain[name]) for name in ("loss", "effort"))
    for i, (row, label) in enumerate(zip(ids, labels, strict=True)):
        tokens, of_response = torch.tensor(row), torch.tensor(label) != -100
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0]
            hidden = model.get_decoder()(input_ids=tokens[None]).last_hidden_state[0]
        onehot = functional.one_hot(tokens, VOCABULARY)
        probabilities = logits[:-1][of_response[1:]].softmax(-1)
        expected = {
            "el2n": (probabilities - onehot[1:][of_response[1:]]).norm(dim=1).mean(),
            "el2n_released": (logits - onehot)[of_response].square().mean().sqrt(),
            "entropy": -(probabilities * probabilities.log()).sum(1).mean(),
            "hidden_state": hidden[of_response].mean(0),
        }
        for name, value in expected.items():
            torch.testing.assert_close(scores[name][i].to(value), value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("phi", PHIS)
def test_score_does_not_depend_on_batch_padding_order_a_neighbours_loss_or_how_it_is_computed(phi, monkeypatch):
    ids, labels = make_samples(lengths=(5, 60, 9), prompts=(2, 5, 8))
    ids, labels = [*ids, [3] * 40], [*labels, [-100] + [96] * 39]  # the last one's loss is huge
    scorer = EffortScorer(with_tuned_adapter(make_model("llama")), phi)
    alone = torch.cat([scorer.score([i], [label])["effort"] for i, label in zip(ids, labels, strict=True)])
    assert_close(scorer.score(ids, labels)["effort"], alone)
    assert_close(scorer.score(ids[::-1], labels[::-1])["effort"].flip(0), alone)
    for constant, value in (("_COMPOSED_ATTENTION_UP_TO", 0), ("_LOGITS_AT_ONCE", {"cpu": 3 * VOCABULARY})):
        monkeypatch.setattr(effort, constant, value)
        assert_close(scorer.score(ids, labels)["effort"], alone)


@pytest.mark.parametrize("phi", ["v_lora_b", "last_layer"])
def test_few_response_tokens_score_exactly_under_a_real_vocabulary(phi, monkeypatch):
    """A CPU sums one to three rows one by one over the vocabulary and so loses digits beside a large mean embedding."""
    vocabulary = 49_152  # of SmolLM2
    model = make_model("llama", vocab_size=vocabulary)
    model.lm_head.weight.data.add_(0.5)
    scorer = EffortScorer(model, phi)
    ids, labels = make_samples((2, 3, 9, 12), (1, 1, 7, 3))  # 1, 2, 2 and 9 rows of responses
    expected, rows = plain_scores(EffortScorer(model.double(), phi), ids, labels), []
    model.float().lm_head.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape[1]))
    monkeypatch.setattr(effort, "_LOGITS_AT_ONCE", {"cpu": 7 * vocabulary})  # 4, 4 and 1 of the last's
    for i, (exact_effort, exact_loss) in enumerate(expected):
        sample = ids[i : i + 1], labels[i : i + 1]
        scores, (plain,) = scorer.score(*sample), plain_scores(scorer, *sample)
        assert_close(torch.cat([scores["effort"], plain[:1]]), exact_effort)
        assert_close(torch.cat([scores["loss"], plain[1:], response_losses(model, *sample)]), exact_loss)
    assert rows and not any(count % IN_FOURS for count in rows)  # so it is for any number of threads


@pytest.mark.parametrize("phi", ["v_weight", "last_layer", "all_lora"])
def test_scoring_leaves_the_model_as_it_was_and_keeps_nothing_below_phi(phi):
    model, (ids, labels) = with_tuned_adapter(make_model("mixtral")), make_samples()
    expected = EffortScorer(model, phi).score(ids, labels)
    model.enable_input_require_grads()  # as gradient checkpointing asks for
    before, kept = {key: value.clone() for key, value in model.state_dict().items()}, []
    scorer, layer = EffortScorer(model, phi), model.get_decoder().layers[0]
    layer.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0].requires_grad))
    attributes = [{*vars(module), *module._forward_hooks} for module in model.modules()]
    with pytest.raises(IndexError):
        scorer.score([[VOCABULARY + 1, 3]], [[-100, 3]])  # a token that it does not have
    scores = scorer.score(ids, labels)
    assert all(torch.equal(scores[name], expected[name]) for name in expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [{*vars(module), *module._forward_hooks} for module in model.modules()] == attributes
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert kept == [False] and model.config._attn_implementation == "sdpa"


def test_a_model_without_the_phi_is_an_error_that_names_what_was_looked_at():
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    mamba, llama = transformers.MambaForCausalLM(config), make_model("llama")
    dora = peft.get_peft_model(make_model("llama"), peft.LoraConfig(target_modules=["q_proj"], use_dora=True))
    for model, phi, said in (
        (mamba, "v_lora_b", r"no value projection in layers\.1 .* at mixer\.in_proj, mi"),
        (llama, "all_lora", "found no LoRA in LlamaForCausalLM: its last layer has self_attn.q_proj, "),
        (dora, "all_lora", r"layers\.0\.self_attn\.q_proj is no plain A and B in a decoder layer"),
    ):
        with pytest.raises(NoPhi, match=said):
            EffortScorer(model, phi)


def test_the_self_test_stops_at_a_score_that_depends_on_its_batch(monkeypatch):
    scorer, right = EffortScorer(make_model("llama")), EffortScorer.score
    scorer.largest_batch = 24
    assert self_test(scorer, *make_samples(), "abcd", "fp32") <= 1e-5
    model = with_tuned_adapter(make_model("llama").to(torch.bfloat16))  # whose adapters stay in fp32
    assert self_test(EffortScorer(model, "all_lora"), *make_samples(), "abcd", "bf16") < 0.05
    for factor, said in ((1.001, r"self-test: c has effort .* a relative difference of 0\.00"), (torch.nan, "nan")):

        def wrong(self, ids, labels, factor=factor):
            scores, nine = right(self, ids, labels), torch.tensor([len(row) == 9 for row in ids])
            return scores | {"effort": torch.where(nine, factor, 1.0) * scores["effort"]}

        monkeypatch.setattr(EffortScorer, "score", wrong)
        with pytest.raises(UserError, match=said):
            self_test(scorer, *make_samples(), "abcd", "fp32")
