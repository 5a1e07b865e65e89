"""The effort score of a batch equals plain autograd on one sample at a time, on any decoder."""

import random

import peft
import pytest
import torch
import transformers

from selection.effort import EffortScorer, plan_batches, response_losses
from selection.errors import UserError
from selection.models import _reset_query_value
from selection.phi import find_value_projection

VOCABULARY = 97
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GPT_LIKE = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
# name: (config class, its arguments, width of the value part of the projection)
ARCHITECTURES = {
    "llama": (transformers.LlamaConfig, COMMON, 16),
    "llama-tied-head": (transformers.LlamaConfig, COMMON | {"tie_word_embeddings": True}, 16),
    "gemma": (transformers.GemmaConfig, COMMON | {"head_dim": 8}, 16),
    "gemma2-soft-capping": (transformers.Gemma2Config, COMMON | {"head_dim": 8, "final_logit_softcapping": 3.0}, 16),
    "gemma3": (transformers.Gemma3TextConfig, COMMON | {"head_dim": 8, "sliding_window": 8}, 16),
    "mistral": (transformers.MistralConfig, COMMON | {"sliding_window": 6}, 16),
    "mixtral": (transformers.MixtralConfig, COMMON | {"num_local_experts": 4}, 16),
    "qwen2": (transformers.Qwen2Config, COMMON, 16),
    "qwen3": (transformers.Qwen3Config, COMMON | {"head_dim": 8}, 16),
    "phi3-fused": (transformers.Phi3Config, COMMON, 16),
    "smollm3": (transformers.SmolLM3Config, COMMON, 16),
    "granite-scaled-logits": (transformers.GraniteConfig, COMMON | {"logits_scaling": 4.0}, 16),
    "gpt2-conv1d-fused": (
        transformers.GPT2Config,
        dict(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64),
        32,
    ),
    "opt": (
        transformers.OPTConfig,
        GPT_LIKE | {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": 0},
        32,
    ),
    "gpt-neox-fused": (transformers.GPTNeoXConfig, GPT_LIKE | {"intermediate_size": 48}, 32),
    "falcon-fused": (transformers.FalconConfig, GPT_LIKE, 8),
    "phi-parallel-mlp": (transformers.PhiConfig, COMMON, 16),
}


def make_model(name: str, seed: int = 0):
    config_class, arguments, _ = ARCHITECTURES[name]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**arguments)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms off their neutral values
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_samples(lengths=(5, 12, 9, 20), prompts=(2, 5, 8, 3), seed=1):
    generator = random.Random(seed)
    ids = [[generator.randrange(3, VOCABULARY) for _ in range(n)] for n in lengths]
    return ids, [[-100] * p + row[p:] for row, p in zip(ids, prompts, strict=True)]


def autograd_norms(model, parameter, ids, labels, pick=lambda gradient: gradient):
    """The plain way: one sample, one backward pass of the model's own loss, one norm."""
    norms, losses = [], []
    parameter.requires_grad_(True)
    for row, label in zip(ids, labels, strict=True):
        parameter.grad = None
        loss = model(input_ids=torch.tensor([row]), labels=torch.tensor([label]), use_cache=False).loss
        loss.backward()
        norms.append(pick(parameter.grad).norm().item())
        losses.append(loss.item())
    parameter.requires_grad_(False)
    return torch.tensor(norms, dtype=torch.double), torch.tensor(losses, dtype=torch.double)


def assert_close(ours, reference):
    assert torch.all((ours - reference).abs() <= 1e-5 * reference), (ours, reference)


def with_tuned_adapter(model):
    """A LoRA on every linear map, with a B that is not zero."""
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "with-adapter"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weight_gradient_of_a_batch_equals_autograd_of_one(name, adapter):
    model, (ids, labels) = make_model(name), make_samples()
    model = with_tuned_adapter(model) if adapter else model
    values = find_value_projection(model)

    def value_part(gradient):
        gradient = gradient.T if "conv1d" in name else gradient  # GPT-2 keeps its weights transposed
        gradient = gradient if values.columns is None else gradient[values.columns]
        assert gradient.shape == (ARCHITECTURES[name][2], 32)
        return gradient

    scores = EffortScorer(model, "v_weight").score(ids, labels)
    norms, losses = autograd_norms(model, values.weight, ids, labels, value_part)
    assert_close(scores["effort"], norms)
    assert_close(scores["loss"], losses)
    assert_close(response_losses(model, ids, labels).double(), losses)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_b_gradient_of_a_batch_equals_a_real_fresh_lora(name):
    model, (ids, labels) = make_model(name), make_samples()
    scorer = EffortScorer(model, "v_lora_b", rank=81, alpha=16, seed=3)
    scores = scorer.score(ids, labels)
    target = next(key for key, module in model.named_modules() if module is scorer.phi.maps[0].module)
    fresh = peft.LoraConfig(
        r=81, lora_alpha=16, lora_dropout=0.0, target_modules=[target], fan_in_fan_out="conv1d" in name
    )
    wrapped = peft.get_peft_model(model, fresh)
    lora_a, lora_b = (parameter for key, parameter in wrapped.named_parameters() if "lora_" in key)
    assert lora_a.abs().max() <= 32**-0.5 * 1.0001  # PEFT's own draw has the bounds that ours has
    assert scorer.lora_a.abs().max() > 0.95 * 32**-0.5
    with torch.no_grad():
        lora_a.copy_(scorer.lora_a)
    columns = slice(None) if scorer.phi.maps[0].columns is None else scorer.phi.maps[0].columns
    norms, _ = autograd_norms(wrapped, lora_b, ids, labels, lambda gradient: gradient[columns])
    assert_close(scores["effort"], norms)


def test_score_does_not_depend_on_batch_padding_or_order():
    model, (ids, labels) = make_model("llama"), make_samples(lengths=(5, 30, 9, 20, 7), prompts=(2, 5, 8, 3, 1))
    scorer = EffortScorer(model)
    alone = torch.stack([scorer.score([i], [label])["effort"][0] for i, label in zip(ids, labels, strict=True)])
    together = scorer.score(ids, labels)["effort"]
    backwards = scorer.score(ids[::-1], labels[::-1])["effort"].flip(0)
    assert_close(together, alone)
    assert_close(backwards, alone)


def test_chunks_of_the_head_do_not_change_the_score(monkeypatch):
    model, (ids, labels) = make_model("llama"), make_samples()
    whole = EffortScorer(model).score(ids, labels)
    monkeypatch.setattr("selection.effort._LOGITS_AT_ONCE", {"cpu": 3 * VOCABULARY})
    pieces = EffortScorer(model).score(ids, labels)
    assert_close(pieces["effort"], whole["effort"])
    assert_close(pieces["loss"], whole["loss"])


def test_scoring_leaves_the_model_as_it_was():
    model, (ids, labels) = make_model("qwen3"), make_samples()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(torch.tensor([ids[1]])).logits
        EffortScorer(model).score(ids, labels)
        assert torch.equal(logits, model(torch.tensor([ids[1]])).logits)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_bf16_ranks_like_fp32():
    lengths = [6 + i % 25 for i in range(120)]
    ids, labels = make_samples(lengths, [2 + i % 3 for i in range(120)])
    model = make_model("llama")
    exact = EffortScorer(model).score(ids, labels)["effort"]
    rough = EffortScorer(model.to(torch.bfloat16)).score(ids, labels)["effort"]
    rank = torch.stack([exact, rough]).argsort().argsort().double()
    assert torch.corrcoef(rank)[0, 1] > 0.999


def test_a_sample_with_a_huge_loss_weighs_nothing_in_its_neighbours_score():
    model, (ids, labels) = make_model("llama"), make_samples()
    scorer = EffortScorer(model)
    before = scorer.score(ids[:3], labels[:3])["effort"]
    after = scorer.score([*ids[:3], [3] * 40], [*labels[:3], [-100] + [96] * 39])["effort"][:3]
    assert_close(after, before)


def test_no_value_projection_is_an_error_that_names_what_was_looked_at():
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(UserError, match=r"no value projection in layers\.1 .* looked at mixer\.in_proj, mixer\.x_proj"):
        EffortScorer(transformers.MambaForCausalLM(config))


def test_released_mode_resets_query_and_value_adapters_only():
    model = with_tuned_adapter(make_model("llama"))
    _reset_query_value(model)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            assert (parameter == 0).all() == ("q_proj" in key or "v_proj" in key), key


def test_batches_hold_the_budget_and_every_row_once_longest_first():
    lengths = [random.Random(i).randrange(1, 300) for i in range(200)]
    batches = plan_batches(range(200), lengths, tokens_per_batch=512)
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    assert all(max(lengths[row] for row in batch) * len(batch) <= 512 for batch in batches)
    longest = [max(lengths[row] for row in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    assert plan_batches([0], [10_000], tokens_per_batch=512) == [[0]]
